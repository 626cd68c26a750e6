"""The record that an adapted module carries. Its class, or the graph above it, is derived from the record.

There is no record on the root: everything is read off the owners, so that a copy, a wrapper or a part of an adapted
model is an adapted model too.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from misscompile.record.spread import own_part
from misscompile.record.words import Adapter, Block

STATE = "_miss"
"""Name of the attribute of an owner that holds its `OwnerState`."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by size in bytes."""


@dataclasses.dataclass
class Kept:
    """A tensor as it was before a merge that keeps the adapters."""

    value: Tensor | None
    """None where the module had no such tensor."""
    merged: tuple[int, ...] | None
    """`fingerprint` of what the merge put in its place, which tells whether that was changed; None for nothing."""


@dataclasses.dataclass
class OwnerState:
    """The record on a module that adapters act on."""

    base_class: type[nn.Module]
    shape: tuple[int, int] | None = None
    """`(in_features, out_features)` of a linear; None for a module that only has copies."""
    blocks: dict[str, Block] = dataclasses.field(default_factory=dict)
    copies: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Adapter to the tensors that it trains in full (biases, modules to save), each beside the base's own."""
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: int = 0
    merged: tuple[str, ...] = ()
    kept: dict[str, Kept] = dataclasses.field(default_factory=dict)
    """Tensors as they were before a merge that can be undone, by name."""
    in_graph: bool = False
    """Whether blocks act in a graph above the module, and not in a forward of its own."""
    foreign_forward: Any = None
    """An instance attribute `forward` that somebody else had put on the module."""
    stands_for: str | None = None
    """The name of its site beside it, where the module was made for its blocks alone (`table#`, `step#0`)."""
    classes: dict[tuple[str, ...], type[nn.Module]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """The classes that the module has had, by the adapters that acted: going back to a set needs no new one."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "classes": {}}  # a copy derives its own

    def acting(self) -> tuple[str, ...]:
        """The adapters that act now, in the order of activation."""
        return () if self.disabled else tuple([name for name in self.active if name not in self.merged])

    def effective_blocks(self) -> tuple[Block, ...]:
        """The blocks that act now, in the order of activation."""
        return tuple([self.blocks[name] for name in self.acting() if name in self.blocks])

    def effective_copies(self) -> tuple[tuple[str, str], ...]:
        """`(tensor, the registered copy that stands for it now)`."""
        if not self.copies:
            return ()
        return tuple((tensor, copy_name(name, tensor)) for name in self.acting() for tensor in self.copies.get(name, ()))

    def registered(self, adapter: str) -> list[str]:
        """Names of everything that one adapter registered on this module."""
        block = [self.blocks[adapter].parameter] if adapter in self.blocks else []
        return block + [copy_name(adapter, tensor) for tensor in self.copies.get(adapter, ())]

    def all_registered(self) -> list[str]:
        """Names of everything that any adapter registered on this module."""
        return [name for adapter in self.adapters for name in self.registered(adapter)]


def describe(state: OwnerState) -> str:
    """What an adapted module shows of itself in `repr`."""
    parts = [f"{b.adapter}: {b.variant} r={b.r}" for b in state.blocks.values()]
    blocks = ", ".join(parts + [f"{name}: {', '.join(tensors)}" for name, tensors in state.copies.items()])
    off = " (merged)" if state.merged else " (disabled)" if state.disabled else ""
    return f"miss=[{blocks}]{off}"


class _Loads(threading.local):
    """The load of a `state_dict` that runs in this thread, told by its list of missing keys."""

    missing: list[str] | None = None
    forgiven: list[str] | None = None
    """What was taken out of that list again; None where the dict is known to have adapters."""


_LOADS = _Loads()


def forgive_base(owner: nn.Module, prefix: str, state_dict: Mapping[str, Any], missing_keys: list[str]) -> None:
    """Take the keys of an owner out of `missing_keys` where a base is loaded, which has no adapters.

    A dict that has a key of any owner is one of an adapted model: what it lacks is missing, also of owners before.
    """
    ours = {prefix + name for name in vars(owner)[STATE].all_registered()}
    if _LOADS.missing is not missing_keys:
        _LOADS.missing, _LOADS.forgiven = missing_keys, []
    if _LOADS.forgiven is None:
        return
    if not ours.isdisjoint(state_dict):
        missing_keys[:0] = _LOADS.forgiven
        _LOADS.forgiven = None
        return
    _LOADS.forgiven += [key for key in missing_keys if key in ours]
    missing_keys[:] = [key for key in missing_keys if key not in ours]


def base_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module without adapters."""
    state: OwnerState | None = vars(module).get(STATE)
    return state.base_class if state else type(module)


def copy_name(adapter: str, tensor: str) -> str:
    """Name under which the copy of `tensor` that an adapter trains is registered on the tensor's module.

    No adapter's name holds a colon, so that `a` on `c_bias` and `a_c` on `bias` stay apart.
    """
    return f"miss_copy_{adapter}:{tensor}"


def base_tensor(owner: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the base by its own name, whatever stands for it now."""
    tensor: Tensor | None = owner._parameters.get(name)
    tensor = owner._buffers.get(name) if tensor is None else tensor
    assert tensor is not None
    return tensor


def fingerprint(tensor: Tensor) -> tuple[int, ...]:
    """What changes with the values of a tensor: checksums of the sums of its words by row and by column.

    A write through `.data` leaves the version of a tensor alone, and a copy or an assigned tensor of the same values is
    another object. A second copy of the values to compare with would take as much memory as they do.
    """
    tensor = own_part(tensor)
    if tensor.numel() == 0:
        return ()
    rows = tensor.detach().reshape(len(tensor) if tensor.dim() > 1 else 1, -1).contiguous()
    size = math.gcd(rows.shape[1] * rows.element_size(), rows.storage_offset() * rows.element_size(), 8)
    words = rows.view(_WORDS[size])
    return tuple(zlib.crc32(words.sum(axis).cpu().numpy().tobytes()) for axis in (0, 1))


def can_train(tensor: Tensor) -> bool:
    """Whether a tensor can have a gradient: integers cannot."""
    return tensor.is_floating_point() or tensor.is_complex()


def merged_tensor(kept: Kept, owner: nn.Module, name: str) -> Tensor | None:
    """What a merge put in the place of a kept tensor, if anything; inside `disable_adapter` the two are exchanged."""
    return kept.value if vars(owner)[STATE].disabled else owner._parameters.get(name, owner._buffers.get(name))


def is_current(kept: Kept, owner: nn.Module, name: str) -> bool:
    """Whether what a merge put in the place of a kept tensor has the values that it wrote."""
    held = merged_tensor(kept, owner, name)
    if held is None or kept.merged is None:
        return held is None and kept.merged is None
    return held.is_meta or fingerprint(held) == kept.merged


def apply_with_kept(owner: nn.Module, fn: Callable[[Tensor], Tensor], apply: Callable[[], Any]) -> Any:
    """Change the dtype or device of a module with `apply`, and of what a merge kept of it with `fn`."""
    state: OwnerState = vars(owner)[STATE]
    current = {name: is_current(kept, owner, name) for name, kept in state.kept.items()}
    result = apply()
    for name, kept in state.kept.items():
        if isinstance(kept.value, nn.Parameter):
            kept.value.data = fn(kept.value.data)
        elif kept.value is not None:
            kept.value = fn(kept.value)
        merged = merged_tensor(kept, owner, name)
        if current[name] and merged is not None and not merged.is_meta:
            kept.merged = fingerprint(merged)
    return result

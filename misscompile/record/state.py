"""The record that an adapted module carries. Its class, or the graph above it, is derived from the record.

There is no record on the root: everything is read off the owners, so that a copy, a wrapper or a part of an adapted
model is an adapted model too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from misscompile.record.words import Adapter, Block

STATE = "_miss"
"""Name of the attribute of an owner that holds its `OwnerState`."""


@dataclasses.dataclass
class Kept:
    """A tensor as it was before a merge that keeps the adapters."""

    value: Tensor | None
    """None where the module had no such tensor."""
    version: tuple[int, int] = (0, 0)
    """`tensor_version` of what stands in its place; a later change of that shows in it."""


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

    def effective_blocks(self) -> tuple[Block, ...]:
        """The blocks that act now, in the order of activation."""
        if self.disabled:
            return ()
        return tuple([self.blocks[name] for name in self.active if name in self.blocks and name not in self.merged])

    def effective_copies(self) -> tuple[tuple[str, str], ...]:
        """`(tensor, the registered copy that stands for it now)`."""
        if self.disabled or not self.copies:
            return ()
        acting = [name for name in self.active if name in self.copies and name not in self.merged]
        return tuple((tensor, copy_name(name, tensor)) for name in acting for tensor in self.copies[name])

    def registered(self, adapter: str) -> list[str]:
        """Names of everything that one adapter registered on this module."""
        block = [self.blocks[adapter].parameter] if adapter in self.blocks else []
        return block + [copy_name(adapter, tensor) for tensor in self.copies.get(adapter, ())]

    def all_registered(self) -> list[str]:
        """Names of everything that any adapter registered on this module."""
        return [name for adapter in self.adapters for name in self.registered(adapter)]


def base_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module without adapters."""
    state: OwnerState | None = vars(module).get(STATE)
    return state.base_class if state else type(module)


def copy_name(adapter: str, tensor: str) -> str:
    """Name under which the copy of `tensor` that an adapter trains is registered on the tensor's module."""
    return f"miss_copy_{adapter}_{tensor}"


def base_tensor(owner: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the base by its own name, whatever stands for it now."""
    tensor: Tensor | None = owner._parameters.get(name)
    tensor = owner._buffers.get(name) if tensor is None else tensor
    assert tensor is not None
    return tensor


def tensor_version(tensor: Tensor) -> tuple[int, int]:
    """`(id, _version)`, which changes with every in-place write that autograd knows of."""
    return id(tensor), tensor._version


def is_current(kept: Kept, owner: nn.Module, name: str) -> bool:
    """Whether what a merge wrote in the place of a kept tensor is as it wrote it."""
    held = owner._parameters.get(name, owner._buffers.get(name))
    if held is None:
        return True
    now = tensor_version(held)
    return kept.version[0] != now[0] or kept.version == now  # the tensor of a copied or loaded model has counts of its own


def convert_kept(owner: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Let what a merge kept of `owner` follow a change of dtype or device."""
    state: OwnerState = vars(owner)[STATE]
    for kept in state.kept.values():
        if isinstance(kept.value, nn.Parameter):
            kept.value.data = convert(kept.value.data)
        elif kept.value is not None:
            kept.value = convert(kept.value)


def forgive_base(owner: nn.Module, prefix: str, missing_keys: list[str]) -> None:
    """Take what adapters registered on `owner` out of the keys that a `state_dict` lacks: that of a base has none."""
    ours = {prefix + name for name in vars(owner)[STATE].all_registered()}
    missing_keys[:] = [key for key in missing_keys if key not in ours]


@torch.no_grad()
def swap_kept(owner: nn.Module) -> None:
    """Exchange what a merge wrote on `owner` with what it kept of the base, bit for bit.

    On an ordinary module the values are exchanged in place. A graph shares its parameters with the model that it was made
    from: there the parameters themselves are exchanged.
    """
    state: OwnerState = vars(owner)[STATE]
    for name, kept in state.kept.items():
        if state.in_graph and name not in owner._buffers:
            held = owner._parameters.get(name)
            if kept.value is None:
                del owner._parameters[name]
            else:
                assert isinstance(kept.value, nn.Parameter)
                owner._parameters[name] = kept.value
            kept.value = held
        else:
            assert kept.value is not None
            tensor = base_tensor(owner, name)
            held_values = tensor.detach().clone()
            tensor.copy_(kept.value)
            kept.value.copy_(held_values)
        now = owner._parameters.get(name, owner._buffers.get(name))
        kept.version = (0, 0) if now is None else tensor_version(now)

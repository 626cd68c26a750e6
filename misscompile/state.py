"""The record that an adapted module carries, and how it is found and put back.

There is no record on the root: everything is read off the owners, so that a copy, a wrapper or a part of an adapted
model is an adapted model too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from misscompile.errors import ArgumentError, StateError, UnknownAdapterError
from misscompile.plan import Adapter, Block

STATE = "_miss"
"""Name of the attribute of an owner that holds its `OwnerState`."""


@dataclasses.dataclass
class OwnerState:
    """The record on a module that adapters act on. The module's class is derived from it, never the reverse."""

    base_class: type[nn.Module]
    shape: tuple[int, int] | None
    """`(in_features, out_features)` of a linear; None for a module that only has copies."""
    blocks: dict[str, Block] = dataclasses.field(default_factory=dict)
    copies: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Adapter to the tensors that it trains in full (biases, modules to save), each beside the base's own."""
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: int = 0
    merged: tuple[str, ...] = ()
    base_values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Tensors as they were before a merge that keeps the adapters."""
    merged_versions: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """`(id, _version)` of those tensors right after that merge; a later change shows in it."""
    in_graph: bool = False
    """Whether blocks act in the graph of a `WholeGraph` above the module, and not in a forward of its own."""
    foreign_forward: Any = None
    """An instance attribute `forward` that somebody else had put on the module."""

    def effective_blocks(self) -> tuple[Block, ...]:
        """The blocks that act in the forward now, in the order in which the adapters were activated."""
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


def copy_name(adapter: str, tensor: str) -> str:
    """Name under which the copy of `tensor` that an adapter trains is registered on the tensor's module."""
    return f"miss_copy_{adapter}_{tensor}"


def unwrap_model(model: object) -> nn.Module:
    """The module below `torch.compile` and data-parallel wrappers, whose names are those of the user's model.

    Raises:
        ArgumentError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        hint = " (adapt and load_adapter make a module of it)" if isinstance(model, torch.export.ExportedProgram) else ""
        raise ArgumentError(f"model: expected a torch.nn.Module, found {type(model).__name__}{hint}.")
    wrapped: Any = model
    while True:
        inner = wrapped._modules.get("_orig_mod")
        if inner is None and isinstance(wrapped, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = wrapped.module
        if inner is None:
            return wrapped  # type: ignore[no-any-return]
        wrapped = inner


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """`nn.Module.named_modules` without the segments that `torch.compile` adds where it wraps a part of the model.

    Of a compiled wrapper and what it wraps, which then have one name, the latter. One pass over the tree: the method of
    torch hands each module through a generator for every level above it.
    """
    found = {"": model}
    seen = {model}

    def visit(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        for child_name, child in module._modules.items():
            if child is None or (remove_duplicate and child in seen):
                continue
            seen.add(child)
            path = name if child_name == "_orig_mod" else prefix + child_name
            found[path] = child
            if child._modules:
                visit(path, child)

    visit("", model)
    return found


def unique_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that these modules hold themselves, each once."""
    held = (parameter for module in modules for parameter in module._parameters.values())
    return list({id(parameter): parameter for parameter in held if parameter is not None}.values())


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that carry a record, by canonical (first) dotted name."""
    return {name: module for name, module in named_modules(model).items() if STATE in vars(module)}


def owner_states(model: nn.Module) -> dict[str, OwnerState]:
    """The records of `model`, by canonical dotted name of the owner."""
    return records(named_modules(model))


def records(modules: Mapping[str, nn.Module]) -> dict[str, OwnerState]:
    """The records on these modules, by the same names."""
    return {name: vars(module)[STATE] for name, module in modules.items() if STATE in vars(module)}


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on `model` by name, in the order in which they were added."""
    return {name: adapter for state in owner_states(model).values() for name, adapter in state.adapters.items()}


def require_adapter(model: nn.Module, name: object) -> Adapter:
    """The adapter of this name.

    Raises:
        ArgumentError: `name` is not a string.
        UnknownAdapterError: there is none; the message lists those there are.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"adapter_name: expected a string, found {type(name).__name__}.")
    known = adapters_of(model)
    if name not in known:
        there = f"it has {', '.join(map(repr, known))}" if known else "it has none; call adapt or load_adapter first"
        raise UnknownAdapterError(f"the model has no adapter {name!r}: {there}.")
    return known[name]


def check_enabled(model: nn.Module, verb: str) -> None:
    """Refuse a verb inside `disable_adapter`.

    Raises:
        StateError: naming the verb.
    """
    if any(state.disabled for state in owner_states(model).values()):
        raise inside_disabled(verb)


def inside_disabled(verb: str) -> StateError:
    """The error for a verb that was called inside `disable_adapter`."""
    return StateError(f"{verb} was called inside disable_adapter(model): leave the context first.")


def base_tensor(owner: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the base by its own name, whatever stands for it now."""
    tensor: Tensor | None = owner._parameters.get(name)
    tensor = owner._buffers.get(name) if tensor is None else tensor
    assert tensor is not None
    return tensor


def has_attribute(module: nn.Module, name: str) -> bool:
    """`hasattr`, without the error by which `nn.Module` says no and which takes most of its time."""
    if type(module).__getattr__ is not nn.Module.__getattr__:
        return hasattr(module, name)
    registered = name in module._parameters or name in module._buffers or name in module._modules
    return registered or name in vars(module) or hasattr(type(module), name)


def tensor_version(tensor: Tensor) -> tuple[int, int]:
    """`(id, _version)`, which changes with every in-place write that autograd knows of."""
    return id(tensor), tensor._version


@torch.no_grad()
def swap_base_values(owner: nn.Module) -> None:
    """Exchange the merged tensors of an owner with the kept ones of the base, in place and bit for bit."""
    state: OwnerState = vars(owner)[STATE]
    for name, kept in state.base_values.items():
        tensor = base_tensor(owner, name)
        held = tensor.detach().clone()
        tensor.copy_(kept)
        kept.copy_(held)
        state.merged_versions[name] = tensor_version(tensor)


@contextlib.contextmanager
def transaction(modules: Collection[nn.Module], touched: Iterable[nn.Module] = ()) -> Iterator[list[nn.Parameter]]:
    """Put records, classes, parameters and `requires_grad` flags back as they were if the body raises.

    Args:
        modules: those of the model. The records among them are kept, and the flags of all.
        touched: modules that will get a record.

    Yields:
        The parameters of `modules` as they are before the body, each once.
    """
    changing = dict.fromkeys([*touched, *(module for module in modules if STATE in vars(module))])
    saved = [(m, type(m), vars(m).copy(), m._parameters.copy(), m._buffers.copy(), _copy_state(m)) for m in changing]
    held = unique_parameters(modules)
    flags = [parameter.requires_grad for parameter in held]
    try:
        yield held
    except BaseException:
        for module, kind, members, parameters, buffers, state in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(members)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            if state is not None:
                vars(module)[STATE] = state
        for parameter, flag in zip(held, flags, strict=True):
            parameter.requires_grad = flag
        raise


def _copy_state(module: nn.Module) -> OwnerState | None:
    state: OwnerState | None = vars(module).get(STATE)
    if state is None:
        return None
    fields = {name: copy.copy(value) for name, value in vars(state).items() if name != "foreign_forward"}
    return OwnerState(**fields, foreign_forward=state.foreign_forward)

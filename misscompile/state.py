"""The record that an adapted module carries, and how it is found and put back.

There is no record on the root: everything is read off the owners, so that a copy, a wrapper or a part of an adapted
model is an adapted model too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from misscompile.errors import ArgumentError, StateError, UnknownAdapterError
from misscompile.plan import Adapter, Block

STATE = "_miss"
"""Name of the attribute of an owner that holds its `OwnerState`."""


@dataclasses.dataclass
class OwnerState:
    """The record on a module that owns an adapted weight. The module's class is derived from it, never the reverse."""

    base_class: type[nn.Module]
    in_features: int
    out_features: int
    blocks: dict[str, Block] = dataclasses.field(default_factory=dict)
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: int = 0
    merged: tuple[str, ...] = ()
    base_weight: Tensor | None = None
    """The weight as it was before a merge that keeps the adapters."""
    merged_version: tuple[int, int] | None = None
    """`(id, _version)` of the weight right after that merge; a later change of the weight shows in it."""
    foreign_forward: Any = None
    """An instance attribute `forward` that somebody else had put on the module."""

    def effective_blocks(self) -> tuple[Block, ...]:
        """The blocks that act in the forward now, in the order in which the adapters were activated."""
        if self.disabled:
            return ()
        return tuple(self.blocks[name] for name in self.active if name in self.blocks and name not in self.merged)


def unwrap_model(model: object) -> nn.Module:
    """The module below `torch.compile` and data-parallel wrappers, whose names are those of the user's model.

    Raises:
        ArgumentError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        hint = "; take its .module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise ArgumentError(f"model: expected a torch.nn.Module, found {type(model).__name__}{hint}.")
    wrapped: Any = model
    while True:
        inner = wrapped._modules.get("_orig_mod")
        if inner is None and isinstance(wrapped, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = wrapped.module
        if inner is None:
            return wrapped  # type: ignore[no-any-return]
        wrapped = inner


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that carry a record, by canonical (first) dotted name."""
    return {name: module for name, module in model.named_modules() if STATE in vars(module)}


def owner_states(model: nn.Module) -> dict[str, OwnerState]:
    """The records of `model`, by canonical dotted name of the owner."""
    return {name: vars(owner)[STATE] for name, owner in owners(model).items()}


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
        raise StateError(f"{verb} was called inside disable_adapter(model): leave the context first.")


def weight_version(owner: nn.Module) -> tuple[int, int]:
    """`(id, _version)` of the weight, which changes with every in-place write that autograd knows of."""
    weight = owner.weight
    assert isinstance(weight, Tensor)
    return id(weight), weight._version


@torch.no_grad()
def swap_base_weight(owner: nn.Module) -> None:
    """Exchange the weight of a merged owner with its kept base weight, in place and bit for bit; else do nothing."""
    state: OwnerState = vars(owner)[STATE]
    weight = owner.weight if state.base_weight is not None else None
    if state.base_weight is None or not isinstance(weight, Tensor):
        return
    held = weight.detach().clone()
    weight.copy_(state.base_weight)
    state.base_weight.copy_(held)
    state.merged_version = weight_version(owner)


@contextlib.contextmanager
def transaction(model: nn.Module, touched: Iterable[nn.Module]) -> Iterator[None]:
    """Put records, classes, parameters and `requires_grad` flags back as they were if the body raises."""
    modules = dict.fromkeys([*touched, *owners(model).values()])
    saved = [(m, type(m), dict(vars(m)), dict(m._parameters), copy.copy(vars(m).get(STATE))) for m in modules]
    dicts = [(s, dict(s.blocks), dict(s.adapters)) for *_, s in saved if s is not None]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for state, blocks, adapters in dicts:
            state.blocks, state.adapters = blocks, adapters
        for module, kind, members, parameters, state in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(members)
            module._parameters.clear()
            module._parameters.update(parameters)
            if state is not None:
                vars(module)[STATE] = state
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise

"""The order of the passes, the one runner, and the derivation of an owner's class from its record.

nn.Module ─ trace ─ find ─ plan ─ create ─ register ─ insert ─ generate ─ install ─▶ the same nn.Module
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from misscompile.passes.find import find_sites, weight_dtype
from misscompile.passes.insert import insert_updates
from misscompile.passes.install import (
    AdaptedOwner,
    check_class,
    find_foreign_forward,
    generate_forward,
    make_class,
    readable_code,
    set_class,
)
from misscompile.passes.trace import make_opaque, trace_forward
from misscompile.plan import Block, ModelScope, Scope
from misscompile.state import STATE, OwnerState

logger = logging.getLogger("misscompile.passes")

Copies = tuple[tuple[str, str], ...]
"""`(tensor, its registered copy)` for everything that the active adapters train in full on one module."""

ScopePass = Callable[[Scope], None]
S = TypeVar("S", Scope, ModelScope)

ADAPT: tuple[ScopePass, ...] = (find_sites, insert_updates, generate_forward)
"""What happens to the traced graph of an owner, in this order."""

_traced: dict[Any, Scope] = {}
_classes: dict[Any, type[AdaptedOwner]] = {}


def run_passes(passes: Sequence[Callable[[S], None]], scope: S) -> None:
    """Run `passes` over `scope` in their order, lint the graph after each, and log it where a pass changed it (DEBUG)."""
    before = ""
    for scope_pass in passes:
        scope_pass(scope)
        scope.graph.lint()
        if logger.isEnabledFor(logging.DEBUG) and (after := str(scope.graph)) != before:
            logger.debug("%s after %s:\n%s", scope.label, scope_pass.__name__, after)
            before = after


def trace_scope(owner: nn.Module, shape: tuple[int, int]) -> Scope:
    """The scope of an owner as its base class defines it, with its sites found; owners of equal structure share it.

    Args:
        owner: a linear module, adapted or not; it is not changed.
        shape: its `(in_features, out_features)`.
    """
    state: OwnerState | None = vars(owner).get(STATE)
    foreign = state.foreign_forward if state else find_foreign_forward(owner)
    key = _structure(owner, state, shape) if foreign is None else None
    scope = _traced.get(key)
    if scope is None:
        scope = Scope(state.base_class if state else type(owner), *shape, weight_dtype=weight_dtype(owner))
        trace_forward(scope, owner, foreign)
        find_sites(scope)
        if not scope.sites:
            make_opaque(scope, owner, foreign, "its forward does not call its own weight as a linear")
            find_sites(scope)
        scope.base_code = readable_code(scope.graph.python_code(root_module="self").src)
        scope.shared = key is not None
        if key is not None:
            _traced[key] = scope
    return scope


def specialize(
    owner: nn.Module,
    shape: tuple[int, int] | None,
    blocks: tuple[Block, ...],
    copies: Copies = (),
    base: Scope | None = None,
) -> type[AdaptedOwner]:
    """The class that makes `owner` compute its base forward with `blocks` and `copies`; built once for each structure.

    Args:
        owner: a linear module, or one that only has copies.
        shape: `(in_features, out_features)` of a linear, else None.
        blocks: the blocks that act.
        copies: the copies that stand for tensors of the base.
        base: `trace_scope(owner, shape)` where the caller has it.

    Raises:
        UnsupportedModuleError: a block cannot be inserted into this owner's forward.
    """
    if shape is None:
        base_class = vars(owner)[STATE].base_class if STATE in vars(owner) else type(owner)
        key: Any = (base_class, copies)
        if key not in _classes:
            _classes[key] = make_class(base_class, None, copies)
        return _classes[key]
    base = base or trace_scope(owner, shape)
    key = (base, blocks, copies)
    found = _classes.get(key)
    if found is None:
        scope = Scope(
            base.base_class,
            base.in_features,
            base.out_features,
            base.weight_dtype,
            graph=copy.deepcopy(base.graph),
            opaque=base.opaque,
            blocks=blocks,
            base_code=base.base_code,
        )
        run_passes(ADAPT, scope)
        found = make_class(base.base_class, scope, copies)
        if base.shared:
            _classes[key] = found
    return found


def check_classes(adapted: Mapping[str, nn.Module]) -> None:
    """Refuse, before anything is changed, a model of which an owner was given another class after adapting."""
    for name, owner in adapted.items():
        check_class(owner, name)


def refresh_owner(owner: nn.Module, name: str = "the module", base: Scope | None = None) -> None:
    """Derive the class of an owner from its record again, after either changed; `base` as for `specialize`."""
    state: OwnerState = vars(owner)[STATE]
    check_class(owner, name)
    blocks = () if state.in_graph else state.effective_blocks()
    shape = None if state.in_graph else state.shape
    new_class = specialize(owner, shape, blocks, state.effective_copies(), base)
    set_class(owner, new_class, state.foreign_forward, inserted=bool(blocks))


def restore_owner(owner: nn.Module, name: str = "the module") -> None:
    """Remove every trace of adapters from an owner: parameters, record, class, forward."""
    state: OwnerState = vars(owner)[STATE]
    check_class(owner, name)
    for registered in state.all_registered():
        delattr(owner, registered)
    set_class(owner, state.base_class, state.foreign_forward, inserted=False)
    del vars(owner)[STATE]


def remove_from_owner(owner: nn.Module, adapter_names: Sequence[str], name: str = "the module") -> None:
    """Take what some adapters registered off an owner; with nothing left it is plain again."""
    state: OwnerState = vars(owner)[STATE]
    if not set(state.adapters) - set(adapter_names):
        restore_owner(owner, name)
        return
    state.active = tuple(n for n in state.active if n not in adapter_names)
    refresh_owner(owner, name)
    for adapter in adapter_names:
        for registered in state.registered(adapter):
            delattr(owner, registered)
        for record in (state.adapters, state.blocks, state.copies):
            record.pop(adapter, None)


def _structure(owner: nn.Module, state: OwnerState | None, shape: tuple[int, int]) -> Any:
    """What a trace of the owner's base forward can depend on; equal keys mean equal graphs.

    A traced forward reads no plain attribute but its shape (`passes.trace` refuses it otherwise).
    """
    ours = state.all_registered() if state else ()
    key: list[Any] = [state.base_class if state else type(owner), shape]
    for name, tensor in (owner._parameters | owner._buffers).items():
        if name not in ours:
            key.append((name, None) if tensor is None else (name, tensor.dtype, tensor.shape, type(tensor)))
    for name, child in owner._modules.items():
        key.append((name, type(child)))
    return tuple(key)

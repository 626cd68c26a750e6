"""`merge` and `unmerge`: adapters folded into the weights, for export or on trial."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar, overload

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from misscompile.adapting import open_model
from misscompile.errors import ArgumentError, MergeError, MissWarning, StateError
from misscompile.graph_merging import (
    fold_parameter,
    keep_unmerged,
    merged_parameters,
    plan_graph_folds,
    swap_unmerged,
    write_folds,
)
from misscompile.graphs import WholeGraph, record_of, refresh_graphs, whole_graphs
from misscompile.passes.find import is_stored_transposed, weight_users
from misscompile.passes.merge import Workspace, fold_in_place, fold_weight, keeps_finite
from misscompile.pipeline import check_classes, refresh_owner, remove_from_owner, restore_owner, trace_scope
from misscompile.plan import Block
from misscompile.recovery import holds_exported_adapters
from misscompile.state import (
    STATE,
    OwnerState,
    adapters_of,
    base_tensor,
    check_enabled,
    copy_name,
    named_modules,
    owner_states,
    owners,
    require_adapter,
    swap_base_values,
    tensor_version,
    unwrap_model,
)

M = TypeVar("M", bound=nn.Module)
Group = list[tuple[str, nn.Module]]


@dataclasses.dataclass(frozen=True)
class Fold:
    """What is folded into one weight: the owners that share it, and the blocks of the first, which are those of all."""

    group: Group
    blocks: tuple[Block, ...]
    transposed: bool


@overload
def merge(
    model: torch.export.ExportedProgram, adapter_names: list[str] | None = None, keep_adapters: bool = False
) -> WholeGraph: ...


@overload
def merge(model: M, adapter_names: list[str] | None = None, keep_adapters: bool = False) -> M: ...


def merge(model: Any, adapter_names: list[str] | None = None, keep_adapters: bool = False) -> Any:
    """Fold adapters into the weights in place, summed in float32 or wider and rounded once to the dtype of the weight.

    Args:
        model: an adapted model; or an exported program, or its module, that was exported while adapted.
        adapter_names: the adapters to fold, which are then removed while all others stay. By default the active ones
            are folded, every adapter is removed, and the modules are plain again.
        keep_adapters: keep the blocks, and a copy of each base weight, so that `unmerge` brings every bit back.

    Returns:
        `model`, the same object; of a foreign graph a new `GraphModule`. A parametrized weight becomes a plain one. The
        weights of a graph are new parameters: the values that it shares with another model are not written.

    Raises:
        MergeError: a result is not finite although the weight was, or a weight cannot be folded because its module's
            forward is opaque, it is on the meta device or offloaded, or a module or a call that is not adapted shares it.
            Nothing is changed then.
        StateError: the model has no adapter, is merged already, or is inside `disable_adapter`.
        UnknownAdapterError: a name is not on the model.

    If it is interrupted, each module is either merged and plain or still adapted: the model computes the same.
    """
    exported = holds_exported_adapters(model)
    root = open_model(model) if exported else unwrap_model(model)
    names = _names_to_merge(root, adapter_names)
    check_classes(owners(root))
    _check_copies_unshared(root, names)
    folds = [_plan_fold(group, names, keep_adapters) for group in _weight_groups(root, names)]
    graphs = {graph: plan_graph_folds(graph, names) for graph in whole_graphs(root.modules())}
    merged = {graph: [fold_parameter(graph, fold) for fold in graph_folds] for graph, graph_folds in graphs.items()}
    workspace = Workspace()
    for fold in folds:  # every result is known to be as finite as its weight before the first weight changes
        name, owner = fold.group[0]
        if not keeps_finite(owner, fold.blocks):
            fold_weight(owner, fold.blocks, name, fold.transposed, workspace)
    for fold in folds:
        with deferred_interrupt():
            _commit(fold, names, keep_adapters, workspace)
    for graph, graph_folds in graphs.items():
        record_of(graph).kept = keep_unmerged(graph) if keep_adapters else None
        write_folds(graph, graph_folds, merged[graph])
    for name, owner in owners(root).items():
        state: OwnerState = vars(owner)[STATE]
        held = state.blocks if state.in_graph else {}
        if not state.merged and any(n in state.copies or n in held for n in names):  # no weight of its own left to write
            _write_copies(owner, names, keep_adapters)
            _finish(owner, names, name, keep_adapters)
    for graph in graphs:
        if (kept := record_of(graph).kept) is not None:
            kept.versions = {name: tensor_version(value) for name, value in merged_parameters(graph).items()}
    if adapter_names is None and not keep_adapters:
        left = [name for name in adapters_of(root) if name not in names]
        for name, owner in owners(root).items():
            restore_owner(owner, name)
        refresh_graphs(root.modules())
        if left:
            warnings.warn(f"merge removed the inactive adapters {left} without folding them.", MissWarning, stacklevel=2)
    else:
        refresh_graphs(root.modules())
    return root if exported else model


def unmerge(model: M) -> M:
    """Undo `merge(model, keep_adapters=True)`: the base weights return bit for bit and the adapters act again.

    Returns:
        `model`, the same object.

    Raises:
        StateError: nothing is merged, or the model is inside `disable_adapter`.
        MergeError: a weight was changed since it was merged, so that its base is no longer the kept one.
    """
    root = unwrap_model(model)
    check_enabled(root, "unmerge")
    merged = {name: owner for name, owner in owners(root).items() if vars(owner)[STATE].merged}
    if not merged:
        raise StateError("nothing is merged: unmerge undoes merge(model, keep_adapters=True).")
    for graph in whole_graphs(root.modules()):
        kept = record_of(graph).kept
        for name, value in merged_parameters(graph).items():
            if kept is not None and not _is_current(kept.versions.get(name, (0, 0)), tensor_version(value)):
                raise MergeError(
                    f"{name} was changed after it was merged, so unmerge would throw that change away. Load the merged "
                    "values again, then call unmerge."
                )
    for name, owner in merged.items():
        state: OwnerState = vars(owner)[STATE]
        for tensor, version in state.merged_versions.items():
            if not _is_current(version, tensor_version(base_tensor(owner, tensor))):
                raise MergeError(
                    f"{name}: its {tensor} was changed after it was merged, so unmerge would throw that change away. "
                    "Load the merged values again, then call unmerge; or load the base weights after unload(model)."
                )
    for name, owner in merged.items():
        state = vars(owner)[STATE]
        swap_base_values(owner)
        state.merged, state.base_values, state.merged_versions = (), {}, {}
        refresh_owner(owner, name)
    for graph in whole_graphs(root.modules()):
        swap_unmerged(graph)
        record_of(graph).kept = None
    refresh_graphs(root.modules())
    return model


def _names_to_merge(root: nn.Module, adapter_names: object) -> tuple[str, ...]:
    states = owner_states(root)
    if not states:
        raise StateError("the model has no adapter: there is nothing to merge.")
    check_enabled(root, "merge")
    merged = {name: state.merged for name, state in states.items() if state.merged}
    if merged:
        name, adapters = next(iter(merged.items()))
        raise StateError(f"{name} holds the merged adapter {adapters[0]!r} already: call unmerge(model) first.")
    if adapter_names is None:
        names = tuple(dict.fromkeys(name for state in states.values() for name in state.active))
    elif isinstance(adapter_names, (list, tuple)):
        names = tuple(dict.fromkeys(require_adapter(root, name).name for name in adapter_names))
    else:
        raise ArgumentError(f"adapter_names: expected a list of names, found {type(adapter_names).__name__}.")
    if not names:
        raise StateError("no adapter is active: name the adapters to merge.")
    return names


def _weight_groups(root: nn.Module, names: tuple[str, ...]) -> list[Group]:
    """The owners that hold blocks of `names`, those that share a weight together."""
    groups: dict[object, Group] = {}
    for name, owner in owners(root).items():
        state: OwnerState = vars(owner)[STATE]
        if not state.in_graph and any(n in state.blocks for n in names):
            weight = owner._parameters.get("weight")
            groups.setdefault(name if weight is None else id(weight), []).append((name, owner))
    adapted = {owner for group in groups.values() for _, owner in group}
    for module_name, module in root.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if module not in adapted and id(parameter) in groups:
                raise MergeError(
                    f"{groups[id(parameter)][0][0]} shares its weight with {module_name}.{parameter_name}, which the "
                    "adapter does not act on: merging would change both. Untie first: give the module a weight of its own "
                    "(`module.weight = torch.nn.Parameter(module.weight.detach().clone())`, and "
                    "`model.config.tie_word_embeddings = False` for an output layer), then merge."
                )
    return list(groups.values())


def _check_copies_unshared(root: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse to write a copy into a base tensor that another module uses too."""
    users: dict[int, list[str]] = {}
    for module_name, module in named_modules(root).items():
        for tensor_name, tensor in module._parameters.items():
            if tensor is not None:
                users.setdefault(id(tensor), []).append(f"{module_name}.{tensor_name}")
    for owner_name, owner in owners(root).items():
        state: OwnerState = vars(owner)[STATE]
        for tensor_name in {tensor for adapter in names for tensor in state.copies.get(adapter, ())}:
            others = [n for n in users.get(id(base_tensor(owner, tensor_name)), []) if n != f"{owner_name}.{tensor_name}"]
            if others:
                raise MergeError(
                    f"{owner_name}.{tensor_name}, which the adapter trains in full, is tied to {others[0]}: merging would "
                    "change both. Untie first (give one of the modules a parameter of its own), then merge."
                )


def _plan_fold(group: Group, names: tuple[str, ...], keep_adapters: bool) -> Fold:
    name, owner = group[0]
    state: OwnerState = vars(owner)[STATE]
    assert state.shape is not None
    scope = trace_scope(owner, state.shape)
    if scope.opaque is not None:
        raise MergeError(f"{name}: {scope.opaque}, so that its update cannot be shown to be one of its weight.")
    if weight_users(scope):
        raise MergeError(
            f"{name}: its forward uses its weight beside the linear call, and merging would change that use too."
        )
    if parametrize.is_parametrized(owner, "weight") and keep_adapters:
        raise MergeError(
            f"{name}: its weight is parametrized, and a merge into it cannot be undone; merge without keep_adapters."
        )
    if owner.weight.is_meta:
        raise MergeError(f"{name}: its weight is on the meta device or offloaded; load it first.")
    blocks = tuple(state.blocks[n] for n in names if n in state.blocks)
    stays = [b for b in state.blocks.values() if b not in blocks and b.variant == "bat" and b.adapter in state.active]
    if stays:
        raise MergeError(
            f"{name}: the 'bat' adapter {stays[0].adapter!r} that would stay active is a function of the base weight, "
            "which merging changes. Merge it too, or deactivate it first."
        )
    return Fold(group, blocks, is_stored_transposed(scope))


def _commit(fold: Fold, names: tuple[str, ...], keep_adapters: bool, workspace: Workspace) -> None:
    first_name, first = fold.group[0]
    merged = None
    if parametrize.is_parametrized(first, "weight"):
        merged = fold_weight(first, fold.blocks, first_name, fold.transposed, workspace)
    elif keep_adapters:
        vars(first)[STATE].base_values["weight"] = first.get_parameter("weight").detach().clone()
    for _, owner in fold.group:
        _write_copies(owner, names, keep_adapters)
    if merged is None:
        parameters = [(block, first.get_parameter(block.parameter)) for block in fold.blocks]
        fold_in_place(first.get_parameter("weight"), parameters, fold.transposed, workspace)
    for name, owner in fold.group:
        _finish(owner, names, name, keep_adapters)
    if merged is not None:
        _replace_weight(first, merged)
    if keep_adapters:
        vars(first)[STATE].merged_versions["weight"] = tensor_version(first.get_parameter("weight"))


def _finish(owner: nn.Module, names: tuple[str, ...], name: str, keep_adapters: bool) -> None:
    state: OwnerState = vars(owner)[STATE]
    if keep_adapters:
        state.merged = tuple(n for n in names if n in state.adapters)
        refresh_owner(owner, name)
    else:
        remove_from_owner(owner, names, name)


@torch.no_grad()
def _write_copies(owner: nn.Module, names: tuple[str, ...], keep_adapters: bool) -> None:
    state: OwnerState = vars(owner)[STATE]
    for adapter in names:
        for tensor in state.copies.get(adapter, ()):
            base = base_tensor(owner, tensor)
            if state.in_graph and isinstance(base, nn.Parameter):  # shared with the model that the graph was made from
                values = getattr(owner, copy_name(adapter, tensor)).detach().clone()
                owner._parameters[tensor] = nn.Parameter(values, requires_grad=False)
                continue
            if keep_adapters:
                state.base_values[tensor] = base.detach().clone()
            base.copy_(getattr(owner, copy_name(adapter, tensor)))
            if keep_adapters:
                state.merged_versions[tensor] = tensor_version(base)


@torch.no_grad()
def _replace_weight(owner: nn.Module, merged: Tensor) -> None:
    """Let a parametrized weight become a plain one."""
    shared = type(owner)  # with every deepcopy of the owner, and the removal edits the class
    members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    owner.__class__ = type(shared.__name__, shared.__bases__, members)
    parametrize.remove_parametrizations(owner, "weight", leave_parametrized=True)
    owner.weight = nn.Parameter(merged, requires_grad=False)  # a frozen one would be left as a plain tensor


def _is_current(kept: tuple[int, int], now: tuple[int, int]) -> bool:
    return kept[0] != now[0] or kept == now  # another tensor (a copied or loaded model) has counts of its own


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait until the body is done: a weight that was half merged would belong to no adapter.

    Python raises `KeyboardInterrupt` in the main thread only. Its handler is set aside rather than the signal masked,
    since a thread of torch's pool would still receive it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])

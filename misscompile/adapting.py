"""The verbs on a user's model: add adapters, choose which act and train, switch them off, take them away."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, overload

import torch
from torch import fx, nn

from misscompile.config import MissConfig, coerce_config
from misscompile.errors import ArgumentError, MissWarning, StateError
from misscompile.graph_merging import swap_unmerged
from misscompile.graph_planning import plan_graph_adapter
from misscompile.graphs import WholeGraph, copy_graph, record_of, refresh_graphs, whole_graphs
from misscompile.passes.register import create_blocks, create_copies, register_blocks
from misscompile.pipeline import check_classes, refresh_owner, remove_from_owner, restore_owner, specialize
from misscompile.plan import Plan, Scope
from misscompile.planning import plan_adapter
from misscompile.recovery import recover_adapters
from misscompile.state import (
    STATE,
    OwnerState,
    adapters_of,
    base_tensor,
    check_enabled,
    named_modules,
    owner_states,
    owners,
    require_adapter,
    swap_base_values,
    transaction,
    unwrap_model,
)

M = TypeVar("M", bound=nn.Module)


@overload
def adapt(
    model: fx.GraphModule | torch.export.ExportedProgram,
    config: object,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    per_call_site: bool = False,
    round_bat_weight: bool = False,
) -> WholeGraph: ...


@overload
def adapt(
    model: M,
    config: object,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    round_bat_weight: bool = False,
) -> M: ...


def adapt(
    model: Any,
    config: object,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    per_call_site: bool = False,
    round_bat_weight: bool = False,
) -> Any:
    """Add a MiSS adapter to `model`: freeze the base, register the blocks, rewrite the linear call sites.

    An ordinary module is adapted in place: the module tree, the classes (`isinstance`), the parameter names and the base
    `state_dict` stay as they were; each adapted linear gains one parameter `miss_block_<adapter_name>`. A graph is left
    alone: a new one comes back, over the same base values. The new adapter becomes the active one.

    Args:
        model: any `nn.Module`, where a `torch.compile` or data-parallel wrapper is adapted inside; or a
            `torch.fx.GraphModule` or `torch.export.ExportedProgram`, whose linear calls are matched by the names of their
            weights' owners.
        config: a `MissConfig`, a `peft.MissConfig` or a dict of its fields.
        adapter_name: without dots, not in use on this model.
        autocast_adapter_dtype: keep blocks in float32 where the base weight is 16-bit; False gives them its dtype. Each
            block lives on the device of its weight, so a model may be spread over devices.
        per_call_site: graphs only: where one weight is called several times, give each call a block of its own, named
            `<owner>#0`, `<owner>#1`, …, instead of one for all.
        round_bat_weight: bat on a 16-bit weight: compute one product with `W + ΔW` instead of one with each, a quarter of
            a training step faster. The sum is rounded, so that an update below half a unit in the last place of the
            weight changes no output.

    Returns:
        `model`, the same object; of a graph a new `GraphModule`.

    Raises:
        ConfigError: a field is not valid, or does not fit a chosen module (the message has the values that would do).
        NoMatchError: the rules choose no module.
        UnsupportedModuleError: a module was named on which an adapter would have no effect.
        StateError: the name is in use, or the model is merged or inside `disable_adapter`.
        ArgumentError: an argument has the wrong type.

    Nothing is changed when it raises. What the rules passed over is told in a `MissWarning` and listed by `dump`.
    """
    root = open_model(model)
    plan = make_plan(root, coerce_config(config), adapter_name, per_call_site, round_bat_weight)
    create_blocks(plan, autocast_adapter_dtype)
    create_copies(plan)
    install_plan(root, plan)
    return root if isinstance(root, WholeGraph) else model


def open_model(model: object) -> nn.Module:
    """The module that a new adapter goes onto: the model itself below its wrappers, or a copy of a graph.

    Raises:
        ArgumentError: `model` is neither a module nor an exported program.
    """
    root = model if isinstance(model, torch.export.ExportedProgram) else unwrap_model(model)
    if not isinstance(root, fx.GraphModule | torch.export.ExportedProgram):
        return root
    copied = copy_graph(root)
    if not isinstance(root, WholeGraph):
        recover_adapters(copied)
    return copied


def make_plan(
    root: nn.Module,
    config: MissConfig,
    adapter_name: str,
    per_call_site: bool = False,
    round_bat_weight: bool = False,
) -> Plan:
    """The plan for an adapter on an ordinary module or on a whole graph."""
    if isinstance(root, WholeGraph):
        plan = plan_graph_adapter(root, config, adapter_name, per_call_site)
    elif per_call_site:
        raise ArgumentError(
            "per_call_site=True: the calls of a module are seen in a whole graph only; use misscompile.capture first."
        )
    else:
        plan = plan_adapter(root, config, adapter_name)
    if round_bat_weight and config.variant == "bat":
        for target in plan.targets:
            target.block = dataclasses.replace(target.block, round_weight=True)
    return plan


def install_plan(root: nn.Module, plan: Plan) -> None:
    """Carry out a complete plan, all or nothing, and tell what it passed over."""
    scopes = {target.owner: target.scope for target in plan.targets if target.scope is not None}
    distinct = {(target.scope, target.block): target for target in plan.targets if target.scope is not None}
    for target in distinct.values():  # build every class before the first change: a rewrite that fails changes nothing
        specialize(target.owner, (target.in_features, target.out_features), (target.block,), (), target.scope)
    with transaction(plan.modules, [*(target.owner for target in plan.targets), *plan.copies]) as parameters:
        register_blocks(plan, in_graph=isinstance(root, WholeGraph))
        for parameter in parameters:
            parameter.requires_grad = False  # the method of this name refuses uninitialised parameters
        adapted = {name: module for module, name in plan.modules.items() if STATE in vars(module)}
        _activate(adapted, (plan.adapter.name,), scopes)
        refresh_graphs(plan.modules)
        for note in plan.notes:  # a filter may turn the warning into an error
            warnings.warn(note, MissWarning, stacklevel=3)


def adapters(model: nn.Module) -> dict[str, MissConfig]:
    """The adapters on `model`, in the order in which they were added: a copy of the config of each, by name."""
    return {name: coerce_config(adapter.config) for name, adapter in adapters_of(_module(model)).items()}


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that act, in the order in which their updates are added."""
    return tuple(dict.fromkeys(name for state in owner_states(_module(model)).values() for name in state.active))


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Make exactly these adapters act and train. Each update is computed from the base weight, so the order is free.

    Under `torch.compile`, a set that was active before recompiles nothing; a new one costs one graph.

    Args:
        model: an adapted model.
        adapter_name: one name, or several; adapters of different variants may act on one layer together.

    Raises:
        UnknownAdapterError: a name is not on the model.
        StateError: the model is merged, or inside `disable_adapter`.
        ArgumentError: neither a name nor a list of names.
    """
    root = unwrap_model(model)
    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
    if not isinstance(names, (list, tuple)):
        raise ArgumentError(f"adapter_name: expected a name or a list of names, found {type(names).__name__}.")
    for name in names:
        require_adapter(root, name)
    _check_unmerged(root, "set_adapter")
    _check_copies_apart(root, names)
    with transaction(named_modules(root).values()):
        adapted = owners(root)
        _activate(adapted, tuple(dict.fromkeys(names)))
        _train_active(adapted.values())
        refresh_graphs(root.modules())


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter and its blocks. If it was the only active one, the model computes its base until `set_adapter`.

    Raises:
        UnknownAdapterError: it is not on the model.
        StateError: the model is merged, or inside `disable_adapter`.
    """
    root = unwrap_model(model)
    require_adapter(root, adapter_name)
    _check_unmerged(root, "delete_adapter")
    with transaction(named_modules(root).values()):
        for name, owner in owners(root).items():
            remove_from_owner(owner, [adapter_name], name)
        refresh_graphs(root.modules())
    left = list(adapters_of(root))
    if left and not active_adapters(root):
        warnings.warn(f"no adapter is active now; set_adapter can activate {left}.", MissWarning, stacklevel=2)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """`(name, parameter)` of everything in `model` that requires a gradient, for an optimizer."""
    return [(name, parameter) for name, parameter in _module(model).named_parameters() if parameter.requires_grad]


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's sentence: trainable and all parameters of `model`, in elements, and their ratio in percent."""
    parameters = list(_module(model).parameters())
    every = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    share = 100 * trained / every if every else 0.0
    print(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {share:.4f}")


@contextlib.contextmanager
def disable_adapter(model: M) -> Iterator[M]:
    """A context in which `model` computes exactly what its base computes; contexts may nest.

    A model that is merged with `keep_adapters=True` gets its base weights back for the time of the context.

    Raises:
        StateError: the model has no adapter.
    """
    adapted = _adapted_owners(model)
    check_classes(adapted)
    _shift_disabled(model, adapted, +1)
    try:
        yield model
    finally:
        _shift_disabled(model, {name: owner for name, owner in adapted.items() if STATE in vars(owner)}, -1)


def unload(model: M) -> M:
    """Remove every adapter from `model` in place; classes, parameters and base weights are as before `adapt`.

    The base stays frozen. A model merged with `keep_adapters=True` gets its base weights back.

    Returns:
        `model`, the same object.

    Raises:
        StateError: the model has no adapter, or is inside `disable_adapter`.
    """
    root = unwrap_model(model)
    adapted = _adapted_owners(model)
    check_enabled(root, "unload")
    check_classes(adapted)
    with transaction(named_modules(root).values()):
        for owner in adapted.values():
            swap_base_values(owner)
        for graph in whole_graphs(root.modules()):
            swap_unmerged(graph)
            record_of(graph).kept = None
        for name, owner in adapted.items():
            restore_owner(owner, name)
        refresh_graphs(root.modules())
    return model


def _activate(
    adapted: Mapping[str, nn.Module], names: tuple[str, ...], scopes: Mapping[nn.Module, Scope] = MappingProxyType({})
) -> None:
    """Make exactly these adapters act, in this order. `scopes` gives the traced scopes that the caller has."""
    for name, owner in adapted.items():
        state: OwnerState = vars(owner)[STATE]
        state.active = tuple([n for n in names if n in state.adapters])
        refresh_owner(owner, name, scopes.get(owner))


def _train_active(adapted: Iterable[nn.Module]) -> None:
    """Let what the active adapters registered train, unless they were loaded for inference, and nothing else of it."""
    for owner in adapted:
        state: OwnerState = vars(owner)[STATE]
        for adapter in state.adapters.values():
            trains = adapter.name in state.active and adapter.trainable
            for registered in state.registered(adapter.name):
                tensor = base_tensor(owner, registered)
                tensor.requires_grad_(trains and registered in owner._parameters and tensor.is_floating_point())


def _check_copies_apart(root: nn.Module, names: Sequence[str]) -> None:
    for owner_name, state in owner_states(root).items():
        trained = [(tensor, name) for name in names for tensor in state.copies.get(name, ())]
        for tensor, name in trained:
            others = [other for same, other in trained if same == tensor and other != name]
            if others:
                raise StateError(
                    f"the adapters {name!r} and {others[0]!r} both train {owner_name}.{tensor} in full, and it can have "
                    "only one value: activate one of them."
                )


def _shift_disabled(model: nn.Module, adapted: dict[str, nn.Module], step: int) -> None:
    changed = False
    for name, owner in adapted.items():
        state: OwnerState = vars(owner)[STATE]
        was = state.disabled > 0
        state.disabled += step
        if was != (state.disabled > 0):
            swap_base_values(owner)
            refresh_owner(owner, name)
            changed = True
    if changed:
        for graph in whole_graphs(model.modules()):
            swap_unmerged(graph)
        refresh_graphs(model.modules())


def _check_unmerged(root: nn.Module, verb: str) -> None:
    check_enabled(root, verb)
    for name, state in owner_states(root).items():
        if state.merged:
            raise StateError(f"{verb}: {name} holds the merged adapter {state.merged[0]!r}; call unmerge(model) first.")


def _adapted_owners(model: nn.Module) -> dict[str, nn.Module]:
    found = owners(_module(model))
    if not found:
        raise StateError("the model has no adapter: call adapt or load_adapter first.")
    return found


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, found {type(model).__name__}.")
    return model

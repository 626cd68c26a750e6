"""The verbs on the adapters that a model has: list them, choose which act and train, switch them off, take them away."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from misscompile.errors import ArgumentError, MissWarning, StateError
from misscompile.hosts.opening import (
    check_graphs_whole,
    forget_kept,
    parts_of_graphs,
    refresh,
    refresh_graphs,
    swap_merged,
)
from misscompile.hosts.owner_class import check_classes, remove_from_owner, restore_owner
from misscompile.record.spread import check_before_wrapping, forget_removed, reshard
from misscompile.record.state import STATE, OwnerState, base_tensor, can_train
from misscompile.record.transaction import transaction
from misscompile.record.walk import (
    adapters_of,
    check_enabled,
    check_unmerged,
    named_modules,
    owner_states,
    owners,
    require_adapted,
    require_adapter,
    require_adapters,
    unwrap_model,
)
from misscompile.record.words import Plan
from misscompile.rules.config import MissConfig, coerce_config

M = TypeVar("M", bound=nn.Module)


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
        StateError: the model is merged, or inside `disable_adapter`; or two of the adapters train one tensor in full; or
            blocks would begin to train inside DDP, FSDP1 or DeepSpeed, which sum the gradients of others.
        ArgumentError: neither a name nor a list of names.
    """
    root = unwrap_model(model)
    names = require_adapters(root, adapter_name)
    adapted = _changeable_owners(root, "set_adapter")
    check_copies_apart(owner_states(root), names)
    reshard(root)
    with transaction(named_modules(root).values(), parts_of_graphs(root)) as undo:
        trained = {id(parameter) for parameter in undo.parameters if parameter.requires_grad}
        activate(root, adapted, names)
        _train_active(adapted.values())
        new = [p for p in undo.parameters if p.requires_grad and id(p) not in trained]
        if new:
            check_before_wrapping(model, "set_adapter", trains=True)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter and its blocks. If it was the only active one, the model computes its base until `set_adapter`.

    Raises:
        UnknownAdapterError: it is not on the model.
        StateError: the model is merged, or inside `disable_adapter`.
    """
    root = unwrap_model(model)
    require_adapter(root, adapter_name)
    adapted = _changeable_owners(root, "delete_adapter")
    with transaction(named_modules(root).values(), parts_of_graphs(root)):
        for name, owner in adapted.items():
            remove_from_owner(owner, [adapter_name], name)
        refresh_graphs(root)
    forget_removed(root)
    left = list(adapters_of(root))
    if left and not active_adapters(root):
        warnings.warn(f"no adapter is active now; set_adapter can activate {left}.", MissWarning, stacklevel=2)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """`(name, parameter)` of everything in `model` that requires a gradient, for an optimizer."""
    return [(name, parameter) for name, parameter in _module(model).named_parameters() if parameter.requires_grad]


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's sentence: trainable and all parameters of `model`, in elements, and their ratio in percent.

    Raises:
        StateError: a parameter has no shape yet.
    """
    named = dict(_module(model).named_parameters())
    lazy = next((name for name, parameter in named.items() if nn.parameter.is_lazy(parameter)), None)
    if lazy is not None:
        raise StateError(f"{lazy}: its shape is not known yet; run the model once on real input first.")
    parameters = list(named.values())
    every = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    share = 100 * trained / every if every else 0.0
    print(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {share:.4f}")


@contextlib.contextmanager
def disable_adapter(model: M) -> Iterator[M]:
    """A context in which `model` computes exactly what its base computes; contexts may nest.

    A model that is merged with `keep_adapters=True` gets its base weights back for the time of the context.

    Raises:
        StateError: the model has no adapter, or is a part of a whole graph.
    """
    adapted = require_adapted(_module(model))
    check_classes(adapted)
    check_graphs_whole(model, adapted, "disable_adapter")
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
    adapted = require_adapted(root)
    check_enabled(owner_states(root), "unload")
    check_classes(adapted)
    check_graphs_whole(root, adapted, "unload")
    with transaction(named_modules(root).values(), parts_of_graphs(root)) as undo:
        swap_merged(root, adapted, undo)
        forget_kept(root)
        for name, owner in adapted.items():
            restore_owner(owner, name)
        refresh_graphs(root)
    forget_removed(root)
    return model


def activate(root: nn.Module, adapted: Mapping[str, nn.Module], names: tuple[str, ...], plan: Plan | None = None) -> None:
    """Make exactly these adapters act on these owners of a model, in this order; `plan` is that of a new adapter."""
    for owner in adapted.values():
        state: OwnerState = vars(owner)[STATE]
        state.active = tuple([n for n in names if n in state.adapters])
    refresh(root, adapted, {target.owner: target.scope for target in plan.targets} if plan else {})


def check_copies_apart(states: Mapping[str, OwnerState], names: Sequence[str]) -> None:
    """Refuse an adapter that trains a tensor in full beside another that changes it: it can have only one value."""
    for owner_name, state in states.items():
        changed: dict[str, str] = {}
        for name in names:
            own = state.copies.get(name, ())
            for tensor in (*own, "weight") if name in state.blocks else own:
                other = changed.setdefault(tensor, name)
                if other != name and tensor in (*own, *state.copies.get(other, ())):
                    raise StateError(
                        f"the adapters {other!r} and {name!r} both train {owner_name}.{tensor}, one of them in full, and it "
                        "can have only one value: activate one of them."
                    )


def _changeable_owners(root: nn.Module, verb: str) -> dict[str, nn.Module]:
    """The owners of a model whose adapters may be chosen or removed now."""
    adapted, states = owners(root), owner_states(root)
    check_enabled(states, verb)
    check_unmerged(states, verb)
    check_graphs_whole(root, adapted, verb)
    return adapted


def _train_active(adapted: Iterable[nn.Module]) -> None:
    """Let what the active adapters registered train, unless they were loaded for inference, and nothing else of it."""
    for owner in adapted:
        state: OwnerState = vars(owner)[STATE]
        for adapter in state.adapters.values():
            trains = adapter.name in state.active and adapter.trainable
            for registered in state.registered(adapter.name):
                tensor = base_tensor(owner, registered)
                tensor.requires_grad_(trains and registered in owner._parameters and can_train(tensor))


def _shift_disabled(model: nn.Module, adapted: Mapping[str, nn.Module], step: int) -> None:
    """Count a context in or out around these owners, and switch those for which it is the first or the last."""
    with transaction(adapted.values(), parts_of_graphs(model)) as undo:
        changed = {}
        for name, owner in adapted.items():
            state: OwnerState = vars(owner)[STATE]
            was_disabled, state.disabled = state.disabled > 0, state.disabled + step
            if was_disabled != (state.disabled > 0):
                changed[name] = owner
        if changed:
            swap_merged(model, changed, undo)
            refresh(model, changed)


def _module(model: object) -> nn.Module:
    """`model`, wrappers included: what these verbs tell is told by its own names."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, found {type(model).__name__}.")
    return model

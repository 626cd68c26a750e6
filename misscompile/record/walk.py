"""Finding modules, owners and adapters in a model by name, and refusing a verb in a state in which it has no meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from misscompile.errors import ArgumentError, StateError, UnknownAdapterError
from misscompile.record.state import STATE, OwnerState
from misscompile.record.words import Adapter
from misscompile.rules.names import WRAPPING

_MODULE_WRAPPERS = {"DataParallel", "DistributedDataParallel", "AveragedModel", "DeepSpeedEngine"}
"""Classes that hold a whole model as `module`."""


def unwrap_model(model: object) -> nn.Module:
    """The module below `torch.compile`, parallel and averaging wrappers, whose names are those of the user's model."""
    if not isinstance(model, nn.Module):
        hint = " (adapt and load_adapter make a module of it)" if isinstance(model, torch.export.ExportedProgram) else ""
        raise ArgumentError(f"model: expected a torch.nn.Module, found {type(model).__name__}{hint}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            "model: it is a TorchScript module, whose code is compiled; adapt the module before scripting it."
        )
    wrapped: Any = model
    while True:
        inner = next((wrapped._modules[segment] for segment in WRAPPING if segment in wrapped._modules), None)
        if inner is None and not _MODULE_WRAPPERS.isdisjoint(kind.__name__ for kind in type(wrapped).__mro__):
            inner = wrapped._modules.get("module")
        if inner is None:
            return wrapped  # type: ignore[no-any-return]
        wrapped = inner


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """The modules of `model` by dotted name, as `nn.Module.named_modules` gives them, in one pass over the tree.

    Where `torch.compile`, FSDP1 or activation checkpointing wraps a part of the model, the segment that it adds is left
    out. The wrapper and the wrapped module then have one name, which stands for the wrapped one.
    """
    found = {"": model}
    seen = {model}

    def visit(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        for child_name, child in module._modules.items():
            if child is None or (remove_duplicate and child in seen):
                continue
            seen.add(child)
            path = name if child_name in WRAPPING else prefix + child_name
            found[path] = child
            if child._modules:
                visit(path, child)

    visit("", model)
    return found


def unique_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that these modules hold themselves, each once."""
    held = (parameter for module in modules for parameter in module._parameters.values())
    return list({id(parameter): parameter for parameter in held if parameter is not None}.values())


def join(*parts: str) -> str:
    """A dotted name of the parts that are not empty."""
    return ".".join(filter(None, parts))


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that carry a record, by canonical (first) dotted name."""
    return {name: module for name, module in named_modules(model).items() if STATE in vars(module)}


def owner_states(model: nn.Module) -> dict[str, OwnerState]:
    """The records of `model`, by canonical dotted name of the owner."""
    return {name: vars(owner)[STATE] for name, owner in owners(model).items()}


def find_module(root: nn.Module, name: str) -> nn.Module | None:
    """The module of this name, or None."""
    module: nn.Module | None = root
    for part in name.split(".") if name else ():
        module = module._modules.get(part) if module is not None else None
    return module


def owner_state(root: nn.Module, name: str) -> OwnerState | None:
    """The record on the module of this name, or None where there is none of either."""
    module = find_module(root, name)
    state: OwnerState | None = None if module is None else vars(module).get(STATE)
    return state


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on `model` by name, in the order in which they were added."""
    return {name: adapter for state in owner_states(model).values() for name, adapter in state.adapters.items()}


def require_adapter(model: nn.Module, name: object) -> Adapter:
    """The adapter of this name; an error that lists those there are, if there is none."""
    if not isinstance(name, str):
        raise ArgumentError(f"adapter_name: expected a string, found {type(name).__name__}.")
    known = adapters_of(model)
    if name not in known:
        there = f"it has {', '.join(map(repr, known))}" if known else "it has none; call adapt or load_adapter first"
        raise UnknownAdapterError(f"the model has no adapter {name!r}: {there}.")
    return known[name]


def require_adapters(model: nn.Module, names: object, argument: str = "adapter_name") -> tuple[str, ...]:
    """One name or several as a tuple without repeats, each of an adapter of `model`."""
    several = [names] if isinstance(names, str) else names
    if not isinstance(several, (list, tuple)):
        raise ArgumentError(f"{argument}: expected a name or a list of names, found {type(names).__name__}.")
    return tuple(dict.fromkeys(require_adapter(model, name).name for name in several))


def require_adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The owners of `model`; an error if there are none."""
    found = owners(model)
    if not found:
        raise StateError("the model has no adapter: call adapt or load_adapter first.")
    return found


def check_enabled(states: Mapping[str, OwnerState], verb: str) -> None:
    """Refuse a verb inside `disable_adapter`."""
    if any(state.disabled for state in states.values()):
        raise StateError(f"{verb} was called inside disable_adapter(model): leave the context first.")


def check_unmerged(states: Mapping[str, OwnerState], verb: str) -> None:
    """Refuse a verb on a model that is merged with its adapters kept."""
    for name, state in states.items():
        if state.merged:
            raise StateError(f"{verb}: {name} holds the merged adapter {state.merged[0]!r}; call unmerge(model) first.")

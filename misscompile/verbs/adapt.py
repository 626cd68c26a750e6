"""`adapt`: an adapter is planned, created, and put on the model, all or nothing."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar, overload

import torch
from torch import fx, nn

from misscompile.errors import MissWarning
from misscompile.hosts.base import Host
from misscompile.hosts.opening import open_host
from misscompile.hosts.register import create_blocks, create_copies, register_blocks
from misscompile.hosts.whole_graph import WholeGraph
from misscompile.record.state import STATE
from misscompile.record.transaction import transaction
from misscompile.record.words import Plan
from misscompile.rules.config import coerce_config
from misscompile.verbs.plan import make_plan
from misscompile.verbs.switch import activate

M = TypeVar("M", bound=nn.Module)


@overload
def adapt(
    model: fx.GraphModule | torch.export.ExportedProgram, config: object, adapter_name: str = "default", **options: bool
) -> WholeGraph: ...


@overload
def adapt(model: M, config: object, adapter_name: str = "default", **options: bool) -> M: ...


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
    host = open_host(model, "adapt", per_call_site)
    plan = make_plan(host, coerce_config(config), adapter_name, round_bat_weight)
    create_blocks(plan, autocast_adapter_dtype)
    create_copies(plan)
    install_plan(host, plan)
    return host.result(model)


def install_plan(host: Host, plan: Plan) -> None:
    """Carry out a complete plan, all or nothing, and tell what it passed over."""
    with transaction(plan.modules, [*(target.owner for target in plan.targets), *plan.copies]) as parameters:
        register_blocks(host, plan)
        for parameter in parameters:
            parameter.requires_grad = False  # the method of this name refuses uninitialised parameters
        adapted = {name: module for module, name in plan.modules.items() if STATE in vars(module)}
        adapted |= {target.name: target.owner for target in plan.targets}
        activate(host.root, adapted, (plan.adapter.name,), plan)
        for note in plan.notes:  # a filter may turn the warning into an error
            warnings.warn(note, MissWarning, stacklevel=3)

"""`adapt`: an adapter is planned, created, and put on the model, all or nothing."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from typing_extensions import TypeVar

from misscompile.errors import MissWarning
from misscompile.hosts.base import Host
from misscompile.hosts.opening import open_host
from misscompile.hosts.register import create_blocks, create_copies, register_blocks
from misscompile.hosts.whole_graph import WholeGraph
from misscompile.record.spread import check_before_wrapping
from misscompile.record.state import STATE
from misscompile.record.transaction import transaction
from misscompile.record.words import Plan
from misscompile.rules.config import coerce_config
from misscompile.verbs.plan import make_plan
from misscompile.verbs.switch import activate

M = TypeVar("M", bound=nn.Module, default=WholeGraph)
"""The type of the user's model; what comes back for an exported program is a `WholeGraph`."""


def adapt(
    model: M | torch.export.ExportedProgram,
    config: object,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    per_call_site: bool = False,
    round_bat_weight: bool = False,
) -> M:
    """Add a MiSS adapter to `model` and make it the active one: freeze the base, register the blocks, rewrite the calls.

    An ordinary module is adapted in place: the module tree, the classes (`isinstance`), the parameter names and the base
    `state_dict` stay as they were; each adapted linear gains one parameter `miss_block_<adapter_name>`. A graph is left
    alone: a new one comes back, over the same base values.

    Args:
        model: any `nn.Module`, adapted inside a `torch.compile` or `nn.DataParallel` wrapper, and before it is distributed
            (DDP, FSDP, tensor parallel, DeepSpeed); or a `torch.fx.GraphModule` or `torch.export.ExportedProgram`, whose
            linear calls go by the names of the modules that own their weights.
        config: a `MissConfig`, a `peft.MissConfig` or a dict of its fields.
        adapter_name: letters, digits, `_` and `-`; not in use on this model.
        autocast_adapter_dtype: float32 blocks where the base weight is 16-bit; False gives them its dtype. Each block
            lives on the device of its weight, so a model may be spread over devices.
        per_call_site: graphs only: where one weight is called several times, give each call a block of its own, named
            `<owner>#0`, `<owner>#1`, …, instead of one for all.
        round_bat_weight: bat on a 16-bit weight: one product with the rounded `W + ΔW` instead of one with each. A
            training step takes a quarter less time; an update below half a unit in the last place of W has no effect.

    Returns:
        `model`, the same object; of a graph a new `GraphModule`.

    Raises:
        ConfigError: a field is not valid, or does not fit a chosen module (the message has the values that would do).
        NoMatchError: the rules choose no module.
        UnsupportedModuleError: a module was named on which an adapter would have no effect.
        StateError: the name is in use, or the model is merged or inside `disable_adapter`; or it is distributed already.
        ArgumentError: an argument has the wrong type.
        CaptureError: Python reads a name of the graph as another one (letters in a form that it normalises).

    Nothing is changed when it raises. What the rules passed over is told in a `MissWarning` and listed by `dump`.
    """
    check_before_wrapping(model, "adapt", trains=True)
    host = open_host(model, "adapt", per_call_site)
    plan = make_plan(host, coerce_config(config), adapter_name, round_bat_weight)
    create_blocks(plan, autocast_adapter_dtype)
    create_copies(plan)
    install_plan(host, plan)
    return host.result(model)  # type: ignore[no-any-return]


def install_plan(host: Host, plan: Plan) -> None:
    """Carry out a complete plan, all or nothing, and tell what it passed over."""
    with transaction(plan.modules, [*(target.owner for target in plan.targets), *plan.copies]) as undo:
        register_blocks(host, plan)
        for parameter in undo.parameters:
            parameter.requires_grad = False  # the method of this name refuses uninitialised parameters
        adapted = {name: module for module, name in plan.modules.items() if STATE in vars(module)}
        adapted |= {target.name: target.owner for target in plan.targets}
        activate(host.root, adapted, (plan.adapter.name,), plan)
        for note in plan.notes:  # a filter may turn the warning into an error
            warnings.warn(note, MissWarning, stacklevel=3)

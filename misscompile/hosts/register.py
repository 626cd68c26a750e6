"""Create the blocks of a plan and register each as a flat parameter on the module that owns the weight.

q_proj.weight              ->   q_proj.weight (frozen)
                                q_proj.miss_block_<adapter name> (trainable)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from misscompile.hosts.base import Host
from misscompile.hosts.owner_class import find_foreign_forward
from misscompile.record.state import STATE, OwnerState, base_tensor, can_train, copy_name
from misscompile.record.words import Plan, Target
from misscompile.rules.config import MissConfig
from misscompile.variants import VARIANTS

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.inference_mode(False)  # a tensor that is made in it can never be trained
def create_blocks(
    plan: Plan, autocast_adapter_dtype: bool, values: Mapping[str, Tensor] | None = None, copy: bool = True
) -> None:
    """Fill `plan.parameters`: one new parameter for each weight. They require gradients unless loaded for inference.

    dtype: float32 where the weight is 16-bit and `autocast_adapter_dtype` is set, or where the weight is no float at
    all; otherwise that of the weight. device: that of the weight. `values`, by target name, replace the start values of
    the config; without `copy`, a block may be the given tensor itself.
    """
    by_weight: dict[object, nn.Parameter] = {}
    for target in plan.targets:
        if target.shared_by not in by_weight:
            dtype, device = _dtype_and_device(target.weight, autocast_adapter_dtype)
            if values is None:
                value = _start(target, plan.adapter.config, dtype, device)
            else:
                value = values[target.name]
                value = value.to(device=device, dtype=dtype, copy=copy or value.is_inference())
            by_weight[target.shared_by] = nn.Parameter(value, plan.adapter.trainable)
        plan.parameters[target.name] = by_weight[target.shared_by]


@torch.inference_mode(False)
def create_copies(plan: Plan, values: Mapping[nn.Module, Mapping[str, Tensor]] | None = None, copy: bool = True) -> None:
    """Fill `plan.copies`: a copy of every tensor that the adapter trains in full, in the dtype and place of the base's.

    `values` replace those of the base; without `copy`, a copy may be the given tensor itself.
    """
    for owner, names in plan.copied.items():
        for name in names:
            base = base_tensor(owner, name)
            value = base if values is None else values[owner][name]
            copied = value.detach().to(
                device=base.device, dtype=base.dtype, copy=copy or value is base or value.is_inference()
            )
            if isinstance(base, nn.Parameter):
                copied = nn.Parameter(copied, plan.adapter.trainable and can_train(copied))
            plan.copies.setdefault(owner, {})[name] = copied


def register_blocks(host: Host, plan: Plan) -> None:
    """Put every block and copy, and the record of them, on its module. Forwards are not changed."""
    adapter = plan.adapter
    for target in plan.targets:
        state = _state(target.owner, (target.in_features, target.out_features), host.in_graph)
        state.blocks[adapter.name], state.adapters[adapter.name] = target.block, adapter
        state.stands_for = target.stands_for
        target.owner.register_parameter(target.block.parameter, plan.parameters[target.name])
    for owner, copies in plan.copies.items():
        state = _state(owner, None, host.in_graph)
        state.copies[adapter.name], state.adapters[adapter.name] = tuple(copies), adapter
        for name, value in copies.items():
            register: Any = owner.register_parameter if isinstance(value, nn.Parameter) else owner.register_buffer
            register(copy_name(adapter.name, name), value)


def _dtype_and_device(weight: Tensor | None, autocast: bool) -> tuple[torch.dtype, torch.device]:
    if weight is None:
        return torch.float32, torch.device("cpu")
    dtype = weight.dtype if weight.dtype in _FLOATING else torch.float32
    return torch.float32 if autocast and dtype.itemsize < torch.float32.itemsize else dtype, weight.device


def _start(target: Target, config: MissConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    variant = VARIANTS[config.variant]
    shape = variant.block_shape(target.block.r, config.mini_r, target.in_features, target.out_features)
    if device.type == "meta":  # has no values, and takes longer to write them
        return torch.empty(shape, dtype=dtype, device=device)
    if config.init_weights is not False:
        return torch.zeros(*shape, dtype=dtype, device=device)  # one tuple would take longer to read
    drawn = torch.empty(shape, dtype=torch.float32)  # on the CPU: a seed gives the same blocks everywhere, and PEFT's
    variant.init_block(drawn, random_start=True)
    return drawn.to(device=device, dtype=dtype)


def _state(owner: nn.Module, shape: tuple[int, int] | None, in_graph: bool) -> OwnerState:
    state: OwnerState | None = vars(owner).get(STATE)
    if state is None:
        foreign = None if in_graph else find_foreign_forward(owner)
        state = vars(owner)[STATE] = OwnerState(type(owner), shape, in_graph=in_graph, foreign_forward=foreign)
    state.shape = state.shape or shape
    return state

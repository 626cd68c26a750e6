"""Registering: which parameter lands where, in which dtype and shape, with which values; forwards stay as they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support import fields, same, state
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears, normal

import misscompile as mc
from misscompile.hosts.opening import open_host
from misscompile.hosts.register import create_blocks, register_blocks
from misscompile.record.walk import owner_states
from misscompile.record.words import Block, Plan
from misscompile.verbs.plan import make_plan


def plan_for(model: nn.Module, name: str = "default", init_weights: Any = True, **changes: Any) -> Plan:
    return make_plan(open_host(model, "adapt"), mc.MissConfig(**fields(init_weights, **changes)), name)


def registered(model: nn.Module, autocast: bool = True, values: Mapping[str, Tensor] | None = None, **changes: Any) -> Plan:
    return register(model, plan_for(model, **changes), autocast, values)


def register(model: nn.Module, plan: Plan, autocast: bool = True, values: Mapping[str, Tensor] | None = None) -> Plan:
    create_blocks(plan, autocast, values)
    register_blocks(open_host(model, "adapt"), plan)
    return plan


@pytest.mark.parametrize(
    ("init_weights", "up", "down"),
    [(True, (4, 8), (4, 20)), (False, (4, 8), (4, 20)), ("mini", (4, 2), (4, 2)), ("bat", (2, 4, 4), (5, 4, 4))],
)
def test_one_flat_parameter_on_each_owner(init_weights: Any, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    model = TwoLinears()
    before = dict(model.named_parameters())
    plan = registered(model, init_weights=init_weights)
    after = dict(model.named_parameters())
    ours = {name: after[name] for name in after.keys() - before.keys()}
    assert {name: tuple(block.shape) for name, block in ours.items()} == {
        "up.miss_block_default": up,
        "down.miss_block_default": down,
    }
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(type(block) is nn.Parameter and block.requires_grad for block in ours.values())
    assert model.up.miss_block_default is plan.parameters["up"]
    assert [bool(block.any()) for block in ours.values()] == [init_weights is False] * 2


def test_forwards_classes_and_base_weights_are_not_changed() -> None:
    model, x = TwoLinears(), normal(3, 12)
    before, values = model(x), state(model)
    plan = plan_for(model, init_weights=False)
    create_blocks(plan, True)
    assert same(state(model), values)
    register_blocks(open_host(model, "adapt"), plan)
    assert type(model.up) is type(model.down) is nn.Linear
    assert torch.equal(model(x), before)
    assert same({name: value for name, value in state(model).items() if "miss_block" not in name}, values)


def test_the_record_which_a_second_adapter_joins() -> None:
    model = TwoLinears()
    plan = registered(model, init_weights="mini", miss_dropout=0.25)
    states = owner_states(model)
    assert list(states) == ["up", "down"]
    down = states["down"]
    assert (down.base_class, down.shape) == (nn.Linear, (8, 20))
    assert down.blocks == {"default": Block("default", "mini", 4, 2, 0.25)}
    assert down.adapters["default"] is states["up"].adapters["default"] is plan.adapter
    assert (down.disabled, down.merged, down.kept, down.in_graph) == (0, (), {}, False)
    first = plan.parameters["up"]
    registered(model, name="b", init_weights="bat", target_modules=["up"])
    states = owner_states(model)
    assert [list(states[name].blocks) for name in ("up", "down")] == [["default", "b"], ["default"]]
    assert [block.variant for block in states["up"].blocks.values()] == ["mini", "bat"]
    assert model.up.miss_block_default is first
    assert model.up.miss_block_b.shape == (2, 4, 4)
    assert not hasattr(model.down, "miss_block_b")


def test_a_plan_without_targets_registers_nothing() -> None:
    model = TwoLinears()
    plan = plan_for(model)
    plan.targets = []
    register(model, plan)
    assert (plan.parameters, owner_states(model), len(list(model.parameters()))) == ({}, {}, 3)


WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype(base: torch.dtype, autocast: bool, init_weights: bool) -> None:
    model = TwoLinears().to(base)
    registered(model, autocast, init_weights=init_weights)
    assert model.up.miss_block_default.dtype == (WIDE.get(base, base) if autocast else base)
    assert model.up.weight.dtype == base


class Packed(nn.Module):
    """Eight-bit weights with a scale, as packed linears keep them."""

    def __init__(self, weights: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 8
        if weights:
            self.weight = nn.Parameter(torch.ones(8, 12, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) * self.scale


@pytest.mark.parametrize(("weights", "autocast"), [*itertools.product([True, False], repeat=2)])
def test_weights_that_are_no_floats_or_none_at_all_get_float32_blocks(weights: bool, autocast: bool) -> None:
    model = nn.ModuleDict({"packed": Packed(weights), "conv1d": Conv1D(20, 12)})  # which has other names for its sizes
    registered(model, autocast, target_modules=["packed", "conv1d"])
    assert model.packed.miss_block_default.dtype == torch.float32
    assert [owner.miss_block_default.shape for owner in model.values()] == [(4, 8), (4, 20)]


def test_blocks_live_on_the_device_of_their_weight() -> None:
    model, mixed = TwoLinears().to("meta"), TwoLinears()
    mixed.up.to("meta")
    for each, expected in ((model, [True, True]), (mixed, [True, False])):
        registered(each, init_weights=False)
        assert [each.up.miss_block_default.is_meta, each.down.miss_block_default.is_meta] == expected


def test_random_start_is_drawn_in_float32_in_model_order_whatever_the_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = TwoLinears().to(dtype)
        torch.manual_seed(7)
        drawn = registered(model, False, init_weights=False).parameters
        torch.manual_seed(7)
        for name, shape in (("up", (4, 8)), ("down", (4, 20))):
            assert torch.equal(drawn[name], nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5).to(dtype))


def test_given_values_are_copied_in_the_block_s_dtype() -> None:
    model = TwoLinears().to(torch.bfloat16)
    values = {"up": torch.randn(4, 8, dtype=torch.float64), "down": torch.randn(4, 20)}
    registered(model, values=values)
    assert torch.equal(model.up.miss_block_default, values["up"].float())
    values["down"].zero_()
    assert model.down.miss_block_default.any()


def test_owners_that_share_a_weight_share_the_block() -> None:
    model = TwoLinears()
    model.other, model.same = nn.Linear(12, 8), model.up
    model.other.weight = model.up.weight
    plan = registered(model, init_weights=False)
    assert list(plan.parameters) == ["up", "down", "other"]
    assert model.up.miss_block_default is model.other.miss_block_default
    assert len([name for name, _ in model.named_parameters() if "miss_block" in name]) == 2

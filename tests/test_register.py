"""Registering: which parameter lands where, in which dtype and shape, with which values; forwards stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears

import misscompile as mc
from misscompile.passes.register import create_blocks, register_blocks
from misscompile.plan import Block, Plan
from misscompile.planning import plan_adapter
from misscompile.state import owner_states


def plan_for(model: nn.Module, name: str = "default", **fields: Any) -> Plan:
    return plan_adapter(model, mc.MissConfig(**({"r": 4, "mini_r": 2, "target_modules": "all-linear"} | fields)), name)


def registered(model: nn.Module, autocast: bool = True, name: str = "default", **fields: Any) -> Plan:
    plan = plan_for(model, name, **fields)
    create_blocks(plan, autocast)
    register_blocks(plan)
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
    assert {name: tuple(after[name].shape) for name in after.keys() - before.keys()} == {
        "up.miss_block_default": up,
        "down.miss_block_default": down,
    }
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(type(after[name]) is nn.Parameter and after[name].requires_grad for name in after.keys() - before.keys())
    assert model.up.miss_block_default is plan.parameters["up"]
    start = [float(plan.parameters[name].detach().abs().max()) for name in ("up", "down")]
    assert all(value > 0 for value in start) if init_weights is False else start == [0.0, 0.0]


def test_forwards_classes_and_base_weights_are_not_changed() -> None:
    model, x = TwoLinears(), torch.randn(3, 12)
    before, values = model(x), [p.clone() for p in model.parameters()]
    plan = plan_for(model, init_weights=False)
    create_blocks(plan, True)
    assert [name for name, _ in model.named_parameters()] == ["up.weight", "down.weight", "down.bias"]
    register_blocks(plan)
    assert type(model.up) is type(model.down) is nn.Linear
    assert torch.equal(model(x), before)
    base = [p for name, p in model.named_parameters() if "miss_block" not in name]
    assert all(torch.equal(a, b) for a, b in zip(base, values, strict=True))


def test_the_record() -> None:
    model = TwoLinears()
    plan = registered(model, init_weights="mini", miss_dropout=0.25)
    states = owner_states(model)
    assert list(states) == ["up", "down"]
    state = states["down"]
    assert (state.base_class, state.shape) == (nn.Linear, (8, 20))
    assert state.blocks == {"default": Block("default", "mini", 4, 2, 0.25)}
    assert state.adapters["default"] is states["up"].adapters["default"] is plan.adapter
    assert (state.disabled, state.merged, state.base_values) == (0, (), {})


def test_a_second_adapter_joins_the_record_of_the_first() -> None:
    model = TwoLinears()
    first = registered(model).parameters["up"]
    registered(model, name="b", init_weights="bat", target_modules=["up"])
    states = owner_states(model)
    assert [list(states[name].blocks) for name in ("up", "down")] == [["default", "b"], ["default"]]
    assert [block.variant for block in states["up"].blocks.values()] == ["balance", "bat"]
    assert model.up.miss_block_default is first
    assert model.up.miss_block_b.shape == (2, 4, 4)
    assert not hasattr(model.down, "miss_block_b")


def test_nothing_to_do() -> None:
    model = TwoLinears()
    plan = plan_for(model)
    plan.targets = []
    create_blocks(plan, True)
    register_blocks(plan)
    assert plan.parameters == {}
    assert owner_states(model) == {}
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize(
    ("base", "autocast", "expected"),
    [
        (torch.float16, True, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float64, False, torch.float64),
    ],
)
@pytest.mark.parametrize("init_weights", [True, False])
def test_dtype(base: torch.dtype, autocast: bool, expected: torch.dtype, init_weights: bool) -> None:
    model = TwoLinears().to(base)
    registered(model, autocast, init_weights=init_weights)
    assert model.up.miss_block_default.dtype == expected
    assert model.up.weight.dtype == base


class _Packed(nn.Module):
    """Eight-bit weights with a scale, as packed linears keep them."""

    def __init__(self, weights: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 8
        if weights:
            self.weight = nn.Parameter(torch.ones(8, 12, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) * self.scale


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_weights_that_are_no_floats_or_none_at_all_get_float32_blocks(weights: bool, autocast: bool) -> None:
    model = nn.Sequential(_Packed(weights))
    registered(model, autocast, target_modules=["0"])
    assert model[0].miss_block_default.dtype == torch.float32
    assert model[0].miss_block_default.shape == (4, 8)


def test_conv1d_is_measured_by_its_own_names() -> None:
    model = nn.Sequential(Conv1D(20, 12))
    registered(model)
    assert model[0].miss_block_default.shape == (4, 20)


def test_blocks_live_on_the_device_of_their_weight() -> None:
    model = TwoLinears().to("meta")
    registered(model, init_weights=False)
    assert model.up.miss_block_default.is_meta
    mixed = TwoLinears()
    mixed.up.to("meta")
    registered(mixed, init_weights=False)
    assert [mixed.up.miss_block_default.is_meta, mixed.down.miss_block_default.is_meta] == [True, False]


def test_random_start_is_drawn_in_float32_in_model_order_whatever_the_dtype() -> None:
    drawn = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(11)
        model = TwoLinears().to(dtype)
        torch.manual_seed(7)
        drawn[dtype] = registered(model, False, init_weights=False).parameters
    torch.manual_seed(7)
    for name, shape in (("up", (4, 8)), ("down", (4, 20))):
        expected = nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5)
        for dtype, parameters in drawn.items():
            assert torch.equal(parameters[name], expected.to(dtype))


def test_given_values_are_copied_in_the_block_s_dtype() -> None:
    model = TwoLinears().to(torch.bfloat16)
    plan = plan_for(model)
    values = {"up": torch.randn(4, 8, dtype=torch.float64), "down": torch.randn(4, 20)}
    create_blocks(plan, True, values)
    register_blocks(plan)
    assert torch.equal(model.up.miss_block_default, values["up"].float())
    values["down"].zero_()
    assert float(model.down.miss_block_default.detach().abs().max()) > 0


def test_owners_that_share_a_weight_share_the_block() -> None:
    model = TwoLinears()
    model.other, model.same = nn.Linear(12, 8), model.up
    model.other.weight = model.up.weight
    plan = registered(model, init_weights=False)
    assert list(plan.parameters) == ["up", "down", "other"]
    assert model.up.miss_block_default is model.other.miss_block_default
    assert len([name for name, _ in model.named_parameters() if "miss_block" in name]) == 2


def test_a_name_that_is_taken_is_refused() -> None:
    model = TwoLinears()
    model.up.miss_block_default = "mine"
    text = r"up \(Linear\): it already has an attribute 'miss_block_default'"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["up", "down"]))
    assert owner_states(model) == {}
    assert len(list(model.parameters())) == 3


def test_a_failure_on_the_last_owner_undoes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = TwoLinears(), torch.randn(3, 12)
    before = model(x)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    plain = nn.Module.register_parameter

    def fail(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if self is model.down:
            raise MemoryError("no room")
        plain(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", fail)
    with pytest.raises(MemoryError, match="no room"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    assert [name for name, _ in model.named_parameters()] == ["up.weight", "down.weight", "down.bias"]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert type(model.up) is type(model.down) is nn.Linear
    assert owner_states(model) == {}
    assert torch.equal(model(x), before)

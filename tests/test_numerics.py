"""Every variant against the formulas in fp64: property-based in full precision, within the error bound in low precision."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import VARIANTS, adapted, base_weight, differentiable_delta, fields, max_error, reference_delta, rms_error
from torch import Tensor, nn
from zoo import TwoLinears, normal, two_linears

import misscompile as mc

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@st.composite
def layer_cases(draw: st.DrawFn) -> dict[str, Any]:
    init_weights = draw(st.sampled_from([True, False, "mini", "bat"]))
    r = draw(st.integers(1, 6))
    if init_weights == "bat":
        in_features, out_features = r * draw(st.integers(1, 5)), r * draw(st.integers(1, 5))
        mini_r = 1
    else:
        in_features = draw(st.integers(r, 23))
        mini_r = draw(st.integers(1, 5))
        out_features = mini_r * draw(st.integers(1, 5)) if init_weights == "mini" else draw(st.integers(1, 23))
    return {
        "fields": fields(init_weights, r=r, mini_r=mini_r),
        "in_features": in_features,
        "out_features": out_features,
        "lead": tuple(draw(st.lists(st.integers(1, 3), max_size=3))),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32])),
        "seed": draw(st.integers(0, 10_000)),
    }


def _layer(case: dict[str, Any]) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(case["seed"])
    model = nn.Sequential(nn.Linear(case["in_features"], case["out_features"], bias=case["bias"]).to(case["dtype"]))
    return model, torch.randn(*case["lead"], case["in_features"], dtype=case["dtype"])


@settings(max_examples=150, deadline=None)
@given(layer_cases())
def test_output_gradients_and_merge_equal_the_formulas(case: dict[str, Any]) -> None:
    (model, x), init_weights = _layer(case), case["fields"]["init_weights"]
    mc.adapt(model, mc.MissConfig(**case["fields"]))
    owner, tolerance = model[0], TOLERANCE[case["dtype"]]
    weight, block = base_weight(owner).detach().clone(), owner.miss_block_default
    block.data.copy_(torch.randn(block.shape, dtype=torch.float64) * 0.5)
    upstream = torch.randn(*case["lead"], case["out_features"], dtype=torch.float64)

    x64, block64 = x.double().requires_grad_(), block.detach().double().requires_grad_()
    total = weight.double() + differentiable_delta(init_weights, block64, weight.double())
    assert max_error(total, weight.double() + reference_delta(init_weights, block, weight)) < 1e-12
    expected = F.linear(x64, total, None if owner.bias is None else owner.bias.double())
    expected.backward(upstream)

    x.requires_grad_()
    actual = model(x)
    actual.backward(upstream.to(case["dtype"]))
    assert actual.dtype == case["dtype"]
    scale = 1 + float(expected.abs().max())
    assert max_error(actual, expected) < tolerance * scale
    for ours, exact in ((x.grad, x64.grad), (block.grad, block64.grad)):
        assert ours is not None
        assert exact is not None
        assert max_error(ours, exact) < tolerance * (1 + float(exact.abs().max()))
    assert owner.weight.grad is None

    mc.merge(model)
    assert type(model[0]) is nn.Linear
    assert max_error(base_weight(model[0]), total.detach().to(case["dtype"])) <= tolerance * scale


@settings(max_examples=40, deadline=None)
@given(layer_cases().filter(lambda case: case["fields"]["init_weights"] is not False))
def test_zero_blocks_leave_the_output_bit_identical(case: dict[str, Any]) -> None:
    model, x = _layer(case)
    before = model(x)
    mc.adapt(model, mc.MissConfig(**case["fields"]))
    assert torch.equal(model(x), before)


def test_random_start_is_kaiming_uniform_and_drawn_as_peft_draws_it() -> None:
    config = {"r": 4, "target_modules": ["up", "down"], "init_weights": False}
    torch.manual_seed(7)
    reference = peft.get_peft_model(TwoLinears(), peft.MissConfig(**config))
    torch.manual_seed(7)
    model = mc.adapt(TwoLinears(), mc.MissConfig(**config))
    for name in ("up", "down"):
        block = getattr(model, name).miss_block_default
        assert torch.equal(block, getattr(reference.base_model.model, name).miss_block["default"])
        assert 0 < float(block.abs().max()) <= 1 / block.shape[1] ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("init_weights", "in_features"), [(True, 96), (True, 90), ("mini", 96), ("mini", 90), ("bat", 96)])
def test_low_precision_error_stays_within_the_bound(init_weights: Any, dtype: torch.dtype, in_features: int) -> None:
    """≤ 1.5 × the larger of PEFT's error and that of a linear whose updated weight was rounded once."""
    out_features = 160
    linear = nn.Linear(in_features, out_features).to(dtype)
    x = torch.randn(256, in_features, dtype=dtype)
    upstream = torch.randn(256, out_features).to(dtype)
    config = {"r": 8, "mini_r": 4, "init_weights": init_weights, "target_modules": ["0"]}

    def copied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(in_features, out_features).to(dtype))
        model[0].load_state_dict(linear.state_dict())
        return model

    ours, theirs = mc.adapt(copied(), mc.MissConfig(**config)), peft.get_peft_model(copied(), peft.MissConfig(**config))
    our_block, their_block = ours[0].miss_block_default, theirs.base_model.model[0].miss_block["default"]
    values = torch.randn(our_block.shape) * 0.02
    our_block.data.copy_(values)
    their_block.data.copy_(values)
    assert our_block.dtype == their_block.dtype == torch.float32

    x64, block64, weight64 = (
        x.double().requires_grad_(),
        values.double().requires_grad_(),
        base_weight(linear).detach().double(),
    )
    total = weight64 + differentiable_delta(init_weights, block64, weight64)
    expected = F.linear(x64, total, linear.bias.double())
    expected.backward(upstream.double(), retain_graph=True)
    plain = copied().requires_grad_(False)
    base_weight(plain[0]).copy_(total.detach())  # rounded once: the yardstick of low precision

    def errors(model: nn.Module) -> tuple[float, float]:
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(upstream)
        assert y.dtype == dtype
        return rms_error(y, expected), rms_error(leaf.grad, x64.grad)

    # A plain linear has no block: its weight gradient, folded onto the block in fp64, is what low precision leaves of it.
    (folded,) = torch.autograd.grad(total, block64, (upstream.T @ x).double())
    allowed = zip(
        (*errors(theirs), rms_error(their_block.grad, block64.grad)),
        (*errors(plain), rms_error(folded, block64.grad)),
        strict=True,
    )
    mine = (*errors(ours), rms_error(our_block.grad, block64.grad))
    assert all(error <= 1.5 * max(bounds) for error, bounds in zip(mine, allowed, strict=True)), mine


@pytest.mark.parametrize(("init_weights", "rounded"), [(True, False), ("mini", False), ("bat", False), ("bat", True)])
def test_updates_below_half_a_unit_of_the_weight_still_act_unless_bat_rounds_it(init_weights: Any, rounded: bool) -> None:
    """bf16 weights near 1 have a unit of 2⁻⁷: a block of 2⁻¹² vanishes in W + ΔW, but not in the adapted output."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False).to(torch.bfloat16))
    sign = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    model[0].weight.data.copy_(sign.expand(32, 64))
    x = torch.ones(5, 64, dtype=torch.bfloat16)
    assert model(x).abs().max() == 0
    mc.adapt(model, mc.MissConfig(**fields(init_weights, r=8)), round_bat_weight=rounded)
    block = model[0].miss_block_default
    block.data.fill_(2.0**-12)
    delta = reference_delta(init_weights, block, base_weight(model[0]))
    assert torch.equal((base_weight(model[0]).double() + delta).bfloat16(), base_weight(model[0]))
    expected = F.linear(x.double(), delta)
    assert float(expected.abs().min()) > 0.01
    y = model(x)
    assert max_error(y, torch.zeros(()) if rounded else expected) < (1e-9 if rounded else 1e-4)
    y.float().sum().backward()
    assert float(block.grad.abs().min()) > 0  # the block itself learns in both


def test_float16_shard_sums_do_not_overflow() -> None:
    """Values near the end of float16's range: their shard sum leaves it, and 0 · inf would not be the base's output."""
    model = nn.Sequential(nn.Linear(64, 32).to(torch.float16))
    x = torch.full((3, 64), 6e4, dtype=torch.float16)
    model[0].weight.data.mul_(1e-3)
    before = model(x)
    mc.adapt(model, mc.MissConfig(r=8, target_modules=["0"]))
    assert torch.equal(model(x), before)
    model[0].miss_block_default.data.fill_(2.0**-10)
    expected = F.linear(x.double(), base_weight(model[0]).double() + 2.0**-10, model[0].bias.double())
    assert max_error(model(x), expected) / float(expected.abs().max()) < 2e-3


@pytest.mark.parametrize("init_weights", [True, False, "mini", "bat"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("keep_base_dtype", [False, True])
def test_dtypes_of_blocks_and_outputs(
    init_weights: Any, base: torch.dtype, autocast: torch.dtype | None, keep_base_dtype: bool
) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 20)).to(base)
    x = torch.randn(3, 12, dtype=base)

    def run() -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return model(x)  # type: ignore[no-any-return]

    before = run()
    mc.adapt(model, mc.MissConfig(**fields(init_weights)), autocast_adapter_dtype=not keep_base_dtype)
    expected = torch.float32 if base.itemsize < 4 and not keep_base_dtype else base
    blocks = [parameter for _, parameter in mc.trainable_parameters(model)]
    for block in blocks:
        block.data.normal_(std=0.1)
    after = run()
    assert after.dtype == before.dtype
    assert max_error(after, before) > 1e-3
    after.float().sum().backward()
    assert [block.dtype for block in blocks] == [expected, expected]
    assert all(p.grad is not None and p.grad.dtype == expected and p.grad.abs().max() > 0 for p in blocks)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_batched_gradients_are_those_of_each_alone(init_weights: Any, dropout: float) -> None:
    """As of `torch.autograd.functional.jacobian(vectorize=True)`."""
    model = adapted(two_linears(), init_weights, miss_dropout=dropout).double().train()
    x = normal(3, 12, dtype=torch.float64).requires_grad_()
    y, upstream = model(x), normal(5, 3, 20, dtype=torch.float64)
    wanted = [x, *(parameter for _, parameter in mc.trainable_parameters(model))]
    alone = [torch.autograd.grad(y, wanted, g, retain_graph=True) for g in upstream]
    together = torch.autograd.grad(y, wanted, upstream, retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda g: torch.autograd.grad(y, wanted, g, retain_graph=True))(upstream)
    for index, expected in enumerate(map(torch.stack, zip(*alone, strict=True))):
        assert max_error(together[index], expected) < 1e-12
        assert max_error(mapped[index], expected) < 1e-12

"""The cost expressions against what torch counts on real adapted linears, exactly: FLOPs and parameters; bytes kept too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import adapted, fill_blocks, kept_for_backward
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import misscompile as mc
from misscompile.variants import VARIANTS  # internal: what the package says of costs

Numbers = tuple[int, int, int, int, int]
"""Tokens, in, out, r and m."""

CASES = [  # form, init_weights, dtype, dropout, round_bat_weight
    ("balance", True, torch.float32, 0.0, False),
    ("balance", True, torch.bfloat16, 0.1, False),
    ("mini", "mini", torch.float32, 0.0, False),
    ("mini", "mini", torch.float64, 0.1, False),
    ("mini", "mini", torch.bfloat16, 0.0, False),
    ("mini", "mini", torch.bfloat16, 0.1, False),
    ("bat one product", "bat", torch.float32, 0.0, False),
    ("bat one product", "bat", torch.float64, 0.0, False),
    ("bat one product", "bat", torch.bfloat16, 0.0, True),
    ("bat two products", "bat", torch.bfloat16, 0.0, False),
    ("bat beside the base", "bat", torch.float32, 0.1, False),
    ("bat beside the base", "bat", torch.bfloat16, 0.1, False),
]
SIZES = [  # leading dimensions, in, out, r, m; more than 64 tokens, from which on 16-bit products are prepared
    ((65,), 12, 20, 4, 2),
    ((2, 50), 24, 8, 8, 4),
    ((67,), 16, 16, 2, 16),
]
cases = pytest.mark.parametrize(("form", "init_weights", "dtype", "dropout", "round_weight"), CASES)
sizes_of_cases = pytest.mark.parametrize("sizes", SIZES, ids=str)
forward_and_step = pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])


def added(form: Any, numbers: Numbers, step: bool) -> int:
    """What a form adds to the base's FLOPs: of a step, what the package says."""
    variant, _, products = form.partition(" ")
    if step:
        return VARIANTS[variant].step_flops(*numbers, products)  # type: ignore[arg-type]
    tokens, in_features, out_features, r, m = numbers
    if variant == "bat":  # ΔW, and a second product of the base's size or none
        return 2 * in_features * out_features * (r + tokens * (products != "one product"))
    return 2 * tokens * r * (m if variant == "mini" else out_features)


def parameters(form: str, numbers: Numbers) -> int:
    """What the package says that a block has."""
    _, in_features, out_features, r, m = numbers
    return math.prod(VARIANTS[form.partition(" ")[0]].block_shape(r, m, in_features, out_features))


def base_flops(numbers: Numbers, step: bool) -> int:
    """One product in a forward, and one more in a step: no gradient of a frozen weight."""
    tokens, in_features, out_features, _, _ = numbers
    return (2 if step else 1) * 2 * tokens * in_features * out_features


def count(owner: nn.Module, x: Tensor, step: bool) -> int:
    x = x.clone().requires_grad_(step)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(step):
        y = owner(x)
        if step:
            y.sum().backward()
    assert step is (x.grad is not None)
    return int(counter.get_total_flops())


def make(sizes: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Numbers]:
    lead, in_features, out_features, r, m = sizes
    owner, x = nn.Linear(in_features, out_features).to(dtype).requires_grad_(False), torch.randn(*lead, in_features)
    return owner, x.to(dtype), (x.numel() // in_features, in_features, out_features, r, m)


def adapt(owner: nn.Module, numbers: Numbers, init_weights: Any, dropout: float = 0.0, round_weight: bool = False) -> None:
    config = {"r": numbers[3], "mini_r": numbers[4], "init_weights": init_weights, "miss_dropout": dropout}
    model = nn.Sequential(owner)
    fill_blocks(mc.adapt(model, config | {"target_modules": "all-linear"}, round_bat_weight=round_weight))


@forward_and_step
@sizes_of_cases
@cases
def test_flops_and_parameters_of_a_linear(
    form: str, init_weights: Any, dtype: torch.dtype, dropout: float, round_weight: bool, sizes: Any, step: bool
) -> None:
    owner, x, numbers = make(sizes, dtype)
    assert count(owner, x, step) == base_flops(numbers, step)
    adapt(owner, numbers, init_weights, dropout, round_weight)
    assert count(owner, x, step) == base_flops(numbers, step) + added(form, numbers, step)
    assert owner.miss_block_default.numel() == parameters(form, numbers)


@sizes_of_cases
@cases
def test_bytes_kept_for_the_backward(
    form: str, init_weights: Any, dtype: torch.dtype, dropout: float, round_weight: bool, sizes: Any
) -> None:
    """The sum of the shards, of mini in float32 at least, or for bat the input; a 16-bit block of all outputs a copy too."""
    owner, x, numbers = make(sizes, dtype)
    tokens, in_features, out_features, r, m = numbers
    has_columns = form == "balance" or (form == "mini" and m == out_features)
    assert kept_bytes(owner, x) == 0
    adapt(owner, numbers, init_weights, dropout, round_weight)
    expected = tokens * (in_features if init_weights == "bat" else r) * dtype.itemsize
    if dtype is torch.bfloat16 and init_weights != "bat":
        expected += 2 * r * out_features if has_columns else 2 * tokens * r
    assert kept_bytes(owner, x) == expected + (torch.get_rng_state().nbytes if dropout else 0)


@pytest.mark.parametrize("init_weights", [True, "mini"])
def test_bytes_kept_for_few_16_bit_tokens(init_weights: Any) -> None:
    """The sum in float32, and nothing of the block."""
    owner, x, numbers = make(((7,), 12, 20, 4, 2), torch.bfloat16)
    adapt(owner, numbers, init_weights)
    assert kept_bytes(owner, x) == 4 * 7 * 4


def kept_bytes(owner: nn.Module, x: Tensor) -> int:
    kept = kept_for_backward(lambda: owner(x.clone().requires_grad_()), *owner.parameters())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_of_bat_takes_the_form_that_costs_less(dtype: torch.dtype) -> None:
    """Without gradients and up to a token count, the factored form; both cost the same there."""
    r, in_features, out_features = 8, 24, 32
    products, most = (0, r // 2) if dtype is torch.float32 else (1, r)  # beside forming ΔW
    found = []
    for tokens in (1, most, most + 1, 5 * most):
        owner, x, numbers = make(((tokens,), in_features, out_features, r, 1), dtype)
        base = count(owner, x, False)
        adapt(owner, numbers, "bat")
        factored, formed = 2 * base, 2 * in_features * out_features * r + products * base
        found.append(count(owner, x, False) - base)
        assert found[-1] == min(factored, formed) == (factored if tokens <= most else formed)
    assert found[0] < found[1]


@forward_and_step
@pytest.mark.parametrize("form", ["one product", "two products", "beside the base"])
def test_bat_on_a_transposed_weight(form: str, step: bool) -> None:
    """`Conv1D` keeps its weight as (in, out); its own product is an addmm."""
    dtype, dropout = torch.bfloat16 if form == "two products" else torch.float32, 0.1 if "base" in form else 0.0
    owner, x, numbers = Conv1D(20, 12).to(dtype).requires_grad_(False), torch.randn(2, 3, 12).to(dtype), (6, 12, 20, 4, 2)
    base = count(owner, x, step)
    adapt(owner, numbers, "bat", dropout)
    assert count(owner, x, step) == base + added(f"bat {form}", numbers, step)  # of more tokens than r: never factored


@forward_and_step
@pytest.mark.parametrize(("form", "init_weights"), [("balance", True), ("mini", "mini")])
def test_a_rank_that_does_not_divide_costs_no_product_more(form: str, init_weights: Any, step: bool) -> None:
    owner, x, numbers = make(((6,), 12, 20, 5, 2))
    base = count(owner, x, step)
    adapt(owner, numbers, init_weights)
    assert count(owner, x, step) == base + added(form, numbers, step)


def test_two_active_adapters_cost_their_sum() -> None:
    model, x = nn.Sequential(nn.Linear(12, 20)).requires_grad_(False), torch.randn(6, 12)
    base = count(model, x, True)
    adapted(model)
    mc.adapt(model, mc.MissConfig(r=5, mini_r=2, init_weights="mini", target_modules="all-linear"), "b")
    mc.set_adapter(model, ["default", "b"])
    both = added("balance", (6, 12, 20, 4, 2), True) + added("mini", (6, 12, 20, 5, 2), True)
    assert count(model, x, True) == base + both


@pytest.mark.parametrize(
    ("form", "floor"),
    [
        ("balance", 1 + 1.5 * 8 / 64),  # 1 + 1.5 r / in
        ("mini", 1),  # nothing that grows with out
        ("bat one product", 1.5),
        ("bat two products", 2),  # where it may not round its weight
        ("bat beside the base", 2.5),
    ],
)
def test_the_floors(form: str, floor: float) -> None:
    """What a step costs over the base's where tokens and outputs are many."""
    numbers = (10**9, 64, 10**9, 8, 4)
    assert 1 + added(form, numbers, True) / base_flops(numbers, True) == pytest.approx(floor, rel=1e-6)

"""The cost expressions against what torch counts on real adapted linears, exactly; parameters against `numel`."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from support import adapted
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from misscompile import cost

CASES = [  # form, init_weights, dtype, dropout
    ("balance", True, torch.float32, 0.0),
    ("balance", True, torch.bfloat16, 0.1),
    ("mini", "mini", torch.float32, 0.0),
    ("mini", "mini", torch.bfloat16, 0.1),
    ("bat one product", "bat", torch.float32, 0.0),
    ("bat one product", "bat", torch.float64, 0.0),
    ("bat two products", "bat", torch.bfloat16, 0.0),
    ("bat two products", "bat", torch.float32, 0.1),
]
SIZES = [  # leading dimensions, in, out, r, m
    ((3,), 12, 20, 4, 2),
    ((2, 5), 24, 8, 8, 4),
    ((7,), 16, 16, 2, 16),
]


def count(owner: nn.Module, x: Tensor, step: bool) -> int:
    x = x.clone().requires_grad_(step)
    with FlopCounterMode(display=False) as counter:
        y = owner(x)
        if step:
            y.sum().backward()
    assert step is (x.grad is not None)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("form", "init_weights", "dtype", "dropout"), CASES)
def test_linear(
    form: cost.Form, init_weights: Any, dtype: torch.dtype, dropout: float, sizes: tuple[Any, ...], step: bool
) -> None:
    lead, in_features, out_features, r, m = sizes
    owner = nn.Linear(in_features, out_features, bias=bool(r % 4)).to(dtype).requires_grad_(False)
    x = torch.randn(*lead, in_features).to(dtype)
    numbers = (x.numel() // in_features, in_features, out_features, r, m)
    base = count(owner, x, step)
    assert base == cost.evaluate(cost.BASE_STEP if step else cost.BASE_FORWARD, *numbers)
    model = adapted(nn.Sequential(owner), init_weights, r=r, mini_r=m, miss_dropout=dropout)
    added = cost.evaluate((cost.STEP if step else cost.FORWARD)[form], *numbers)
    assert count(model[0], x, step) == base + added
    variant = init_weights if isinstance(init_weights, str) else "balance"
    assert model[0].miss_block_default.numel() == cost.evaluate(cost.PARAMETERS[variant], *numbers)
    assert step is (model[0].miss_block_default.grad is not None)


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("form", "init_weights", "dtype", "dropout"), CASES)
def test_conv1d(form: cost.Form, init_weights: Any, dtype: torch.dtype, dropout: float, step: bool) -> None:
    owner, x, numbers = Conv1D(20, 12).to(dtype).requires_grad_(False), torch.randn(2, 3, 12).to(dtype), (6, 12, 20, 4, 2)
    base = count(owner, x, step)
    assert base == cost.evaluate(cost.BASE_STEP if step else cost.BASE_FORWARD, *numbers)
    adapted(nn.Sequential(owner), init_weights, miss_dropout=dropout)
    assert count(owner, x, step) == base + cost.evaluate((cost.STEP if step else cost.FORWARD)[form], *numbers)


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("form", "init_weights"), [("balance", True), ("mini", "mini")])
def test_a_rank_that_does_not_divide_costs_no_product_more(form: cost.Form, init_weights: Any, step: bool) -> None:
    owner, x, numbers = nn.Linear(12, 20).requires_grad_(False), torch.randn(6, 12), (6, 12, 20, 5, 2)
    base = count(owner, x, step)
    adapted(nn.Sequential(owner), init_weights, r=5)
    assert count(owner, x, step) == base + cost.evaluate((cost.STEP if step else cost.FORWARD)[form], *numbers)


def test_two_active_adapters_cost_their_sum() -> None:
    import misscompile as mc

    model, x = nn.Sequential(nn.Linear(12, 20)).requires_grad_(False), torch.randn(6, 12)
    base = count(model, x, True)
    adapted(model)
    mc.adapt(model, mc.MissConfig(r=5, mini_r=2, init_weights="mini", target_modules="all-linear"), "b")
    mc.set_adapter(model, ["default", "b"])
    added = cost.evaluate(cost.STEP["balance"], 6, 12, 20, 4, 2) + cost.evaluate(cost.STEP["mini"], 6, 12, 20, 5, 2)
    assert count(model, x, True) == base + added


def test_the_floors() -> None:
    """Balance: 1 + 1.5 r / in; mini: nothing that grows with out; bat: 1.5 where tokens outnumber r."""
    ratio = {form: sympy.simplify(1 + added / cost.BASE_STEP) for form, added in cost.STEP.items()}
    assert sympy.simplify(ratio["balance"] - (1 + sympy.Rational(3, 2) * cost.R / cost.IN)) == 0
    assert sympy.limit(ratio["mini"], cost.OUT, sympy.oo) == 1
    assert sympy.limit(ratio["bat one product"], cost.T, sympy.oo) == sympy.Rational(3, 2)
    assert sympy.limit(ratio["bat two products"], cost.T, sympy.oo) == sympy.Rational(5, 2)


def test_tables_cover_every_form_and_are_positive() -> None:
    assert set(cost.FORWARD) == set(cost.STEP) == {case[0] for case in CASES}
    assert set(cost.PARAMETERS) == {"balance", "mini", "bat"}
    for expression in (*cost.FORWARD.values(), *cost.STEP.values(), *cost.PARAMETERS.values()):
        assert expression.is_positive

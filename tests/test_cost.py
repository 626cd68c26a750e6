"""The cost expressions against what torch counts on real adapted linears, exactly: FLOPs, parameters, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from support import adapted, fill_blocks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import misscompile as mc
from misscompile import cost

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
SIZES = [  # leading dimensions, in, out, r, m; more than MANY_TOKENS tokens
    ((65,), 12, 20, 4, 2),
    ((2, 50), 24, 8, 8, 4),
    ((67,), 16, 16, 2, 16),
]


class _Records(TorchDispatchMode):
    """The bytes of the operands and results of every kernel; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            tensors = [tensor for tensor in tree_leaves((args, kwargs, out)) if isinstance(tensor, Tensor)]
            # an expanded tensor is read once: it has fewer elements than its shape tells
            self.moved += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
        return out


def count(owner: nn.Module, x: Tensor, step: bool) -> int:
    x = x.clone().requires_grad_(step)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(step):
        y = owner(x)
        if step:
            y.sum().backward()
    assert step is (x.grad is not None)
    return int(counter.get_total_flops())


def saved_bytes(owner: nn.Module, x: Tensor) -> int:
    """Bytes of what autograd keeps, each storage once, without the parameters."""
    kept = {p.untyped_storage().data_ptr(): 0 for p in owner.parameters()}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no later tensor is given the same place
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        owner(x.clone().requires_grad_())
    return sum(kept.values())


def make(sizes: Any, dtype: torch.dtype) -> tuple[nn.Linear, Tensor, tuple[int, ...]]:
    lead, in_features, out_features, r, m = sizes
    owner, x = nn.Linear(in_features, out_features).to(dtype).requires_grad_(False), torch.randn(*lead, in_features)
    return owner, x.to(dtype), (x.numel() // in_features, in_features, out_features, r, m, dtype.itemsize)


def adapt(owner: nn.Module, numbers: tuple[int, ...], init_weights: Any, dropout: float, round_weight: bool) -> None:
    config = {"r": numbers[3], "mini_r": numbers[4], "init_weights": init_weights, "miss_dropout": dropout}
    model = nn.Sequential(owner)
    fill_blocks(mc.adapt(model, config | {"target_modules": "all-linear"}, round_bat_weight=round_weight))


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("form", "init_weights", "dtype", "dropout", "round_weight"), CASES)
def test_flops_of_a_linear(
    form: cost.Form, init_weights: Any, dtype: torch.dtype, dropout: float, round_weight: bool, sizes: Any, step: bool
) -> None:
    owner, x, numbers = make(sizes, dtype)
    base = count(owner, x, step)
    assert base == cost.evaluate(cost.BASE_STEP if step else cost.BASE_FORWARD, *numbers)
    adapt(owner, numbers, init_weights, dropout, round_weight)
    expected = cost.evaluate((cost.STEP if step else cost.FORWARD)[form], *numbers)
    assert count(owner, x, step) == base + expected
    assert owner.miss_block_default.numel() == cost.evaluate(cost.PARAMETERS[form.split()[0]], *numbers)  # type: ignore[index]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("form", "init_weights", "dtype", "dropout", "round_weight"), CASES)
def test_bytes_saved_by_a_linear(
    form: cost.Form, init_weights: Any, dtype: torch.dtype, dropout: float, round_weight: bool, sizes: Any
) -> None:
    owner, x, numbers = make(sizes, dtype)
    assert saved_bytes(owner, x) == 0
    adapt(owner, numbers, init_weights, dropout, round_weight)
    expected = cost.SAVED.get(form, sympy.Integer(0))
    if dtype is torch.bfloat16:
        expected += cost.SAVED_CASTS.get(form, sympy.Integer(0))
    state = torch.get_rng_state().nbytes if dropout else 0
    assert saved_bytes(owner, x) == cost.evaluate(expected, *numbers) + state


@pytest.mark.parametrize("init_weights", [True, "mini"])
def test_bytes_saved_for_few_16_bit_tokens(init_weights: Any) -> None:
    """The sum in float32, and nothing of the block."""
    owner, x, numbers = make(((7,), 12, 20, 4, 2), torch.bfloat16)
    adapt(owner, numbers, init_weights, 0.0, False)
    assert saved_bytes(owner, x) == 4 * 7 * 4


@pytest.mark.parametrize("sizes", [((8, 9), 24, 32, 8, 4), ((65,), 32, 16, 8, 2)], ids=str)
@pytest.mark.parametrize(
    ("form", "init_weights"), [("balance", True), ("mini", "mini"), ("bat one product", "bat"), ("bat factored", "bat")]
)
def test_bytes_moved_by_a_linear(form: cost.Form, init_weights: Any, sizes: Any) -> None:
    if form in ("mini", "bat factored"):  # of many tokens, mini repeats an update of few values: 64 of a token
        sizes = ((3,), *sizes[1:])
    owner, x, numbers = make(sizes, torch.float32)
    with torch.no_grad(), _Records() as base:
        owner(x)
    adapt(owner, numbers, init_weights, 0.0, False)
    with torch.no_grad(), _Records() as records:
        owner(x)
    assert records.moved == base.moved + cost.evaluate(cost.MOVED[form], *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_of_bat_takes_the_form_that_costs_less(dtype: torch.dtype) -> None:
    """Without gradients and up to the crossover, the factored form; both cost the same there."""
    form: cost.Form = "bat one product" if dtype is torch.float32 else "bat two products"
    most = cost.few_tokens(form, 8)
    assert most == {"bat one product": 4, "bat two products": 8}[form]
    assert cost.crossover(form) == {"bat one product": cost.R / 2, "bat two products": cost.R}[form]
    found = []
    for tokens in (1, most, most + 1, 5 * most):
        owner, x, numbers = make(((tokens,), 24, 32, 8, 1), dtype)
        base = count(owner, x, False)
        adapt(owner, numbers, "bat", 0.0, False)
        added = count(owner, x, False) - base
        found.append(added)
        both = [cost.evaluate(cost.FORWARD[f], *numbers) for f in (form, "bat factored")]
        assert added == min(both)
        assert added == both[tokens <= most]
    assert found[0] < found[1]


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("form", ["one product", "two products", "beside the base"])
def test_bat_on_a_transposed_weight(form: str, step: bool) -> None:
    """`Conv1D` keeps its weight as (in, out); its own product is an addmm."""
    dtype, dropout = torch.bfloat16 if form == "two products" else torch.float32, 0.1 if "base" in form else 0.0
    owner, x, numbers = Conv1D(20, 12).to(dtype).requires_grad_(False), torch.randn(2, 3, 12).to(dtype), (6, 12, 20, 4, 2)
    base = count(owner, x, step)
    adapt(owner, numbers, "bat", dropout, False)
    table = cost.STEP if step else cost.FORWARD
    name = f"bat {form}" if step or form != "two products" or cost.few_tokens("bat two products", 4) < 6 else "bat factored"
    assert count(owner, x, step) == base + cost.evaluate(table[name], *numbers)  # type: ignore[index]


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("form", "init_weights"), [("balance", True), ("mini", "mini")])
def test_a_rank_that_does_not_divide_costs_no_product_more(form: cost.Form, init_weights: Any, step: bool) -> None:
    owner, x, numbers = nn.Linear(12, 20).requires_grad_(False), torch.randn(6, 12), (6, 12, 20, 5, 2)
    base = count(owner, x, step)
    adapt(owner, numbers, init_weights, 0.0, False)
    assert count(owner, x, step) == base + cost.evaluate((cost.STEP if step else cost.FORWARD)[form], *numbers)


def test_two_active_adapters_cost_their_sum() -> None:
    model, x = nn.Sequential(nn.Linear(12, 20)).requires_grad_(False), torch.randn(6, 12)
    base = count(model, x, True)
    adapted(model)
    mc.adapt(model, mc.MissConfig(r=5, mini_r=2, init_weights="mini", target_modules="all-linear"), "b")
    mc.set_adapter(model, ["default", "b"])
    added = cost.evaluate(cost.STEP["balance"], 6, 12, 20, 4, 2) + cost.evaluate(cost.STEP["mini"], 6, 12, 20, 5, 2)
    assert count(model, x, True) == base + added


def test_the_floors() -> None:
    """Balance: 1 + 1.5 r / in; mini: nothing that grows with out; bat: 1.5, or 2 where it may not round its weight."""
    ratio = {form: sympy.simplify(1 + added / cost.BASE_STEP) for form, added in cost.STEP.items()}
    assert sympy.simplify(ratio["balance"] - (1 + sympy.Rational(3, 2) * cost.R / cost.IN)) == 0
    assert sympy.limit(ratio["mini"], cost.OUT, sympy.oo) == 1
    assert sympy.limit(ratio["bat one product"], cost.T, sympy.oo) == sympy.Rational(3, 2)
    assert sympy.limit(ratio["bat two products"], cost.T, sympy.oo) == 2
    assert sympy.limit(ratio["bat beside the base"], cost.T, sympy.oo) == sympy.Rational(5, 2)


def test_tables_cover_every_form_and_are_positive() -> None:
    trained = {case[0] for case in CASES}
    assert set(cost.STEP) == trained
    assert set(cost.FORWARD) == trained | {"bat factored"}
    assert set(cost.SAVED) | set(cost.SAVED_CASTS) == trained
    assert set(cost.PARAMETERS) == {"balance", "mini", "bat"}
    tables = (cost.FORWARD, cost.STEP, cost.PARAMETERS, cost.SAVED, cost.SAVED_CASTS, cost.MOVED)
    for expression in (expression for table in tables for expression in table.values()):
        assert expression.is_positive

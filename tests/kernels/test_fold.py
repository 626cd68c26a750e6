"""Folding: the formulas in fp64, both layouts, one rounding, blocks untouched, parts that change no bit, and the bound."""

from __future__ import annotations

import pytest
import torch
from support import max_error, reference_delta
from torch import Tensor

from misscompile.kernels import device, fold_in_place, is_finite, stays_finite
from misscompile.variants import VARIANTS

IN, OUT = 12, 20
Update = tuple[str, Tensor]
BLOCKS = {
    "balance": ("balance", 4, 1),
    "short shard": ("balance", 5, 1),
    "mini": ("mini", 5, 2),
    "bat": ("bat", 4, 1),
    "second bat": ("bat", 2, 1),
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
both_layouts = pytest.mark.parametrize("turned", [False, True])
every_block = pytest.mark.parametrize("name", BLOCKS)


def make(*names: str, dtype: torch.dtype = torch.float64, block_dtype: torch.dtype = torch.float64) -> list[Update]:
    """A weight `(out, in)`, as an update without a variant, and updates of it."""
    shapes = [(variant, VARIANTS[variant].block_shape(r, m, IN, OUT)) for variant, r, m in (BLOCKS[name] for name in names)]
    return [("", torch.randn(OUT, IN).to(dtype)), *((v, torch.randn(shape).to(block_dtype)) for v, shape in shapes)]


def expected(weight: Tensor, *updates: Update) -> Tensor:
    """`W + ΣΔW` in fp64."""
    return weight.double() + sum(reference_delta(variant, block, weight) for variant, block in updates)


def fold(weight: Tensor, *updates: Update, turned: bool = False) -> Tensor:
    """The folded weight; `turned`: it is stored as `(in, out)`."""
    before = [block.clone() for _, block in updates]
    stored = weight.t().clone(memory_format=torch.contiguous_format) if turned else weight.clone()
    view = stored.t() if turned else stored
    assert view.is_contiguous() != turned
    fold_in_place(view, updates)
    assert all(torch.equal(block, values) for (_, block), values in zip(updates, before, strict=True))
    assert stored.dtype == weight.dtype
    return view


@both_layouts
@every_block
def test_the_formulas(name: str, turned: bool) -> None:
    (_, weight), *updates = make(name)
    merged = fold(weight, *updates, turned=turned)
    assert max_error(merged, expected(weight, *updates)) < 1e-13
    assert max_error(merged, weight) > 0.1


@both_layouts
def test_several_blocks_are_summed_from_the_base_weight_in_any_order(turned: bool) -> None:
    (_, weight), *updates = make(*BLOCKS)
    merged = fold(weight, *updates, turned=turned)
    assert max_error(merged, expected(weight, *updates)) < 1e-13
    assert max_error(fold(weight, *updates[::-1], turned=turned), merged) < 1e-13
    assert torch.equal(fold(weight, turned=turned), weight)


@both_layouts
def test_a_part_of_what_is_stored_is_written_and_nothing_beside_it(turned: bool) -> None:
    _, *updates = make("bat", "short shard")
    stored = torch.randn(IN + 3, OUT + 7, dtype=torch.float64) if turned else torch.randn(OUT + 7, IN + 3).double()
    whole = stored.t() if turned else stored
    before = whole.clone()
    before[2 : 2 + OUT, 1 : 1 + IN] = expected(whole[2 : 2 + OUT, 1 : 1 + IN], *updates)
    fold_in_place(whole[2 : 2 + OUT, 1 : 1 + IN], updates)
    assert max_error(whole, before) < 1e-13


@both_layouts
@pytest.mark.parametrize("block_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_block
def test_one_rounding_bit_for_bit_where_float32_sums_are_exact(
    name: str, dtype: torch.dtype, block_dtype: torch.dtype, turned: bool
) -> None:
    """Multiples of 1/16 and 1/4096, so that every product and sum fits into float32; 16-bit blocks would lose the bits."""
    (_, weight), (variant, block) = make(name, dtype=dtype, block_dtype=block_dtype)
    weight, block = (weight * 16).round() / 16, (block * 4096).round() / 4096
    assert not torch.equal(block.to(dtype).to(block_dtype), block)
    merged = fold(weight, (variant, block), turned=turned)
    assert torch.equal(merged, expected(weight, (variant, block)).to(dtype))


@both_layouts
@pytest.mark.parametrize("block_dtype", [torch.float32, torch.bfloat16])
def test_several_blocks_are_rounded_once_together(block_dtype: torch.dtype, turned: bool) -> None:
    """Each update alone is below half a unit of the weight: rounding after each of them would leave the base weight."""
    weight, block = torch.ones(OUT, IN, dtype=torch.bfloat16), torch.full((4, OUT), 2.0**-9, dtype=block_dtype)
    updates = [("balance", block)] * 4
    assert torch.equal(fold(weight, *updates, turned=turned), torch.full_like(weight, 1.0 + 2.0**-7))
    assert torch.equal(fold(weight, *updates[:1], turned=turned), weight)


@both_layouts
@every_block
def test_random_values_are_within_one_unit_in_the_last_place(name: str, turned: bool) -> None:
    (_, weight), update = make(name, dtype=torch.bfloat16, block_dtype=torch.float32)
    merged, once = fold(weight, update, turned=turned), expected(weight, update).to(torch.bfloat16)
    units = (merged.contiguous().view(torch.int16).int() - once.view(torch.int16).int()).abs()
    assert int(units.max()) <= 1
    assert float((units == 0).float().mean()) > 0.99


@pytest.mark.parametrize("block_dtype", [torch.float32, torch.float16])
@every_block
def test_a_block_narrower_than_the_weight_does_not_round_the_weight(name: str, block_dtype: torch.dtype) -> None:
    (_, weight), update = make(name, block_dtype=block_dtype)
    assert max_error(fold(weight, update), expected(weight, update)) < 1e-13


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [1, 50, 100, 1 << 20])
def test_working_in_parts_changes_no_bit(
    elements: int, dtype: torch.dtype, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, weight), *updates = make(*BLOCKS, dtype=dtype, block_dtype=torch.float32)
    monkeypatch.setattr(device, "CACHED", elements)
    for chosen in (*([update] for update in updates), updates):
        base = weight.float()
        whole = base.clone()
        for variant, block in chosen:
            whole += VARIANTS[variant].delta_weight(block, base)
        assert torch.equal(fold(weight, *chosen, turned=turned), whole.to(dtype))


# --- what stays finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@every_block
def test_only_what_surely_stays_finite_is_called_so(name: str, dtype: torch.dtype) -> None:
    reads_weight = BLOCKS[name][0] == "bat"
    for where in (0, 1):
        for bad in (float("nan"), float("inf"), -float("inf")):
            (_, weight), update = values = make(name, dtype=dtype)
            assert stays_finite(weight, [update])
            assert is_finite(values[where][1])
            values[where][1].view(-1)[3] = bad
            assert not is_finite(values[where][1])
            assert stays_finite(weight, [update]) == (where == 0 and not reads_weight)
    weight.fill_(torch.finfo(dtype).max)
    update[1].fill_(torch.finfo(dtype).max / 4)
    assert not stays_finite(weight, [update])
    update[1].zero_()
    assert stays_finite(weight, [update]) != reads_weight  # it is finite, which for bat takes the computation
    assert torch.equal(fold(weight, update), weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["balance", "short shard", "mini"])
def test_the_bound_is_half_a_unit_in_the_last_place_of_the_largest_number(name: str, dtype: torch.dtype) -> None:
    """Below it the largest number stays as it is; at twice the bound it is infinite, so that no larger one would do."""
    (_, weight), (variant, block) = make(name, dtype=dtype)
    limits = torch.finfo(dtype)
    weight.fill_(limits.max)
    bound = limits.max * limits.eps / 4
    for factor, stays in ((0.999, True), (2.1, False)):
        block.fill_(factor * bound)
        assert stays_finite(weight, [(variant, block)]) == stays
        merged = fold(weight, (variant, block))
        assert is_finite(merged) == stays
        assert torch.equal(merged, weight) == stays


def test_nothing_is_shown_of_a_weight_without_elements_or_without_fractions() -> None:
    update = ("balance", torch.zeros(4, OUT))
    for weight in (torch.zeros(0, IN), torch.ones(OUT, IN, dtype=torch.int8)):
        assert is_finite(weight)
        assert not stays_finite(weight, [update])

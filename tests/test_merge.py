"""Merging: the formulas in fp64, both layouts, one rounding, blocks untouched, and nothing changed where it must refuse."""

from __future__ import annotations

import itertools
import signal
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import VARIANTS, adapted, fill_blocks, matrix_of, max_error, reference_delta
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears

import misscompile as mc
from misscompile import merging, variants
from misscompile.errors import MergeError
from misscompile.passes import merge as merge_pass
from misscompile.passes.merge import fold_weight, keeps_finite
from misscompile.plan import Block

IN, OUT = 12, 20


def make(
    layout: str, *blocks: Block, dtype: torch.dtype = torch.float64, block_dtype: torch.dtype = torch.float64
) -> nn.Module:
    owner = (Conv1D(OUT, IN) if layout == "in_out" else nn.Linear(IN, OUT)).to(dtype)
    nn.init.normal_(owner.weight)
    for block in blocks:
        shape = variants.block_shape(block.variant, block.r, block.mini_r, IN, OUT)
        owner.register_parameter(block.parameter, nn.Parameter(torch.randn(shape).to(block_dtype)))
    return owner


def expected(owner: nn.Module, *blocks: Block) -> Tensor:
    """`W + ΔW` in fp64 and in the layout of the owner."""
    base = matrix_of(owner)
    merged = base + sum(reference_delta(b.variant, owner.get_parameter(b.parameter), base) for b in blocks)
    return merged.t() if isinstance(owner, Conv1D) else merged


def fold(owner: nn.Module, *blocks: Block) -> Tensor:
    before = {name: parameter.detach().clone() for name, parameter in owner.named_parameters()}
    merged = fold_weight(owner, blocks, "its.name", transposed=isinstance(owner, Conv1D))
    assert all(torch.equal(parameter, before[name]) for name, parameter in owner.named_parameters())  # only read
    assert merged.dtype == owner.weight.dtype
    assert merged.shape == owner.weight.shape
    assert merged.data_ptr() != owner.weight.data_ptr()
    assert not merged.requires_grad
    return merged


BLOCKS = {
    "balance": Block("a", "balance", 4, 1, 0.0),
    "short shard": Block("b", "balance", 5, 1, 0.0),
    "mini": Block("c", "mini", 5, 2, 0.0),
    "bat": Block("d", "bat", 4, 1, 0.0),
    "second bat": Block("e", "bat", 2, 1, 0.0),
}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_formulas(name: str, layout: str) -> None:
    owner = make(layout, BLOCKS[name])
    merged = fold(owner, BLOCKS[name])
    assert max_error(merged, expected(owner, BLOCKS[name])) < 1e-13
    assert max_error(merged, owner.weight) > 0.1


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_several_blocks_are_summed_from_the_base_weight_in_any_order(layout: str) -> None:
    blocks = tuple(BLOCKS.values())
    owner = make(layout, *blocks)
    merged = fold(owner, *blocks)
    assert max_error(merged, expected(owner, *blocks)) < 1e-13
    assert max_error(fold(owner, *blocks[::-1]), merged) < 1e-13
    assert torch.equal(fold(owner), owner.weight)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("block_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_one_rounding_bit_for_bit_where_float32_sums_are_exact(
    name: str, dtype: torch.dtype, block_dtype: torch.dtype, layout: str
) -> None:
    """Multiples of 1/16 and 1/4096, so that every product and sum fits into float32; 16-bit blocks would lose the bits."""
    owner = make(layout, BLOCKS[name], dtype=dtype, block_dtype=block_dtype)
    block = owner.get_parameter(BLOCKS[name].parameter)
    with torch.no_grad():
        owner.weight.copy_(owner.weight.mul(16).round().div(16))
        block.copy_((block * 4096).round() / 4096)
    assert not torch.equal(block.to(dtype).to(block_dtype), block)
    assert torch.equal(fold(owner, BLOCKS[name]), expected(owner, BLOCKS[name]).to(dtype))


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("block_dtype", [torch.float32, torch.bfloat16])
def test_several_blocks_are_rounded_once_together(block_dtype: torch.dtype, layout: str) -> None:
    """Each update alone is below half a unit of the weight: rounding after each of them would leave the base weight."""
    blocks = tuple(Block(name, "balance", 4, 1, 0.0) for name in "abcd")
    owner = make(layout, *blocks, dtype=torch.bfloat16, block_dtype=block_dtype)
    owner.weight.data.fill_(1.0)
    for block in blocks:
        owner.get_parameter(block.parameter).data.fill_(2.0**-9)
    assert torch.equal(fold(owner, *blocks), torch.full_like(owner.weight, 1.0 + 2.0**-7))
    assert torch.equal(fold(owner, *blocks[:1]), owner.weight)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("name", BLOCKS)
def test_random_values_are_within_one_unit_in_the_last_place(name: str, layout: str) -> None:
    owner = make(layout, BLOCKS[name], dtype=torch.bfloat16, block_dtype=torch.float32)
    merged, once = fold(owner, BLOCKS[name]), expected(owner, BLOCKS[name]).to(torch.bfloat16)
    units = (merged.view(torch.int16).int() - once.view(torch.int16).int()).abs()
    assert int(units.max()) <= 1
    assert float((units == 0).float().mean()) > 0.99


@pytest.mark.parametrize("block_dtype", [torch.float32, torch.float16])
def test_a_block_narrower_than_the_weight_does_not_round_the_weight(block_dtype: torch.dtype) -> None:
    for block in BLOCKS.values():
        owner = make("out_in", block, dtype=torch.float64, block_dtype=block_dtype)
        assert max_error(fold(owner, block), expected(owner, block)) < 1e-13


# --- the verb -------------------------------------------------------------------------------------------------------


class _Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * F.linear(x.flip(-1), self.weight)


class _Normalised(nn.Linear):
    """Its weight is used beside the linear call too: an update at the call site is not an update of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) / self.weight.norm(dim=1)


class _Given(nn.Linear):
    """It does not use its weight at all when another is given."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("kind", [_Twice, _Normalised])
def test_a_weight_with_several_users(kind: type[nn.Linear], init_weights: Any) -> None:
    """The merged weight is what the adapter computed, or the merge is refused."""
    model, x = adapted(nn.Sequential(kind(IN, OUT).double()), init_weights), torch.randn(3, IN, dtype=torch.float64)
    y = model(x)
    try:
        mc.merge(model)
    except MergeError as error:
        assert "0: " in str(error)  # noqa: PT017
    assert max_error(model(x), y) < 1e-12


def test_a_weight_given_from_outside_is_not_merged() -> None:
    owner, x = _Given(IN, OUT).double(), torch.randn(3, IN, dtype=torch.float64)
    model = nn.Sequential(owner)
    try:
        adapted(model)
    except (mc.UnsupportedModuleError, mc.NoMatchError):
        return
    y = owner(x, owner.weight.detach().clone())
    given = owner.weight.detach().clone()
    with pytest.raises(MergeError):
        mc.merge(model)
    assert torch.equal(owner(x, given), y)


def test_a_weight_that_a_module_outside_uses_is_refused() -> None:
    model = TwoLinears()
    model.tied = nn.Linear(12, 8)
    model.tied.weight = model.up.weight
    with pytest.warns(
        mc.MissWarning, match=r"up shares its weight with tied\.weight: the adapter acts on this module alone"
    ):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["up", "down"]))
    before = fill_blocks(model).up.weight.detach().clone()
    with pytest.raises(
        MergeError, match=r"up shares its weight with tied\.weight, which the adapter does not act on.*Untie"
    ):
        mc.merge(model)
    assert torch.equal(model.up.weight, before)
    assert hasattr(model.down, "miss_block_default")


def test_owners_that_share_a_weight_are_merged_once() -> None:
    model = TwoLinears().double()
    model.other = nn.Linear(12, 8, bias=False).double()
    model.other.weight = model.up.weight
    adapted(model)
    x = torch.randn(3, 12, dtype=torch.float64)
    y, delta = model.other(x), reference_delta(True, model.up.miss_block_default, model.up.weight)
    once = model.up.weight.detach() + delta
    mc.merge(model)
    assert model.other.weight is model.up.weight
    assert max_error(model.up.weight, once) < 1e-14
    assert max_error(model.other(x), y) < 1e-13


def test_refusals_name_the_module() -> None:
    opaque = adapted(nn.Sequential(_Opaque(12, 8)), target_modules=["0"])
    with pytest.raises(MergeError, match=r"0: its forward reads self\.scale.*cannot be shown to be one of its weight"):
        mc.merge(opaque)
    with pytest.raises(MergeError, match="up: its weight is on the meta device or offloaded; load it first"):
        mc.merge(mc.adapt(TwoLinears().to("meta"), mc.MissConfig(r=4, target_modules="all-linear")))


class _Opaque(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


# --- in place and in parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [1, 50, 100, 1 << 20])
def test_working_in_parts_changes_no_bit(
    elements: int, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = make(layout, *BLOCKS.values(), dtype=dtype, block_dtype=torch.float32)
    for chosen in (*((block,) for block in BLOCKS.values()), tuple(BLOCKS.values())):
        base = (owner.weight.t() if layout == "in_out" else owner.weight).detach().float()
        whole = base.clone()
        for block in chosen:
            whole += variants.delta_weight(block.variant, owner.get_parameter(block.parameter).detach(), base)
        monkeypatch.setattr(merge_pass, "_CACHED", elements)
        assert torch.equal(fold(owner, *chosen), (whole.t() if layout == "in_out" else whole).to(dtype))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BLOCKS)
def test_only_what_surely_stays_finite_is_called_so(name: str, dtype: torch.dtype) -> None:
    block = BLOCKS[name]
    largest = torch.finfo(dtype).max
    for where in (block.parameter, "weight"):
        for bad in (float("nan"), float("inf"), -float("inf")):
            owner = make("out_in", block, dtype=dtype)
            assert keeps_finite(owner, [block])
            owner.get_parameter(where).data.view(-1)[3] = bad
            assert keeps_finite(owner, [block]) == (where == "weight" and block.variant != "bat")
    owner = make("out_in", block, dtype=dtype)
    owner.weight.data.fill_(largest)
    owner.get_parameter(block.parameter).data.fill_(largest / 4)
    assert not keeps_finite(owner, [block])
    owner.get_parameter(block.parameter).data.zero_()
    assert keeps_finite(owner, [block]) == (block.variant != "bat")  # it is finite, which for bat takes the computation
    assert torch.equal(fold(owner, block), owner.weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["balance", "short shard", "mini"])
def test_the_bound_is_half_a_unit_in_the_last_place_of_the_largest_number(name: str, dtype: torch.dtype) -> None:
    """Below it the largest number stays as it is; at twice the bound it is infinite, so that no larger one would do."""
    block = BLOCKS[name]
    owner = make("out_in", block, dtype=dtype)
    limits = torch.finfo(dtype)
    owner.weight.data.fill_(limits.max)
    update = owner.get_parameter(block.parameter).data
    bound = limits.max * limits.eps / 4
    update.fill_(0.999 * bound)
    assert keeps_finite(owner, [block])
    assert torch.equal(fold(owner, block), owner.weight)
    update.fill_(2.1 * bound)
    assert not keeps_finite(owner, [block])
    with pytest.raises(MergeError, match="not finite"):
        fold_weight(owner, (block,), "its.name", transposed=False)


@pytest.mark.parametrize("init_weights", [True, "mini"])
def test_what_was_not_finite_in_a_base_weight_stays_and_nothing_joins_it(init_weights: Any) -> None:
    model, x = adapted(TwoLinears().bfloat16(), init_weights), torch.randn(3, 12).bfloat16()
    with torch.no_grad():
        model.up.weight[2, 3], model.up.weight[4, 5] = float("nan"), -float("inf")
    before, y = model.up.weight.detach().clone(), model(x)
    mc.merge(model)
    assert torch.equal(model.up.weight.isfinite(), before.isfinite())
    assert torch.equal(model.up.weight.isnan(), before.isnan())
    assert torch.equal(model(x).isnan(), y.isnan())


@pytest.mark.parametrize("keep_adapters", [False, True])
def test_a_result_that_surely_stays_finite_is_computed_once(keep_adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[Tensor] = []

    def counting(stored: Tensor, *args: Any) -> None:
        folded.append(stored)
        merge_pass.fold_in_place(stored, *args)

    monkeypatch.setattr(merging, "fold_in_place", counting)
    monkeypatch.setattr(merging, "fold_weight", None)
    model = adapted(TwoLinears().bfloat16())
    mc.merge(model, keep_adapters=keep_adapters)
    assert folded == [model.up.weight, model.down.weight]


def test_an_interrupt_waits_until_the_module_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(stored: Tensor, *args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        merge_pass.fold_in_place(stored, *args)

    model, x = adapted(TwoLinears().double()), torch.randn(3, 12, dtype=torch.float64)
    y = model(x)
    monkeypatch.setattr(merging, "fold_in_place", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            mc.merge(model)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert type(model.up) is nn.Linear
    assert hasattr(model.down, "miss_block_default")
    assert max_error(model(x), y) < 1e-12
    monkeypatch.undo()
    mc.merge(model)
    assert max_error(model(x), y) < 1e-12


class _RunsOut(TorchDispatchMode):
    """Memory for `allocations` tensors: the operation that returns one more with storage of its own fails."""

    def __init__(self, allocations: int) -> None:
        super().__init__()
        self.left = allocations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = {t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, Tensor)}
        self.left -= len(found - given)
        if self.left < 0:
            raise MemoryError
        return result


@pytest.mark.parametrize("keep_adapters", [False, True])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_memory_that_runs_out_leaves_the_weight_whole(
    init_weights: Any, dtype: torch.dtype, layout: str, keep_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_pass, "_CACHED", 4 * IN)  # five parts
    model = adapted(nn.Sequential(make(layout, dtype=dtype)), init_weights, r=4, target_modules=["0"])
    before, x = model[0].weight.detach().clone(), torch.randn(3, IN).to(dtype)
    expected = model(x)
    for allocations in itertools.count():
        try:
            with _RunsOut(allocations):
                mc.merge(model, keep_adapters=keep_adapters)
        except MemoryError:
            assert torch.equal(model[0].weight, before)
            assert torch.equal(model(x), expected)
        else:
            break
    assert allocations > 2
    assert not torch.equal(model[0].weight, before)
    assert max_error(model(x), expected) < (1e-5 if dtype == torch.float32 else 0.1)


def test_folds_of_one_merge_share_their_memory() -> None:
    workspace = merge_pass.Workspace()
    device = torch.device("cpu")
    large = workspace.take("sum", (4, 6), torch.float32, device)
    small = workspace.take("sum", (5, 2), torch.float32, device)
    assert (small.shape, small.data_ptr()) == ((5, 2), large.data_ptr())
    others = [("rows", torch.float32), ("sum", torch.float64)]
    assert all(workspace.take(use, (5, 2), dtype, device).data_ptr() != large.data_ptr() for use, dtype in others)
    assert workspace.take("sum", (5, 6), torch.float32, device).shape == (5, 6)

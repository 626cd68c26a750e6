"""Merging modules: weights with several users, what is refused, and that no interrupt leaves a weight half merged."""

from __future__ import annotations

import copy
import itertools
import signal
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import (
    VARIANTS,
    adapted,
    base_weight,
    fields,
    fill_blocks,
    max_error,
    picture,
    reference_delta,
    says,
    shake,
    with_deltas,
)
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears

import misscompile as mc
from misscompile.errors import MergeError
from misscompile.hosts import base
from misscompile.kernels import device, fold_in_place

IN, OUT = 12, 20


class _Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * F.linear(x.flip(-1), self.weight)


class _Normalised(nn.Linear):
    """Its weight is used beside the linear call too: an update at the call site is not an update of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) / self.weight.norm(dim=1)


class _Given(nn.Linear):
    """It does not use its weight at all when another is given."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight if weight is None else weight)


class _Layered(nn.Linear):
    """As diffusers' linears are: another layer may be hung beside the product."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.layer: nn.Module | None = None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if self.layer is None:
            out = super().forward(x)
            return out
        else:
            out = super().forward(x) + (scale * self.layer(x))
            return out


class _Flagged(nn.Linear):
    """What it computes depends on plain attributes."""

    flips, factor, kind = False, 1, "plain"

    def forward(self, x: Tensor) -> Tensor:
        if self.flips and self.training:
            x = x.flip(-1)
        if self.factor > 1:
            return super().forward(x) * self.factor
        if self.kind == "measured" or not x.shape:
            return super().forward(x.abs())
        return super().forward(x)


@pytest.mark.parametrize("keep_adapters", [False, True])
@pytest.mark.parametrize("init_weights", [True, "mini"])
def test_a_forward_that_branches_on_plain_attributes_is_merged_where_it_is_the_linear_now(
    init_weights: Any, keep_adapters: bool
) -> None:
    model, x = adapted(nn.Sequential(_Layered(IN, OUT)).double(), init_weights), torch.randn(3, IN, dtype=torch.float64)
    y, before = model(x), model[0].weight.detach().clone()
    delta = reference_delta(init_weights, model[0].miss_block_default, before)
    mc.merge(model, keep_adapters=keep_adapters)
    assert max_error(model[0].weight, before + delta) < 1e-14
    assert max_error(model(x), y) < 1e-12
    model[0].layer = nn.Linear(IN, OUT, dtype=torch.float64)
    assert max_error(model[0](x, 2.0), y + 2 * model[0].layer(x)) < 1e-12
    if keep_adapters:
        mc.unmerge(model)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("flags", [{}, {"factor": 2}, {"flips": True, "factor": 1.0}])
def test_a_forward_that_is_not_the_linear_now_is_refused(flags: dict[str, Any]) -> None:
    model = adapted(nn.Sequential(_Flagged(IN, OUT).double()))
    vars(model[0]).update(flags)
    before = model[0].weight.detach().clone()
    with pytest.raises(MergeError, match=r"0: its forward has the statement `if`.*cannot be shown to be one of its weight"):
        mc.merge(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "refused"), [(_Twice, None), (_Normalised, "0: its forward uses its weight beside the linear call")]
)
def test_a_weight_with_several_users(kind: type[nn.Linear], refused: str | None, init_weights: Any) -> None:
    """The merged weight is what the adapter computed, or the merge is refused."""
    model, x = adapted(nn.Sequential(kind(IN, OUT).double()), init_weights), torch.randn(3, IN, dtype=torch.float64)
    y, before = model(x), base_weight(model[0]).detach().clone()
    if refused is None:
        mc.merge(model)
    else:
        with pytest.raises(MergeError, match=refused):
            mc.merge(model)
    assert (type(model[0]) is kind) == (refused is None)
    assert torch.equal(base_weight(model[0]), before) == (refused is not None)
    assert max_error(model(x), y) < 1e-12


def test_a_weight_in_whose_place_another_may_be_given_is_not_merged() -> None:
    owner, x = _Given(IN, OUT).double(), torch.randn(3, IN, dtype=torch.float64)
    model = adapted(nn.Sequential(owner))
    given = base_weight(owner).detach().clone()
    y = owner(x, given)
    with pytest.raises(MergeError, match=r"0: its forward chooses by .*cannot be shown to be one of its weight"):
        mc.merge(model)
    assert torch.equal(owner(x, given), y)
    assert torch.equal(base_weight(owner), given)


def test_a_weight_that_a_module_outside_uses_is_refused() -> None:
    model = TwoLinears()
    model.tied = nn.Linear(12, 8)
    model.tied.weight = model.up.weight
    with pytest.warns(mc.MissWarning, match=r"up shares its weight with tied\.weight: its block acts on this module alone"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["up", "down"]))
    before = base_weight(fill_blocks(model).up).detach().clone()
    with pytest.raises(
        MergeError, match=r"up shares its weight with tied\.weight, which the adapter does not act on.*Untie"
    ):
        mc.merge(model)
    assert torch.equal(base_weight(model.up), before)
    assert hasattr(model.down, "miss_block_default")


def test_owners_that_share_a_weight_are_merged_once() -> None:
    model = TwoLinears().double()
    model.other = nn.Linear(12, 8, bias=False).double()
    model.other.weight = model.up.weight
    adapted(model)
    x = torch.randn(3, 12, dtype=torch.float64)
    y, delta = model.other(x), reference_delta(True, model.up.miss_block_default, base_weight(model.up))
    once = base_weight(model.up).detach() + delta
    mc.merge(model)
    assert base_weight(model.other) is base_weight(model.up)
    assert max_error(base_weight(model.up), once) < 1e-14
    assert max_error(model.other(x), y) < 1e-13


class _Pair(nn.Module):
    """Two linears of one shape beside an embedding, which may read the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.embed = nn.Linear(6, 4), nn.Linear(6, 4), nn.Embedding(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) * self.b(x) + self.embed.weight.sum()
        return y


def _tie_by_object(model: _Pair) -> None:
    model.b.weight = model.a.weight


def _tie_by_data(model: _Pair) -> None:
    model.b.weight = nn.Parameter(model.a.weight.data)


def _tie_embedding(model: _Pair) -> None:
    model.embed.weight = nn.Parameter(model.a.weight.data)


def _tie_buffer(model: _Pair) -> None:
    model.register_buffer("cache", model.a.weight.data.t())


def _overlap_rows(model: _Pair) -> None:
    rows = torch.randn(6, 6, dtype=torch.float64)
    model.a.weight, model.b.weight = nn.Parameter(rows[:4]), nn.Parameter(rows[2:])


def _cut_rows(model: _Pair) -> None:
    rows = torch.randn(8, 6, dtype=torch.float64)
    model.a.weight, model.b.weight = nn.Parameter(rows[:4]), nn.Parameter(rows[4:])


def _cut_columns(model: _Pair) -> None:
    columns = torch.randn(4, 12, dtype=torch.float64)
    model.a.weight, model.b.weight = nn.Parameter(columns[:, :6]), nn.Parameter(columns[:, 6:])


def _two_adapters(model: Any) -> Any:
    model = mc.adapt(mc.adapt(model, fields(target_modules=["a"]), "p"), fields(target_modules=["b"]), "q")
    mc.set_adapter(model, ["p", "q"])
    return model


def _one_adapter(model: Any) -> Any:
    return mc.adapt(model, fields())


def _tied_afterwards(model: Any) -> Any:
    model = _one_adapter(model)
    model.b.weight = model.a.weight
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("route", "tie", "adapt", "told"),
    [
        ("module", _tie_by_object, _one_adapter, ""),
        ("module", _cut_rows, _one_adapter, ""),
        ("module", _cut_columns, _two_adapters, ""),
        ("module", _tie_by_object, _two_adapters, "a shares its weight with b.weight, where other blocks act:...Untie..."),
        ("module", _cut_rows, _tied_afterwards, "a shares its weight with b.weight, where other blocks act:...Untie..."),
        ("module", _tie_by_data, _one_adapter, "a shares its weight with b.weight, where other blocks act:...Untie..."),
        ("module", _overlap_rows, _one_adapter, "a shares its weight with b.weight, where other blocks act:...Untie..."),
        (
            "module",
            _tie_embedding,
            _one_adapter,
            "a shares its weight with embed.weight, which the adapter does not act on...",
        ),
        ("module", _tie_buffer, _one_adapter, "a shares its weight with cache, which the adapter does not act on..."),
        ("traced", _tie_by_object, _one_adapter, ""),
        (
            "traced",
            _tie_by_object,
            _two_adapters,
            "...read one weight, each with blocks of its own: ...parameter of its own...",
        ),
        *((route, _overlap_rows, _two_adapters, "") for route in ("traced", "captured")),
        *(
            (route, _tie_by_data, _two_adapters, "...read one weight, each with blocks...")
            for route in ("traced", "captured")
        ),
        *((route, _tie_embedding, _one_adapter, "a: its weight is also read by...") for route in ("traced", "captured")),
    ],
)
def test_what_lies_in_the_memory_of_a_weight_stays_or_the_merge_is_refused(
    route: str, tie: Any, adapt: Any, told: str
) -> None:
    """A graph gets new parameters, so that a view of the same memory stays; a tie by `.data` is one parameter there."""
    pair, x = _Pair().double(), torch.randn(3, 6, dtype=torch.float64)
    tie(pair)
    model = fill_blocks(adapt({"module": lambda m: m, "traced": fx.symbolic_trace, "captured": _captured}[route](pair)), 0.5)
    y = model(x)
    with mc.disable_adapter(model):
        assert max_error(model(x), y) > 1e-2
    before = picture(model, x)
    if told:
        with pytest.raises(MergeError) as caught:
            mc.merge(model)
        assert says(caught.value, told), caught.value
        assert picture(model, x) == before
    else:
        assert max_error(mc.merge(model)(x), y) < 1e-12


@pytest.mark.parametrize(
    ("tie", "others"),
    [
        (_tie_by_object, []),
        (_cut_rows, []),
        (_tie_by_data, ["b.weight", "a.weight"]),
        (_overlap_rows, ["b.weight", "a.weight"]),
        (_tie_embedding, ["embed.weight"]),
        (_tie_buffer, ["cache"]),
    ],
)
def test_adapt_tells_of_every_share_of_a_weight_that_merge_will_refuse(tie: Any, others: list[str]) -> None:
    pair = _Pair().double()
    tie(pair)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _one_adapter(pair)
    told = "...{} shares its weight with {}: its block acts on this module alone, and merge will refuse until..."
    assert [
        says(warning.message, told.format(name, other)) for warning, name, other in zip(caught, "ab", others, strict=False)
    ] == [True] * len(others)
    assert len(caught) == len(others)


def _captured(model: nn.Module) -> fx.GraphModule:
    return mc.capture(model, (torch.randn(3, 6, dtype=torch.float64),))


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_read_in_both_layouts_has_a_block_for_each() -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=False), Conv1D(8, 6)).double()
    model[1].weight = model[0].weight  # (6, 8): 8 to 6, and back
    x = torch.randn(3, 8, dtype=torch.float64)
    model = adapted(model, target_modules=["0", "1"])
    assert [tuple(p.shape) for n, p in model.named_parameters() if "miss_block" in n] == [(4, 6), (4, 8)]
    expected = with_deltas(copy.deepcopy(nn.Sequential(*_untied(model))), model, default=True)
    assert max_error(model(x), expected(x)) < 1e-12
    with pytest.raises(MergeError, match=r"0 shares its weight with 1\.weight, where other blocks act"):
        mc.merge(model)


def _untied(model: nn.Module) -> list[nn.Module]:
    plain = [nn.Linear(8, 6, bias=False).double(), Conv1D(8, 6).double()]
    for module, source in zip(plain, model.children(), strict=True):
        module.load_state_dict({name: value for name, value in source.state_dict().items() if "miss" not in name})
    return plain


def test_a_bias_in_the_memory_of_another_is_not_overwritten() -> None:
    model = _Pair().double()
    model.b.bias = nn.Parameter(model.a.bias.data)
    shake(mc.adapt(model, fields(bias="all", target_modules=["a"])))
    before = picture(model)
    with pytest.raises(MergeError, match=r"a\.bias, which the adapter trains in full, is tied to b\.bias"):
        mc.merge(model)
    assert picture(model) == before


def test_a_weight_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(MergeError, match="up: its weight is on the meta device or offloaded; load it first"):
        mc.merge(mc.adapt(TwoLinears().to("meta"), mc.MissConfig(r=4, target_modules="all-linear")))


@pytest.mark.parametrize("init_weights", [True, "mini"])
def test_what_was_not_finite_in_a_base_weight_stays_and_nothing_joins_it(init_weights: Any) -> None:
    model, x = adapted(TwoLinears().bfloat16(), init_weights), torch.randn(3, 12).bfloat16()
    with torch.no_grad():
        model.up.weight[2, 3], model.up.weight[4, 5] = float("nan"), -float("inf")
    before, y = base_weight(model.up).detach().clone(), model(x)
    mc.merge(model)
    assert torch.equal(base_weight(model.up).isfinite(), before.isfinite())
    assert torch.equal(base_weight(model.up).isnan(), before.isnan())
    assert torch.equal(model(x).isnan(), y.isnan())


@pytest.mark.parametrize("keep_adapters", [False, True])
def test_a_result_that_surely_stays_finite_is_computed_once(keep_adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = mock.Mock(wraps=fold_in_place)
    monkeypatch.setattr(base, "fold_in_place", fold)
    model = adapted(TwoLinears().bfloat16())
    mc.merge(model, keep_adapters=keep_adapters)
    folded = [call.args[0].data_ptr() for call in fold.call_args_list]
    assert folded == [model.up.weight.data_ptr(), model.down.weight.data_ptr()]  # in place


def test_an_interrupt_waits_until_the_model_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(weight: Tensor, updates: Any, scratch: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        fold_in_place(weight, updates, scratch)

    model, x = adapted(TwoLinears().double()), torch.randn(3, 12, dtype=torch.float64)
    y = model(x)
    monkeypatch.setattr(base, "fold_in_place", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            mc.merge(model)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert type(model.up) is type(model.down) is nn.Linear
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
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("parts", [1, 5])
def test_memory_that_runs_out_leaves_the_weight_whole(
    parts: int, init_weights: Any, dtype: torch.dtype, turned: bool, keep_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CACHED", IN * OUT // parts)
    owner = (Conv1D(OUT, IN) if turned else nn.Linear(IN, OUT)).to(dtype)
    nn.init.normal_(owner.weight)
    model = adapted(nn.Sequential(owner), init_weights, target_modules=["0"])
    mc.set_adapter(fill_blocks(mc.adapt(model, fields(True, target_modules=["0"]), "b"), std=0.05), ["default", "b"])
    before, x = base_weight(model[0]).detach().clone(), torch.randn(3, IN).to(dtype)
    expected = model(x)
    for allocations in itertools.count():
        try:
            with _RunsOut(allocations):
                mc.merge(model, keep_adapters=keep_adapters)
        except MemoryError:
            assert torch.equal(base_weight(model[0]), before)
            assert torch.equal(model(x), expected)
        else:
            break
    assert allocations > 2
    assert not torch.equal(base_weight(model[0]), before)
    assert max_error(model(x), expected) < (1e-5 if dtype == torch.float32 else 0.1)

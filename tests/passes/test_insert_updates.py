"""Inserting: the update of every block at every site, in the right place, of the right form, nothing wider than needed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import (
    TRACERS,
    adapted,
    base_weight,
    differentiable_delta,
    fill_blocks,
    matrix_of,
    max_error,
    reference_delta,
    rms_error,
    with_deltas,
)
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D
from zoo import holder

import misscompile as mc
from misscompile import kernels
from misscompile.errors import UnsupportedModuleError
from misscompile.hosts.owner_class import REWRITE
from misscompile.kernels.device import GROUP
from misscompile.passes.find_sites import find_sites
from misscompile.passes.insert_updates import insert_updates, update_form
from misscompile.passes.trace import call_opaque, opaque_scope, trace_owner
from misscompile.record.words import Block, Scope
from misscompile.variants import Form

IN, OUT = 12, 20
VARIANTS = ("balance", "mini", "bat")
INIT: dict[str, Any] = {"balance": True, "mini": "mini", "bat": "bat"}
both_layouts = pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
all_variants = pytest.mark.parametrize("variant", VARIANTS)


class Forwards:
    """What an owner may compute of its weight, which is `(out, in)` in all but two."""

    def twice(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * F.linear(x.flip(-1), self.weight)

    def chained(self: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight)[..., :IN], self.weight, self.bias)

    def again(self: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight)  # nothing between the two

    def in_place(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y.mul_(2.0).add_(x.mul_(3.0).sum(-1, keepdim=True))

    def opaque(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if x.ndim else x

    def addmm_t(self: Any, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())

    def product_t(self: Any, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def product(self: Any, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    def residual(self: Any, x: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(residual, x, self.weight)


def kind(name: str, base: type[nn.Module] = nn.Linear) -> Any:
    return type(name, (base,), {"forward": vars(Forwards)[name]})


TWICE, CHAINED, AGAIN, IN_PLACE, OPAQUE = map(kind, ("twice", "chained", "again", "in_place", "opaque"))
PRODUCT, RESIDUAL = (kind(name, Conv1D) for name in ("product", "residual"))


def block(variant: str = "balance", r: int = 4, adapter: str = "a", dropout: float = 0.0) -> Block:
    return Block(adapter, variant, r, 2, dropout)


def make(kind: Any = nn.Linear, dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (IN, OUT)) -> nn.Module:
    owner: nn.Module = kind(*(sizes[::-1] if issubclass(kind, Conv1D) else sizes)).to(dtype)
    for parameter in owner.parameters():
        nn.init.normal_(parameter)
    return owner


def adapt(owner: nn.Module, *blocks: Block, std: float = 0.5) -> nn.Module:
    """`owner` with adapters as `blocks` tells, active in their order, and with non-zero values."""
    model = nn.Sequential(owner)
    for b in blocks:
        fields = {"init_weights": INIT[b.variant], "miss_dropout": b.dropout, "target_modules": ["0"]}
        mc.adapt(model, {"r": b.r, "mini_r": b.mini_r, **fields}, b.adapter, round_bat_weight=b.round_weight)
    mc.set_adapter(model, [b.adapter for b in blocks])
    fill_blocks(model, std)
    return owner


def rewritten(owner: nn.Module) -> fx.Graph:
    graph: fx.Graph = getattr(type(owner), REWRITE).graph
    return graph


def traced(kind: Any, *blocks: Block, dtype: torch.dtype = torch.float64, opaque: bool = False) -> Scope:
    """The scope of an owner, its sites with `blocks`, not rewritten yet."""
    owner = make(kind, dtype)
    told = "its forward is its own"
    scope = opaque_scope(owner, kind, (IN, OUT), None, told) if opaque else trace_owner(owner, kind, (IN, OUT))
    assert find_sites(scope)
    assert (scope.opaque is not None) == opaque
    for site in scope.sites:
        site.blocks = blocks
    return scope


def parameter_of(owner: nn.Module, b: Block) -> nn.Parameter:
    return owner.get_parameter(b.parameter)


def delta(owner: nn.Module, *blocks: Block, weight: Tensor | None = None) -> Tensor:
    """`ΣΔW (out, in)`, every one from the base weight."""
    weight = matrix_of(owner) if weight is None else weight
    return sum((reference_delta(b.variant, parameter_of(owner, b), weight) for b in blocks), torch.zeros_like(weight))


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


def check(owner: nn.Module, b: Block, weight: Tensor, *inputs: Tensor) -> None:
    """Output and gradients of `x Wᵀ` plus the second input, or else the bias, with ΔW of `weight (out, in)` in `W`."""
    parameter, values = parameter_of(owner, b), parameter_of(owner, b).detach().clone().requires_grad_()
    y = owner(*inputs)
    added = inputs[1] if len(inputs) > 1 else owner.bias
    expected = F.linear(inputs[0], weight + differentiable_delta(b.variant, values, weight)) + added
    assert max_error(y, F.linear(inputs[0], weight + delta(owner, b, weight=weight)) + added) < 1e-12
    upstream = torch.randn_like(y)
    actual = torch.autograd.grad(y, [*inputs, parameter], upstream)
    for a, e in zip(actual, torch.autograd.grad(expected, [*inputs, values], upstream), strict=True):
        assert max_error(a, e) < 1e-12


# --- numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, PRODUCT, kind("addmm_t"), kind("product_t")])
@pytest.mark.parametrize(
    "b",
    [block(), block(r=5), block(r=IN), block("mini"), block("mini", r=5), block("bat")],
    ids=lambda b: f"{b.variant} r={b.r}",
)
def test_every_variant_in_every_layout(kind: Any, b: Block) -> None:
    owner = adapt(make(kind), b)
    updated, x = matrix_of(owner) + delta(owner, b), torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    check(owner, b, matrix_of(owner), x)
    mc.merge(nn.Sequential(owner))
    assert max_error(matrix_of(owner), updated) < 1e-13


@all_variants
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_graph_tells_which_way_a_square_weight_lies(variant: str, dropout: float) -> None:
    b = block(variant, dropout=dropout)
    owner = adapt(make(kind("product"), sizes=(IN, IN)), b).eval()
    weight, x = base_weight(owner).detach().t(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert max_error(delta(owner, b, weight=weight), delta(owner, b, weight=weight.t()).t()) > 0.1
    check(owner, b, weight, x)


@all_variants
def test_a_residual_in_the_place_of_a_bias_is_added_once_and_the_update_goes_beside(variant: str) -> None:
    b = block(variant)
    (site,) = traced(RESIDUAL, b).sites
    assert not site.is_whole
    owner = adapt(make(RESIDUAL), b)
    added = [kernels.add_bat] if variant == "bat" else [kernels.sum_shards, kernels.add_update]
    functions = [n.target for n in rewritten(owner).nodes if n.op == "call_function"]
    assert [f for f in functions if f is not torch.addmm] == added
    inputs = (torch.randn(3, width, dtype=torch.float64, requires_grad=True) for width in (IN, OUT))
    check(owner, b, matrix_of(owner), *inputs)


Added = Callable[[Tensor, Tensor], Tensor]
ADDED: dict[
    str, tuple[Added, int, bool]
] = {  # to the product of `x`, beside the bias: rule, width of `x`, whether it is a vector
    "the bias": (lambda b, x: b, 8, True),
    "a residual": (lambda b, x: torch.cat([x, x[:, :4]], 1), 8, False),
    "the input": (lambda b, x: x, 12, False),
    "a bias in two dimensions": (lambda b, x: b.unsqueeze(0), 8, False),
    "a part of a bias": (lambda b, x: b[:1], 8, True),
}


@all_variants
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("tracer", TRACERS)
def test_what_addmm_adds_to_a_product_in_a_whole_graph(tracer: str, added: str, variant: str) -> None:
    rule, width, is_vector = ADDED[added]
    model = holder(lambda w, b, x: torch.addmm(rule(b, x), x, w), (width, 12)).requires_grad_(False)
    x = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
    graph = adapted(TRACERS[tracer](model, x.detach()), INIT[variant], target_modules=["proj"])
    block, weight = graph.proj.miss_block_default, model.proj.weight.t()
    beside = not is_vector or (tracer == "fx" and added != "the bias")  # a trace does not tell the shape of what is computed
    assert targets(graph.graph).count(kernels.add_bat) == (variant == "bat" and beside)
    inner = torch.sin(x)
    values = block.detach().clone().requires_grad_()
    product = F.linear(inner, weight + differentiable_delta(INIT[variant], values, weight))
    expected, y = torch.tanh((rule(model.proj.bias, inner) + product) / 4), graph(x)
    assert max_error(y, expected) < 1e-12
    upstream = torch.randn_like(y)
    actual = torch.autograd.grad(y, [x, block], upstream)
    for a, e in zip(actual, torch.autograd.grad(expected, [x, values], upstream), strict=True):
        assert max_error(a, e) < 1e-12
    mc.merge(graph)
    assert max_error(graph(x), expected) < 1e-12


class Writing(nn.Module):
    """Two linears of one input, which is written in place between them."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.write = nn.Linear(IN, OUT), nn.Linear(IN, OUT), write

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        y: Tensor = self.first(h)
        self.write(h)
        return y * self.second(h)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu": lambda h: F.relu(h, inplace=True),
    "a view": lambda h: h[:, 2:7].mul_(-3.0),
    "data": lambda h: h.data.mul_(2.0),  # which no version tells
    "numpy": lambda h: np.add(h.detach().numpy(), 1.0, out=h.detach().numpy()),
}
ROUTES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {"module": lambda model, x: model, **TRACERS}


@all_variants
@pytest.mark.parametrize(
    ("write", "route"), [(w, r) for w in WRITES for r in ROUTES if w in ("relu", "a view") or r == "module"]
)
@torch.no_grad()
def test_a_write_in_place_between_two_linears_reaches_the_update_of_the_second_alone(
    route: str, write: str, variant: str
) -> None:
    torch.manual_seed(0)
    plain, x = Writing(WRITES[write]).double(), torch.randn(3, IN, dtype=torch.float64)
    model = adapted(ROUTES[route](copy.deepcopy(plain), x), INIT[variant], r=4)
    expected = with_deltas(plain, model, default=INIT[variant])(x)
    assert max_error(expected, plain(x)) > 1e-2
    assert max_error(model(x), expected) < 1e-12


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_several_blocks_on_one_site_each_from_the_base_weight_in_any_order(kind: Any, dtype: torch.dtype) -> None:
    blocks = (block("bat", adapter="a"), block("bat", 2, "b"), block("balance", 5, "c"), block("mini", adapter="d"))
    owner, x = adapt(make(kind, dtype), *blocks, std=0.05), torch.randn(3, IN).to(dtype)
    updates, weight = delta(owner, *blocks), matrix_of(owner)
    assert max_error(delta(owner, blocks[1], weight=weight + delta(owner, blocks[0])), delta(owner, blocks[1])) > 0.01
    expected = F.linear(x.double(), weight + updates, owner.bias.double()).detach()
    for order in ("abcd", "dcba", "bdac"):
        mc.set_adapter(nn.Sequential(owner), list(order))
        assert max_error(owner(x), expected) < (1e-12 if dtype is torch.float64 else 0.02 * float(expected.abs().max()))


@all_variants
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # bat with dropout is a product of its own
@pytest.mark.parametrize("kind", [TWICE, CHAINED, AGAIN, IN_PLACE])
@torch.no_grad()
def test_several_sites_and_operations_in_place(kind: Any, variant: str, dropout: float) -> None:
    b, sizes = block(variant, dropout=dropout), (IN, IN if kind is AGAIN else OUT)
    owner, x = adapt(make(kind, sizes=sizes), b).eval(), torch.randn(3, IN, dtype=torch.float64)
    plain = make(kind, sizes=sizes)
    plain.weight.copy_(base_weight(owner) + delta(owner, b))
    plain.bias.copy_(owner.bias)
    expected = plain(x.clone())
    assert max_error(owner(x.clone()), expected) < 1e-12 * (1 + float(expected.abs().max()))


@pytest.mark.parametrize("variant", ["balance", "mini"])
def test_an_opaque_site_takes_what_needs_no_weight(variant: str) -> None:
    b = block(variant, r=5)
    owner, x = adapt(make(OPAQUE), b), torch.randn(3, IN, dtype=torch.float64)
    assert call_opaque in targets(rewritten(owner))
    assert max_error(owner(x), F.linear(x, base_weight(owner), owner.bias) + x @ delta(owner, b).T) < 1e-12


def test_an_opaque_site_refuses_bat() -> None:
    text = r"Linear cannot take a 'bat' block: its forward is its own, and bat needs the weight itself\. Use init_weights"
    with pytest.raises(UnsupportedModuleError, match=text):
        insert_updates(traced(nn.Linear, block("bat"), opaque=True))


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3, 4)])
@all_variants
def test_any_number_of_leading_dimensions(lead: tuple[int, ...], variant: str) -> None:
    b = block(variant, adapter="my-adapter")  # whose parameter has no name in Python
    owner, x = adapt(make(), b), torch.randn(*lead, IN, dtype=torch.float64)
    y = owner(x)
    assert y.shape == (*lead, OUT)
    assert torch.allclose(y, F.linear(x, matrix_of(owner) + delta(owner, b), owner.bias), rtol=0, atol=1e-12)


# --- the form of bat ------------------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize(
    ("dtype", "dropout", "round_weight", "form"),
    [
        (torch.float32, 0.0, False, "one product"),
        (torch.float64, 0.0, False, "one product"),
        (torch.float32, 0.1, False, "beside the base"),
        (torch.bfloat16, 0.0, False, "two products"),
        (torch.float16, 0.0, False, "two products"),
        (torch.bfloat16, 0.0, True, "one product"),
        (torch.bfloat16, 0.1, True, "beside the base"),
    ],
)
def test_bat_is_one_product_where_that_is_exact_or_asked_for(
    kind: Any, dtype: torch.dtype, dropout: float, round_weight: bool, form: Form
) -> None:
    b = dataclasses.replace(block("bat", dropout=dropout), round_weight=round_weight)
    scope = traced(kind, b, dtype=dtype)
    (site,) = scope.sites
    call, before, x = site.node, site.node.target, site.x
    assert update_form(site, b, dtype) == form
    insert_updates(scope)
    if form == "beside the base":  # the base product stays as it was
        assert call.target is before
        assert site.weight in call.all_input_nodes
        (call,) = (node for node in scope.graph.nodes if node.target is kernels.add_bat)
        weight = call.args[2]
    else:
        assert call.target is kernels.bat_linear
        x_given, weight, bias, (values,), rounds = call.args
        assert (x_given, bias, values.target, rounds) == (x, site.added, "miss_block_a", round_weight)
    assert weight is site.weight if kind is nn.Linear else (weight.target, weight.args) == ("t", (site.weight,))


def test_one_block_that_may_not_be_rounded_keeps_two_products_for_all() -> None:
    blocks = (dataclasses.replace(block("bat"), round_weight=True), block("bat", 2, "b"))
    (site,) = (n for n in rewritten(adapt(make(dtype=torch.bfloat16), *blocks)).nodes if n.target is kernels.bat_linear)
    assert [node.target for node in site.args[3]] == ["miss_block_a", "miss_block_b"]
    assert site.args[4] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bat_in_low_precision_keeps_updates_below_half_a_unit(dtype: torch.dtype) -> None:
    b = block("bat")
    owner, x = adapt(make(dtype=dtype), b, std=1e-4), torch.randn(64, IN).to(dtype)
    y = owner(x)
    update = x.double() @ delta(owner, b).T
    rounded_weight = (matrix_of(owner) + delta(owner, b)).to(dtype).double() - matrix_of(owner)
    base = F.linear(x, base_weight(owner), owner.bias)
    assert rms_error(x.double() @ rounded_weight.T, update) > 0.5 * rms_error(update, torch.zeros(()))
    exact = F.linear(x.double(), matrix_of(owner), owner.bias.double()) + update
    assert rms_error(y, exact) <= 1.5 * rms_error(base, exact - update)


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "first", "second"), [("balance", 0.5, 0.25), ("mini", 0.5, 0.25), ("bat", 0.5, 0.25), ("bat", 0.0, 0.5)]
)
def test_dropout_reads_the_mode_when_it_runs_and_each_block_has_its_own(variant: str, first: float, second: float) -> None:
    blocks = (block(variant, adapter="a", dropout=first), block(variant, adapter="b", dropout=second))
    owner, x = adapt(make(), *blocks), torch.randn(50, IN, dtype=torch.float64)
    drops = [node.args[1] for node in rewritten(owner).nodes if node.target is kernels.dropout]
    assert drops == [p for p in (first, second) if p]
    assert targets(rewritten(owner)).count(kernels.bat_linear) == (first == 0.0)
    base = F.linear(x, base_weight(owner), owner.bias)
    torch.manual_seed(3)
    y = owner.train()(x)
    torch.manual_seed(3)
    updates = [F.dropout(x, b.dropout) @ delta(owner, b).T for b in blocks]
    assert max_error(y, base + sum(updates)) < 1e-12
    assert max_error(owner.eval()(x), base + x @ delta(owner, *blocks).T) < 1e-12


# --- the graph ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "created"),
    [
        (block(), [kernels.sum_shards, "miss_block_a", kernels.add_update]),
        (block("mini", dropout=0.1), ["training", kernels.dropout, kernels.sum_shards, "miss_block_a", kernels.add_update]),
        (block("bat"), ["miss_block_a"]),
        (block("bat", dropout=0.1), ["training", kernels.dropout, "miss_block_a", kernels.add_bat]),
    ],
    ids=lambda value: value.variant if isinstance(value, Block) else "",
)
def test_an_update_is_a_few_calls_of_kernels_and_nothing_else(b: Block, created: list[Any]) -> None:
    scope = traced(nn.Linear, b, dtype=torch.bfloat16)
    old = list(scope.graph.nodes)
    assert insert_updates(scope) == 1
    assert [node.target for node in scope.graph.nodes if node not in old] == created


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, TWICE])
@pytest.mark.parametrize("has_sites", [True, False])
def test_without_blocks_or_sites_the_graph_is_untouched(kind: Any, has_sites: bool) -> None:
    scope = traced(kind, *(() if has_sites else (block(),)))
    scope.sites = scope.sites if has_sites else []
    before, nodes = str(scope.graph), list(scope.graph.nodes)
    assert insert_updates(scope) == 0
    assert str(scope.graph) == before
    assert list(scope.graph.nodes) == nodes


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, TWICE])
@pytest.mark.parametrize(("variant", "dropout"), [("balance", 0.0), ("mini", 0.1), ("bat", 0.0), ("bat", 0.1)])
def test_every_node_tells_its_pass_its_site_and_its_adapter(kind: Any, variant: str, dropout: float) -> None:
    blocks = (block(variant, adapter="a", dropout=dropout), block(variant, adapter="b"))
    scope = traced(kind, *blocks)
    old, calls = list(scope.graph.nodes), [site.node for site in scope.sites]
    assert insert_updates(scope) == len(calls)
    tags = {node: node.meta["misscompile"] for node in scope.graph.nodes if node not in old or node in calls}
    assert not any("misscompile" in node.meta for node in old if node not in calls)
    for node, tag in tags.items():
        assert tag["pass"] == "insert_updates"
        assert tag["call"] == tag["site"]
        assert node.meta["custom"]["misscompile"] == tag
        if node in calls:
            assert (tag["call"], "adapter" in tag) == (node.name, False)
            assert tag["blocks"] == [{**dataclasses.asdict(b), "owner": ""} for b in blocks]
        else:
            assert tag["adapter"] in ("a", "b")
            assert "blocks" not in tag
    assert {tag["call"] for node, tag in tags.items() if node not in calls} == {node.name for node in calls}
    read = [(node.target, tag["adapter"]) for node, tag in tags.items() if str(node.target).startswith("miss_block_")]
    assert set(read) == {("miss_block_a", "a"), ("miss_block_b", "b")}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, TWICE, CHAINED, IN_PLACE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_old_nodes_keep_their_order_and_nothing_created_is_dead(kind: Any, dtype: torch.dtype) -> None:
    blocks = (block("bat", adapter="a", dropout=0.5), block("mini", 5, "b"), block("balance", 5, "c"), block("bat", 2, "d"))
    scope = traced(kind, *blocks, dtype=dtype)
    old = list(scope.graph.nodes)
    insert_updates(scope)
    scope.graph.lint()
    nodes = list(scope.graph.nodes)
    assert [node for node in nodes if node in old] == old
    assert [node.name for node in nodes if node not in old and not node.users] == []
    for site in scope.sites:  # every user of the site reads the updated output
        assert all("misscompile" in user.meta for user in site.node.users)


def test_blocks_are_read_and_shards_summed_before_their_site_and_the_updates_follow_right_behind_it() -> None:
    graph = rewritten(adapt(make(IN_PLACE), block(adapter="a"), block("mini", adapter="b")))
    order = targets(graph)
    site = order.index(F.linear)
    assert max(order.index("miss_block_a"), order.index("miss_block_b")) < site
    sums = [i for i, target in enumerate(order) if target is kernels.sum_shards]
    assert len(sums) == 2
    assert max(sums) < site  # where x is made: Inductor fuses it there
    behind = [i for i, node in enumerate(graph.nodes) if "misscompile" in node.meta and i > site]
    assert behind == list(range(site + 1, site + 1 + len(behind)))
    assert order.index("mul_") > behind[-1]


# --- what is never made: a full-width cast, copy or repeat ----------------------------------------------------------


class _Watch(TorchDispatchMode):
    """The tensors that operations allocate, by the size of their storage; views allocate nothing."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.made: list[tuple[str, torch.dtype, int]] = []
        self.keep: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.known.add(tensor.untyped_storage().data_ptr())
                self.keep.append(tensor)  # so that no later tensor is given the same place
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.made.append((str(func), tensor.dtype, size))
        return out


@pytest.mark.parametrize("r", [8, 7])
@pytest.mark.parametrize("variant", ["balance", "mini"])
@pytest.mark.parametrize("kind", [nn.Linear, OPAQUE])
def test_nothing_of_the_width_of_the_input_is_made(variant: str, r: int, kind: Any) -> None:
    """96 tokens, 256 → 128: `x` has 24576 elements, the weight 32768, `y` 12288; mini repeats an update to 64 values."""
    tokens, in_features, out_features = 96, 256, 128
    b = block(variant, r)
    owner = adapt(make(kind, torch.bfloat16, (in_features, out_features)), b)
    assert (call_opaque in targets(rewritten(owner))) == (kind is OPAQUE)
    x = torch.randn(tokens, in_features).to(torch.bfloat16).requires_grad_()
    with _Watch(x, *owner.parameters()) as forward:
        y = owner(x)
    assert y.dtype == x.dtype
    with _Watch(x, y, *owner.parameters(), *forward.keep) as backward:
        y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert parameter_of(owner, b).grad is not None
    largest = max(size for _, _, size in forward.made)
    assert largest == tokens * out_features, forward.made
    wide = [made for made in forward.made if made[1] == torch.float32]
    widest = GROUP if variant == "mini" else 0 if r == 8 else r
    assert max((size for *_, size in wide), default=0) == tokens * widest, wide
    assert all(size < x.numel() for _, dtype, size in backward.made if dtype == torch.float32), backward.made


def test_the_watch_sees_a_cast_a_copy_and_a_repeat() -> None:
    x = torch.randn(32, 64).to(torch.bfloat16)
    with _Watch(x) as watch:
        x.float().view(-1), F.pad(x, (0, 6)), x[..., :16].repeat(1, 4)
    assert [size for *_, size in watch.made if size >= x.numel()] == [2048, 32 * 70, 2048]


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("variant", ["balance", "mini"])
@torch.no_grad()
def test_the_sum_of_the_shards_is_accumulated_in_float32(variant: str, tokens: int) -> None:
    """256 ones and a large value that cancels: a bf16 sum would lose them."""
    b = block(variant, 1)
    owner = adapt(make(dtype=torch.bfloat16, sizes=(258, 4)), b)
    nn.init.zeros_(owner.weight), nn.init.zeros_(owner.bias), nn.init.ones_(parameter_of(owner, b))
    x = torch.ones(tokens, 258, dtype=torch.bfloat16)
    x[:, 0], x[:, -1] = 2.0**20, -(2.0**20)
    assert torch.equal(owner(x), torch.full((tokens, 4), 256.0, dtype=torch.bfloat16))

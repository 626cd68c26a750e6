"""Inserting: the update of every block at every site, in the right place, of the right form, nothing wider than needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import max_error, reference_delta, rms_error
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from misscompile import bat, cost, dropout, products, variants
from misscompile.errors import UnsupportedModuleError
from misscompile.passes.find import find_sites
from misscompile.passes.insert import insert_updates, training_form
from misscompile.passes.install import generate_forward
from misscompile.passes.trace import call_opaque, make_opaque, trace_forward
from misscompile.plan import Block, Scope

IN, OUT = 12, 20
VARIANTS = ("balance", "mini", "bat")


def block(variant: Any = "balance", r: int = 4, adapter: str = "a", dropout: float = 0.0) -> Block:
    return Block(adapter, variant, r, 2, dropout)


def make(
    kind: type[nn.Module] = nn.Linear, *blocks: Block, dtype: torch.dtype = torch.float64, std: float = 0.5
) -> nn.Module:
    """An owner of `kind` with non-zero values in `blocks`."""
    owner = (Conv1D(OUT, IN) if kind is Conv1D else kind(IN, OUT)).to(dtype)
    for parameter in owner.parameters():
        nn.init.normal_(parameter)
    for b in blocks:
        shape = variants.block_shape(b.variant, b.r, b.mini_r, IN, OUT)
        owner.register_parameter(b.parameter, nn.Parameter(torch.randn(shape, dtype=torch.float64).mul_(std).to(dtype)))
    return owner


def traced(owner: nn.Module, *blocks: Block, opaque: bool = False) -> Scope:
    scope = Scope(type(owner), IN, OUT, next(owner.parameters()).dtype, blocks=blocks)
    if opaque:
        make_opaque(scope, owner, None, "its forward is its own")
    else:
        trace_forward(scope, owner, None)
    find_sites(scope)
    assert scope.sites
    return scope


def rewritten(owner: nn.Module, *blocks: Block, opaque: bool = False) -> Scope:
    scope = traced(owner, *blocks, opaque=opaque)
    insert_updates(scope)
    scope.graph.lint()
    generate_forward(scope)
    if opaque:
        owner.base_forward = type(owner).forward.__get__(owner)
    return scope


def run(scope: Scope, owner: nn.Module, *args: Any) -> Tensor:
    assert scope.forward is not None
    y: Tensor = scope.forward(owner, *args)
    return y


def matrix(owner: nn.Module) -> Tensor:
    weight = owner.weight.detach().double()
    return weight.t() if isinstance(owner, Conv1D) else weight


def delta(owner: nn.Module, *blocks: Block) -> Tensor:
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for b in blocks:
        total += reference_delta(b.variant, owner.get_parameter(b.parameter), matrix(owner))
    return total


def targets(scope: Scope) -> list[Any]:
    return [node.target for node in scope.graph.nodes]


# --- numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    "b",
    [block(), block(r=5), block(r=IN), block("mini"), block("mini", r=5), block("bat")],
    ids=lambda b: f"{b.variant} r={b.r}",
)
def test_every_variant_in_every_layout(kind: type[nn.Module], b: Block) -> None:
    owner, x = make(kind, b), torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, OUT, dtype=torch.float64)
    parameter = owner.get_parameter(b.parameter)
    y = run(rewritten(owner, b), owner, x)
    weight, values = matrix(owner), parameter.detach().clone().requires_grad_()
    updated = weight + variants.delta_weight(b.variant, values, weight)
    assert max_error(updated, weight + delta(owner, b)) < 1e-13
    assert max_error(y, F.linear(x, updated, owner.bias)) < 1e-12
    actual = torch.autograd.grad(y, [x, parameter], upstream)
    expected = torch.autograd.grad(F.linear(x, updated), [x, values], upstream)
    for a, e in zip(actual, expected, strict=True):
        assert max_error(a, e) < 1e-12


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_several_blocks_on_one_site_in_any_order(kind: type[nn.Module], dtype: torch.dtype) -> None:
    blocks = (block("bat", adapter="a"), block("bat", 2, "b"), block("balance", 5, "c"), block("mini", adapter="d"))
    owner, x = make(kind, *blocks, dtype=dtype, std=0.05), torch.randn(3, IN).to(dtype)
    expected = F.linear(x.double(), matrix(owner) + delta(owner, *blocks), owner.bias.double()).detach()
    for order in (blocks, blocks[::-1], (blocks[1], blocks[3], blocks[0], blocks[2])):
        y = run(rewritten(owner, *order), owner, x)
        assert max_error(y, expected) < (1e-12 if dtype is torch.float64 else 0.02 * float(expected.abs().max()))


def test_bat_updates_come_from_the_base_weight_not_from_each_other() -> None:
    blocks = (block("bat", adapter="a"), block("bat", adapter="b"))
    owner, x = make(nn.Linear, *blocks), torch.eye(IN, dtype=torch.float64)
    one_after_the_other = matrix(owner) + delta(owner, blocks[0])
    one_after_the_other += reference_delta("bat", owner.get_parameter("miss_block_b"), one_after_the_other)
    y = run(rewritten(owner, *blocks), owner, x) - owner.bias
    assert max_error(y, (matrix(owner) + delta(owner, *blocks)).T) < 1e-12
    assert max_error(y, one_after_the_other.T) > 0.1


class _Twice(nn.Linear):
    """One weight, two call sites."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * F.linear(x.flip(-1), self.weight)


class _Chained(nn.Linear):
    """The second call site reads the output of the first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight)[..., :IN], self.weight, self.bias)


class _Again(nn.Linear):
    """The second call site reads the output of the first, with nothing between."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight)


class _InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y.mul_(2.0).add_(x.mul_(3.0).sum(-1, keepdim=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # bat with dropout is a product of its own
@pytest.mark.parametrize("kind", [_Twice, _Chained, _InPlace])
def test_several_sites_and_operations_in_place(kind: type[nn.Linear], variant: str, dropout: float) -> None:
    b = block(variant, dropout=dropout)
    owner, x = make(kind, b).eval().requires_grad_(False), torch.randn(3, IN, dtype=torch.float64)
    y = run(rewritten(owner, b), owner, x.clone())
    plain = make(kind).requires_grad_(False)
    plain.weight.copy_(owner.weight + delta(owner, b))
    plain.bias.copy_(owner.bias)
    expected = plain(x.clone())
    assert max_error(y, expected) < 1e-12 * (1 + float(expected.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_site_that_reads_the_output_of_another(variant: str, dropout: float) -> None:
    owner = _Again(12, 12).double().eval().requires_grad_(False)
    b = block(variant, dropout=dropout)
    values = torch.randn(variants.block_shape(b.variant, 4, 2, 12, 12), dtype=torch.float64)
    owner.register_parameter(b.parameter, nn.Parameter(values))
    scope = Scope(_Again, 12, 12, torch.float64, blocks=(b,))
    trace_forward(scope, owner, None)
    find_sites(scope)
    insert_updates(scope)
    generate_forward(scope)
    x = torch.randn(3, 12, dtype=torch.float64)
    updated = owner.weight + reference_delta(variant, values, owner.weight)
    assert max_error(run(scope, owner, x), x @ updated.T @ updated.T) < 1e-11


@pytest.mark.parametrize("variant", ["balance", "mini"])
def test_an_opaque_site_takes_what_needs_no_weight(variant: str) -> None:
    b = block(variant, r=5)
    owner, x = make(nn.Linear, b), torch.randn(3, IN, dtype=torch.float64)
    scope = rewritten(owner, b, opaque=True)
    assert call_opaque in [node.target for node in scope.graph.nodes]
    assert max_error(run(scope, owner, x), owner(x) + x @ delta(owner, b).T) < 1e-12


def test_an_opaque_site_refuses_bat() -> None:
    b = block("bat")
    scope = traced(make(nn.Linear, b), b, opaque=True)
    text = (
        r"Linear cannot take a 'bat' block: its forward is its own, and bat needs the weight itself\. Use init_weights=True"
    )
    with pytest.raises(UnsupportedModuleError, match=text):
        insert_updates(scope)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3, 4)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_leading_dimensions(lead: tuple[int, ...], variant: str) -> None:
    b = block(variant)
    owner, x = make(nn.Linear, b), torch.randn(*lead, IN, dtype=torch.float64)
    y = run(rewritten(owner, b), owner, x)
    assert y.shape == (*lead, OUT)
    assert torch.allclose(y, F.linear(x, matrix(owner) + delta(owner, b), owner.bias), rtol=0, atol=1e-12)


# --- the form of bat ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    ("dtype", "dropout", "round_weight", "form"),
    [
        (torch.float32, 0.0, False, "bat one product"),
        (torch.float64, 0.0, False, "bat one product"),
        (torch.float32, 0.1, False, "bat beside the base"),
        (torch.bfloat16, 0.0, False, "bat two products"),
        (torch.float16, 0.0, False, "bat two products"),
        (torch.bfloat16, 0.0, True, "bat one product"),
        (torch.bfloat16, 0.1, True, "bat beside the base"),
    ],
)
def test_bat_is_one_product_where_that_is_exact_or_asked_for(
    kind: type[nn.Module], dtype: torch.dtype, dropout: float, round_weight: bool, form: cost.Form
) -> None:
    b = dataclasses.replace(block("bat", dropout=dropout), round_weight=round_weight)
    owner = make(kind, b, dtype=dtype)
    scope = traced(owner, b)
    before, bias = scope.sites[0].node.target, scope.sites[0].node
    bias_of = [node for node in bias.all_input_nodes if node.target == "bias"]
    assert training_form(scope.sites[0], b) == form
    insert_updates(scope)
    site = scope.sites[0].node
    if form == "bat beside the base":  # the base product stays as it was
        assert site.target is before
        assert targets(scope).count(bat.add_bat) == 1
        assert scope.sites[0].weight in site.all_input_nodes
    else:
        assert before not in targets(scope)
        assert targets(scope).count(bat.bat_linear) == 1
        assert site.args[2:3] == tuple(bias_of)
        assert site.args[4:] == (form == "bat two products", cost.few_tokens(form, b.r))


def test_one_block_that_may_not_be_rounded_keeps_two_products_for_all() -> None:
    blocks = (dataclasses.replace(block("bat"), round_weight=True), block("bat", 2, "b"))
    scope = rewritten(make(nn.Linear, *blocks, dtype=torch.bfloat16), *blocks)
    (site,) = (node for node in scope.graph.nodes if node.target is bat.bat_linear)
    assert [node.target for node in site.args[3]] == ["miss_block_a", "miss_block_b"]
    assert site.args[4:] == (True, cost.few_tokens("bat two products", 2))


def test_a_bat_with_dropout_beside_one_without() -> None:
    blocks = (block("bat", adapter="a"), block("bat", adapter="b", dropout=0.5))
    owner, x = make(nn.Linear, *blocks), torch.randn(50, IN, dtype=torch.float64)
    scope = rewritten(owner, *blocks)
    assert targets(scope).count(bat.bat_linear) == targets(scope).count(bat.add_bat) == 1
    torch.manual_seed(3)
    y = run(scope, owner.train(), x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    expected = F.linear(x, matrix(owner) + delta(owner, blocks[0]), owner.bias) + dropped @ delta(owner, blocks[1]).T
    assert max_error(y, expected) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_reads_the_mode_when_it_runs_and_once_for_all_blocks(variant: str) -> None:
    blocks = (block(variant, adapter="a", dropout=0.5), block(variant, adapter="b", dropout=0.25))
    owner, x = make(nn.Linear, *blocks), torch.randn(50, IN, dtype=torch.float64)
    scope = rewritten(owner, *blocks)
    assert targets(scope).count("training") == 1
    assert [node.args[1] for node in scope.graph.nodes if node.target is dropout.dropout] == [0.5, 0.25]
    base = F.linear(x, owner.weight, owner.bias)
    torch.manual_seed(3)
    y = run(scope, owner.train(), x)
    torch.manual_seed(3)
    updates = [F.dropout(x, b.dropout) @ delta(owner, b).T for b in blocks]
    assert max_error(y, base + sum(updates)) < 1e-12
    assert max_error(run(scope, owner.eval(), x), base + x @ delta(owner, *blocks).T) < 1e-12


def test_no_dropout_node_without_dropout() -> None:
    scope = rewritten(make(nn.Linear, block()), block())
    assert "training" not in targets(scope)
    assert dropout.dropout not in targets(scope)


# --- the graph ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, _Twice])
def test_without_blocks_the_graph_is_untouched(kind: type[nn.Module]) -> None:
    scope = traced(make(kind))
    before, nodes = str(scope.graph), list(scope.graph.nodes)
    insert_updates(scope)
    assert str(scope.graph) == before
    assert list(scope.graph.nodes) == nodes


def test_without_sites_the_graph_is_untouched() -> None:
    scope = traced(make(nn.Linear), block())
    scope.sites = []
    before = str(scope.graph)
    insert_updates(scope)
    assert str(scope.graph) == before


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, _Twice])
@pytest.mark.parametrize(("variant", "dropout"), [("balance", 0.0), ("mini", 0.1), ("bat", 0.0), ("bat", 0.1)])
def test_every_created_node_tells_its_pass_and_site(kind: type[nn.Module], variant: str, dropout: float) -> None:
    blocks = (block(variant, adapter="a", dropout=dropout), block(variant, adapter="b"))
    scope = traced(make(kind, *blocks), *blocks)
    old = list(scope.graph.nodes)
    sites = {site.node.name for site in scope.sites}
    insert_updates(scope)
    created = [node for node in scope.graph.nodes if node not in old]
    assert len(created) >= 2 * len(sites)
    untold = [node.name for node in created if node.meta.get("misscompile", {}).get("pass") != "insert_updates"]
    assert untold == []
    assert {node.meta["misscompile"]["site"] for node in created} == sites
    assert {"a", "b"} <= {node.meta["misscompile"]["adapter"] for node in created}
    assert not any("misscompile" in node.meta for node in old)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, _Twice, _Chained, _InPlace])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_old_nodes_keep_their_order_and_nothing_created_is_dead(kind: type[nn.Module], dtype: torch.dtype) -> None:
    blocks = (block("bat", adapter="a", dropout=0.5), block("mini", 5, "b"), block("balance", 5, "c"), block("bat", 2, "d"))
    scope = traced(make(kind, *blocks, dtype=dtype), *blocks)
    old = list(scope.graph.nodes)
    insert_updates(scope)
    scope.graph.lint()
    nodes = list(scope.graph.nodes)
    assert [node for node in nodes if node in old] == old
    assert [node.name for node in nodes if node not in old and not node.users] == []
    for site in scope.sites:  # every user of the site reads the updated output
        assert all("misscompile" in user.meta for user in site.node.users)


def test_blocks_are_read_and_shards_summed_before_their_site_and_the_updates_follow_right_behind_it() -> None:
    blocks = (block(adapter="a"), block("mini", adapter="b"))
    scope = rewritten(make(_InPlace, *blocks), *blocks)
    order = targets(scope)
    site = order.index(F.linear)
    assert order.index("miss_block_a") < site
    assert order.index("miss_block_b") < site
    sums = [i for i, node in enumerate(scope.graph.nodes) if "misscompile" in node.meta and node.target == "sum"]
    assert len(sums) == 2
    assert max(sums) < site  # where x is made: Inductor fuses it there
    behind = [i for i, node in enumerate(scope.graph.nodes) if "misscompile" in node.meta and i > site]
    created = list(range(site + 1, site + 1 + len(behind)))
    assert behind == created
    assert order.index("mul_") > created[-1]


def test_a_block_is_read_by_its_own_name() -> None:
    b = block(adapter="my adapter")
    owner = make(nn.Linear)
    owner.register_parameter(b.parameter, nn.Parameter(torch.randn(4, OUT, dtype=torch.float64)))
    x = torch.randn(3, IN, dtype=torch.float64)
    assert max_error(run(rewritten(owner, b), owner, x), F.linear(x, matrix(owner) + delta(owner, b), owner.bias)) < 1e-12


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


def _watched(owner: nn.Module, b: Block, x: Tensor, scope: Scope) -> tuple[_Watch, _Watch]:
    with _Watch(x, *owner.parameters()) as forward:
        y = run(scope, owner, x)
    assert y.dtype == x.dtype
    with _Watch(x, y, *owner.parameters(), *forward.keep) as backward:
        y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert owner.get_parameter(b.parameter).grad is not None
    return forward, backward


@pytest.mark.parametrize("r", [8, 7])
@pytest.mark.parametrize("variant", ["balance", "mini"])
@pytest.mark.parametrize("opaque", [False, True])
def test_nothing_of_the_width_of_the_input_is_made(variant: str, r: int, opaque: bool) -> None:
    """96 tokens, 256 → 128: `x` has 24576 elements, the weight 32768, `y` 12288; mini repeats an update to 64 values."""
    tokens, in_features, out_features = 96, 256, 128
    owner = nn.Linear(in_features, out_features).to(torch.bfloat16).requires_grad_(False)
    b = block(variant, r)
    shape = variants.block_shape(b.variant, r, 2, in_features, out_features)
    owner.register_parameter(b.parameter, nn.Parameter(torch.randn(shape)))
    scope = Scope(nn.Linear, in_features, out_features, torch.bfloat16, blocks=(b,))
    if opaque:
        make_opaque(scope, owner, None, "told")
        owner.base_forward = type(owner).forward.__get__(owner)
    else:
        trace_forward(scope, owner, None)
    find_sites(scope)
    insert_updates(scope)
    generate_forward(scope)
    x = torch.randn(tokens, in_features).to(torch.bfloat16).requires_grad_()
    forward, backward = _watched(owner, b, x, scope)
    largest = max(size for _, _, size in forward.made)
    assert largest == tokens * out_features, forward.made
    wide = [made for made in forward.made if made[1] == torch.float32]
    widest = products.GROUP if variant == "mini" else 0 if r == 8 else r
    assert max((size for *_, size in wide), default=0) == tokens * widest, wide
    assert all(size < x.numel() for _, dtype, size in backward.made if dtype == torch.float32), backward.made


def test_the_watch_sees_a_cast_a_copy_and_a_repeat() -> None:
    x = torch.randn(32, 64).to(torch.bfloat16)
    with _Watch(x) as watch:
        x.float().view(-1), F.pad(x, (0, 6)), x[..., :16].repeat(1, 4)
    assert [size for *_, size in watch.made if size >= x.numel()] == [2048, 32 * 70, 2048]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_node_casts_the_input(variant: str, dtype: torch.dtype) -> None:
    scope = rewritten(make(nn.Linear, block(variant, dropout=0.1), dtype=dtype), block(variant, dropout=0.1))
    reach: set[fx.Node] = {scope.sites[0].x}
    full_width = ("getitem", "unflatten", "dropout")
    for node in scope.graph.nodes:
        if any(source in reach for source in node.all_input_nodes):
            assert node.target not in ("to", "float", "double", "type", "contiguous", "clone", "repeat")
            if node.name.startswith(full_width):
                reach.add(node)
    assert len(reach) >= (2 if variant == "bat" else 3)
    assert "repeat" not in targets(scope)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("variant", ["balance", "mini"])
def test_the_sum_of_the_shards_is_accumulated_in_float32(variant: str, tokens: int) -> None:
    """256 ones and a large value that cancels: a bf16 sum would lose them."""
    b = Block("a", variant, 1, 2, 0.0)  # type: ignore[arg-type]
    owner = nn.Linear(258, 4, bias=False).to(torch.bfloat16)
    nn.init.zeros_(owner.weight)
    owner.register_parameter(b.parameter, nn.Parameter(torch.ones(variants.block_shape(b.variant, 1, 2, 258, 4))))
    scope = Scope(nn.Linear, 258, 4, torch.bfloat16, blocks=(b,))
    trace_forward(scope, owner, None)
    find_sites(scope)
    insert_updates(scope)
    generate_forward(scope)
    x = torch.ones(tokens, 258, dtype=torch.bfloat16)
    x[:, 0], x[:, -1] = 2.0**20, -(2.0**20)
    assert torch.equal(run(scope, owner, x), torch.full((tokens, 4), 256.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bat_in_low_precision_keeps_updates_below_half_a_unit(dtype: torch.dtype) -> None:
    b = block("bat")
    owner, x = make(nn.Linear, b, dtype=dtype), torch.randn(64, IN).to(dtype)
    owner.get_parameter(b.parameter).data = torch.randn(OUT // 4, 4, 4) * 1e-4
    y = run(rewritten(owner, b), owner, x)
    update = x.double() @ delta(owner, b).T
    rounded_weight = (matrix(owner) + delta(owner, b)).to(dtype).double() - matrix(owner)
    base = F.linear(x, owner.weight, owner.bias)
    assert rms_error(x.double() @ rounded_weight.T, update) > 0.5 * rms_error(update, torch.zeros(()))
    exact = F.linear(x.double(), matrix(owner), owner.bias.double()) + update
    assert rms_error(y, exact) <= 1.5 * rms_error(base, exact - update)

"""Finding: every use of a weight as a linear, under which name and of which shape, and what is refused with which reason."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import TRACERS, fill_blocks, graph_list, max_error
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D
from zoo import IN, OUT, Model, Repeating, holder

import misscompile as mc
from misscompile.passes.find_sites import find_sites, linear_shape
from misscompile.passes.trace import opaque_scope, trace_owner
from misscompile.passes.weight_paths import find_parameter, take_view
from misscompile.record.words import Scope, Site, View

X = torch.randn(3, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROW = torch.randn(2, IN, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, IN, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
both_tracers = pytest.mark.parametrize("tracer", TRACERS)


def searched(scope: Scope) -> Scope:
    """`find_sites` over a scope, which it must leave alone."""
    before = graph_list(scope.graph)
    assert find_sites(scope) == len(scope.sites)
    assert graph_list(scope.graph) == before
    return scope


def search(graph: fx.GraphModule) -> Scope:
    return searched(Scope(graph, graph.graph, "whole graph"))


def found(model: nn.Module, x: Tensor = X, tracer: str = "export") -> Scope:
    return search(TRACERS[tracer](model, x))


def names(scope: Scope) -> list[str]:
    return [site.owner for site in scope.sites]


def reasons(scope: Scope) -> list[tuple[str, str]]:
    return [(refusal.name, refusal.reason) for refusal in scope.refusals]


# --- in the forward of an owner -------------------------------------------------------------------------------------


def find(owner: nn.Module) -> list[Site]:
    """The sites of an owner of 12 inputs and 8 outputs that can be traced."""
    scope = trace_owner(owner, type(owner), (12, 8))
    assert scope.opaque is None
    return searched(scope).sites


class Forwards:
    """What an owner may compute of its weight, which is `(in, out)` below `Conv1D`."""

    def product(self: Any, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    def residual(self: Any, x: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(residual, x, self.weight)

    def addmm_t(self: Any, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())

    def product_T(self: Any, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def twice(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(x.flip(-1), self.weight)

    def other_weight(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.other) + F.linear(x, self.weight)

    def given(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)  # an adapter on `self.weight` would act on somebody else's product

    def child(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(x))  # a child module called `weight` is not the weight

    def computed(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs())

    def scaled(self: Any, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, beta=2)

    def swapped(self: Any, x: Tensor) -> Tensor:
        return F.linear(self.weight, x)

    def other_way(self: Any, x: Tensor) -> Tensor:
        return x @ self.weight  # it takes as many inputs as the owner says it has outputs


def owner(name: str, base: type[nn.Module] = nn.Linear) -> nn.Module:
    """A module of 12 inputs and 8 outputs with one of the `Forwards`."""
    made: nn.Module = type(name, (base,), {"forward": vars(Forwards)[name]})(*((8, 12) if base is Conv1D else (12, 8)))
    return made


AS_STORED, TURNED = View((8, 12), (12, 1), 0), View((8, 12), (1, 8), 0)
PARAMETRIZED = (F.linear, "input", "parametrizations.weight", "out_in", AS_STORED, "bias", True)
OWNERS: dict[str, tuple[Callable[[], nn.Module], tuple[object, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (F.linear, "input", "weight", "out_in", AS_STORED, "bias", True)),
    "no bias": (lambda: nn.Linear(12, 8, bias=False), (F.linear, "input", "weight", "out_in", AS_STORED, None, True)),
    "Conv1D": (lambda: Conv1D(8, 12), (torch.addmm, "view", "weight", "in_out", TURNED, "bias", True)),
    "product": (lambda: owner("product", Conv1D), (operator.matmul, "x", "weight", "in_out", TURNED, None, True)),
    "residual": (lambda: owner("residual", Conv1D), (torch.addmm, "x", "weight", "in_out", TURNED, "residual", False)),
    "addmm of t": (lambda: owner("addmm_t"), (torch.addmm, "x", "t", "in_out", AS_STORED, "bias", True)),
    "product with T": (lambda: owner("product_T"), (operator.matmul, "x", getattr, "in_out", AS_STORED, None, True)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(12, 8)), PARAMETRIZED),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(12, 8)), PARAMETRIZED),
}


@pytest.mark.parametrize("case", OWNERS)
def test_the_call_of_an_owner(case: str) -> None:
    make, expected = OWNERS[case]
    (site,) = find(make())
    assert site.weight is not None
    assert site.path is not None
    assert (site.owner, site.in_features, site.out_features, site.path.parameter) == ("", 12, 8, "weight")
    added = None if site.added is None else site.added.target
    told = site.node.target, site.x.target, site.weight.target, site.layout, site.path.view, added, site.is_whole
    assert told == expected


def test_an_opaque_call_is_a_site_without_a_weight() -> None:
    owner = nn.Linear(12, 8)
    (site,) = searched(opaque_scope(owner, nn.Linear, (12, 8), None, "told")).sites
    assert (site.weight, site.path, site.layout, site.x.target) == (None, None, "opaque", "input")
    assert (site.in_features, site.out_features, site.is_whole) == (12, 8, False)


@pytest.mark.parametrize(("name", "inputs"), [("twice", ["x", "flip"]), ("other_weight", ["x"])])
def test_every_call_of_the_weight_is_a_site_and_no_other_and_finding_again_starts_anew(name: str, inputs: list[str]) -> None:
    made = owner(name)
    made.other = nn.Parameter(torch.ones(8, 12))
    scope = trace_owner(made, type(made), (12, 8))
    for _ in range(2):
        assert [site.x.target for site in searched(scope).sites] == inputs
        assert [site.weight.target for site in scope.sites if site.weight] == ["weight"] * len(inputs)
        assert [site.node for site in scope.sites] == [n for n in scope.graph.nodes if n.target is F.linear][-len(inputs) :]


@pytest.mark.parametrize("name", ["given", "child", "computed", "scaled", "swapped", "other_way"])
def test_nothing_to_find(name: str) -> None:
    nothing = owner(name, Conv1D if name == "scaled" else nn.Linear)
    if name == "child":
        del nothing.weight
        nothing.weight = nn.Flatten()
    assert find(nothing) == []


class _Packed(nn.Module):
    def __init__(self, **sizes: object) -> None:
        super().__init__()
        vars(self).update(sizes)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(12, 8), (12, 8)),
        (Conv1D(8, 12), (12, 8)),
        (_Packed(infeatures=12, outfeatures=8), (12, 8)),
        (_Packed(in_features=12), None),
        (_Packed(in_features="12", out_features=8), None),
        (nn.Bilinear(3, 4, 5), None),
        (nn.Embedding(12, 8), None),
        (nn.Conv1d(12, 8, 1), None),
        (nn.Identity(), None),
    ],
)
def test_linear_shape(module: nn.Module, shape: tuple[int, int] | None) -> None:
    assert linear_shape(module) == shape


# --- in a whole graph: names, shapes, parts -------------------------------------------------------------------------


class Sequence(nn.Module):
    """A few linears of different classes below dotted names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(IN, OUT), Conv1D(IN, OUT)])
        self.head = nn.Conv1d(IN, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x.transpose(1, 2))  # type: ignore[no-any-return]


@both_tracers
def test_names_sites_after_the_owners_of_their_weights(tracer: str) -> None:
    scope = found(Sequence().double(), tracer=tracer)
    assert names(scope) == ["layers.0", "layers.1", "head"]
    assert [(site.in_features, site.out_features) for site in scope.sites] == [(IN, OUT), (OUT, IN), (IN, 6)]
    assert [site.layout for site in scope.sites] == ["out_in", "in_out", "conv"]
    read = [site.path.parameter for site in scope.sites if site.path]
    assert read == ["layers.0.weight", "layers.1.weight", "head.weight"]
    assert [site.weight is None for site in scope.sites] == ([True, False, True] if tracer == "fx" else [False] * 3)
    assert [site.strides for site in scope.sites] == [(), (), (1,)]
    assert scope.refusals == []
    assert scope.unnamed == []


@both_tracers
def test_names_a_weight_that_is_not_called_weight_after_itself(tracer: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_q = nn.Parameter(torch.randn(OUT, IN).double())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w_q)

    assert names(found(Model(Named()), tracer=tracer)) == ["proj.w_q"]
    assert names(found(Named(), tracer=tracer)) == ["w_q"]


@both_tracers
def test_finds_every_call_of_a_shared_weight(tracer: str) -> None:
    scope = found(Repeating(), torch.randn(3, 12), tracer)
    assert names(scope) == ["step"] * 3
    assert len({site.node for site in scope.sites}) == 3


class Attention(nn.Module):
    def __init__(self, cross: bool, **fields: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(IN, 2, batch_first=True, **fields).double()
        self.cross = cross
        self.memory = fields.get("kdim", IN), fields.get("vdim", IN)

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x.repeat(1, 1, 1 + width // IN)[..., :width] for width in self.memory)
        if not self.cross:
            key = value = x
        y: Tensor = self.attn(x, key, value, need_weights=False)[0]
        return y


WIDTH = 3 * IN
FUSED = [(0, IN, WIDTH), (IN, 2 * IN, WIDTH), (2 * IN, WIDTH, WIDTH), None]


@pytest.mark.parametrize(
    ("cross", "widths", "columns", "starts"),
    [
        (False, (IN, IN), FUSED, (0, IN, 2 * IN)),
        (True, (IN, IN), [None] * 4, (0, IN, 2 * IN)),
        (True, (6, 10), [None] * 4, None),
    ],
)
def test_finds_the_projections_of_attention(cross: bool, widths: tuple[int, int], columns: Any, starts: Any) -> None:
    scope = found(Attention(cross, kdim=widths[0], vdim=widths[1]))
    assert names(scope) == ["attn.q", "attn.k", "attn.v", "attn.out_proj"]
    assert [(site.in_features, site.out_features) for site in scope.sites] == [(size, IN) for size in (IN, *widths, IN)]
    assert [site.columns for site in scope.sites] == columns
    assert len({site.node for site in scope.sites}) == (2 if columns is FUSED else 4)
    weight = torch.arange(WIDTH * IN).view(WIDTH, IN)
    for site, start in zip(scope.sites, starts or (), strict=False):
        assert site.path is not None
        assert site.path.parameter == "attn.in_proj_weight"
        assert torch.equal(take_view(weight, site.path.view), weight[start : start + IN])


class Attending(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x)
        return y


PROJECTED: dict[str, tuple[int, Callable[[Tensor], Tensor], list[tuple[str, int]]]] = {
    # rows of in_proj_weight, what the call takes of it, and the sites with their outputs
    "q, k and v": (3 * IN, lambda w: w, [("attn.q", IN), ("attn.k", IN), ("attn.v", IN)]),
    "k and v": (3 * IN, lambda w: w[IN:], [("attn.k", IN), ("attn.v", IN)]),
    "fewer rows": (IN + 4, lambda w: w, [("attn.in_proj_weight", IN + 4)]),
    "more rows": (3 * IN + 4, lambda w: w, [("attn.in_proj_weight", 3 * IN + 4)]),
    "rows across two": (3 * IN, lambda w: w[4:-4], [("attn.in_proj_weight", 2 * IN)]),
    "every other row": (3 * IN, lambda w: w[::2], [("attn.in_proj_weight", 12)]),
}


@both_tracers
@pytest.mark.parametrize("case", PROJECTED)
def test_only_three_square_matrices_are_the_projections_of_an_attention(case: str, tracer: str) -> None:
    rows, part, expected = PROJECTED[case]

    class Projecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.randn(rows, IN).double())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, part(self.in_proj_weight))

    graph = TRACERS[tracer](Attending(Projecting()), X)
    scope = search(graph)
    assert [(site.owner, site.out_features) for site in scope.sites] == expected
    adapted = fill_blocks(mc.adapt(graph, {"r": 2, "target_modules": "all-linear"}))
    y, before = adapted(X), graph.get_parameter("attn.in_proj_weight").detach().clone()
    assert max_error(y, graph(X)) > 1e-3
    merged = mc.merge(adapted)
    assert max_error(merged(X), y) < 1e-12
    changed = (merged.get_parameter("attn.in_proj_weight") != before).any(1)
    assert int(changed.sum()) == sum(size for _, size in expected)


@both_tracers
def test_tells_parts_of_one_weight_apart(tracer: str) -> None:
    def gated(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        gate, up = w.split([OUT, IN])
        return F.linear(x, gate, b).sum(-1, keepdim=True) * F.linear(x, up)

    scope = found(holder(gated, (OUT + IN, IN)), tracer=tracer)
    assert names(scope) == ["proj.part0", "proj.part1"]
    assert [(site.in_features, site.out_features) for site in scope.sites] == [(IN, OUT), (IN, IN)]


def no_gradient(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(x, w, b)


def mutating(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        w.mul_(1.5)
    return F.linear(x, w, b)


CONSTANT = torch.randn(OUT, IN, dtype=torch.float64)
STACK = (3, IN, OUT)
STACKED = "its weight is a stack of fused weights, not a linear"
LEFT = "its weight is the left side of the product, and a linear's is the right one"
SCALED = "its product is scaled by the beta or alpha of addmm"
CONSTANT_WEIGHT = "is a buffer or a constant, not a parameter"
CHANGED = r"its weight 'proj.weight' is changed in place by 'mul_(_1)?'; take that out of the forward"
NOT_USED = "no gradient comes back to it past the end of the graph, which does not use it"
NO_VIEW = r"its weight is no view of the parameter 'proj.weight': 'reshape' \(reshape(\.default)?\) copies it"
ROWS_NOT_FIXED = r"its weight is viewed by 'getitem_1' \(getitem\) in a shape that the graph does not fix"
VIEW_NOT_FIXED = r"its weight is viewed by 'view' \(view\) in a shape that the graph does not fix"
OVERLAP = "its weight is read in 2 forms that overlap, which one block cannot serve"
NO_MERGE = "so that a block could not be merged into it"


def computed(name: str, target: str) -> str:
    return rf"its weight is computed by '{name}' \({target}\), {NO_MERGE}"


def stopped(name: str) -> str:
    return rf"no gradient comes back to it past '{name}' \((aten.)?{name}(.default)?\)"


def no_matrix(equation: str) -> str:
    return f"its weight goes into the einsum '{equation}', which is not one matrix for every position"


Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
REFUSED: dict[str, tuple[Rule, tuple[int, ...], str]] = {
    "constant": (lambda w, b, x: F.linear(x, CONSTANT), (OUT, IN), rf"its weight '\w*\.?\w*tensor_\w*0' {CONSTANT_WEIGHT}"),
    "computed": (lambda w, b, x: F.linear(x, w * 2), (OUT, IN), computed("mul", r"mul(\.Tensor)?")),
    "computed product": (lambda w, b, x: x @ (w * 2).t(), (OUT, IN), computed("mul", r"mul(\.Tensor)?")),
    "computed, then viewed": (lambda w, b, x: F.linear(x, (w + 1).t()), (IN, OUT), computed("add", r"add(\.Tensor)?")),
    "changed in place": (mutating, (OUT, IN), CHANGED),
    "detached": (lambda w, b, x: F.linear(x, w, b).detach(), (OUT, IN), stopped("detach")),
    "argmax": (lambda w, b, x: F.linear(x, w, b).argmax(-1), (OUT, IN), stopped("argmax")),
    "not used": (lambda w, b, x: (F.linear(x, w, b), x)[1], (OUT, IN), NOT_USED),
    "stacked matmul": (lambda w, b, x: x @ w, STACK, STACKED),
    "stacked bmm": (lambda w, b, x: torch.bmm(x, w), STACK, STACKED),
    "stacked baddbmm": (lambda w, b, x: torch.baddbmm(x[..., :1], x, w), STACK, STACKED),
    "stacked einsum": (lambda w, b, x: torch.einsum("eti,eio->eto", x, w), STACK, no_matrix("eti,eio->eto")),
    "einsum of heads": (lambda w, b, x: torch.einsum("bti,hdi->bthd", x, w), (3, 4, IN), no_matrix("bti,hdi->bthd")),
    "vector": (lambda w, b, x: x @ w, (IN,), "its weight is a vector"),
    "weight on the left": (lambda w, b, x: w @ x.transpose(1, 2), (OUT, IN), LEFT),
    "weight on the left of an einsum": (lambda w, b, x: torch.einsum("bi,oi->ob", x[0], w), (OUT, IN), LEFT),
    "einsum of three": (lambda w, b, x: torch.einsum("bti,oi,o->bto", x, w, b), (OUT, IN), no_matrix("bti,oi,o->bto")),
    "einsum without an arrow": (lambda w, b, x: torch.einsum("bi,oi", x[0], w), (OUT, IN), no_matrix("bi,oi")),
    "einsum over the positions": (lambda w, b, x: torch.einsum("bti,ot->boi", x, w), (OUT, 5), no_matrix("bti,ot->boi")),
    "einsum of a diagonal of the input": (
        lambda w, b, x: torch.einsum("ii,oi->io", x[0, :4, :4], w[:, :4]),
        (OUT, IN),
        no_matrix("ii,oi->io"),
    ),
    "einsum diagonal": (lambda w, b, x: torch.einsum("bti,ii->bti", x, w), (IN, IN), no_matrix("bti,ii->bti")),
    "three dimensions": (lambda w, b, x: x @ w.transpose(1, 2), (3, OUT, IN), STACKED),
    "a copy that is no view": (lambda w, b, x: F.linear(x, w.t().reshape(OUT, IN)), (OUT, IN), NO_VIEW),
    "rows by a number of the input": (lambda w, b, x: F.linear(x, w[: x.shape[1]]), (OUT, IN), ROWS_NOT_FIXED),
    "view by a number of the input": (lambda w, b, x: F.linear(x, w.view(OUT, x.shape[-1])), (3, 4, IN), VIEW_NOT_FIXED),
    "transposed in three dimensions": (lambda w, b, x: x @ w.transpose(0, 1)[0], (IN, 3, OUT), r"its weight is .*"),
    "two forms that overlap": (lambda w, b, x: F.linear(torch.tanh(F.linear(x, w)), w.t()), (OUT, IN), OVERLAP),
    "scaled by beta": (lambda w, b, x: torch.addmm(b, x[0], w, beta=0), (IN, OUT), SCALED),
    "scaled addmm": (lambda w, b, x: torch.addmm(b, x[0], w, alpha=2.0), (IN, OUT), SCALED),
}
FIXED_BY_EXPORT = ("rows by a number of the input", "view by a number of the input")


@pytest.mark.parametrize(
    ("case", "tracer"), [(c, t) for c in REFUSED for t in TRACERS if not (t == "export" and c in FIXED_BY_EXPORT)]
)
def test_refuses_with_the_reason(case: str, tracer: str) -> None:
    rule, shape, reason = REFUSED[case]
    refuse(TRACERS[tracer](holder(rule, shape), X), "proj", reason)


@both_tracers
def test_refuses_a_buffer(tracer: str) -> None:
    model = holder(lambda w, b, x: F.linear(x, w))
    del model.proj.weight
    model.proj.register_buffer("weight", CONSTANT)
    refuse(TRACERS[tracer](model, X), "proj", f"its weight 'proj.weight' {CONSTANT_WEIGHT}")


def refuse(graph: Any, name: str, reason: str) -> None:
    """Adapt by name and by all-linear, expect this reason and what to do, and the graph as it was."""
    nodes = graph.graph if isinstance(graph, torch.export.ExportedProgram) else graph
    before = graph_list(nodes)
    with pytest.raises(mc.UnsupportedModuleError, match="Name other modules, or add these to exclude_modules") as named:
        mc.adapt(graph, {"r": 2, "target_modules": [name.rpartition(".")[2]]})
    with pytest.raises(mc.NoMatchError, match="no linear of this model can be adapted") as found:
        mc.adapt(graph, {"r": 2, "target_modules": "all-linear"})
    assert re.search(rf"\n  {re.escape(name)} \([^)]*\): {reason}\n", str(named.value)), str(named.value)
    assert re.search(rf"\): {reason}", str(found.value)), str(found.value)  # of many names the first few are told
    assert graph_list(nodes) == before


def test_refuses_what_runs_without_gradients() -> None:
    scope = found(holder(no_gradient))
    assert names(scope) == []
    assert reasons(scope) == [("proj", "it is inside wrap_with_set_grad_enabled, which runs without gradients")]


def test_refuses_a_weight_that_is_an_input() -> None:
    scope = search(fx.symbolic_trace(lambda x, kernel: F.linear(x, kernel)))
    ((name, reason),) = reasons(scope)
    assert name == "linear"
    assert reason.startswith("its weight is the input 'kernel' of the graph, not a parameter of it")


def test_refuses_the_lifted_parameters_of_an_exported_program() -> None:
    exported = torch.export.export(holder(lambda w, b, x: F.linear(x, w, b)), (X,), strict=False)
    advice = r"\(of an exported program, adapt the program itself or its module\(\)\)"
    reason = f"its weight is the input 'p_proj_weight' of the graph, not a parameter of it {advice}"
    refuse(exported.graph_module, "proj", reason)


def test_refuses_an_inference_kernel() -> None:
    layer = nn.TransformerEncoderLayer(IN, 2, OUT, batch_first=True, dropout=0.0).eval().requires_grad_(False)
    with torch.no_grad():
        exported: Any = torch.export.export(layer, (X.float(),), strict=True)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out_proj", "linear1", "linear2"):
        reason = "its weight goes into aten._transformer_encoder_layer_fwd.default, an inference kernel without a gradient: "
        refuse(exported, name, reason + "use misscompile.capture")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_refuses_modules_that_are_one_node() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.doubled = Doubled(IN, OUT)
            self.normed = parametrizations.weight_norm(nn.Linear(IN, OUT))
            self.inner = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU())
            self.block = fx.symbolic_trace(nn.Sequential(nn.Linear(IN, OUT)))
            self.plain = nn.Linear(IN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.doubled(x) + self.normed(x) + self.inner(x) + self.block(x) + self.plain(x)  # type: ignore[no-any-return]

    model = Kept()
    scope = search(fx.GraphModule(model, Leaves().trace(model)))
    assert names(scope) == ["plain"]
    assert reasons(scope) == [
        ("doubled", "it is one node with a forward of its own: use misscompile.capture"),
        ("normed", "it is one node with a weight that is no plain parameter: use misscompile.capture"),
        ("inner.0", "it is inside 'inner' (Sequential), which the tracer kept as one node: use misscompile.capture"),
        ("block.0", "it is inside the graph module 'block': adapt that graph, or capture the whole model"),
    ]


def test_collects_weights_without_a_name() -> None:
    graph = make_fx(holder(lambda w, b, x: F.linear(x, w, b)))(X)
    scope = search(graph)
    assert (scope.sites, scope.refusals, scope.unnamed) == ([], [], ["_param_constant0"])


def test_takes_the_name_from_the_module_stack_where_the_parameter_has_none() -> None:
    graph = TRACERS["export"](holder(lambda w, b, x: F.linear(x, w, b)), X)
    for node in graph.graph.nodes:
        if node.target == "proj.weight":
            graph.register_parameter("param_constant3", graph.get_parameter("proj.weight"))
            node.target = "param_constant3"
    assert names(search(graph)) == ["proj"]


def attend(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    scores = torch.softmax(x @ x.transpose(1, 2), -1)
    return torch.einsum("bts,bsi->bti", scores, x) + torch.bmm(scores, x) + w[0] * x


def convolution(transposed: bool, groups: int) -> Rule:
    return lambda w, b, x: torch.convolution(x, w, b, [1], [0], [1], transposed, [0], groups)


UNTOLD: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "products of data with data": (lambda: holder(attend), X),
    "3×3 convolution": (lambda: Model(nn.Conv2d(IN, OUT, 3).double()), IMAGE),
    "F.conv2d 3×3": (lambda: holder(lambda w, b, x: F.conv2d(x, w, b), (OUT, IN, 3, 3)), IMAGE),
    "grouped convolution": (lambda: Model(nn.Conv2d(IN, OUT, 1, groups=2).double()), IMAGE),
    "padded convolution": (lambda: Model(nn.Conv2d(IN, OUT, 1, padding=1).double()), IMAGE),
    "transposed convolution": (lambda: Model(nn.ConvTranspose2d(IN, OUT, 1).double()), IMAGE),
    "F.conv1d grouped": (lambda: holder(lambda w, b, x: F.conv1d(x, w, groups=2), (OUT, IN // 2, 1)), ROW),
    "F.conv1d padded": (lambda: holder(lambda w, b, x: F.conv1d(x, w, padding=1), (OUT, IN, 1)), ROW),
    "transposed by torch.convolution": (lambda: holder(convolution(True, 1), (IN, OUT, 1)), ROW),
    "grouped by torch.convolution": (lambda: holder(convolution(False, 2), (OUT, IN // 2, 1)), ROW),
    "product with a number": (lambda: holder(lambda w, b, x: x * 2 + w, (5, IN)), X),
    "normalisation": (lambda: Model(nn.LayerNorm(IN).double()), X),
}


@both_tracers
@pytest.mark.parametrize("case", UNTOLD)
def test_passes_over_what_is_no_linear(case: str, tracer: str) -> None:
    make, x = UNTOLD[case]
    scope = found(make(), x, tracer)
    assert (scope.sites, scope.refusals, scope.unnamed) == ([], [], [])


def test_finds_parameters_by_dotted_name() -> None:
    model = Sequence()
    assert find_parameter(model, "layers.1.weight") is model.layers[1].weight
    assert find_parameter(model, "layers.7.weight") is None
    assert find_parameter(model, "layers") is None

"""Recognising a linear in a graph: its operands and layout, and the way from the operand back to the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from misscompile.passes.match import (
    WeightError,
    apply_steps,
    match_linear,
    passes_weight,
    resembles_linear,
    trace_weight,
)

IN, OUT = 8, 12
Rule = Callable[[Tensor, Tensor, Tensor], Any]


class Weighted(nn.Module):
    def __init__(self, rule: Rule, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(float(torch.Size(shape).numel())).view(shape))
        self.b = nn.Parameter(torch.randn(OUT))
        self.register_buffer("buffer", torch.randn(OUT, IN))
        self.rule = rule

    def forward(self, x: Tensor) -> Any:
        return self.rule(self.w, self.b, x)


def traced(rule: Rule, shape: tuple[int, ...] = (OUT, IN), aten_shape: tuple[int, ...] | None = None) -> fx.GraphModule:
    """The graph by `symbolic_trace`, or by `torch.export` on an input of `aten_shape`."""
    module = Weighted(rule, shape)
    if aten_shape is None:
        return fx.symbolic_trace(module)
    return torch.export.export(module, (torch.randn(aten_shape),), strict=False).module()  # type: ignore[return-value]


def products(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if match_linear(node) is not None]


def path_of(graph: fx.GraphModule, operand: fx.Node) -> Any:
    return trace_weight(operand, lambda target: getattr(graph, target, None))


MATCHED: dict[str, tuple[Rule, tuple[int, ...], tuple[int, ...], str]] = {
    "linear": (lambda w, b, x: F.linear(x, w, b), (OUT, IN), (5, IN), "out_in"),
    "linear keywords": (lambda w, b, x: F.linear(weight=w, input=x), (OUT, IN), (5, IN), "out_in"),
    "addmm": (lambda w, b, x: torch.addmm(b, x, w), (IN, OUT), (5, IN), "in_out"),
    "addmm keywords": (lambda w, b, x: torch.addmm(b, mat1=x, mat2=w), (IN, OUT), (5, IN), "in_out"),
    "mm": (lambda w, b, x: torch.mm(x, w), (IN, OUT), (5, IN), "in_out"),
    "mm keywords": (lambda w, b, x: torch.mm(x, mat2=w), (IN, OUT), (5, IN), "in_out"),
    "x.mm": (lambda w, b, x: x.mm(w), (IN, OUT), (5, IN), "in_out"),
    "matmul": (lambda w, b, x: torch.matmul(x, w), (IN, OUT), (2, 5, IN), "in_out"),
    "matmul keywords": (lambda w, b, x: torch.matmul(x, other=w), (IN, OUT), (2, 5, IN), "in_out"),
    "x.matmul": (lambda w, b, x: x.matmul(w), (IN, OUT), (2, 5, IN), "in_out"),
    "@": (lambda w, b, x: x @ w, (IN, OUT), (2, 5, IN), "in_out"),
    "einsum oi": (lambda w, b, x: torch.einsum("bti, oi -> bto", x, w), (OUT, IN), (2, 5, IN), "out_in"),
    "einsum io": (lambda w, b, x: torch.einsum("...i,io->...o", [x, w]), (IN, OUT), (2, 5, IN), "in_out"),
    "einsum w first": (lambda w, b, x: torch.einsum("oi,bi->bo", w, x), (OUT, IN), (5, IN), "out_in"),
    "conv1d": (lambda w, b, x: F.conv1d(x, w, b), (OUT, IN, 1), (2, IN, 6), "conv"),
    "conv2d": (lambda w, b, x: F.conv2d(x, w, padding="valid"), (OUT, IN, 1, 1), (2, IN, 3, 4), "conv"),
    "conv2d same": (lambda w, b, x: F.conv2d(x, w, padding="same"), (OUT, IN, 1, 1), (2, IN, 3, 4), "conv"),
    "conv3d": (lambda w, b, x: F.conv3d(x, w, b), (OUT, IN, 1, 1, 1), (2, IN, 3, 4, 5), "conv"),
    "convolution": (
        lambda w, b, x: torch.convolution(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        (OUT, IN, 1, 1),
        (2, IN, 3, 4),
        "conv",
    ),
}


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("form", MATCHED)
def test_matches_with_its_operands(form: str, exported: bool) -> None:
    rule, shape, x_shape, layout = MATCHED[form]
    graph = traced(rule, shape, x_shape if exported else None)
    (node,) = products(graph)
    call = match_linear(node)
    assert call is not None
    assert call.layout == layout
    assert call.x.op == "placeholder"
    assert (call.weight.op, call.weight.target) == ("get_attr", "w")


def test_reads_the_strides_of_a_convolution() -> None:
    graph = traced(lambda w, b, x: F.conv2d(x, w, b, stride=(2, 3)), (OUT, IN, 1, 1))
    call = match_linear(products(graph)[0])
    assert call is not None
    assert call.strides == (2, 3)


UNMATCHED: dict[str, tuple[Rule, tuple[int, ...]]] = {
    "conv groups": (lambda w, b, x: F.conv1d(x, w, groups=2), (OUT, IN // 2, 1)),
    "conv padding": (lambda w, b, x: F.conv1d(x, w, padding=1), (OUT, IN, 1)),
    "transposed convolution": (
        lambda w, b, x: torch.convolution(x, w, b, [1], [0], [1], True, [0], 1),
        (IN, OUT, 1),
    ),
    "convolution groups": (lambda w, b, x: torch.convolution(x, w, b, [1], [0], [1], False, [0], 2), (OUT, IN // 2, 1)),
    "addmm alpha": (lambda w, b, x: torch.addmm(b, x, w, alpha=2), (IN, OUT)),
    "addmm beta": (lambda w, b, x: torch.addmm(b, x, w, beta=0), (IN, OUT)),
    "einsum of three": (lambda w, b, x: torch.einsum("bi,oi,o->bo", x, w, b), (OUT, IN)),
    "einsum without an arrow": (lambda w, b, x: torch.einsum("bi,oi", x, w), (OUT, IN)),
    "einsum over the positions": (lambda w, b, x: torch.einsum("bti,ot->boi", x, w), (OUT, 5)),
    "einsum of heads": (lambda w, b, x: torch.einsum("bti,hdi->bthd", x, w), (3, 4, IN)),
    "einsum diagonal": (lambda w, b, x: torch.einsum("bi,ii->bi", x, w), (IN, IN)),
    "product with a number": (lambda w, b, x: x * 2, (OUT, IN)),
    "elementwise": (lambda w, b, x: x + w, (OUT, IN)),
}


@pytest.mark.parametrize("form", UNMATCHED)
def test_leaves_what_is_no_linear(form: str) -> None:
    rule, shape = UNMATCHED[form]
    assert products(traced(rule, shape)) == []


def test_says_what_keeps_a_product_from_being_a_linear() -> None:
    def reasons(name: str) -> list[str]:
        graph = traced(*UNMATCHED[name])
        return [reason for node in graph.graph.nodes if (reason := resembles_linear(node)) is not None]

    assert reasons("addmm alpha") == ["its product is scaled by the beta or alpha of addmm"]
    assert reasons("einsum of heads") == [
        "its weight goes into the einsum 'bti,hdi->bthd', which is not one matrix for every position"
    ]
    assert reasons("elementwise") == []
    assert reasons("conv padding") == []


PATHS: dict[str, tuple[Rule, tuple[int, ...], tuple[Any, ...]]] = {
    "plain": (lambda w, b, x: F.linear(x, w), (OUT, IN), ()),
    "t()": (lambda w, b, x: F.linear(x, w.t()), (IN, OUT), (("t",),)),
    "torch.t": (lambda w, b, x: F.linear(x, torch.t(w)), (IN, OUT), (("t",),)),
    "transpose": (lambda w, b, x: F.linear(x, torch.transpose(w, 0, 1)), (IN, OUT), (("t",),)),
    "transpose -1 -2": (lambda w, b, x: F.linear(x, w.transpose(-1, -2)), (IN, OUT), (("t",),)),
    "permute": (lambda w, b, x: F.linear(x, w.permute(1, 0)), (IN, OUT), (("t",),)),
    "permute a tuple": (lambda w, b, x: F.linear(x, torch.permute(w, (1, 0))), (IN, OUT), (("t",),)),
    "twice": (lambda w, b, x: F.linear(x, w.t().t()), (OUT, IN), (("t",), ("t",))),
    "view": (lambda w, b, x: F.linear(x, w.view(OUT, IN)), (3, 4, IN), (("view", OUT, IN),)),
    "view -1": (lambda w, b, x: F.linear(x, w.view(-1, IN)), (3, 4, IN), (("view", OUT, IN),)),
    "reshape, t": (lambda w, b, x: F.linear(x, torch.reshape(w, (IN, OUT)).t()), (IN, 3, 4), (("view", IN, OUT), ("t",))),
    "flatten": (lambda w, b, x: F.linear(x, w.flatten(1)), (OUT, 2, 4), (("view", OUT, IN),)),
    "squeeze": (lambda w, b, x: F.linear(x, w.squeeze(0)), (1, OUT, IN), (("view", OUT, IN),)),
    "split in equal parts": (lambda w, b, x: F.linear(x, w.split(OUT)[2]), (3 * OUT, IN), (("rows", 2 * OUT, 3 * OUT),)),
    "split by sizes": (lambda w, b, x: F.linear(x, torch.split(w, [4, OUT])[1]), (4 + OUT, IN), (("rows", 4, 4 + OUT),)),
    "chunk": (lambda w, b, x: F.linear(x, w.chunk(2)[1]), (2 * OUT, IN), (("rows", OUT, 2 * OUT),)),
    "slice": (lambda w, b, x: F.linear(x, w[4 : 4 + OUT]), (30, IN), (("rows", 4, 4 + OUT),)),
    "slice to the end": (lambda w, b, x: F.linear(x, w[-OUT:]), (30, IN), (("rows", 30 - OUT, 30),)),
    "part, then t": (lambda w, b, x: F.linear(x, w[IN:].t()), (2 * IN, OUT), (("rows", IN, 2 * IN), ("t",))),
    "casts": (lambda w, b, x: F.linear(x, w.float().to(torch.float32).contiguous()), (OUT, IN), ()),
    "data": (lambda w, b, x: F.linear(x, w.data), (OUT, IN), ()),
}


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("form", PATHS)
def test_follows_a_weight_to_its_parameter(form: str, exported: bool) -> None:
    rule, shape, steps = PATHS[form]
    if exported and form == "data":
        pytest.skip("torch.export makes a constant of .data")
    graph = traced(rule, shape, (5, IN) if exported else None)
    (node,) = products(graph)
    call = match_linear(node)
    assert call is not None
    path = path_of(graph, call.weight)
    assert path.parameter == "w"
    rows = steps and steps[0][0] == "rows"
    assert path.steps == steps or (exported and rows and path.steps[-1:] == steps[-1:])
    parameter = graph.get_parameter("w")
    view = apply_steps(parameter.detach(), path.steps)
    operand = fx.Interpreter(graph)
    seen: list[Tensor] = []
    watched = call.weight
    operand.run_node = lambda n, run=operand.run_node: _keep(run(n), n is watched, seen)  # type: ignore[method-assign]
    operand.run(torch.randn(5, IN))
    assert torch.equal(seen[0], view)
    assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def _keep(value: Any, keep: bool, seen: list[Tensor]) -> Any:
    if keep:
        seen.append(value.detach())
    return value


REFUSED: dict[str, tuple[Rule, tuple[int, ...], str]] = {
    "computed": (
        lambda w, b, x: F.linear(x, w * 2),
        (OUT, IN),
        "its weight is computed by 'mul' (mul), so that a block could not be merged into it",
    ),
    "computed, then viewed": (
        lambda w, b, x: F.linear(x, (w + 1).t()),
        (IN, OUT),
        "its weight is computed by 'add' (add), so that a block could not be merged into it",
    ),
    "input": (
        lambda w, b, x: F.linear(w, x),
        (5, IN),
        "its weight is the input 'x' of the graph, not a parameter of it (of an exported program, adapt the program itself "
        "or its module())",
    ),
    "columns": (
        lambda w, b, x: F.linear(x, w[:, :IN]),
        (OUT, 2 * IN),
        "its weight is computed by 'getitem' (getitem), so that a block could not be merged into it",
    ),
    "chunk of columns": (
        lambda w, b, x: F.linear(x, w.chunk(2, 1)[0]),
        (OUT, 2 * IN),
        "its weight is cut by 'chunk' (chunk) along its inputs",
    ),
    "split of columns": (
        lambda w, b, x: F.linear(x, torch.split(w, IN, dim=1)[1]),
        (OUT, 2 * IN),
        "its weight is cut by 'split' (split) along its inputs",
    ),
    "every second row": (
        lambda w, b, x: F.linear(x, w[::2]),
        (2 * OUT, IN),
        "its weight is a part of a parameter that 'getitem' (getitem) does not fix",
    ),
    "rows by a number of the input": (
        lambda w, b, x: F.linear(x, w[: x.shape[0]]),
        (OUT, IN),
        "its weight is a part of a parameter that 'getitem_1' (getitem) does not fix",
    ),
    "view by a number of the input": (
        lambda w, b, x: F.linear(x, w.view(OUT, x.shape[-1])),
        (3, 4, IN),
        "its weight is viewed by 'view' (view) in a shape that the graph does not fix",
    ),
    "three dimensions": (
        lambda w, b, x: x @ w.transpose(0, 1),
        (IN, 3, OUT),
        "its weight is transposed by 'transpose' (transpose) in more than two dimensions",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_says_why_an_operand_is_no_parameter(form: str) -> None:
    rule, shape, reason = REFUSED[form]
    graph = traced(rule, shape)
    call = match_linear(products(graph)[0])
    assert call is not None
    with pytest.raises(WeightError) as error:
        path_of(graph, call.weight)
    assert str(error.value) == reason


def test_refuses_a_copy_that_is_no_view() -> None:
    graph = traced(lambda w, b, x: F.linear(x, w.t().reshape(OUT, IN)))
    call = match_linear(products(graph)[0])
    assert call is not None
    with pytest.raises(WeightError, match=r"its weight is no view of the parameter 'w' \(view size is not compatible"):
        path_of(graph, call.weight)


def test_refuses_buffers_and_names_without_a_tensor() -> None:
    graph = fx.Graph()
    buffer, nothing = graph.get_attr("buffer"), graph.get_attr("gone")
    root = Weighted(lambda w, b, x: x, (OUT, IN))
    with pytest.raises(WeightError, match=r"^its weight 'buffer' is a buffer or a constant, not a parameter$"):
        trace_weight(buffer, lambda target: getattr(root, target, None))
    with pytest.raises(WeightError, match=r"^its weight 'gone' is no tensor of the graph module, not a parameter$"):
        trace_weight(nothing, lambda target: getattr(root, target, None))


def test_tells_views_from_uses() -> None:
    graph = traced(lambda w, b, x: F.linear(x, w.chunk(2)[0].t().contiguous()) * w.sum(), (2 * IN, OUT))
    passing = {node.name for node in graph.graph.nodes if passes_weight(node)}
    assert passing == {"chunk", "getitem", "t", "contiguous"}


def test_applies_every_kind_of_step_as_a_view() -> None:
    weight = torch.arange(24.0).view(6, 4)
    for steps, expected in (
        ((), weight),
        ((("t",),), weight.t()),
        ((("rows", 2, 5),), weight[2:5]),
        ((("view", 2, 3, 4), ("flatten",)), weight.view(2, 12)),
        ((("rows", 0, 4), ("view", 8, 2), ("t",)), weight[:4].reshape(8, 2).t()),
    ):
        view = apply_steps(weight, steps)
        assert torch.equal(view, expected)
        assert view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()

"""Matching: every form of a linear in a graph, by both tracers, and the way from its operand back to the parameter.

Each is shown by an adapter on it: outputs, gradients and the merge against fp64 references.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    TRACERS,
    VARIANTS,
    blocks_of,
    fields,
    fill_blocks,
    graph_list,
    max_error,
    reference_delta,
    reference_gradient,
)
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D
from zoo import IN, OUT, Model, holder, normal

import misscompile as mc
from misscompile.passes.weight_paths import WeightError, passes_weight, take_view, trace_weight, view_of

pytestmark = pytest.mark.filterwarnings("ignore")
View = Callable[[Tensor], Tensor]


TOKENS = (3, 5, IN)
IN_OUT, CONV = (IN, OUT), (OUT, IN, 1, 1)
IMAGE = (2, IN, 4, 5)


@dataclasses.dataclass
class Form:
    """A linear in one form: the module, the shape of its input, and the view of the weight that is `(out, in)`."""

    make: Callable[[], nn.Module]
    x: tuple[int, ...] = TOKENS
    view: View = lambda weight: weight


def flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def rule(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    shape: tuple[int, ...] = (OUT, IN),
    x: tuple[int, ...] = TOKENS,
    view: View | None = None,
) -> Form:
    """The call `forward(weight, bias, x)` of a weight of this shape, which by default is transposed if it is (in, out)."""
    is_swapped = view is None and shape == IN_OUT
    return Form(lambda: holder(forward, shape), x, view or (Tensor.t if is_swapped else lambda w: w.view(OUT, IN)))


def module(kind: Callable[[], nn.Module], x: tuple[int, ...] = TOKENS, view: View = flat) -> Form:
    def make() -> nn.Module:
        torch.manual_seed(0)
        built = kind().double()
        for parameter in built.parameters():
            nn.init.normal_(parameter)
        return Model(built)

    return Form(make, x, view)


def conv(x: tuple[int, ...] = IMAGE, kind: Any = nn.Conv2d, **changes: Any) -> Form:
    return module(lambda: kind(IN, OUT, 1, **changes), x)


FORMS: dict[str, Form] = {
    "F.linear": rule(lambda w, b, x: F.linear(x, w, b)),
    "F.linear by keywords": rule(lambda w, b, x: F.linear(input=x, weight=w, bias=b)),
    "addmm": rule(lambda w, b, x: torch.addmm(b, x, w), IN_OUT, (5, IN)),
    "addmm of t": rule(lambda w, b, x: torch.addmm(b, x, w.t()), x=(5, IN)),
    "mm": rule(lambda w, b, x: torch.mm(x, w) + b, IN_OUT, (5, IN)),
    "matmul": rule(lambda w, b, x: torch.matmul(x, w) + b, IN_OUT),
    "method matmul": rule(lambda w, b, x: x.matmul(w) + b, IN_OUT),
    "@": rule(lambda w, b, x: x @ w, IN_OUT),
    "@ T": rule(lambda w, b, x: x @ w.T),
    "@ transpose": rule(lambda w, b, x: x @ w.transpose(-1, -2)),
    "@ permute": rule(lambda w, b, x: x @ w.permute(1, 0)),
    "einsum out_in": rule(lambda w, b, x: torch.einsum("bti,oi->bto", x, w)),
    "einsum in_out": rule(lambda w, b, x: torch.einsum("...i,io->...o", x, w), IN_OUT),
    "einsum weight first": rule(lambda w, b, x: torch.einsum("oi,bti->bto", w, x)),
    "view": rule(lambda w, b, x: F.linear(x, w.view(OUT, IN), b), (4, OUT // 4, IN)),
    "reshape then t": rule(
        lambda w, b, x: F.linear(x, w.reshape(IN, OUT).t(), b), (IN, 4, OUT // 4), view=lambda w: w.view(IN, OUT).t()
    ),
    "cast": rule(lambda w, b, x: F.linear(x, w.to(torch.float64), b)),
    "split": rule(lambda w, b, x: F.linear(x, w.split([8, OUT], 0)[1]), (8 + OUT, IN), view=lambda w: w[8:]),
    "chunk": rule(lambda w, b, x: F.linear(x, w.chunk(2)[1], b), (2 * OUT, IN), view=lambda w: w[OUT:]),
    "slice": rule(lambda w, b, x: F.linear(x, w[4 : 4 + OUT], b), (30, IN), view=lambda w: w[4 : 4 + OUT]),
    "slice from": rule(lambda w, b, x: x @ w[4:].t(), (4 + OUT, IN), view=lambda w: w[4:]),
    "F.conv2d": rule(lambda w, b, x: F.conv2d(x, w, b), CONV, IMAGE),
    "nn.Linear": module(lambda: nn.Linear(IN, OUT)),
    "Conv1D": module(lambda: Conv1D(OUT, IN), view=Tensor.t),
    "nn.Conv1d": conv((2, IN, 7), nn.Conv1d),
    "nn.Conv2d": conv(bias=False),
    "nn.Conv2d stride": conv(stride=(2, 1)),
    "nn.Conv2d stride 2": conv((2, IN, 5, 6), stride=2),
    "nn.Conv2d same": conv(padding="same"),
    "nn.Conv2d unbatched": conv((IN, 4, 5)),
    "nn.Conv3d": conv((2, IN, 2, 3, 4), nn.Conv3d),
}
SPELLINGS: dict[str, Form] = {
    "addmm by keywords": rule(lambda w, b, x: torch.addmm(b, mat1=x, mat2=w), IN_OUT, (5, IN)),
    "mm by keywords": rule(lambda w, b, x: torch.mm(x, mat2=w), IN_OUT, (5, IN)),
    "method mm": rule(lambda w, b, x: x.mm(w), IN_OUT, (5, IN)),
    "matmul by keywords": rule(lambda w, b, x: torch.matmul(x, other=w), IN_OUT),
    "einsum with spaces": rule(lambda w, b, x: torch.einsum("bti, oi -> bto", x, w)),
    "einsum of a list": rule(lambda w, b, x: torch.einsum("...i,io->...o", [x, w]), IN_OUT),
    "F.conv1d": rule(lambda w, b, x: F.conv1d(x, w, b), (OUT, IN, 1), (2, IN, 6)),
    "F.conv2d valid": rule(lambda w, b, x: F.conv2d(x, w, padding="valid"), CONV, IMAGE),
    "F.conv2d same": rule(lambda w, b, x: F.conv2d(x, w, padding="same"), CONV, IMAGE),
    "F.conv2d strides": rule(lambda w, b, x: F.conv2d(x, w, b, stride=(2, 3)), CONV, (2, IN, 5, 7)),
    "F.conv3d": rule(lambda w, b, x: F.conv3d(x, w, b), (OUT, IN, 1, 1, 1), (2, IN, 3, 4, 5)),
    "convolution": rule(lambda w, b, x: torch.convolution(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), CONV, IMAGE),
    "torch.t": rule(lambda w, b, x: F.linear(x, torch.t(w)), IN_OUT),
    "t()": rule(lambda w, b, x: F.linear(x, w.t()), IN_OUT),
    "torch.transpose": rule(lambda w, b, x: F.linear(x, torch.transpose(w, 0, 1)), IN_OUT),
    "permute a tuple": rule(lambda w, b, x: F.linear(x, torch.permute(w, (1, 0))), IN_OUT),
    "t() twice": rule(lambda w, b, x: F.linear(x, w.t().t())),
    "view -1": rule(lambda w, b, x: F.linear(x, w.view(-1, IN)), (3, 4, IN)),
    "flatten": rule(lambda w, b, x: F.linear(x, w.flatten(1)), (OUT, 2, 4)),
    "squeeze": rule(lambda w, b, x: F.linear(x, w.squeeze(0)), (1, OUT, IN)),
    "columns": rule(lambda w, b, x: F.linear(x, w[:, 2 : 2 + IN]), (OUT, 2 * IN), view=lambda w: w[:, 2 : 2 + IN]),
    "chunk of columns": rule(lambda w, b, x: F.linear(x, w.chunk(2, 1)[1]), (OUT, 2 * IN), view=lambda w: w[:, IN:]),
    "split of columns": rule(lambda w, b, x: F.linear(x, w.split(IN, dim=1)[0]), (OUT, 2 * IN), view=lambda w: w[:, :IN]),
    "every second row": rule(lambda w, b, x: F.linear(x, w[::2]), (2 * OUT, IN), view=lambda w: w[::2]),
    "split in equal parts": rule(lambda w, b, x: F.linear(x, w.split(OUT)[2]), (3 * OUT, IN), view=lambda w: w[2 * OUT :]),
    "split by sizes": rule(lambda w, b, x: F.linear(x, torch.split(w, [4, OUT])[1]), (4 + OUT, IN), view=lambda w: w[4:]),
    "slice from the end": rule(lambda w, b, x: F.linear(x, w[-OUT:]), (30, IN), view=lambda w: w[30 - OUT :]),
    "part, then t": rule(lambda w, b, x: F.linear(x, w[IN:].t()), (2 * IN, OUT), view=lambda w: w[IN:].t()),
    "casts": rule(lambda w, b, x: F.linear(x, w.double().to(torch.float64).contiguous())),
    "data": rule(lambda w, b, x: F.linear(x, w.data)),
}
"""Other words for the same; they are shown with bat alone, which reads the weight itself."""
FORMS |= SPELLINGS
CASES = [
    (form, tracer, variant)
    for form in FORMS
    for tracer in TRACERS
    for variant in (("bat",) if form in SPELLINGS else VARIANTS)
    if (form, tracer) != ("data", "export")  # torch.export makes a constant of .data
]


@functools.cache
def traced(form: str, tracer: str) -> tuple[nn.Module, fx.GraphModule]:
    model = FORMS[form].make()
    return model, TRACERS[tracer](model, normal(*FORMS[form].x, dtype=torch.float64))


@pytest.mark.parametrize(("form", "tracer", "init_weights"), CASES)
def test_form(form: str, tracer: str, init_weights: Any) -> None:
    view, x = FORMS[form].view, normal(*FORMS[form].x, dtype=torch.float64)
    model, graph = traced(form, tracer)
    weight = FORMS[form].make().proj.weight.detach()
    before, code = graph_list(graph), graph.code
    adapted = mc.adapt(graph, fields(init_weights, target_modules=["proj"]))
    assert torch.equal(adapted(x), graph(x))
    assert list(blocks_of(adapted)) == ["proj.miss_block_default"]

    fill_blocks(adapted, std=0.3)
    block = blocks_of(adapted)["proj.miss_block_default"]
    assert block.dtype == torch.float64
    expected = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        view(expected.proj.weight).add_(reference_delta(init_weights, block, view(weight)))
    inputs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    y, reference = adapted(inputs[0]), expected(inputs[1])
    assert max_error(reference, graph(x)) > 1e-2
    assert max_error(y, reference) < 1e-12
    cotangent = torch.randn_like(reference)
    y.backward(cotangent)
    reference.backward(cotangent)
    assert block.grad is not None
    if form != "data":  # which has no gradient in the reference
        dw = view(expected.proj.weight.grad)
        wanted = reference_gradient(init_weights, block, view(weight), dw)
        assert max_error(block.grad, wanted) < 1e-10 * float(dw.abs().max())
    assert max_error(inputs[0].grad, inputs[1].grad) < 1e-12
    assert [name for name, p in adapted.named_parameters() if p.grad is not None] == ["proj.miss_block_default"]

    mc.merge(adapted)
    assert max_error(adapted(x), reference) < 1e-12
    assert graph_list(adapted) == before
    assert [name for name, _ in adapted.named_parameters()] == [name for name, _ in graph.named_parameters()]
    assert torch.equal(model.proj.weight, weight)
    assert graph.code == code


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_convolution_may_be_viewed(tracer: str, init_weights: Any) -> None:
    class Viewed(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).view(2, OUT * 20)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Viewed(nn.Conv2d(IN, OUT, 1)).double(), normal(*IMAGE, dtype=torch.float64)
    adapted = fill_blocks(mc.adapt(TRACERS[tracer](model, x), fields(init_weights, target_modules=["proj"])), std=0.3)
    delta = reference_delta(init_weights, blocks_of(adapted)["proj.miss_block_default"], model.proj.weight.flatten(1))
    update = torch.einsum("bihw,oi->bohw", x, delta).flatten(1)
    assert max_error(adapted(x), model(x) + update) < 1e-12


def test_refuses_names_without_a_tensor() -> None:
    nothing = fx.Graph().get_attr("gone")
    with pytest.raises(WeightError, match=r"^its weight 'gone' is no tensor of the graph module, not a parameter$"):
        trace_weight(nothing, nn.Module())


def test_tells_views_from_uses() -> None:
    graph = fx.symbolic_trace(holder(lambda w, b, x: F.linear(x, w.chunk(2)[0].t().contiguous()) * w.sum(), (2 * IN, OUT)))
    passing = {node.name for node in graph.graph.nodes if passes_weight(node)}
    assert passing == {"chunk", "getitem", "t", "contiguous"}


def test_takes_every_kind_of_view_of_a_contiguous_tensor() -> None:
    weight = torch.arange(24.0).view(6, 4)
    for taken in (weight, weight.t(), weight[2:5], weight.view(2, 12), weight[:4].reshape(8, 2).t(), weight[::2, 1:3]):
        view = take_view(weight.clone(), view_of(taken))
        assert torch.equal(view, taken)
        assert view.stride() == taken.stride()

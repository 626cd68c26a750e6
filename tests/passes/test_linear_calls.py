"""Matching: every form of a linear in a graph, by both tracers, and the way from its operand back to the parameter.

Each is shown by an adapter on it: outputs, gradients and the merge against fp64 references.
"""

from __future__ import annotations

import copy
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
from misscompile.passes.weight_paths import WeightError, apply_steps, passes_weight, trace_weight

pytestmark = pytest.mark.filterwarnings("ignore")
View = Callable[[Tensor], Tensor]


def same(weight: Tensor) -> Tensor:
    return weight


def swapped(weight: Tensor) -> Tensor:
    return weight.t()


def module(kind: Callable[[], nn.Module]) -> Model:
    torch.manual_seed(0)
    built = kind().double()
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    return Model(built)


TOKENS = (3, 5, IN)
FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], View]] = {
    "F.linear": (lambda: holder(lambda w, b, x: F.linear(x, w, b)), TOKENS, same),
    "F.linear by keywords": (lambda: holder(lambda w, b, x: F.linear(input=x, weight=w, bias=b)), TOKENS, same),
    "addmm": (lambda: holder(lambda w, b, x: torch.addmm(b, x, w), (IN, OUT)), (5, IN), swapped),
    "addmm of t": (lambda: holder(lambda w, b, x: torch.addmm(b, x, w.t())), (5, IN), same),
    "mm": (lambda: holder(lambda w, b, x: torch.mm(x, w) + b, (IN, OUT)), (5, IN), swapped),
    "matmul": (lambda: holder(lambda w, b, x: torch.matmul(x, w) + b, (IN, OUT)), TOKENS, swapped),
    "method matmul": (lambda: holder(lambda w, b, x: x.matmul(w) + b, (IN, OUT)), TOKENS, swapped),
    "@": (lambda: holder(lambda w, b, x: x @ w, (IN, OUT)), TOKENS, swapped),
    "@ T": (lambda: holder(lambda w, b, x: x @ w.T), TOKENS, same),
    "@ transpose": (lambda: holder(lambda w, b, x: x @ w.transpose(-1, -2)), TOKENS, same),
    "@ permute": (lambda: holder(lambda w, b, x: x @ w.permute(1, 0)), TOKENS, same),
    "einsum out_in": (lambda: holder(lambda w, b, x: torch.einsum("bti,oi->bto", x, w)), TOKENS, same),
    "einsum in_out": (lambda: holder(lambda w, b, x: torch.einsum("...i,io->...o", x, w), (IN, OUT)), TOKENS, swapped),
    "einsum weight first": (lambda: holder(lambda w, b, x: torch.einsum("oi,bti->bto", w, x)), TOKENS, same),
    "view": (
        lambda: holder(lambda w, b, x: F.linear(x, w.view(OUT, IN), b), (4, OUT // 4, IN)),
        TOKENS,
        lambda w: w.view(OUT, IN),
    ),
    "reshape then t": (
        lambda: holder(lambda w, b, x: F.linear(x, w.reshape(IN, OUT).t(), b), (IN, 4, OUT // 4)),
        TOKENS,
        lambda w: w.view(IN, OUT).t(),
    ),
    "cast": (lambda: holder(lambda w, b, x: F.linear(x, w.to(torch.float64), b)), TOKENS, same),
    "split": (
        lambda: holder(lambda w, b, x: F.linear(x, w.split([8, OUT], 0)[1]), (8 + OUT, IN)),
        TOKENS,
        lambda w: w[8:],
    ),
    "chunk": (lambda: holder(lambda w, b, x: F.linear(x, w.chunk(2)[1], b), (2 * OUT, IN)), TOKENS, lambda w: w[OUT:]),
    "slice": (lambda: holder(lambda w, b, x: F.linear(x, w[4 : 4 + OUT], b), (30, IN)), TOKENS, lambda w: w[4 : 4 + OUT]),
    "slice from": (lambda: holder(lambda w, b, x: x @ w[4:].t(), (4 + OUT, IN)), TOKENS, lambda w: w[4:]),
    "F.conv2d": (
        lambda: holder(lambda w, b, x: F.conv2d(x, w, b), (OUT, IN, 1, 1)),
        (2, IN, 4, 5),
        lambda w: w.flatten(1),
    ),
    "nn.Linear": (lambda: module(lambda: nn.Linear(IN, OUT)), TOKENS, same),
    "Conv1D": (lambda: module(lambda: Conv1D(OUT, IN)), TOKENS, swapped),
    "nn.Conv1d": (lambda: module(lambda: nn.Conv1d(IN, OUT, 1)), (2, IN, 7), lambda w: w.flatten(1)),
    "nn.Conv2d": (lambda: module(lambda: nn.Conv2d(IN, OUT, 1, bias=False)), (2, IN, 4, 5), lambda w: w.flatten(1)),
    "nn.Conv2d stride": (
        lambda: module(lambda: nn.Conv2d(IN, OUT, 1, stride=(2, 1))),
        (2, IN, 4, 5),
        lambda w: w.flatten(1),
    ),
    "nn.Conv2d stride 2": (lambda: module(lambda: nn.Conv2d(IN, OUT, 1, stride=2)), (2, IN, 5, 6), lambda w: w.flatten(1)),
    "nn.Conv2d same": (lambda: module(lambda: nn.Conv2d(IN, OUT, 1, padding="same")), (2, IN, 4, 5), lambda w: w.flatten(1)),
    "nn.Conv2d unbatched": (lambda: module(lambda: nn.Conv2d(IN, OUT, 1)), (IN, 4, 5), lambda w: w.flatten(1)),
    "nn.Conv3d": (lambda: module(lambda: nn.Conv3d(IN, OUT, 1)), (2, IN, 2, 3, 4), lambda w: w.flatten(1)),
}


def rows(first: int, last: int | None = None) -> View:
    return lambda weight: weight[first:last]


def shaped(*shape: int) -> View:
    return lambda weight: weight.view(shape)


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...], View]] = {
    "addmm by keywords": (lambda w, b, x: torch.addmm(b, mat1=x, mat2=w), (IN, OUT), (5, IN), swapped),
    "mm by keywords": (lambda w, b, x: torch.mm(x, mat2=w), (IN, OUT), (5, IN), swapped),
    "method mm": (lambda w, b, x: x.mm(w), (IN, OUT), (5, IN), swapped),
    "matmul by keywords": (lambda w, b, x: torch.matmul(x, other=w), (IN, OUT), TOKENS, swapped),
    "einsum with spaces": (lambda w, b, x: torch.einsum("bti, oi -> bto", x, w), (OUT, IN), TOKENS, same),
    "einsum of a list": (lambda w, b, x: torch.einsum("...i,io->...o", [x, w]), (IN, OUT), TOKENS, swapped),
    "F.conv1d": (lambda w, b, x: F.conv1d(x, w, b), (OUT, IN, 1), (2, IN, 6), shaped(OUT, IN)),
    "F.conv2d valid": (lambda w, b, x: F.conv2d(x, w, padding="valid"), (OUT, IN, 1, 1), (2, IN, 3, 4), shaped(OUT, IN)),
    "F.conv2d same": (lambda w, b, x: F.conv2d(x, w, padding="same"), (OUT, IN, 1, 1), (2, IN, 3, 4), shaped(OUT, IN)),
    "F.conv2d strides": (lambda w, b, x: F.conv2d(x, w, b, stride=(2, 3)), (OUT, IN, 1, 1), (2, IN, 5, 7), shaped(OUT, IN)),
    "F.conv3d": (lambda w, b, x: F.conv3d(x, w, b), (OUT, IN, 1, 1, 1), (2, IN, 3, 4, 5), shaped(OUT, IN)),
    "convolution": (
        lambda w, b, x: torch.convolution(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        (OUT, IN, 1, 1),
        (2, IN, 3, 4),
        shaped(OUT, IN),
    ),
    "torch.t": (lambda w, b, x: F.linear(x, torch.t(w)), (IN, OUT), TOKENS, swapped),
    "t()": (lambda w, b, x: F.linear(x, w.t()), (IN, OUT), TOKENS, swapped),
    "torch.transpose": (lambda w, b, x: F.linear(x, torch.transpose(w, 0, 1)), (IN, OUT), TOKENS, swapped),
    "permute a tuple": (lambda w, b, x: F.linear(x, torch.permute(w, (1, 0))), (IN, OUT), TOKENS, swapped),
    "t() twice": (lambda w, b, x: F.linear(x, w.t().t()), (OUT, IN), TOKENS, same),
    "view -1": (lambda w, b, x: F.linear(x, w.view(-1, IN)), (3, 4, IN), TOKENS, shaped(OUT, IN)),
    "flatten": (lambda w, b, x: F.linear(x, w.flatten(1)), (OUT, 2, 4), TOKENS, shaped(OUT, IN)),
    "squeeze": (lambda w, b, x: F.linear(x, w.squeeze(0)), (1, OUT, IN), TOKENS, shaped(OUT, IN)),
    "split in equal parts": (lambda w, b, x: F.linear(x, w.split(OUT)[2]), (3 * OUT, IN), TOKENS, rows(2 * OUT)),
    "split by sizes": (lambda w, b, x: F.linear(x, torch.split(w, [4, OUT])[1]), (4 + OUT, IN), TOKENS, rows(4)),
    "slice from the end": (lambda w, b, x: F.linear(x, w[-OUT:]), (30, IN), TOKENS, rows(30 - OUT)),
    "part, then t": (lambda w, b, x: F.linear(x, w[IN:].t()), (2 * IN, OUT), TOKENS, lambda w: w[IN:].t()),
    "casts": (lambda w, b, x: F.linear(x, w.double().to(torch.float64).contiguous()), (OUT, IN), TOKENS, same),
    "data": (lambda w, b, x: F.linear(x, w.data), (OUT, IN), TOKENS, same),
}
"""Other words for the same; they are shown with bat alone, which reads the weight itself."""
FORMS |= {
    name: (functools.partial(holder, rule, shape), x_shape, view) for name, (rule, shape, x_shape, view) in SPELLINGS.items()
}
CASES = [
    (form, tracer, variant)
    for form in FORMS
    for tracer in TRACERS
    for variant in (("bat",) if form in SPELLINGS else VARIANTS)
    if (form, tracer) != ("data", "export")  # torch.export makes a constant of .data
]


@functools.cache
def traced(form: str, tracer: str) -> tuple[nn.Module, fx.GraphModule]:
    make, shape, _ = FORMS[form]
    model = make()
    return model, TRACERS[tracer](model, normal(*shape, dtype=torch.float64))


def with_delta(model: nn.Module, view: View, init_weights: Any, block: Tensor) -> nn.Module:
    """The plain model with `W + ΔW` written over the part of its weight that the call reads, in fp64."""
    expected = copy.deepcopy(model)
    with torch.no_grad():
        part = view(expected.proj.weight)
        part += reference_delta(init_weights, block, part)
    return expected


@pytest.mark.parametrize(("form", "tracer", "init_weights"), CASES)
def test_form(form: str, tracer: str, init_weights: Any) -> None:
    make, shape, view = FORMS[form]
    x = normal(*shape, dtype=torch.float64)
    model, graph = traced(form, tracer)
    weight = make().proj.weight.detach()
    before, code = graph_list(graph), graph.code
    adapted = mc.adapt(graph, fields(init_weights, target_modules=["proj"]))
    assert torch.equal(adapted(x), graph(x))
    assert list(blocks_of(adapted)) == ["proj.miss_block_default"]

    fill_blocks(adapted, std=0.3)
    block = blocks_of(adapted)["proj.miss_block_default"]
    assert block.dtype == torch.float64
    expected = with_delta(model, view, init_weights, block).requires_grad_(True)
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
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(IN, OUT, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).view(2, OUT * 20)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Viewed().double(), normal(2, IN, 4, 5, dtype=torch.float64)
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

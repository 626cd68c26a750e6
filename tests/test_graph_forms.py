"""Every form of a linear in a whole graph, by both tracers: outputs, gradients, and the merge against fp64 references."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import TRACERS, VARIANTS, blocks_of, fill_blocks, graph_list, max_error, reference_delta, reference_gradient
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D
from zoo import IN, OUT, Model, holder

import misscompile as mc

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


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


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


@functools.cache
def traced(form: str, tracer: str) -> tuple[nn.Module, fx.GraphModule]:
    make, shape, _ = FORMS[form]
    model = make()
    return model, TRACERS[tracer](model, features(*shape))


def config(init_weights: Any, **fields: Any) -> mc.MissConfig:
    return mc.MissConfig(**({"r": 4, "mini_r": 2, "target_modules": ["proj"], "init_weights": init_weights} | fields))


def with_delta(model: nn.Module, view: View, init_weights: Any, block: Tensor) -> nn.Module:
    """The plain model with `W + ΔW` written over the part of its weight that the call reads, in fp64."""
    expected = copy.deepcopy(model)
    with torch.no_grad():
        part = view(expected.proj.weight)
        part += reference_delta(init_weights, block, part)
    return expected


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, tracer: str, init_weights: Any) -> None:
    make, shape, view = FORMS[form]
    x = features(*shape)
    model, graph = traced(form, tracer)
    weight = make().proj.weight.detach()
    before, code = graph_list(graph), graph.code
    adapted = mc.adapt(graph, config(init_weights))
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
    dw = view(expected.proj.weight.grad)
    assert block.grad is not None
    assert max_error(block.grad, reference_gradient(init_weights, block, view(weight), dw)) < 1e-10 * float(dw.abs().max())
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
    model, x = Viewed().double(), features(2, IN, 4, 5)
    adapted = fill_blocks(mc.adapt(TRACERS[tracer](model, x), config(init_weights)), std=0.3)
    delta = reference_delta(init_weights, blocks_of(adapted)["proj.miss_block_default"], model.proj.weight.flatten(1))
    update = torch.einsum("bihw,oi->bohw", x, delta).flatten(1)
    assert max_error(adapted(x), model(x) + update) < 1e-12

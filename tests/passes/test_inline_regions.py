"""Inlining: a region without gradients becomes nodes of the graph, whose results pass no gradient."""

from __future__ import annotations

import pytest
import torch
from support import gradients, graph_list, trace_export
from torch import Tensor, fx, nn

from misscompile.passes.inline_regions import inline_regions
from misscompile.record.words import Scope

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Frozen(nn.Module):
    """A branch without gradients beside one with, and a number that only the branch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x))
        with torch.no_grad():
            scale = torch.sigmoid(self.side(x))
            shift = y.cos()
        return y * scale + shift


class Interrupted(Frozen):
    """A region that gradients interrupt, of which an export makes two."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.tanh(self.side(x))
            with torch.enable_grad():
                y = y * self.up(x)
            z = y + 1
        return y * z


class Nested(Frozen):
    """A region that holds another one, of a kind that stays."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = torch.tanh(self.up(x))
        return y * x.sum()


def regions(graph: fx.GraphModule) -> int:
    return sum(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.graph.nodes)


def inlined(graph: fx.GraphModule) -> int:
    count = inline_regions(Scope(graph, graph.graph, "test"))
    graph.graph.lint()
    graph.recompile()
    return count


@pytest.mark.parametrize("kind", [Frozen, Interrupted])
def test_outputs_and_gradients_stay(kind: type[nn.Module]) -> None:
    model = kind().double()
    graph = trace_export(model, X)
    found = regions(graph)
    assert inlined(graph) == found == (1 if kind is Frozen else 2)
    assert regions(graph) == 0
    inputs = X.clone().requires_grad_(True), X.clone().requires_grad_(True)
    assert torch.equal(graph(inputs[0]), model(inputs[1]))
    ours, expected = gradients(graph, inputs[0]), gradients(model, inputs[1])
    assert set(ours) == set(expected) == {"up.weight", "up.bias"}  # the branch passes none
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    detached = [node for node in graph.graph.nodes if node.target is torch.ops.aten.detach.default]
    assert len(detached) == 2
    assert all(node.meta["val"].shape == (3, 4) for node in detached)


def test_nothing_to_do_leaves_the_graph_untouched() -> None:
    graph = trace_export(nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double(), X)
    before = graph_list(graph)
    assert inlined(graph) == 0
    assert graph_list(graph) == before


@pytest.mark.filterwarnings("ignore")
def test_regions_inside_regions_are_left_alone() -> None:
    graph = trace_export(Nested().double(), X)
    output, before = graph(X), graph_list(graph)
    assert regions(graph) > 0
    assert inlined(graph) == 0
    assert graph_list(graph) == before
    assert torch.equal(graph(X), output)

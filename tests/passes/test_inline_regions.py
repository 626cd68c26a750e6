"""Inlining: a region without gradients becomes nodes of the graph, whose results pass no gradient."""

from __future__ import annotations

import pytest
import torch
from support import graph_list
from torch import Tensor, fx, nn

from misscompile.passes.inline import inline_regions

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


class Nested(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.tanh(self.up(x))
            with torch.enable_grad():
                y = y * self.side(x)
            y = y + 1
        return y * x.sum()


def exported(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model.double(), (X,), strict=False).module()  # type: ignore[return-value]


def regions(graph: fx.GraphModule) -> int:
    return sum(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.graph.nodes)


def gradients(model: nn.Module) -> list[Tensor | None]:
    model.zero_grad()
    x = X.clone().requires_grad_(True)
    model(x).pow(2).sum().backward()
    return [x.grad, *(parameter.grad for _, parameter in sorted(model.named_parameters()))]


def test_outputs_and_gradients_stay() -> None:
    graph, reference = exported(Frozen()), Frozen().double()
    reference.load_state_dict(graph.state_dict())
    assert regions(graph) > 0
    inline_regions(graph)
    graph.graph.lint()
    assert regions(graph) == 0
    assert not any(isinstance(module, fx.GraphModule) for name, module in graph.named_modules() if name)
    assert torch.equal(graph(X), reference(X))
    for ours, expected in zip(gradients(graph), gradients(reference), strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours, expected)  # type: ignore[arg-type]
    assert reference.side.weight.grad is None
    detached = [node for node in graph.graph.nodes if node.target is torch.ops.aten.detach.default]
    assert all(node.meta["val"] is not None for node in detached)


def test_nothing_to_do_leaves_the_graph_untouched() -> None:
    graph = exported(nn.Sequential(nn.Linear(6, 4), nn.Tanh()))
    before = graph_list(graph)
    inline_regions(graph)
    assert graph_list(graph) == before


@pytest.mark.filterwarnings("ignore")
def test_regions_inside_regions_are_left_alone() -> None:
    graph = exported(Nested())
    output = graph(X)
    inline_regions(graph)
    graph.graph.lint()
    assert torch.equal(graph(X), output)
    inner = [module for name, module in graph.named_modules() if name and isinstance(module, fx.GraphModule)]
    assert regions(graph) > 0 or not inner

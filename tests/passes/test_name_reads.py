"""Naming: each call reads a tied tensor under the name that its own module gives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import graph_list, trace_export
from torch import Tensor, fx, nn
from zoo import TwoLinears, normal, seeded

from misscompile.passes.name_reads import name_reads
from misscompile.record.words import Scope

X = normal(3, 12, dtype=torch.float64)


class Tied(nn.Module):
    """Three linears with one weight; `a` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 12, bias=False) for _ in range(3))
        self.b.weight = self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(self.b(torch.tanh(self.a(x))))))  # type: ignore[no-any-return]


class Scale(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(1, 12)  # type: ignore[operator]


class TiedScales(nn.Module):
    """Two modules with one buffer, which both read under a view."""

    def __init__(self) -> None:
        super().__init__()
        scale = torch.arange(12, dtype=torch.float64)
        self.first, self.last = Scale(scale), Scale(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def alias() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
    model.add_module("again", model[0])
    return model


def graph_of(make: Callable[[], nn.Module]) -> fx.GraphModule:
    return trace_export(make().double(), X)


def reads(graph: fx.GraphModule) -> list[str]:
    """What every call of an operator reads of the model, in their order."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    return [str(source.target) for node in nodes for source in node.all_input_nodes if source.op == "get_attr"]


CASES: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "one weight in three modules": (Tied, 3, ["a.weight", "b.weight", "a.weight", "c.weight"]),
    "a buffer": (TiedScales, 1, ["first.scale", "last.scale"]),
    "nothing is tied": (TwoLinears, 0, ["up.weight", "down.weight", "down.bias"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_call_reads_under_the_name_of_its_module(case: str) -> None:
    make, count, expected = CASES[case]
    graph = graph_of(seeded(make))
    before, y = graph_list(graph), graph(X)
    assert name_reads(Scope(graph, graph.graph, "test")) == count
    graph.graph.lint()
    graph.recompile()
    assert reads(graph) == expected
    assert torch.equal(graph(X), y)
    if not count:
        assert graph_list(graph) == before
    assert name_reads(Scope(graph, graph.graph, "test")) == 0


def test_a_module_of_several_names_goes_by_the_first() -> None:
    graph = graph_of(alias)
    graph.add_module("again", graph.get_submodule("0"))
    y = graph(X)
    name_reads(Scope(graph, graph.graph, "test"))
    graph.recompile()
    assert reads(graph) == ["0.weight", "0.bias"] * 2
    assert torch.equal(graph(X), y)


def test_a_call_of_a_module_by_another_name_is_one_of_the_module() -> None:
    model = alias()
    nodes = fx.Graph()
    nodes.output(nodes.call_module("again", (nodes.call_module("0", (nodes.placeholder("x"),)),)))
    graph = fx.GraphModule(model, nodes)
    assert name_reads(Scope(graph, graph.graph, "test")) == 1
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "0"]


def test_a_read_that_no_module_tells_apart_stays() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.a.weight.t()) @ self.b.weight

    graph = graph_of(Root)
    graph.b.weight = graph.a.weight
    assert name_reads(Scope(graph, graph.graph, "test")) == 0

"""One graph for both modes: constants that differ follow the flag, everything else is left as it was traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import graph_list
from torch import Tensor, fx, nn

from misscompile.graphs import copy_nodes
from misscompile.passes.follow_mode import by_mode, follow_mode

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def both_modes(model: nn.Module) -> tuple[fx.GraphModule, fx.Graph, fx.Graph]:
    """A module that holds the values, the graph in training and the graph in evaluation mode."""
    modules = [torch.export.export(model.train(mode), (X,), strict=False).module() for mode in (True, False)]
    training, evaluation = (copy_nodes(module.graph) for module in modules)  # type: ignore[arg-type]
    return modules[0], training, evaluation  # type: ignore[return-value]


def run(root: nn.Module, graph: fx.Graph, training: bool, seed: int = 0) -> Tensor:
    graph.lint()
    module = fx.GraphModule(root, graph)
    module.training = training
    torch.manual_seed(seed)
    result: Tensor = module(X)
    return result


class Dropped(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.tanh(self.linear(x)))
        return F.dropout(y, 0.25, self.training)


class Attending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 3)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0)


class Scaled(nn.Module):
    """Modes that differ in a number, and in an argument that is left out in one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x * (2.0 if self.training else 3.0), x, alpha=4 if self.training else 1)


@pytest.mark.parametrize("kind", [Dropped, Attending, Scaled])
def test_one_graph_computes_both_modes(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    root, training, evaluation = both_modes(model)
    expected = {True: run(root, copy_nodes(training), True), False: run(root, copy_nodes(evaluation), False)}
    assert not torch.equal(expected[True], expected[False])
    assert follow_mode(training, evaluation)
    for mode, value in expected.items():
        assert torch.equal(run(root, training, mode), value)
        assert torch.equal(value, _seeded(model.train(mode)))


def _seeded(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    result: Tensor = model(X)
    return result


def test_a_flag_is_read_as_it_is_and_other_constants_are_chosen() -> None:
    _, training, evaluation = both_modes(Dropped())
    follow_mode(training, evaluation)
    reads = [node for node in training.nodes if node.op == "get_attr" and node.target == "training"]
    assert len(reads) == 1
    dropouts = [node for node in training.nodes if node.target is torch.ops.aten.dropout.default]
    assert [node.args[1:] for node in dropouts] == [(0.5, reads[0]), (0.25, reads[0])]
    assert not any(node.target is by_mode for node in training.nodes)

    _, training, evaluation = both_modes(Attending())
    follow_mode(training, evaluation)
    (chosen,) = [node for node in training.nodes if node.target is by_mode]
    assert chosen.args[1:] == (0.5, 0.0)


def test_by_mode() -> None:
    assert (by_mode(True, 0.1, 0.0), by_mode(False, 0.1, 0.0)) == (0.1, 0.0)


def test_nothing_to_do_leaves_the_graph_untouched() -> None:
    _, training, evaluation = both_modes(nn.Sequential(nn.Linear(6, 5), nn.Tanh()))
    before = graph_list(training)
    assert follow_mode(training, evaluation)
    assert graph_list(training) == before


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if self.training else x.cos()


class Longer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin().cos() if self.training else x.sin()


class Crossed(nn.Module):
    """The same operators in both modes, of other operands."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.sin(), x.cos()
        return a - b if self.training else b - a


class OtherDimension(nn.Module):
    """Modes that differ in a list, which is no constant that a node could choose."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1,) if self.training else (2,))[:, :4]


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))


@pytest.mark.parametrize("kind", [Branching, Longer, Crossed, OtherDimension, batch_norm])
def test_modes_that_differ_in_more_are_told_and_left_alone(kind: Callable[[], nn.Module]) -> None:
    _, training, evaluation = both_modes(kind())
    graphs = graph_list(training), graph_list(evaluation)
    assert not follow_mode(training, evaluation)
    assert (graph_list(training), graph_list(evaluation)) == graphs


def _copying(copy: bool) -> fx.Graph:
    """`tanh(x)`, through a copy to contiguous memory or not."""
    graph = fx.Graph()
    x: Any = graph.placeholder("x")
    if copy:
        x = graph.call_function(torch.ops.aten.contiguous.default, (x,))
    graph.output(graph.call_function(torch.ops.aten.tanh.default, (x,)))
    return graph


def test_a_copy_that_only_training_makes_is_kept() -> None:
    training = _copying(True)
    before = graph_list(training)
    assert follow_mode(training, _copying(False))
    assert graph_list(training) == before


def test_a_copy_that_only_evaluation_makes_is_not_lost() -> None:
    training = _copying(False)
    assert not follow_mode(training, _copying(True))

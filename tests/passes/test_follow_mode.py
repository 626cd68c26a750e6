"""One graph for both modes: constants that differ follow the flag, everything else is left as it was traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import graph_list, trace_export
from torch import Tensor, fx, nn

from misscompile.hosts.whole_graph import copy_nodes
from misscompile.passes.follow_mode import by_mode, follow_mode, frozen_mode
from misscompile.record.words import Scope

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def both_modes(model: nn.Module) -> Scope:
    """The graphs in training and in evaluation mode."""
    modules = [trace_export(model.train(mode), X) for mode in (True, False)]
    training, evaluation = (copy_nodes(module.graph) for module in modules)
    return Scope(modules[0], training, "test", evaluation=evaluation)


def run(scope: Scope, graph: fx.Graph, training: bool) -> Tensor:
    graph.lint()
    module = fx.GraphModule(scope.root, copy_nodes(graph))
    module.training = training
    return seeded(module)


def seeded(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    result: Tensor = model(X)
    return result


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.tanh(self.linear(x)))
        return F.dropout(y, 0.25, self.training)


class ByRule(nn.Module):
    """A module whose forward is `rule(x, training)`."""

    def __init__(self, rule: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.training)


def attend(x: Tensor, training: bool) -> Tensor:
    q = x.unflatten(-1, (2, 3)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if training else 0.0)


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "dropout": (Dropped, 2),
    "attention": (lambda: ByRule(attend), 1),
    "a number, and an argument left out in one mode": (
        lambda: ByRule(lambda x, t: torch.add(x * (2.0 if t else 3.0), x, alpha=4 if t else 1)),
        2,
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_one_graph_computes_both_modes(name: str) -> None:
    make, calls = FOLLOWED[name]
    model = make()
    scope = both_modes(model)
    assert scope.evaluation is not None
    expected = {True: run(scope, scope.graph, True), False: run(scope, scope.evaluation, False)}
    assert not torch.equal(expected[True], expected[False])
    assert follow_mode(scope) == calls
    assert scope.follows_mode
    for mode, value in expected.items():
        assert torch.equal(run(scope, scope.graph, mode), value)
        assert torch.equal(value, seeded(model.train(mode)))


def test_a_flag_is_read_as_it_is_and_other_constants_are_chosen() -> None:
    scope = both_modes(Dropped())
    follow_mode(scope)
    (flag,) = [node for node in scope.graph.nodes if node.op == "get_attr" and node.target == "training"]
    dropouts = [node for node in scope.graph.nodes if node.target is torch.ops.aten.dropout.default]
    assert [node.args[1:] for node in dropouts] == [(0.5, flag), (0.25, flag)]
    assert not any(node.target is by_mode for node in scope.graph.nodes)

    scope = both_modes(ByRule(attend))
    follow_mode(scope)
    (chosen,) = [node for node in scope.graph.nodes if node.target is by_mode]
    assert chosen.args[1:] == (0.5, 0.0)
    assert (by_mode(True, 0.1, 0.0), by_mode(False, 0.1, 0.0)) == (0.1, 0.0)


def copying(copy: bool) -> fx.Graph:
    """`tanh(x)`, through a copy to contiguous memory or not."""
    graph = fx.Graph()
    x: Any = graph.placeholder("x")
    if copy:
        x = graph.call_function(torch.ops.aten.contiguous.default, (x,))
    graph.output(graph.call_function(torch.ops.aten.tanh.default, (x,)))
    return graph


def of_rule(rule: Callable[[Tensor, bool], Tensor]) -> Callable[[], Scope]:
    return lambda: both_modes(ByRule(rule))


UNTOUCHED: dict[str, tuple[Callable[[], Scope], bool]] = {
    "nothing to do": (lambda: both_modes(nn.Sequential(nn.Linear(6, 5), nn.Tanh())), True),
    "a copy that only training makes": (lambda: Scope(nn.Module(), copying(True), "", evaluation=copying(False)), True),
    "a copy that only evaluation makes": (lambda: Scope(nn.Module(), copying(False), "", evaluation=copying(True)), False),
    "one mode alone": (lambda: Scope(nn.Module(), copying(False), ""), False),
    "another operator": (of_rule(lambda x, t: x.sin() if t else x.cos()), False),
    "more operators": (of_rule(lambda x, t: x.sin().cos() if t else x.sin()), False),
    "operands crossed": (of_rule(lambda x, t: (lambda a, b: a - b if t else b - a)(x.sin(), x.cos())), False),
    "a list, which is no constant": (of_rule(lambda x, t: x.sum((1,) if t else (2,))[:, :4]), False),
    "batch norm": (lambda: both_modes(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))), False),
}
"""Graphs that are left alone, and whether they follow the mode as they are."""


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_has_no_constant_to_follow_is_left_alone_and_told(name: str) -> None:
    make, follows = UNTOUCHED[name]
    scope = make()
    graphs = [scope.graph, *([scope.evaluation] if scope.evaluation else [])]
    before = [graph_list(graph) for graph in graphs]
    assert follow_mode(scope) == 0
    assert scope.follows_mode is follows
    assert [graph_list(graph) for graph in graphs] == before


ACTING: dict[str, tuple[Callable[[], nn.Module], bool | None]] = {
    "dropout": (lambda: nn.Dropout(0.5), None),
    "dropout in place": (lambda: nn.Dropout(0.5, inplace=True), None),
    "dropout of channels": (lambda: nn.Dropout1d(0.5), None),
    "alpha dropout": (lambda: nn.AlphaDropout(0.5), None),
    "alpha dropout of features": (lambda: nn.FeatureAlphaDropout(0.5), None),
    "random slope": (lambda: nn.RReLU(), False),
    "random slope in place": (lambda: nn.RReLU(inplace=True), False),
    "batch norm": (lambda: nn.BatchNorm1d(4), False),
    "instance norm": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), False),
    "a mask drawn by hand": (lambda: ByRule(lambda x, t: x * torch.rand_like(x).round() if t else x), None),
    "path dropout": (lambda: ByRule(lambda x, t: x * x.new_empty(2, 1, 1).bernoulli_(0.5) if t else x), None),
}
"""Modules that compute something else in training, and what their graph of evaluation tells once it is decomposed."""
SAME: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Tanh,
    "a rate of zero": lambda: nn.Dropout(0.0),
    "attention without a rate": lambda: ByRule(lambda x, t: F.scaled_dot_product_attention(x, x, x)),
    "batch norm that counts nothing": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "instance norm that counts nothing": lambda: nn.InstanceNorm1d(4),
    "layer norm": lambda: nn.LayerNorm(6),
    "a p that is no rate": lambda: ByRule(lambda x, t: x / x.norm(3, -1, True)),
}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", [*ACTING, *SAME])
def test_an_exported_graph_tells_the_mode_it_was_made_in(name: str, decomposed: bool) -> None:
    make, left = ACTING.get(name, (SAME.get(name), None))
    assert make is not None
    for mode in (True, False):
        program = torch.export.export(make().train(mode), (X,), strict=False)
        graph = program.run_decompositions().graph if decomposed else program.graph
        told = mode if mode or not decomposed else left
        undrawn = not mode and isinstance(make(), ByRule)
        assert frozen_mode(graph) is (None if name in SAME or undrawn else told)


@pytest.mark.parametrize("mode", [True, False])
def test_a_recurrent_dropout_tells_the_mode(mode: bool) -> None:
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        for rate, told in ((0.5, mode), (0.0, None)):
            module = kind(6, 5, 2, dropout=rate).train(mode)
            assert frozen_mode(torch.export.export(module, (X,), strict=False).graph) is told


TRACED: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "F.dropout": lambda x, t: F.dropout(x, 0.5, t),
    "F.dropout by keywords": lambda x, t: F.dropout(x, training=t),
    "F.dropout1d": lambda x, t: F.dropout1d(x, 0.5, t),
    "F.rrelu": lambda x, t: F.rrelu(x, training=t),
    "F.batch_norm": lambda x, t: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=t),
    "torch.dropout": lambda x, t: torch.dropout(x, 0.5, t),
    "torch.batch_norm": lambda x, t: torch.batch_norm(x, None, None, torch.zeros(4), torch.ones(4), t, 0.1, 1e-5, False),
    "attention": attend,
    "torch.bernoulli": lambda x, t: x * torch.bernoulli(x) if t else x,
    "a method": lambda x, t: x * x.clone().uniform_() if t else x,
}


@pytest.mark.parametrize("name", TRACED)
def test_a_traced_graph_tells_the_mode_of_its_functions(name: str) -> None:
    drawn_or_nothing = name in ("attention", "torch.bernoulli", "a method")
    for mode in (True, False):
        graph = fx.symbolic_trace(ByRule(TRACED[name]).train(mode)).graph
        assert frozen_mode(graph) is (mode or (None if drawn_or_nothing else False))


def test_a_module_follows_its_own_mode_and_a_rate_of_zero_has_none() -> None:
    for model in (nn.Sequential(nn.Dropout(0.5)), ByRule(lambda x, t: F.dropout(x, 0.0, t))):
        assert frozen_mode(fx.symbolic_trace(model).graph) is None


def test_a_graph_that_follows_the_mode_or_mixes_modes_is_not_frozen_in_evaluation() -> None:
    scope = both_modes(nn.Sequential(Dropped(), ByRule(lambda x, t: attend(torch.cat([x, x[..., :1]], -1), t))))
    follow_mode(scope)
    assert scope.follows_mode
    assert frozen_mode(scope.graph) is None
    mixed = nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Dropout(0.5))
    assert frozen_mode(trace_export(mixed, X).graph) is True

"""Let one graph compute what a model computes in training and in evaluation mode.

A trace freezes the mode. Where two traces of one model differ in constants alone, one graph that reads the flag is enough:

    training:    dropout(x, 0.1, True)          flag = get_attr[training]
    evaluation:  dropout(x, 0.1, False)    ->   dropout(x, 0.1, flag)

    training:    attention(q, k, v, None, 0.1)      p = by_mode(flag, 0.1, 0.0)
    evaluation:  attention(q, k, v)            ->   attention(q, k, v, None, p)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from misscompile.passes.linear_calls import target_name
from misscompile.record.words import Scope

Constant = bool | int | float | None
Key = int | str
"""The place or the keyword of an argument."""

_COPY = torch.ops.aten.contiguous.default


def follow_mode(scope: Scope) -> int:
    """Let `scope.graph`, that of training mode, read the attribute `training`; returns how many calls do.

    `scope.follows_mode` says whether that was possible. Where the graph and `scope.evaluation` differ in more than constants
    (a batch norm that counts its batches, a branch on the mode), the graph is left alone.
    """
    changes = None if scope.evaluation is None else _changes(scope.graph, scope.evaluation)
    if changes is None:
        return 0
    scope.follows_mode = True
    graph = scope.graph
    if changes:
        with graph.inserting_before(next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))):
            flag = graph.create_node("get_attr", "training")
    for node, different in changes.items():
        for key, values in different.items():
            with graph.inserting_before(node):
                value = flag if values[0] is True and values[1] is False else graph.call_function(by_mode, (flag, *values))
            _set_argument(node, key, value)
    return len(changes)


def _changes(training: fx.Graph, evaluation: fx.Graph) -> dict[fx.Node, dict[Key, tuple[Any, Any]]] | None:
    """Each node of `training` whose constants differ, with those of both modes; None where more differs."""
    left_nodes, right_nodes = _without_copies(training), _without_copies(evaluation)
    if len(left_nodes) != len(right_nodes):
        return None
    names = dict(zip(right_nodes, left_nodes, strict=True))
    changes = {}
    for right, left in names.items():
        if (left.op, str(left.target)) != (right.op, str(right.target)) or (_has_copy(right) and not _has_copy(left)):
            return None
        values: Any = fx.node.map_arg(_arguments(left), _source)
        others: Any = fx.node.map_arg(_arguments(right), lambda node: names[_source(node)])
        if values.keys() != others.keys():
            return None
        different = {key: (values[key], others[key]) for key in values if values[key] != others[key]}
        if different and left.op != "call_module":
            if not all(isinstance(value, Constant) for pair in different.values() for value in pair):
                return None
            changes[left] = different
    return changes


def by_mode(training: bool, train_value: Constant, eval_value: Constant) -> Constant:
    """The constant of the mode."""
    return train_value if training else eval_value


_DRAWS = torch.Tag.nondeterministic_seeded
_FLAGS = ("train", "training", "use_input_stats")
_RATES = ("p", "dropout", "dropout_p")
_STATISTICS = "running_mean"
"""What operators and functions of torch call a mode, the rate of a dropout, and what a norm has counted."""


def frozen_mode(graph: fx.Graph) -> bool | None:
    """The mode that is written into the nodes of a graph, or None where nothing in it depends on one.

    A program that was exported in training and keeps some norms in evaluation counts as one of training.
    """
    modes = {_mode_of(node) for node in graph.nodes} - {None}
    return True in modes if modes else None


def _mode_of(node: fx.Node) -> bool | None:
    """The mode in which a model makes such a call, or None where it makes the same one in both.

    A norm takes the statistics of its batch in training, or wherever it has counted none. Random numbers are drawn in
    training: of an operator without a flag, such as what a decomposition leaves of a dropout, nothing else tells.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    operator = _operator(node)
    given, draws = _named_arguments(node, operator), operator is not None and _DRAWS in operator.tags
    flag: Any = next((given[name] for name in _FLAGS if name in given), True if draws else None)
    if _STATISTICS in given:
        flag = "_no_" not in target_name(node) if flag is None else flag
        acts = given[_STATISTICS] is not None
    else:
        rates = [given[name] for name in _RATES if name in given]
        # a function that is not torch's has its flag for a reason
        drops = draws or operator is None or operator.namespace != "aten"
        acts = drops and all(isinstance(rate, int | float) and rate != 0 for rate in rates)
    return flag if acts and isinstance(flag, bool) else None


def _operator(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that a node calls, be it by a builtin function of torch or a method; None for a Python function."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target
    if inspect.isfunction(node.target):
        return None
    packet: Any = getattr(torch.ops.aten, target_name(node), None)
    return getattr(packet, next(iter(packet))) if isinstance(packet, torch._ops.OpOverloadPacket) else None


def _named_arguments(node: fx.Node, operator: torch._ops.OpOverload | None) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults; none where nothing tells their names."""
    if operator is not None:
        schema = operator._schema.arguments
        given = {a.name: a.default_value for a in schema} | dict(zip([a.name for a in schema], node.args, strict=False))
        return given | node.kwargs
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return bound.arguments


def _without_copies(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute; which results need a copy to be contiguous differs with attention's implementation."""
    return [node for node in graph.nodes if node.target is not _COPY]


def _source(node: fx.Node) -> fx.Node:
    while node.target is _COPY:
        node = node.all_input_nodes[0]
    return node


def _has_copy(node: fx.Node) -> bool:
    return any(user.target is _COPY for user in node.users)


def _arguments(node: fx.Node) -> Any:
    """A dict of the arguments of a node by place or keyword; of an aten operator all of them by name, defaults filled in."""
    given: dict[Key, Any] = dict([*enumerate(node.args), *node.kwargs.items()])
    if not isinstance(node.target, torch._ops.OpOverload):
        return given
    return dict(_named_arguments(node, node.target))


def _set_argument(node: fx.Node, key: Key, value: fx.Node) -> None:
    if isinstance(node.target, torch._ops.OpOverload):
        place = [a.name for a in node.target._schema.arguments].index(str(key))
        key = place if place < len(node.args) else key
    if isinstance(key, int):
        node.update_arg(key, value)
    else:
        node.update_kwarg(key, value)

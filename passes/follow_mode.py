"""Let one graph compute what a model computes in training and in evaluation mode.

A trace freezes the mode. Where two traces of one model differ in constants alone, one graph that reads the flag does for both:

    training:    dropout(x, 0.1, True)          flag = get_attr[training]
    evaluation:  dropout(x, 0.1, False)    ->   dropout(x, 0.1, flag)

    training:    attention(q, k, v, None, 0.1)      p = by_mode(flag, 0.1, 0.0)
    evaluation:  attention(q, k, v)            ->   attention(q, k, v, None, p)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from misscompile.passes.linear_calls import operand
from misscompile.record.words import Scope

Constant = bool | int | float | None

_COPY = torch.ops.aten.contiguous.default


def follow_mode(scope: Scope) -> int:
    """Rewrite `scope.graph`, that of training mode, so that it reads the attribute `training` of its module.

    `scope.follows_mode` says whether that was possible. Where it and `scope.evaluation` differ in more than constants (a
    batch norm that counts its batches, a branch on the mode), the graph is left alone.

    Returns:
        The number of calls that read the mode.
    """
    changes = None if scope.evaluation is None else _changes(scope.graph, scope.evaluation)
    if changes is None:
        return 0
    scope.follows_mode = True
    if changes:
        graph = scope.graph
        graph.owning_module = None  # which would warn of an attribute that is no tensor
        with graph.inserting_before(next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))):
            flag = graph.get_attr("training")
        for node, values, others in changes:
            with graph.inserting_before(node):
                arguments = [_choose(graph, flag, a, b) for a, b in zip(values, others, strict=True)]
            _set_arguments(node, arguments)
    return len(changes)


def _changes(training: fx.Graph, evaluation: fx.Graph) -> list[tuple[fx.Node, list[Any], list[Any]]] | None:
    """Each node of `training` whose constants differ, with its arguments in both modes; None where more differs."""
    left_nodes, right_nodes = _without_copies(training), _without_copies(evaluation)
    if len(left_nodes) != len(right_nodes):
        return None
    names = dict(zip(right_nodes, left_nodes, strict=True))
    changes: list[tuple[fx.Node, list[Any], list[Any]]] = []
    for right, left in names.items():
        if (left.op, str(left.target)) != (right.op, str(right.target)) or (_has_copy(right) and not _has_copy(left)):
            return None
        values = _arguments(left)
        others = fx.node.map_arg(_arguments(right), lambda node: names[_source(node)])
        compared = fx.node.map_arg(values, _source)
        if len(values) != len(others):
            return None
        if compared == others or left.op == "call_module":
            continue
        if any(a != b and not _are_constants(a, b) for a, b in zip(compared, others, strict=True)):
            return None
        changes.append((left, values, [b if a != b else v for a, b, v in zip(compared, others, values, strict=True)]))
    return changes


def by_mode(training: bool, train_value: Constant, eval_value: Constant) -> Constant:
    """The constant of the mode."""
    return train_value if training else eval_value


_MODE_FLAGS: tuple[tuple[set[Any], int, str], ...] = (
    ({torch.ops.aten.dropout.default}, 2, "train"),
    ({F.dropout, F.alpha_dropout, F.feature_alpha_dropout}, 2, "training"),
    ({torch.ops.aten.batch_norm.default, F.batch_norm}, 5, "training"),
    ({torch.ops.aten.scaled_dot_product_attention.default, F.scaled_dot_product_attention}, 4, "dropout_p"),
)
"""Calls that compute something else in training: the place of the flag, or of a rate that is zero in evaluation."""


def frozen_mode(graph: fx.Graph) -> bool | None:
    """The mode that is written into the nodes of a graph, or None where nothing in it depends on one."""
    for node in graph.nodes:
        for targets, position, keyword in _MODE_FLAGS:
            if node.target in targets:
                flag = operand(node, position, keyword)
                rate = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
                acts = rate != 0 if keyword != "dropout_p" else bool(flag)
                if isinstance(flag, bool | float) and acts:
                    return bool(flag)
    return None


def _without_copies(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute; which results need a copy to be contiguous differs with attention's implementation."""
    return [node for node in graph.nodes if node.target is not _COPY]


def _source(node: fx.Node) -> fx.Node:
    while node.target is _COPY:
        node = node.all_input_nodes[0]
    return node


def _has_copy(node: fx.Node) -> bool:
    return any(user.target is _COPY for user in node.users)


def _choose(graph: fx.Graph, flag: fx.Node, train_value: Any, eval_value: Any) -> Any:
    if train_value is eval_value or train_value == eval_value:
        return train_value
    if (train_value, eval_value) == (True, False):
        return flag
    return graph.call_function(by_mode, (flag, train_value, eval_value))


def _are_constants(*values: Any) -> bool:
    return all(isinstance(value, Constant) for value in values)


def _arguments(node: fx.Node) -> list[Any]:
    """The arguments of a node; of an aten operator all of them in the order of its schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *(value for _, value in sorted(node.kwargs.items()))]
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(a.name, a.default_value) for a in node.target._schema.arguments]


def _set_arguments(node: fx.Node, values: list[Any]) -> None:
    if not isinstance(node.target, torch._ops.OpOverload):
        node.args = tuple(values[: len(node.args)])
        node.kwargs = dict(zip(sorted(node.kwargs), values[len(node.args) :], strict=True))
        return
    schema = node.target._schema.arguments
    node.args = tuple(value for a, value in zip(schema, values, strict=True) if not a.kwarg_only)
    node.kwargs = {
        a.name: value for a, value in zip(schema, values, strict=True) if a.kwarg_only and value != a.default_value
    }

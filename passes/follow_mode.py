"""Let one graph compute what a model computes in training and in evaluation mode.

A trace freezes the mode. Two traces of one model that differ in constants alone become one graph that reads the flag:

    training:    dropout(x, 0.1, True)          flag = get_attr[training]
    evaluation:  dropout(x, 0.1, False)    ->   dropout(x, 0.1, flag)

    training:    attention(q, k, v, None, 0.1)      p = by_mode(flag, 0.1, 0.0)
    evaluation:  attention(q, k, v)            ->   attention(q, k, v, None, p)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

Constant = bool | int | float | None

_COPY = torch.ops.aten.contiguous.default


def follow_mode(training: fx.Graph, evaluation: fx.Graph) -> bool:
    """Rewrite `training` so that it follows the attribute `training` of its module; whether that was possible.

    Args:
        training: the graph of the model in training mode; rewritten, or left alone when the two differ in more than
            constants (a batch norm that counts its batches, a branch on the mode).
        evaluation: the graph in evaluation mode.
    """
    left_nodes, right_nodes = _without_copies(training), _without_copies(evaluation)
    if len(left_nodes) != len(right_nodes):
        return False
    pairs = list(zip(left_nodes, right_nodes, strict=True))
    names = {right: left for left, right in pairs}
    changes: list[tuple[fx.Node, list[Any], list[Any]]] = []
    for left, right in pairs:
        if (left.op, str(left.target)) != (right.op, str(right.target)):
            return False
        if _has_copy(right) and not _has_copy(left):
            return False
        values = _arguments(left)
        others = fx.node.map_arg(_arguments(right), lambda node: names[_source(node)])
        compared = fx.node.map_arg(values, _source)
        if len(values) != len(others):
            return False
        if compared == others or left.op == "call_module":
            continue
        if any(a != b and not _are_constants(a, b) for a, b in zip(compared, others, strict=True)):
            return False
        changes.append((left, values, [b if a != b else v for a, b, v in zip(compared, others, values, strict=True)]))
    if changes:
        first = next(node for node in training.nodes if node.op not in ("placeholder", "get_attr"))
        training.owning_module = None  # which would warn of an attribute that is no tensor
        with training.inserting_before(first):
            flag = training.get_attr("training")
        for node, values, others in changes:
            with training.inserting_before(node):
                arguments = [_choose(training, flag, a, b) for a, b in zip(values, others, strict=True)]
            _set_arguments(node, arguments)
    return True


def by_mode(training: bool, train_value: Constant, eval_value: Constant) -> Constant:
    """The constant of the mode."""
    return train_value if training else eval_value


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

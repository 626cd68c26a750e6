"""Compute each shard sum of a whole graph once.

    s1 = x.unflatten(-1, (n, r)).sum(-2)     for q            s1 = x.unflatten(-1, (n, r)).sum(-2)
    s2 = x.unflatten(-1, (n, r)).sum(-2)     for k     ->     (q, k and v read s1)
    s3 = x.unflatten(-1, (n, r)).sum(-2)     for v

Sites that read one input (q, k, v; gate, up) with one rank have equal nodes; eager execution computes and keeps each of
them, AOTAutograd already merges them. Nodes that draw random numbers are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from misscompile.plan import ModelScope


def share_sums(scope: ModelScope) -> None:
    """Replace each inserted node by an earlier inserted one that computes the same of the same operands."""
    first: dict[Any, fx.Node] = {}
    for node in list(scope.graph.nodes):
        if "misscompile" not in node.meta or node.op == "output" or _is_random(node):
            continue
        key = _key(node)
        earlier = first.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            scope.graph.erase_node(node)


def _key(node: fx.Node) -> Any:
    return node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items()))  # a node prints as its name


def _is_random(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    return "drop" in (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))

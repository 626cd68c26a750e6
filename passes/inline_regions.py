"""Put the regions without gradients of an exported graph back in line.

    y = wrap_with_set_grad_enabled(False, submodule, x)     ->   t = cos(x)
    c = y[0]                                                     c = detach(t)

`torch.export` makes a sub-graph of what a model does under `torch.no_grad` (rotary embeddings, for example).
`torch.compile` refuses one that reads a dynamic size, and no pass sees into it. A detached result is the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from misscompile.record.words import Scope

aten = torch.ops.aten


def inline_regions(scope: Scope) -> int:
    """Inline every such region of `scope.graph`, but none that holds others; returns how many."""
    regions = [(node, region) for node in scope.graph.nodes if (region := _region(scope.root, node)) is not None]
    for node, region in regions:
        _inline(scope.graph, node, region.graph)
    return len(regions)


def _region(root: nn.Module, node: fx.Node) -> fx.GraphModule | None:
    if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled or node.args[0] is not False:
        return None
    name = str(getattr(node.args[1], "target", ""))
    inner = root._modules.get(name)
    if not isinstance(inner, fx.GraphModule) or any(user.target is not operator.getitem for user in node.users):
        return None
    nested = any(isinstance(found.target, torch._ops.HigherOrderOperator) for found in inner.graph.nodes)
    return None if nested or any(found.op == "get_attr" for found in inner.graph.nodes) else inner


def _inline(graph: fx.Graph, node: fx.Node, inner: fx.Graph) -> None:
    placeholders = [found for found in inner.nodes if found.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(placeholders, node.args[2:], strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(inner, mapping)
        for user in list(node.users):
            result = results[user.args[1]]
            if isinstance(result, fx.Node) and isinstance(result.meta.get("val"), torch.Tensor):
                meta = dict(result.meta)
                result = graph.call_function(aten.detach.default, (result,))
                result.meta = meta
            user.replace_all_uses_with(result)
            graph.erase_node(user)
    source = node.args[1]
    graph.erase_node(node)
    if isinstance(source, fx.Node) and not source.users:
        graph.erase_node(source)

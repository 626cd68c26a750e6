"""Take the updates out of a graph that was exported while it was adapted.

    y = linear(x, W + ΔW(W, B))  ->   y = linear(x, W)                     restore_weights
    z = y + sum_shards(x) @ D    ->   y            wherever z was read     strip_updates

Which nodes belong to an update is told by the tags that `insert_updates` left in `node.meta["custom"]`: `torch.export`
gives them to every operation that it makes of a node, and keeps them on disk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from misscompile.passes.insert_updates import TAG
from misscompile.passes.linear_calls import match_linear
from misscompile.passes.weight_paths import WeightError, passes_weight, trace_weight
from misscompile.record.walk import join
from misscompile.record.words import Block, Scope

aten = torch.ops.aten
_CHECK = aten._assert_tensor_metadata.default


def tagged_blocks(graph: fx.Graph) -> dict[tuple[str, str], Block]:
    """The blocks that act in a graph, by owner's name and adapter."""
    found = {}
    for node in graph.nodes:
        for fields in _tag(node).get("blocks", ()):
            block = Block(**{name: value for name, value in fields.items() if name != "owner"})
            found[fields["owner"], block.adapter] = block
    return found


def tagged_copies(graph: fx.Graph) -> dict[str, str]:
    """What stands for a tensor of the base in a graph, with the name of that tensor."""
    return {copied: tensor for node in graph.nodes for tensor, copied in _tag(node).get("copies", ())}


def restore_weights(scope: Scope) -> int:
    """Give each call that takes `W + ΔW` in one product its weight back; returns how many such calls there are."""
    count = 0
    for node in scope.graph.nodes:
        call = match_linear(node) if _tag(node) else None
        if call is None:
            continue
        total = call.weight
        while passes_weight(total):
            total = total.all_input_nodes[0]
        if total.target is not aten.add.Tensor or not isinstance(weight := total.args[0], fx.Node):
            continue
        try:
            trace_weight(weight, scope.root)
        except WeightError:  # a sum of updates, in the second product of a call whose first takes the weight
            continue
        total.replace_all_uses_with(weight)
        count += 1
    return count


def strip_updates(scope: Scope) -> int:
    """Let what read the result of an update read the output of the call, and remove the update; returns how many calls."""
    regions: dict[str, list[fx.Node]] = {}
    for node in scope.graph.nodes:
        if tag := _tag(node):
            regions.setdefault(tag["call"], []).append(node)
    blocks = {join(owner, block.parameter) for (owner, _), block in tagged_blocks(scope.graph).items()}
    calls = {site.node for site in scope.sites}
    for region in regions.values():
        inside = set(region)
        ends = [node for node in region if any(user not in inside and user.target is not _CHECK for user in node.users)]
        output = next((_output_like(node, ends[-1]) for node in region if node in calls), None) if ends else None
        if output is None:
            continue
        for user in [user for user in ends[-1].users if user not in inside]:
            user.replace_input_with(ends[-1], output)
        _erase_unread(scope.graph, region)
    _erase_unread(scope.graph, [node for node in scope.graph.nodes if node.op == "get_attr" and node.target in blocks])
    for node in scope.graph.nodes:
        node.meta.pop(TAG, None)
        node.meta["custom"] = {key: value for key, value in node.meta.get("custom", {}).items() if key != TAG}
    return len(regions)


def _tag(node: fx.Node) -> dict[str, Any]:
    return (node.meta.get("custom") or {}).get(TAG) or {}


def _output_like(call: fx.Node, end: fx.Node) -> fx.Node | None:
    """The output of a call in the shape of `end`: itself, or the view that a decomposition put behind it."""
    node: fx.Node | None = call
    while node is not None and _shape(node) != _shape(end):
        node = next((user for user in node.users if passes_weight(user)), None)
    return node


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(value.shape) if isinstance(value, Tensor) else ""


def _erase_unread(graph: fx.Graph, region: list[fx.Node]) -> None:
    """Remove the nodes of a region that nothing reads any more, and the checks that an export put on them."""
    for node in reversed(region):
        if all(user.target is _CHECK for user in node.users):
            for unread in [*node.users, node]:
                graph.erase_node(unread)

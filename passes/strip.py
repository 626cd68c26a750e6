"""Take the updates out of a graph that was exported while it was adapted.

    z = y + shard_sum(x) @ D     ->   y            wherever z was read
    y = linear(x, W + ΔW(W, B))  ->   y = linear(x, W)

The end of an update is found by the tags that the insert pass left in `node.meta["custom"]`, which `torch.export` keeps.
Where they were lost, by structure: it is the first value after `y` through which everything that `y` reaches goes, that has
its shape, and in whose making every block of the site took part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from misscompile.passes.find_calls import find_calls
from misscompile.passes.match import match_linear
from torch import Tensor, fx

from misscompile.plan import ModelScope

aten = torch.ops.aten
_CHECKS = {aten._assert_tensor_metadata.default}
_TURNS = {aten.t.default, aten.transpose.int, aten.numpy_T.default, aten.permute.default}


def strip_updates(scope: ModelScope) -> dict[str, float]:
    """Rewrite `scope.graph` to that of the base; the sites of the scope are those of the base then.

    Returns:
        The dropout rate in front of each block, by its `get_attr` target; without those where there is none.
    """
    _strip_weights(scope)
    find_calls(scope)
    acting: dict[fx.Node, set[str]] = {}
    count: dict[str, int] = {}
    for site in scope.sites:
        index = count[site.owner] = count.get(site.owner, -1) + 1
        acting.setdefault(site.node, set()).update((site.owner, f"{site.owner}#{index}"))
    rates: dict[str, float] = {}
    for node, owners in acting.items():
        end, region = _find_update(scope.graph, node, owners)
        if end is not None:
            dropped = [member.args[1] for member in region if member.target is aten.dropout.default]
            blocks = [str(member.target) for member in region if is_block(member)]
            rates.update(dict.fromkeys(blocks, float(str(dropped[0]))) if dropped else {})
            for user in [user for user in end.users if user not in region]:
                user.replace_input_with(end, node)
            _erase(scope.graph, region)
    find_calls(scope)
    return rates


def is_block(node: fx.Node) -> bool:
    """Whether `node` reads a block."""
    return node.op == "get_attr" and str(node.target).rpartition(".")[2].startswith("miss_block_")


def block_owner(target: str) -> str:
    """The name of the module whose block a `get_attr` target is."""
    return target.rpartition(".")[0]


def _strip_weights(scope: ModelScope) -> None:
    """Give each call whose weight operand is made of a weight and blocks the weight itself."""
    find_calls(scope)
    plain = {site.owner for site in scope.sites}
    made = _made_of_parameters(scope.graph)
    for node in scope.graph.nodes:
        call = match_linear(node)
        if call is None or call.weight not in made:
            continue
        region = [*_ancestors(scope.graph, call.weight), call.weight]
        owners = {block_owner(str(member.target)).partition("#")[0] for member in region if is_block(member)}
        if owners and not owners & plain:  # else it is the second product of a call that has its plain weight
            base = _base_operand(scope.graph, call.weight)
            node.replace_input_with(call.weight, base)
            kept = {base, *_ancestors(scope.graph, base)}
            _erase(scope.graph, [member for member in region if member not in kept])


def _base_operand(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """`W` as the call took it, of `W + ΔW(W, B)` or of `(Wᵀ + ΔW(Wᵀ, B))ᵀ`."""
    turned, found = 0, weight
    while any(is_block(source) for source in _ancestors(graph, found)):
        plain = [s for s in found.all_input_nodes if not is_block(s) and not any(map(is_block, _ancestors(graph, s)))]
        turned += found.target in _TURNS
        found = plain[0] if plain else found.all_input_nodes[0]
    return found.all_input_nodes[0] if turned % 2 and found.target in _TURNS else found


def _find_update(graph: fx.Graph, y: fx.Node, owners: set[str]) -> tuple[fx.Node | None, list[fx.Node]]:
    """The node that stands for the output of a call, and everything between the two, in the order of the graph."""
    before = {y, *_ancestors(graph, y)}
    tagged = any(_tagged_site(user) in owners for user in y.users)
    blocks = {node for node in graph.nodes if is_block(node) and block_owner(str(node.target)) in owners}
    if not tagged and not blocks:
        return None, []
    made = _made_of_parameters(graph)
    end: fx.Node | None = None
    for cut in _cuts(graph, y):
        if tagged:
            if _tagged_site(cut) not in owners:
                break
            end = cut
        elif _same_shape(cut, y):
            region = [member for member in _ancestors(graph, cut) if member not in before]
            if blocks <= _blocks_acting([*region, cut], made, graph):
                end = cut
                break
    if end is None:
        return None, []
    return end, [member for member in (*_ancestors(graph, end), end) if member not in before]


def _cuts(graph: fx.Graph, y: fx.Node) -> Iterator[fx.Node]:
    """The nodes through which everything that `y` reaches goes, in the order of the graph."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    frontier = {user for user in y.users if user.target not in _CHECKS}
    while frontier:
        first = min(frontier, key=place.__getitem__)
        if len(frontier) == 1:
            yield first
        frontier.remove(first)
        frontier.update(user for user in first.users if user.target not in _CHECKS)


def _made_of_parameters(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are computed from parameters alone."""
    made: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and made.issuperset(inputs)):
            made.add(node)
    return made


def _blocks_acting(region: list[fx.Node], made: set[fx.Node], graph: fx.Graph) -> set[fx.Node]:
    """The blocks that meet data inside of a region."""
    met = {source for member in region if member not in made for source in member.all_input_nodes if source in made}
    return {member for source in met for member in (source, *_ancestors(graph, source)) if is_block(member)}


def _ancestors(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Everything that `node` is computed from, in the order of the graph."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return [member for member in graph.nodes if member in seen]


def _erase(graph: fx.Graph, region: list[fx.Node]) -> None:
    """Remove the nodes of a region that nothing reads any more, and the checks that an export put on them."""
    for node in reversed(region):
        for user in [user for user in node.users if user.target in _CHECKS]:
            graph.erase_node(user)
        if not node.users and not node._erased:
            graph.erase_node(node)


def _tagged_site(node: fx.Node) -> str | None:
    tag = (node.meta.get("custom") or {}).get("misscompile")
    return tag["site"] if tag else None


def _same_shape(node: fx.Node, other: fx.Node) -> bool:
    value, like = node.meta.get("val"), other.meta.get("val")
    return isinstance(value, Tensor) and isinstance(like, Tensor) and str(value.shape) == str(like.shape)

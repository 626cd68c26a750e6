"""Give calls of one weight a weight each, where a merge folds a block of its own into every call.

y1 = linear(x1, W)          y1 = linear(x1, W#0)
y2 = linear(x2, W)    ->    y2 = linear(x2, W#1)
"""

from __future__ import annotations

from misscompile.passes.weight_paths import passes_weight
from misscompile.record.words import Scope


def call_name(name: str, call: int) -> str:
    """The name of the module or parameter that one of several calls has for itself."""
    return f"{name}#{call}"


def unshare_weights(scope: Scope) -> int:
    """Let each site with a `call` read the parameter, or call the module, of that call's name; returns how many calls."""
    sites = {site.node: site for site in scope.sites if site.call is not None}  # q, k and v may be parts of one call
    for node, site in sites.items():
        assert site.call is not None
        if node.op == "call_module":
            node.target = call_name(str(node.target), site.call)
            continue
        assert site.weight is not None
        chain = [site.weight]
        while chain[-1].op != "get_attr":
            chain.append(chain[-1].all_input_nodes[0])
        with scope.graph.inserting_before(node):
            new = scope.graph.get_attr(call_name(str(chain[-1].target), site.call))
            new.meta = dict(chain[-1].meta)
            for link in reversed(chain[:-1]):
                taken = {link.all_input_nodes[0]: new}
                new = scope.graph.node_copy(link, taken.__getitem__)
        node.replace_input_with(site.weight, new)
    return len(sites)


def drop_unread(scope: Scope) -> int:
    """Remove the reads of the unshared weights, and their views, that no call reads any more; returns how many nodes."""
    unshared = {site.path.parameter for site in scope.sites if site.call is not None and site.path is not None}
    views = [node for node in scope.graph.nodes if node.op == "get_attr" and node.target in unshared]
    for view in views:
        views += [user for user in view.users if passes_weight(user) and user.all_input_nodes[0] is view]
    unread = 0
    for node in reversed(views):
        if not node.users:
            scope.graph.erase_node(node)
            unread += 1
    return unread

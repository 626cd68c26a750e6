"""Let each call read a tensor by the name under which its own module holds it.

    w = get_attr[head.weight]                         v = get_attr[embed.weight]
    e = embedding(w, ids)        in `embed`     ->    e = embedding(v, ids)
    y = linear(e, w)             in `head`            w = get_attr[head.weight]
                                                      y = linear(e, w)

`torch.export` reads a tied tensor under one of its names, the last. An adapter acts on a module, and what it trains in full
stands under the name that this module gives it. A module that has several names itself goes by the first.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from misscompile.passes.owner_names import module_stack
from misscompile.passes.weight_paths import find_parameter
from misscompile.record.walk import join, named_modules
from misscompile.record.words import Scope


def name_reads(scope: Scope) -> int:
    """Rename what `scope.graph` reads or calls under the name of another module; returns in how many places it did."""
    first, canonical = dict[nn.Module, str](), dict[str, str]()
    for name, module in named_modules(scope.root, remove_duplicate=False).items():
        canonical[name] = first.setdefault(module, name)
    calls = [node for node in scope.graph.nodes if node.op == "call_module" and node.target in canonical]
    aliased = [node for node in calls if canonical[node.target] != node.target]
    for node in aliased:
        node.target = canonical[node.target]
    names, renamed = _names_by_tensor(first), []
    reads = {str(node.target): node for node in reversed(scope.graph.nodes) if node.op == "get_attr"}
    for node in [node for node in scope.graph.nodes if node.op == "get_attr"]:
        held_as = names.get(id(find_parameter(scope.root, node.target)), [node.target])
        for user in list(node.users) if held_as != [node.target] else ():
            name = _name_for(user, str(node.target), held_as, canonical)
            if name != node.target:
                user.replace_input_with(node, _read(scope.graph, reads, name, node))
                renamed.append(node)
    for node in dict.fromkeys(renamed):
        if not node.users:
            scope.graph.erase_node(node)
    return len(aliased) + len(renamed)


def _names_by_tensor(modules: dict[nn.Module, str]) -> dict[int, list[str]]:
    """Every name of each parameter and buffer, in the order of the model, by `id`."""
    names: dict[int, list[str]] = {}
    for module, name in modules.items():
        registries: list[dict[str, Tensor | None]] = [module._parameters, module._buffers]  # type: ignore[list-item]
        for registry in registries:
            for held, tensor in registry.items():
                if tensor is not None:
                    names.setdefault(id(tensor), []).append(join(name, held))
    return names


def _name_for(user: fx.Node, read: str, names: list[str], canonical: dict[str, str]) -> str:
    """The name of a tensor in the innermost module around a call that holds it, or has modules inside that do.

    Of several inside, the one that the graph reads, or the first.
    """
    for path, _ in reversed(module_stack(user)):
        module = canonical.get(path, path)
        prefix = f"{module}." if module else ""
        inside = [name for name in names if name.startswith(prefix)]
        if inside:
            return read if read in inside else inside[0]
    return read if read in names else names[0]


def _read(graph: fx.Graph, reads: dict[str, fx.Node], name: str, like: fx.Node) -> fx.Node:
    """The node that reads `name`, where it stands in front of `like` or is made behind it."""
    if name not in reads or like < reads[name]:
        with graph.inserting_after(like):
            reads[name] = graph.get_attr(name)
        reads[name].meta = dict(like.meta)
    return reads[name]

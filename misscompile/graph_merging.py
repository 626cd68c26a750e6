"""What `merge` does on whole graphs.

    q = linear(x, W) + shard_sum(x) @ D    ->   q = linear(x, W')        W' = round(W + ΔW), a new parameter

The values that a graph shares with the model it was made from are never written. A weight whose calls have a block each is
unshared: every call reads a parameter of its own, `<parameter>#0`, `<parameter>#1`, ….
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from misscompile import variants
from misscompile.errors import MergeError
from misscompile.graphs import Kept, WholeGraph, call_names, call_owner, copy_nodes, find_graph_sites, owner_state, record_of
from misscompile.passes.find_calls import find_calls
from misscompile.passes.match import apply_steps, passes_weight
from misscompile.passes.merge import check_finite
from misscompile.plan import Block, ModelScope, Site, WeightPath
from misscompile.state import STATE


@dataclasses.dataclass
class Part:
    """The part of a parameter that the calls of one owner read, and the blocks that fold into it."""

    owner: str
    path: WeightPath
    blocks: tuple[Block, ...]
    sites: list[Site]


@dataclasses.dataclass
class GraphFold:
    """One new parameter: that of the base with every part folded in, for all calls or for the one with this number."""

    parameter: str
    parts: list[Part]
    call: int | None


def plan_graph_folds(root: WholeGraph, names: Sequence[str]) -> list[GraphFold]:
    """What merging the adapters `names` will write, checked against every other use of the weights.

    Raises:
        MergeError: a weight is used where no adapter acts, or a 'bat' adapter that stays active depends on it.
    """
    scope = find_graph_sites(root)
    folds: dict[object, GraphFold] = {}
    adapted: list[Part] = []
    for name, calls in call_names(scope).items():
        owners: list[tuple[str, list[Site], int | None]] = [(name, calls, None)]
        owners += [(call_owner(name, index), [site], index) for index, site in enumerate(calls)]
        for owner, sites, call in owners:
            part = _part(root, owner, sites, names)
            if part is not None:
                _check_clonable(root, part, call)
                weight = root.get_parameter(part.path.parameter)
                fold = folds.setdefault((id(weight), call), GraphFold(part.path.parameter, [], call))
                if all(part.path.steps != other.path.steps for other in fold.parts):  # tied names share their block
                    _check_apart(weight, part, fold.parts)
                    fold.parts.append(part)
                adapted.append(part)
    for part in adapted:
        _check_uses(root, scope, part, adapted)
    return list(folds.values())


def fold_parameter(root: WholeGraph, fold: GraphFold) -> Tensor:
    """The merged value, in the dtype and layout of the parameter: `round(W + ΔW)` over all of its parts.

    Raises:
        MergeError: it holds a value that is not finite, or the parameter has no values.
    """
    stored = root.get_parameter(fold.parameter)
    if stored.is_meta:
        raise MergeError(f"{fold.parameter}: it is on the meta device; load it first.")
    blocks = [
        (part, block, root.get_submodule(part.owner).get_parameter(block.parameter))
        for part in fold.parts
        for block in part.blocks
    ]
    wide = torch.float32
    for tensor in (stored, *(parameter for *_, parameter in blocks)):
        wide = torch.promote_types(wide, tensor.dtype)
    base = stored.detach().to(wide).contiguous()
    merged = base.clone()
    for part, block, parameter in blocks:
        target, weight = apply_steps(merged, part.path.steps), apply_steps(base, part.path.steps)
        target += variants.delta_weight(block.variant, parameter.detach().to(wide), weight)
    adapters = dict.fromkeys(block.adapter for _, block, _ in blocks)
    rounded = merged.to(stored.dtype)
    check_finite(rounded, fold.parameter, list(adapters))
    return rounded


def write_folds(root: WholeGraph, folds: Sequence[GraphFold], values: Sequence[Tensor]) -> None:
    """Put the merged values in the place of the base parameters."""
    shared = [(fold, value) for fold, value in zip(folds, values, strict=True) if fold.call is None]
    unshared = [(fold, value) for fold, value in zip(folds, values, strict=True) if fold.call is not None]
    for fold, value in shared:
        stored, merged = root.get_parameter(fold.parameter), nn.Parameter(value, requires_grad=False)
        for module in root.modules():
            held = [name for name, parameter in module._parameters.items() if parameter is stored]
            module._parameters.update(dict.fromkeys(held, merged))
    if unshared:
        record = record_of(root)
        record.base = copy_nodes(record.base)  # copies of this module hold the other one
        scope = ModelScope(root, record.base)
        find_calls(scope)
        calls = call_names(scope)
        for fold, value in unshared:
            assert fold.call is not None
            merged = nn.Parameter(value, requires_grad=False)
            sites = [calls[part.owner.rpartition("#")[0]][fold.call] for part in fold.parts]
            for site in {site.node: site for site in sites}.values():  # q, k and v may be parts of one call
                _unshare(root, scope.graph, site, fold, merged)
        _drop_unread(root, scope.graph, {fold.parameter for fold, _ in unshared})


def keep_unmerged(root: WholeGraph) -> Kept:
    """The base graph and every parameter as they are now, by the module that holds them."""
    return Kept(record_of(root).base, {name: dict(module._parameters) for name, module in root.named_modules()})


def swap_unmerged(root: WholeGraph) -> None:
    """Exchange what a merge wrote with what `keep_unmerged` kept; nothing where no merge is to be undone."""
    record = record_of(root)
    kept: Kept | None = record.kept
    if kept is None:
        return
    now = keep_unmerged(root)
    for name, module in root.named_modules():
        registered = [key for key in module._parameters if key.startswith("miss_")]  # blocks may have been trained since
        held = kept.parameters.get(name, {})
        module._parameters.clear()
        module._parameters.update({**held, **{key: now.parameters[name][key] for key in registered}})
    record.base, record.kept = kept.base, now


def merged_parameters(root: WholeGraph) -> dict[str, Tensor]:
    """The parameters that a merge wrote, by name."""
    kept = record_of(root).kept
    if kept is None:
        return {}
    base = {id(parameter) for held in kept.parameters.values() for parameter in held.values()}
    return {name: p for name, p in root.named_parameters() if id(p) not in base and "miss_" not in name}


def _part(root: WholeGraph, owner: str, sites: list[Site], names: Sequence[str]) -> Part | None:
    state, path = owner_state(root, owner), sites[0].path
    if state is None or path is None or not any(name in state.blocks for name in names):
        return None
    stays = [b for b in state.effective_blocks() if b.adapter not in names and b.variant == "bat"]
    if stays:
        raise MergeError(
            f"{owner}: the 'bat' adapter {stays[0].adapter!r} that would stay active is a function of the base weight, "
            "which merging changes. Merge it too, or deactivate it first."
        )
    return Part(owner, path, tuple(state.blocks[name] for name in names if name in state.blocks), sites)


def _check_clonable(root: WholeGraph, part: Part, call: int | None) -> None:
    """Refuse to unshare a module that is one node and has trained copies: each clone would need its own."""
    node = part.sites[0].node
    if call is not None and node.op == "call_module" and STATE in vars(root.get_submodule(str(node.target))):
        raise MergeError(
            f"{part.owner}: its module {node.target!r} is one node of the graph and has trained tensors beside its blocks, "
            "which a merge cannot give to each call. Capture the model with misscompile.capture, or adapt without bias and "
            "modules_to_save."
        )


def _check_apart(weight: Tensor, part: Part, others: Sequence[Part]) -> None:
    """Refuse to add two updates to one element: each call would then compute both."""
    for other in others:
        if _overlap(weight, part.path, other.path):
            raise MergeError(
                f"{part.owner} and {other.owner} read one weight in two forms, each with an adapter of its own: merging "
                "would add both to both. Give one of them a parameter of its own before the model is captured."
            )


def _unshare(root: WholeGraph, graph: fx.Graph, site: Site, fold: GraphFold, merged: nn.Parameter) -> None:
    """Let one call read `merged`, registered beside the weight that the calls had in common."""
    node = site.node
    if node.op == "call_module":
        clone = copy.copy(root.get_submodule(str(node.target)))
        node.target = call_owner(str(node.target), fold.call or 0)
        parent, _, name = node.target.rpartition(".")
        holder = root.get_submodule(node.target)  # of the block of this call: the clone takes its name, and so its record
        state = vars(clone)[STATE] = vars(holder)[STATE]
        state.base_class = type(clone)
        blocks = {key: value for key, value in holder._parameters.items() if key in state.all_registered()}
        clone._parameters = {**clone._parameters, "weight": merged, **blocks}
        root.get_submodule(parent)._modules[name] = clone
        return
    owner, _, name = fold.parameter.rpartition(".")
    own_name = f"{name}#{fold.call}"
    root.get_submodule(owner).register_parameter(own_name, merged)
    assert site.weight is not None
    chain = [site.weight]
    while chain[-1].op != "get_attr":
        chain.append(chain[-1].all_input_nodes[0])
    with graph.inserting_before(node):
        new = graph.get_attr(f"{owner}.{own_name}" if owner else own_name)
        new.meta = dict(chain[-1].meta)
        for link in reversed(chain[:-1]):
            source = link.all_input_nodes[0]
            taken = new
            new = graph.node_copy(link, {source: taken}.__getitem__)
    node.replace_input_with(site.weight, new)


def _drop_unread(root: WholeGraph, graph: fx.Graph, parameters: set[str]) -> None:
    """Remove weights that no call reads any more, and the views of them."""
    views = {node for node in graph.nodes if node.op == "get_attr" and node.target in parameters}
    for node in graph.nodes:
        if passes_weight(node) and node.all_input_nodes[0] in views:
            views.add(node)
    for node in reversed(list(graph.nodes)):
        if node in views and not node.users:
            graph.erase_node(node)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    read |= {f"{node.target}.weight" for node in graph.nodes if node.op == "call_module"}
    for parameter in parameters - read:
        owner, _, name = parameter.rpartition(".")
        del root.get_submodule(owner)._parameters[name]


def _check_uses(root: WholeGraph, scope: ModelScope, part: Part, adapted: Sequence[Part]) -> None:
    """Refuse to write what some node reads beside the adapted calls."""
    weight = root.get_parameter(part.path.parameter)
    ours = {id(site) for other in adapted for site in other.sites}
    for site in scope.sites:
        assert site.path is not None
        other = root.get_parameter(site.path.parameter)
        if other is weight and id(site) not in ours and _overlap(weight, part.path, site.path):
            raise _used_outside(part.owner, f"the call {site.node.name!r} of {site.owner}")
    names = {name for name, parameter in root.named_parameters(remove_duplicate=False) if parameter is weight}
    calls = {site.node for site in scope.sites}
    for node in scope.graph.nodes:
        if node.op == "get_attr" and node.target in names:
            for user in _readers(node):
                if user not in calls:
                    raise _used_outside(part.owner, f"{user.name!r} ({user.target})")
        elif node.op == "call_module" and node not in calls and _holds(root.get_submodule(str(node.target)), weight):
            raise _used_outside(part.owner, f"the module {node.target!r}")


def _holds(module: nn.Module, weight: Tensor) -> bool:
    return any(parameter is weight for parameter in module.parameters())


def _used_outside(owner: str, use: str) -> MergeError:
    return MergeError(
        f"{owner}: its weight is also read by {use}, on which the adapter does not act: merging would change both. Give "
        "one of them a parameter of its own before the model is captured, or adapt both."
    )


def _overlap(weight: Tensor, path: WeightPath, other: WeightPath) -> bool:
    """Whether two paths read an element in common."""
    if path.steps == other.steps:
        return True
    marks = torch.zeros(weight.shape, dtype=torch.bool)
    apply_steps(marks, path.steps).fill_(True)
    return bool(apply_steps(marks, other.steps).any())


def _readers(source: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a parameter, through its views and casts."""
    todo = [source]
    while todo:
        for user in todo.pop().users:
            if passes_weight(user):
                todo.append(user)
            elif user.target is not torch.ops.aten._assert_tensor_metadata.default:  # reads dtype and shape, not values
                yield user

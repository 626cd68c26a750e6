"""From a user's model to its hosts, and what has to follow when records on its modules changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from misscompile.errors import ArgumentError, StateError
from misscompile.hosts.base import Host
from misscompile.hosts.copy_graph import copy_graph
from misscompile.hosts.graphs import GraphHost
from misscompile.hosts.modules import ModuleHost
from misscompile.hosts.owner_class import refresh_owner
from misscompile.hosts.recover import holds_exported_adapters, recover_adapters
from misscompile.hosts.whole_graph import WholeGraph, change_record, derive_graph, swap_base, whole_graphs
from misscompile.record.spread import reshard
from misscompile.record.state import STATE, OwnerState
from misscompile.record.transaction import Undo, swap_kept
from misscompile.record.walk import check_enabled, join, named_modules, owner_states, owners, unwrap_model
from misscompile.record.words import Scope


@torch.inference_mode(False)
def open_host(model: object, verb: str, per_call_site: bool = False) -> Host:
    """What a new adapter goes onto: the model itself below its wrappers, or a copy of a graph.

    Raises:
        ArgumentError: `model` is neither a module nor an exported program, or `per_call_site` is set for a module.
        StateError: the model is inside `disable_adapter`.
    """
    root = model if isinstance(model, torch.export.ExportedProgram) else unwrap_model(model)
    if isinstance(root, fx.GraphModule | torch.export.ExportedProgram):
        if isinstance(root, WholeGraph):
            check_enabled(owner_states(root), verb)  # a copy is never inside
        copied = copy_graph(root)
        if not isinstance(root, WholeGraph):
            recover_adapters(copied)
        return GraphHost(copied, per_call_site)
    if per_call_site:
        raise ArgumentError(
            "per_call_site=True: the calls of a module are seen in a whole graph only; use misscompile.capture first."
        )
    return ModuleHost(root)


def open_adapted(model: object, verb: str) -> nn.Module:
    """The adapted model below its wrappers; of a graph that was exported while adapted, a graph with its adapters."""
    if not holds_exported_adapters(model):
        return unwrap_model(model)
    root = open_host(model, verb).root
    if not owners(root):
        raise StateError(
            "the model has no adapter that its graph tells of. A graph exported from an adapted module tells of none: merge "
            "the module before exporting it, or capture it, adapt the graph and export that."
        )
    return root


def hosts_in(root: nn.Module) -> list[Host]:
    """The hosts of everything that may be adapted in a model: the module tree, and every whole graph in it."""
    graphs: list[Host] = [GraphHost(graph) for graph in whole_graphs(root.modules())]
    return graphs if isinstance(root, WholeGraph) else [ModuleHost(root), *graphs]


def adapted_owners(root: nn.Module) -> dict[str, tuple[Host, str, nn.Module]]:
    """Every owner of a block in a model: the host it belongs to, its name there, and itself."""
    found: dict[str, tuple[Host, str, nn.Module]] = {}
    prefixes: dict[nn.Module, str] = {
        module: name for name, module in named_modules(root).items() if isinstance(module, WholeGraph)
    }
    for host in hosts_in(root):
        prefix = prefixes.get(host.root, "") if host.in_graph else ""
        for name, owner in owners(host.root).items():
            state: OwnerState = vars(owner)[STATE]
            if state.blocks and state.in_graph == host.in_graph:
                found[join(prefix, name)] = host, name, owner
    return found


def refresh(
    root: nn.Module, changed: Mapping[str, nn.Module], scopes: Mapping[nn.Module, Scope | None] | None = None
) -> None:
    """Derive what acts again after records changed: the classes of these owners, and the graphs above them.

    `scopes` are those of the owners, where they are known.
    """
    for name, owner in changed.items():
        refresh_owner(owner, name, scopes.get(owner) if scopes else None)
    if any(vars(owner)[STATE].in_graph for owner in changed.values()):
        refresh_graphs(root)


def parts_of_graphs(root: nn.Module) -> list[nn.Module]:
    """The modules of every whole graph in a model: a merge may register a weight on each."""
    return [module for graph in whole_graphs(root.modules()) for module in graph.modules()]


def refresh_graphs(root: nn.Module) -> None:
    """Derive every whole graph in a model again, after a record on one of its modules changed."""
    for graph in whole_graphs(root.modules()):
        derive_graph(graph)


def check_graphs_whole(root: nn.Module, adapted: Mapping[str, nn.Module], verb: str) -> None:
    """Refuse a verb on a part of a whole graph: what acts there is derived from the graph above.

    Raises:
        StateError: naming the verb and a module.
    """
    inside = {module for graph in whole_graphs(root.modules()) for module in graph.modules()}
    for name, owner in adapted.items():
        if vars(owner)[STATE].in_graph and owner not in inside:
            raise StateError(f"{verb}: {name or 'the model'} is a part of a whole graph; call it on that graph.")


def swap_merged(root: nn.Module, changed: Mapping[str, nn.Module], undo: Undo) -> None:
    """Exchange what a merge wrote on these owners, and in the graphs of the model, with what it kept of the base."""
    if any(vars(owner)[STATE].kept for owner in changed.values()):
        reshard(root)
    for owner in changed.values():
        swap_kept(owner, undo)
    for graph in whole_graphs(root.modules()):
        swap_base(graph)


def forget_kept(root: nn.Module) -> None:
    """Let a merge be undone for good: nothing is kept any more."""
    for owner in root.modules():
        state: OwnerState | None = vars(owner).get(STATE)
        if state is not None:
            state.merged, state.kept = (), {}
    for graph in whole_graphs(root.modules()):
        change_record(graph, kept_base=None)

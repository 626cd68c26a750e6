"""The adapters of a graph that was exported while they acted, read off the tags on its nodes."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from misscompile.errors import StateError
from misscompile.hosts.graph_parts import home_of, other_name
from misscompile.hosts.owner_class import refresh_owner
from misscompile.hosts.whole_graph import WholeGraph, derive_graph, record_of
from misscompile.passes.find_sites import sites_by_name
from misscompile.passes.follow_mode import frozen_mode
from misscompile.passes.runner import RECOVER, run_passes
from misscompile.passes.strip_updates import tagged_blocks, tagged_copies
from misscompile.passes.unshare_weights import call_name
from misscompile.record.state import STATE, OwnerState
from misscompile.record.walk import join, owners
from misscompile.record.words import Adapter, Block, Scope
from misscompile.rules.config import MissConfig


def holds_exported_adapters(model: object) -> bool:
    """Whether `model` is a graph that was exported while adapted, and has no record of it."""
    if isinstance(model, torch.export.ExportedProgram):
        return True
    if not isinstance(model, fx.GraphModule) or isinstance(model, WholeGraph) or owners(model):
        return False
    return bool(tagged_blocks(model.graph))


def recover_adapters(root: WholeGraph) -> None:
    """Write the records of the adapters that act in a foreign graph, and keep the graph without them as its base.

    What an adapter trained in full has taken the place of the base's tensor, which an export leaves out: it is part of
    the base from now on.

    Raises:
        StateError: tags of an update are lost.
    """
    graph = record_of(root).base
    blocks = tagged_blocks(graph)
    if not blocks:
        return
    names = list(dict.fromkeys(adapter for _, adapter in blocks))
    _adopt_copies(root, graph)
    scope = Scope(root, graph, "whole graph")
    run_passes(RECOVER, scope)
    _check_stripped(graph, {join(owner, block.parameter) for (owner, _), block in blocks.items()})
    record_of(root).mode = frozen_mode(graph)  # a dropout of the adapter follows the mode again
    calls = sites_by_name(scope)
    sites = {call_name(name, i): call for name, found in calls.items() for i, call in enumerate(found)}
    sites |= {home_of(root, name): found[0] for name, found in calls.items()}
    adapters = {
        name: Adapter(name, _read_config({owner: b for (owner, adapter), b in blocks.items() if adapter == name}))
        for name in names
    }
    for (owner_name, adapter_name), block in blocks.items():
        owner, site = root.get_submodule(owner_name), sites[owner_name]
        values = owner.get_parameter(block.parameter)
        owner._parameters[block.parameter] = nn.Parameter(values.detach().clone())
        state = vars(owner).get(STATE)
        if state is None:
            state = OwnerState(type(owner), (site.in_features, site.out_features), in_graph=True)
            state.stands_for = other_name(owner_name, site.owner)
            vars(owner)[STATE] = state
        state.blocks[adapter_name], state.adapters[adapter_name] = block, adapters[adapter_name]
        state.active = (*state.active, adapter_name)
    for name, owner in owners(root).items():
        refresh_owner(owner, name)
    derive_graph(root)


def _check_stripped(graph: fx.Graph, blocks: Collection[str]) -> None:
    """Refuse a graph of which an update is left: it lost the tags of some nodes.

    Raises:
        StateError: naming a block that is still read.
    """
    read = next((str(node.target) for node in graph.nodes if node.op == "get_attr" and node.target in blocks), None)
    if read is not None:
        raise StateError(
            f"{read}: not every operation of its update is told apart from those of the base, since the export lost the "
            "tags of some. torch.export.export(..., strict=True) does so: export the adapted graph with strict=False."
        )


def _read_config(blocks: dict[str, Block]) -> MissConfig:
    first = next(iter(blocks.values()))
    start: Any = True if first.variant == "balance" else first.variant
    ranks = {re.escape(owner): block.r for owner, block in blocks.items() if block.r != first.r}
    return MissConfig(
        r=first.r,
        mini_r=first.mini_r,
        miss_dropout=first.dropout,
        init_weights=start,
        target_modules=list(blocks),
        rank_pattern=ranks or None,
    )


def _adopt_copies(root: WholeGraph, graph: fx.Graph) -> None:
    """Give each copy that an adapter trained the name of the tensor it stands for."""
    copies = tagged_copies(graph)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in copies:
            held, name = (target.rpartition(".")[2] for target in (node.target, copies[node.target]))
            owner, node.target = root.get_submodule(node.target.rpartition(".")[0]), copies[node.target]
            registry: dict[str, Any] = owner._parameters if held in owner._parameters else owner._buffers
            if held in registry:  # not renamed by an earlier read
                registry[name] = registry.pop(held)

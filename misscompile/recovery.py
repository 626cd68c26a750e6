"""The adapters of a graph that was exported while they acted, read off its parameters and nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from misscompile.config import MissConfig, Variant
from misscompile.graphs import WholeGraph, call_names, call_owner, derive_graph, find_module, frozen_mode, record_of
from misscompile.passes.strip import block_owner, is_block, strip_updates
from misscompile.plan import Adapter, Block, ModelScope
from misscompile.state import STATE, OwnerState, copy_name, owners

_PREFIX = "miss_block_"


def holds_exported_adapters(model: object) -> bool:
    """Whether `model` is a graph that was exported while adapted, and has no record of it."""
    if isinstance(model, torch.export.ExportedProgram):
        return True
    if not isinstance(model, fx.GraphModule) or isinstance(model, WholeGraph) or owners(model):
        return False
    return any(is_block(node) for node in model.graph.nodes)


def recover_adapters(root: WholeGraph) -> None:
    """Write the records of the adapters that act in a foreign graph, and keep the graph without them as its base.

    Variant and rank are read off the blocks, the dropout rate off the graph. What an adapter trained in full has taken the
    place of the base's tensor, which an export leaves out: it is part of the base from now on.
    """
    graph = record_of(root).base
    acting = {str(node.target) for node in graph.nodes if is_block(node)}
    if not acting:
        return
    names = list(dict.fromkeys(target.rpartition(".")[2].removeprefix(_PREFIX) for target in sorted(acting)))
    _adopt_copies(root, graph, names)
    scope = ModelScope(root, graph)
    rates = strip_updates(scope)
    record_of(root).mode = frozen_mode(graph)  # a dropout of the adapter follows the mode again
    sites = {name: calls[0] for name, calls in call_names(scope).items()}
    sites |= {call_owner(name, i): call for name, calls in call_names(scope).items() for i, call in enumerate(calls)}
    for adapter_name in names:
        blocks: dict[str, Block] = {}
        for owner_name, site in sites.items():
            target = ".".join(part for part in (owner_name, f"{_PREFIX}{adapter_name}") if part)
            module = find_module(root, owner_name)
            if target in acting and module is not None:
                shape = module.get_parameter(f"{_PREFIX}{adapter_name}").shape
                blocks[owner_name] = _read_block(adapter_name, shape, site.out_features, rates.get(target, 0.0))
        adapter = Adapter(adapter_name, _read_config(blocks))
        for owner_name, block in blocks.items():
            owner, site = root.get_submodule(owner_name), sites[owner_name]
            state = vars(owner).get(STATE)
            if state is None:
                state = OwnerState(type(owner), (site.in_features, site.out_features), in_graph=True)
                setattr(owner, STATE, state)
            state.blocks[adapter_name], state.adapters[adapter_name] = block, adapter
            state.active = (*state.active, adapter_name)
    derive_graph(root)


def _read_block(adapter: str, shape: Sequence[int], out_features: int, dropout: float) -> Block:
    """The block that a parameter of this shape is, on a linear with so many outputs."""
    if len(shape) == 3:
        return Block(adapter, "bat", shape[-1], 1, dropout)
    variant: Variant = "balance" if shape[1] == out_features else "mini"
    return Block(adapter, variant, shape[0], shape[1] if variant == "mini" else 1, dropout)


def _read_config(blocks: dict[str, Block]) -> MissConfig:
    first = next(iter(blocks.values()))
    start: Any = True if first.variant == "balance" else first.variant
    return MissConfig(
        r=first.r, mini_r=first.mini_r, miss_dropout=first.dropout, init_weights=start, target_modules=list(blocks)
    )


def _adopt_copies(root: WholeGraph, graph: fx.Graph, adapters: Sequence[str]) -> None:
    """Give each copy that an adapter trained the name of the tensor it stands for."""
    for node in graph.nodes:
        owner_name, held = block_owner(str(node.target)), str(node.target).rpartition(".")[2]
        prefixes = [prefix for name in adapters if held.startswith(prefix := copy_name(name, ""))]
        if node.op == "get_attr" and prefixes:
            owner, name = root.get_submodule(owner_name), held.removeprefix(max(prefixes, key=len))
            registry: dict[str, Any] = owner._parameters if held in owner._parameters else owner._buffers
            registry[name] = registry.pop(held)
            node.target = f"{owner_name}.{name}" if owner_name else name

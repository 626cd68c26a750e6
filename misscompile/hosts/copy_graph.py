"""A `WholeGraph` of a graph of any kind, over the same values: a `GraphModule`, an exported program, or one of ours."""

from __future__ import annotations

import copy
import unicodedata
from typing import Any

import torch
from torch import fx, nn

from misscompile.errors import ArgumentError, CaptureError
from misscompile.hosts.graph_parts import keep_structure
from misscompile.hosts.whole_graph import RECORD, GraphRecord, WholeGraph, copy_graphs_once, copy_nodes
from misscompile.passes.follow_mode import frozen_mode
from misscompile.passes.owner_names import module_stack
from misscompile.passes.runner import CAPTURE, run_passes
from misscompile.record.state import STATE
from misscompile.record.words import Scope

_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "proj_out", "output_projection")


def copy_graph(model: fx.GraphModule | torch.export.ExportedProgram) -> WholeGraph:
    """A `WholeGraph` that computes what `model` computes, on the same values: base tensors are shared, blocks copied.

    Raises:
        ArgumentError: the exported program takes its parameters as inputs and has no module.
    """
    module: Any = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    shared: dict[int, Any] = {}
    by_place: dict[Any, nn.Parameter] = {}
    for held_by in module.modules():
        state = vars(held_by).get(STATE)
        ours = state.all_registered() if state else ()
        computed = (value for value in vars(held_by).values() if isinstance(value, torch.Tensor) and not value.is_leaf)
        shared |= {id(value): value.detach() for value in computed}  # by a hook, before the next call
        for name, parameter in held_by._parameters.items():
            if parameter is not None:
                values = parameter.detach().clone() if name in ours else parameter.detach()
                made = nn.Parameter(values, requires_grad=False)
                shared.setdefault(id(parameter), by_place.setdefault(_place(made), made))
    held = vars(module)
    patched = {name: held.pop(name) for name in ("train", "eval") if name in held}  # torch.export forbids both by instance
    try:
        copied = copy.deepcopy(module, copy_graphs_once(module, shared))
    finally:
        held.update(patched)
    if isinstance(module, WholeGraph):
        return copied  # type: ignore[no-any-return]
    if not isinstance(copied, fx.GraphModule):
        raise ArgumentError(f"model: expected a GraphModule or an ExportedProgram, found {type(model).__name__}.")
    inline_graph(copied)
    root = WholeGraph(copied, copied.graph)
    keep_structure(root, module)
    root.training = module.training
    root.meta = dict(getattr(copied, "meta", {}))
    graph = copy_nodes(copied.graph)
    root.meta[RECORD] = GraphRecord(graph, frozen_mode(graph), outputs=_exported_output_names(graph))
    return root


def _place(parameter: nn.Parameter) -> object:
    """What two parameters have in common if they hold the same values: `torch.export.load` ties no others."""
    if type(parameter) is not nn.Parameter or parameter.layout != torch.strided or not parameter.numel():
        return parameter
    storage = parameter.untyped_storage()._cdata
    return storage, parameter.storage_offset(), parameter.shape, parameter.stride(), parameter.dtype


def inline_graph(module: fx.GraphModule) -> None:
    """Put the regions of a graph that run without gradients in line, in place.

    Raises:
        CaptureError: Python reads a name of the graph as another one.
    """
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op in ("get_attr", "call_module") and (read := unicodedata.normalize("NFKC", name)) != name:
            raise CaptureError(
                f"{name}: Python reads this name as {read!r} in the generated code of a graph, which would not find it. "
                "Rename that module or parameter, or adapt the model itself: misscompile.adapt needs no graph."
            )
    run_passes(CAPTURE, Scope(module, module.graph, "whole graph"))
    module.delete_all_unused_submodules()
    module.recompile()


def _exported_output_names(graph: fx.Graph) -> tuple[str, ...]:
    """The output embedding of a transformers model, as far as an export tells it."""
    stacks = [module_stack(node) for node in graph.nodes]
    roots = {kind for stack in stacks for path, kind in stack[:1] if not path}
    if not any("transformers." in kind for kind in roots):
        return ()
    names = {path for stack in stacks for path, _ in stack}
    return tuple(name for name in sorted(names) if name.rpartition(".")[2] in _OUTPUT_EMBEDDINGS)

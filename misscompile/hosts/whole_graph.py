"""The `GraphModule` that adapters act in, and the derivation of its graph from what is registered on it.

    base graph ─ find_sites ─ insert_updates ─▶ the graph that runs

The base graph is kept in a record on the module and is never rewritten. Whatever changes the set of acting adapters derives
the running graph again, so that adding, switching, disabling and removing are one mechanism, as on ordinary modules.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from misscompile.errors import ArgumentError, StateError
from misscompile.passes.find_sites import find_sites, sites_by_name
from misscompile.passes.follow_mode import frozen_mode
from misscompile.passes.owner_names import module_stack
from misscompile.passes.runner import ADAPT, CAPTURE, run_passes
from misscompile.passes.unshare_weights import call_name
from misscompile.record.state import STATE, OwnerState, convert_kept, forgive_base, swap_kept
from misscompile.record.walk import owner_state, owner_states
from misscompile.record.words import Scope

RECORD = "misscompile"
"""Key in `GraphModule.meta` of the `GraphRecord`."""

_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "proj_out", "output_projection")


@dataclasses.dataclass
class GraphRecord:
    """What is known of a whole graph beside its nodes."""

    base: fx.Graph
    """The graph without adapters."""
    mode: bool | None
    """`training` while it was captured, where that is frozen in its nodes; None where it follows the module's."""
    model_type: str | None = None
    """`config.model_type` of the captured model, for `target_modules=None`."""
    name_or_path: str | None = None
    outputs: tuple[str, ...] = ()
    """Names of the output embedding."""
    kept_base: fx.Graph | None = None
    """The base graph as it was before a merge that can be undone, where that merge changed it."""


class WholeGraph(fx.GraphModule):
    """A `GraphModule` in the mode it was captured in, whose graph follows the adapters registered on its modules."""

    def train(self, mode: bool = True) -> WholeGraph:
        """As `nn.Module.train`; refused where the other mode is frozen in the graph.

        Raises:
            StateError: the graph computes only what the model computes in the other mode.
        """
        frozen = record_of(self).mode if RECORD in self.meta else None
        if frozen is not None and bool(mode) != frozen:
            had, wanted = ("training", "evaluation") if frozen else ("evaluation", "training")
            raise StateError(
                f"this graph was captured in {had} mode, and its nodes compute something else than the model in {wanted} "
                f"mode (dropout, batch norm, random numbers). Capture the model again in {wanted} mode, or, where only "
                "dropout differs, with misscompile.capture, which lets it follow the mode."
            )
        for module in self.modules():
            module.training = bool(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if STATE in vars(self):
            convert_kept(self, fn)
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if STATE in vars(self):
            forgive_base(self, prefix, missing_keys=args[2])

    @property
    def name_or_path(self) -> str | None:
        """Where the captured model came from, for the config of an adapter."""
        return record_of(self).name_or_path if RECORD in self.meta else None

    def __deepcopy__(self, memo: Any) -> WholeGraph:
        copied = super().__deepcopy__(_copy_graphs_once(self, memo))
        assert isinstance(copied, WholeGraph)
        keep_persistence(copied, self)
        if STATE in vars(self):  # a merge keeps parameters of the root itself; no attribute is copied by itself
            state = vars(copied)[STATE] = copy.deepcopy(vars(self)[STATE], memo)
            state.base_class = type(copied)  # every graph module has a class of its own
            if state.disabled:
                state.disabled = 0
                swap_kept(copied)
        if any(state.disabled for state in owner_states(self).values()):  # the context will not come back for the copy
            swap_base(copied)
            derive_graph(copied)
        return copied


def record_of(root: WholeGraph) -> GraphRecord:
    """The record of a whole graph."""
    record: GraphRecord = root.meta[RECORD]
    return record


def swap_base(root: WholeGraph) -> None:
    """Exchange the base graph with the one that a merge kept, where that merge changed it."""
    record = record_of(root)
    if record.kept_base is not None:
        record.base, record.kept_base = record.kept_base, record.base


def whole_graphs(modules: Iterable[nn.Module]) -> list[WholeGraph]:
    """Those of a model's modules that are whole graphs."""
    return [module for module in modules if isinstance(module, WholeGraph) and RECORD in module.meta]


def copy_graph(model: fx.GraphModule | torch.export.ExportedProgram) -> WholeGraph:
    """A `WholeGraph` that computes what `model` computes, on the same values: base tensors are shared, blocks copied.

    Raises:
        ArgumentError: the exported program takes its parameters as inputs and has no module.
    """
    module: Any = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    shared: dict[int, Any] = {}
    for held_by in module.modules():
        state = vars(held_by).get(STATE)
        ours = state.all_registered() if state else ()
        made = (value for value in vars(held_by).values() if isinstance(value, torch.Tensor) and not value.is_leaf)
        shared |= {id(value): value.detach() for value in made}  # by a hook, before the next call
        for name, parameter in held_by._parameters.items():
            if parameter is not None:
                values = parameter.detach().clone() if name in ours else parameter.detach()
                shared.setdefault(id(parameter), nn.Parameter(values, requires_grad=False))
    held = vars(module)
    patched = {name: held.pop(name) for name in ("train", "eval") if name in held}  # torch.export forbids both by instance
    try:
        copied = copy.deepcopy(module, _copy_graphs_once(module, shared))
    finally:
        held.update(patched)
    if isinstance(module, WholeGraph):
        return copied  # type: ignore[no-any-return]
    if not isinstance(copied, fx.GraphModule):
        raise ArgumentError(f"model: expected a GraphModule or an ExportedProgram, found {type(model).__name__}.")
    inline_graph(copied)
    root = WholeGraph(copied, copied.graph)
    keep_persistence(root, module)
    root.training = module.training
    root.meta = dict(getattr(copied, "meta", {}))
    graph = copy_nodes(copied.graph)
    root.meta[RECORD] = GraphRecord(graph, frozen_mode(graph), outputs=_exported_output_names(graph))
    return root


def inline_graph(module: fx.GraphModule) -> None:
    """Put the regions of a graph that run without gradients in line, in place."""
    run_passes(CAPTURE, Scope(module, module.graph, "whole graph"))
    module.delete_all_unused_submodules()
    module.recompile()


def copy_nodes(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` with its own nodes, without an owning module."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    copied.output(value).meta = copy.copy(output.meta)
    copied.set_codegen(graph._codegen)
    return copied


def keep_persistence(copied: nn.Module, source: nn.Module) -> None:
    """Let the same buffers be left out of the `state_dict` as in `source`; a `GraphModule` forgets which those are."""
    modules = dict(copied.named_modules(remove_duplicate=False))
    for name, module in source.named_modules(remove_duplicate=False):
        if name in modules:
            modules[name]._non_persistent_buffers_set = module._non_persistent_buffers_set & set(modules[name]._buffers)


def base_scope(root: WholeGraph) -> Scope:
    """A copy of the base graph with its sites and refusals; each site under the name of its owner."""
    scope = Scope(root, copy_nodes(record_of(root).base), "whole graph")
    find_sites(scope)
    return scope


def derive_graph(root: WholeGraph) -> None:
    """Make the graph of `root` that of its base with the blocks that act now."""
    scope = base_scope(root)
    for name, calls in sites_by_name(scope).items():
        for index, site in enumerate(calls):
            for owner in (home_of(root, name), call_name(name, index)):
                state = owner_state(root, owner)
                if state is not None and state.shape is not None and state.blocks:
                    site.blocks, site.owner = state.effective_blocks(), owner
    run_passes(ADAPT, scope)
    own: OwnerState | None = vars(root).get(STATE)
    copies = dict(own.effective_copies()) if own is not None else {}
    for node in scope.graph.find_nodes(op="get_attr"):  # other modules hand out their copies by their class
        node.target = copies.get(node.target, node.target)
    root.graph = scope.graph
    root.recompile()
    _drop_empty_containers(root)


def home_of(root: nn.Module, name: str) -> str:
    """The module that holds the block of a site: that of its name, or one beside the parameter that has this name itself."""
    parent, _, last = name.rpartition(".")
    holder: nn.Module | None = root
    for part in parent.split(".") if parent else ():
        holder = holder._modules.get(part) if holder is not None else None
    return f"{name}#" if holder is not None and last in holder._parameters else name


def require_container(root: nn.Module, name: str) -> nn.Module:
    """The module of this name, made where no module of the captured model has it."""
    module = root
    for part in name.split(".") if name else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def _drop_empty_containers(root: WholeGraph) -> None:
    """Remove modules that hold nothing and are not called."""
    called = {str(node.target) for node in root.graph.nodes if node.op == "call_module"}
    for name, module in reversed(list(root.named_modules())):
        empty = not module._modules and not module._parameters and not module._buffers and STATE not in vars(module)
        ours = type(module) is nn.Module or "#" in name.rpartition(".")[2]  # a container, or the rest of an undone clone
        if name and empty and name not in called and ours:
            parent, _, last = name.rpartition(".")
            del root.get_submodule(parent)._modules[last]


def _copy_graphs_once(module: fx.GraphModule, memo: dict[int, Any]) -> dict[int, Any]:
    """`memo` with copies of the graphs in which the specs of inputs and outputs, which never change, are the same objects.

    A deepcopy of the specs works, and warns of a class that torch itself will not instantiate any more.
    """
    graphs = [module.graph]
    if isinstance(module, WholeGraph) and RECORD in module.meta:
        record = record_of(module)
        graphs += [graph for graph in (record.base, record.kept_base) if graph is not None]
    for graph in graphs:
        memo.setdefault(id(graph), copy_nodes(graph))
    memo.update({id(value): value for value in vars(module).values() if isinstance(value, pytree.TreeSpec)})
    return memo


def _exported_output_names(graph: fx.Graph) -> tuple[str, ...]:
    """The output embedding of a transformers model, as far as an export tells it."""
    stacks = [module_stack(node) for node in graph.nodes]
    roots = {kind for stack in stacks for path, kind in stack[:1] if not path}
    if not any("transformers." in kind for kind in roots):
        return ()
    names = {path for stack in stacks for path, _ in stack}
    return tuple(name for name in sorted(names) if name.rpartition(".")[2] in _OUTPUT_EMBEDDINGS)

"""The `GraphModule` that adapters act in, and the derivation of its graph from what is registered on it.

    base graph ─ find_sites ─ insert_updates ─▶ the graph that runs

The base graph is kept in a record on the module and is never rewritten. Whatever changes the set of acting adapters derives
the running graph again, so that adding, switching, disabling and removing are one mechanism, as on ordinary modules.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import linecache
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx import graph_module
from torch.fx.graph import PythonCode

from misscompile.errors import StateError
from misscompile.hosts.graph_parts import call_owner, home_of, keep_structure
from misscompile.hosts.graph_pickle import is_guards, read_graph, read_guards, write_graph, write_guards
from misscompile.passes.find_sites import find_sites, sites_by_name
from misscompile.passes.runner import ADAPT, run_passes
from misscompile.record.state import STATE, OwnerState, apply_with_kept, forgive_base
from misscompile.record.transaction import Undo, swap_kept
from misscompile.record.walk import join, owner_states
from misscompile.record.words import Block, Scope

RECORD = "misscompile"
"""Key in `GraphModule.meta` of the `GraphRecord`."""

Acting = tuple[fx.Graph, tuple[tuple[str, tuple[Block, ...]], ...], tuple[tuple[str, str], ...]]
"""A base graph, the blocks that act on it by owner, and the tensors of it that are trained in full, each with its copy."""

_COMPILED = ("_graph", "_code", "_lineno_map", "_prologue_start")
"""What `GraphModule.recompile` makes of a graph, beside the function `forward` of the class."""


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
    acting: Acting | None = None
    """What the graph that runs was derived from; None where it was not derived."""
    derived: dict[Acting, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Each graph that ran before, with its compiled code: a set that acts again recompiles nothing."""


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

    def recompile(self) -> PythonCode:
        """As `GraphModule.recompile`; the source that torch.fx keeps of each forward for ever goes with the forward."""
        code = super().recompile()
        forward: Any = vars(type(self))["forward"]
        filename, sources = forward.__code__.co_filename, graph_module._loader.eval_cache
        if filename in sources:
            weakref.finalize(forward, linecache.cache.pop, filename, None)
            weakref.finalize(forward, sources.pop, filename, None)
        return code

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        apply = functools.partial(super()._apply, fn, recurse)
        return apply_with_kept(self, fn, apply) if STATE in vars(self) else apply()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if STATE in vars(self):
            forgive_base(self, prefix, state_dict, missing_keys=args[2])

    @property
    def name_or_path(self) -> str | None:
        """Where the captured model came from, for the config of an adapter."""
        return record_of(self).name_or_path if RECORD in self.meta else None

    def __deepcopy__(self, memo: Any) -> WholeGraph:
        copied = super().__deepcopy__(copy_graphs_once(self, memo))
        assert isinstance(copied, WholeGraph)
        keep_structure(copied, self)
        if STATE in vars(self):  # a merge keeps parameters of the root itself; no attribute is copied by itself
            _adopt_state(copied, copy.deepcopy(vars(self)[STATE], memo))
        if any(state.disabled for state in owner_states(self).values()):  # the context will not come back for the copy
            swap_base(copied)
            derive_graph(copied)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        if RECORD not in self.meta:
            return super().__reduce__()
        record, held = record_of(self), {"_parameters": self._parameters, "_buffers": self._buffers}
        modules = {name: None if is_guards(module) else module for name, module in self._modules.items()}
        guards = {name: write_guards(module) for name, module in self._modules.items() if module and is_guards(module)}
        plain = {"training": self.training, "_non_persistent_buffers_set": self._non_persistent_buffers_set}
        graphs = [None if graph is None else write_graph(graph) for graph in (record.base, record.kept_base)]
        told = {name: getattr(record, name) for name in ("mode", "model_type", "name_or_path", "outputs")}
        if STATE in vars(self):
            plain[STATE] = dataclasses.replace(vars(self)[STATE], base_class=WholeGraph)
        disabled = any(state.disabled for state in owner_states(self).values())
        return _unpickle, (held | {"_modules": modules}, guards, plain, graphs, told, disabled)


def _unpickle(
    held: dict[str, dict[str, Any]],
    guards: dict[str, Any],
    plain: dict[str, Any],
    graphs: list[Any],
    told: dict[str, Any],
    disabled: bool,
) -> WholeGraph:
    held["_modules"] |= {name: read_guards(written) for name, written in guards.items()}
    source = nn.Module()
    vars(source).update(held)
    base, kept = (None if written is None else read_graph(written) for written in graphs)
    assert base is not None
    root = WholeGraph(source, copy_nodes(base))
    vars(root).update(held | plain)
    root.meta[RECORD] = GraphRecord(base, **told, kept_base=kept)
    if STATE in plain:
        _adopt_state(root, plain[STATE])
    if disabled:
        swap_base(root)
    derive_graph(root)
    return root


def _adopt_state(root: WholeGraph, state: OwnerState) -> None:
    """Give a copied graph the record of the root itself. Every graph module has a class of its own."""
    vars(root)[STATE], state.base_class = state, type(root)
    if state.disabled:
        state.disabled = 0
        swap_kept(root, Undo((), ()))


def record_of(root: WholeGraph) -> GraphRecord:
    """The record of a whole graph."""
    record: GraphRecord = root.meta[RECORD]
    return record


def change_record(root: WholeGraph, **changes: Any) -> None:
    """Give a whole graph another record. The old one stays as it was, for a transaction to put back."""
    root.meta = {**root.meta, RECORD: dataclasses.replace(record_of(root), **changes)}


def swap_base(root: WholeGraph) -> None:
    """Exchange the base graph with the one that a merge kept, where that merge changed it."""
    record = record_of(root)
    if record.kept_base is not None:
        change_record(root, base=record.kept_base, kept_base=record.base)


def whole_graphs(modules: Iterable[nn.Module]) -> list[WholeGraph]:
    """Those of a model's modules that are whole graphs."""
    return [module for module in modules if isinstance(module, WholeGraph) and RECORD in module.meta]


def copy_nodes(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` with its own nodes, without an owning module."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    copied.output(value).meta = copy.copy(output.meta)
    copied.set_codegen(graph._codegen)
    return copied


def base_scope(root: WholeGraph) -> Scope:
    """A copy of the base graph with its sites and refusals; each site under the name of its owner."""
    scope = Scope(root, copy_nodes(record_of(root).base), "whole graph")
    find_sites(scope)
    return scope


def derive_graph(root: WholeGraph) -> None:
    """Make the graph of `root` that of its base with the blocks that act now."""
    record = record_of(root)
    states = owner_states(root)
    blocks = {name: found for name, state in states.items() if (found := state.effective_blocks())}
    held = [(name, pair) for name, state in states.items() for pair in state.effective_copies()]
    copies = tuple((join(name, tensor), join(name, copied)) for name, (tensor, copied) in held)
    acting = record.base, tuple(blocks.items()), copies
    if acting != record.acting:
        registered = {(name, block) for name, state in states.items() for block in state.blocks.values()}
        derived = _still_derived(record, registered)
        if record.acting is not None:
            derived[record.acting] = {key: vars(root)[key] for key in _COMPILED} | {"forward": type(root).forward}
        if acting in derived:
            compiled = dict(derived[acting])
            type(root).forward = compiled.pop("forward")
            vars(root).update(compiled)
        else:
            root.graph = _insert_acting(root, blocks, copies)
        change_record(root, acting=acting, derived=derived)
    _drop_empty_containers(root)


def _insert_acting(
    root: WholeGraph, blocks: Mapping[str, tuple[Block, ...]], copies: tuple[tuple[str, str], ...]
) -> fx.Graph:
    """The base graph with these blocks on its sites. The root's own copies are read by name; other classes hand them out."""
    scope = base_scope(root)
    scope.copies = copies
    named = sites_by_name(scope)
    for name, calls in named.items():
        for index, site in enumerate(calls):
            for owner in (home_of(root, name), call_owner(named, name, index)):
                if owner is not None and owner in blocks:
                    site.blocks, site.owner = blocks[owner], owner
    run_passes(ADAPT, scope)
    own = {tensor: copied for tensor, copied in copies if "." not in tensor}
    for node in scope.graph.find_nodes(op="get_attr"):
        node.target = own.get(node.target, node.target)
    return scope.graph


def _still_derived(record: GraphRecord, registered: Collection[tuple[str, Block]]) -> dict[Acting, dict[str, Any]]:
    """The graphs that ran before, without those of other bases, and of blocks that are not registered any more."""
    bases = (record.base, record.kept_base)
    return {
        acting: compiled
        for acting, compiled in record.derived.items()
        if acting[0] in bases and all((name, block) in registered for name, found in acting[1] for block in found)
    }


def _drop_empty_containers(root: WholeGraph) -> None:
    """Remove modules that hold nothing and are not called."""
    called = {str(node.target) for node in root.graph.nodes if node.op == "call_module"}
    for name, module in reversed(list(root.named_modules())):
        empty = not module._modules and not module._parameters and not module._buffers and STATE not in vars(module)
        ours = type(module) is nn.Module or "#" in name.rpartition(".")[2]  # a container, or the rest of an undone clone
        if name and empty and name not in called and ours:
            parent, _, last = name.rpartition(".")
            del root.get_submodule(parent)._modules[last]


def copy_graphs_once(module: fx.GraphModule, memo: dict[int, Any]) -> dict[int, Any]:
    """`memo` with copies of the graphs in which the specs of inputs and outputs, which never change, are the same objects.

    A deepcopy of the specs works, and warns of a class that torch itself will not instantiate any more.
    """
    graphs = [module.graph]
    if isinstance(module, WholeGraph) and RECORD in module.meta:
        record = record_of(module)
        memo[id(record.derived)] = {}
        graphs += [graph for graph in (record.base, record.kept_base) if graph is not None]
    for graph in graphs:
        memo.setdefault(id(graph), copy_nodes(graph))
    memo.update({id(value): value for value in vars(module).values() if isinstance(value, pytree.TreeSpec)})
    return memo

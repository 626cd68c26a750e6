"""Whole graphs: the `GraphModule` that adapters act in, and the derivation of its graph from what is registered on it.

    base graph ─ find_calls ─ insert_updates ─ share_sums ─▶ the graph that runs

The base graph is kept in a record on the module and is never rewritten; whatever changes the set of acting adapters derives
the running graph again, so that adding, switching, disabling and removing are one mechanism, as on ordinary modules.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx, nn

from misscompile.errors import ArgumentError, StateError
from misscompile.passes.find_calls import find_calls
from misscompile.passes.inline import inline_regions
from misscompile.passes.insert import insert_updates
from misscompile.passes.share import share_sums
from misscompile.pipeline import run_passes
from misscompile.plan import ModelScope, Site
from misscompile.state import STATE, OwnerState

RECORD = "misscompile"
"""Key in `GraphModule.meta` of the `GraphRecord`."""

ModelPass = Callable[[ModelScope], None]

ADAPT_GRAPH: tuple[ModelPass, ...] = (insert_updates, share_sums)
"""What happens to a copy of the base graph once its sites are found, in this order."""


@dataclasses.dataclass
class Kept:
    """What a merge that can be undone keeps: the base graph and the parameters of every module before it."""

    base: fx.Graph
    parameters: dict[str, dict[str, nn.Parameter | None]]
    versions: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """`tensor_version` of what the merge wrote, right after it."""


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
    """Names of what "all-linear" leaves out: the output embedding or the head of a sequence classifier."""
    kept: Kept | None = None
    """Set while the graph is merged with its adapters kept."""


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
                f"mode (dropout, batch norm). Capture the model again in {wanted} mode, or, where only dropout differs, "
                "with misscompile.capture, which lets it follow the mode."
            )
        for module in self.modules():
            module.training = bool(mode)
        return self

    def __deepcopy__(self, memo: Any) -> WholeGraph:
        copied = super().__deepcopy__(_copy_graph_once(self, memo))
        assert isinstance(copied, WholeGraph)
        keep_persistence(copied, self)
        return copied

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        dtypes = _parameter_dtypes(self)
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if RECORD in self.meta and _parameter_dtypes(self) != dtypes:
            derive_graph(self)  # which form of bat is exact depends on the dtype
        return result


def record_of(root: WholeGraph) -> GraphRecord:
    """The record of a whole graph."""
    record: GraphRecord = root.meta[RECORD]
    return record


def copy_graph(model: fx.GraphModule | torch.export.ExportedProgram) -> WholeGraph:
    """A `WholeGraph` that computes what `model` computes, on the same values: base tensors are shared, blocks copied.

    Raises:
        ArgumentError: the exported program takes its parameters as inputs and has no module.
    """
    module: Any = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    shared: dict[int, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        own = "miss_" in name.rpartition(".")[2]
        values = parameter.detach().clone() if own else parameter.detach()
        shared.setdefault(id(parameter), nn.Parameter(values, requires_grad=False))
    held = vars(module)
    patched = {name: held.pop(name) for name in ("train", "eval") if name in held}  # torch.export forbids both by instance
    try:
        copied = copy.deepcopy(module, _copy_graph_once(module, shared))
    finally:
        held.update(patched)
    if isinstance(module, WholeGraph):
        return copied  # type: ignore[no-any-return]
    if not isinstance(copied, fx.GraphModule):
        raise ArgumentError(f"model: expected a GraphModule or an ExportedProgram, found {type(model).__name__}.")
    inline_regions(copied)
    root = WholeGraph(copied, copied.graph)
    keep_persistence(root, module)
    root.training = module.training
    root.meta = dict(getattr(copied, "meta", {}))
    graph = copy_nodes(copied.graph)
    root.meta[RECORD] = GraphRecord(graph, frozen_mode(graph), outputs=_output_names(graph))
    return root


def _copy_graph_once(module: fx.GraphModule, memo: dict[int, Any]) -> dict[int, Any]:
    """`memo` with a copy of the graph in which the specs of inputs and outputs, which never change, are the same objects.

    A deepcopy of the specs works, and warns of a class that torch itself will not instantiate any more.
    """
    if id(module.graph) not in memo:
        memo[id(module.graph)] = copy_nodes(module.graph)
    specs = {id(value): value for value in vars(module).values() if isinstance(value, pytree.TreeSpec)}
    if isinstance(module, WholeGraph) and RECORD in module.meta:
        base = record_of(module).base
        memo.setdefault(id(base), copy_nodes(base))
    memo.update(specs)
    return memo


def _output_names(graph: fx.Graph) -> tuple[str, ...]:
    """The output embedding of a transformers model, as far as an export tells it."""
    stacks = [list((node.meta.get("nn_module_stack") or {}).values()) for node in graph.nodes]
    roots = {str(kind) for stack in stacks if stack for path, kind in stack[:1] if not path}
    if not any("transformers." in kind for kind in roots):
        return ()
    names = {path for stack in stacks for path, _ in stack}
    return tuple(name for name in sorted(names) if name.rpartition(".")[2] in _OUTPUT_EMBEDDINGS)


_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "proj_out", "output_projection")


def keep_persistence(copied: nn.Module, source: nn.Module) -> None:
    """Let the same buffers be left out of the `state_dict` as in `source`; a `GraphModule` forgets which those are."""
    modules = dict(copied.named_modules(remove_duplicate=False))
    for name, module in source.named_modules(remove_duplicate=False):
        if name in modules:
            modules[name]._non_persistent_buffers_set = module._non_persistent_buffers_set & set(modules[name]._buffers)


def copy_nodes(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` with its own nodes, without an owning module."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    copied.output(value).meta = copy.copy(output.meta)
    copied.set_codegen(graph._codegen)
    return copied


def whole_graphs(modules: Iterable[nn.Module]) -> list[WholeGraph]:
    """Those of a model's modules that are whole graphs."""
    return [module for module in modules if isinstance(module, WholeGraph) and RECORD in module.meta]


def find_graph_sites(root: WholeGraph) -> ModelScope:
    """A copy of the base graph with its sites and refusals; each site under the name of its owner."""
    scope = ModelScope(root, copy_nodes(record_of(root).base))
    find_calls(scope)
    return scope


def call_names(scope: ModelScope) -> dict[str, list[Site]]:
    """The sites by name, the calls of one weight together."""
    named: dict[str, list[Site]] = {}
    for site in scope.sites:
        named.setdefault(site.owner, []).append(site)
    return named


def call_owner(name: str, index: int) -> str:
    """Name of one of several calls of one weight, where each has a block of its own."""
    return f"{name}#{index}"


def derive_graph(root: WholeGraph) -> None:
    """Make the graph of `root` that of its base with the blocks that act now."""
    scope = derive_scope(root)
    root.graph = scope.graph
    root.recompile()


def derive_scope(root: WholeGraph) -> ModelScope:
    """The base graph of `root` with the updates of the blocks that act now."""
    scope = find_graph_sites(root)
    for name, calls in call_names(scope).items():
        for index, site in enumerate(calls):
            for owner in (name, call_owner(name, index)):
                state = owner_state(root, owner)
                if state is not None and state.shape is not None and state.blocks:
                    site.blocks, site.owner = state.effective_blocks(), owner
    run_passes(ADAPT_GRAPH, scope)
    return scope


def refresh_graphs(modules: Iterable[nn.Module]) -> None:
    """Derive every whole graph among a model's modules again, after a record on one of its modules changed."""
    for root in whole_graphs(modules):
        derive_graph(root)
        drop_empty_containers(root)


def find_module(root: nn.Module, name: str) -> nn.Module | None:
    """The module of this name, or None."""
    module: nn.Module | None = root
    for part in name.split(".") if name else ():
        module = module._modules.get(part) if module is not None else None
    return module


def owner_state(root: nn.Module, name: str) -> OwnerState | None:
    """The record on the module of this name, or None where there is none of either."""
    module = find_module(root, name)
    state: OwnerState | None = None if module is None else vars(module).get(STATE)
    return state


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


def add_containers(root: WholeGraph, per_call_site: bool) -> None:
    """Make the modules that blocks may be registered on and that the captured model does not have."""
    for name, calls in call_names(find_graph_sites(root)).items():
        require_container(root, name)
        if per_call_site and len(calls) > 1:
            for index in range(len(calls)):
                require_container(root, call_owner(name, index))


def drop_empty_containers(root: WholeGraph) -> None:
    """Remove modules that hold nothing and are not called."""
    called = {str(node.target) for node in root.graph.nodes if node.op == "call_module"}
    for name, module in reversed(list(root.named_modules())):
        empty = not module._modules and not module._parameters and not module._buffers
        ours = type(module) is nn.Module or "#" in name.rpartition(".")[2]  # a container, or the rest of an undone clone
        if name and empty and name not in called and ours:
            parent, _, last = name.rpartition(".")
            del root.get_submodule(parent)._modules[last]


def frozen_mode(graph: fx.Graph) -> bool | None:
    """The mode that is written into the nodes of a graph, or None where nothing in it depends on one."""
    for node in graph.nodes:
        for targets, position, keyword in _MODE_FLAGS:
            if node.target in targets:
                flag = node.args[position] if len(node.args) > position else node.kwargs.get(keyword)
                rate = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
                acts = rate != 0 if keyword != "dropout_p" else bool(flag)
                if isinstance(flag, bool | float) and acts:
                    return bool(flag)
    return None


_MODE_FLAGS: tuple[tuple[set[Any], int, str], ...] = (
    ({torch.ops.aten.dropout.default}, 2, "train"),
    ({F.dropout, F.alpha_dropout, F.feature_alpha_dropout}, 2, "training"),
    ({torch.ops.aten.batch_norm.default, F.batch_norm}, 5, "training"),
    ({torch.ops.aten.scaled_dot_product_attention.default, F.scaled_dot_product_attention}, 4, "dropout_p"),
)
"""Calls that compute something else in training: the place of the flag, or of a rate that is zero in evaluation."""


def _parameter_dtypes(root: nn.Module) -> list[torch.dtype]:
    return [parameter.dtype for parameter in root.parameters()]

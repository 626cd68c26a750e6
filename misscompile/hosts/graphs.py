"""A whole graph: blocks act in the graph above their owners, and a merge registers new parameters.

    q = linear(x, W) + sum_shards(x) @ D    ->   q = linear(x, W')        W' = round(W + ΔW), a new parameter

The values that a graph shares with the model it was made from are never written. A weight whose calls have a block each is
unshared: every call reads a parameter of its own, `<parameter>#0`, `<parameter>#1`, ….
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor, nn

from misscompile.errors import MergeError, StateError, UnsupportedModuleError
from misscompile.hosts.base import Fold, Host, check_staying, write_copies
from misscompile.hosts.modules import finish_owner
from misscompile.hosts.owner_class import refresh_owner
from misscompile.hosts.whole_graph import (
    WholeGraph,
    base_scope,
    copy_nodes,
    record_of,
    require_container,
)
from misscompile.passes.find_sites import find_sites, other_readers, sites_by_name
from misscompile.passes.linear_calls import target_name
from misscompile.passes.runner import UNSHARE, run_passes
from misscompile.passes.unshare_weights import call_name
from misscompile.passes.weight_paths import overlap
from misscompile.record.state import STATE, Kept, OwnerState, tensor_version
from misscompile.record.walk import owner_state, owners
from misscompile.record.words import Block, Refusal, Scope, Site, Target

_SHOWN = 5


@dataclasses.dataclass
class Uses:
    """What a fold is read by: all calls of one weight, or the call with this number."""

    owners: dict[str, list[Site]]
    """The sites whose blocks are folded, by the owner of the blocks."""
    parameter: str
    call: int | None


class GraphHost(Host):
    in_graph = True
    root: WholeGraph

    def __init__(self, root: WholeGraph, per_call_site: bool = False) -> None:
        super().__init__(root)
        self.per_call_site = per_call_site

    @functools.cached_property
    def scope(self) -> Scope:
        """A copy of the base graph with its sites."""
        return base_scope(self.root)

    @functools.cached_property
    def calls(self) -> dict[str, list[Site]]:
        """The sites by name."""
        return sites_by_name(self.scope)

    def names(self) -> list[str]:
        unnamed = self.scope.unnamed
        if not self.calls and unnamed:
            raise UnsupportedModuleError(
                f"the weights of {len(unnamed)} linear calls of the graph have no owner's name (the first is "
                f"{unnamed[0]!r}, and no nn_module_stack tells its module), so that no rule can choose among them. Make "
                "the graph with misscompile.capture or torch.export.export, which keep the names."
            )
        modules = [name for name in self.modules if name]
        return list(dict.fromkeys([*modules, *self.calls, *(refusal.name for refusal in self.scope.refusals)]))

    def linear_names(self) -> list[str]:
        return list(self.calls)

    def output_names(self) -> set[str]:
        return set(record_of(self.root).outputs)

    def model_type(self) -> str | None:
        return record_of(self.root).model_type

    def passed_over(self) -> list[Refusal]:
        return self.scope.refusals

    def look(self, name: str, block: Block) -> list[Target | Refusal]:
        refused = next((refusal for refusal in self.scope.refusals if refusal.name == name), None)
        if name not in self.calls:
            if refused is not None:
                return [refused]
            inside = [call for call in self.calls if call.startswith((f"{name}.", f"{name}#"))]
            hint = f" (linears inside: {', '.join(inside[:_SHOWN])})" if inside else ""
            return [Refusal(name, "module", f"the graph has no linear call of its own weight{hint}")]
        calls = self.calls[name]
        own = self.per_call_site and len(calls) > 1
        self._check_sharing(name, calls, own)
        targets: list[Target | Refusal] = []
        for index, site in enumerate(calls if own else calls[:1]):
            assert site.path is not None
            owner = call_name(name, index) if own else name
            weight = self.root.get_parameter(site.path.parameter)
            shared = (id(weight), site.path.steps, owner if own else "")
            container = require_container(self.root, owner)
            targets.append(Target(owner, container, site.in_features, site.out_features, block, weight, shared))
        return targets

    def block_names(self) -> dict[str, str]:
        own = [call_name(name, index) for name, calls in self.calls.items() for index in range(len(calls))]
        return {name: name for name in (*self.names(), *own)}

    def notes(self, targets: Sequence[Target]) -> list[str]:
        return []

    def _check_sharing(self, name: str, calls: list[Site], own: bool) -> None:
        """Refuse an adapter that shares what another one does not: a call has one owner."""
        for other in [name] if own else [call_name(name, index) for index in range(len(calls))]:
            state = owner_state(self.root, other)
            if state is not None and state.blocks:
                had = "one block for all its calls" if own else "a block for each of its calls"
                raise StateError(
                    f"{name}: the adapter {next(iter(state.blocks))!r} has {had}; adapt with per_call_site={not own} as "
                    "well, or on a graph without that adapter."
                )

    def sites_of(self, owner: str) -> list[Site]:
        name, mark, call = owner.rpartition("#")
        return [self.calls[name][int(call)]] if mark and owner not in self.calls else self.calls[owner]

    def kind_of(self, owner: str) -> str:
        sites = self.sites_of(owner)
        return target_name(sites[0].node) + (f" ×{len(sites)}" if len(sites) > 1 else "")

    def stored_weight(self, owner: str, site: Site) -> Tensor:
        assert site.path is not None
        return self.root.get_parameter(site.path.parameter)

    # --- merging ---------------------------------------------------------------------------------------------------------

    def plan_folds(self, names: Sequence[str], keep: bool) -> list[Fold[Uses]]:
        folds: dict[object, Fold[Uses]] = {}
        adapted: list[Site] = []
        for name, calls in self.calls.items():
            uses: list[tuple[str, list[Site], int | None]] = [(name, calls, None)]
            uses += [(call_name(name, index), [site], index) for index, site in enumerate(calls)]
            for owner, sites, call in uses:
                state, path = owner_state(self.root, owner), sites[0].path
                if state is None or path is None or not any(n in state.blocks for n in names):
                    continue
                check_staying(owner, state, names)
                self._check_clonable(owner, sites[0], call)
                weight = self.root.get_parameter(path.parameter)
                fold = folds.setdefault((id(weight), call), Fold(path.parameter, weight, [], Uses({}, path.parameter, call)))
                if all(path.steps != steps for steps, _ in fold.parts):  # tied names share their block
                    _check_apart(fold, owner, sites[0])
                    blocks = [state.blocks[n] for n in names if n in state.blocks]
                    holder = self.root.get_submodule(owner)
                    fold.parts.append((path.steps, [(b, holder.get_parameter(b.parameter)) for b in blocks]))
                fold.where.owners[owner] = sites
                adapted += sites
        for fold in folds.values():
            self._check_uses(fold, adapted)
        return list(folds.values())

    def write_folds(self, folds: Sequence[Fold[Uses]], names: Sequence[str], keep: bool) -> None:
        merged = [nn.Parameter(fold.merged(), requires_grad=False) for fold in folds]
        for fold, parameter in zip(folds, merged, strict=True):
            if fold.where.call is None:
                for module in self.root.modules():
                    held = [name for name, value in module._parameters.items() if value is fold.weight]
                    for name in held:
                        self._put(module, name, parameter, keep)
        own = [(fold, parameter) for fold, parameter in zip(folds, merged, strict=True) if fold.where.call is not None]
        if own:
            self._unshare(own, keep)
        for name, owner in owners(self.root).items():
            state: OwnerState = vars(owner)[STATE]
            if any(n in state.copies or n in state.blocks for n in names):
                write_copies(owner, names, keep)
                finish_owner(owner, names, name, keep)

    def _put(self, module: nn.Module, name: str, value: nn.Parameter, keep: bool) -> None:
        """Register a merged weight, and keep the one of the base."""
        old, module._parameters[name] = module._parameters.get(name), value
        if keep:
            _keep(module, name, old)

    def _unshare(self, folds: Sequence[tuple[Fold[Uses], nn.Parameter]], keep: bool) -> None:
        """Let each call read a merged weight of its own, registered beside the weight that the calls had in common."""
        record = record_of(self.root)
        if keep:
            record.kept_base = record.base
        scope = Scope(self.root, copy_nodes(record.base), "whole graph")  # copies of this module hold the other one
        find_sites(scope)
        calls = sites_by_name(scope)
        for fold, parameter in folds:
            call = fold.where.call
            assert call is not None
            sites = [calls[owner.rpartition("#")[0]][call] for owner in fold.where.owners]
            for site in sites:
                site.call = call
            if sites[0].node.op == "call_module":
                self._clone_module(str(sites[0].node.target), call, parameter, keep)
            else:
                holder, _, name = fold.where.parameter.rpartition(".")
                self._put(self.root.get_submodule(holder), call_name(name, call), parameter, keep)
        run_passes(UNSHARE, scope)
        record.base = scope.graph
        read = {str(node.target) for node in scope.graph.nodes if node.op == "get_attr"}
        read |= {f"{node.target}.weight" for node in scope.graph.nodes if node.op == "call_module"}
        for target in {fold.where.parameter for fold, _ in folds} - read:
            holder, _, name = target.rpartition(".")
            module = self.root.get_submodule(holder)
            old = module._parameters.pop(name)
            if keep:
                _keep(module, name, old)

    def _clone_module(self, target: str, call: int, weight: nn.Parameter, keep: bool) -> None:
        """Give a call of a module that is one node a module of its own, in the place of the one that holds its block."""
        clone, name = copy.copy(self.root.get_submodule(target)), call_name(target, call)
        holder = self.root.get_submodule(name)
        state = vars(clone)[STATE] = vars(holder)[STATE]
        state.base_class = type(clone)
        blocks = {key: value for key, value in holder._parameters.items() if key in state.all_registered()}
        clone._parameters = {**clone._parameters, "weight": weight, **blocks}
        parent, _, last = name.rpartition(".")
        self.root.get_submodule(parent)._modules[last] = clone
        for held in clone._parameters.keys() - blocks.keys() if keep else ():
            _keep(clone, held, None)

    def _check_clonable(self, owner: str, site: Site, call: int | None) -> None:
        """Refuse to unshare a module that is one node and has trained copies: each clone would need its own."""
        node = site.node
        if call is not None and node.op == "call_module" and STATE in vars(self.root.get_submodule(str(node.target))):
            raise MergeError(
                f"{owner}: its module {node.target!r} is one node of the graph and has trained tensors beside its blocks, "
                "which a merge cannot give to each call. Capture the model with misscompile.capture, or adapt without bias "
                "and modules_to_save."
            )

    def _check_uses(self, fold: Fold[Uses], adapted: Sequence[Site]) -> None:
        """Refuse to write what some node reads beside the adapted calls."""
        ours = {id(site) for site in adapted}
        owner = next(iter(fold.where.owners))
        for site in self.scope.sites:
            if id(site) in ours or site.path is None or self.root.get_parameter(site.path.parameter) is not fold.weight:
                continue
            if any(overlap(fold.weight, steps, site.path.steps) for steps, _ in fold.parts):
                raise _used_outside(owner, f"the call {site.node.name!r} of {site.owner}")
        named = self.root.named_parameters(remove_duplicate=False)
        names = {name for name, parameter in named if parameter is fold.weight}
        for user in other_readers(self.scope, names):
            raise _used_outside(owner, f"{user.name!r} ({user.target})")
        calls = {site.node for site in self.scope.sites}
        for node in self.scope.graph.nodes:
            if node.op == "call_module" and node not in calls and _holds(self.root, str(node.target), fold.weight):
                raise _used_outside(owner, f"the module {node.target!r}")


def _keep(module: nn.Module, name: str, old: nn.Parameter | None) -> None:
    """Note in the record of a module what stood in the place of a parameter before the merge; None where nothing did."""
    state: OwnerState | None = vars(module).get(STATE)
    if state is None:
        state = vars(module)[STATE] = OwnerState(type(module), in_graph=True)
        refresh_owner(module)
    now = module._parameters.get(name)
    state.kept[name] = Kept(old) if now is None else Kept(old, tensor_version(now))


def _check_apart(fold: Fold[Uses], owner: str, site: Site) -> None:
    """Refuse to add two updates to one element: each call would then compute both."""
    assert site.path is not None
    for (steps, _), other in zip(fold.parts, fold.where.owners, strict=False):
        if overlap(fold.weight, site.path.steps, steps):
            raise MergeError(
                f"{owner} and {other} read one weight in two forms, each with an adapter of its own: merging would add "
                "both to both. Give one of them a parameter of its own before the model is captured."
            )


def _holds(root: nn.Module, name: str, weight: Tensor) -> bool:
    return any(parameter is weight for parameter in root.get_submodule(name).parameters())


def _used_outside(owner: str, use: str) -> MergeError:
    return MergeError(
        f"{owner}: its weight is also read by {use}, on which the adapter does not act: merging would change both. Give "
        "one of them a parameter of its own before the model is captured, or adapt both."
    )

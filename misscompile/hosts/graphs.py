"""A whole graph: blocks act in the graph above their owners, and a merge registers new parameters.

    q = linear(x, W) + sum_shards(x) @ D    ->   q = linear(x, W')        W' = round(W + ΔW), a new parameter

The values that a graph shares with the model it was made from are never written. A weight whose calls have a block each is
unshared: every call reads a parameter of its own, `<parameter>#0`, `<parameter>#1`, ….
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from misscompile.errors import MergeError, StateError, UnsupportedModuleError
from misscompile.hosts.base import Fold, Host, LastWrite, Part, check_staying, has_attribute, is_adapter_part, write_copies
from misscompile.hosts.graph_parts import call_owner, home_of, other_name, require_container
from misscompile.hosts.owner_class import before_and_after, finish_owner, refresh_owner
from misscompile.hosts.whole_graph import WholeGraph, base_scope, change_record, copy_nodes, record_of
from misscompile.kernels import Scratch
from misscompile.passes.find_sites import find_sites, other_readers, sites_by_name
from misscompile.passes.linear_calls import target_name
from misscompile.passes.owner_names import module_stack
from misscompile.passes.runner import UNSHARE, run_passes
from misscompile.passes.unshare_weights import call_name
from misscompile.passes.weight_paths import WeightError, find_parameter, overlap, trace_weight
from misscompile.record.state import STATE, Kept, OwnerState, base_tensor, fingerprint
from misscompile.record.transaction import Undo
from misscompile.record.walk import owner_state, owners
from misscompile.record.words import Block, Refusal, Scope, Site, Target, View

_SHOWN = 5


class GraphHost(Host):
    in_graph = True
    root: WholeGraph

    def __init__(self, root: WholeGraph, per_call_site: bool = False) -> None:
        super().__init__(root)
        self.per_call_site = per_call_site
        self._looked_at: set[str] = set()

    def result(self, model: Any) -> Any:
        return self.root

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
        stacks = {name: module_stack(calls[0].node) for name, calls in self.calls.items()}
        kinds = {path: kind for stack in stacks.values() for path, kind in stack}
        layers = [path for path, kind in kinds.items() if kind.startswith("peft.") and f"{path}.base_layer" in self.modules]
        own = {name for name in self.calls if any(is_adapter_part(name, layer) for layer in layers)}
        return [name for name in self.calls if name not in own and name not in self._tied]

    @functools.cached_property
    def _tied(self) -> dict[str, str]:
        """The names of linears whose weight an embedding reads too, with the node of the embedding."""
        tables: dict[int, str] = {}
        for node in self.scope.graph.nodes:
            if node.op == "call_function" and "embedding" in target_name(node):
                read = [find_parameter(self.root, str(source.target)) for source in node.all_input_nodes]
                tables |= {id(table): node.name for table in read if table is not None}
            elif node.op == "call_module" and isinstance(module := self.root.get_submodule(str(node.target)), nn.Embedding):
                tables[id(module.weight)] = node.name
        weights = {name: id(self.stored_weight(name, sites[0])) for name, sites in self.calls.items()}
        return {name: tables[weight] for name, weight in weights.items() if weight in tables}

    def _names_of(self, weight: Tensor) -> set[str]:
        return {name for name, parameter in self.root.named_parameters(remove_duplicate=False) if parameter is weight}

    def output_names(self) -> set[str]:
        return set(record_of(self.root).outputs)

    def model_type(self) -> str | None:
        return record_of(self.root).model_type

    def passed_over(self) -> list[Refusal]:
        outputs = self.output_names()
        tied = {name: reader for name, reader in self._tied.items() if name not in outputs}
        reason = "its weight is tied to the embedding that {!r} reads"
        return [*self.scope.refusals, *(Refusal(name, "linear", reason.format(tied[name])) for name in tied)]

    def look(self, name: str, block: Block) -> list[Target | Refusal]:
        name = self._canonical(name)
        if name in self._looked_at:
            return []
        self._looked_at.add(name)
        if name not in self.calls:
            inside = [call for call in self.calls if call.startswith((f"{name}.", f"{name}#"))]
            hint = f" (linears inside: {', '.join(inside[:_SHOWN])})" if inside else ""
            other = Refusal(name, "module", f"the graph has no linear call of its own weight{hint}")
            return [next((refusal for refusal in self.scope.refusals if refusal.name == name), other)]
        calls = self.calls[name]
        kept = [self.root.get_submodule(str(site.node.target)) for site in calls if site.node.op == "call_module"]
        if any(_runs_other_code(module) for module in kept):
            reason = (
                "it is one node with hooks or a forward set on it, which an update would go round: use misscompile.capture"
            )
            return [Refusal(name, type(kept[0]).__name__, reason)]
        own = self.per_call_site and len(calls) > 1
        self._check_sharing(name, calls, own)
        targets: list[Target | Refusal] = []
        for index, site in enumerate(calls if own else calls[:1]):
            assert site.path is not None
            owner = call_name(name, index) if own else home_of(self.root, name)
            weight = self.stored_weight(name, site)
            shared = (id(weight), site.path.view, owner if own else "")
            container, sizes = require_container(self.root, owner), (site.in_features, site.out_features)
            if has_attribute(container, block.parameter):
                targets.append(Refusal(name, target_name(site.node), f"it already has an attribute {block.parameter!r}"))
                continue
            targets.append(Target(owner, container, *sizes, block, weight, shared, stands_for=other_name(owner, name)))
        return targets

    def _canonical(self, name: str) -> str:
        """The first name of a module that has several; every other name as it is."""
        module = self.modules.get(name)
        return name if module is None else self.canonical[module]

    def _check_sharing(self, name: str, calls: list[Site], own: bool) -> None:
        """Refuse an adapter that shares what another one does not: a call has one owner."""
        taken = [index for index in range(len(calls)) if call_owner(self.calls, name, index) is None]
        if own and taken:
            raise UnsupportedModuleError(
                f"{name}: the block of a call would be held by {call_name(name, taken[0])!r}, which is a linear itself. "
                "Use per_call_site=False, or rename that module."
            )
        others = [call_owner(self.calls, name, index) for index in range(len(calls))]
        for other in [home_of(self.root, name)] if own else others:
            state = None if other is None else owner_state(self.root, other)
            if state is not None and state.blocks:
                had = "one block for all its calls" if own else "a block for each of its calls"
                raise StateError(
                    f"{name}: the adapter {next(iter(state.blocks))!r} has {had}; adapt with per_call_site={not own} as "
                    "well, or on a graph without that adapter."
                )

    def biases(self, targets: Sequence[Target]) -> dict[nn.Module, set[str]]:
        """Beside those on the modules of the targets, the vectors that their calls add, whatever module holds them."""
        found = super().biases(targets)
        added = [site.added for target in targets for site in self.sites_of(target.name) if site.added is not None]
        for node in added:
            with contextlib.suppress(WeightError):  # a residual, which is computed
                module, name = self._holder(trace_weight(node, self.root).parameter)
                if module.get_parameter(name).dim() == 1:
                    found.setdefault(module, set()).add(name)
        return found

    def block_names(self) -> dict[str, str]:
        own = [call_name(name, index) for name, calls in self.calls.items() for index in range(len(calls))]
        homes = {name: home_of(self.root, self._canonical(name)) for name in self.names()}
        return {name: name for name in (*homes.values(), *own)} | homes

    def are_calls(self, blocks: Iterable[str]) -> bool:
        return any(self._call_of(owner) is not None for owner in blocks)

    def sites_of(self, owner: str) -> list[Site]:
        if (call := self._call_of(owner)) is not None:
            return [call]
        return self.calls[owner if owner in self.calls else self._homes[owner]]

    @functools.cached_property
    def _homes(self) -> dict[str, str]:
        """By the module that holds the block of all its calls, each site's name."""
        return {home_of(self.root, name): name for name in self.calls}

    def _call_of(self, owner: str) -> Site | None:
        """The call that an owner is of, where each call of the weight has one."""
        name, _, number = owner.rpartition("#")
        if owner in self.calls or not number.isdecimal() or int(number) >= len(self.calls.get(name, ())):
            return None
        return self.calls[name][int(number)]

    def kind_of(self, owner: str) -> str:
        sites = self.sites_of(owner)
        return target_name(sites[0].node) + (f" ×{len(sites)}" if len(sites) > 1 else "")

    def stored_weight(self, owner: str, site: Site) -> Tensor:
        assert site.path is not None
        module, name = self._holder(site.path.parameter)
        return base_tensor(module, name)  # the attribute may be what another adapter trains

    def code(self) -> list[str]:
        return [before_and_after("# whole graph", record_of(self.root).base, self.root.graph)]

    def plan_folds(self, names: Sequence[str], keep: bool) -> list[Fold]:
        folds: dict[object, Fold] = {}
        adapted: set[int] = set()
        for name, calls in self.calls.items():
            uses: list[tuple[str | None, list[Site], int | None]] = [(home_of(self.root, name), calls, None)]
            uses += [(call_owner(self.calls, name, index), [site], index) for index, site in enumerate(calls)]
            for owner, sites, call in uses:
                state, path = None if owner is None else owner_state(self.root, owner), sites[0].path
                if owner is None or state is None or path is None or not any(n in state.blocks for n in names):
                    continue
                check_staying(owner, state, names)
                self._check_clonable(owner, sites[0], call)
                weight, holder = self.stored_weight(owner, sites[0]), self.root.get_submodule(owner)
                fold = folds.setdefault((id(weight), call), Fold(path.parameter, weight, [], {}, call))
                blocks = [state.blocks[n] for n in names if n in state.blocks]
                part: Part = path.view, [(b, holder.get_parameter(b.parameter)) for b in blocks]
                held = [(view, [id(values) for _, values in found]) for view, found in fold.parts]
                if (path.view, [id(values) for _, values in part[1]]) not in held:  # tied names share their block
                    _check_apart(fold, owner, path.view)
                    fold.parts.append(part)
                fold.owners[owner] = sites
                adapted |= {id(site) for site in sites}
        for fold in folds.values():
            self._check_uses(fold, adapted)
        return list(folds.values())

    def write_folds(self, folds: Sequence[Fold], names: Sequence[str], keep: bool, undo: Undo) -> list[LastWrite]:
        scratch: Scratch = {}
        merged = [(fold, nn.Parameter(fold.merged(scratch), requires_grad=False)) for fold in folds]
        for fold, parameter in merged:
            for module in self.root.modules() if fold.call is None else ():
                for name in [name for name, value in module._parameters.items() if value is fold.weight]:
                    _exchange(module, name, parameter, keep)
        if own := [(fold, parameter) for fold, parameter in merged if fold.call is not None]:
            self._unshare(own, keep)
        for name, owner in owners(self.root).items():
            state: OwnerState = vars(owner)[STATE]
            if any(n in state.copies or n in state.blocks for n in names):
                write_copies(owner, names, keep, undo)
                finish_owner(owner, names, name, keep)
        return []

    def _unshare(self, folds: Sequence[tuple[Fold, nn.Parameter]], keep: bool) -> None:
        """Let each call read a merged weight of its own, registered beside the weight that the calls had in common."""
        base = record_of(self.root).base
        scope = Scope(self.root, copy_nodes(base), "whole graph")  # copies of this module hold the other one
        find_sites(scope)
        calls = sites_by_name(scope)
        for fold, parameter in folds:
            assert fold.call is not None
            sites = [calls[owner.rpartition("#")[0]][fold.call] for owner in fold.owners]
            for site in sites:
                site.call = fold.call
            if sites[0].node.op == "call_module":
                self._clone_module(str(sites[0].node.target), fold.call, parameter, keep)
            else:
                _exchange(*self._holder(call_name(fold.name, fold.call)), parameter, keep)
        run_passes(UNSHARE, scope)
        change_record(self.root, base=scope.graph, kept_base=base if keep else None)
        read = {str(node.target) for node in scope.graph.nodes if node.op == "get_attr"}
        read |= {f"{node.target}.weight" for node in scope.graph.nodes if node.op == "call_module"}
        for target in {fold.name for fold, _ in folds} - read:
            _exchange(*self._holder(target), None, keep)

    def _holder(self, target: str) -> tuple[nn.Module, str]:
        holder, _, name = target.rpartition(".")
        return self.root.get_submodule(holder), name

    def _clone_module(self, target: str, call: int, weight: nn.Parameter, keep: bool) -> None:
        """Give a call of a module that is one node a module of its own, in the place of the one that holds its block."""
        clone, name = copy.copy(self.root.get_submodule(target)), call_name(target, call)
        holder = self.root.get_submodule(name)
        state = vars(clone)[STATE] = vars(holder)[STATE]
        state.base_class = type(clone)
        blocks = {key: value for key, value in holder._parameters.items() if key in state.all_registered()}
        base, clone._parameters = clone._parameters, blocks
        for held, value in base.items():
            _exchange(clone, held, weight if held == "weight" else value, keep)
        parent, last = self._holder(name)
        parent._modules[last] = clone

    def _check_clonable(self, owner: str, site: Site, call: int | None) -> None:
        """Refuse to unshare a module that is one node and has trained copies: each clone would need its own."""
        node = site.node
        if call is not None and node.op == "call_module" and STATE in vars(self.root.get_submodule(str(node.target))):
            raise MergeError(
                f"{owner}: its module {node.target!r} is one node of the graph and has trained tensors beside its blocks, "
                "which a merge cannot give to each call. Capture the model with misscompile.capture, or adapt without bias "
                "and modules_to_save."
            )

    def _check_uses(self, fold: Fold, adapted: set[int]) -> None:
        """Refuse to write what some node reads beside the adapted calls."""
        uses = [
            f"the call {site.node.name!r} of {site.owner}"
            for site in self.scope.sites
            if id(site) not in adapted and site.path is not None and self.stored_weight("", site) is fold.weight
            if any(overlap(fold.weight, view, site.path.view) for view, _ in fold.parts)
        ]
        readers = other_readers(self.scope, self._names_of(fold.weight))
        uses += [f"{user.name!r} ({user.target})" for user in readers]
        calls = {site.node for site in self.scope.sites}
        for node in self.scope.graph.nodes:
            if node.op == "call_module" and node not in calls:
                parameters = self.root.get_submodule(str(node.target)).parameters()
                uses += [f"the module {node.target!r}" for parameter in parameters if parameter is fold.weight]
        if uses:
            raise MergeError(
                f"{next(iter(fold.owners))}: its weight is also read by {uses[0]}, on which the adapter does not act: "
                "merging would change both. Give one of them a parameter of its own before the model is captured, or adapt "
                "both."
            )


def _runs_other_code(module: nn.Module) -> bool:
    """Whether a call of a module runs more than the forward of its class."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return "forward" in vars(module) or any(hooks)


def _exchange(module: nn.Module, name: str, new: nn.Parameter | None, keep: bool) -> None:
    """Register a parameter, or take one away, and note in the record of its module what stood there where that is kept."""
    old = module._parameters.pop(name, None) if new is None else module._parameters.get(name)
    if new is not None:
        module._parameters[name] = new
    if keep:
        state: OwnerState | None = vars(module).get(STATE)
        if state is None:
            state = vars(module)[STATE] = OwnerState(type(module), in_graph=True)
            refresh_owner(module)
        state.kept[name] = Kept(old, None if new is None else fingerprint(new))


def _check_apart(fold: Fold, owner: str, view: View) -> None:
    """Refuse to add two updates to one element: each call would then compute both."""
    for (others, _), other in zip(fold.parts, fold.owners, strict=False):
        if overlap(fold.weight, view, others):
            raise MergeError(
                f"{owner} and {other} read one weight, each with blocks of its own: merging would add both to both. Give "
                "one of them a parameter of its own before the model is captured."
            )

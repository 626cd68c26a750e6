"""A live module tree: blocks act in the forwards of their owners, and a merge writes the weights in place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from misscompile.errors import MergeError
from misscompile.hosts.base import (
    Fold,
    Host,
    LastWrite,
    Part,
    Users,
    check_staying,
    has_attribute,
    is_adapter_part,
    write_copies,
)
from misscompile.hosts.owner_class import (
    REWRITE,
    before_and_after,
    find_foreign_forward,
    finish_owner,
    owner_scope,
    present_scope,
)
from misscompile.kernels import Scratch
from misscompile.passes.find_sites import linear_shape, other_readers
from misscompile.passes.trace import probe_opaque
from misscompile.record.spread import whole
from misscompile.record.state import STATE, Kept, OwnerState, base_class_of, fingerprint
from misscompile.record.transaction import Undo
from misscompile.record.walk import named_modules, owners
from misscompile.record.words import Block, Refusal, Scope, Site, Target
from misscompile.variants import VARIANTS

_SHOWN = 5


class ModuleHost(Host):
    in_graph = False

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self._looked_at: set[nn.Module] = set()

    def result(self, model: Any) -> Any:
        return model

    def names(self) -> list[str]:
        return [name for name in self.modules if name or linear_shape(self.root) is not None]

    def linear_names(self) -> list[str]:
        layers = [name for name, module in self.modules.items() if "base_layer" in module._modules and _is_of_peft(module)]
        return [
            name
            for name, module in self.modules.items()
            if module not in self._tied
            and (_is_linear(module) or _is_scripted_linear(module))
            and not any(is_adapter_part(name, layer) for layer in layers)
        ]

    def output_names(self) -> set[str]:
        return output_embedding_names(self.root)

    def model_type(self) -> str | None:
        return getattr(getattr(self.root, "config", None), "model_type", None)

    @functools.cached_property
    def _tied(self) -> dict[nn.Module, str]:
        """The linears whose weight is that of an embedding too, with the name of the embedding."""
        embeddings = {id(m._parameters["weight"]): n for m, n in self.canonical.items() if isinstance(m, nn.Embedding)}
        weights = {module: id(module._parameters.get("weight")) for module in self.canonical if _is_linear(module)}
        return {module: embeddings[weight] for module, weight in weights.items() if weight in embeddings}

    def passed_over(self) -> list[Refusal]:
        """Modules that hold a stack of weights (fused experts), and linears that are tied to an embedding."""
        outputs = self.output_names()
        found = {
            name: Refusal(name, type(module).__name__, f"its weight is tied to {self._tied[module]}, an embedding")
            for module, name in self.canonical.items()
            if module in self._tied and name not in outputs
        }
        for module, name in self.canonical.items():
            if type(module).__module__.startswith("torch.nn."):
                continue
            ours = vars(module)[STATE].all_registered() if STATE in vars(module) else ()
            for held, parameter in module._parameters.items():
                if held not in ours and parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1:
                    shape = "×".join(map(str, parameter.shape))
                    reason = f"its {held} ({shape}) is a stack of fused weights, not a linear"
                    found.setdefault(name, Refusal(name, type(module).__name__, reason))
        return list(found.values())

    def look(self, name: str, block: Block) -> list[Target | Refusal]:
        owner = self.modules[name]
        if owner in self._looked_at:
            return []
        self._looked_at.add(owner)
        name, shape = self.canonical[owner], linear_shape(owner)
        if isinstance(owner, torch.jit.ScriptModule):
            return [
                Refusal(name, type(owner).__name__, "it is compiled by TorchScript; adapt the module before scripting it")
            ]
        if shape is None:
            inside = [f"{name}.{child}" for child, module in owner.named_modules() if child and _is_linear(module)]
            hint = f" (the linears inside: {', '.join(inside[:_SHOWN])})" if inside else ""
            return [Refusal(name, type(owner).__name__, f"it is not a linear module{hint}")]
        found = self._scope_or_problem(owner, block, shape)
        if isinstance(found, str):
            return [Refusal(name, type(owner).__name__, found)]
        weight = owner._parameters.get("weight", getattr(owner, "weight", None))
        weight = weight if isinstance(weight, Tensor) else next(owner.parameters(), None)
        shared = (id(owner if weight is None else weight), found.sites[0].path)  # none that is read another way round
        return [Target(name, owner, *shape, block, weight, shared, found)]

    def _scope_or_problem(self, owner: nn.Module, block: Block, shape: tuple[int, int]) -> Scope | str:
        """The scope of a linear, or why an adapter on it could not take effect."""
        if any(nn.parameter.is_lazy(p) for p in owner._parameters.values() if p is not None):
            return "its shape is not known yet; run the model once on real input first"
        if getattr(vars(owner).get("_hf_hook"), "offload", False):
            return "accelerate offloads its weight; adapt the model before dispatching it"
        if STATE not in vars(owner) and has_attribute(owner, block.parameter):
            return f"it already has an attribute {block.parameter!r}"
        scope = owner_scope(owner)
        if scope.opaque is None:
            return scope
        problem = None if find_foreign_forward(owner) else probe_opaque(owner, base_class_of(owner), shape)
        if problem is None and VARIANTS[block.variant].reads_weight:
            return f"{scope.opaque}, and {block.variant!r} needs the weight itself (init_weights=True or 'mini' do not)"
        return problem or scope

    def block_names(self) -> dict[str, str]:
        return {name: self.canonical[module] for name, module in self.modules.items()}

    def notes(self, targets: Sequence[Target]) -> list[str]:
        """Weights in whose memory a merge would change more than the adapter acts on."""
        adapted, users, found = {target.owner for target in targets}, Users(self.root), []
        for target in targets:
            weight = target.owner._parameters.get("weight")
            held_by = () if weight is None else users.of(weight)
            other = (user for m, held, user, t in held_by if m not in adapted or held != "weight" or t is not weight)
            if user := next(other, None):
                found.append(
                    f"{target.name} shares its weight with {user}: its block acts on this module alone, and merge will "
                    "refuse until the weight is untied"
                )
        return found

    def sites_of(self, owner: str) -> list[Site]:
        return owner_scope(self.modules[owner]).sites

    def kind_of(self, owner: str) -> str:
        module = self.modules[owner]
        return type(module).__name__ + (" (opaque)" if owner_scope(module).opaque else "")

    def stored_weight(self, owner: str, site: Site) -> Tensor:
        module = self.modules[owner]
        held = module._parameters.get("weight")  # the base's: the attribute may be what another adapter trains
        weight = module.weight if held is None else held  # a parametrized one is computed
        assert isinstance(weight, Tensor)
        return weight

    def code(self) -> list[str]:
        names: dict[tuple[Scope, fx.Graph], list[str]] = {}
        for name in (name for name, state in self.states().items() if state.blocks and not state.in_graph):
            scope, rewrite = owner_scope(self.modules[name]), getattr(type(self.modules[name]), REWRITE)
            names.setdefault((scope, rewrite.graph if rewrite else scope.graph), []).append(name or "(root)")
        parts = []
        for (scope, graph), found in names.items():
            assert scope.shape is not None
            count = f"{len(found)} owner{'s' * (len(found) != 1)}"
            listed = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
            title = f"# {scope.label} {scope.shape[0]}→{scope.shape[1]}, {count}: {listed}"
            title += f"\n# opaque: {scope.opaque}" if scope.opaque else ""
            parts.append(before_and_after(title, scope.graph, graph))
        return parts

    def plan_folds(self, names: Sequence[str], keep: bool) -> list[Fold]:
        groups: dict[object, dict[str, nn.Module]] = {}
        for name, owner in owners(self.root).items():
            state: OwnerState = vars(owner)[STATE]
            if not state.in_graph and any(n in state.blocks for n in names):
                weight = owner._parameters.get("weight")
                groups.setdefault(name if weight is None else id(weight), {})[name] = owner
        users = Users(self.root)
        for group in groups.values():
            self._check_shared(group, names, users)
        return [self._plan_fold(group, names, keep) for group in groups.values()]

    def _check_shared(self, group: dict[str, nn.Module], names: Sequence[str], users: Users) -> None:
        """Refuse to write a weight whose memory is also read where not exactly the same is folded."""
        (name, first), *_ = group.items()
        weight = first._parameters.get("weight")
        if weight is None:
            return
        for module, held, user, tensor in users.of(weight):
            state: OwnerState | None = vars(module).get(STATE)
            adapted = state is not None and held == "weight" and any(n in state.blocks for n in names)
            if tensor is weight and adapted and _folded(module, names) == _folded(first, names):
                continue
            found = "where other blocks act" if adapted else "which the adapter does not act on"
            raise MergeError(
                f"{name} shares its weight with {user}, {found}: merging would change both. Untie first: give the module a "
                "weight of its own (`module.weight = torch.nn.Parameter(module.weight.detach().clone())`, and "
                "`model.config.tie_word_embeddings = False` for an output layer), then merge."
            )

    def _plan_fold(self, group: dict[str, nn.Module], names: Sequence[str], keep: bool) -> Fold:
        name, owner = next(iter(group.items()))
        state, scope = vars(owner)[STATE], present_scope(owner)
        path = scope.sites[0].path
        if path is None:
            raise MergeError(f"{name}: {scope.opaque}, so that its update cannot be shown to be one of its weight.")
        if other_readers(scope, {"weight"}) or any(site.path != path for site in scope.sites):
            raise MergeError(
                f"{name}: its forward uses its weight beside the linear call, and merging would change that use too."
            )
        if parametrize.is_parametrized(owner, "weight") and keep:
            raise MergeError(
                f"{name}: its weight is parametrized, and a merge into it cannot be undone; merge without keep_adapters."
            )
        check_staying(name, state, names)
        blocks = [state.blocks[n] for n in names if n in state.blocks]
        parts: list[Part] = [(path.view, [(block, whole(owner.get_parameter(block.parameter))) for block in blocks])]
        return Fold(name, self.stored_weight(name, scope.sites[0]), parts, dict(group))

    def write_folds(self, folds: Sequence[Fold], names: Sequence[str], keep: bool, undo: Undo) -> list[LastWrite]:
        scratch: Scratch = {}
        last = [write for fold in folds for write in _write_fold(fold, names, keep, scratch, undo)]
        for name, owner in owners(self.root).items():
            state: OwnerState = vars(owner)[STATE]
            if not state.in_graph and not state.merged and any(n in state.copies for n in names):
                write_copies(owner, names, keep, undo)
                finish_owner(owner, names, name, keep)
        return last


def output_embedding_names(root: nn.Module) -> set[str]:
    """Every name of the module that `get_output_embeddings` gives, where the model has that method."""
    get_output = getattr(root, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    return {name for name, module in named_modules(root, remove_duplicate=False).items() if module is output}


def refusal_notes(what: str, refusals: Sequence[Refusal]) -> list[str]:
    """One sentence for each reason: a model with many layers should not warn once for each of them."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        grouped.setdefault((refusal.kind, refusal.reason), []).append(refusal.name)
    notes = []
    for (kind, reason), names in grouped.items():
        more, verb = (f" and {len(names) - 1} more", "are") if len(names) > 1 else ("", "is")
        notes.append(f"{names[0]} ({kind}){more} {verb} {what} {reason}")
    return notes


def _folded(owner: nn.Module, names: Sequence[str]) -> Any:
    """What a merge of these adapters writes into the weight of an owner."""
    state: OwnerState = vars(owner)[STATE]
    blocks = [(state.blocks[n], id(owner.get_parameter(state.blocks[n].parameter))) for n in names if n in state.blocks]
    return owner_scope(owner).sites[0].path, blocks


def _is_of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    named_linear = "linear" in type(module).__name__.lower() or "nf" in vars(module)
    return named_linear and linear_shape(module) is not None


def _is_scripted_linear(module: nn.Module) -> bool:
    """Whether TorchScript made a module of a linear: it is refused, and told."""
    return isinstance(module, torch.jit.ScriptModule) and linear_shape(module) is not None


@torch.no_grad()
def _write_fold(fold: Fold, names: Sequence[str], keep: bool, scratch: Scratch, undo: Undo) -> list[LastWrite]:
    """Merge into one weight, and return the write in place where nothing keeps the base's values."""
    modules, last = list(fold.owners.values()), list[LastWrite]()
    if keep:
        kept = undo.remember(modules[0], fold.weight)
        fold.write(fold.weight.detach(), scratch)
        vars(modules[0])[STATE].kept["weight"] = Kept(kept, fingerprint(fold.weight))
    elif parametrize.is_parametrized(modules[0], "weight"):
        merged = fold.merged()
    else:
        last = [(modules, fold.prepare(scratch))]
    for name, owner in fold.owners.items():
        write_copies(owner, names, keep, undo)
        finish_owner(owner, names, name, keep)
    if not keep and not last:
        _replace_weight(modules[0], merged, undo)
    return last


def _replace_weight(owner: nn.Module, merged: Tensor, undo: Undo) -> None:
    """Let a parametrized weight become a plain one."""
    for original in owner.get_submodule("parametrizations.weight").parameters():
        undo.add(owner, functools.partial(setattr, original, "data", original.data))  # the removal writes to it
    shared = type(owner)  # with every deepcopy of the owner, and the removal edits the class
    members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    owner.__class__ = type(shared.__name__, shared.__bases__, members)
    parametrize.remove_parametrizations(owner, "weight", leave_parametrized=True)
    owner.weight = nn.Parameter(merged, requires_grad=False)  # a frozen one would be left as a plain tensor

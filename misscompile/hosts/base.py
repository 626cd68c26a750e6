"""The interface between the verbs and what they act on: a live module tree (`modules.py`) or a whole graph (`graphs.py`)."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misscompile.errors import MergeError
from misscompile.kernels import Scratch, fold_in_place, is_finite, reserve, stays_finite
from misscompile.passes.weight_paths import take_view
from misscompile.record.spread import is_spread, own_part, part_like, whole
from misscompile.record.state import STATE, Kept, OwnerState, base_tensor, copy_name, fingerprint
from misscompile.record.transaction import Undo, write, writing
from misscompile.record.walk import join, named_modules, owners
from misscompile.record.words import Block, Refusal, Site, Target, View
from misscompile.variants import VARIANTS

Part = tuple[View, list[tuple[Block, Tensor]]]
"""A view of a weight as `(out, in)`, and the blocks that fold into it, with their values."""


@dataclasses.dataclass
class Fold:
    """One weight, and what a merge adds to it."""

    name: str
    """What messages call it."""
    weight: Tensor
    parts: list[Part]
    owners: dict[str, Any]
    """By name, whose blocks are folded; the values are the host's own."""
    call: int | None = None
    """In a graph, the number of the only call that is to read the result; None for all calls of the weight."""

    def check(self) -> None:
        """Refuse a fold whose result cannot be computed, or would not be finite although the weight is."""
        if self.weight.is_meta:
            raise MergeError(f"{self.name}: its weight is on the meta device or offloaded; load it first.")
        if any(view.offset + view.size[0] * view.size[1] > self.weight.numel() for view, _ in self.parts):
            raise MergeError(
                f"{self.name}: its weight has shape {tuple(self.weight.shape)} here, since another process or wrapper holds "
                "the rest of it; gather the parameters first."
            )
        updates = [(b.variant, values) for _, blocks in self.parts for b, values in blocks]
        weight = whole(self.weight) if any(VARIANTS[variant].reads_weight for variant, _ in updates) else self.weight
        if not stays_finite(weight, updates):
            self.merged()

    def merged(self, scratch: Scratch | None = None) -> Tensor:
        """The merged weight in the base's layout and dtype, as finite as the weight was; nothing is changed."""
        merged = whole(self.weight).detach().clone()
        self.write(merged, scratch)
        if not is_finite(merged) and bool((whole(self.weight).isfinite() & ~merged.isfinite()).any()):
            adapters = list(dict.fromkeys(block.adapter for _, blocks in self.parts for block, _ in blocks))
            raise MergeError(
                f"{self.name}: the merged weight is not finite in {merged.dtype} (adapters {adapters}): {self._cause()} "
                "Nothing was merged."
            )
        return merged

    def _cause(self) -> str:
        broken = [block.parameter for _, blocks in self.parts for block, values in blocks if not is_finite(values)]
        if broken:
            return f"{broken[0]} holds values that are not finite, since its training diverged or its file is damaged."
        if not is_finite(whole(self.weight)):
            return "the base weight holds values that are not finite, which the update would spread. Repair the base first."
        return "the values exceed the range of the dtype."

    def write(self, stored: Tensor, scratch: Scratch | None = None) -> None:
        """Fold every part into `stored`, which holds the base weight."""
        scratch = None if stored.is_inference() else scratch  # what is made for it cannot be written elsewhere
        with writing(stored):
            folded = whole(stored).contiguous()
            for view, blocks in self.parts:
                fold_in_place(take_view(folded, view), [(block.variant, values) for block, values in blocks], scratch)
            if folded is not stored:
                own_part(stored).copy_(part_like(stored, folded))

    def prepare(self, scratch: Scratch) -> Callable[[], None]:
        """What writes the result over the weight, with all the memory for it taken: a write in place cannot be undone."""
        stored = self.weight.detach()
        if is_spread(stored) or not stored.is_contiguous():
            return functools.partial(write, own_part(stored), part_like(stored, self.merged(scratch)))
        scratch = {} if stored.is_inference() else scratch  # what is made for it cannot be written elsewhere
        with writing(stored):
            views = [take_view(stored, view) for view, _ in self.parts]
            updates = [[(block.variant, values) for block, values in blocks] for _, blocks in self.parts]
            ready = [(view, reserve(view, found, scratch)) for view, found in zip(views, updates, strict=True)]

        def finish() -> None:
            with writing(stored):
                for view, found in ready:
                    fold_in_place(view, found, scratch)

        return finish


LastWrite = tuple[list[nn.Module], Callable[[], None]]
"""Modules, and what writes the weight that they share."""


class Host(abc.ABC):
    """One model, as the verbs see it. Names are dotted names below `root`."""

    in_graph: bool
    """Whether blocks act in a graph, and not in the forwards of their owners."""
    per_call_site = False
    """Whether each call of a weight gets a block of its own."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by every name under which the model reaches it."""
        return named_modules(self.root, remove_duplicate=False)

    @functools.cached_property
    def canonical(self) -> dict[nn.Module, str]:
        """Every module with the first of its names."""
        found: dict[nn.Module, str] = {}
        for name, module in self.modules.items():
            found.setdefault(module, name)
        return found

    def states(self) -> dict[str, OwnerState]:
        """The records on the modules, by the first name of each."""
        return {name: vars(module)[STATE] for module, name in self.canonical.items() if STATE in vars(module)}

    @abc.abstractmethod
    def result(self, model: Any) -> Any:
        """What a verb that was given `model` returns: the same object, or the graph that was made of it."""

    # --- for a plan ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Every name that the rules may match, in the order of the model."""

    @abc.abstractmethod
    def linear_names(self) -> list[str]:
        """The names that "all-linear" stands for, output layers included."""

    @abc.abstractmethod
    def output_names(self) -> set[str]:
        """The names of the output embedding."""

    @abc.abstractmethod
    def model_type(self) -> str | None:
        """`config.model_type` of a transformers model."""

    @abc.abstractmethod
    def passed_over(self) -> list[Refusal]:
        """What looks like a weight to adapt, and that "all-linear" does not take."""

    @abc.abstractmethod
    def look(self, name: str, block: Block) -> list[Target | Refusal]:
        """What a chosen name stands for; nothing where another name for the same was looked at before."""

    @abc.abstractmethod
    def block_names(self) -> dict[str, str]:
        """Every name under which a file may hold a block of this model, with the name of the target that it is for."""

    def are_calls(self, blocks: Iterable[str]) -> bool:
        """Whether blocks of these targets act on one call of a weight each."""
        return False

    def biases(self, targets: Sequence[Target]) -> dict[nn.Module, set[str]]:
        """The biases of these targets, by module and own name."""
        return {target.owner: {name for name in target.owner._parameters if "bias" in name} for target in targets}

    def notes(self, targets: Sequence[Target]) -> list[str]:
        """What a user should know of an adapter on these targets, beside what was refused."""
        return []

    # --- for what is there -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def sites_of(self, owner: str) -> list[Site]:
        """The sites on which the blocks of an owner act."""

    @abc.abstractmethod
    def kind_of(self, owner: str) -> str:
        """What kind of call, or of module, the blocks of an owner act on, in words."""

    @abc.abstractmethod
    def stored_weight(self, owner: str, site: Site) -> Tensor:
        """The weight of a site as it is stored; `site.path.view` is that of it as `(out, in)`."""

    @abc.abstractmethod
    def code(self) -> list[str]:
        """The torch.fx code of each distinct rewritten graph, before and after."""

    # --- for a merge -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def plan_folds(self, names: Sequence[str], keep: bool) -> list[Fold]:
        """What merging the adapters `names` will write, checked against every other use of the weights.

        `keep`: the merge has to be undone later.
        """

    @abc.abstractmethod
    def write_folds(self, folds: Sequence[Fold], names: Sequence[str], keep: bool, undo: Undo) -> list[LastWrite]:
        """Put the merged weights, and the copies that the adapters trained in full, in the place of the base's.

        Returns what can neither be undone nor fail for want of memory, for the caller to do last.
        """


def is_adapter_part(name: str, layer: str) -> bool:
    """Whether a module is a layer that PEFT put around another one, or is inside of it, and is no part of the other one."""
    return f"{name}.".startswith(f"{layer}.") and not f"{name}.".startswith(f"{layer}.base_layer.")


def has_attribute(module: nn.Module, name: str) -> bool:
    """`hasattr`, without the error by which `nn.Module` says no and which takes most of its time."""
    if type(module).__getattr__ is not nn.Module.__getattr__:
        return hasattr(module, name)
    registered = name in module._parameters or name in module._buffers or name in module._modules
    return registered or name in vars(module) or hasattr(type(module), name)


def check_staying(owner: str, state: OwnerState, names: Sequence[str]) -> None:
    """Refuse to change a weight on which an adapter that stays active depends."""
    stays = [b for b in state.effective_blocks() if b.adapter not in names and VARIANTS[b.variant].reads_weight]
    if stays:
        raise MergeError(
            f"{owner}: the {stays[0].variant!r} adapter {stays[0].adapter!r} that would stay active is a function of the "
            "base weight, which merging changes. Merge it too, or deactivate it first."
        )


class Users:
    """Who holds which memory of a model."""

    def __init__(self, root: nn.Module) -> None:
        self._held: dict[int, list[tuple[nn.Module, str, str, Tensor]]] = {}
        for module_name, module in named_modules(root).items():
            for held, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    entry = module, held, join(module_name, held), tensor
                    self._held.setdefault(_storage(tensor), []).append(entry)

    def of(self, tensor: Tensor) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        """`(module, name there, name in the model, tensor)` of all that has an element in the memory of `tensor`."""
        return (entry for entry in self._held.get(_storage(tensor), ()) if _overlap(tensor, entry[-1]))


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)  # none on the meta device
    except (RuntimeError, ValueError):  # a tensor subclass that has no memory of its own, or a lazy parameter
        return id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    if one is other or one.dtype != other.dtype:
        return True
    views = [(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in (one, other)]
    ends = [offset + sum((n - 1) * step for n, step in zip(*view, strict=True)) for *view, offset in views]
    start, (first, second) = min(offset for *_, offset in views), views
    if first[2] > ends[1] or second[2] > ends[0]:
        return False
    marks = torch.zeros(max(ends) + 1 - start, dtype=torch.bool)
    marks.as_strided(*first[:2], first[2] - start).fill_(True)
    return bool(marks.as_strided(*second[:2], second[2] - start).any())


def check_copies_unshared(root: nn.Module, names: Sequence[str]) -> None:
    """Refuse to write a copy into a base tensor that another module uses too."""
    users = Users(root)
    for owner_name, owner in owners(root).items():
        for tensor in {tensor for adapter in names for tensor in vars(owner)[STATE].copies.get(adapter, ())}:
            own, base = join(owner_name, tensor), base_tensor(owner, tensor)
            in_place = not vars(owner)[STATE].in_graph or tensor in owner._buffers
            others = [user for *_, user, held in users.of(base) if user != own and (in_place or held is base)]
            if others:
                raise MergeError(
                    f"{own}, which the adapter trains in full, is tied to {others[0]}: merging would change both. Untie "
                    "first (give one of the modules a parameter of its own), then merge."
                )


def check_copies_finite(root: nn.Module, names: Sequence[str]) -> None:
    """Refuse to write what an adapter trained in full where it is not finite although the base's tensor is."""
    for owner_name, owner in owners(root).items():
        for adapter in names:
            for tensor in vars(owner)[STATE].copies.get(adapter, ()):
                trained, base = getattr(owner, copy_name(adapter, tensor)), base_tensor(owner, tensor)
                trained, base = whole(trained), whole(base)
                if not trained.is_meta and not is_finite(trained) and bool((base.isfinite() & ~trained.isfinite()).any()):
                    raise MergeError(
                        f"{join(owner_name, tensor)}: what the adapter {adapter!r} trained in its place is not finite, "
                        "since the training diverged or its file is damaged. Nothing was merged."
                    )


@torch.no_grad()
def write_copies(owner: nn.Module, names: Sequence[str], keep: bool, undo: Undo) -> None:
    """Let what the adapters `names` trained in full on `owner` become the base's own values."""
    state: OwnerState = vars(owner)[STATE]
    for adapter in names:
        for tensor in state.copies.get(adapter, ()):
            base, trained = base_tensor(owner, tensor), getattr(owner, copy_name(adapter, tensor))
            if state.in_graph and isinstance(base, nn.Parameter):  # shared with the model that the graph was made from
                owner._parameters[tensor] = nn.Parameter(trained.detach().clone(), requires_grad=False)
            else:
                base, written = undo.remember(owner, base), base
                write(written, trained)
            if keep:
                state.kept[tensor] = Kept(base, fingerprint(trained))

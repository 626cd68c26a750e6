"""The interface between the verbs and what they act on: a live module tree (`modules.py`) or a whole graph (`graphs.py`)."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from misscompile.errors import MergeError
from misscompile.kernels import fold_in_place, is_finite, stays_finite
from misscompile.passes.weight_paths import apply_steps
from misscompile.record.state import STATE, Kept, OwnerState, base_tensor, copy_name, tensor_version
from misscompile.record.walk import canonical_names, named_modules, owners
from misscompile.record.words import Block, Refusal, Site, Step, Target
from misscompile.variants import VARIANTS

Where = TypeVar("Where")


@dataclasses.dataclass
class Fold(Generic[Where]):
    """One weight, and what a merge adds to which views of it."""

    name: str
    """What messages call it."""
    weight: Tensor
    parts: list[tuple[tuple[Step, ...], list[tuple[Block, Tensor]]]]
    """The steps from the stored weight to `(out, in)`, and the blocks that fold into that view, with their values."""
    where: Where
    """What the host needs to write the result."""

    def check(self) -> None:
        """Refuse a fold whose result cannot be computed, or would not be finite although the weight is.

        Raises:
            MergeError: naming the weight and the adapters.
        """
        if self.weight.is_meta:
            raise MergeError(f"{self.name}: its weight is on the meta device or offloaded; load it first.")
        updates = [(block.variant, values) for _, blocks in self.parts for block, values in blocks]
        if not stays_finite(self.weight, updates):
            self.merged()

    def merged(self) -> Tensor:
        """The merged weight in the base's layout and dtype; nothing is changed.

        Raises:
            MergeError: it holds a value that is not finite in that dtype.
        """
        merged = self.weight.detach().clone()
        self.write(merged)
        if not is_finite(merged):
            adapters = list(dict.fromkeys(block.adapter for _, blocks in self.parts for block, _ in blocks))
            raise MergeError(
                f"{self.name}: the merged weight is not finite in {merged.dtype} (adapters {adapters}): the training "
                "diverged, or the values exceed the range of the dtype. Nothing was merged."
            )
        return merged

    def write(self, stored: Tensor) -> None:
        """Fold every part into `stored`, which holds the base weight."""
        for steps, blocks in self.parts:
            fold_in_place(apply_steps(stored, steps), [(block.variant, values) for block, values in blocks])


class Host(abc.ABC):
    """One model, as the verbs see it. Names are dotted names below `root`."""

    in_graph: bool
    """Whether blocks act in a graph, and not in the forwards of their owners."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by every name under which the model reaches it."""
        return named_modules(self.root, remove_duplicate=False)

    @functools.cached_property
    def canonical(self) -> dict[nn.Module, str]:
        """Every module with the first of its names."""
        return canonical_names(self.modules)

    # --- for a plan ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Every name that the rules may match, in the order of the model."""

    @abc.abstractmethod
    def linear_names(self) -> list[str]:
        """The names that "all-linear" stands for, output layers included."""

    @abc.abstractmethod
    def output_names(self) -> set[str]:
        """The names of the output embedding, which "all-linear" leaves out."""

    @abc.abstractmethod
    def model_type(self) -> str | None:
        """`config.model_type` of a transformers model, for `target_modules=None`."""

    @abc.abstractmethod
    def passed_over(self) -> list[Refusal]:
        """What looks like a weight to adapt, and that "all-linear" cannot name."""

    @abc.abstractmethod
    def look(self, name: str, block: Block) -> list[Target | Refusal]:
        """What a chosen name stands for; nothing where another name for the same was looked at before."""

    @abc.abstractmethod
    def block_names(self) -> dict[str, str]:
        """Every name under which a file may hold a block of this model, with the name of the target that it is for."""

    @abc.abstractmethod
    def notes(self, targets: Sequence[Target]) -> list[str]:
        """What a user should know of an adapter on these targets, beside what was refused."""

    # --- for what is there -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def sites_of(self, owner: str) -> list[Site]:
        """The sites on which the blocks of an owner act."""

    @abc.abstractmethod
    def kind_of(self, owner: str) -> str:
        """What kind of call, or of module, the blocks of an owner act on, in words."""

    @abc.abstractmethod
    def stored_weight(self, owner: str, site: Site) -> Tensor:
        """The weight of a site as it is stored; `site.path.steps` lead from it to `(out, in)`."""

    # --- for a merge -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def plan_folds(self, names: Sequence[str], keep: bool) -> list[Fold[Any]]:
        """What merging the adapters `names` will write, checked against every other use of the weights.

        Args:
            names: of the adapters that are folded.
            keep: whether the merge has to be undone later.

        Raises:
            MergeError: a weight is used where no adapter acts, or a fold cannot be computed.
        """

    @abc.abstractmethod
    def write_folds(self, folds: Sequence[Fold[Any]], names: Sequence[str], keep: bool) -> None:
        """Put the merged weights, and the copies of the same modules, in the place of the base's."""


def check_staying(owner: str, state: OwnerState, names: Sequence[str]) -> None:
    """Refuse to change a weight on which an adapter that stays active depends.

    Raises:
        MergeError: naming both.
    """
    stays = [b for b in state.effective_blocks() if b.adapter not in names and VARIANTS[b.variant].reads_weight]
    if stays:
        raise MergeError(
            f"{owner}: the {stays[0].variant!r} adapter {stays[0].adapter!r} that would stay active is a function of the "
            "base weight, which merging changes. Merge it too, or deactivate it first."
        )


@torch.no_grad()
def write_copies(owner: nn.Module, names: Sequence[str], keep: bool) -> None:
    """Let what the adapters `names` trained in full on `owner` become the base's own values."""
    state: OwnerState = vars(owner)[STATE]
    for adapter in names:
        for tensor in state.copies.get(adapter, ()):
            base, trained = base_tensor(owner, tensor), getattr(owner, copy_name(adapter, tensor))
            if state.in_graph and isinstance(base, nn.Parameter):  # shared with the model that the graph was made from
                kept: Tensor = base
                owner._parameters[tensor] = nn.Parameter(trained.detach().clone(), requires_grad=False)
            else:
                kept = base.detach().clone() if keep else base
                base.copy_(trained)
            if keep:
                state.kept[tensor] = Kept(kept, tensor_version(base_tensor(owner, tensor)))


def check_copies_unshared(root: nn.Module, names: Sequence[str]) -> None:
    """Refuse to write a copy into a base tensor that another module uses too.

    Raises:
        MergeError: naming both.
    """
    users: dict[int, list[str]] = {}
    for module_name, module in root.named_modules():
        for tensor_name, tensor in module._parameters.items():
            if tensor is not None:
                users.setdefault(id(tensor), []).append(f"{module_name}.{tensor_name}")
    for owner_name, owner in owners(root).items():
        state: OwnerState = vars(owner)[STATE]
        for tensor_name in {tensor for adapter in names for tensor in state.copies.get(adapter, ())}:
            others = [n for n in users.get(id(base_tensor(owner, tensor_name)), []) if n != f"{owner_name}.{tensor_name}"]
            if others:
                raise MergeError(
                    f"{owner_name}.{tensor_name}, which the adapter trains in full, is tied to {others[0]}: merging would "
                    "change both. Untie first (give one of the modules a parameter of its own), then merge."
                )

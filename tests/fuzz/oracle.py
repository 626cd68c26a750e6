"""What an adapted network has to compute: a plain one, whose weights are written as `W + ΔW` in float64.

It knows the values that the blocks were given and never asks the adapted model for them, so that a lost value is seen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from models import Spec
from support import differentiable_delta
from torch import Tensor, nn
from torch.func import functional_call

Matrix = Callable[[Tensor], Tensor]
"""From a stored weight to the part of it that a block acts on, as `(out, in)`."""


@dataclasses.dataclass
class Adapter:
    """The values of one adapter; blocks by the name of their owner, copies by that of the base's tensor."""

    variant: Any
    blocks: dict[str, Tensor]
    effects: list[tuple[str, Matrix, str]]
    """`(weight, part, owner of the block)`."""
    copies: dict[str, Tensor]


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, under the first name of its module: one that two modules have in common comes twice."""
    return {
        f"{name}.{held}".lstrip("."): tensor
        for name, module in model.named_modules()
        for held, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


class Plain:
    """A base, the adapters on it, and which of them act."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.base = {name: tensor.detach().clone() for name, tensor in held_tensors(spec.build()).items()}
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.written: dict[str, Tensor] | None = None
        """What stands in the place of the base while it is merged."""

    def weights(self, acting: Iterable[str], base: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All values with the updates of some adapters, as functions of their blocks."""
        values = dict(self.base if base is None else base)
        for adapter in (self.adapters[name] for name in acting):
            for weight, part, owner in adapter.effects:
                origin = self.base[weight]
                marks = part(torch.arange(origin.numel()).view(origin.shape)).flatten()
                delta = differentiable_delta(adapter.variant, adapter.blocks[owner], part(origin)).flatten()
                values[weight] = values[weight].flatten().index_add(0, marks, delta).view(origin.shape)
            values |= adapter.copies
        return values

    def now(self) -> dict[str, Tensor]:
        """The values that the model has to compute with."""
        if self.written is None:
            return self.weights(self.active)
        return self.weights([name for name in self.active if name not in self.merged], self.written)

    def output(self, x: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
        """What the network computes with these values, by default those that act now."""
        with torch.no_grad():
            return self._run(x, self.now() if values is None else values)

    def gradients(self, x: Tensor) -> dict[tuple[str, str], Tensor] | None:
        """Of the sum of the squares of the output, by adapter and name; None where autograd finds a value overwritten."""
        acting = [name for name in self.active if name not in self.merged]
        leaves = {(name, key): value for name in acting for key, value in self.adapters[name].blocks.items()}
        leaves |= {(name, key): value for name in acting for key, value in self.adapters[name].copies.items()}
        leaves = {key: value for key, value in leaves.items() if value.is_floating_point()}
        if not leaves or self.spec.silent_writes:
            return None
        for value in leaves.values():
            value.requires_grad_(True)
        try:
            loss = self._run(x, self.now()).pow(2).sum()
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            return None
        finally:
            for value in leaves.values():
                value.requires_grad_(False)
        return {key: torch.zeros_like(leaves[key]) if g is None else g for key, g in zip(leaves, found, strict=True)}

    def _run(self, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(self.spec.build(), values, (x,), tie_weights=False)
        return y


@functools.lru_cache(maxsize=16)
def first_names(spec: Spec) -> dict[str, str]:
    """Every name of a module, with the first one of the same module."""
    model = spec.build()
    firsts = {module: name for name, module in model.named_modules()}
    return {name: firsts[module] for name, module in model.named_modules(remove_duplicate=False)}


def canonical(spec: Spec, name: str) -> str:
    """The name of a tensor in the oracle: that below the first name of its module."""
    module, _, held = name.rpartition(".")
    return f"{first_names(spec)[module]}.{held}".lstrip(".") if module in first_names(spec) else name


def effect(spec: Spec, owner: str) -> tuple[str, Matrix]:
    """The weight that a block with this owner acts on, and the part of it."""
    target, part = _target(owner, set(first_names(spec)))
    weight = canonical(spec, target)
    form = spec.form(weight)

    def matrix(stored: Tensor) -> Tensor:
        rows = stored if part is None else stored[slice(*part(form, stored))]
        return rows.t() if form.in_out else rows.flatten(1)

    return weight, matrix


def _target(owner: str, modules: set[str]) -> tuple[str, Any]:
    """The parameter of an owner's name, and which rows of it."""
    parent, _, last = owner.rpartition(".")
    if last in ("q", "k", "v"):
        index = "qkv".index(last)
        return f"{parent}.in_proj_weight", lambda form, stored: (index * len(stored) // 3, (index + 1) * len(stored) // 3)
    held, _, part = last.partition("#")
    if part.startswith("part"):
        return f"{parent}.{held}".lstrip("."), lambda form, stored: form.parts[int(part[4:])]
    name = owner.removesuffix("#")
    return (f"{name}.weight".lstrip(".") if name in modules else name), None

"""What every variant answers: shape, start, ΔW, bound and costs."""

from __future__ import annotations

import abc
import math
from typing import Literal

import torch
from torch import Tensor

Form = Literal["one product", "two products", "beside the base"]
"""How a call takes an update that depends on the weight: in the base's own product, in a second one, or apart from it."""


class Variant(abc.ABC):
    """One way of making `ΔW (out, in)` from a block."""

    reads_weight = False
    """Whether ΔW is a function of the base weight too, so that a site has to give its weight."""

    @abc.abstractmethod
    def block_shape(self, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[int, ...]:
        """Shape of the block of one linear."""

    def shape_problem(self, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[str, str] | None:
        """`(field, sentence)`: which field does not fit a linear of this shape, why, and what would; None where all fit."""
        if r > in_features:
            return "r", f"r={r} is more than its {in_features} input features; r of 1 to {in_features} would do"
        return None

    def init_block(self, block: Tensor, random_start: bool) -> None:
        """Write the start values in place: zeros, so that the update is zero, or Kaiming-uniform with `a = sqrt(5)`."""
        if random_start:
            torch.nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        else:
            torch.nn.init.zeros_(block)

    def delta_weight(self, block: Tensor, weight: Tensor) -> Tensor:
        """`ΔW (out, in)` in the dtype of `weight (out, in)`, which should be float32 or wider."""
        return self.add_delta_(torch.zeros_like(weight), weight, block.to(weight.dtype))

    @abc.abstractmethod
    def add_delta_(self, merged: Tensor, weight: Tensor, block: Tensor, product: Tensor | None = None) -> Tensor:
        """Add ΔW of `weight (rows, in)` in place to `merged (rows, in)` and return it; all of one floating dtype.

        `block` is that of these rows: `rows_of`. With a block from `laid_out`, and `product (rows, in)` to write to where
        `reads_weight`, no memory is taken.
        """

    def laid_out(self, block: Tensor) -> Tensor:
        """The same block, in the order in memory in which `add_delta_` reads it."""
        return block.contiguous()

    @abc.abstractmethod
    def rows_of(self, block: Tensor, start: int, stop: int) -> Tensor:
        """The block of the rows `start` to `stop` of `W`, multiples of `row_step`, as a view."""

    def row_step(self, block: Tensor) -> int:
        """In multiples of how many rows `rows_of` cuts."""
        return 1

    @abc.abstractmethod
    def bound(self, block: Tensor, in_block: float, in_weight: float) -> float:
        """What no `|ΔW[o, i]|` exceeds; `in_block` and `in_weight` are the largest magnitudes in the block and in `W`."""

    @abc.abstractmethod
    def step_flops(self, tokens: int, in_features: int, out_features: int, r: int, mini_r: int, form: Form) -> int:
        """What a training step adds to that of the frozen base: forward, input gradient and block gradient.

        Each multiply-add of a product is two, as `torch.utils.flop_counter` counts. The numbers may be sympy symbols.
        """


class SummedVariant(Variant):
    """ΔW repeats along a row with period `r`, so that its product is one with the shard sum: `s[…, j] = Σ_k x[…, k r + j]`.

    The block is `D (r, c)`, where `c` divides `out`: as operations, `s D` is added to each group of `c` outputs.
    """

    def laid_out(self, block: Tensor) -> Tensor:
        return block.t().contiguous().t()

    def add_delta_(self, merged: Tensor, weight: Tensor, block: Tensor, product: Tensor | None = None) -> Tensor:
        (r, c), rows = block.shape, block.t().contiguous()
        n, rest = divmod(merged.shape[1], r)
        by_group = torch.unflatten(merged, 0, (-1, c))
        torch.unflatten(by_group[..., : n * r], -1, (n, r)).add_(rows.unsqueeze(1))
        if rest:
            by_group[..., n * r :].add_(rows[:, :rest])
        return merged

    def bound(self, block: Tensor, in_block: float, in_weight: float) -> float:
        return in_block

    def step_flops(self, tokens: int, in_features: int, out_features: int, r: int, mini_r: int, form: Form) -> int:
        return 3 * 2 * tokens * r * self.block_shape(r, mini_r, in_features, out_features)[1]

    def lora_factors(self, block: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """`A (r, in)` and `B (out, r)` with `B A = ΔW`, exactly: `A[j, i] = [i ≡ j mod r]`, `B` is `D` transposed."""
        r = len(block)
        down = (torch.arange(in_features) % r == torch.arange(r).unsqueeze(1)).to(block.dtype)
        return down, block.repeat(1, out_features // block.shape[1]).t()

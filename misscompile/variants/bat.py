"""Bat: `ΔW[o, k] = W[o, k] B[o] + B[o]` with a block `B (out/r, r, r)` and `W` cut into `r×r` blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from misscompile.variants.base import Form, Variant
from misscompile.variants.mini import divisors

_FURTHER_PRODUCTS: dict[Form, int] = {"one product": 1, "two products": 2, "beside the base": 3}
"""Products of the base's size that a step adds to the base's two; `dW = dyᵀ x` is one of them."""


class Bat(Variant):
    reads_weight = True

    def block_shape(self, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[int, ...]:
        return out_features // r, r, r

    def shape_problem(self, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[str, str] | None:
        if r <= in_features and (in_features % r or out_features % r):
            would = divisors(math.gcd(in_features, out_features))
            return "r", f"'bat' needs an r that divides in and out, r={r} does not; r of {would} would do"
        return super().shape_problem(r, mini_r, in_features, out_features)

    def add_delta_(self, merged: Tensor, weight: Tensor, block: Tensor, product: Tensor | None = None) -> Tensor:
        r = block.shape[-1]
        product = torch.bmm(row_shards(weight, r), block, out=None if product is None else row_shards(product, r))
        by_shard(product, r).add_(block.unsqueeze(2))
        return merged.add_(product.view(merged.shape))

    def row_step(self, block: Tensor) -> int:
        return block.shape[-1]

    def rows_of(self, block: Tensor, start: int, stop: int) -> Tensor:
        r = block.shape[-1]
        return block[start // r : stop // r]

    def bound(self, block: Tensor, in_block: float, in_weight: float) -> float:
        return in_block + block.shape[-1] * in_weight * in_block

    def step_flops(self, tokens: int, in_features: int, out_features: int, r: int, mini_r: int, form: Form) -> int:
        """ΔW twice (it is not kept for the backward), the block gradient through `W`, and the further products."""
        return 2 * in_features * out_features * (3 * r + tokens * _FURTHER_PRODUCTS[form])


def bat_delta(weight: Tensor, block: Tensor) -> Tensor:
    """ΔW `(out, in)` of `weight (out, in)` and `block (out/r, r, r)`, in the dtype of `weight`.

    All `W[o, k] B[o]` are one batched product without a permutation. The added `B[o]` is usually the larger part: it is
    added in the dtype of the block.
    """
    product = torch.bmm(row_shards(weight, block.shape[-1]), block.to(weight.dtype))
    delta = by_shard(product, block.shape[-1]) + block.unsqueeze(2)
    return delta.to(weight.dtype).view(weight.shape)


def row_shards(weight: Tensor, r: int) -> Tensor:
    """`W (out, in)` as the shards of each row block, `(out/r, r·in/r, r)`: in memory that is the same matrix."""
    return weight.reshape(weight.shape[0] // r, weight.shape[1], r)


def by_shard(shards: Tensor, r: int) -> Tensor:
    """`(out/r, r·in/r, r)` as row, shard and column of each row block, `(out/r, r, in/r, r)`."""
    return shards.reshape(shards.shape[0], r, -1, shards.shape[2])  # autograd's own vmap knows no unflatten

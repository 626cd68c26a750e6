"""The algebra of bat, whose update depends on the weight: `ΔW[o, k] = W[o, k] B[o] + B[o]` in blocks of `r×r`.

Three ways to one result, with `x (T, in)`, `W (out, in)`, `B (out/r, r, r)`:

    one product     x (W + ΔW)ᵀ
    two products    x Wᵀ + x ΔWᵀ                                   16-bit W: W + ΔW would round small updates away
    factored        x Wᵀ + Σ_k W[o, k] z[o, k] + z[o, k]           with z[o, k] = B[o] x_k: ΔW is never formed

In training ΔW is formed once more in the backward instead of being kept, with

    dx = dy (W + ΔW),   dW = dyᵀ x,   dB[o] = Σ_k (W[o, k]ᵀ + I) dW[o, k]

so that what a site keeps is `x`. That takes an autograd function: autograd keeps the operands of a product, and
AOTAutograd would merge a second, equal computation with the first and keep its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor


def bat_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], two_products: bool, few_tokens: int
) -> Tensor:
    """`x (W + Σ ΔW)ᵀ + bias`: the whole call of a site with bat blocks; `ΔW` always comes from the base weight.

    Args:
        x: `(…, in)`.
        weight: `(out, in)`, of any strides.
        bias: `(out)` or None.
        blocks: `(out/r, r, r)` each, of any ranks.
        two_products: one with `W` and one with `ΔW`, since the sum of the two would be rounded.
        few_tokens: up to this many tokens a call without gradients takes the factored form, see `misscompile.cost`.
    """
    if _needs_gradient(x, weight, bias, *blocks):
        if not _is_transformed():
            return _call_product(x, weight, bias, two_products, *blocks)
    elif x.numel() <= few_tokens * x.shape[-1]:
        return _add_factored(F.linear(x, weight, bias), x, weight, blocks)
    update = _sum_deltas(weight, blocks)
    if two_products:
        return _add_linear(F.linear(x, weight, bias), x, update)
    return F.linear(x, weight + update, bias)


def add_bat(y: Tensor, x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """`y + x ΔWᵀ`: a product of its own, for an input that is not the base's (dropout) and a base that is not a product."""
    if _needs_gradient(x, weight, block) and not _is_transformed():
        return y + _call_product(x, weight, None, None, block)
    return y + F.linear(x, bat_delta(weight, block))


def bat_delta(weight: Tensor, block: Tensor) -> Tensor:
    """`ΔW (out, in)` of bat from `weight (out, in)` and `block (out/r, r, r)`, in the dtype of `weight`.

    A row block of `W` is `r` rows of `in/r` shards of length `r`; in memory that is one `(r·in/r, r)` matrix, so that
    all `W[o, k] B[o]` of a linear are one batched product without a permutation. The added `B[o]` is usually the larger
    part: it is added in the dtype of the block.
    """
    product = torch.bmm(_shards(weight, block.shape[-1]), block.to(weight.dtype))
    delta = _rows(product, block) + block.unsqueeze(2)
    return delta.to(weight.dtype).view(weight.shape)


def add_bat_delta_(merged: Tensor, weight: Tensor, block: Tensor, product: Tensor) -> Tensor:
    """Add `bat_delta(weight, block)` in place to `merged (out, in)` and return it; no memory is taken.

    `product`, as large as `weight`, is written over. Both are contiguous, and all four of one dtype.
    """
    r = block.shape[-1]
    shards = torch.bmm(_shards(weight, r), block, out=_shards(product, r))
    _rows(shards, block).add_(block.unsqueeze(2))
    return merged.add_(product)


def _sum_deltas(weight: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    first, *others = (bat_delta(weight, block) for block in blocks)
    return sum(others, first)


def _bat_delta_again(weight: Tensor, block: Tensor) -> Tensor:
    """`bat_delta` for the backward by other operations, which no compiler merges with those of the forward."""
    b = block.to(weight.dtype)
    shards = _shards(weight, block.shape[-1])
    tiled = b.unsqueeze(2).expand(-1, -1, weight.shape[1] // b.shape[-1], -1).reshape(shards.shape)
    return torch.baddbmm(tiled, shards, b).view(weight.shape)


def _add_factored(y: Tensor, x: Tensor, weight: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """`y + x ΔWᵀ` without anything of the size of `W`; `y` itself is apart, so that zero blocks leave every bit of it."""
    in_features = x.shape[-1]
    tokens = x.reshape(-1, in_features)
    for block in blocks:
        groups, r = block.shape[0], block.shape[-1]
        shards = tokens.reshape(1, -1, r).expand(groups, -1, -1)
        z = torch.bmm(shards, block.to(x.dtype).transpose(1, 2)).view(groups, -1, in_features)
        by_group = torch.unflatten(weight, 0, (groups, r))
        through_weight = torch.bmm(by_group, z.transpose(1, 2)).transpose(1, 2)
        update = through_weight + torch.unflatten(z, -1, (in_features // r, r)).sum(2)
        y = y + update.transpose(0, 1).reshape(y.shape).to(y.dtype)
    return y


def _add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`y + x weightᵀ`, accumulated on `y`."""
    if x.dtype != weight.dtype or y.dtype != x.dtype:  # autocast, which casts in a linear
        return y + F.linear(x, weight)
    return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), weight.t()).view_as(y)


def _call_product(x: Tensor, weight: Tensor, bias: Tensor | None, two_products: bool | None, *blocks: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, weight, bias, two_products, *blocks)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """`x (W + ΔW)ᵀ + bias` in one product (`two_products` False) or two (True), or `x ΔWᵀ` alone (None)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, two_products: bool | None, *blocks: Tensor) -> Tensor:
        update = _sum_deltas(weight, blocks)
        if two_products is None:
            return F.linear(x, update)
        if two_products:
            return _add_linear(F.linear(x, weight, bias), x, update)
        return F.linear(x, weight + update, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.two_products, *blocks = inputs
        ctx.save_for_backward(x, weight, *blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *blocks = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, *needs_blocks = ctx.needs_input_grad
        g = gradients[0].reshape(-1, weight.shape[0])
        dx = dweight = None
        dblocks: list[Tensor | None] = [None] * len(blocks)
        if needs_x:
            total = weight if ctx.two_products is not None else torch.zeros((), dtype=weight.dtype, device=weight.device)
            for block in blocks:
                total = total + _bat_delta_again(weight, block)
            dx = (g @ total.to(g.dtype)).to(x.dtype).view(x.shape)
        if needs_weight or any(needs_blocks):
            product = (g.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(weight.dtype)
            dblocks = [
                _block_gradient(product, weight, block) if needed else None
                for block, needed in zip(blocks, needs_blocks, strict=True)
            ]
            if needs_weight:
                dweight = torch.zeros_like(product) if ctx.two_products is None else product
                for block in blocks:
                    r = block.shape[-1]
                    folded = torch.bmm(_shards(product, r), block.to(product.dtype).transpose(1, 2))
                    dweight = dweight + folded.view(product.shape)
        return (dx, dweight, g.sum(0) if needs_bias else None, None, *dblocks)


def _block_gradient(product: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """`Σ_k (W[o, k]ᵀ + I) dW[o, k]`, the sum over the identity in the dtype of the block."""
    shards = _shards(product, block.shape[-1])
    through_weight = torch.bmm(_shards(weight, block.shape[-1]).transpose(1, 2), shards)
    return through_weight.to(block.dtype) + _rows(shards, block).sum(2, dtype=block.dtype)


def _shards(weight: Tensor, r: int) -> Tensor:
    """`(out, in)` as the shards of each row block, `(out/r, r·in/r, r)`."""
    return weight.reshape(weight.shape[0] // r, weight.shape[1], r)


def _rows(shards: Tensor, block: Tensor) -> Tensor:
    """`(out/r, r·in/r, r)` as row, shard and column of each row block, `(out/r, r, in/r, r)`."""
    return torch.unflatten(shards, 1, (block.shape[-1], -1))


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _is_transformed() -> bool:
    """Whether a `torch.func` transform runs; there the plain operations are what composes."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# The choice of a form is made when the model runs: one node where the insert pass traces this file.
torch.fx.wrap("add_bat")

"""Bat on a device. Three ways to one result, with `x (T, in)`, `W (out, in)`, `B (out/r, r, r)`:

    one product     x (W + ΔW)ᵀ
    two products    x Wᵀ + x ΔWᵀ                                   16-bit W: W + ΔW would round small updates away
    factored        x Wᵀ + Σ_k W[o, k] z[o, k] + z[o, k]           with z[o, k] = B[o] x_k: ΔW is never formed

In training ΔW is formed once more in the backward instead of being kept, with

    dx = dy (W + ΔW),   dW = dyᵀ x,   dB[o] = Σ_k (W[o, k]ᵀ + I) dW[o, k]

so that what a site keeps is `x`. That takes an autograd function: autograd keeps the operands of a product, and
AOTAutograd would merge a second, equal computation with the first and keep its result. Under `torch.compile` a call is one
operator with one more for its gradients: Inductor could not fuse its products with anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misscompile.kernels.device import is_transformed, takes_operators
from misscompile.kernels.operators import define_operator, register_gradient
from misscompile.variants.bat import bat_delta, by_shard, row_shards


def bat_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], round_weight: bool) -> Tensor:
    """`x (W + Σ ΔW)ᵀ + bias`: the whole call of a site with bat blocks; each ΔW comes from the base weight.

    A 16-bit weight takes two products unless `round_weight`; a wider one has room for small updates.

    Args:
        x: `(…, in)`.
        weight: `(out, in)`, of any strides.
        bias: `(out)` or None.
        blocks: `(out/r, r, r)` each, of any ranks.
        round_weight: take one product with the rounded `W + ΔW` in any case.
    """
    two_products = weight.dtype.itemsize == 2 and not round_weight
    if takes_operators(x) and not torch.is_autocast_enabled(x.device.type):  # an operator of ours knows no autocast
        y: Tensor = BAT_LINEAR(x, weight, bias, blocks, two_products)
        return y
    return _bat_linear(x, weight, bias, blocks, two_products)


def _bat_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], two_products: bool) -> Tensor:
    if _needs_gradient(x, weight, bias, *blocks):
        if not is_transformed():
            return _call_product(x, weight, bias, two_products, *blocks)
    elif not torch.compiler.is_exporting() and x.numel() <= _few_tokens(blocks, two_products) * x.shape[-1]:
        return _add_factored(F.linear(x, weight, bias), x, weight, blocks)
    update = _sum_deltas(weight, blocks)
    if two_products:
        return _add_linear(F.linear(x, weight, bias), x, update)
    return F.linear(x, weight + update, bias)


def _few_tokens(blocks: Sequence[Tensor], two_products: bool) -> int:
    """Up to how many tokens the factored form, of two products as large as the base's, takes no more FLOPs.

    Forming ΔW takes `in · out · r` multiply-adds, which are as many as `r` tokens take in a product of the base's size.
    """
    r = min(block.shape[-1] for block in blocks)
    return r if two_products else r // 2


def add_bat(y: Tensor, x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """`y + x ΔWᵀ`: a product of its own, for an input that is not the base's (dropout) and a base that is not a product."""
    if _needs_gradient(x, weight, block) and not is_transformed():
        return y + _call_product(x, weight, None, None, block)
    return y + F.linear(x, bat_delta(weight, block))


def _sum_deltas(weight: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    first, *others = (bat_delta(weight, block) for block in blocks)
    return sum(others, first)


def _bat_delta_again(weight: Tensor, block: Tensor) -> Tensor:
    """`bat_delta` for the backward by other operations, which no compiler merges with those of the forward."""
    b = block.to(weight.dtype)
    shards = row_shards(weight, block.shape[-1])
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
        needs = [needs_x, needs_weight, needs_bias, *needs_blocks]
        dx, dweight, dbias, *dblocks = _spread(_gradients(gradients[0], x, weight, blocks, ctx.two_products, needs), needs)
        return (dx, dweight, dbias, None, *dblocks)


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, blocks: Sequence[Tensor], two_products: bool | None, needs: Sequence[bool]
) -> list[Tensor]:
    """Those of the gradients of x, weight, bias and each block that `needs` asks for; `two_products` as in `_Product`."""
    needs_x, needs_weight, needs_bias, *needs_blocks = needs
    g = g.reshape(-1, weight.shape[0])
    found = []
    if needs_x:
        total = weight if two_products is not None else torch.zeros((), dtype=weight.dtype, device=weight.device)
        for block in blocks:
            total = total + _bat_delta_again(weight, block)
        found.append((g @ total.to(g.dtype)).to(x.dtype).view(x.shape))
    if needs_weight or any(needs_blocks):
        product = (g.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(weight.dtype)
    if needs_weight:
        dweight = torch.zeros_like(product) if two_products is None else product
        for block in blocks:
            folded = torch.bmm(row_shards(product, block.shape[-1]), block.to(product.dtype).transpose(1, 2))
            dweight = dweight + folded.view(product.shape)
        found.append(dweight)
    if needs_bias:
        found.append(g.sum(0))
    found += [_block_gradient(product, weight, block) for block, needed in zip(blocks, needs_blocks, strict=True) if needed]
    return found


def _spread(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """`found` in the places where `needs` is true, None in the others."""
    rest = iter(found)
    return [next(rest) if needed else None for needed in needs]


def _block_gradient(product: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """`Σ_k (W[o, k]ᵀ + I) dW[o, k]`, the sum over the identity in the dtype of the block."""
    shards = row_shards(product, block.shape[-1])
    through_weight = torch.bmm(row_shards(weight, block.shape[-1]).transpose(1, 2), shards)
    return through_weight.to(block.dtype) + by_shard(shards, block.shape[-1]).sum(2, dtype=block.dtype)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _like_gradients(
    g: Tensor, x: Tensor, weight: Tensor, blocks: Sequence[Tensor], two_products: bool, needs: Sequence[bool]
) -> list[Tensor]:
    operands = (x, weight, g.new_empty(g.shape[-1]), *blocks)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(operands, needs, strict=True) if needed]


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, blocks, ctx.two_products = inputs
    ctx.needs = [tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, *blocks)]
    ctx.save_for_backward(x, weight, *blocks)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, weight, *blocks = ctx.saved_tensors
    found = BAT_GRADIENTS(g, x, weight, blocks, ctx.two_products, ctx.needs)
    dx, dweight, dbias, *dblocks = _spread(found, ctx.needs)
    return dx, dweight, dbias, dblocks, None


BAT_LINEAR = define_operator(
    "bat_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] blocks, bool two_products) -> Tensor",
    _bat_linear,
    lambda x, weight, bias, blocks, two_products: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
BAT_GRADIENTS = define_operator(
    "bat_gradients(Tensor g, Tensor x, Tensor weight, Tensor[] blocks, bool two_products, bool[] needs) -> Tensor[]",
    _gradients,
    _like_gradients,
)
register_gradient("bat_linear", _differentiate, _keep_operands)

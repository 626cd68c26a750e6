"""The algebra of bat, whose update depends on the weight: `ΔW[o, k] = W[o, k] B[o] + B[o]` in blocks of `r×r`.

Three ways to one result, with `x (T, in)`, `W (out, in)`, `B (out/r, r, r)`:

    one product     x (W + ΔW)ᵀ
    two products    x Wᵀ + x ΔWᵀ                                   16-bit W: W + ΔW would round small updates away
    factored        x Wᵀ + Σ_k W[o, k] z[o, k] + z[o, k]           with z[o, k] = B[o] x_k: ΔW is never formed

In training ΔW is formed once more in the backward instead of being kept, with

    dx = dy (W + ΔW),   dW = dyᵀ x,   dB[o] = Σ_k (W[o, k]ᵀ + I) dW[o, k]

so that what a site keeps is `x`. That takes an autograd function: autograd keeps the operands of a product, and
AOTAutograd would merge a second, equal computation with the first and keep its result. Under `torch.compile` a call is one
operator with one more for its gradients, since Inductor would make nothing of it but a kernel for each cast, sum and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from misscompile.operators import define_operator, register_gradient, takes_operators
from misscompile.transforms import is_transformed


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
        few_tokens: up to this many tokens a call without gradients takes the factored form, see `misscompile.cost`. As an
            operator, which chooses when it runs and below autograd, a call in training does so too.
    """
    if takes_operators(x) and not torch.is_autocast_enabled(x.device.type):  # a foreign operator knows no autocast
        y: Tensor = BAT_LINEAR(x, weight, bias, blocks, two_products, few_tokens)
        return y
    if _needs_gradient(x, weight, bias, *blocks):
        if not is_transformed():
            return _call_product(x, weight, bias, two_products, *blocks)
    elif x.numel() <= few_tokens * x.shape[-1]:
        return _add_factored(F.linear(x, weight, bias), x, weight, blocks)
    update = _sum_deltas(weight, blocks)
    if two_products:
        return _add_linear(F.linear(x, weight, bias), x, update)
    return F.linear(x, weight + update, bias)


def add_bat(y: Tensor, x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """`y + x ΔWᵀ`: a product of its own, for an input that is not the base's (dropout) and a base that is not a product."""
    if _needs_gradient(x, weight, block) and not is_transformed():
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
            folded = torch.bmm(_shards(product, block.shape[-1]), block.to(product.dtype).transpose(1, 2))
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


def _like_gradients(
    g: Tensor, x: Tensor, weight: Tensor, blocks: Sequence[Tensor], two_products: bool, needs: Sequence[bool]
) -> list[Tensor]:
    operands = (x, weight, g.new_empty(g.shape[-1]), *blocks)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(operands, needs, strict=True) if needed]


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, blocks, ctx.two_products, _ = inputs
    ctx.needs = [tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, *blocks)]
    ctx.save_for_backward(x, weight, *blocks)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, weight, *blocks = ctx.saved_tensors
    found = BAT_GRADIENTS(g, x, weight, blocks, ctx.two_products, ctx.needs)
    dx, dweight, dbias, *dblocks = _spread(found, ctx.needs)
    return dx, dweight, dbias, dblocks, None, None


BAT_LINEAR = define_operator(
    "bat_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] blocks, bool two_products, int few_tokens) -> Tensor",
    bat_linear,
    lambda x, weight, bias, blocks, two_products, few_tokens: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
BAT_GRADIENTS = define_operator(
    "bat_gradients(Tensor g, Tensor x, Tensor weight, Tensor[] blocks, bool two_products, bool[] needs) -> Tensor[]",
    _gradients,
    _like_gradients,
)
register_gradient("bat_linear", _differentiate, _keep_operands)

# The choice of a form is made when the model runs: one node where the insert pass traces this file.
torch.fx.wrap("add_bat")

"""Bat on a device. A call takes one of three forms, with `x (T, in)`, `W (out, in)`, `B (out/r, r, r)`:

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

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misscompile.kernels.device import check_blocks, is_transformed, takes_factored, takes_operators
from misscompile.kernels.operators import define_operator
from misscompile.variants import Form
from misscompile.variants.bat import bat_delta, by_shard, row_shards


def bat_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Tensor], round_weight: bool) -> Tensor:
    """`x (W + Σ ΔW)ᵀ + bias`: the whole call of a site with bat blocks of any ranks, for a weight of any strides.

    Each ΔW comes from the base weight. `round_weight` lets a 16-bit `W + ΔW` be rounded, for one product; a wider one has
    room for small updates.
    """
    check_blocks(*blocks)
    form: Form = "two products" if weight.dtype.itemsize == 2 and not round_weight else "one product"
    if takes_operators(x) and not torch.is_autocast_enabled(x.device.type):  # an operator of ours knows no autocast
        y: Tensor = BAT_LINEAR(x, weight, bias, form, blocks)
        return y
    return _bat_linear(x, weight, bias, form, blocks)


def add_bat(y: Tensor, x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """`y + x ΔWᵀ`: a product of its own, for an input that is not the base's (dropout) and a base that is not a product."""
    check_blocks(block)
    return y + _product_that_keeps_x(x, weight, None, "beside the base", [block])


def _bat_linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, blocks: Sequence[Tensor]) -> Tensor:
    smallest = min(block.shape[-1] for block in blocks)
    if not _needs_gradient(x, weight, bias, *blocks) and takes_factored(x, smallest, form):
        return _add_factored(F.linear(x, weight, bias), x, weight, blocks)
    return _product_that_keeps_x(x, weight, bias, form, blocks)


def _product_that_keeps_x(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, blocks: Sequence[Tensor]) -> Tensor:
    if _needs_gradient(x, weight, bias, *blocks) and not is_transformed():
        y: Tensor = _Product.apply(x, weight, bias, form, *blocks)  # type: ignore[no-untyped-call]
        return y
    return _product(x, weight, bias, form, blocks)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, blocks: Sequence[Tensor]) -> Tensor:
    """`x (W + ΔW)ᵀ + bias` in one product or two, or `x ΔWᵀ` alone."""
    update = reduce(torch.add, [bat_delta(weight, block) for block in blocks])
    if form == "one product":
        return F.linear(x, weight + update, bias)
    if form == "beside the base":
        return F.linear(x, update)
    y = F.linear(x, weight, bias)
    if x.dtype != weight.dtype or y.dtype != x.dtype:  # autocast, which casts in a linear
        return y + F.linear(x, update)
    return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), update.t()).view_as(y)


def _add_factored(y: Tensor, x: Tensor, weight: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """`y + x ΔWᵀ` without anything of the size of `W`; `y` itself is apart, so that zero blocks leave every bit of it."""
    in_features = x.shape[-1]
    for block in blocks:
        groups, r = block.shape[0], block.shape[-1]
        shards = x.reshape(1, -1, r).expand(groups, -1, -1)
        z = torch.bmm(shards, block.to(x.dtype).transpose(1, 2)).view(groups, -1, in_features)
        through_weight = torch.bmm(torch.unflatten(weight, 0, (groups, r)), z.transpose(1, 2)).transpose(1, 2)
        update = through_weight + torch.unflatten(z, -1, (in_features // r, r)).sum(2)
        y = y + update.transpose(0, 1).reshape(y.shape).to(y.dtype)
    return y


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, form: Form, blocks: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that `needs` asks for, of `x`, `weight`, the bias, the form (it has none) and each block."""
    needs_x, needs_weight, needs_bias, _, *needs_blocks = needs
    in_base = form != "beside the base"
    g = g.reshape(-1, weight.shape[0])
    found = []
    if needs_x:
        deltas = (_bat_delta_again(weight, block) for block in blocks)
        total = reduce(torch.add, deltas, weight) if in_base else reduce(torch.add, deltas)
        found.append((g @ total.to(g.dtype)).to(x.dtype).view(x.shape))
    if needs_weight or any(needs_blocks):
        product = (g.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(weight.dtype)
    if needs_weight:
        through = (_through_block(product, block) for block in blocks)
        found.append(reduce(torch.add, through, product) if in_base else reduce(torch.add, through))
    if needs_bias:
        found.append(g.sum(0))
    found += [_block_gradient(product, weight, block) for block, needed in zip(blocks, needs_blocks, strict=True) if needed]
    return found


def _through_block(product: Tensor, block: Tensor) -> Tensor:
    """`dW[o, k] B[o]ᵀ`, the gradient of `W` through `ΔW`."""
    shards = row_shards(product, block.shape[-1])
    return torch.bmm(shards, block.to(product.dtype).transpose(1, 2)).view(product.shape)


def _bat_delta_again(weight: Tensor, block: Tensor) -> Tensor:
    """`bat_delta` for the backward by other operations, which no compiler merges with those of the forward."""
    b = block.to(weight.dtype)
    shards = row_shards(weight, block.shape[-1])
    tiled = b.unsqueeze(2).expand(-1, -1, weight.shape[1] // b.shape[-1], -1).reshape(shards.shape)
    return torch.baddbmm(tiled, shards, b).view(weight.shape)


def _block_gradient(product: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """`Σ_k (W[o, k]ᵀ + I) dW[o, k]`, the sum over the identity in the dtype of the block."""
    shards = row_shards(product, block.shape[-1])
    through_weight = torch.bmm(row_shards(weight, block.shape[-1]).transpose(1, 2), shards)
    return through_weight.to(block.dtype) + by_shard(shards, block.shape[-1]).sum(2, dtype=block.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.form, blocks = inputs
    ctx.save_for_backward(x, weight, *blocks)


def _differentiate(ctx: Any, g: Tensor, needs: Sequence[bool], gradients: Callable[..., Any]) -> list[Tensor | None]:
    """The gradients of `x`, `weight`, the bias, the form (it has none) and each block, None where `needs` is false."""
    x, weight, *blocks = ctx.saved_tensors
    found = iter(gradients(g, x, weight, ctx.form, blocks, needs))
    return [next(found) if needed else None for needed in needs]


class _Product(torch.autograd.Function):
    """`_product`; its gradients are plain operations, so that they have gradients too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, *blocks: Tensor) -> Tensor:
        return _product(x, weight, bias, form, blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, (*inputs[:4], inputs[4:]), output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(_differentiate(ctx, gradients[0], ctx.needs_input_grad, _gradients))


def _differentiate_call(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    *needs, needs_blocks = ctx.needs_input_grad
    dx, dweight, dbias, _, *dblocks = _differentiate(ctx, g, [*needs, *needs_blocks], BAT_GRADIENTS)
    return dx, dweight, dbias, None, dblocks


def _like_gradients(
    g: Tensor, x: Tensor, weight: Tensor, form: Form, blocks: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    bias = g.new_empty(g.shape[-1])
    operands = (x, weight, bias, bias, *blocks)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(operands, needs, strict=True) if needed]


BAT_GRADIENTS = define_operator(
    "bat_gradients(Tensor g, Tensor x, Tensor weight, str form, Tensor[] blocks, bool[] needs) -> Tensor[]",
    _gradients,
    _like_gradients,
)
BAT_LINEAR = define_operator(
    "bat_linear(Tensor x, Tensor weight, Tensor? bias, str form, Tensor[] blocks) -> Tensor",
    _bat_linear,
    lambda x, weight, bias, form, blocks: x.new_empty((*x.shape[:-1], weight.shape[0])),
    _keep,
    _differentiate_call,
)

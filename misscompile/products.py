"""Adding the product with a block, or its repeat, to an output: the forms, their gradients, and each as one operator.

Under `torch.compile`, where a 16-bit output meets a wider block or a repeat is too short for a vector register, each is an
operator of its own that runs the very forms of eager mode. Inductor makes nothing of their parts: a product is a call, and
the 16-bit copy of a block that it reads would be a generated kernel by itself, one for each shape and again for the
gradient, each a run of the C++ compiler, and AOTAutograd would keep the copy for the backward. Around the operator
everything fuses as before: the shard sum into what makes `x`, the gradient of the sum into what reads it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from misscompile.operators import define_operator, register_gradient, takes_operators

MANY_TOKENS = 64
"""From here on a product over 16-bit tokens is worth a preparation of its own (measured, CPU)."""

VECTOR = 64
"""Bytes in a vector register."""

GROUP = 64
"""Values that are added at a time where a group of mini fills no vector register (measured, CPU: best of 32, 64, 128)."""


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """dtype in which the shards of `x` are summed: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def match_dtype(s: Tensor, block: Tensor, y: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """`s` and `block` in the dtype of `y`, for a product with the dtype of the base output.

    A sum of `terms` float16 values can exceed float16's range although each value is finite; then zero times infinity
    would make an untrained adapter differ from its base. A power of two moved from `s` to `block` leaves the product
    the same and keeps `s` within the largest value of `x`.
    """
    scale = _scale(y, terms)
    if scale != 1:
        return (s / scale).to(y.dtype), (block * scale).to(y.dtype)
    return cast(s, y.dtype), cast(block, y.dtype)


def is_one_call(y: Tensor, other: Tensor) -> bool:
    """Whether what is added to `y` becomes an operator of its own: where its dtype has to change, see the module.

    Between equal dtypes nothing has to be prepared.
    """
    return y.dtype.itemsize == 2 and other.dtype != y.dtype and takes_operators(y)


def is_one_call_by_width(y: Tensor, update: Tensor) -> bool:
    """Whether adding `update (…, m)` to groups of `y` becomes an operator because a group does not fill a vector register.

    There Inductor's loop over `o mod m` runs value by value: an eighth of a training step in float32.
    """
    return not fills_vector(y.dtype, update.shape[-1]) and takes_operators(y)


def fills_vector(dtype: torch.dtype, m: int) -> bool:
    """Whether `m` values fill a vector register."""
    return m * dtype.itemsize >= VECTOR


def plain_add_product(y: Tensor, s: Tensor, block: Tensor, terms: int) -> Tensor:
    """See `misscompile.variants.add_product`."""
    if _is_wide(y) or (y.dtype == torch.float32 and torch.is_autocast_enabled(y.device.type)):
        s = cast(s, accumulation_dtype(s))
        return y + cast(s @ cast(block, s.dtype), y.dtype)
    s, d = match_dtype(s, block, y, terms)
    return torch.addmm(y.reshape(-1, y.shape[-1]), s.reshape(-1, s.shape[-1]), d).view_as(y)


def plain_add_groups(y: Tensor, update: Tensor) -> Tensor:
    """See `misscompile.variants.add_groups`."""
    out_features, m = y.shape[-1], update.shape[-1]
    width = _group_width(y, m)
    update = cast(update if width == m else update.tile(width // m), y.dtype)
    return (torch.unflatten(y, -1, (out_features // width, width)) + update.unsqueeze(-2)).flatten(-2)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without a call where nothing changes: with one token, a call is what a site costs."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _is_wide(y: Tensor) -> bool:
    """Whether the product for an output takes the precision of its block, and is added to the output by itself.

    Few tokens: casting a 16-bit copy of the block, or reshaping for `addmm`, takes longer than that. The latter are a few
    microseconds, and no reason for a second compiled graph.
    """
    return _is_few(y) and (y.dtype.itemsize == 2 or not torch.compiler.is_compiling())


def _is_few(y: Tensor) -> bool:
    return y.numel() < MANY_TOKENS * y.shape[-1]


def _group_width(y: Tensor, m: int) -> int:
    """How many outputs an update of `m` values is added to at a time; more than `m` after repeating the update itself.

    An innermost loop of a few values takes up to ten times as long. Few tokens do not pay for the repetition, a compiler
    makes one loop of both, and a single value is not read in a loop.
    """
    if torch.compiler.is_compiling() or not y.is_cpu or _is_few(y) or m == 1 or fills_vector(y.dtype, m):
        return m
    return _repeated_width(y.shape[-1], m)


@functools.cache
def _repeated_width(out_features: int, m: int) -> int:
    """The least multiple of `m` that divides the outputs and has `GROUP` values, or else all of them."""
    fitting = (width for width in range(m, out_features + 1, m) if out_features % width == 0)
    return next((width for width in fitting if width >= GROUP), out_features)


def _scale(y: Tensor, terms: int) -> float:
    return float(2 ** (terms - 1).bit_length()) if y.dtype == torch.float16 else 1.0


def _sum_gradient(g: Tensor, block: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """`g Dᵀ (…, r)`, the gradient of `s`, in its dtype."""
    if _is_wide(g):
        wide = torch.promote_types(dtype, torch.float32)
        return (g.to(wide) @ block.to(wide).t()).to(dtype)
    scale = _scale(g, terms)
    return (g @ (block * scale).to(g.dtype).t()).to(dtype) / scale


def _block_gradient(g: Tensor, s: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """`sᵀ g (r, out)`, the gradient of the block, in its dtype."""
    g, s = g.reshape(-1, g.shape[-1]), s.reshape(-1, s.shape[-1])
    if _is_wide(g):
        wide = accumulation_dtype(s)
        return (s.to(wide).t() @ g.to(wide)).to(dtype)
    scale = _scale(g, terms)
    return ((s / scale).to(g.dtype).t() @ g).to(dtype) * scale


def _groups_gradient(g: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """The groups of `g (…, out)` summed, `(…, m)`."""
    width = _group_width(g, m)
    sums = torch.unflatten(g, -1, (-1, width)).sum(-2).to(dtype)
    return sums if width == m else torch.unflatten(sums, -1, (-1, m)).sum(-2)


_SUM_GRADIENT = define_operator(
    "sum_gradient(Tensor g, Tensor block, int terms, ScalarType dtype) -> Tensor",
    _sum_gradient,
    lambda g, block, terms, dtype: g.new_empty((*g.shape[:-1], block.shape[0]), dtype=dtype),
)
_BLOCK_GRADIENT = define_operator(
    "block_gradient(Tensor g, Tensor s, int terms, ScalarType dtype) -> Tensor",
    _block_gradient,
    lambda g, s, terms, dtype: g.new_empty((s.shape[-1], g.shape[-1]), dtype=dtype),
)
_GROUPS_GRADIENT = define_operator(
    "groups_gradient(Tensor g, int m, ScalarType dtype) -> Tensor",
    _groups_gradient,
    lambda g, m, dtype: g.new_empty((*g.shape[:-1], m), dtype=dtype),
)
ADD_PRODUCT = define_operator(
    "add_product(Tensor y, Tensor s, Tensor block, int terms) -> Tensor",
    plain_add_product,
    lambda y, s, block, terms: y.new_empty(y.shape),
)
ADD_GROUPS = define_operator(
    "add_groups(Tensor y, Tensor update) -> Tensor", plain_add_groups, lambda y, update: y.new_empty(y.shape)
)


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, s, block, ctx.terms = inputs
    ctx.sum_dtype, ctx.block_dtype = s.dtype, block.dtype
    ctx.save_for_backward(s if ctx.needs_input_grad[2] else None, block if ctx.needs_input_grad[1] else None)


def _differentiate_product(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    s, block = ctx.saved_tensors
    ds = None if block is None else _SUM_GRADIENT(g, block, ctx.terms, ctx.sum_dtype)
    dblock = None if s is None else _BLOCK_GRADIENT(g, s, ctx.terms, ctx.block_dtype)
    return g, ds, dblock, None


def _keep_groups(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.m, ctx.dtype = inputs[1].shape[-1], inputs[1].dtype


def _differentiate_groups(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return g, _GROUPS_GRADIENT(g, ctx.m, ctx.dtype)


register_gradient("add_product", _differentiate_product, _keep_product)
register_gradient("add_groups", _differentiate_groups, _keep_groups)

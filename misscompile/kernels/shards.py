"""Balance and mini on a device: the shard sum, and the addition of its product to the base output.

    s = x.unflatten(-1, (n, r)).sum(-2)
    y = y + s D                                       balance, D (r, out)
    y = y.unflatten(-1, (out/m, m)) + (s D)[…, None, :]    mini, D (r, m)

Under `torch.compile`, where a 16-bit output meets a wider block or `m` values fill no vector register, the addition is an
operator. Inductor could not fuse its parts: a product is a call of its own, and the 16-bit copy of a block is a generated
kernel for each shape and again for the gradient, each a run of the C++ compiler. The shard sum stays plain operations: it
fuses into the kernel that makes `x`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misscompile.kernels.device import fills_vector, group_width, has_few_tokens, takes_operators
from misscompile.kernels.operators import define_operator, register_gradient


def sum_shards(x: Tensor, r: int, for_product: bool = False) -> Tensor:
    """`s[…, j] = Σ_k x[…, k r + j]`, shape `(…, r)`, in float32 (float64 for float64); `x (…, in)` is not cast or padded.

    `for_product` lets a bfloat16 sum keep that dtype, for a product in it: torch accumulates it in float32 and rounds once,
    and the gradient is not a float32 tensor as wide as `x`.
    """
    n, rest = divmod(x.shape[-1], r)
    keeps = for_product and rest == 0 and x.dtype == torch.bfloat16 and not has_few_tokens(x)
    dtype = x.dtype if keeps else accumulation_dtype(x)
    if rest == 0:
        return torch.unflatten(x, -1, (n, r)).sum(-2, dtype=dtype)
    whole = torch.unflatten(x[..., : n * r], -1, (n, r)).sum(-2, dtype=dtype)
    return whole + F.pad(x[..., n * r :], (0, r - rest))


def add_update(y: Tensor, s: Tensor, block: Tensor, terms: int) -> Tensor:
    """`y (…, out)` with `s D` added to each group of as many outputs as `block (r, c)` has columns.

    Args:
        y: the base output.
        s: `sum_shards` of the input, with `for_product` where the block has a column for each output.
        block: of any floating dtype.
        terms: how many shards are summed in `s`.

    Returns:
        A tensor of the shape and dtype of `y`.
    """
    if block.shape[1] != y.shape[-1]:
        # so small a product stays in the dtype of the sum: in 16 bits it would round the gradient of a block that every
        # output takes part in
        update = s @ block.to(s.dtype)
        narrow = not fills_vector(y.dtype, update.shape[-1])
        is_one_call = (narrow or _changes_dtype(y, update)) and takes_operators(y)
        added: Tensor = ADD_GROUPS(y, update) if is_one_call else add_groups(y, update)
        return added
    if _changes_dtype(y, block) and takes_operators(y):
        added = ADD_PRODUCT(y, s, block, terms)
        return added
    return add_product(y, s, block, terms)


def add_product(y: Tensor, s: Tensor, block: Tensor, terms: int) -> Tensor:
    """`y + s D` with `block (r, out)`, the product accumulated on `y` by one `addmm` where that pays."""
    if _is_apart(y) or (y.dtype == torch.float32 and torch.is_autocast_enabled(y.device.type)):
        # under autocast, addmm would round a wider y to the dtype of the region
        s = _cast(s, accumulation_dtype(s))
        return y + _cast(s @ _cast(block, s.dtype), y.dtype)
    s, d = _operands(y, s, block, terms)
    return torch.addmm(y.reshape(-1, y.shape[-1]), s.reshape(-1, s.shape[-1]), d).view_as(y)


def add_groups(y: Tensor, update: Tensor) -> Tensor:
    """`y (…, out)` with `update (…, m)` added to each group of `m` outputs, in the dtype of `y`."""
    m, width = update.shape[-1], group_width(y, update.shape[-1])
    update = _cast(update if width == m else update.tile(width // m), y.dtype)
    return (torch.unflatten(y, -1, (y.shape[-1] // width, width)) + update.unsqueeze(-2)).flatten(-2)


def features_last(x: Tensor, strides: Sequence[int]) -> Tensor:
    """`x (…, C, *positions)` of a 1×1 convolution as `(…, *positions, C)`, without positions that `strides` leave out."""
    index: Any = (..., *(slice(None, None, stride) for stride in strides))
    return x[index].movedim(-1 - len(strides), -1)


def features_first(y: Tensor, positions: int) -> Tensor:
    """`y (…, *positions, C)` as the `(…, C, *positions)` that a convolution returns, in memory too: a model may view it."""
    return y.movedim(-1, -1 - positions).contiguous()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """dtype in which the shards of `x` are summed: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _operands(y: Tensor, s: Tensor, block: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """`s` and `block` in the dtype of `y`.

    A sum of `terms` float16 values can exceed float16's range although each value is finite; then zero times infinity
    would make an untrained adapter differ from its base. A power of two moved from `s` to `block` leaves the product
    the same and keeps `s` within the largest value of `x`.
    """
    scale = _scale(y, terms)
    if scale != 1:
        return (s / scale).to(y.dtype), (block * scale).to(y.dtype)
    return _cast(s, y.dtype), _cast(block, y.dtype)


def _scale(y: Tensor, terms: int) -> float:
    return float(2 ** (terms - 1).bit_length()) if y.dtype == torch.float16 else 1.0


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without a call where nothing changes: with one token, a call is what a site costs."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _changes_dtype(y: Tensor, other: Tensor) -> bool:
    """Whether what is added to a 16-bit `y` has to be cast."""
    return y.dtype.itemsize == 2 and other.dtype != y.dtype


def _is_apart(y: Tensor) -> bool:
    """Whether a product takes the precision of its block and is added by itself.

    For few tokens, casting a 16-bit copy of the block, or reshaping for `addmm`, takes longer. The latter is a few
    microseconds, and no reason for a second compiled graph.
    """
    return (y.dtype.itemsize == 2 or not torch.compiler.is_compiling()) and has_few_tokens(y)


def _sum_gradient(g: Tensor, block: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """`g Dᵀ (…, r)`, the gradient of `s`, in its dtype."""
    if _is_apart(g):
        wide = torch.promote_types(dtype, torch.float32)
        return (g.to(wide) @ block.to(wide).t()).to(dtype)
    scale = _scale(g, terms)
    return (g @ (block * scale).to(g.dtype).t()).to(dtype) / scale


def _block_gradient(g: Tensor, s: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """`sᵀ g (r, out)`, the gradient of the block, in its dtype."""
    g, s = g.reshape(-1, g.shape[-1]), s.reshape(-1, s.shape[-1])
    if _is_apart(g):
        wide = accumulation_dtype(s)
        return (s.to(wide).t() @ g.to(wide)).to(dtype)
    scale = _scale(g, terms)
    return ((s / scale).to(g.dtype).t() @ g).to(dtype) * scale


def _groups_gradient(g: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """The groups of `g (…, out)` summed, `(…, m)`."""
    width = group_width(g, m)
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
    add_product,
    lambda y, s, block, terms: y.new_empty(y.shape),
)
ADD_GROUPS = define_operator(
    "add_groups(Tensor y, Tensor update) -> Tensor", add_groups, lambda y, update: y.new_empty(y.shape)
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

"""Balance and mini on a device: the shard sum, and the addition of its product to the base output.

    s = x.unflatten(-1, (n, r)).sum(-2)
    y = y + s D                                            balance, D (r, out)
    y = y.unflatten(-1, (out/m, m)) + (s D)[…, None, :]    mini, D (r, m)

Under `torch.compile`, where a 16-bit output meets a wider block or `m` values fill no vector register, the addition is an
operator. Inductor could not fuse its parts: a product is a call of its own, and the 16-bit copy of a block is a generated
kernel for each shape and again for the gradient, each a run of the C++ compiler. The shard sum stays plain operations: it
fuses into the kernel that makes `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misscompile.kernels.device import check_blocks, fills_vector, group_width, has_few_tokens, takes_operators
from misscompile.kernels.operators import define_operator


def sum_shards(x: Tensor, r: int, for_product: bool = False) -> Tensor:
    """`s[…, j] = Σ_k x[…, k r + j]`, shape `(…, r)`, in float32 (float64 for float64); `x (…, in)` is not cast or padded.

    `for_product` lets a bfloat16 sum keep that dtype, for a product in it: torch accumulates it in float32 and rounds once,
    and the gradient is not a float32 tensor as wide as `x`.
    """
    n, rest = x.shape[-1] // r, x.shape[-1] % r  # no divmod: Dynamo has none for a size that is dynamic
    keeps = for_product and rest == 0 and x.dtype == torch.bfloat16 and not has_few_tokens(x)
    dtype = x.dtype if keeps else _wide(x.dtype)
    whole = torch.unflatten(x[..., : n * r] if rest else x, -1, (n, r)).sum(-2, dtype=dtype)
    return whole + F.pad(x[..., n * r :], (0, r - rest)) if rest else whole


def add_update(y: Tensor, s: Tensor, block: Tensor, terms: int) -> Tensor:
    """`y (…, out)` with `s D` added to each group of as many outputs as `block (r, c)` has columns, in the dtype of `y`.

    `s` is `sum_shards` of the input, with `for_product` where the block has a column for each output; `terms` says how many
    shards it sums. The block may have any floating dtype.
    """
    check_blocks(block)
    add: Callable[..., Tensor]
    if block.shape[1] == y.shape[-1]:
        add = ADD_PRODUCT if _changes_dtype(y, block) and takes_operators(y) else add_product
        return add(y, s, block, terms)
    # so small a product stays in the dtype of the sum: in 16 bits it would round the gradient of a block that every output
    # takes part in
    update = s @ block.to(s.dtype)
    is_split = _changes_dtype(y, update) or not fills_vector(y.dtype, update.shape[-1])
    add = ADD_GROUPS if is_split and takes_operators(y) else add_groups
    return add(y, update)


def features_last(x: Tensor, strides: Sequence[int]) -> Tensor:
    """`x (…, C, *positions)` of a 1×1 convolution as `(…, *positions, C)`, without positions that `strides` leave out."""
    index: Any = (..., *(slice(None, None, stride) for stride in strides))
    return x[index].movedim(-1 - len(strides), -1)


def features_first(y: Tensor, like: Tensor, positions: int) -> Tensor:
    """`y (…, *positions, C)` as `(…, C, *positions)`, and in memory as `like`, what the convolution returns without updates.

    A model may view it, and what sums it takes the values in the order of the memory.
    """
    moved = y.movedim(-1, -1 - positions)
    if like.is_contiguous():
        return moved.contiguous()
    return torch.where(like.new_zeros((), dtype=torch.bool), like.detach(), moved)  # laid out as its first operand is


def add_product(y: Tensor, s: Tensor, block: Tensor, terms: int) -> Tensor:
    """`y + s D` with `block (r, out)`, the product accumulated on `y` by one `addmm` where that pays."""
    if _is_apart(y) or (y.dtype == torch.float32 and torch.is_autocast_enabled(y.device.type)):
        # under autocast, addmm would round a wider y to the dtype of the region
        wide = _wide(s.dtype)
        return y + _cast(_cast(s, wide) @ _cast(block, wide), y.dtype)
    scale = _scale(y, terms)
    s, d = _cast(s, y.dtype, 1 / scale), _cast(block, y.dtype, scale)
    return torch.addmm(y.reshape(-1, y.shape[-1]), s.reshape(-1, s.shape[-1]), d).view_as(y)


def _sum_gradient(g: Tensor, block: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """`g Dᵀ (…, r)`, the gradient of `s`, in its dtype."""
    inner, scale = (_wide(dtype), 1.0) if _is_apart(g) else (g.dtype, _scale(g, terms))
    return _cast(_cast(g, inner) @ _cast(block, inner, scale).t(), dtype, 1 / scale)


def _block_gradient(g: Tensor, s: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """`sᵀ g (r, out)`, the gradient of the block, in its dtype."""
    g, s = g.reshape(-1, g.shape[-1]), s.reshape(-1, s.shape[-1])
    inner, scale = (_wide(s.dtype), 1.0) if _is_apart(g) else (g.dtype, _scale(g, terms))
    return _cast(_cast(s, inner, 1 / scale).t() @ _cast(g, inner), dtype, scale)


def _is_apart(y: Tensor) -> bool:
    """Whether a product takes the precision of its block and is added by itself.

    For few tokens, casting a 16-bit copy of the block, or reshaping for `addmm`, takes longer. The latter is a few
    microseconds, and no reason for a second compiled graph.
    """
    return (y.dtype.itemsize == 2 or not torch.compiler.is_compiling()) and has_few_tokens(y)


def _scale(y: Tensor, terms: int) -> float:
    """A power of two to move from `s` to the block for a product in the dtype of `y`.

    A sum of `terms` float16 values can exceed float16's range although each value is finite; then zero times infinity
    would make an untrained adapter differ from its base. The power of two leaves the product the same and keeps `s` within
    the largest value of `x`.
    """
    return float(2 ** (terms - 1).bit_length()) if y.dtype == torch.float16 else 1.0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """`tensor * scale` in `dtype`, taken in the wider dtype of both; no call where nothing changes.

    With one token, a call is what a site costs.
    """
    if scale != 1.0:
        tensor = tensor.to(torch.promote_types(tensor.dtype, dtype)) * scale
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _changes_dtype(y: Tensor, other: Tensor) -> bool:
    """Whether what is added to a 16-bit `y` has to be cast."""
    return y.dtype.itemsize == 2 and other.dtype != y.dtype


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, s, block, ctx.terms = inputs
    ctx.save_for_backward(s, block)


def _differentiate_product(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    s, block = ctx.saved_tensors
    _, needs_s, needs_block, _ = ctx.needs_input_grad
    ds = _SUM_GRADIENT(g, block, ctx.terms, s.dtype) if needs_s else None
    dblock = _BLOCK_GRADIENT(g, s, ctx.terms, block.dtype) if needs_block else None
    return g, ds, dblock, None


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
ADD_PRODUCT = define_operator(
    "add_product(Tensor y, Tensor s, Tensor block, int terms) -> Tensor",
    add_product,
    lambda y, s, block, terms: y.new_empty(y.shape),
    _keep_product,
    _differentiate_product,
)


def add_groups(y: Tensor, update: Tensor) -> Tensor:
    """`y (…, out)` with `update (…, m)` added to each group of `m` outputs, in the dtype of `y`."""
    m, width = update.shape[-1], group_width(y, update.shape[-1])
    update = _cast(update if width == m else update.tile(width // m), y.dtype)
    return (torch.unflatten(y, -1, (y.shape[-1] // width, width)) + update.unsqueeze(-2)).flatten(-2)


def _groups_gradient(g: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """The groups of `g (…, out)` summed, `(…, m)`: the gradient of the update."""
    width = group_width(g, m)
    sums = torch.unflatten(g, -1, (-1, width)).sum(-2).to(dtype)
    return sums if width == m else torch.unflatten(sums, -1, (-1, m)).sum(-2)


def _keep_groups(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.m, ctx.dtype = inputs[1].shape[-1], inputs[1].dtype


_GROUPS_GRADIENT = define_operator(
    "groups_gradient(Tensor g, int m, ScalarType dtype) -> Tensor",
    _groups_gradient,
    lambda g, m, dtype: g.new_empty((*g.shape[:-1], m), dtype=dtype),
)
ADD_GROUPS = define_operator(
    "add_groups(Tensor y, Tensor update) -> Tensor",
    add_groups,
    lambda y, update: y.new_empty(y.shape),
    _keep_groups,
    lambda ctx, g: (g, _GROUPS_GRADIENT(g, ctx.m, ctx.dtype)),
)

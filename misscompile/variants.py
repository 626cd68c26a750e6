"""The algebra of MiSS (arXiv 2409.15371): balance, mini and bat as plain tensor code.

Nothing here builds a graph or looks into a module. The insert pass traces the `add_*` functions and splices their
operations in at a linear call site; the merge uses `delta_weight`. Symbols: a site computes `y = x Wᵀ + b` with `x (…, in)`,
`W (out, in)`; `r` is the rank, `m` is `mini_r`, `n = ceil(in / r)`.

| variant | block            | update                                                  |
|---------|------------------|---------------------------------------------------------|
| balance | `D (r, out)`     | `ΔW[o, i] = D[i mod r, o]`                              |
| mini    | `D (r, m)`       | `ΔW[o, i] = D[i mod r, o mod m]`                        |
| bat     | `B (out/r, r, r)`| `ΔW[o, k] = W[o, k] B[o] + B[o]`, W in `r×r` blocks     |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from misscompile.bat import bat_delta
from misscompile.config import Variant
from misscompile.dropout import dropout
from misscompile.products import (
    ADD_GROUPS,
    ADD_PRODUCT,
    MANY_TOKENS,
    accumulation_dtype,
    is_one_call,
    is_one_call_by_width,
    plain_add_groups,
    plain_add_product,
)


def block_shape(variant: Variant, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[int, ...]:
    """Shape of the trainable block of one linear of shape `(out_features, in_features)`."""
    if variant == "bat":
        return (out_features // r, r, r)
    return (r, mini_r if variant == "mini" else out_features)


def shape_problem(variant: Variant, r: int, mini_r: int, in_features: int, out_features: int) -> str | None:
    """Why these values do not fit a linear of this shape and which would, or None when they fit."""
    if r > in_features:
        return f"r={r} is more than its {in_features} input features; r of 1 to {in_features} would do"
    if variant == "bat" and (in_features % r or out_features % r):
        fitting = _divisors(math.gcd(in_features, out_features))
        return f"'bat' needs an r that divides in and out, r={r} does not; r of {fitting} would do"
    if variant == "mini" and out_features % mini_r:
        return (
            f"'mini' needs a mini_r that divides out, mini_r={mini_r} does not; mini_r of {_divisors(out_features)} would do"
        )
    return None


def init_block(block: Tensor, random_start: bool) -> None:
    """Write the start values in place: zeros, so that the update is zero, or Kaiming-uniform with `a = sqrt(5)`."""
    if random_start:
        torch.nn.init.kaiming_uniform_(block, a=math.sqrt(5))
    else:
        torch.nn.init.zeros_(block)


def operand_dtype(x: Tensor) -> torch.dtype:
    """dtype in which the shards of `x` are summed for a product in the dtype of `x`.

    torch sums bfloat16 values in float32 and rounds once: what casting the float32 sum gives, without the float32
    gradient as wide as `x`. Few tokens are multiplied in float32, see `add_product`.
    """
    if x.dtype == torch.bfloat16 and x.numel() >= MANY_TOKENS * x.shape[-1]:
        return x.dtype
    return accumulation_dtype(x)


def sum_shards(x: Tensor, in_features: int, r: int, as_operand: bool = False) -> Tensor:
    """`s[…, j] = Σ_k x[…, k r + j]`, shape `(…, r)`, in `accumulation_dtype(x)`; `x` is neither cast nor padded.

    `as_operand` lets the sum have `operand_dtype(x)`, where it is one sum.
    """
    n, rest = divmod(in_features, r)
    dtype = operand_dtype(x) if as_operand and rest == 0 else accumulation_dtype(x)
    if rest == 0:
        return torch.unflatten(x, -1, (n, r)).sum(-2, dtype=dtype)
    whole = torch.unflatten(x[..., : n * r], -1, (n, r)).sum(-2, dtype=dtype)
    return whole + F.pad(x[..., n * r :], (0, r - rest))


def add_product(y: Tensor, s: Tensor, block: Tensor, terms: int) -> Tensor:
    """`y + s D`, the product accumulated on the base output; `terms` is the number of shards in a sum.

    For few tokens a 16-bit copy of the block costs more than a product in the block's own precision. Under autocast
    `addmm` would round a wider `y` to the dtype of the region.
    """
    if is_one_call(y, block):
        z: Tensor = ADD_PRODUCT(y, s, block, terms)
        return z
    return plain_add_product(y, s, block, terms)


def add_mini(y: Tensor, s: Tensor, block: Tensor) -> Tensor:
    """`y + s D`, the `m` columns of `s D` added to each of the `out / m` groups of `y`; block `(r, m)`.

    The product is so small that it stays in the dtype of the sum: a 16-bit one would round the gradient of the block,
    in which every output takes part.
    """
    return add_groups(y, s @ block.to(s.dtype))


def add_groups(y: Tensor, update: Tensor) -> Tensor:
    """`y (…, out)` with `update (…, m)` added to each group of `m` outputs, in the dtype of `y`.

    A broadcast; but groups of few values do not fill a vector register, and there the update is repeated until it does.
    """
    if is_one_call(y, update) or is_one_call_by_width(y, update):
        z: Tensor = ADD_GROUPS(y, update)
        return z
    return plain_add_groups(y, update)


def drop_input(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout on the elements of `x` before the shards are summed."""
    return dropout(x, p, training)


def features_last(x: Tensor, strides: Sequence[int]) -> Tensor:
    """`x (…, C, *positions)` of a 1×1 convolution as `(…, *positions, C)`, without positions that `strides` leave out."""
    index: Any = (..., *(slice(None, None, stride) for stride in strides))
    kept = x[index]
    return kept.movedim(-1 - len(strides), -1)


def features_first(y: Tensor, positions: int) -> Tensor:
    """`y (…, *positions, C)` as the `(…, C, *positions)` that a convolution returns, in memory too: a model may view it."""
    return y.movedim(-1, -1 - positions).contiguous()


def delta_weight(variant: Variant, block: Tensor, weight: Tensor) -> Tensor:
    """`ΔW (out, in)` of any variant for the merge, in the dtype of `weight (out, in)`, which should be float32 or wider."""
    out_features, _ = weight.shape
    d = block.to(weight.dtype)
    if variant == "bat":
        return bat_delta(weight, d)
    return add_shard_rows_(torch.zeros_like(weight), write_shard_rows(weight.new_empty(out_features, len(d)), d))


def write_shard_rows(rows: Tensor, block: Tensor) -> Tensor:
    """Write what balance and mini repeat along each row of `W` into `rows (out, r)`; `block` is `(r, out)` or `(r, m)`."""
    columns = block.to(rows.dtype).t()
    if len(columns) == len(rows):
        return rows.copy_(columns)
    # contiguous before the repeat, which knows no fast transposition
    torch.unflatten(rows, 0, (-1, len(columns))).copy_(columns.contiguous())
    return rows


def add_shard_rows_(weight: Tensor, rows: Tensor) -> Tensor:
    """Add `rows (k, r)` in place to every shard of `weight (k, in)` and return it; the update is never tiled."""
    r = rows.shape[1]
    n, rest = divmod(weight.shape[1], r)
    torch.unflatten(weight[:, : n * r], -1, (n, r)).add_(rows.unsqueeze(1))
    if rest:
        weight[:, n * r :].add_(rows[:, :rest])
    return weight


def delta_bound(variant: Variant, block: Tensor, largest: float) -> float:
    """What no `|ΔW[o, i]|` exceeds where no `|W[o, i]|` exceeds `largest`; infinite where there is no such number."""
    bound = largest_magnitude(block)
    return bound if variant != "bat" else bound + block.shape[-1] * largest * bound


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; `torch.isfinite` takes ten times as long on a CPU."""
    if tensor.is_floating_point() and tensor.numel():
        return math.isfinite(largest_magnitude(tensor))
    return bool(torch.isfinite(tensor).all())


def largest_magnitude(tensor: Tensor) -> float:
    """The largest `|x|` of a tensor, read once and without a copy; infinity where an element is not finite."""
    low, high = (float(end) for end in torch.aminmax(tensor.detach()))
    return max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.inf


# What looks at a dtype, a size or a mode stays one node when the insert pass traces this file: they are known only when
# the model runs (autocast, a later `.half()`, decoding).
torch.fx.wrap("accumulation_dtype")
torch.fx.wrap("operand_dtype")
torch.fx.wrap("add_product")
torch.fx.wrap("add_groups")
torch.fx.wrap("dropout")


def _divisors(number: int) -> str:
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(found if len(found) <= 12 else [*found[:4], "…", *found[-7:]])

"""Fold updates into a stored weight: `W ← round(W + ΣΔW)`, summed in float32 or wider and rounded once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from misscompile.kernels.device import fold_parts
from misscompile.variants import VARIANTS, Variant

Update = tuple[str, Tensor]
"""A key of `VARIANTS`, and a block."""

Scratch = dict[tuple[str, torch.dtype, torch.device], Tensor]
"""Memory by use."""


@torch.no_grad()
def fold_in_place(weight: Tensor, updates: Sequence[Update], scratch: Scratch | None = None) -> None:
    """Write `round(W + ΣΔW)` over `weight (out, in)`, which may be any view of what is stored; blocks are only read.

    Each ΔW is computed from the base weight, so that their order does not matter. It works part by part, on rows that stay
    in the cache. The folds of one merge share their `scratch`: the first touch of a page costs more than the sums in it.
    All memory is taken before the first write: where there is none, the weight is whole. With updates and a scratch from
    `reserve` none is taken at all.
    """
    scratch = {} if scratch is None else scratch
    blocks = [(VARIANTS[variant], block) for variant, block in reserve(weight, updates, scratch)]
    count, memory = _rows_at_a_time(weight, blocks), _memory(weight, blocks, scratch)
    summed, origin, product = (memory.get(use) for use in ("summed", "origin", "product"))
    for start in range(0, len(weight), max(count, 1)):
        part = weight[start : start + count]
        merged = part if summed is None else summed[: len(part)].copy_(part)
        base = merged if origin is None else origin[: len(part)].copy_(merged)
        for variant, block in blocks:
            rows = variant.rows_of(block, start, start + len(part))
            variant.add_delta_(merged, base, rows, None if product is None else product[: len(part)])
        if summed is not None:
            part.copy_(merged)


@torch.no_grad()
def reserve(weight: Tensor, updates: Sequence[Update], scratch: Scratch) -> list[Update]:
    """Take the memory that folding these updates into `weight (out, in)` needs; the updates as the fold reads them."""
    dtypes = [weight.dtype, *(block.dtype for _, block in updates)]
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    blocks = [(VARIANTS[variant], VARIANTS[variant].laid_out(block.detach().to(wide))) for variant, block in updates]
    _memory(weight, blocks, scratch)
    return [(variant, block) for (variant, _), (_, block) in zip(updates, blocks, strict=True)]


def _rows_at_a_time(weight: Tensor, blocks: Sequence[tuple[Variant, Tensor]]) -> int:
    step = math.lcm(*(variant.row_step(block) for variant, block in blocks))
    return math.ceil(len(weight) / fold_parts(weight) / step) * step


def _memory(weight: Tensor, blocks: Sequence[tuple[Variant, Tensor]], scratch: Scratch) -> dict[str, Tensor]:
    """What a fold writes to beside the weight, by use: the wider sum, and for bat the base and its product."""
    dtype = blocks[0][1].dtype if blocks else weight.dtype
    size = (min(_rows_at_a_time(weight, blocks), len(weight)), weight.shape[1])
    uses = ["summed"] if weight.dtype != dtype or len(blocks) > 1 else []
    uses += ["origin", "product"] if any(variant.reads_weight for variant, _ in blocks) else []
    for use in uses:
        if (key := (use, dtype, weight.device)) not in scratch or scratch[key].numel() < math.prod(size):
            scratch[key] = torch.empty(math.prod(size), dtype=dtype, device=weight.device)
    return {use: scratch[use, dtype, weight.device][: math.prod(size)].view(size) for use in uses}


@torch.no_grad()
def stays_finite(weight: Tensor, updates: Sequence[Update]) -> bool:
    """Whether a bound shows that no finite value of `weight` becomes one that is not; False says nothing.

    An update below half a unit in the last place of the largest number leaves that number as it is, so that a variant that
    does not read the weight needs no look at it. Otherwise the largest magnitudes in `W` and in each ΔW, added up, bound
    every intermediate sum.
    """
    if not weight.is_floating_point() or weight.numel() == 0:
        return False
    limits = torch.finfo(weight.dtype)
    if any(VARIANTS[variant].reads_weight for variant, _ in updates):
        largest, room = _largest_magnitude(weight), 0.99 * limits.max  # for rounding
    else:
        largest, room = 0.0, limits.max * limits.eps / 4  # a quarter: max is 2 - eps
    bounds = (VARIANTS[variant].bound(block, _largest_magnitude(block), largest) for variant, block in updates)
    return largest + sum(bounds) < room  # NaN compares as False


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; `torch.isfinite` takes ten times as long on a CPU."""
    if tensor.is_floating_point() and tensor.numel():
        return math.isfinite(_largest_magnitude(tensor))
    return bool(torch.isfinite(tensor).all())


def _largest_magnitude(tensor: Tensor) -> float:
    """The largest `|x|` of a tensor, read once and without a copy; infinity where an element is not finite."""
    low, high = (float(end) for end in torch.aminmax(tensor.detach()))
    return max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.inf

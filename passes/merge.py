"""Fold the active blocks of an owner into its weight.

    W (dtype of the base)   ->   round(W + ΔW), summed in float32 or wider and rounded once

The blocks are read, never written, and each `ΔW` is computed from the base weight, so that their order does not matter.
`is_surely_finite` shows that a result will be finite without computing it, and `fold_in_place` works on rows that stay in
the cache, so that a merge reads each weight twice and writes it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from misscompile import variants
from misscompile.bat import bat_delta
from misscompile.errors import MergeError
from misscompile.plan import Block

_CACHED = 1 << 20
"""Elements that are widened, summed and rounded at a time: 4 MiB in float32, measured best of 2^17 to 2^24."""


@torch.no_grad()
def is_surely_finite(owner: nn.Module, blocks: Sequence[Block]) -> bool:
    """Whether a bound shows that the merged weight is finite; False says nothing.

    The bound is the largest magnitude in `W` plus that of each `ΔW`. It holds for every intermediate sum too.
    """
    stored = owner.weight
    assert isinstance(stored, Tensor)
    if not stored.is_floating_point() or stored.numel() == 0:
        return False
    magnitude = variants.largest_magnitude(stored)
    bound = magnitude + sum(variants.delta_bound(b.variant, owner.get_parameter(b.parameter), magnitude) for b in blocks)
    return bound < 0.99 * torch.finfo(stored.dtype).max  # a margin for rounding; NaN compares as False


@torch.no_grad()
def fold_weight(owner: nn.Module, blocks: tuple[Block, ...], name: str, transposed: bool) -> Tensor:
    """The merged weight in the base's layout and dtype; the owner is not changed.

    Args:
        owner: holds `weight`, `(out, in)` or `(in, out)` when `transposed`, and the parameters of `blocks`.
        blocks: the blocks to fold.
        name: dotted name of the owner, for the error.
        transposed: the layout of transformers' `Conv1D`.

    Raises:
        MergeError: the result holds a value that is not finite in the dtype of the weight.
    """
    stored = owner.weight
    assert isinstance(stored, Tensor)
    merged = stored.detach().clone()
    fold_in_place(merged, [(block, owner.get_parameter(block.parameter)) for block in blocks], transposed)
    check_finite(merged, name, [block.adapter for block in blocks])
    return merged


def check_finite(merged: Tensor, name: str, adapters: Sequence[str]) -> None:
    """Refuse a merged weight that holds a value that is not finite.

    Raises:
        MergeError: naming `name` and `adapters`.
    """
    if not torch.isfinite(merged).all():
        raise MergeError(
            f"{name}: the merged weight is not finite in {merged.dtype} (adapters {list(adapters)}): the training diverged, "
            "or the values exceed the range of the dtype. Nothing was merged."
        )


@torch.no_grad()
def fold_in_place(stored: Tensor, blocks: Sequence[tuple[Block, Tensor]], transposed: bool) -> None:
    """Write `round(W + ΔW)` over `stored`, which holds `W` as `(out, in)`, or as `(in, out)` when `transposed`."""
    wide = torch.float32
    for tensor in (stored, *(parameter for _, parameter in blocks)):
        wide = torch.promote_types(wide, tensor.dtype)
    weight = stored.t() if transposed else stored
    out_features, in_features = weight.shape
    bats = [parameter.to(wide) if block.variant == "bat" else None for block, parameter in blocks]
    rows = [None if block.variant == "bat" else variants.shard_rows(p.to(wide), out_features) for block, p in blocks]
    step = math.lcm(*(bat.shape[-1] for bat in bats if bat is not None))  # bat works on whole row blocks
    count = max(_CACHED // in_features // step, 1) * step
    buffer = (
        None
        if wide == stored.dtype
        else torch.empty(min(count, out_features), in_features, dtype=wide, device=stored.device)
    )
    for start in range(0, out_features, count):
        part = weight[start : start + count]
        merged = part if buffer is None else buffer[: len(part)].copy_(part)
        base = merged.clone() if len(blocks) > 1 and any(bat is not None for bat in bats) else merged
        for bat, shards in zip(bats, rows, strict=True):
            if shards is not None:
                variants.add_shard_rows_(merged, shards[start : start + count])
            elif bat is not None:
                r = bat.shape[-1]
                own = bat[start // r : (start + len(part)) // r]
                merged += bat_delta(base, own)
        if buffer is not None:
            part.copy_(merged)

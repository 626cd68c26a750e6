"""Fold the active blocks of an owner into its weight.

    W (dtype of the base)   ->   round(W + ΔW), summed in float32 or wider and rounded once

The blocks are read, never written, and each `ΔW` is computed from the base weight, so that their order does not matter.
`keeps_finite` shows that a result will be finite without computing it, and `fold_in_place` works on rows that stay in the
cache and in memory that all folds of a merge share, so that a merge reads each weight once (bat: twice) and writes it once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from misscompile import variants
from misscompile.bat import add_bat_delta_
from misscompile.errors import MergeError
from misscompile.plan import Block

_CACHED = 1 << 20
"""Elements that are widened, summed and rounded at a time: 4 MiB in float32, measured best of 2^17 to 2^24."""


class Workspace:
    """Memory that the folds of one merge share: the first touch of a fresh page costs more than the sums in it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any values, which is that of the last call with this `use` where it is large enough."""
        key, size = (use, dtype, device), math.prod(shape)
        if key not in self._held or self._held[key].numel() < size:
            self._held[key] = torch.empty(size, dtype=dtype, device=device)
        return self._held[key][:size].view(shape)


@torch.no_grad()
def keeps_finite(owner: nn.Module, blocks: Sequence[Block]) -> bool:
    """Whether a bound shows that no finite value of the weight becomes one that is not; False says nothing.

    An update below half a unit in the last place of the largest number leaves that number as it is, so that balance and
    mini need no look at the weight. bat multiplies it: there the bound is the largest magnitude in `W` plus that of each
    `ΔW`, and holds for every intermediate sum.
    """
    stored = owner.weight
    assert isinstance(stored, Tensor)
    if not stored.is_floating_point() or stored.numel() == 0:
        return False
    limits = torch.finfo(stored.dtype)
    has_bat = any(block.variant == "bat" for block in blocks)
    magnitude = variants.largest_magnitude(stored) if has_bat else 0.0
    room = 0.99 * limits.max if has_bat else limits.max * limits.eps / 4  # a margin for rounding; a quarter: max is 2 - eps
    bound = magnitude + sum(variants.delta_bound(b.variant, owner.get_parameter(b.parameter), magnitude) for b in blocks)
    return bound < room  # NaN compares as False


@torch.no_grad()
def fold_weight(
    owner: nn.Module, blocks: tuple[Block, ...], name: str, transposed: bool, workspace: Workspace | None = None
) -> Tensor:
    """The merged weight in the base's layout and dtype; the owner is not changed.

    Args:
        owner: holds `weight`, `(out, in)` or `(in, out)` when `transposed`, and the parameters of `blocks`.
        blocks: the blocks to fold.
        name: dotted name of the owner, for the error.
        transposed: the layout of transformers' `Conv1D`.
        workspace: that of the merge; without it the fold takes memory of its own.

    Raises:
        MergeError: the result holds a value that is not finite in the dtype of the weight.
    """
    stored = owner.weight
    assert isinstance(stored, Tensor)
    merged = stored.detach().clone()
    fold_in_place(merged, [(block, owner.get_parameter(block.parameter)) for block in blocks], transposed, workspace)
    check_finite(merged, name, [block.adapter for block in blocks])
    return merged


def check_finite(merged: Tensor, name: str, adapters: Sequence[str]) -> None:
    """Refuse a merged weight that holds a value that is not finite.

    Raises:
        MergeError: naming `name` and `adapters`.
    """
    if not variants.is_finite(merged):
        raise MergeError(
            f"{name}: the merged weight is not finite in {merged.dtype} (adapters {list(adapters)}): the training diverged, "
            "or the values exceed the range of the dtype. Nothing was merged."
        )


@torch.no_grad()
def fold_in_place(
    stored: Tensor, blocks: Sequence[tuple[Block, Tensor]], transposed: bool, workspace: Workspace | None = None
) -> None:
    """Write `round(W + ΔW)` over `stored`, which holds `W` as `(out, in)`, or as `(in, out)` when `transposed`.

    All memory is taken before the first part is written: where it runs out, the weight is whole.
    """
    wide = torch.float32
    for tensor in (stored, *(parameter for _, parameter in blocks)):
        wide = torch.promote_types(wide, tensor.dtype)
    take = functools.partial((workspace or Workspace()).take, dtype=wide, device=stored.device)
    weight = stored.t() if transposed else stored
    out_features, in_features = weight.shape
    bats = [parameter.to(wide) if block.variant == "bat" else None for block, parameter in blocks]
    rows = [
        None if block.variant == "bat" else variants.write_shard_rows(take(f"rows {i}", (out_features, len(p))), p)
        for i, (block, p) in enumerate(blocks)
    ]
    step = math.lcm(*(bat.shape[-1] for bat in bats if bat is not None))  # bat works on whole row blocks
    parts = max(math.ceil(out_features * in_features / _CACHED), 1)
    count = math.ceil(out_features / parts / step) * step
    has_bat, size = any(bat is not None for bat in bats), (min(count, out_features), in_features)
    summed = None if wide == stored.dtype else take("summed", size)
    product = take("product", size) if has_bat else None
    # bat reads the base weight after another block was added to it, and in whole rows
    base = take("base", size) if has_bat and (len(blocks) > 1 or transposed) else None
    for start in range(0, out_features, count):
        part = weight[start : start + count]
        merged = part if summed is None else summed[: len(part)].copy_(part)
        origin = merged if base is None else base[: len(part)].copy_(merged)
        for bat, shards in zip(bats, rows, strict=True):
            if shards is not None:
                variants.add_shard_rows_(merged, shards[start : start + count])
            elif bat is not None and product is not None:
                r = bat.shape[-1]
                add_bat_delta_(merged, origin, bat[start // r : (start + len(part)) // r], product[: len(part)])
        if summed is not None:
            part.copy_(merged)

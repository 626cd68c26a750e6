"""Fold the active blocks of an owner into its weight.

    W (dtype of the base)   ->   round(W + ΔW), summed in float32 or wider and rounded once

The blocks are read, never written, and each `ΔW` is computed from the base weight, so that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from misscompile import variants
from misscompile.errors import MergeError
from misscompile.plan import Block


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
    parameters = [owner.get_parameter(block.parameter) for block in blocks]
    wide = torch.float32
    for tensor in (stored, *parameters):
        wide = torch.promote_types(wide, tensor.dtype)
    base = (stored.t() if transposed else stored).to(wide)
    merged = base.clone()
    for block, parameter in zip(blocks, parameters, strict=True):
        merged += variants.delta_weight(block.variant, parameter.to(wide), base)
    return round_merged(merged.t() if transposed else merged, stored.dtype, name, [block.adapter for block in blocks])


def round_merged(merged: Tensor, dtype: torch.dtype, name: str, adapters: Sequence[str]) -> Tensor:
    """`merged` in `dtype`, rounded once.

    Raises:
        MergeError: a value is not finite in `dtype`; `name` and `adapters` are for the message.
    """
    rounded = merged.to(dtype)
    if not torch.isfinite(rounded).all():
        raise MergeError(
            f"{name}: the merged weight is not finite in {dtype} (adapters {list(adapters)}): the training diverged, or the "
            "values exceed the range of the dtype. Nothing was merged."
        )
    return rounded

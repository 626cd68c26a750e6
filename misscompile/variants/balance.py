"""Balance: `ΔW[o, i] = D[i mod r, o]` with a block `D (r, out)`; as operations, `y + s D`."""

from __future__ import annotations

from torch import Tensor

from misscompile.variants.base import SummedVariant


class Balance(SummedVariant):
    def block_shape(self, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[int, ...]:
        return r, out_features

    def rows_of(self, block: Tensor, start: int, stop: int) -> Tensor:
        return block[:, start:stop]

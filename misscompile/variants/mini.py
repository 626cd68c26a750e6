"""Mini: `ΔW[o, i] = D[i mod r, o mod m]` with a block `D (r, m)`; as operations, `s D` added to each `m` outputs."""

from __future__ import annotations

from torch import Tensor

from misscompile.variants.base import SummedVariant


class Mini(SummedVariant):
    def block_shape(self, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[int, ...]:
        return r, mini_r

    def shape_problem(self, r: int, mini_r: int, in_features: int, out_features: int) -> tuple[str, str] | None:
        if out_features % mini_r and r <= in_features:
            would = divisors(out_features)
            return "mini_r", f"'mini' needs a mini_r that divides out, mini_r={mini_r} does not; mini_r of {would} would do"
        return super().shape_problem(r, mini_r, in_features, out_features)

    def row_step(self, block: Tensor) -> int:
        return block.shape[1]

    def rows_of(self, block: Tensor, start: int, stop: int) -> Tensor:
        return block


def divisors(number: int) -> str:
    """The divisors of a number, as a list in words; where there are many, those in the middle are left out."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(found if len(found) <= 12 else [*found[:4], "…", *found[-7:]])

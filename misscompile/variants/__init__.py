"""The algebra of MiSS (arXiv 2409.15371, section 3): one object for each variant. Tensors only, no graph and no device.

A site computes `y = x Wᵀ + b` with `x (…, in)`, `W (out, in)`; `r` is the rank, `m` is `mini_r`, `n = ceil(in / r)`.

| variant | block             | update                                                |
|---------|-------------------|-------------------------------------------------------|
| balance | `D (r, out)`      | `ΔW[o, i] = D[i mod r, o]`                            |
| mini    | `D (r, m)`        | `ΔW[o, i] = D[i mod r, o mod m]`                      |
| bat     | `B (out/r, r, r)` | `ΔW[o, k] = W[o, k] B[o] + B[o]`, `W` in `r×r` blocks |

`misscompile.kernels` computes the same on a device.
"""

from misscompile.variants.balance import Balance
from misscompile.variants.base import Form, SummedVariant, Variant
from misscompile.variants.bat import Bat
from misscompile.variants.mini import Mini

VARIANTS: dict[str, Variant] = {"balance": Balance(), "mini": Mini(), "bat": Bat()}
"""By the name that `MissConfig.variant` gives."""

__all__ = ["VARIANTS", "Form", "SummedVariant", "Variant"]

"""What an adapter costs at one call site, as sympy expressions of the token count and the layer's numbers.

FLOPs are two for each multiply-add of a matrix product, as `torch.utils.flop_counter` counts them; sums and copies are
free. "step" is a forward and a backward with the base frozen (input gradient and block gradient, no weight gradient).
"""

from __future__ import annotations

from typing import Literal

import sympy

from misscompile.config import Variant

Form = Literal["balance", "mini", "bat one product", "bat two products"]

T, IN, OUT, R, M = sympy.symbols("tokens in out r m", positive=True, integer=True)

PARAMETERS: dict[Variant, sympy.Expr] = {"balance": R * OUT, "mini": R * M, "bat": OUT * R}

BASE_FORWARD: sympy.Expr = 2 * T * IN * OUT
BASE_STEP: sympy.Expr = 2 * BASE_FORWARD

FORWARD: dict[Form, sympy.Expr] = {
    "balance": 2 * T * R * OUT,
    "mini": 2 * T * R * M,
    "bat one product": 2 * IN * OUT * R,
    "bat two products": 2 * IN * OUT * R + 2 * T * IN * OUT,
}
"""What a forward adds to the base's."""

STEP: dict[Form, sympy.Expr] = {
    "balance": 3 * FORWARD["balance"],
    "mini": 3 * FORWARD["mini"],
    "bat one product": 2 * FORWARD["bat one product"] + 2 * T * IN * OUT,
    "bat two products": 2 * (2 * IN * OUT * R) + 3 * 2 * T * IN * OUT,
}
"""What a training step adds to the base's."""


def evaluate(expression: sympy.Expr, tokens: int, in_features: int, out_features: int, r: int, mini_r: int) -> int:
    """The number that an expression of this file has at one call site."""
    values = {T: tokens, IN: in_features, OUT: out_features, R: r, M: mini_r}
    return int(expression.subs(values))

"""What an adapter costs at one call site, as sympy expressions of the token count and the layer's numbers.

FLOPs are two for each multiply-add of a matrix product, as `torch.utils.flop_counter` counts them; sums and copies are
free. "step" is a forward and a backward with the base frozen (input gradient and block gradient, no weight gradient).
Bytes are counted in `itemsize`, that of the base's dtype; "moved" are the operands and results of every kernel that a
forward runs beside the base's, where all of them have that dtype.
"""

from __future__ import annotations

import functools
from typing import Literal

import sympy

from misscompile.config import Variant

Form = Literal["balance", "mini", "bat one product", "bat two products", "bat beside the base", "bat factored"]
"""bat beside the base: with dropout, or on what is no plain product; bat factored: few tokens without gradients."""

T, IN, OUT, R, M, SIZE = sympy.symbols("tokens in out r m itemsize", positive=True, integer=True)

PARAMETERS: dict[Variant, sympy.Expr] = {"balance": R * OUT, "mini": R * M, "bat": OUT * R}

BASE_FORWARD: sympy.Expr = 2 * T * IN * OUT
BASE_STEP: sympy.Expr = 2 * BASE_FORWARD

_DELTA: sympy.Expr = 2 * IN * OUT * R

FORWARD: dict[Form, sympy.Expr] = {
    "balance": 2 * T * R * OUT,
    "mini": 2 * T * R * M,
    "bat one product": _DELTA,
    "bat two products": _DELTA + BASE_FORWARD,
    "bat beside the base": _DELTA + BASE_FORWARD,
    "bat factored": 2 * BASE_FORWARD,
}
"""What a forward adds to the base's FLOPs."""

STEP: dict[Form, sympy.Expr] = {
    "balance": 3 * FORWARD["balance"],
    "mini": 3 * FORWARD["mini"],
    "bat one product": 3 * _DELTA + BASE_FORWARD,
    "bat two products": 3 * _DELTA + 2 * BASE_FORWARD,
    "bat beside the base": 3 * _DELTA + 3 * BASE_FORWARD,
}
"""What a training step adds to the base's FLOPs: bat forms ΔW twice, and its block gradient costs one of it."""

SAVED: dict[Form, sympy.Expr] = {
    "balance": SIZE * T * R,
    "mini": SIZE * T * R,
    "bat one product": SIZE * T * IN,
    "bat two products": SIZE * T * IN,
    "bat beside the base": SIZE * T * IN,
}
"""Bytes kept for the backward beside the base's and the parameters, in one dtype: `s`, once for all calls on one input, or
the input."""

SAVED_CASTS: dict[Form, sympy.Expr] = {
    "balance": SIZE * R * OUT,
    "mini": 2 * T * R,
}
"""Bytes kept in addition on a 16-bit base with float32 blocks: the block's copy; mini's sum in float32."""

MOVED: dict[Form, sympy.Expr] = {
    "balance": SIZE * (T * IN + 2 * T * R + R * OUT + 2 * T * OUT),
    "mini": SIZE * (T * IN + 2 * T * R + R * M + 2 * T * M + 2 * T * OUT),
    "bat one product": SIZE * (7 * IN * OUT + 2 * R * OUT),
    "bat factored": SIZE * (IN * OUT + R * OUT + T * IN + 3 * T * IN * OUT / R + 8 * T * OUT),
}
"""Bytes moved by a forward of many tokens beside the base's (its own product reads `W + ΔW` in place of `W`)."""


def crossover(form: Form) -> sympy.Expr:
    """The token count at which the factored form of bat costs as many FLOPs as `form`; below it, it costs fewer."""
    (tokens,) = sympy.solve(sympy.Eq(FORWARD["bat factored"], FORWARD[form]), T)
    return tokens


@functools.cache
def few_tokens(form: Form, r: int) -> int:
    """The largest token count for which the factored form of bat costs no more than `form`."""
    return int(sympy.floor(crossover(form).subs(R, r)))


def evaluate(
    expression: sympy.Expr, tokens: int, in_features: int, out_features: int, r: int, mini_r: int, itemsize: int = 4
) -> int:
    """The number that an expression of this file has at one call site."""
    values = {T: tokens, IN: in_features, OUT: out_features, R: r, M: mini_r, SIZE: itemsize}
    return int(expression.subs(values))

"""Small polynomials and their derivatives, as text: a task whose answers can be checked by comparing strings."""

from __future__ import annotations

import itertools
import random

import sympy

LARGEST_COEFFICIENT = 9
COEFFICIENTS = range(-LARGEST_COEFFICIENT, LARGEST_COEFFICIENT + 1)
MAX_PROBLEMS = len(COEFFICIENTS) ** 3 - 1
"""Cubics whose derivatives differ from each other and from zero."""


def make_problems(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs of a prompt and its completion, in random order; a smaller `count` gives the start of the same list.

    No two share a derivative, so that no part of the list holds a problem, or even an answer, of another part.

    Raises:
        ValueError: `count` is more than `MAX_PROBLEMS`.
    """
    rng = random.Random(seed)
    x = sympy.Symbol("x")
    slopes = [abc for abc in itertools.product(COEFFICIENTS, repeat=3) if any(abc)]
    if count > len(slopes):
        raise ValueError(f"count={count}: expected at most {len(slopes)}.")
    rng.shuffle(slopes)
    problems = []
    for a, b, c in slopes[:count]:
        polynomial = a * x**3 + b * x**2 + c * x + rng.choice(COEFFICIENTS)
        problems.append((f"Differentiate: {polynomial}\nAnswer:", f" {sympy.diff(polynomial, x)}"))
    return problems

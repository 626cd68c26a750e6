"""Operators of `torch.ops.misscompile`: what stays one call in a graph that `torch.compile` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

_LIBRARY: Any = library.Library("misscompile", "DEF")  # type: ignore[no-untyped-call]


def define_operator(schema: str, rule: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of a schema.

    Args:
        schema: name, arguments and results; nothing is mutated, no result may be an argument or a view of one.
        rule: what it computes; its results are made contiguous.
        fake: from the same arguments, empty contiguous tensors with the shapes and dtypes of the results.
    """
    name = schema.partition("(")[0]

    def compute(*operands: Any) -> Any:
        result = rule(*operands)
        return result.contiguous() if isinstance(result, Tensor) else [tensor.contiguous() for tensor in result]

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    library.register_fake(f"misscompile::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.misscompile, name).default
    return operator


def register_gradient(name: str, differentiate: Callable[..., Any], keep: Callable[..., None]) -> None:
    """Give an operator its backward, `differentiate(ctx, gradient)`, and `keep(ctx, inputs, output)` for it."""
    library.register_autograd(f"misscompile::{name}", differentiate, setup_context=keep, lib=_LIBRARY)

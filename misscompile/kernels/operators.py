"""Operators of `torch.ops.misscompile`: what stays one call in a graph that `torch.compile` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

_LIBRARY: Any = library.Library("misscompile", "DEF")  # type: ignore[no-untyped-call]


def define_operator(
    schema: str,
    rule: Callable[..., Any],
    like: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The operator of a schema that mutates nothing and returns no view of an argument.

    `rule` computes it, `like` makes empty contiguous tensors of the shapes and dtypes of the results, and
    `keep(ctx, inputs, output)` and `differentiate(ctx, gradient)` are its backward.
    """
    name = schema.partition("(")[0]

    def compute(*operands: Any) -> Any:
        result = rule(*operands)
        return result.contiguous() if isinstance(result, Tensor) else [tensor.contiguous() for tensor in result]

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    library.register_fake(f"misscompile::{name}", like, lib=_LIBRARY)
    if differentiate is not None:
        library.register_autograd(f"misscompile::{name}", differentiate, setup_context=keep, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.misscompile, name).default
    return operator

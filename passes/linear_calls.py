"""Recognise a linear in a `torch.fx` graph. Read-only.

`y = x Wᵀ + b` as a call of torch, of a `torch.Tensor` method or of aten:

    linear(x, W, b?)                 layout out_in    W is (out, in)
    addmm(b, x, V), x @ V, mm(x, V)  layout in_out    V is (in, out)
    einsum("…i,oi->…o", x, W)        either layout
    conv(x, K, b?)                   layout conv      K is (out, in, 1, …): a linear over the channels
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from misscompile.record.words import Layout

aten = torch.ops.aten

_LINEAR = {F.linear, aten.linear.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default, "matmul", "mm"}
_ADDMM = {torch.addmm, aten.addmm.default}
_EINSUM = {torch.einsum, torch.functional.einsum, aten.einsum.default}
_CONV = {
    *(F.conv1d, F.conv2d, F.conv3d, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}
_CONVOLUTION = {torch.convolution, aten.convolution.default}


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """The operands of a call that looks like a linear, as they stand in the graph."""

    x: fx.Node
    weight: fx.Node
    layout: Layout
    added: fx.Node | None = None
    """What the call adds to the product: a bias, or with `addmm` a tensor of any shape."""
    strides: tuple[int, ...] = ()
    """Of a convolution."""


def match_linear(node: fx.Node) -> LinearCall | None:
    """The operands of `node` where it is a call in one of the forms above, else None."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEAR:
        return _call(operand(node, 0, "input"), operand(node, 1, "weight"), "out_in", operand(node, 2, "bias"))
    if node.target in _MATMUL:
        return _call(operand(node, 0, "input"), operand(node, 1, "mat2" if "mat2" in node.kwargs else "other"), "in_out")
    if node.target in _ADDMM and not {"beta", "alpha"} & set(node.kwargs):
        return _call(operand(node, 1, "mat1"), operand(node, 2, "mat2"), "in_out", operand(node, 0, "input"))
    if node.target in _EINSUM:
        return _match_einsum(node)
    if node.target in _CONV or (node.target in _CONVOLUTION and operand(node, 6, "transposed") is False):
        return _match_conv(node)
    return None


def resembles_linear(node: fx.Node) -> str | None:
    """What keeps a product that `match_linear` leaves out from being a linear, or None where it is no product."""
    if node.target in _EINSUM:
        return f"its weight goes into the einsum {node.args[0]!r}, which is not one matrix for every position"
    if node.target in _ADDMM and {"beta", "alpha"} & set(node.kwargs):
        return "its product is scaled by the beta or alpha of addmm"
    return None


def operand(node: fx.Node, position: int, keyword: str) -> Any:
    """An argument of a call by position or keyword, or None."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A number or a sequence of them as a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def target_name(node: fx.Node) -> str:
    """What a node calls, in words."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _call(x: Any, weight: Any, layout: Layout, added: Any = None, strides: tuple[int, ...] = ()) -> LinearCall | None:
    both = isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    return LinearCall(x, weight, layout, added, strides) if both else None


def _match_einsum(node: fx.Node) -> LinearCall | None:
    equation, *operands = node.args
    tensors: Any = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or "->" not in equation or len(tensors) != 2:
        return None
    terms, result = equation.replace(" ", "").replace("...", "…").split("->")
    letters = terms.split(",")
    for x_at, weight_at in ((0, 1), (1, 0)):
        x, weight = letters[x_at], letters[weight_at]
        repeated = len(set(x)) != len(x) or len(set(weight)) != len(weight)  # a diagonal
        if repeated or len(weight) != 2 or "…" in weight or not x or x[-1] not in weight:
            continue
        out = weight.replace(x[-1], "")
        if result == x[:-1] + out and out not in x:
            return _call(tensors[x_at], tensors[weight_at], "out_in" if weight[1] == x[-1] else "in_out")
    return None


def _match_conv(node: fx.Node) -> LinearCall | None:
    stride, padding = operand(node, 3, "stride"), operand(node, 4, "padding")
    if operand(node, 8 if node.target in _CONVOLUTION else 6, "groups") not in (None, 1):
        return None
    if padding not in (None, "valid", "same") and any(p != 0 for p in as_tuple(padding)):  # "same" adds none to a 1×1 kernel
        return None
    strides = as_tuple(stride if stride is not None else 1)
    return _call(operand(node, 0, "input"), operand(node, 1, "weight"), "conv", operand(node, 2, "bias"), strides)

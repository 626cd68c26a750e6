"""Recognise a linear in a `torch.fx` graph, and follow its weight back to the parameter. Read-only.

`y = x Wᵀ + b` as a call of torch, of a `torch.Tensor` method or of aten:

    linear(x, W, b?)                 layout out_in    W is (out, in)
    addmm(b, x, V), x @ V, mm(x, V)  layout in_out    V is (in, out)
    einsum("…i,oi->…o", x, W)        either layout
    conv(x, K, b?)                   layout conv      K is (out, in, 1, …): a linear over the channels

and the weight through the views and casts that a model puts between the parameter and the call.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from misscompile.plan import Layout, Step, WeightPath

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
_CAST = {
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.alias.default),
    *(aten.contiguous.default, aten.clone.default, aten.detach.default, "to", "type", "type_as", "contiguous", "clone"),
    *("detach", "float", "half", "bfloat16", "double"),
}
_VIEW = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.squeeze.default, aten.squeeze.dim, aten.unsqueeze.default, torch.reshape, torch.flatten, "view", "reshape"),
    *("flatten", "unflatten", "squeeze", "unsqueeze"),
}
_TRANSPOSE = {torch.t, aten.t.default, aten.numpy_T.default, "t"}
_SWAP = {torch.transpose, aten.transpose.int, "transpose"}
_PERMUTE = {torch.permute, aten.permute.default, "permute"}
_SPLIT = {torch.split, aten.split.Tensor, aten.split_with_sizes.default, "split"}
_CHUNK = {torch.chunk, aten.chunk.default, "chunk"}
_SLICE = {aten.slice.Tensor}


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """The operands of a call that looks like a linear, as they stand in the graph."""

    x: fx.Node
    weight: fx.Node
    layout: Layout
    strides: tuple[int, ...] = ()
    """Of a convolution."""


class WeightError(Exception):
    """Why the weight operand of a linear call is not a parameter."""


def match_linear(node: fx.Node) -> LinearCall | None:
    """The operands of `node` where it is a call in one of the forms above, else None."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEAR:
        return _call(node, ("input", "weight"), "out_in")
    if node.target in _MATMUL:
        return _call(node, ("input", "mat2" if "mat2" in node.kwargs else "other"), "in_out")
    if node.target in _ADDMM and not {"beta", "alpha"} & set(node.kwargs):
        return _call(node, ("mat1", "mat2"), "in_out", first=1)
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


def apply_steps(parameter: Tensor, steps: Sequence[Step]) -> Tensor:
    """The view of `parameter` that a linear call takes, by the steps of a `WeightPath`; it shares the storage."""
    view = parameter
    for step in steps:
        match step:
            case ("t",):
                view = view.t()
            case ("view", *shape):
                view = view.view(*shape)
            case ("rows", start, stop):
                view = view[start:stop]
            case ("flatten",):
                view = view.flatten(1)
    return view


def trace_weight(weight: fx.Node, parameter: Callable[[str], Tensor | None]) -> WeightPath:
    """The parameter behind a weight operand, and the views between the two.

    Args:
        weight: the operand.
        parameter: gives the tensor of a `get_attr` target, or None.

    Raises:
        WeightError: it is computed from something, or it is no parameter.
    """
    if weight.op == "get_attr":
        found = parameter(str(weight.target))
        if not isinstance(found, torch.nn.Parameter):
            kind = "a buffer or a constant" if isinstance(found, Tensor) else "no tensor of the graph module"
            raise WeightError(f"its weight {weight.target!r} is {kind}, not a parameter")
        return WeightPath(str(weight.target), ())
    if weight.op == "placeholder":
        raise WeightError(
            f"its weight is the input {weight.target!r} of the graph, not a parameter of it (of an exported program, adapt "
            "the program itself or its module())"
        )
    step, source = _step(weight)
    if source is None:
        raise WeightError(f"its weight is computed by {_label(weight)}, so that a block could not be merged into it")
    path = trace_weight(source, parameter)
    if step is None:
        return path
    tensor = parameter(path.parameter)
    assert tensor is not None
    current = apply_steps(tensor.detach().to("meta"), path.steps)
    steps = (*path.steps, *_concrete(weight, step, current))
    try:
        apply_steps(tensor.detach().to("meta"), steps)
    except RuntimeError as error:
        raise WeightError(f"its weight is no view of the parameter {path.parameter!r} ({error})") from error
    return WeightPath(path.parameter, steps)


def passes_weight(node: fx.Node) -> bool:
    """Whether `node` is a view, a part or a cast, of which `trace_weight` sees the source."""
    return _step(node)[1] is not None or node.target in (*_SPLIT, *_CHUNK)


def _call(node: fx.Node, keywords: tuple[str, str], layout: Layout, first: int = 0) -> LinearCall | None:
    x, weight = (operand(node, first + offset, keyword) for offset, keyword in enumerate(keywords))
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return LinearCall(x, weight, layout)


def _match_einsum(node: fx.Node) -> LinearCall | None:
    equation, *operands = node.args
    tensors: Any = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or "->" not in equation or len(tensors) != 2:
        return None
    terms, result = equation.replace(" ", "").replace("...", "…").split("->")
    letters = terms.split(",")
    for x_at, w_at in ((0, 1), (1, 0)):
        x, w = letters[x_at], letters[w_at]
        both = isinstance(tensors[x_at], fx.Node) and isinstance(tensors[w_at], fx.Node)
        if not both or len(w) != 2 or not x or x[-1] not in w or "…" in w:
            continue
        out = w.replace(x[-1], "")
        if len(out) == 1 and result == x[:-1] + out and out not in x:
            layout: Layout = "out_in" if w[1] == x[-1] else "in_out"
            return LinearCall(tensors[x_at], tensors[w_at], layout)
    return None


def _match_conv(node: fx.Node) -> LinearCall | None:
    x, weight = operand(node, 0, "input"), operand(node, 1, "weight")
    stride, padding = operand(node, 3, "stride"), operand(node, 4, "padding")
    groups = operand(node, 8 if node.target in _CONVOLUTION else 6, "groups")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or groups not in (None, 1):
        return None
    if padding not in (None, "valid", "same") and any(p != 0 for p in as_tuple(padding)):  # "same" adds none to a 1×1 kernel
        return None
    strides = as_tuple(stride if stride is not None else 1)
    return LinearCall(x, weight, "conv", strides)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A number or a sequence of them as a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _step(node: fx.Node) -> tuple[str | None, fx.Node | None]:
    """What one node does between a parameter and a call, and its source; None as source where it computes."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    target = node.target
    if node.op not in ("call_function", "call_method") or source is None:
        return None, None
    if target in _CAST:
        return None, source
    if target in _VIEW:
        return "view", source
    if target is getattr and node.args[1:] == ("data",):
        return None, source
    if target in _TRANSPOSE or (target is getattr and node.args[1:] == ("T",)):
        return "t", source
    if target in _SWAP and {operand(node, 1, "dim0"), operand(node, 2, "dim1")} in ({0, 1}, {-1, -2}, {0, -1}, {1, -2}):
        return "t", source
    if target in _PERMUTE and _dims(node) == (1, 0):
        return "t", source
    if target in _SLICE and operand(node, 1, "dim") in (None, 0) and operand(node, 4, "step") in (None, 1):
        return "slice", source
    if target is operator.getitem and source.target in (*_SPLIT, *_CHUNK):
        return "part", source.args[0] if isinstance(source.args[0], fx.Node) else None
    if target is operator.getitem and isinstance(node.args[1], slice):
        return "slice", source
    return None, None


def _concrete(node: fx.Node, step: str, current: Tensor) -> tuple[Step, ...]:
    """A step with its numbers, for a tensor of the shape of `current`.

    Raises:
        WeightError: the numbers are not known in the graph, or are not a view of rows.
    """
    if step == "t":
        if current.dim() != 2:
            raise WeightError(f"its weight is transposed by {_label(node)} in more than two dimensions")
        return (("t",),)
    if step == "view":
        shape = _result_shape(node, current)
        return (("view", *shape),)
    if step == "slice":
        sliced = node.args[1] if node.target is operator.getitem else slice(*node.args[2:4])
        assert isinstance(sliced, slice)
        if sliced.step not in (None, 1) or not all(isinstance(v, int | None) for v in (sliced.start, sliced.stop)):
            raise WeightError(f"its weight is a part of a parameter that {_label(node)} does not fix")
        start, stop, _ = sliced.indices(current.shape[0])
        return (("rows", start, stop),)
    split, index = node.args
    assert isinstance(split, fx.Node)
    assert isinstance(index, int)
    sizes = operand(split, 1, "chunks" if split.target in _CHUNK else "split_size_or_sections")
    if operand(split, 2, "dim") not in (None, 0):
        raise WeightError(f"its weight is cut by {_label(split)} along its inputs")
    parts = current.chunk(sizes) if split.target in _CHUNK else torch.split(current, sizes)
    start = sum(part.shape[0] for part in parts[:index])
    return (("rows", start, start + parts[index].shape[0]),)


def _result_shape(node: fx.Node, current: Tensor) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    method = getattr(current, name.split(".")[0], None)
    if method is None or any(isinstance(a, fx.Node) for a in node.all_input_nodes[1:]):
        raise WeightError(f"its weight is viewed by {_label(node)} in a shape that the graph does not fix")
    return tuple(method(*node.args[1:], **node.kwargs).shape)


def _dims(node: fx.Node) -> tuple[Any, ...]:
    rest = node.args[1:] or (node.kwargs.get("dims"),)
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else tuple(rest)


def _label(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{node.name!r} ({target})"

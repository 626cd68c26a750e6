"""Follow the weight operand of a linear call back to its parameter, through the views and casts that a model puts between.

    t = get_attr[attn.in_proj_weight]
    w = t[0:16]                        WeightPath("attn.in_proj_weight", (("rows", 0, 16),))

Read-only. The same steps, taken on the parameter itself, give the view that a merge writes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from misscompile.passes.linear_calls import as_tuple, operand, target_name
from misscompile.record.words import Step, WeightPath

aten = torch.ops.aten

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
_PARAMETRIZATION = "parametrizations."


class WeightError(Exception):
    """Why the weight operand of a linear call is not a parameter."""


def find_parameter(root: nn.Module, target: str) -> Tensor | None:
    """The tensor that a `get_attr` target of `root` stands for, or None."""
    found: Any = root
    for part in target.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


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


def weight_view(root: nn.Module, path: WeightPath) -> Tensor:
    """The operand that a path leads to, without its values."""
    parameter = find_parameter(root, path.parameter)
    assert parameter is not None
    return apply_steps(parameter.detach().to("meta"), path.steps)


def overlap(weight: Tensor, steps: Sequence[Step], others: Sequence[Step]) -> bool:
    """Whether two paths from one parameter read an element in common."""
    if steps == others:
        return True
    marks = torch.zeros(weight.shape, dtype=torch.bool)
    apply_steps(marks, steps).fill_(True)
    return bool(apply_steps(marks, others).any())


def trace_weight(weight: fx.Node, root: nn.Module) -> WeightPath:
    """The parameter of `root` behind a weight operand, and the views between the two; else a `WeightError`."""
    target = str(weight.target)
    if weight.op == "call_module" and target.startswith(_PARAMETRIZATION):
        return WeightPath(target.removeprefix(_PARAMETRIZATION), ())
    if weight.op == "get_attr":
        found = find_parameter(root, target)
        if not isinstance(found, nn.Parameter):
            kind = "a buffer or a constant" if isinstance(found, Tensor) else "no tensor of the graph module"
            raise WeightError(f"its weight {target!r} is {kind}, not a parameter")
        return WeightPath(target, ())
    if weight.op == "placeholder":
        raise WeightError(
            f"its weight is the input {target!r} of the graph, not a parameter of it (of an exported program, adapt "
            "the program itself or its module())"
        )
    kind, source = _kind(weight)
    if source is None:
        raise WeightError(f"its weight is computed by {_label(weight)}, so that a block could not be merged into it")
    path = trace_weight(source, root)
    if kind == "cast":
        return path
    current = weight_view(root, path)
    step = _step(weight, kind, current)
    try:
        apply_steps(current, (step,))
    except RuntimeError as error:
        raise WeightError(f"its weight is no view of the parameter {path.parameter!r} ({error})") from error
    return WeightPath(path.parameter, (*path.steps, step))


def passes_weight(node: fx.Node) -> bool:
    """Whether `node` is a view, a part or a cast, of which `trace_weight` sees the source."""
    return _kind(node)[1] is not None or node.target in (*_SPLIT, *_CHUNK)


def readers(source: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read the values of a parameter, through its views and casts."""
    todo = [source]
    while todo:
        for user in todo.pop().users:
            if passes_weight(user):
                todo.append(user)
            elif user.target is not aten._assert_tensor_metadata.default:
                yield user


def _kind(node: fx.Node) -> tuple[str, fx.Node | None]:
    """What one node does between a parameter and a call, and its source; None as source where it computes."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    target = node.target
    if node.op not in ("call_function", "call_method") or source is None:
        return "", None
    if target in _CAST or (target is getattr and node.args[1:] == ("data",)):
        return "cast", source
    if target in _VIEW:
        return "view", source
    swapped = target in _SWAP and {operand(node, 1, "dim0"), operand(node, 2, "dim1")}
    if target in _TRANSPOSE or (target is getattr and node.args[1:] == ("T",)):
        return "t", source
    if swapped in ({0, 1}, {-1, -2}, {0, -1}, {1, -2}) or (target in _PERMUTE and _dims(node) == (1, 0)):
        return "t", source
    if target in _SLICE and operand(node, 1, "dim") in (None, 0) and operand(node, 4, "step") in (None, 1):
        return "slice", source
    if target is operator.getitem and source.target in (*_SPLIT, *_CHUNK):
        return "part", source.args[0] if isinstance(source.args[0], fx.Node) else None
    if target is operator.getitem and isinstance(node.args[1], slice):
        return "slice", source
    return "", None


def _step(node: fx.Node, kind: str, current: Tensor) -> Step:
    """The step that a node takes from a view like `current`; a `WeightError` where the graph does not fix its numbers."""
    if kind == "t":
        if current.dim() != 2:
            raise WeightError(f"its weight is transposed by {_label(node)} in more than two dimensions")
        return ("t",)
    if kind == "view":
        return ("view", *_result_shape(node, current))
    if kind == "slice":
        sliced = node.args[1] if node.target is operator.getitem else slice(*node.args[2:4])
        assert isinstance(sliced, slice)
        if sliced.step not in (None, 1) or not all(isinstance(v, int | None) for v in (sliced.start, sliced.stop)):
            raise WeightError(f"its weight is a part of a parameter that {_label(node)} does not fix")
        return ("rows", *sliced.indices(current.shape[0])[:2])
    split, index = node.args
    assert isinstance(split, fx.Node)
    assert isinstance(index, int)
    if operand(split, 2, "dim") not in (None, 0):
        raise WeightError(f"its weight is cut by {_label(split)} along its inputs")
    if split.target in _CHUNK:
        parts = current.chunk(operand(split, 1, "chunks"))
    else:
        parts = torch.split(current, operand(split, 1, "split_size_or_sections"))
    start = sum(part.shape[0] for part in parts[:index])
    return ("rows", start, start + parts[index].shape[0])


def _result_shape(node: fx.Node, current: Tensor) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    method = getattr(current, target_name(node).split(".")[0], None)
    if method is None or len(node.all_input_nodes) > 1:
        raise WeightError(f"its weight is viewed by {_label(node)} in a shape that the graph does not fix")
    return tuple(method(*node.args[1:], **node.kwargs).shape)


def _dims(node: fx.Node) -> tuple[Any, ...]:
    rest = node.args[1:] or (node.kwargs.get("dims"),)
    return as_tuple(rest[0]) if len(rest) == 1 else rest


def _label(node: fx.Node) -> str:
    return f"{node.name!r} ({target_name(node)})"

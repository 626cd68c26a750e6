"""Follow the weight operand of a linear call back to its parameter, through the views and casts that a model puts between.

    t = get_attr[attn.in_proj_weight]       (48, 16)
    w = t[0:16]                             WeightPath("attn.in_proj_weight", View((16, 16), (16, 1), 0))

Read-only. The same view of the stored parameter is what a merge writes. Where it lies in the parameter is found by running
the nodes on a tensor without values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from misscompile.passes.linear_calls import as_tuple, target_name
from misscompile.record.words import View, WeightPath

aten = torch.ops.aten

_CASTS = {
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.alias.default),
    *(aten.contiguous.default, aten.clone.default, aten.detach.default, "to", "type", "type_as", "contiguous", "clone"),
    *("detach", "float", "half", "bfloat16", "double"),
}
_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.squeeze.default, aten.squeeze.dim, aten.unsqueeze.default, torch.reshape, torch.flatten, "view", "reshape"),
    *("flatten", "unflatten", "squeeze", "unsqueeze", aten.slice.Tensor),
    *(torch.t, aten.t.default, aten.numpy_T.default, "t", torch.transpose, aten.transpose.int, "transpose"),
    *(torch.permute, aten.permute.default, "permute"),
}
_CUTS = {
    *(torch.split, aten.split.Tensor, aten.split_with_sizes.default, "split"),
    *(torch.chunk, aten.chunk.default, "chunk"),
}
_PARAMETRIZATION = "parametrizations."


class WeightError(Exception):
    """Why the weight operand of a linear call is not a parameter."""


def find_parameter(root: nn.Module, target: str) -> Tensor | None:
    """The tensor that a `get_attr` target of `root` stands for, or None."""
    found: Any = root
    for part in target.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def view_of(taken: Tensor) -> View:
    """Where a tensor lies in its storage."""
    return View(tuple(taken.shape), taken.stride(), int(taken.storage_offset()))


def take_view(stored: Tensor, view: View) -> Tensor:
    """A view of a contiguous parameter; it shares the storage."""
    return stored.as_strided(view.size, view.stride, stored.storage_offset() + view.offset)


def weight_view(root: nn.Module, path: WeightPath) -> Tensor:
    """The operand that a path leads to, without its values."""
    parameter = find_parameter(root, path.parameter)
    assert parameter is not None
    return take_view(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), path.view)


def overlap(weight: Tensor, view: View, other: View) -> bool:
    """Whether two views of one parameter have an element in common."""
    if view == other:
        return True
    marks = torch.zeros(weight.shape, dtype=torch.bool)
    take_view(marks, view).fill_(True)
    return bool(take_view(marks, other).any())


def trace_weight(weight: fx.Node, root: nn.Module) -> WeightPath:
    """The parameter of `root` behind a weight operand, and the view between the two; else a `WeightError`."""
    target = str(weight.target)
    if weight.op == "get_attr" or (weight.op == "call_module" and target.startswith(_PARAMETRIZATION)):
        target = target.removeprefix(_PARAMETRIZATION)
        found = find_parameter(root, target)
        if not isinstance(found, nn.Parameter):
            kind = "a buffer or a constant" if isinstance(found, Tensor) else "no tensor of the graph module"
            raise WeightError(f"its weight {target!r} is {kind}, not a parameter")
        return WeightPath(target, view_of(torch.empty(found.shape, device="meta")))
    if weight.op == "placeholder":
        raise WeightError(
            f"its weight is the input {target!r} of the graph, not a parameter of it (of an exported program, adapt "
            "the program itself or its module())"
        )
    source = _source(weight)
    if source is None:
        raise WeightError(f"its weight is computed by {_label(weight)}, so that a block could not be merged into it")
    path = trace_weight(source, root)
    other = next((dtype for dtype in _dtypes(weight) if not dtype.is_floating_point), None)
    if other is not None:
        raise WeightError(f"its weight is read as {other} by {_label(weight)}, and an update is real and floating-point")
    if weight.target in _CASTS or weight.args[1:] == ("data",):
        return path
    current = weight_view(root, path)
    try:
        taken = _evaluate(weight, current)
    except RuntimeError as error:
        raise WeightError(f"its weight is no view of the parameter {path.parameter!r} ({error})") from error
    if taken.untyped_storage()._cdata != current.untyped_storage()._cdata:
        raise WeightError(f"its weight is no view of the parameter {path.parameter!r}: {_label(weight)} copies it")
    return WeightPath(path.parameter, view_of(taken))


def passes_weight(node: fx.Node) -> bool:
    """Whether `node` is a view, a part or a cast, of which `trace_weight` sees the source."""
    return _source(node) is not None or node.target in _CUTS


def readers(source: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes that read the values of a parameter, each with what it reads: the parameter, or a view or cast of it."""
    todo = [source]
    while todo:
        link = todo.pop()
        for user in link.users:
            if passes_weight(user):
                todo.append(user)
            elif user.target is not aten._assert_tensor_metadata.default:
                yield user, link


def _source(node: fx.Node) -> fx.Node | None:
    """What a view, a part or a cast is taken of; None for a node that computes."""
    source: Any = node.args[0] if node.args else None
    if node.op not in ("call_function", "call_method") or not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem and source.target in _CUTS:
        cut: Any = source.args[0]
        return cut if isinstance(cut, fx.Node) else None
    attribute = node.target is getattr and node.args[1:] in (("T",), ("data",))
    part = node.target is operator.getitem and all(isinstance(index, slice) for index in as_tuple(node.args[1]))
    return source if attribute or part or node.target in _CASTS or node.target in _VIEWS else None


def _dtypes(node: fx.Node) -> Iterator[torch.dtype]:
    """The dtypes that a cast or view names, and that of its result where the graph knows it."""
    value = node.meta.get("val")
    named = (*node.args, *node.kwargs.values(), value.dtype if isinstance(value, Tensor) else None)
    return (dtype for dtype in named if isinstance(dtype, torch.dtype))


def _evaluate(node: fx.Node, current: Tensor) -> Tensor:
    """What a view or a part is of a tensor like `current`."""
    value: Any = node.meta.get("val")
    source: Any = node.args[0]
    if node.target is operator.getitem and source.target in _CUTS:
        parts: Any = _call(source, current)
        return parts[node.args[1]]  # type: ignore[no-any-return]
    if len(node.all_input_nodes) > 1 and isinstance(value, Tensor):  # sizes that other nodes compute
        return current.view([int(size) for size in value.shape])
    return _call(node, current)  # type: ignore[no-any-return]


def _call(node: fx.Node, current: Tensor) -> Any:
    if len(node.all_input_nodes) > 1:
        raise WeightError(f"its weight is viewed by {_label(node)} in a shape that the graph does not fix")
    target: Any = getattr(current, node.target) if isinstance(node.target, str) else node.target
    return target(*(() if isinstance(node.target, str) else (current,)), *node.args[1:], **node.kwargs)


def _label(node: fx.Node) -> str:
    return f"{node.name!r} ({target_name(node)})"

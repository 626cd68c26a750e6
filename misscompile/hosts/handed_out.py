"""What the attributes of an adapted owner give to code that reads them, as `torch.nn.utils.parametrize` does it.

    attention.out_proj.weight   ->   W + ΔW          in the code of a model, whoever runs it
    attention.out_proj.weight   ->   the parameter   in code that asks for its dtype, writes to it, ties, loads or shards it

So an adapter acts on every path, also where a parent computes with the weight and the owner's forward does not run. The
parameter stays registered under its name: optimizers and `state_dict` never see what is handed out.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from misscompile.passes.source import attribute_chain
from misscompile.record.words import Block, WeightPath
from misscompile.variants import VARIANTS

BASE_WEIGHT = "miss_base_weight"
"""Name under which the generated forward of an owner reads the base weight."""

_METADATA = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "stride", "layout", "itemsize", "nbytes"}
_METADATA |= {"is_cuda", "is_cpu", "is_meta", "is_sparse", "is_contiguous", "is_floating_point", "get_device", "quant_state"}
_METADATA |= {"element_size", "is_leaf", "requires_grad", "grad", "data_ptr", "untyped_storage"}
_IDENTITY_CALLS = {"isinstance", "hasattr", "id", "type"}
_NAMES_OF_TORCH = {"torch", "nn", "F", "init"}
"""What code calls torch's modules by: `nn.init.zeros_(w)` writes to `w`, and `y.add_(w)` reads it."""

_CARETAKERS = (
    *("torch.nn.modules.module", "torch.nn.utils", "torch.nn.init", "torch.optim", "torch.distributed"),
    *("transformers.modeling_utils", "transformers.core_model_loading", "accelerate", "peft", "safetensors", "misscompile"),
)
"""Modules whose code reads parameters to load, tie, move, count or shard them, and computes no output with them."""


def weight_attributes(base: type[nn.Module], path: WeightPath, blocks: tuple[Block, ...]) -> dict[str, Any]:
    """The members of an owner's class by which `weight` gives `W + ΔW`, and `BASE_WEIGHT` the base's."""
    found = inspect.getattr_static(base, "weight", None)
    held = found if isinstance(found, property) else _STORED  # a parametrized class computes its weight

    def read(self: nn.Module) -> Any:
        stored = held.fget(self)  # type: ignore[misc]
        if not torch.compiler.is_compiling() and wants_parameter(sys._getframe(1)):
            return stored
        return add_updates(stored, path, [(block.variant, getattr(self, block.parameter)) for block in blocks])

    return {BASE_WEIGHT: held, "weight": property(read, _write, _delete)}


def add_updates(stored: Tensor, path: WeightPath, updates: Sequence[tuple[str, Tensor]]) -> Tensor:
    """`round(W + ΣΔW)` in the shape and dtype of `stored`, summed in float32 or wider; gradients reach the blocks."""
    wide = functools.reduce(torch.promote_types, [block.dtype for _, block in updates], torch.float32)
    wide = torch.promote_types(wide, stored.dtype)
    merged = stored.to(wide, copy=True, memory_format=torch.contiguous_format)
    weight = merged.as_strided(*path.view)
    base = weight.clone() if len(updates) > 1 or VARIANTS[updates[0][0]].reads_weight else weight
    for variant, block in updates:
        VARIANTS[variant].add_delta_(weight, base, block.to(wide))
    return merged.to(stored.dtype)


def copy_attribute(tensor: str, copied: str) -> property:
    """The attribute that gives a registered copy in the place of the base's tensor, to all but what shards both."""

    def read(self: nn.Module) -> Any:  # a function, since Dynamo does not follow operator.attrgetter
        if not torch.compiler.is_compiling() and _shards(sys._getframe(1)):
            return self._parameters.get(tensor, self._buffers.get(tensor))
        return getattr(self, copied)

    return property(read)


def assign_to_copies(copied: Mapping[str, str], base: type[nn.Module]) -> Callable[[nn.Module, str, Any], None]:
    """What is assigned becomes the copy that is read. `nn.Module` asks no property about a name that is registered.

    What shards parameters means the base's: it assigns the parts, and for each forward the whole, of both.
    """

    def assign(self: nn.Module, name: str, value: Any) -> None:
        if name in copied and (torch.compiler.is_compiling() or not _shards(sys._getframe(1))):
            name = copied[name]
        base.__setattr__(self, name, value)

    return assign


def _stored(self: nn.Module) -> Any:
    held = self._parameters.get("weight")
    if held is None and parametrize.is_parametrized(self, "weight"):  # after it was adapted
        return self.parametrizations["weight"]()  # type: ignore[operator, index]
    if held is None:
        return vars(self)["weight"] if "weight" in vars(self) else nn.Module.__getattr__(self, "weight")
    return held


_STORED = property(_stored)


def _write(self: nn.Module, value: Any) -> None:
    """A tensor that is no parameter, which FSDP1 and hooks like those of `torch.nn.utils.weight_norm` set."""
    vars(self)["weight"] = value


def _delete(self: nn.Module) -> None:
    del vars(self)["weight"]


def _shards(frame: types.FrameType) -> bool:
    """Whether the code of a frame shards the parameters of a module, each under its registered name."""
    return (frame.f_globals.get("__name__") or "").startswith("torch.distributed")


def wants_parameter(frame: types.FrameType) -> bool:
    """Whether the code that reads a weight in this frame is after the parameter, and does not compute with its values."""
    name = frame.f_globals.get("__name__") or ""
    if f"{name}.".startswith(tuple(f"{caretaker}." for caretaker in _CARETAKERS)):
        return True
    return _takes_no_value(frame.f_code, frame.f_lasti)


@functools.lru_cache(maxsize=4096)
def _takes_no_value(code: types.CodeType, instruction: int) -> bool:
    """Whether the expression at this instruction is used for its metadata or identity, or as the target of a write.

    Where there is no source to tell, the answer is no: the values are right for every use.
    """
    try:
        lines, first = inspect.getsourcelines(code)
        source = textwrap.dedent("".join(lines))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError, IndentationError):
        return False
    indent = len(lines[0]) - len(source.splitlines(keepends=True)[0])
    line, end_line, column, end_column = list(code.co_positions())[instruction // 2]
    if line is None or end_line is None or column is None or end_column is None:
        return False
    place = line - first + 1, end_line - first + 1, column - indent, end_column - indent
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == place:
            return _asks_or_writes(node, parents)
    return False


def _asks_or_writes(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> bool:
    match parents.get(node):
        case ast.Attribute(attr=name, ctx=context) as outer:
            if name in _METADATA or _is_in_place(name) or isinstance(context, ast.Store):
                return True
            if name == "data" and _asks_or_writes(outer, parents):
                return True
        case ast.Subscript(value=value, ctx=ast.Store()):
            return value is node
        case ast.Call(func=ast.Name(id=name), args=[*arguments]) if node in arguments:
            if name in _IDENTITY_CALLS or (_is_in_place(name) and node is arguments[0]):
                return True
        case ast.Call(func=ast.Attribute(attr=name) as function, args=[first, *_]) if node is first:
            root, _ = attribute_chain(function) or ("", ())
            if _is_in_place(name) and root in _NAMES_OF_TORCH:
                return True
        case ast.Compare(ops=operators) if all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in operators):
            return True
        case ast.AugAssign(target=target):
            return target is node
        case ast.Assign(targets=[ast.Attribute(attr="weight")]):  # a.weight = b.weight: a tie
            return True
    return _is_written_back(node, parents)


def _is_written_back(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a weight is read for a new value of itself: `a.weight = Parameter(a.weight.clone())`."""
    outer: ast.AST | None = node
    while isinstance(outer, ast.expr):
        outer = parents.get(outer)
    if not isinstance(outer, ast.Assign):
        return False
    return any(ast.unparse(target) == ast.unparse(node) for target in outer.targets)


def _is_in_place(name: str) -> bool:
    """Whether a method or function writes to its argument, by torch's convention."""
    return name.endswith("_") and not name.endswith("__")

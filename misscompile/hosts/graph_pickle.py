"""A graph as plain values that pickle: nodes by name, operators by name, tensors that a trace saw by shape and dtype.

`torch.fx` pickles a graph module as its code, and traces that again. A trace follows neither the specs of the inputs of an
exported graph nor a branch on a size, and forgets which module each call came from.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import marshal
import sys
import types
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export._unlift import GuardsFn, _convert_guards_code_to_fn

from misscompile.errors import StateError
from misscompile.passes.insert_updates import TAG
from misscompile.passes.owner_names import module_stack

_KEPT_META = ("stack_trace", "custom", TAG)
_PYTHON = sys.version_info[:2]


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node among the arguments of another one."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Operator:
    """An operator, by its name below `torch.ops`."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Like:
    """A tensor that a trace saw."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_graph(graph: fx.Graph) -> Any:
    """A graph as values that `read_graph` makes a graph of again."""
    nodes = [
        (node.op, _write(node.target), _write(node.args), _write(node.kwargs), node.name, node.type, _write_meta(node))
        for node in graph.nodes
    ]
    return nodes, graph._codegen


def read_graph(written: Any) -> fx.Graph:
    """The graph that `write_graph` was given."""
    nodes, codegen = written
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for op, target, args, kwargs, name, type_expr, meta in nodes:
        read = functools.partial(_read, made)
        node = graph.create_node(op, read(target), read(args), read(kwargs), name, type_expr)
        node.meta = {key: _read(made, value) if key == "val" else value for key, value in meta.items()}
        made[name] = node
    graph.set_codegen(codegen)
    return graph


def write_guards(module: nn.Module) -> Any:
    """What `read_guards` makes a check of inputs of again: `torch.export` keeps no source of the code that it generates."""
    return _PYTHON, marshal.dumps(_guards_of(module).__code__)


def read_guards(written: Any) -> nn.Module:
    """The module that checks the inputs of an exported graph.

    Raises:
        StateError: another Python wrote it, whose code this one cannot run.
    """
    python, code = written
    if python != _PYTHON:
        raise StateError(
            f"the graph was pickled by Python {'.'.join(map(str, python))}, and its check of inputs does not run in "
            f"{'.'.join(map(str, _PYTHON))}: capture the model again, and load the adapter with load_adapter."
        )
    empty: nn.Module = _convert_guards_code_to_fn([], [])
    _guards_of(empty).__code__ = marshal.loads(code)  # noqa: S302 - as trusted as the pickle that it comes from
    return empty


def is_guards(module: nn.Module | None) -> bool:
    """Whether a module is the check that `torch.export` puts in front of a graph."""
    return isinstance(module, GuardsFn)


def _guards_of(module: nn.Module) -> types.FunctionType:
    function = inspect.getclosurevars(module.forward).nonlocals["func"]
    assert isinstance(function, types.FunctionType)
    return function


def _write(value: Any) -> Any:
    return fx.node.map_aggregate(value, _write_leaf)


def _write_leaf(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _Node(value.name)
    if isinstance(value, torch._ops.HigherOrderOperator):
        return _Operator(f"higher_order.{value.name()}")  # type: ignore[no-untyped-call]
    return _Operator(str(value)) if isinstance(value, torch._ops.OperatorBase | torch._ops.OpOverloadPacket) else value


def _read(made: dict[str, fx.Node], value: Any) -> Any:
    def leaf(value: Any) -> Any:
        if isinstance(value, _Node):
            return made[value.name]
        if isinstance(value, _Operator):
            return functools.reduce(getattr, value.name.split("."), torch.ops)
        return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, _Like) else value

    return fx.node.map_aggregate(value, leaf)


def _write_meta(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    if stack := module_stack(node):
        meta["nn_module_stack"] = {str(depth): entry for depth, entry in enumerate(stack)}
    if isinstance(value := node.meta.get("val"), Tensor):
        meta["val"] = _Like(tuple(size if isinstance(size, int) else size.node.hint for size in value.shape), value.dtype)
    return meta

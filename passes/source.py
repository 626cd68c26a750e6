"""Read the source of a forward: what a trace of it, or a look at its weights, could miss. Nothing is run.

A trace runs a forward once and keeps what it saw. That is the whole forward only if it is straight-line: local assignments
and a return, calls of torch functions on values that depend on the input, of the module's children, and of `super()`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Chain = tuple[str, ...]

_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Pass)
_BRANCHES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.NamedExpr, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@functools.lru_cache(maxsize=4096)
def parse_function(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The syntax tree of a Python function below its decorators, or None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):  # built in C or generated
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def attribute_chain(node: ast.AST) -> tuple[str, Chain] | None:
    """`("self", ("out_proj", "weight"))` for `self.out_proj.weight`; None for what is not a chain on a name."""
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.append(node.attr)
        node = node.value
    return (node.id, tuple(reversed(chain))) if isinstance(node, ast.Name) else None


def tracing_hazard(base_class: type[nn.Module], owner: nn.Module) -> str | None:
    """What in the forward of `base_class` a trace of it would freeze or lose, as a clause; None where nothing is.

    Args:
        base_class: a linear's class; forwards of torch itself and of transformers' `Conv1D` are known to be traceable.
        owner: an instance, whose parameters and children the source may name.
    """
    for kind in base_class.__mro__:
        forward = vars(kind).get("forward")
        if forward is None:
            continue
        if forward is nn.Linear.forward or (kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"):
            return None
        tree = parse_function(forward) if inspect.isfunction(forward) and not hasattr(forward, "__wrapped__") else None
        if tree is None or tree.decorator_list:
            return "its forward has no source that can be read"
        check = _StraightLine(tree, forward, owner)
        if check.hazard is not None:
            return f"its forward {check.hazard}, which a trace would freeze or lose"
        if not check.calls_super:
            return None
    return "its forward has no source that can be read"


class _StraightLine:
    """Walks one forward; `hazard` says the first thing that keeps it from being straight-line."""

    def __init__(self, tree: ast.FunctionDef, function: Any, owner: nn.Module) -> None:
        self.globals = {**vars(builtins), **function.__globals__, **_closure(function)}
        self.owner = owner
        self.calls_super = False
        arguments = tree.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self.locals = {argument.arg for argument in names if argument is not None}
        self.receiver = (arguments.posonlyargs + arguments.args)[0].arg if arguments.posonlyargs + arguments.args else ""
        self.hazard = next(self._hazards(tree), None)

    def _hazards(self, tree: ast.FunctionDef) -> Iterator[str]:
        for statement in self._statements(tree.body):
            if not isinstance(statement, _STATEMENTS):
                yield f"has the statement `{type(statement).__name__.lower()}`"
                continue
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            for target in targets:
                yield from self._assigned(target)
            value = getattr(statement, "value", None)
            if value is not None:
                yield from self._expression(value)

    def _statements(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        """The statements of a body, those under `if self.<parameter> is None` too: a structure has that parameter or not."""
        for statement in body:
            if isinstance(statement, ast.If) and self._asks_for_parameter(statement.test):
                yield from self._statements([*statement.body, *statement.orelse])
            else:
                yield statement

    def _asks_for_parameter(self, test: ast.expr) -> bool:
        found = attribute_chain(test.left) if isinstance(test, ast.Compare) else None
        asked = isinstance(test, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops)
        return asked and found is not None and found[0] == self.receiver and found[1][0] in self.owner._parameters

    def _assigned(self, target: ast.AST | None) -> Iterator[str]:
        if isinstance(target, ast.Tuple):
            for element in target.elts:
                yield from self._assigned(element)
        elif isinstance(target, ast.Name):
            self.locals.add(target.id)
        elif target is not None:
            yield f"writes {ast.unparse(target)}"

    def _expression(self, expression: ast.expr) -> Iterator[str]:
        for node in ast.walk(expression):
            if isinstance(node, _BRANCHES):
                yield f"chooses by `{ast.unparse(node)}`"
            elif isinstance(node, ast.Call):
                yield from self._call(node)
            elif isinstance(node, ast.Attribute):
                yield from self._read(node)

    def _read(self, node: ast.Attribute) -> Iterator[str]:
        found = attribute_chain(node)
        if found is None or found[0] != self.receiver:
            return
        name = found[1][0]
        known = name in self.owner._parameters or name in (
            "weight",
            "bias",
            "in_features",
            "out_features",
            "nx",
            "nf",
            "parametrizations",
        )
        if not known and not (name in self.owner._modules and len(found[1]) == 1) and name != "forward":
            yield f"reads self.{'.'.join(found[1])}"

    def _call(self, node: ast.Call) -> Iterator[str]:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return
        if isinstance(node.func, ast.Attribute) and is_super(node.func.value):
            self.calls_super = True
            if node.func.attr != "forward":
                yield f"calls super().{node.func.attr}"
            return
        found = attribute_chain(node.func)
        if found is None and not isinstance(node.func, ast.Attribute):
            yield f"calls {ast.unparse(node.func)}"
            return
        if found is None or (found[0] in self.locals and found[0] != self.receiver):
            return  # a method of a value that was computed here
        root, chain = found
        if root == self.receiver:
            if not (len(chain) == 1 and chain[0] in self.owner._modules) and chain[0] not in self.owner._parameters:
                yield f"calls self.{'.'.join(chain)}"
            return
        function = self.globals.get(root)
        for name in chain:
            function = getattr(function, name, None)
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        given = {name.id for argument in arguments for name in ast.walk(argument) if isinstance(name, ast.Name)}
        if not str(getattr(function, "__module__", "") or "").startswith("torch") or not given & self.locals:
            yield f"calls {ast.unparse(node.func)}"


def is_super(node: ast.AST) -> bool:
    """Whether a node is the call `super()`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _closure(function: Any) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            found[name] = cell.cell_contents
    return found

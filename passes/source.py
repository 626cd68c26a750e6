"""Read the source of a forward: what a trace of it would freeze or lose. Only conditions are run.

A trace runs a forward once and keeps what it saw. That is the whole forward only if it is straight-line: local assignments
and a return, calls of torch functions on values that depend on the input, of the module's children, and of `super()`. A
condition that is the same at every call (is this a script, has it a bias) leaves it so.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Chain = tuple[str, ...]

_STRUCTURE = ("weight", "bias", "in_features", "out_features", "nx", "nf", "parametrizations", "forward")
"""What a forward may read of its module beside parameters and children: modules that share a graph have it in common."""

_PLAIN = (bool, int, float, str, type(None), nn.Module)
"""The kinds of attributes of which a condition can be decided without an input."""

_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Pass)
_BRANCHES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.NamedExpr, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def parse_function(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The syntax tree of a Python function below its decorators, or None where there is no source."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else _parse_code(code)


@functools.lru_cache(maxsize=4096)
def _parse_code(code: types.CodeType) -> ast.FunctionDef | None:
    """By code, which functions of one definition share, and which keeps no module or class alive as a function does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
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


def tracing_hazard(base_class: type[nn.Module], owner: nn.Module, present: bool = False) -> str | None:
    """What in the forward of `base_class` a trace of it would freeze or lose, as a clause; None where nothing is.

    The source may name the parameters and children of `owner`. The forwards of `nn.Linear` and of transformers' `Conv1D`
    are known to be traceable. With `present`, an `if` on plain attributes of `owner` is read as they are now: a trace
    holds until one of them changes.
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
        check = _StraightLine(tree, forward, owner, present)
        if check.hazard is not None:
            return f"its forward {check.hazard}, which a trace would freeze or lose"
        if not check.calls_super:
            return None
    return "its forward has no source that can be read"


class _StraightLine:
    """Walks one forward; `hazard` says the first thing that keeps it from being straight-line."""

    def __init__(self, tree: ast.FunctionDef, function: Any, owner: nn.Module, present: bool) -> None:
        found = inspect.getclosurevars(function)
        self.globals = {**found.builtins, **found.globals, **found.nonlocals}
        self.owner, self.present = owner, present
        self.calls_super = False
        arguments = [node.arg for node in ast.walk(tree.args) if isinstance(node, ast.arg)]
        self.locals = set(arguments)
        self.receiver = arguments[0] if arguments else ""
        self.hazard = next(self._hazards(tree.body), None)

    def _hazards(self, body: list[ast.stmt]) -> Iterator[str]:
        for index, statement in enumerate(body):
            if isinstance(statement, ast.If) and self._is_decided(statement.test):
                taken = statement.body if self._decide(statement.test) else statement.orelse
                yield from self._hazards([*taken, *body[index + 1 :]])
                return
            if isinstance(statement, ast.If) and self._asks_for_parameter(statement.test):
                yield from self._hazards(statement.body)
                yield from self._hazards(statement.orelse)
                continue
            if not isinstance(statement, _STATEMENTS):
                yield f"has the statement `{type(statement).__name__.lower()}`"
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            for target in targets:
                yield from self._assigned(target)
            value = getattr(statement, "value", None)
            if value is not None:
                yield from self._expression(value)
            if isinstance(statement, ast.Return):
                return

    def _is_decided(self, test: ast.expr) -> bool:
        """Whether a condition asks for a script, which a call never is, or only for plain attributes as they are now."""
        if isinstance(test, ast.BoolOp):
            return all(map(self._is_decided, test.values))
        if isinstance(test, ast.UnaryOp):
            return self._is_decided(test.operand)
        if isinstance(test, ast.Compare):
            return all(map(self._is_decided, (test.left, *test.comparators)))
        if isinstance(test, ast.Call):
            asked = self._named(*(attribute_chain(test.func) or ("", ())))
            return asked is torch.jit.is_scripting  # type: ignore[attr-defined]
        root, chain = attribute_chain(test) or ("", ())
        is_own = (
            root == self.receiver and len(chain) == 1 and not isinstance(getattr(type(self.owner), chain[0], None), property)
        )
        plain = self.present and is_own and isinstance(getattr(self.owner, chain[0], self), _PLAIN)
        return plain or isinstance(test, ast.Constant)

    def _decide(self, test: ast.expr) -> bool:
        code = compile(ast.Expression(test), "<condition>", "eval")
        return bool(eval(code, dict(self.globals), {self.receiver: self.owner}))  # noqa: S307 - a part of the forward

    def _asks_for_parameter(self, test: ast.expr) -> bool:
        """Whether a condition is `self.<parameter> is None`: modules that share a graph all have that parameter or none."""
        if not isinstance(test, ast.Compare) or not all(isinstance(op, (ast.Is, ast.IsNot)) for op in test.ops):
            return False
        found = attribute_chain(test.left)
        return found is not None and found[0] == self.receiver and found[1][0] in self.owner._parameters

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
        root, chain = attribute_chain(node) or ("", ())
        if root != self.receiver or not chain or chain[0] in self.owner._parameters or chain[0] in _STRUCTURE:
            return
        if len(chain) > 1 or chain[0] not in self.owner._modules:
            yield f"reads self.{'.'.join(chain)}"

    def _call(self, node: ast.Call) -> Iterator[str]:
        function = node.func
        if is_super(node):
            return
        if isinstance(function, ast.Attribute) and is_super(function.value):
            self.calls_super = True
            if function.attr != "forward":
                yield f"calls super().{function.attr}"
            return
        found = attribute_chain(function)
        if found is None:
            if not isinstance(function, ast.Attribute):  # an attribute is a method of a value that was computed here
                yield f"calls {ast.unparse(function)}"
        elif found[0] == self.receiver:
            name, *rest = found[1]
            if name not in self.owner._parameters and (rest or name not in self.owner._modules):
                yield f"calls self.{'.'.join(found[1])}"
        elif found[0] not in self.locals and not self._is_torch_on_locals(node, *found):
            yield f"calls {ast.unparse(function)}"

    def _is_torch_on_locals(self, node: ast.Call, root: str, chain: Chain) -> bool:
        function = self._named(root, chain)
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        given = {name.id for argument in arguments for name in ast.walk(argument) if isinstance(name, ast.Name)}
        return str(getattr(function, "__module__", "") or "").startswith("torch") and bool(given & self.locals)

    def _named(self, root: str, chain: Chain) -> Any:
        """What a chain on a global name stands for, or None."""
        return functools.reduce(lambda found, name: getattr(found, name, None), chain, self.globals.get(root))


def is_super(node: ast.AST) -> bool:
    """Whether a node is the call `super()`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"

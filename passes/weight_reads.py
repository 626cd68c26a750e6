"""Find modules whose own forward does not run, because another module's code reads their weight. Read-only.

    class Attention:                                     # nn.MultiheadAttention, a fused evaluation path, Mamba
        def forward(self, x):
            return fused(x, self.out_proj.weight)        # out_proj.forward never runs: an adapter there has no effect

The source of each class's forward, and of the methods and properties it uses, is searched for `<child>.weight`, where the
child is reached from `self` by attributes, an index, a loop or a local name. Reads of metadata (`.dtype`, `.device`,
`.shape`, `isinstance`) do not count.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from misscompile.passes.source import Chain, is_super, parse_function

_ANY = "*"
_METADATA = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad"})
_METADATA_CALLS = frozenset({"isinstance", "hasattr", "id", "type"})


@dataclasses.dataclass(frozen=True)
class WeightRead:
    """Why a module's own forward may not run; `called`: the model's code calls it too, on another path."""

    reason: str
    called: bool


def find_read_weights(modules: Iterable[nn.Module]) -> dict[nn.Module, WeightRead]:
    """Those of a model's modules whose weight is read by a parent's code, each with a reason that names that code.

    A module of torch's own reads a weight in one mode and calls the child in the other. Both modes are used, so a child
    that is read there counts as not called. Which path a model's own code takes mostly depends on a setting or a kernel.
    """
    parents = [(parent, type(parent)) for parent in modules]
    reads = {kind: weight_uses(kind)[0] for kind in {kind for _, kind in parents} if _names_a_weight(kind)}  # type: ignore[arg-type]
    readers: dict[nn.Module, type[nn.Module]] = {}
    for parent, kind in parents:  # of several readers, the last and nearest tells most
        for path in reads.get(kind, ()):
            readers.update(dict.fromkeys(_children(parent, path), kind))
    if not readers:
        return {}
    called: set[nn.Module] = set()
    for parent, kind in parents:
        called.update(child for path in weight_uses(kind)[1] for child in _children(parent, path))  # type: ignore[arg-type]
    found = {}
    for child, kind in readers.items():
        reason = f"{kind.__name__} reads its weight directly, so that its own forward does not always run"
        found[child] = WeightRead(reason, child in called and not kind.__module__.startswith("torch."))
    return found


@functools.lru_cache(maxsize=4096)
def _names_a_weight(owner: type[nn.Module]) -> bool:
    """Whether a `weight` is named in what `weight_uses` would read; told from the bytecode, since parsing takes longer.

    Every attribute of the forward that is a method of the class is followed, whatever object it is taken from.
    """
    seen: set[Any] = set()
    queue: list[Any] = [_method(owner, "forward", 0)[1]]
    while queue:
        function = queue.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is None:
            return True
        names = _code_names(code)
        if "weight" in names:
            return True
        queue += [_method(owner, name, level)[1] for name in names for level in range(len(owner.__mro__))]
    return False


def _code_names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_code_names, inner))


@functools.lru_cache(maxsize=4096)
def weight_uses(owner: type[nn.Module]) -> tuple[tuple[Chain, ...], tuple[Chain, ...]]:
    """Paths of the children whose `.weight` the forward of this class reads as a value, and of those that it calls.

    `"*"` in a path stands for any child.
    """
    paths: dict[Chain, None] = {}
    calls: dict[Chain, None] = {}
    seen: set[Any] = set()
    queue: list[Any] = [_method(owner, "forward", 0)]
    while queue:
        level, function = found = queue.pop()
        tree = None if function is None or found in seen else parse_function(function)
        seen.add(found)
        if tree is None:
            continue
        names = _local_names(tree)
        ignored = {id(inner) for node in ast.walk(tree) for inner in _metadata_reads(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                calls.update(dict.fromkeys(_resolve(node.func, names)))
            if isinstance(node, ast.Attribute):
                queue += _used_methods(owner, node, level)
                if node.attr == "weight" and id(node) not in ignored:
                    paths.update(dict.fromkeys(chain for chain in _resolve(node.value, names) if chain))
    return tuple(paths), tuple(calls)


def _method(owner: type[nn.Module], name: str, start: int) -> tuple[int, Any]:
    """The function of this name, or that of a property, and where in the resolution order after `start` it is."""
    for level, kind in enumerate(owner.__mro__[start:], start):
        if name in vars(kind):
            member = vars(kind)[name]
            member = member.fget if isinstance(member, property) else getattr(member, "func", member)
            return level, member if callable(member) and kind is not nn.Module else None
    return 0, None


def _used_methods(owner: type[nn.Module], node: ast.Attribute, level: int) -> Iterator[tuple[int, Any]]:
    if is_super(node.value):
        yield _method(owner, node.attr, level + 1)
    elif isinstance(node.value, ast.Name) and node.value.id == "self":
        yield _method(owner, node.attr, 0)
    elif isinstance(node.value, ast.Name):
        for start, kind in enumerate(owner.__mro__):
            if kind.__name__ == node.value.id:
                yield _method(owner, node.attr, start)


def _local_names(tree: ast.FunctionDef) -> dict[str, set[Chain]]:
    """What each local name may stand for, as paths from `self`."""
    names: dict[str, set[Chain]] = {"self": {()}}
    for _ in range(2):  # an alias of an alias
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
                _bind(node.targets, _resolve(node.value, names), names)
            elif isinstance(node, (ast.For, ast.comprehension)):
                sources = node.iter.args if isinstance(node.iter, ast.Call) else [node.iter]
                inside = {(*chain, _ANY) for source in sources for chain in _resolve(source, names)}
                _bind([node.target], inside, names)
    return names


def _bind(targets: list[ast.expr], chains: set[Chain], names: dict[str, set[Chain]]) -> None:
    for target in targets:
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and name.id != "self" and chains:
                names.setdefault(name.id, set()).update(chains)


def _resolve(node: ast.AST, names: dict[str, set[Chain]]) -> set[Chain]:
    if isinstance(node, ast.Name):
        return names.get(node.id, set())
    if isinstance(node, ast.Attribute):
        return {(*chain, node.attr) for chain in _resolve(node.value, names)}
    if isinstance(node, ast.Subscript):
        index = str(node.slice.value) if isinstance(node.slice, ast.Constant) else _ANY
        return {(*chain, index) for chain in _resolve(node.value, names)}
    if isinstance(node, (ast.Tuple, ast.List)):
        return {chain for element in node.elts for chain in _resolve(element, names)}
    return set()


def _metadata_reads(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Attribute) and node.attr in _METADATA:
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _METADATA_CALLS:
        yield from node.args


def _children(parent: nn.Module, path: Chain) -> list[nn.Module]:
    found = [parent]
    for name in path:
        if name == _ANY:
            found = [child for module in found for child in module.children()]
        else:
            found = [child for module in found if (child := module._modules.get(name)) is not None]
    return found

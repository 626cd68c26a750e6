"""Find modules whose own forward does not run, because another module's code reads their weight. Read-only.

    class Attention:                                     # nn.MultiheadAttention, a fused evaluation path, Mamba
        def forward(self, x):
            return fused(x, self.out_proj.weight)        # out_proj.forward never runs: an adapter there has no effect

The source of each class's forward, and of the methods and properties it uses, is searched for `<child>.weight`. A child is
reached from `self` by attributes, an index, a loop or a local name. Reads of metadata (`.dtype`, `.device`, `.shape`,
`isinstance`) do not count.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
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
    parents = [(parent, *weight_uses(type(parent))) for parent in modules]  # type: ignore[arg-type]
    readers: dict[nn.Module, type[nn.Module]] = {}
    for parent, reads, _ in parents:  # of several readers, the last and nearest tells most
        for path in reads:
            readers.update(dict.fromkeys(_children(parent, path), type(parent)))
    if not readers:
        return {}
    called = {child for parent, _, calls in parents for path in calls for child in _children(parent, path)}
    found = {}
    for child, kind in readers.items():
        reason = f"{kind.__name__} reads its weight directly, so that its own forward does not always run"
        found[child] = WeightRead(reason, child in called and not kind.__module__.startswith("torch."))
    return found


@functools.lru_cache(maxsize=4096)
def weight_uses(owner: type[nn.Module]) -> tuple[tuple[Chain, ...], tuple[Chain, ...]]:
    """Paths of the children whose `.weight` the forward of this class reads as a value, and of those that it calls.

    `"*"` in a path stands for any child.
    """
    reads: dict[Chain, None] = {}
    calls: dict[Chain, None] = {}
    seen: set[Any] = set()
    queue: list[Any] = [_method(owner, "forward", 0)]
    while queue:
        level, function = found = queue.pop()
        tree = None if function is None or found in seen else parse_function(function)
        seen.add(found)
        if tree is None:
            continue
        nodes = list(ast.walk(tree))
        names = _local_names(nodes)
        ignored = {inner for node in nodes for inner in _metadata_reads(node)}
        for node in nodes:
            if isinstance(node, ast.Call):
                calls.update(dict.fromkeys(_resolve(node.func, names)))
            if isinstance(node, ast.Attribute):
                queue += _used_methods(owner, node, level)
                if node.attr == "weight" and node not in ignored:
                    reads.update(dict.fromkeys(chain for chain in _resolve(node.value, names) if chain))
    return tuple(reads), tuple(calls)


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
    elif isinstance(node.value, ast.Name):
        starts = [0] if node.value.id == "self" else [n for n, k in enumerate(owner.__mro__) if k.__name__ == node.value.id]
        for start in starts:
            yield _method(owner, node.attr, start)


def _local_names(nodes: Sequence[ast.AST]) -> dict[str, set[Chain]]:
    """What each local name may stand for, as paths from `self`."""
    names: dict[str, set[Chain]] = {"self": {()}}
    for _ in range(2):  # an alias of an alias
        for node in nodes:
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
    """The paths from `self` that an expression may stand for."""
    match node:
        case ast.Name(id=name):
            return names.get(name, set())
        case ast.Attribute(value=value, attr=step):
            return {(*chain, step) for chain in _resolve(value, names)}
        case ast.Subscript(value=value, slice=index):
            step = str(index.value) if isinstance(index, ast.Constant) else _ANY
            return {(*chain, step) for chain in _resolve(value, names)}
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return {chain for element in elements for chain in _resolve(element, names)}
    return set()


def _metadata_reads(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Attribute(value=value, attr=name) if name in _METADATA:
            return [value]
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in _METADATA_CALLS:
            return arguments
    return []


def _children(parent: nn.Module, path: Chain) -> list[nn.Module]:
    found = [parent]
    for name in path:
        inner = [module.children() if name == _ANY else [module._modules.get(name)] for module in found]
        found = [child for children in inner for child in children if child is not None]
    return found

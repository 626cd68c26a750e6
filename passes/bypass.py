"""Find modules whose own forward does not run, because another module's code reads their weight. Read-only.

    class Attention:                                     # nn.MultiheadAttention, a fused evaluation path, Mamba
        def forward(self, x):
            return fused(x, self.out_proj.weight)        # out_proj.forward never runs: an adapter there has no effect

The source of each class's forward, and of the methods it calls, is searched for `self.<child>.weight`. Reads of
metadata (`.dtype`, `.device`, `.shape`, `isinstance`) do not count.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad", "element_size"}
)
_METADATA_CALLS = frozenset({"isinstance", "hasattr", "id", "type"})


def find_bypassed(model: nn.Module) -> dict[nn.Module, str]:
    """Modules of `model` whose weight is read by a parent's code, each with a reason that names that code."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        for path in weight_reads(type(parent)):  # type: ignore[arg-type] # typeshed: a class is hashable
            try:
                child = parent.get_submodule(".".join(path))
            except AttributeError:
                continue
            reason = f"{type(parent).__name__} reads its weight directly, so that its own forward does not always run"
            found.setdefault(child, reason)
    return found


@functools.lru_cache(maxsize=4096)
def weight_reads(owner: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Paths of the children whose `.weight` the forward of this class, or a method it calls on itself, reads as a value."""
    paths: dict[tuple[str, ...], None] = {}
    seen: set[str] = set()
    queue = ["forward"]
    while queue:
        method = queue.pop()
        tree = None if method in seen else _parse(owner, method)
        seen.add(method)
        if tree is None:
            continue
        ignored = {id(inner) for node in ast.walk(tree) for inner in _metadata_reads(node)}
        for node in ast.walk(tree):
            chain = _self_chain(node)
            if chain is None or id(node) in ignored:
                continue
            if len(chain) >= 2 and chain[-1] == "weight":
                paths[chain[:-1]] = None
            elif len(chain) == 1 and inspect.isfunction(inspect.getattr_static(owner, chain[0], None)):
                queue.append(chain[0])
    return tuple(paths)


def _parse(owner: type, method: str) -> ast.AST | None:
    function = inspect.unwrap(getattr(owner, method))
    if getattr(function, "__module__", None) == nn.Module.__module__:
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # built in C or generated: no source to read
        return None


def _metadata_reads(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Attribute) and node.attr in _METADATA:
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _METADATA_CALLS:
        yield from node.args


def _self_chain(node: ast.AST) -> tuple[str, ...] | None:
    """`("out_proj", "weight")` for `self.out_proj.weight`; None for anything else."""
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.append(node.attr)
        node = node.value
    return tuple(reversed(chain)) if chain and isinstance(node, ast.Name) and node.id == "self" else None

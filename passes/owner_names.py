"""The dotted name of a site in a whole graph: that of its parameter, or of the module whose forward made the call."""

from __future__ import annotations

import re

from torch import fx

from misscompile.record.walk import join

PROJECTIONS = ("q", "k", "v")
"""The parts of `in_proj_weight` of `nn.MultiheadAttention`, in the order of its rows."""

_ANONYMOUS = re.compile(r"(?:.*\.)?_?(?:param_constant|tensor_constant|lifted_tensor_|constant|arg|fn_param)_?\d*")


def owner_name(node: fx.Node, target: str) -> str | None:
    """The name of the site at `node`, which reads the parameter `target`; None where nothing tells it."""
    if _ANONYMOUS.fullmatch(target):
        return stack_name(node) or None
    module, _, name = target.rpartition(".")
    name, mark, call = name.partition("#")  # a weight that a merge gave to one call
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        owner = join(module, name[0])
    else:
        owner = module if name == "weight" else target.removesuffix(mark + call)
    return owner + mark + call


def stack_name(node: fx.Node) -> str:
    """The innermost module whose forward made the call, as `nn_module_stack` has it; empty where nothing tells it."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """`(name, class)` of the modules whose forward the node came from, the innermost last."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    kinds = [(path, kind if isinstance(kind, str) else kind.__qualname__) for path, kind in entries]
    return [(re.sub(r"@\d+", "", path), kind) for path, kind in kinds]

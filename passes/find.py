"""Find the linear call sites in a traced owner. Read-only.

Matched, with `weight` the owner's own parameter or the product of its parametrization:

    y = F.linear(x, weight, bias?)          layout out_in   nn.Linear and its subclasses
    y = torch.addmm(bias, x, weight)        layout in_out   transformers' Conv1D
    y = x @ weight.T                        layout in_out   Falcon's linear; the operand is the transposed weight
    y = call_opaque(self.base_forward, out, x, …)  layout opaque   a forward that was not traced
"""

from __future__ import annotations

import operator

import torch
from misscompile.passes.match import match_linear
from misscompile.passes.trace import call_opaque
from torch import fx, nn

from misscompile.plan import Layout, Scope, Site

_WEIGHT_SOURCES = (("get_attr", "weight"), ("call_module", "parametrizations.weight"))
_SHAPE_ATTRIBUTE_PAIRS = (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures"))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of a module that says it is a linear, else None.

    Linears are `nn.Linear` and its subclasses, `Conv1D`, and packed or quantised modules, which keep both numbers as
    integer attributes.
    """
    for in_name, out_name in _SHAPE_ATTRIBUTE_PAIRS:
        in_features, out_features = getattr(module, in_name, None), getattr(module, out_name, None)
        if isinstance(in_features, int) and isinstance(out_features, int):
            return in_features, out_features
    return None


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """dtype of the weight of a linear, or None where it has none. A parametrized one has that of what it is made from."""
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    if weight is None:
        weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    return None if weight is None else weight.dtype


def find_sites(scope: Scope) -> None:
    """Fill `scope.sites` with every call of the owner's weight as a linear; none is an answer too."""
    scope.sites = [site for node in scope.graph.nodes if (site := _match(scope, node)) is not None]


def _match(scope: Scope, node: fx.Node) -> Site | None:
    if node.op != "call_function":
        return None
    if node.target is call_opaque:
        x = node.args[2]
        assert isinstance(x, fx.Node)
        return _site(scope, node, x, None, "opaque")
    call = match_linear(node)
    if call is None or call.layout == "conv":
        return None
    source = _transposed(call.weight)
    plain_product = node.target in (operator.matmul, torch.matmul)
    if plain_product and source is None:  # whether the stored weight is (in, out) is then nothing but a guess
        return None
    source = source or call.weight
    if (source.op, source.target) not in _WEIGHT_SOURCES:
        return None
    return _site(scope, node, call.x, call.weight, call.layout)


def _site(scope: Scope, node: fx.Node, x: fx.Node, weight: fx.Node | None, layout: Layout) -> Site:
    return Site(node, x, weight, layout, scope.in_features, scope.out_features, scope.weight_dtype, scope.blocks)


def is_stored_transposed(scope: Scope) -> bool:
    """Whether the weight of a traced owner is stored as `(in, out)`."""
    site = scope.sites[0]
    return site.layout == "in_out" and site.weight is not None and _transposed(site.weight) is None


def weight_users(scope: Scope) -> set[fx.Node]:
    """The nodes that use the weight of a traced owner beside its sites."""
    operands = {site.weight for site in scope.sites if site.weight is not None}
    sources = {_transposed(operand) or operand for operand in operands}
    users = {user for node in (*operands, *sources) for user in node.users}
    return users - operands - {site.node for site in scope.sites}


def _transposed(node: fx.Node) -> fx.Node | None:
    """`w` for a node that is `w.T` or `w.t()`, else None."""
    attribute = node.op == "call_function" and node.target is getattr and node.args[1:] == ("T",)
    method = node.op == "call_method" and node.target == "t"
    source = node.args[0] if attribute or method else None
    return source if isinstance(source, fx.Node) else None

"""Find every use of a weight as a linear in a scope, and the dotted name of the module that owns it. Read-only.

    y = F.linear(input, weight, bias)    in a traced owner               site ""
    y = call_opaque(self.miss_base_forward, out, x, …)                   site "", opaque
    q = linear(x, W)             W = get_attr[layers.0.q_proj.weight]    site layers.0.q_proj
    qkv = linear(x, W)           W = get_attr[attn.in_proj_weight]       sites attn.q, attn.k, attn.v
    y = call_module[head](x)     head is an nn.Linear                    site head
    y = conv2d(x, K)             K is (out, in, 1, 1)                    a site over the channels

What looks like a linear and cannot take a block becomes a `Refusal` with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, fx, nn

from misscompile.passes import refuse
from misscompile.passes.linear_calls import LinearCall, as_tuple, match_linear, resembles_linear, target_name
from misscompile.passes.owner_names import PROJECTIONS, owner_name, stack_name
from misscompile.passes.trace import call_opaque
from misscompile.passes.weight_paths import (
    WeightError,
    find_parameter,
    overlap,
    readers,
    trace_weight,
    view_of,
    weight_view,
)
from misscompile.record.walk import join
from misscompile.record.words import Layout, Refusal, Scope, Site, View, WeightPath

aten = torch.ops.aten

_FUSED_KERNELS = {aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default}
_STACKED_PRODUCTS = {
    *(torch.bmm, torch.baddbmm, "bmm", "baddbmm"),
    *(aten.bmm.default, aten.baddbmm.default, aten._grouped_mm.default),
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STACK = "its weight is a stack of fused weights, not a linear"
_SHAPE_ATTRIBUTE_PAIRS = (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures"))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of a module that says it is a linear, else None.

    Packed and quantised modules, like `nn.Linear` and `Conv1D`, keep both numbers as integer attributes.
    """
    for in_name, out_name in _SHAPE_ATTRIBUTE_PAIRS:
        in_features, out_features = getattr(module, in_name, None), getattr(module, out_name, None)
        if isinstance(in_features, int) and isinstance(out_features, int):
            return in_features, out_features
    return None


def find_sites(scope: Scope) -> int:
    """Fill `scope.sites`, `scope.refusals` and `scope.unnamed` from `scope.graph`, and return the number of sites.

    Where the scope has a shape, that of a traced owner, its sites are the calls of the owner's own `weight` with that shape.
    """
    scope.sites, scope.refusals, scope.unnamed = [], [], []
    mutated = refuse.mutated_parameters(scope)
    for node in scope.graph.nodes:
        if node.target is call_opaque:
            assert scope.shape is not None
            scope.sites.append(Site(node, node.args[2], None, None, "opaque", *scope.shape, path=None))
        elif node.op == "call_module":
            _find_module_call(scope, node)
        elif node.target in _FUSED_KERNELS:
            kernel = f"{node.target}, an inference kernel without a gradient: use misscompile.capture"
            refuse.refuse_operands(scope, node, 2, f"its weight goes into {kernel}")
        elif node.target in _STACKED_PRODUCTS:
            refuse.refuse_operands(scope, node, 3, _STACK)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            refuse.refuse_inside(scope, node)
        elif (call := match_linear(node)) is not None:
            _find_call(scope, node, call, mutated)
        elif (reason := resembles_linear(node)) is not None:
            refuse.refuse_operands(scope, node, None, reason)
    scope.sites = [site for site in scope.sites if scope.shape is None or _is_of_owner(scope, site)]
    _name_parts(scope)
    _refuse_without_gradient(scope)
    return len(scope.sites)


def sites_by_name(scope: Scope) -> dict[str, list[Site]]:
    """The sites by name, the calls of one weight together."""
    named: dict[str, list[Site]] = {}
    for site in scope.sites:
        named.setdefault(site.owner, []).append(site)
    return named


def other_readers(scope: Scope, parameters: set[str]) -> list[fx.Node]:
    """The nodes that read one of these parameters and are no site: what a merge would change without an adapter there.

    A site that takes its weight in another place too, as what it adds for example, is among them.
    """
    takes = {site.node: (site.weight, (site.x, site.added)) for site in scope.sites}
    sources = {f"parametrizations.{name}" for name in parameters} | parameters
    read = [node for node in scope.graph.nodes if node.op in ("get_attr", "call_module") and node.target in sources]
    reads = [pair for node in read for pair in readers(node)]
    return [user for user, link in reads if user not in takes or takes[user][0] is not link or link in takes[user][1]]


def _is_of_owner(scope: Scope, site: Site) -> bool:
    own = site.path is None or site.path.parameter == "weight"
    return own and (site.in_features, site.out_features) == scope.shape


def _find_call(scope: Scope, node: fx.Node, call: LinearCall, mutated: dict[str, str]) -> None:
    """Append the site of a call, its refusal, or nothing where it is a product of two computed values."""
    kind = target_name(node)
    try:
        path = trace_weight(call.weight, scope.root)
    except WeightError as error:
        if not refuse.is_product_with_data(node, call):
            reason = refuse.written_in_place(call.weight, mutated) or str(error)
            scope.refusals.append(Refusal(stack_name(node) or node.name, kind, reason))
        elif call.x.op == "get_attr":
            reason = "its weight is the left side of the product, and a linear's is the right one"
            refuse.refuse_operands(scope, node, 2, reason)
        return
    weight = weight_view(scope.root, path)
    shape = weight.shape
    if call.layout == "conv" and any(size != 1 for size in shape[2:]):
        return
    name = owner_name(node, path.parameter)
    if len(shape) != 2 and call.layout != "conv":
        if name is not None:
            scope.refusals.append(Refusal(name, kind, "its weight is a vector" if len(shape) == 1 else _STACK))
    elif path.parameter in mutated:
        scope.refusals.append(Refusal(name or node.name, kind, refuse.changed_in_place(path.parameter, mutated)))
    elif name is None:
        scope.unnamed.append(path.parameter)
    else:
        site = _site(scope, node, call, WeightPath(path.parameter, view_of(_oriented(weight, call.layout))))
        site.owner, positions = name, weight.dim() - 2
        site.strides = call.strides if len(call.strides) == positions else call.strides * positions
        scope.sites += _projections(scope, site) or [site]


def _oriented(weight: Tensor, layout: Layout) -> Tensor:
    """The operand of a call as `(out, in)`."""
    return weight.t() if layout == "in_out" else weight.flatten(1) if layout == "conv" else weight


def _site(scope: Scope, node: fx.Node, call: LinearCall, path: WeightPath) -> Site:
    out_features, in_features = path.view.size
    site = Site(node, call.x, call.weight, call.added, call.layout, in_features, out_features, path)
    site.is_whole = call.layout != "conv" and (call.added is None or _is_vector(scope, call.added))
    return site


def _projections(scope: Scope, site: Site) -> list[Site]:
    """The sites of q, k and v where a site is the fused projection of an attention, or the part of it that it takes.

    Only three square matrices on top of each other are one: how the rows of another weight are cut, nothing tells.
    """
    module, _, name = site.owner.rpartition(".")
    fused, mark, number = name.partition("#")
    assert site.path is not None
    stored = find_parameter(scope.root, site.path.parameter)
    width, (_, stride, offset) = site.in_features, site.path.view
    row, rest = divmod(offset, max(width, 1))
    if fused != "in_proj_weight" or stored is None or stored.shape != (3 * width, width):
        return []
    if stride != (width, 1) or rest or row % width or site.out_features % width:
        return []
    found = []
    for index, projection in enumerate(PROJECTIONS):
        start = index * width - row
        if 0 <= start < site.out_features:
            stop = start + width
            path = WeightPath(site.path.parameter, View((width, width), stride, offset + start * width))
            part = dataclasses.replace(site, owner=join(module, projection) + mark + number, out_features=width, path=path)
            if (start, stop) != (0, site.out_features):
                part.columns, part.is_whole = (start, stop, site.out_features), False
            found.append(part)
    return found


def _is_vector(scope: Scope, node: fx.Node) -> bool:
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = find_parameter(scope.root, str(node.target))
    return isinstance(value, Tensor) and value.dim() == 1


def _name_parts(scope: Scope) -> None:
    """Give calls that read different parts of one parameter names of their own, `.part0`, `.part1`, ….

    Where parts overlap, one block cannot serve both: they are refused.
    """
    for name, calls in sites_by_name(scope).items():
        paths = [site.path for site in calls if site.path is not None]
        forms = list(dict.fromkeys(path.view for path in paths))
        if len(forms) < 2:
            continue
        weight = find_parameter(scope.root, paths[0].parameter)
        assert weight is not None
        if any(overlap(weight, a, b) for a, b in itertools.combinations(forms, 2)):
            reason = f"its weight is read in {len(forms)} forms that overlap, which one block cannot serve"
            scope.refusals.append(Refusal(name, target_name(calls[0].node), reason))
            scope.sites = [site for site in scope.sites if site not in calls]
            continue
        for site, path in zip(calls, paths, strict=True):
            site.owner = f"{name}.part{forms.index(path.view)}"


def _refuse_without_gradient(scope: Scope) -> None:
    for site in list(scope.sites):
        stop = refuse.gradient_stop(site.node)
        if stop is not None:
            scope.sites.remove(site)
            scope.refusals.append(Refusal(site.owner, target_name(site.node), f"no gradient comes back to it past {stop}"))


def _find_module_call(scope: Scope, node: fx.Node) -> None:
    """Append the site of a module that the tracer kept as one node, or the refusals of the linears in it."""
    name, module = str(node.target), scope.root.get_submodule(str(node.target))
    weight, kind = module._parameters.get("weight"), type(module).__name__
    layout = _module_layout(module)
    x: Any = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if layout is not None and weight is not None and isinstance(x, fx.Node):
        view = view_of(_oriented(torch.empty(weight.shape, device="meta"), layout))
        strides = module.stride if isinstance(module, _CONVOLUTIONS) else ()
        path, (out_features, in_features) = WeightPath(f"{name}.weight", view), view.size
        scope.sites.append(Site(node, x, None, None, layout, in_features, out_features, path, owner=name, strides=strides))
    elif linear_shape(module) is not None and not isinstance(module, nn.Bilinear):
        own = "a forward of its own" if weight is not None else "a weight that is no plain parameter"
        scope.refusals.append(Refusal(name, kind, f"it is one node with {own}: use misscompile.capture"))
    else:
        inside = [child for child, inner in module.named_modules() if child and linear_shape(inner) is not None]
        if isinstance(module, fx.GraphModule):
            reason = f"it is inside the graph module {name!r}: adapt that graph, or capture the whole model"
        else:
            reason = f"it is inside {name!r} ({kind}), which the tracer kept as one node: use misscompile.capture"
        scope.refusals += [Refusal(f"{name}.{child}", "inside a module", reason) for child in inside]


def _module_layout(module: nn.Module) -> Layout | None:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "out_in"
    if type(module).__name__ == "Conv1D" and linear_shape(module) is not None:
        return "in_out"
    if isinstance(module, _CONVOLUTIONS) and module.groups == 1:
        padding = (0,) if isinstance(module.padding, str) else as_tuple(module.padding)  # "same" adds none to a 1×1 kernel
        return "conv" if set(module.kernel_size) == {1} and set(padding) == {0} else None
    return None

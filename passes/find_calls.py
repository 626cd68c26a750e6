"""Find every linear call of a whole graph, and the dotted name of the module that owns its weight. Read-only.

    q = linear(x, W)            W = get_attr[layers.0.q_proj.weight]     site layers.0.q_proj
    qkv = linear(x, W)          W = get_attr[attn.in_proj_weight]        sites attn.q, attn.k, attn.v
    y = call_module[head](x)    head is an nn.Linear                     site head
    y = conv2d(x, K)            K is (out, in, 1, 1)                     a site over the channels

What looks like a linear and cannot take a block becomes a `Refusal` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from misscompile.passes.find import linear_shape
from misscompile.passes.match import (
    LinearCall,
    WeightError,
    apply_steps,
    match_linear,
    resembles_linear,
    trace_weight,
)
from torch import Tensor, fx, nn

from misscompile.plan import Layout, ModelScope, Refusal, Site, Step, WeightPath

aten = torch.ops.aten

_FUSED_KERNELS = {aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default}
_STACKED_PRODUCTS = {
    *(torch.bmm, torch.baddbmm, "bmm", "baddbmm"),
    *(aten.bmm.default, aten.baddbmm.default, aten._grouped_mm.default),
}
_GRADIENT_STOPS = {
    *(aten.detach.default, aten.detach_.default, torch.detach, "detach", "item", "tolist", "numpy"),
    *(torch.argmax, torch.argmin, "argmax", "argmin", "long", "int", "bool"),
}
_ANONYMOUS = re.compile(r"(?:.*\.)?_?(?:param_constant|tensor_constant|lifted_tensor_|constant|arg|fn_param)_?\d*")
_PROJECTIONS = ("q", "k", "v")


def find_calls(scope: ModelScope) -> None:
    """Fill `scope.sites`, `scope.refusals` and `scope.unnamed` from `scope.graph`."""
    scope.sites, scope.refusals, scope.unnamed = [], [], []
    mutated = _mutated_parameters(scope)
    for node in scope.graph.nodes:
        if node.op == "call_module":
            _find_module_call(scope, node)
        elif node.target in _FUSED_KERNELS:
            kernel = f"{node.target}, an inference kernel without a gradient: use misscompile.capture"
            _refuse_operands(scope, node, 2, f"its weight goes into {kernel}")
        elif node.target in _STACKED_PRODUCTS:
            _refuse_operands(scope, node, 3, "its weight is a stack of fused weights, not a linear")
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            _refuse_inside(scope, node)
        elif (call := match_linear(node)) is not None:
            _find_call(scope, node, call, mutated)
        elif (reason := resembles_linear(node)) is not None:
            _refuse_operands(scope, node, None, reason)
    _name_parts(scope)
    for site in list(scope.sites):
        stop = _gradient_stop(site.node)
        if stop is not None:
            scope.sites.remove(site)
            scope.refusals.append(Refusal(site.owner, _kind(site.node), f"no gradient comes back to it past {stop}"))


def find_parameter(root: nn.Module, target: str) -> Tensor | None:
    """The tensor that a `get_attr` target of `root` stands for, or None."""
    found: Any = root
    for part in target.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def _find_call(scope: ModelScope, node: fx.Node, call: LinearCall, mutated: dict[str, str]) -> None:
    kind = _kind(node)
    try:
        path = trace_weight(call.weight, lambda target: find_parameter(scope.root, target))
    except WeightError as error:
        if call.x.op == "get_attr" and _is_product_with_data(node, call):
            _refuse_operands(scope, node, 2, "its weight is the left side of the product, and a linear's is the right one")
        elif not _is_product_with_data(node, call):
            changed = next((n.target for n in _ancestors(call.weight) if n.op == "get_attr" and n.target in mutated), None)
            reason = str(error) if changed is None else _changed_in_place(changed, mutated)
            scope.refusals.append(Refusal(_stack_name(node) or node.name, kind, reason))
        return
    parameter = find_parameter(scope.root, path.parameter)
    assert parameter is not None
    view = apply_steps(parameter.detach().to("meta"), path.steps)
    if call.layout == "conv" and any(size != 1 for size in view.shape[2:]):
        return
    name = _owner_name(node, path.parameter)
    if view.dim() != 2 and call.layout != "conv":
        if isinstance(name, str):
            reason = "its weight is a vector" if view.dim() == 1 else "its weight is a stack of fused weights, not a linear"
            scope.refusals.append(Refusal(name, kind, reason))
    elif path.parameter in mutated:
        scope.refusals.append(Refusal(name or node.name, kind, _changed_in_place(path.parameter, mutated)))
    elif name is None:
        scope.unnamed.append(path.parameter)
    else:
        scope.sites += _sites(node, call, path, view, name, parameter.dtype)


def _sites(node: fx.Node, call: LinearCall, path: WeightPath, view: Tensor, name: str, dtype: torch.dtype) -> list[Site]:
    """One site, or the three of an attention's fused projection."""
    last: tuple[Step, ...] = {"out_in": (), "in_out": (("t",),), "conv": (("flatten",),)}[call.layout]
    steps = (*path.steps, *last)
    in_features, out_features = (view.shape[0], view.shape[1]) if call.layout == "in_out" else (view.shape[1], view.shape[0])
    module, _, last_name = name.rpartition(".")
    fused, mark, number = last_name.partition("#")
    if fused != "in_proj_weight" or call.layout != "out_in":
        whole = WeightPath(path.parameter, steps)
        operands = node, call.x, call.weight, call.layout
        positions = view.dim() - 2
        strides = call.strides if len(call.strides) == positions else call.strides * positions
        return [Site(*operands, in_features, out_features, dtype, owner=name, path=whole, strides=strides)]
    first = next((step[1] for step in steps if step[0] == "rows"), 0)
    found = []
    for index, projection in enumerate(_PROJECTIONS):
        start = index * in_features - first
        if 0 <= start < out_features:
            columns = (start, start + in_features)
            part = WeightPath(path.parameter, (*steps, ("rows", *columns)))
            owner = (f"{module}.{projection}" if module else projection) + mark + number
            site = Site(node, call.x, call.weight, "out_in", in_features, in_features, dtype, owner=owner, path=part)
            site.columns = None if columns == (0, out_features) else (*columns, out_features)
            found.append(site)
    return found


def _name_parts(scope: ModelScope) -> None:
    """Tell calls of one name apart that read different parts of a weight, and refuse those that read it in two forms."""
    forms: dict[str, dict[tuple[Step, ...], None]] = {}
    for site in scope.sites:
        assert site.path is not None
        forms.setdefault(site.owner, {})[site.path.steps] = None
    for name, paths in forms.items():
        if len(paths) == 1:
            continue
        calls = [site for site in scope.sites if site.owner == name]
        if not _are_apart(scope, calls):
            reason = f"its weight is read in {len(paths)} forms that overlap, which one block cannot serve"
            scope.refusals.append(Refusal(name, _kind(calls[0].node), reason))
            scope.sites = [site for site in scope.sites if site not in calls]
            continue
        for site in calls:
            assert site.path is not None
            site.owner = f"{name}.part{list(paths).index(site.path.steps)}"


def _are_apart(scope: ModelScope, calls: list[Site]) -> bool:
    """Whether calls of one parameter that read it in different forms have no element of it in common."""
    seen: dict[tuple[Step, ...], None] = {}
    marks: Tensor | None = None
    for site in calls:
        assert site.path is not None
        weight = find_parameter(scope.root, site.path.parameter)
        assert weight is not None
        marks = torch.zeros(weight.shape, dtype=torch.bool) if marks is None else marks
        part = apply_steps(marks, site.path.steps)
        if site.path.steps not in seen and bool(part.any()):
            return False
        seen[site.path.steps] = None
        part.fill_(True)
    return True


def _changed_in_place(parameter: str, mutated: dict[str, str]) -> str:
    return f"its weight {parameter!r} is changed in place by {mutated[parameter]!r}; take that out of the forward"


def _find_module_call(scope: ModelScope, node: fx.Node) -> None:
    """A module that the tracer kept as one node."""
    name, module = str(node.target), scope.root.get_submodule(str(node.target))
    weight, kind = module._parameters.get("weight"), type(module).__name__
    layout, strides = _module_layout(module)
    if layout is not None and weight is not None and isinstance(operand := _first_argument(node), fx.Node):
        out_features, in_features = (weight.shape[1], weight.shape[0]) if layout == "in_out" else weight.shape[:2]
        last: tuple[Step, ...] = {"out_in": (), "in_out": (("t",),), "conv": (("flatten",),)}[layout]
        path = WeightPath(f"{name}.weight", last)
        found = Site(node, operand, None, layout, in_features, out_features, weight.dtype, owner=name, path=path)
        found.strides = strides
        scope.sites.append(found)
    elif linear_shape(module) is not None and not isinstance(module, nn.Bilinear):
        own = "a forward of its own" if weight is not None else "a weight that is no plain parameter"
        scope.refusals.append(Refusal(name, kind, f"it is one node with {own}: use misscompile.capture"))
    else:
        inside = [child for child, inner in module.named_modules() if child and linear_shape(inner) is not None]
        if isinstance(module, fx.GraphModule):
            reason = f"is inside the graph module {name!r}: adapt that graph, or capture the whole model"
        else:
            reason = f"is inside {name!r} ({kind}), which the tracer kept as one node: use misscompile.capture"
        scope.refusals += [Refusal(f"{name}.{child}", "inside a module", f"it {reason}") for child in inside]


def _module_layout(module: nn.Module) -> tuple[Layout | None, tuple[int, ...]]:
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return "out_in", ()
    if type(module).__name__ == "Conv1D" and linear_shape(module) is not None:
        return "in_out", ()
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        padding = (0,) if isinstance(module.padding, str) else module.padding  # "same" adds none to a 1×1 kernel
        if set(module.kernel_size) == {1} and set(padding) == {0}:
            return "conv", module.stride
    return None, ()


def _first_argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _refuse_operands(scope: ModelScope, node: fx.Node, dimensions: int | None, reason: str) -> None:
    """Refuse every parameter that goes into `node` with so many dimensions, or with two or more."""
    for source in node.all_input_nodes:
        try:
            path = trace_weight(source, lambda target: find_parameter(scope.root, target))
        except WeightError:
            continue
        parameter = find_parameter(scope.root, path.parameter)
        assert parameter is not None
        size = apply_steps(parameter.detach().to("meta"), path.steps).dim()
        if size == dimensions or (dimensions is None and size > 1):
            name = _owner_name(node, path.parameter) or path.parameter
            module = name.removesuffix("in_proj_weight")
            names = [module + projection for projection in _PROJECTIONS] if module != name else [name]
            scope.refusals += [Refusal(each, _kind(node), reason) for each in names]


def _refuse_inside(scope: ModelScope, node: fx.Node) -> None:
    """Refuse the linears in the sub-graphs of a higher-order operator."""
    graphs = [n for n in node.all_input_nodes if n.op == "get_attr"]
    for graph in graphs:
        inner = getattr(scope.root, str(graph.target), None)
        if not isinstance(inner, fx.GraphModule):
            continue
        no_gradient = "set_grad_enabled" in str(node.target) and node.args[0] is False
        why = "which runs without gradients" if no_gradient else "whose sub-graph is not rewritten"
        for found in inner.graph.nodes:
            if match_linear(found) is not None and _stack_name(found):
                scope.refusals.append(Refusal(_stack_name(found), _kind(found), f"it is inside {node.target}, {why}"))


def _is_product_with_data(node: fx.Node, call: LinearCall) -> bool:
    """Whether a product is of two computed values, as in attention: nothing that looks like a linear layer."""
    if "linear" in str(node.target) or call.layout == "conv":
        return False
    sources = {call.weight}
    for source in list(sources):
        sources |= set(_ancestors(source))
    return any(n.op == "placeholder" for n in sources) or not any(n.op == "get_attr" for n in sources)


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    seen, todo = set(), [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
                yield source


def _mutated_parameters(scope: ModelScope) -> dict[str, str]:
    """The targets of parameters that the graph writes, each with the node that does."""
    found = {}
    for node in scope.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            found.update(_mutated_inside(scope, node))
        if _is_in_place(node) and isinstance(node.args[0], fx.Node):
            try:
                path = trace_weight(node.args[0], lambda target: find_parameter(scope.root, target))
            except WeightError:
                continue
            found[path.parameter] = node.name
    return found


def _mutated_inside(scope: ModelScope, node: fx.Node) -> dict[str, str]:
    """The same in the sub-graph of a higher-order operator: one that turns gradients off around an update, for example."""
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    graph = next((arg for arg in operands if isinstance(getattr(scope.root, str(arg.target), None), fx.GraphModule)), None)
    if graph is None:
        return {}
    inner = ModelScope(scope.root, getattr(scope.root, str(graph.target)).graph)
    given = operands[operands.index(graph) + 1 :]
    inputs = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), given, strict=False))
    found = {}
    for write in inner.graph.nodes:
        if _is_in_place(write) and isinstance(source := write.args[0], fx.Node) and source in inputs:
            found[str(inputs[source].target)] = write.name
    return found


def _is_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    written = node.op in ("call_function", "call_method") and re.fullmatch(r"[a-z]\w*[a-z0-9]_(\.\w+)?", name)
    return bool(written) and bool(node.args)


def _gradient_stop(node: fx.Node) -> str | None:
    """What keeps every gradient from `node`, or None where one can come back from the output."""
    seen, todo, stops = {node}, [node], []
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return None
            value = user.meta.get("val")
            stopped = user.target in _GRADIENT_STOPS or (isinstance(value, Tensor) and not value.is_floating_point())
            if stopped:
                stops.append(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return f"{stops[0].name!r} ({stops[0].target})" if stops else "the end of the graph, which does not use it"


def _owner_name(node: fx.Node, target: str) -> str | None:
    """The dotted name of a site: from that of its parameter, or of the module whose forward made the call."""
    if _ANONYMOUS.fullmatch(target):
        return _stack_name(node) or None
    module, _, name = target.rpartition(".")
    name, mark, call = name.partition("#")  # a weight that a merge unshared
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        owner = f"{module}.{name[0]}" if module else name[0]
    else:
        owner = module if name == "weight" else target.removesuffix(mark + call)
    return owner + mark + call


def _stack_name(node: fx.Node) -> str:
    stack = _stack(node)
    return stack[-1][0] if stack else ""


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """`(path, class)` of the modules whose forward the node came from, the innermost last."""
    entries = node.meta.get("nn_module_stack") or {}
    kinds = [(path, kind if isinstance(kind, str) else kind.__qualname__) for path, kind in entries.values()]
    return [(re.sub(r"@\d+", "", path), kind) for path, kind in kinds]


def _kind(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))

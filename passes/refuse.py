"""Why a call that looks like a linear cannot take a block: what `find_sites` asks of a graph. Read-only."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from misscompile.passes.linear_calls import LinearCall, match_linear, target_name
from misscompile.passes.owner_names import PROJECTIONS, owner_name, stack_name
from misscompile.passes.weight_paths import WeightError, trace_weight, weight_view
from misscompile.record.state import can_train
from misscompile.record.words import Refusal, Scope

aten = torch.ops.aten

_GRADIENT_STOPS = {
    *(aten.detach.default, aten.detach_.default, torch.detach, "detach", "item", "tolist", "numpy"),
    *(torch.argmax, torch.argmin, "argmax", "argmin", "long", "int", "bool"),
}


def refuse_operands(scope: Scope, node: fx.Node, dimensions: int | None, reason: str) -> None:
    """Refuse every parameter that goes into `node` with so many dimensions, or with two or more."""
    for source in node.all_input_nodes:
        try:
            path = trace_weight(source, scope.root)
        except WeightError:
            continue
        size = len(weight_view(scope.root, path).shape)
        if size == dimensions or (dimensions is None and size > 1):
            name = owner_name(node, path.parameter) or path.parameter
            module = name.removesuffix("in_proj_weight")
            names = [module + projection for projection in PROJECTIONS] if module != name else [name]
            scope.refusals += [Refusal(each, target_name(node), reason) for each in names]


def refuse_inside(scope: Scope, node: fx.Node) -> None:
    """Refuse the linears in the sub-graphs of a higher-order operator."""
    for graph in [n for n in node.all_input_nodes if n.op == "get_attr"]:
        inner = getattr(scope.root, str(graph.target), None)
        if not isinstance(inner, fx.GraphModule):
            continue
        no_gradient = "set_grad_enabled" in str(node.target) and node.args[0] is False
        why = "which runs without gradients" if no_gradient else "whose sub-graph is not rewritten"
        for found in inner.graph.nodes:
            if match_linear(found) is not None and stack_name(found):
                scope.refusals.append(Refusal(stack_name(found), target_name(found), f"it is inside {node.target}, {why}"))


def is_product_with_data(node: fx.Node, call: LinearCall) -> bool:
    """Whether a product is of two computed values, as in attention: nothing that looks like a linear layer."""
    if "linear" in str(node.target) or call.layout == "conv":
        return False
    sources = {call.weight, *ancestors(call.weight)}
    return any(n.op == "placeholder" for n in sources) or not any(n.op == "get_attr" for n in sources)


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Everything that `node` is computed from, each node once."""
    seen, todo = set(), [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
                yield source


def mutated_parameters(scope: Scope) -> dict[str, str]:
    """The targets of parameters that the graph writes, each with the node that does."""
    found = {}
    for node in scope.graph.nodes:
        for writer, written in _writes(scope, node).items():
            with contextlib.suppress(WeightError):
                found[trace_weight(written, scope.root).parameter] = writer
    return found


def changed_in_place(parameter: str, mutated: dict[str, str]) -> str:
    """The reason of a refusal: which node writes the parameter."""
    return f"its weight {parameter!r} is changed in place by {mutated[parameter]!r}; take that out of the forward"


def written_in_place(weight: fx.Node, mutated: dict[str, str]) -> str | None:
    """The same for an operand that is computed from a parameter that the graph writes; None where there is none."""
    found = next((str(n.target) for n in ancestors(weight) if n.op == "get_attr" and n.target in mutated), None)
    return None if found is None else changed_in_place(found, mutated)


def gradient_stop(node: fx.Node) -> str | None:
    """What keeps every gradient from `node`, or None where one can come back from the output."""
    seen, todo, stops = {node}, [node], []
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return None
            value = user.meta.get("val")
            stopped = user.target in _GRADIENT_STOPS or (isinstance(value, Tensor) and not can_train(value))
            if stopped:
                stops.append(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return f"{stops[0].name!r} ({stops[0].target})" if stops else "the end of the graph, which does not use it"


def _writes(scope: Scope, node: fx.Node) -> dict[str, fx.Node]:
    """What `node`, or the sub-graph that it runs, changes in place: the name of each node that does, and the node changed.

    An operator with a sub-graph turns gradients off around an update, for example.
    """
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return {node.name: node.args[0]} if _is_in_place(node) and isinstance(node.args[0], fx.Node) else {}
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    for index, operand in enumerate(operands):
        inner = getattr(scope.root, str(operand.target), None)
        if isinstance(inner, fx.GraphModule):
            placeholders = inner.graph.find_nodes(op="placeholder")
            given = dict(zip(placeholders, operands[index + 1 :], strict=False))
            return {
                write.name: given[write.args[0]]
                for write in inner.graph.nodes
                if _is_in_place(write) and write.args[0] in given
            }
    return {}


def _is_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    written = node.op in ("call_function", "call_method") and re.fullmatch(r"[a-z]\w*[a-z0-9]_(\.\w+)?", name)
    return bool(written) and bool(node.args)

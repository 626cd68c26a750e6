"""Trace the forward of a module that owns a targeted weight into a `torch.fx` graph.

    class Linear: forward(input) = F.linear(input, self.weight, self.bias)

becomes

    input  = placeholder[input]
    weight = get_attr[weight]
    bias   = get_attr[bias]
    linear = call_function[F.linear](input, weight, bias)
    output = output[linear]

The Python around the owner (caches, masks, control flow) is never traced. A forward that a trace would freeze or cannot
follow stays one opaque node, `call_module[base_forward]`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from misscompile.errors import UnsupportedModuleError
from misscompile.plan import Scope

BASE_FORWARD = "base_forward"
"""Name under which an opaque forward stays callable on its owner."""

_SHAPE_ATTRIBUTES = frozenset({"in_features", "out_features", "nx", "nf"})
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}


class _OwnerTracer(fx.Tracer):
    """Keeps every child module as one `call_module` node: only the owner's own forward is rewritten."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_forward(scope: Scope, owner: nn.Module, foreign: Callable[..., Any] | None) -> None:
    """Fill `scope.graph` with the forward that `scope.base_class` defines, or with one opaque call of it.

    Args:
        scope: its `graph` and `opaque` are set.
        owner: a module of the scope's structure; it is not changed.
        foreign: a forward that somebody else set on the owner's instance and that replaces the class's.
    """
    reason = "its instance attribute `forward` was set by other code" if foreign is not None else _trace_into(scope, owner)
    if reason is not None:
        make_opaque(scope, owner, foreign, reason)


def make_opaque(scope: Scope, owner: nn.Module, foreign: Callable[..., Any] | None, reason: str) -> None:
    """Let the forward stay one node: `y = require_linear_output(self.base_forward(x, …), out_features)`."""
    scope.opaque = reason
    scope.graph = _opaque_graph(foreign or functools.partial(scope.base_class.forward, owner), scope.out_features)


def require_linear_output(y: Any, out_features: int) -> torch.Tensor:
    """`y` where an opaque forward returned what a linear returns.

    Raises:
        UnsupportedModuleError: it returned something that no update can be added to.
    """
    if isinstance(y, torch.Tensor) and y.shape[-1] == out_features:
        return y
    found = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
    raise UnsupportedModuleError(
        f"an adapted module should return a tensor whose last dimension is {out_features}, found {found}: exclude it from "
        "target_modules."
    )


def probe_opaque(owner: nn.Module, base_class: type[nn.Module], shape: tuple[int, int]) -> str | None:
    """Why an opaque forward is no linear, or None where it is one or cannot be tried.

    The forward runs once on fake tensors, on a second module over the same parameters: nothing is computed or changed.
    """
    in_features, out_features = shape
    shadow = _shadow(base_class, owner, set())
    like = next(iter(owner.parameters()), torch.empty(0))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    try:
        inspect.signature(base_class.forward).bind(shadow, None)
    except TypeError as error:
        return f"its forward is not a function of one input ({error})"
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            y = base_class.forward(shadow, torch.empty(2, in_features, dtype=dtype, device=like.device))
            require_linear_output(y, out_features)
    except UnsupportedModuleError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - it may look at values, or call a kernel that knows no fake tensors: the run will show
        return None
    return None


def _trace_into(scope: Scope, owner: nn.Module) -> str | None:
    reads: set[str] = set()
    shadow = _shadow(scope.base_class, owner, reads)
    try:
        graph = _OwnerTracer().trace(shadow)
    except Exception as error:  # noqa: BLE001 - a tracer runs arbitrary code: whatever it raises means "cannot be traced"
        return f"its forward cannot be traced ({type(error).__name__})"
    frozen = sorted(reads - _SHAPE_ATTRIBUTES)
    if frozen:
        return f"its forward reads self.{frozen[0]}, which a trace would freeze"
    graph.owning_module = None
    scope.graph = graph
    return None


def _shadow(base_class: type[nn.Module], owner: nn.Module, reads: set[str]) -> nn.Module:
    """A second module over the same parameters that notes which plain instance attributes its forward reads."""

    def record(self: nn.Module, name: str) -> Any:
        if name in object.__getattribute__(self, "__dict__") and name not in _MODULE_INTERNALS and name != "__dict__":
            reads.add(name)
        return base_class.__getattribute__(self, name)

    shadow_class = type(base_class.__name__, (base_class,), {"__getattribute__": record, "__module__": __name__})
    shadow: nn.Module = object.__new__(shadow_class)
    shadow.__dict__.update({key: value for key, value in vars(owner).items() if key not in ("forward", "_old_forward")})
    return shadow


def _opaque_graph(forward: Callable[..., Any], out_features: int) -> fx.Graph:
    """One call of `base_forward` with the arguments that `forward` (a bound method or a callable) takes."""
    graph = fx.Graph()
    positional: list[fx.Node] = []
    keywords: dict[str, Any] = {}
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(graph.placeholder(parameter.name, default_value=parameter.default))
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords[parameter.name] = graph.placeholder(parameter.name, default_value=parameter.default)
    if not positional:  # a wrapper written with *args: a linear takes one input
        positional.append(graph.placeholder("input"))
    returned = graph.call_module(BASE_FORWARD, tuple(positional), keywords)
    graph.output(graph.call_function(require_linear_output, (returned, out_features)))
    return graph

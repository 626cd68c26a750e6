"""Trace the forward of a module that owns a targeted weight into a `torch.fx` graph.

    class Linear: forward(input) = F.linear(input, self.weight, self.bias)

becomes

    input  = placeholder[input]
    weight = get_attr[weight]
    bias   = get_attr[bias]
    linear = call_function[F.linear](input, weight, bias)
    output = output[linear]

The Python around the owner (caches, masks, control flow) is never traced. A forward that a trace would freeze or cannot
follow stays one opaque node, `call_function[call_opaque](self.miss_base_forward, out_features, input, args, kwargs)`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from misscompile.errors import UnsupportedModuleError
from misscompile.passes.source import tracing_hazard
from misscompile.record.words import Scope

BASE_FORWARD = "miss_base_forward"
"""Name under which an opaque forward stays callable on its owner."""

Shape = tuple[int, int]
"""`(in_features, out_features)`."""

_UNTRACEABLE = (
    *(TypeError, ValueError, AttributeError, LookupError),
    *(ArithmeticError, AssertionError, NameError, RuntimeError),
)
"""What code raises that cannot compute with a proxy, `torch.fx.proxy.TraceError` among them."""


class _OwnerTracer(fx.Tracer):
    """Keeps every child module as one `call_module` node: only the owner's own forward is rewritten."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_owner(
    owner: nn.Module,
    base_class: type[nn.Module],
    shape: Shape,
    foreign: Callable[..., Any] | None = None,
    present: bool = False,
) -> Scope:
    """The scope of the forward that `base_class`, the owner's class without adapters, defines, or of one opaque call of it.

    `foreign` is a forward that somebody else set on the owner's instance: it replaces the class's. With `present`, the
    scope is that of what the forward computes while the plain attributes of `owner` are what they are.
    """
    graph = _trace(owner, base_class, foreign, present)
    if isinstance(graph, str):
        return opaque_scope(owner, base_class, shape, foreign, graph)
    return Scope(_without_values(owner, shape), graph, base_class.__name__, shape)


def opaque_scope(
    owner: nn.Module, base_class: type[nn.Module], shape: Shape, foreign: Callable[..., Any] | None, reason: str
) -> Scope:
    """A scope whose forward stays one node, called with whatever arguments it is given beside its input."""
    parameters = inspect.signature(foreign or functools.partial(base_class.forward, owner)).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    graph = fx.Graph()
    x = graph.placeholder(named[0] if named else "input")
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    base = graph.get_attr(BASE_FORWARD)
    graph.output(graph.call_function(call_opaque, (base, shape[1], x, args, kwargs)))
    return Scope(_without_values(owner, shape), graph, base_class.__name__, shape, reason)


def call_opaque(
    forward: Callable[..., Any], out_features: int, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """`forward(x, *args, **kwargs)`; an error where it returns something that no update, which is real, can be added to."""
    owner = getattr(forward, "__self__", None)
    y = forward(x, *args, **kwargs)
    if isinstance(y, torch.Tensor) and y.dim() > 0 and y.shape[-1] == out_features and not y.is_complex():
        return y
    kind = type(owner).__name__ if owner is not None else "module"
    found = f"a {type(y).__name__}"
    if isinstance(y, torch.Tensor):
        found = f"a {'complex ' if y.is_complex() else ''}tensor of shape {tuple(y.shape)}"
    raise UnsupportedModuleError(
        f"an adapted {kind} should return a tensor whose last dimension is {out_features}, found {found}: exclude it from "
        "target_modules."
    )


def probe_opaque(owner: nn.Module, base_class: type[nn.Module], shape: Shape) -> str | None:
    """Why an opaque forward is no linear, or None where it is one or cannot be tried.

    The forward runs on fake tensors, on a second module over the same parameters. Where it looks at values it runs on a copy
    of the module, if that holds plain floating-point tensors alone: nothing of the owner is changed.
    """
    try:
        inspect.signature(base_class.forward).bind(owner, None)
    except TypeError as error:
        return f"its forward is not a function of one input ({error})"
    like = next(iter(owner.parameters()), torch.empty(0))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    reason = None
    for prepare in (_faked, _copied) if _is_plain(owner) else (_faked,):
        for positions in ((2,), (2, 3)):  # some forwards take sequences alone
            try:
                with prepare(base_class, owner) as module, torch.no_grad():
                    x = torch.ones(*positions, shape[0], dtype=dtype, device=like.device)
                    call_opaque(functools.partial(base_class.forward, module), shape[1], x, (), {})
                    return None
            except UnsupportedModuleError as error:
                return str(error)
            except Exception as error:  # noqa: BLE001 - it may call a kernel that knows no such tensors: the run will show
                reason = (
                    f"its forward fails on {shape[0]} features ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
                )
    return reason if _is_plain(owner) else None


def _is_plain(owner: nn.Module) -> bool:
    tensors = [*owner.parameters(), *owner.buffers()]
    return all(type(t) in (nn.Parameter, torch.Tensor) and t.is_floating_point() and not t.is_meta for t in tensors)


@contextlib.contextmanager
def _faked(base_class: type[nn.Module], owner: nn.Module) -> Iterator[nn.Module]:
    shadow, log = _shadow(base_class, owner), logging.getLogger(FakeTensorMode.__module__)
    disabled, log.disabled = log.disabled, True  # it logs what raises, and a failure is an answer here
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            registries: list[dict[str, Any]] = [shadow._parameters, shadow._buffers]
            for held in registries:
                held.update({name: None if tensor is None else mode.from_tensor(tensor) for name, tensor in held.items()})
            yield shadow
    finally:
        log.disabled = disabled


@contextlib.contextmanager
def _copied(base_class: type[nn.Module], owner: nn.Module) -> Iterator[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        yield _shadow(base_class, copy.deepcopy(owner))


def _trace(
    owner: nn.Module, base_class: type[nn.Module], foreign: Callable[..., Any] | None, present: bool
) -> fx.Graph | str:
    """The graph of a forward, or why it cannot be traced."""
    if foreign is not None:
        return "its instance attribute `forward` was set by other code"
    if owner._forward_pre_hooks and isinstance(vars(owner).get("weight"), torch.Tensor):
        undo = "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
        return f"its weight is computed by a hook before each call ({undo} makes it a parameter again)"
    hazard = tracing_hazard(base_class, owner, present)
    if hazard is not None:
        return hazard
    try:
        graph = _OwnerTracer().trace(_shadow(base_class, owner))
    except torch.OutOfMemoryError:  # a RuntimeError, of the machine and not of the code
        raise
    except _UNTRACEABLE as error:
        return f"its forward cannot be traced ({type(error).__name__})"
    own = (*owner._parameters, *owner._buffers)
    if any(node.op == "get_attr" and node.target not in own for node in graph.nodes):
        return "its forward makes a tensor, which a trace would freeze"
    graph.owning_module = None
    for node in graph.nodes:
        node.meta.pop("nn_module_stack", None)  # holds the class, and that of a parametrized module holds the module
    return graph


def _without_values(owner: nn.Module, shape: Shape) -> nn.Module:
    """The names, shapes and dtypes of what `owner` holds: scopes are shared and cached, and keep no weight alive."""
    root = nn.Module()
    for name, tensor in (owner._parameters | owner._buffers).items():
        if tensor is not None and not nn.parameter.is_lazy(tensor):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            root.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    for name, _ in owner.named_modules():
        if name:
            parent, _, last = name.rpartition(".")
            root.get_submodule(parent).add_module(last, nn.Module())
    if "weight" not in root._parameters and "parametrizations" in owner._modules:
        with torch.no_grad():
            size: Any = owner.weight.shape if parametrize.is_parametrized(owner, "weight") else shape[::-1]
        root.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
    return root


def _shadow(base_class: type[nn.Module], owner: nn.Module) -> nn.Module:
    """A second module with the attributes of `owner`, so that running its forward changes nothing of the owner."""
    shadow: nn.Module = object.__new__(base_class)
    for name, value in vars(owner).items():
        if name not in ("forward", "_old_forward"):
            vars(shadow)[name] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
    return shadow

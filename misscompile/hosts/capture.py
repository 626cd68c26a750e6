"""`capture`: an ordinary module as one trainable graph, by `torch.export`."""

from __future__ import annotations

import contextlib
import copy
import linecache
import os
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from misscompile.errors import ArgumentError, CaptureError, MissWarning, StateError
from misscompile.hosts.copy_graph import copy_graph, inline_graph
from misscompile.hosts.graph_parts import keep_structure
from misscompile.hosts.modules import output_embedding_names
from misscompile.hosts.whole_graph import RECORD, GraphRecord, WholeGraph, copy_nodes
from misscompile.passes.runner import BOTH_MODES, run_passes
from misscompile.record.walk import owners, unwrap_model
from misscompile.record.words import Scope

_TORCH = os.path.dirname(torch.__file__)


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> WholeGraph:
    """The whole of `model` as one trainable `torch.fx.GraphModule`, for `adapt`, `torch.compile` and `torch.export`.

    What is captured: the path that the model takes on these arguments, in both modes. Where training and evaluation
    differ in constants alone (dropout), the graph follows `.train()` and `.eval()`; where they differ in more (batch
    norm), the graph is that of the model's present mode, and calling the other is an error. Values are shared with
    `model`, which is not changed. A `use_cache` of a transformers config is off: a cache is no tensor.

    Args:
        model: an ordinary module without adapters.
        args, kwargs: example inputs, with every argument that will be given later, each dynamic dimension at least 2.
        dynamic_shapes: as for `torch.export.export`. By default the batch (first) dimension of every tensor, and the
            second one of integer, boolean and three-dimensional tensors, are dynamic where the model allows it.

    Returns:
        A graph module with the parameter names, buffers and outputs of `model`.

    Raises:
        CaptureError: `torch.export` cannot follow the model; the message names the call in its code.
        StateError: the model has adapters; capture first, then adapt.
        ArgumentError: an argument has the wrong type.

    A default dynamic dimension that the model or the example fixes is told in a `MissWarning`.
    """
    root = unwrap_model(model)
    if not isinstance(args, tuple):
        raise ArgumentError(f"args: expected a tuple of example inputs, found {type(args).__name__}.")
    if not isinstance(kwargs, Mapping | None):
        raise ArgumentError(f"kwargs: expected a dict of example inputs, found {type(kwargs).__name__}.")
    if owners(root):
        raise StateError("model: it has adapters already. Capture the plain model, then adapt the graph.")
    args, named = _separate(args, dict(kwargs or {}))
    shapes = dynamic_shapes
    if dynamic_shapes is None:
        try:
            shapes = _default_dynamic(args, named).dynamic_shapes(root, args, named)  # type: ignore[no-untyped-call]
        except TypeError as error:
            raise ArgumentError(f"args, kwargs: they do not fit {type(root).__name__}.forward: {error}.") from error
    module, graph, follows = _export_both_modes(root, args, named, shapes)
    if dynamic_shapes is None:
        _tell_fixed(module.graph, args, named)
    return _whole_graph(root, module, graph, follows)


def _whole_graph(root: nn.Module, module: fx.GraphModule, graph: fx.Graph, follows: bool) -> WholeGraph:
    """A whole graph with its record, in the mode of the captured model, whose parameters train as the model's do."""
    captured = WholeGraph(module, graph)
    keep_structure(captured, root)
    captured.training = root.training
    captured = copy_graph(captured)
    captured.meta[RECORD] = GraphRecord(
        copy_nodes(captured.graph),
        None if follows else root.training,
        getattr(getattr(root, "config", None), "model_type", None),
        getattr(root, "name_or_path", None) or None,
        tuple(output_embedding_names(root)),
    )
    trains = dict(root.named_parameters(remove_duplicate=False))
    for name, parameter in captured.named_parameters():
        parameter.requires_grad = name in trains and trains[name].requires_grad
    return captured


def _export_both_modes(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[fx.GraphModule, fx.Graph, bool]:
    """The exported module in the present mode, a graph that follows the mode where one can, and whether it does."""
    with _unchanged(root), _ready_for_export(root):
        module = _export(root, args, kwargs, dynamic_shapes)
        graph = copy_nodes(module.graph)
        other: fx.Graph | None = None
        with _in_mode(root, not root.training), contextlib.suppress(CaptureError):  # one mode is enough
            other = copy_nodes(_export(root, args, kwargs, dynamic_shapes).graph)
    if other is None:
        return module, graph, False
    training, evaluation = (graph, other) if root.training else (other, graph)
    scope = Scope(module, training, "whole graph", evaluation=evaluation)
    run_passes(BOTH_MODES, scope)
    return module, training if scope.follows_mode else graph, scope.follows_mode


def _separate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a tensor of its own at each place: an export takes one given twice for one input."""
    seen: set[int] = set()

    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in seen:
            return value.detach().clone()
        seen.add(id(value))
        return value

    return pytree.tree_map(own, (args, kwargs))  # type: ignore[no-any-return]


def _default_dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ShapesCollection:
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.dim():
            shapes[value] = dict.fromkeys(_dynamic_dims(value), torch.export.Dim.AUTO)
    return shapes


def _dynamic_dims(value: Tensor) -> range:
    """The batch, and the positions of what is a sequence: ids, masks, embeddings."""
    sequence = value.dim() > 1 and (value.dim() == 3 or not value.is_floating_point())
    return range(2 if sequence else 1)


def _tell_fixed(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values = [value for value in pytree.tree_leaves((args, kwargs)) if value is not None]
    fixed = []
    for node, value in zip(inputs, values, strict=False):
        held = node.meta.get("val")
        if not isinstance(held, Tensor) or not isinstance(value, Tensor) or not value.dim():
            continue
        for dim in _dynamic_dims(value):
            size: Any = held.shape[dim]
            if isinstance(size, torch.SymInt):
                size = size.node.maybe_as_int()  # int() would fix it
            if size is not None:
                why = "give an example of 2 or more" if size == 1 else "the model fixes it"
                fixed.append(f"dimension {dim} of {node.name} is fixed at {size} ({why})")
    if fixed:
        warnings.warn(f"capture: {'; '.join(fixed)}.", MissWarning, stacklevel=3)


def _export(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Any:
    try:
        module: Any = torch.export.export(root, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False).module()
    except Exception as error:  # a tracer runs arbitrary code: whatever it raises means "cannot be captured"
        where = _user_call(error)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CaptureError(
            f"torch.export cannot follow {type(root).__name__}{where}: {type(error).__name__}: {reason} Rewrite that call, "
            "give other example inputs, or adapt the module itself: misscompile.adapt(model, config) needs no whole graph."
        ) from error
    keep_structure(module, root)
    inline_graph(module)
    return module


def _user_call(error: BaseException) -> str:
    """Where the model's own code was when the export failed: the innermost frame outside of torch and of this library."""
    here = os.path.dirname(__file__)
    cause: BaseException | None = error
    frames: list[traceback.FrameSummary] = []
    while cause is not None:
        frames = [
            frame
            for frame in traceback.extract_tb(cause.__traceback__)
            if not frame.filename.startswith((_TORCH, here)) and os.path.exists(frame.filename)
        ] or frames
        cause = cause.__cause__ or cause.__context__
    inside = [frame for frame in frames if frame.name != "<module>"]
    if not inside:
        return ""
    frame = inside[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f" at {frame.filename}:{frame.lineno}, in {frame.name}: `{line}`"


@contextlib.contextmanager
def _ready_for_export(root: nn.Module) -> Iterator[None]:
    """No key-value caches, and gradients everywhere, so that no layer takes an inference-only path."""
    configs: dict[int, Any] = {id(m.config): m.config for m in root.modules() if hasattr(m, "config")}
    configs = {key: config for key, config in configs.items() if getattr(config, "use_cache", None) is True}
    frozen = [p for p in root.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for config in configs.values():
            config.use_cache = False
        for parameter in frozen:
            parameter.requires_grad = True
        with torch.enable_grad():
            yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for parameter in frozen:
            parameter.requires_grad = False


@contextlib.contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Whatever a forward assigns to its module, or to a container on it, is a value of the trace: it is put back."""
    saved: dict[int, tuple[Any, Any]] = {}
    todo: list[Any] = [vars(module) for module in root.modules()]
    while todo:
        held = todo.pop()
        if type(held) in (dict, OrderedDict, list, set) and id(held) not in saved:
            saved[id(held)] = held, copy.copy(held)
            todo += held.values() if isinstance(held, dict) else held
    try:
        yield
    finally:
        for held, before in saved.values():
            held.clear()
            held.extend(before) if isinstance(held, list) else held.update(before)


@contextlib.contextmanager
def _in_mode(root: nn.Module, training: bool) -> Iterator[None]:
    flags = {module: module.training for module in root.modules()}
    try:
        for module in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag

"""All or nothing: what a verb changes on modules is put back if it raises."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from misscompile.record.state import STATE, OwnerState, base_tensor
from misscompile.record.walk import unique_parameters

_HELD = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def transaction(modules: Collection[nn.Module], touched: Iterable[nn.Module] = ()) -> Iterator[Undo]:
    """Put records, classes, tensors, graphs and `requires_grad` flags back as they were if the body raises.

    The body runs outside of inference mode: a tensor that is made in it could neither be trained nor written later.

    Args:
        modules: those of the model. The records among them are kept, and the flags of all.
        touched: modules without a record that the body may change.

    Yields:
        What is put back. A value that the body writes in place has to be told to it.
    """
    undo = Undo(modules, dict.fromkeys([*touched, *(module for module in modules if STATE in vars(module))]))
    try:
        with torch.inference_mode(False):
            yield undo
    except BaseException:
        with deferred_interrupt():
            undo.put_back()
        raise


class Undo:
    """How to put modules back as they were. A call of torch that raises is taken to have written nothing."""

    def __init__(self, modules: Iterable[nn.Module], changing: Iterable[nn.Module]) -> None:
        self.parameters = unique_parameters(modules)
        """The parameters as they were at first, each once."""
        self._flags = [parameter.requires_grad for parameter in self.parameters]
        self._saved = {module: _Saved(module) for module in changing}
        self._steps: list[tuple[nn.Module, Callable[[], object]]] = []

    def add(self, owner: nn.Module, step: Callable[[], object]) -> None:
        """Have `step` undo what is done next to `owner`."""
        self._steps.append((owner, step))

    def remember(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        """A copy of a tensor of `owner` that is written next."""
        values = tensor.detach().clone()
        self.add(owner, functools.partial(write, tensor, values))
        return values

    def exchange(self, owner: nn.Module, one: Tensor, other: Tensor) -> None:
        """Exchange the values of two tensors of `owner` in place; no copy outlives the call."""
        with deferred_interrupt():
            self.remember(owner, one)
            exchange(one, other)
            self._steps[-1] = owner, functools.partial(exchange, one, other)

    def settle(self, owners: Collection[nn.Module]) -> None:
        """Leave what was done to these modules as it is, whatever the body does next."""
        for owner in owners:
            self._saved.pop(owner, None)
        self._steps = [(owner, step) for owner, step in self._steps if owner not in owners]

    def put_back(self) -> None:
        """Undo everything, the last change first."""
        with torch.no_grad():
            for _, step in reversed(self._steps):
                step()
        for module, saved in self._saved.items():
            saved.put_back(module)
        for parameter, flag in zip(self.parameters, self._flags, strict=True):
            parameter.requires_grad = flag


class _Saved:
    """The class, the attributes, the record and the registered names of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.kind, self.members = type(module), vars(module).copy()
        self.held = [vars(module)[name].copy() for name in _HELD]
        state: OwnerState | None = self.members.get(STATE)
        self.state = None if state is None else _copy_state(state)

    def put_back(self, module: nn.Module) -> None:
        module.__class__ = self.kind
        other_graph = vars(module).get("_graph") is not self.members.get("_graph")
        vars(module).clear()
        vars(module).update(self.members)
        for name, values in zip(_HELD, self.held, strict=True):
            vars(module)[name].clear()
            vars(module)[name].update(values)
        if self.state is not None:
            vars(module)[STATE] = self.state
        if isinstance(module, fx.GraphModule) and other_graph:
            module.recompile()  # its class holds the code


def _copy_state(state: OwnerState) -> OwnerState:
    fields: dict[str, Any] = {n: copy.copy(v) if isinstance(v, dict) else v for n, v in vars(state).items()}
    return OwnerState(**fields)


def swap_kept(owner: nn.Module, undo: Undo) -> None:
    """Exchange what a merge wrote on `owner` with what it kept of the base, bit for bit.

    On an ordinary module the values are exchanged in place. A graph shares its parameters with the model that it was made
    from: there the parameters themselves are exchanged.
    """
    state: OwnerState = vars(owner)[STATE]
    for name, kept in list(state.kept.items()):
        if not state.in_graph or name in owner._buffers:
            assert kept.value is not None
            undo.exchange(owner, base_tensor(owner, name), kept.value)
            continue
        state.kept[name] = dataclasses.replace(kept, value=owner._parameters.get(name))
        if kept.value is None:
            del owner._parameters[name]
        else:
            assert isinstance(kept.value, nn.Parameter)
            owner._parameters[name] = kept.value


def exchange(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors in place."""
    values = one.detach().clone()
    write(one, other)
    write(other, values)


def write(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor in place."""
    with writing(tensor):
        tensor.copy_(values)


@contextlib.contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Let the body write to `tensor` in place: one that was made under `torch.inference_mode` is written under it alone."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait until the body is done: what is half written would be lost.

    Python raises `KeyboardInterrupt` in the main thread only. Its handler is set aside rather than the signal masked,
    since a thread of torch's pool would still receive it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])

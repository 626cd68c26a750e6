"""Bytes that a forward keeps for its backward, and the peak of a whole step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from misscompile.benchmark.measure import TrainingStep


def saved_bytes(step: TrainingStep) -> int:
    """Bytes of distinct storages that the forward of `step` keeps for its backward, eager or compiled.

    Storages of parameters are left out: they are there anyway. A storage counts once, and whole, however many views of
    it are kept. A compiled function hands its activations to autograd as one node's saved tensors, and those that need no
    version check as an attribute of that node, which the hooks do not see.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = step.forward()
    for node in _graph_nodes(output):
        for tensor in getattr(node, "_tensors_no_vc_check", None) or ():
            keep(tensor)
    return sum(kept.values())


def peak_bytes(step: TrainingStep, device: str) -> int | None:
    """The most bytes that one step holds at a time beyond what is allocated before it; None where torch cannot tell.

    On CPUs this is the running sum of what torch's allocator reports to the profiler, so that the temporaries inside
    kernels and compiled code count too; on other devices it is the allocator's own peak.
    """
    step.prepare()
    kind = torch.device(device).type
    if kind == "cpu":
        with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step.run()
        return _peak_of_events(profiler)
    backend = getattr(torch, kind)
    if not hasattr(backend, "max_memory_allocated"):
        return None
    backend.synchronize()
    before = int(backend.memory_allocated())
    backend.reset_peak_memory_stats()
    step.run()
    backend.synchronize()
    return int(backend.max_memory_allocated()) - before


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler's C++ side writes a line to the standard error at each start and stop, past any of Python's settings."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _peak_of_events(profiler: profile) -> int:
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _graph_nodes(output: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the autograd graph that ends in `output`."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
            yield node

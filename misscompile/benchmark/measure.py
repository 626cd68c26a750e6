"""How one thing is measured: candidates in turn, and the training step that most of them are."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

K = TypeVar("K")
Forward = Callable[[Tensor], Tensor]


def _nothing() -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Trial:
    """Something to time: `run`, each time after an untimed `prepare`."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing


def synchronize(device: str) -> None:
    """Wait until the device has done what was queued; CPU kernels are done when they return."""
    backend = getattr(torch, torch.device(device).type, None)
    if backend is not None and hasattr(backend, "synchronize"):
        backend.synchronize()


def take_turns(trials: Mapping[K, Trial], rounds: int, device: str, warmup: int = 1) -> dict[K, list[float]]:
    """Seconds of every trial in every round, after `warmup` rounds that do not count.

    The trials take turns within a round, so that a slow moment of the machine hits all of them; the garbage collector
    runs between rounds only.
    """
    seconds: dict[K, list[float]] = {key: [] for key in trials}
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # what the libraries hold is not looked through again in every round
    try:
        for index in range(warmup + rounds):
            gc.collect()
            for key, trial in trials.items():
                trial.prepare()
                synchronize(device)
                start = time.perf_counter()
                trial.run()
                synchronize(device)
                if index >= warmup:
                    seconds[key].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return seconds


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles of `values` (two or more), and the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "values": values}


def ratios(seconds: list[float], base: list[float]) -> dict[str, Any]:
    """The spread of the quotients of each round."""
    return spread([own / other for own, other in zip(seconds, base, strict=True)])


def over(value: float | None, base: float | None) -> float | None:
    """By what share `value` is more than `base`; None where either is not known."""
    return value / base - 1 if value and base else None


class TrainingStep:
    """One forward and backward of `compute`, with the same output gradient each time.

    Args:
        model: whose gradients are cleared before each step.
        compute: `model` itself or a compiled function of the same input.
        embedded: the input.
    """

    def __init__(self, model: nn.Module, compute: Forward, embedded: Tensor) -> None:
        self.model, self._compute, self._embedded = model, compute, embedded
        self._cotangent: Tensor | None = None

    def prepare(self) -> None:
        """Clear the gradients, so that the step writes them and does not add to them."""
        self.model.zero_grad(set_to_none=True)

    def forward(self) -> Tensor:
        """The output, with the graph that leads to it."""
        return self._compute(self._embedded)

    def run(self) -> None:
        """The forward and the backward."""
        output = self.forward()
        if self._cotangent is None:
            generator = torch.Generator().manual_seed(3)
            self._cotangent = torch.randn(output.shape, generator=generator).to(output)
        torch.autograd.backward(output, self._cotangent)

    def trial(self) -> Trial:
        return Trial(self.run, self.prepare)

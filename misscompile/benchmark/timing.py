"""How things are timed: in turn, round by round, and compared within a round."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Trial:
    """Something to time: `prepare` makes, untimed, what `run` is given each time."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]

    def seconds(self, device: str) -> float:
        """Seconds that one run takes, until the device has done what was queued."""
        backend = getattr(torch, torch.device(device).type, None)
        wait: Callable[[], object] = getattr(backend, "synchronize", lambda: None)
        subject = self.prepare()
        wait()
        start = time.perf_counter()
        result = self.run(subject)
        wait()
        taken = time.perf_counter() - start
        del result  # not before: freeing a model takes time too
        return taken


def take_turns(trials: Mapping[K, Trial], rounds: int, device: str, warmup: int = 1) -> dict[K, list[float]]:
    """Seconds of every trial in every round, after `warmup` rounds that do not count.

    The trials take turns within a round, so that a slow moment of the machine hits all of them; the garbage collector
    runs between rounds only.
    """
    seconds: dict[K, list[float]] = {key: [] for key in trials}
    gc.disable()
    gc.collect()
    gc.freeze()  # what the libraries hold is not looked through again in every round
    try:
        for _ in range(warmup + rounds):
            gc.collect()
            for key, trial in trials.items():
                seconds[key].append(trial.seconds(device))
    finally:
        gc.unfreeze()
        gc.enable()
    return {key: own[warmup:] for key, own in seconds.items()}


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

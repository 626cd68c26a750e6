"""Merging, relative to copying the merged weights once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import misscompile
from misscompile.benchmark.contestants import Contestant, enter, entries, fill_blocks
from misscompile.benchmark.measure import Trial, ratios, spread, take_turns
from misscompile.benchmark.models import build_model
from misscompile.benchmark.settings import Settings, dtype_named
from misscompile.benchmark.tables import Column, Row, Table, ratio, spread_milliseconds, spread_percent
from misscompile.state import owners

PRESET = "yardstick-4"


class Merging:
    """Adapts a model, and merges it when it is timed; the model is plain again after that."""

    def __init__(self, contestant: Contestant, settings: Settings, dtype: str) -> None:
        self._contestant, self._settings = contestant, settings
        self._model: Any = build_model(settings.preset(PRESET), dtype_named(dtype), settings.device)

    def prepare(self) -> None:
        self._model = enter(self._model, self._contestant, self._settings)
        fill_blocks(self._model)

    def run(self) -> None:
        if self._contestant.provider == "misscompile":
            misscompile.merge(self._model)
        else:
            self._model = self._model.merge_and_unload()

    def trial(self) -> Trial:
        return Trial(self.run, self.prepare)


class Copying:
    """Copies the weights that a merge would change into memory that is there already."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights
        self._copies = [torch.zeros_like(weight) for weight in weights]
        self.bytes = sum(weight.numel() * weight.element_size() for weight in weights)

    def run(self) -> None:
        for weight, kept in zip(self._weights, self._copies, strict=True):
            kept.copy_(weight)


def run(settings: Settings) -> list[Table]:
    """One table: a row for each dtype and contestant."""
    rows: list[Row] = []
    for dtype in settings.dtypes:
        contestants = [c for c in entries(settings) if c.provider != "base"]
        copying = Copying(_adapted_weights(settings, dtype))
        trials = {c.label: Merging(c, settings, dtype).trial() for c in contestants}
        seconds = take_turns({"copy": Trial(copying.run), **trials}, settings.rounds, settings.device)
        rows += [
            {
                "dtype": dtype,
                "contestant": label,
                "seconds": spread(own),
                "bytes": copying.bytes,
                "gigabytes_a_second": copying.bytes / spread(own)["median"] / 1e9,
                "bandwidth_of_copy": ratios(seconds["copy"], own),
            }
            for label, own in seconds.items()
        ]
    note = (
        f"`{settings.preset(PRESET)}`, r {settings.r}, mini_r {settings.mini_r}. Bytes of the weights over the time of the "
        "merge, relative to the same of copying them once into memory that is there already."
    )
    columns = (
        Column("dtype", "weights"),
        Column("contestant", "contestant"),
        Column("bandwidth_of_copy", "of the copy's bandwidth", spread_percent),
        Column("gigabytes_a_second", "GB/s", ratio),
        Column("seconds", "ms", spread_milliseconds),
    )
    return [Table("merge", "Merging", note, columns, rows)]


def _adapted_weights(settings: Settings, dtype: str) -> list[Tensor]:
    model = build_model(settings.preset(PRESET), dtype_named(dtype), settings.device)
    enter(model, Contestant("misscompile", settings.variants[0]), settings)
    return [owner.get_parameter("weight").detach() for owner in owners(model).values()]

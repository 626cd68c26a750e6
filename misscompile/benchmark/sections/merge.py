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
PRODUCT = "the product of bat alone"


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


class Multiplying:
    """The product of bat alone, `W[o, k] B[o]` of every weight in float32: what a merge of bat has to compute.

    Args:
        weights: `(out, in)` each, as far as `r` divides both; in the layout of `Conv1D` the product is as large.
        r: rank.
    """

    def __init__(self, weights: list[Tensor], r: int) -> None:
        fitting = [weight for weight in weights if not weight.shape[0] % r and not weight.shape[1] % r]
        self._shards = [weight.float().reshape(weight.shape[0] // r, weight.shape[1], r) for weight in fitting]
        self._blocks = [torch.full((len(shards), r, r), 1e-3, device=shards.device) for shards in self._shards]
        largest = max((shards.numel() for shards in self._shards), default=0)
        self._product = torch.zeros(largest, device=weights[0].device)

    def run(self) -> None:
        for shards, block in zip(self._shards, self._blocks, strict=True):
            torch.bmm(shards, block, out=self._product[: shards.numel()].view(shards.shape))


def run(settings: Settings) -> list[Table]:
    """One table: a row for each dtype and contestant, and for the product that bat cannot do without."""
    rows: list[Row] = []
    for dtype in settings.dtypes:
        contestants = [c for c in entries(settings) if c.provider != "base"]
        weights = _adapted_weights(settings, dtype)
        copying = Copying(weights)
        trials = {"copy": Trial(copying.run)}
        for contestant in contestants:
            if contestant == Contestant("misscompile", "bat"):
                trials[PRODUCT] = Trial(Multiplying(weights, settings.r).run)
            trials[contestant.label] = Merging(contestant, settings, dtype).trial()
        seconds = take_turns(trials, settings.rounds, settings.device)
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
        "merge, relative to the same of copying them once into memory that is there already. A merge of bat has to multiply "
        "each weight with its block: the product alone, in float32, is the most that it could reach."
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

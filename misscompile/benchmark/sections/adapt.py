"""Seconds to adapt a model, beside PEFT's `get_peft_model` on an equal one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from misscompile.benchmark.contestants import Contestant, enter, entries
from misscompile.benchmark.measure import Trial, ratios, spread, take_turns
from misscompile.benchmark.models import PRESETS, build_model
from misscompile.benchmark.settings import Settings, dtype_named
from misscompile.benchmark.tables import Column, Row, Table, milliseconds, ratio, spread_milliseconds
from misscompile.state import owners

PRESET = "smollm2-135m"


class Adapting:
    """Adapts a fresh model each time it is timed."""

    def __init__(self, contestant: Contestant, settings: Settings, dtype: str) -> None:
        self._contestant, self._settings, self._dtype = contestant, settings, dtype
        self.model: Any = None

    def prepare(self) -> None:
        self.model = None  # the last one's memory, before the next one's
        self.model = _empty_model(self._settings.preset(PRESET), self._dtype, self._settings.device)

    def run(self) -> None:
        self.model = enter(self.model, self._contestant, self._settings)


def run(settings: Settings) -> list[Table]:
    """One table: a row for each contestant; the dtype makes no difference, so the first one is taken."""
    adaptings = {c: Adapting(c, settings, settings.dtypes[0]) for c in entries(settings) if c.provider != "base"}
    trials = {contestant: Trial(adapting.run, adapting.prepare) for contestant, adapting in adaptings.items()}
    first = take_turns(trials, 1, settings.device, warmup=0)
    seconds = take_turns(trials, settings.rounds, settings.device, warmup=0)
    sites = {c: len(owners(a.model)) for c, a in adaptings.items() if c.provider == "misscompile"}
    rows: list[Row] = []
    for contestant, own in seconds.items():
        rival = Contestant("peft", contestant.method)
        against = ratios(own, seconds[rival]) if contestant.provider == "misscompile" and rival in seconds else None
        rows.append(
            {
                "contestant": contestant.label,
                "sites": sites.get(contestant),
                "first": first[contestant][0],
                "seconds": spread(own),
                "ratio_to_peft": against,
                "times_faster": 1 / against["median"] if against else None,
            }
        )
    note = (
        f"`{settings.preset(PRESET)}` in real memory, {settings.dtypes[0]}, r {settings.r}. First: in this process, with "
        "what is imported and built once; then the median (quartiles) over fresh models."
    )
    columns = (
        Column("contestant", "contestant"),
        Column("sites", "linears"),
        Column("first", "first, ms", milliseconds),
        Column("seconds", "ms", spread_milliseconds),
        Column("times_faster", "times faster than PEFT", ratio),
    )
    return [Table("adapt", "Adapting", note, columns, rows)]


def _empty_model(preset: str, dtype: str, device: str) -> PreTrainedModel:
    """A fresh model; the weights of a preset are allocated and not written, since no value is read."""
    if preset not in PRESETS:
        return build_model(preset, dtype_named(dtype), device)
    return build_model(preset, dtype_named(dtype), "meta").to_empty(device=torch.device(device))

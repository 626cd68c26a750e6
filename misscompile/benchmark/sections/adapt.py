"""Seconds to adapt a model, beside PEFT's `get_peft_model` on an equal one."""

from __future__ import annotations

import dataclasses
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
    adaptings, meta = _line_up(settings), _line_up(dataclasses.replace(settings, device="meta"))
    first = _take_turns(adaptings, 1, settings.device)
    seconds = _take_turns(adaptings, settings.rounds, settings.device)
    _take_turns(meta, 1, "meta")
    python = _take_turns(meta, settings.rounds, "meta")
    rows: list[Row] = []
    for contestant, own in seconds.items():
        ours = contestant.provider == "misscompile"
        against, python_against = _ratios_to_peft(contestant, seconds), _ratios_to_peft(contestant, python)
        rows.append(
            {
                "contestant": contestant.label,
                "sites": len(owners(adaptings[contestant].model)) if ours else None,
                "first": first[contestant][0],
                "seconds": spread(own),
                "ratio_to_peft": against,
                "times_faster": 1 / against["median"] if against else None,
                "python_seconds": spread(python[contestant]),
                "python_ratio_to_peft": python_against,
                "python_times_faster": 1 / python_against["median"] if python_against else None,
            }
        )
    note = (
        f"`{settings.preset(PRESET)}`, {settings.dtypes[0]}, r {settings.r}. First: in this process, with what is imported "
        "and built once; then the median (quartiles) over fresh models in real memory, and over fresh models on the meta "
        "device, where nothing is allocated: what is left is the Python of setting up."
    )
    columns = (
        Column("contestant", "contestant"),
        Column("sites", "linears"),
        Column("first", "first, ms", milliseconds),
        Column("seconds", "ms", spread_milliseconds),
        Column("times_faster", "times faster than PEFT", ratio),
        Column("python_seconds", "meta device, ms", spread_milliseconds),
        Column("python_times_faster", "meta device, times faster", ratio),
    )
    return [Table("adapt", "Adapting", note, columns, rows)]


def _line_up(settings: Settings) -> dict[Contestant, Adapting]:
    return {c: Adapting(c, settings, settings.dtypes[0]) for c in entries(settings) if c.provider != "base"}


def _take_turns(adaptings: dict[Contestant, Adapting], rounds: int, device: str) -> dict[Contestant, list[float]]:
    trials = {contestant: Trial(adapting.run, adapting.prepare) for contestant, adapting in adaptings.items()}
    return take_turns(trials, rounds, device, warmup=0)


def _ratios_to_peft(contestant: Contestant, seconds: dict[Contestant, list[float]]) -> dict[str, Any] | None:
    rival = Contestant("peft", contestant.method)
    if contestant.provider != "misscompile" or rival not in seconds:
        return None
    return ratios(seconds[contestant], seconds[rival])


def _empty_model(preset: str, dtype: str, device: str) -> PreTrainedModel:
    """A fresh model; the weights of a preset are allocated and not written, since no value is read."""
    if preset not in PRESETS:
        return build_model(preset, dtype_named(dtype), device)
    model = build_model(preset, dtype_named(dtype), "meta")
    return model if device == "meta" else model.to_empty(device=torch.device(device))

"""Compile time, guards, graphs and recompilations."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

import misscompile
from misscompile.benchmark.compilation import CompiledForward, counted_graphs, nothing_compiled_before
from misscompile.benchmark.contestants import BASE, Contestant, Field, entries, line_up
from misscompile.benchmark.measure import TrainingStep, Trial, ratios, spread, take_turns
from misscompile.benchmark.models import Probe
from misscompile.benchmark.settings import YARDSTICK, Settings
from misscompile.benchmark.tables import Column, Row, Table, percent, spread_ratio, spread_seconds

PRESET = "yardstick-4"
TOKENS = 64  # the guards, the graphs and the time to compile do not depend on them, the time of the step does


def run(settings: Settings) -> list[Table]:
    """Two tables: what Dynamo counts for each contestant, and the seconds to compile misscompile's beside the base's."""
    return [_counts(settings), _times(settings)]


def _counts(settings: Settings) -> Table:
    field = line_up(entries(settings), settings, settings.preset(PRESET), settings.dtypes[0], TOKENS)
    counted = {contestant: _count(contestant, field) for contestant in field.probes}
    rows: list[Row] = [
        {"contestant": c.label, **values, "guards_over_base": values["guards"] / counted[BASE]["guards"] - 1}
        for c, values in counted.items()
    ]
    note = (
        f"`{settings.preset(PRESET)}`, {settings.dtypes[0]}, r {settings.r}. Guards: nodes of Dynamo's guard tree. "
        "Recompiles: graphs compiled in further steps of the same shape; then with the adapter off, and on again."
    )
    columns = (
        Column("contestant", "contestant"),
        Column("guards", "guards"),
        Column("guards_over_base", "over the base", percent),
        Column("graphs", "graphs"),
        Column("breaks", "graph breaks"),
        Column("recompiles", "recompiles"),
        Column("recompiles_off", "adapter off"),
        Column("recompiles_on", "on again"),
    )
    return Table("guards", "Guards, graphs and recompiles", note, columns, rows)


def _count(contestant: Contestant, field: Field) -> Row:
    probe = field.probes[contestant]
    torch._dynamo.reset()
    forward = CompiledForward(probe, backend="eager")  # guards and graphs are Dynamo's, whatever compiles the graph
    step = TrainingStep(probe, forward, field.embedded)

    def graphs() -> dict[str, int]:
        with counted_graphs() as found:
            step.prepare()
            step.run()
        return found

    first = graphs()
    found: Row = {**first, "guards": forward.guards(), "recompiles": graphs()["graphs"]}
    if contestant != BASE:
        with _adapter_off(contestant, probe):
            found["recompiles_off"] = graphs()["graphs"]
        found["recompiles_on"] = graphs()["graphs"]
    return found


def _adapter_off(contestant: Contestant, probe: Probe) -> contextlib.AbstractContextManager[Any]:
    if contestant.provider == "misscompile":
        return misscompile.disable_adapter(probe.model)
    context: contextlib.AbstractContextManager[Any] = probe.model.disable_adapter()  # type: ignore[operator]  # PeftModel's
    return context


def _times(settings: Settings) -> Table:
    ours = [c for c in entries(settings) if c.provider != "peft"]
    preset, rounds = settings.preset(YARDSTICK), max(2, settings.rounds // 4)
    field = line_up(ours, settings, preset, settings.dtypes[0], TOKENS)
    trials = {contestant: _compiling(field, contestant) for contestant in ours}
    seconds = take_turns(trials, rounds, settings.device, warmup=0)
    rows: list[Row] = [
        {"contestant": c.label, "seconds": spread(own), "ratio": ratios(own, seconds[BASE])} for c, own in seconds.items()
    ]
    note = (
        f"`{preset}`, {settings.dtypes[0]}, r {settings.r}, {rounds} rounds. The first step, forward and backward, with "
        "every cache of the compiler empty."
    )
    columns = (
        Column("contestant", "contestant"),
        Column("seconds", "s", spread_seconds),
        Column("ratio", "ratio to the base", spread_ratio),
    )
    return Table("compile", "Compile time", note, columns, rows)


def _compiling(field: Field, contestant: Contestant) -> Trial:
    probe = field.probes[contestant]

    def first_step() -> None:
        with nothing_compiled_before():
            TrainingStep(probe, CompiledForward(probe), field.embedded).run()

    return Trial(first_step)

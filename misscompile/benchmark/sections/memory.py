"""What a forward keeps for its backward, and the peak memory of a step, over the frozen base's."""

from __future__ import annotations

import dataclasses

from misscompile.benchmark.compilation import SAME_PARTITION, CompiledForward
from misscompile.benchmark.contestants import BASE, Contestant, entries, line_up
from misscompile.benchmark.measure import TrainingStep, over
from misscompile.benchmark.memory import peak_bytes, saved_bytes
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Column, Row, Table, mebibytes, percent, ratio

DROPOUT = 0.1
PRESET = "yardstick-4"


def run(settings: Settings) -> list[Table]:
    """One table: a row for each mode and contestant, in float32 if that is among the dtypes."""
    tokens = settings.tokens // 2
    dtype = "float32" if "float32" in settings.dtypes else settings.dtypes[0]
    field = line_up(_entries(settings), settings, settings.preset(PRESET), dtype, tokens)
    rows: list[Row] = []
    for mode in settings.modes:
        measured = {}
        for contestant, probe in field.probes.items():
            if mode == "compiled" and contestant.dropout:
                continue  # the compiler's own dropout and mask, whoever asks for it
            forward = CompiledForward(probe, backend=SAME_PARTITION) if mode == "compiled" else probe
            step = TrainingStep(probe, forward, field.embedded)
            step.run()
            peak = peak_bytes(step, settings.device) if mode == "eager" else None
            step.prepare()
            measured[contestant] = saved_bytes(step), peak
        rows += [_row(dtype, mode, contestant, measured) for contestant in measured]
    note = (
        f"`{settings.preset(PRESET)}`, {tokens} tokens, r {settings.r}, mini_r {settings.mini_r}. Saved: distinct storages "
        "kept for the backward, parameters left out. Peak: the most a step holds beyond what was allocated before it "
        "(compiled: in the table of the steps)."
    )
    columns = (
        Column("dtype", "base"),
        Column("mode", "mode"),
        Column("contestant", "contestant"),
        Column("saved", "saved, MiB", mebibytes),
        Column("saved_over_base", "over the base", percent),
        Column("saved_over_balance", "÷ balance's", ratio),
        Column("peak", "peak, MiB", mebibytes),
        Column("peak_over_base", "over the base", percent),
    )
    return [Table("memory", "Memory of a training step", note, columns, rows)]


def _entries(settings: Settings) -> list[Contestant]:
    """The usual ones, and balance once more with dropout."""
    usual = entries(settings)
    return usual + [dataclasses.replace(c, dropout=DROPOUT) for c in usual if c.method == "balance"]


def _row(dtype: str, mode: str, contestant: Contestant, measured: dict[Contestant, tuple[int, int | None]]) -> Row:
    (saved, peak), (base_saved, base_peak) = measured[contestant], measured[BASE]
    balance = measured.get(Contestant("misscompile", "balance"))
    return {
        "dtype": dtype,
        "mode": mode,
        "contestant": contestant.label,
        "provider": contestant.provider,
        "saved": saved,
        "saved_over_base": over(saved, base_saved),
        "saved_over_balance": saved / balance[0] if balance else None,
        "peak": peak,
        "peak_over_base": over(peak, base_peak),
    }

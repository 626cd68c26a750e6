"""Training steps as ratios to the frozen base's, and to the floor."""

from __future__ import annotations

import dataclasses

from misscompile.benchmark.compilation import CompiledForward
from misscompile.benchmark.contestants import BASE, Contestant, Field, entries, line_up
from misscompile.benchmark.floor import added_flops, count_step
from misscompile.benchmark.measure import TrainingStep, over, ratios, spread, take_turns
from misscompile.benchmark.memory import peak_bytes, saved_bytes
from misscompile.benchmark.settings import YARDSTICK, Settings, dtype_named
from misscompile.benchmark.tables import Column, Row, Table, percent, ratio, spread_milliseconds, spread_ratio


def run(settings: Settings) -> list[Table]:
    """One table: a row for each dtype, mode and contestant."""
    rows: list[Row] = []
    for dtype in settings.dtypes:
        field = line_up(_entries(settings, dtype), settings, settings.preset(YARDSTICK), dtype, settings.tokens)
        floors = step_floors(field, settings)
        steps = _steps(field, settings)
        seconds = take_turns({key: step.trial() for key, step in steps.items()}, settings.rounds, settings.device)
        kept = {key: saved_bytes(step) for key, step in steps.items()}
        peaks = {key: peak_bytes(step, settings.device) for key, step in steps.items()}
        for key in steps:
            mode, contestant = key
            base = mode, BASE
            against = ratios(seconds[key], seconds[base])
            rows.append(
                {
                    "dtype": dtype,
                    "mode": mode,
                    "contestant": contestant.label,
                    "provider": contestant.provider,
                    "method": contestant.method,
                    "floor": floors[contestant],
                    "seconds": spread(seconds[key]),
                    "ratio": against,
                    "over_floor": against["median"] / floors[contestant],
                    "saved": kept[key],
                    "saved_over_base": over(kept[key], kept[base]),
                    "peak": peaks[key],
                    "peak_over_base": over(peaks[key], peaks[base]),
                }
            )
    layers = field.base.config.num_hidden_layers
    note = (
        f"`{settings.preset(YARDSTICK)}`, layers: {layers}, {settings.tokens} tokens, r {settings.r}, "
        f"mini_r {settings.mini_r}. Ratio: a step over the frozen base's step of the same round, median "
        "(quartiles). Floor: the same ratio in FLOPs. Saved: bytes kept for the backward, and peak: "
        "the most memory of a step, over the base's. Rounded: `adapt(..., round_bat_weight=True)`."
    )
    columns = (
        Column("dtype", "base"),
        Column("mode", "mode"),
        Column("contestant", "contestant"),
        Column("floor", "floor", ratio),
        Column("ratio", "ratio to the base", spread_ratio),
        Column("over_floor", "ratio ÷ floor", ratio),
        Column("seconds", "ms a step", spread_milliseconds),
        Column("saved_over_base", "saved", percent),
        Column("peak_over_base", "peak", percent),
    )
    return [Table("steps", "Training step", note, columns, rows)]


def _entries(settings: Settings, dtype: str) -> list[Contestant]:
    """The usual ones, and bat on 16-bit weights once more with `W + ΔW` rounded to the dtype of the weight."""
    found = entries(settings)
    exact = Contestant("misscompile", "bat")
    if exact in found and dtype_named(dtype).itemsize == 2:
        found.insert(found.index(exact) + 1, dataclasses.replace(exact, form="rounded"))
    return found


def step_floors(field: Field, settings: Settings) -> dict[Contestant, float]:
    """The least FLOPs of each contestant's step over the base's; LoRA's, which is in no cost model of ours, are counted."""
    base = count_step(field.probes[BASE], field.embedded)
    tokens = field.embedded.shape[1]
    floors = {}
    for contestant, probe in field.probes.items():
        if contestant.provider == "base":
            floors[contestant] = 1.0
        elif contestant.method == "lora":
            floors[contestant] = count_step(probe, field.embedded) / base
        else:
            ours = field.probes[dataclasses.replace(contestant, provider="misscompile")]
            added = added_flops(ours, contestant.method, tokens, settings.r, settings.mini_r)
            floors[contestant] = (base + added) / base
    return floors


def _steps(field: Field, settings: Settings) -> dict[tuple[str, Contestant], TrainingStep]:
    steps = {}
    for mode in settings.modes:
        for contestant, probe in field.probes.items():
            forward = CompiledForward(probe) if mode == "compiled" else probe
            steps[mode, contestant] = TrainingStep(probe, forward, field.embedded)
    return steps

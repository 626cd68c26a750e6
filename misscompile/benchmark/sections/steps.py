"""Training steps as ratios to the frozen base's, and to the floor."""

from __future__ import annotations

from misscompile.benchmark.compilation import compile_apart
from misscompile.benchmark.contestants import BASE, Contestant, Field, entries, line_up
from misscompile.benchmark.floor import added_flops, count_step
from misscompile.benchmark.measure import TrainingStep, Trial, ratios, spread, take_turns
from misscompile.benchmark.settings import YARDSTICK, Settings
from misscompile.benchmark.tables import Column, Row, Table, ratio, spread_milliseconds, spread_ratio


def run(settings: Settings) -> list[Table]:
    """One table: a row for each dtype, mode and contestant."""
    rows: list[Row] = []
    for dtype in settings.dtypes:
        field = line_up(entries(settings), settings, settings.preset(YARDSTICK), dtype, settings.tokens)
        floors = step_floors(field, settings)
        seconds = take_turns(_trials(field, settings), settings.rounds, settings.device)
        for (mode, contestant), own in seconds.items():
            against = ratios(own, seconds[mode, BASE])
            floor = floors[contestant]
            rows.append(
                {
                    "dtype": dtype,
                    "mode": mode,
                    "contestant": contestant.label,
                    "library": contestant.library,
                    "method": contestant.method,
                    "floor": floor,
                    "seconds": spread(own),
                    "ratio": against,
                    "over_floor": against["median"] / floor,
                }
            )
    layers = field.base.config.num_hidden_layers
    note = (
        f"`{settings.preset(YARDSTICK)}`, layers: {layers}, {settings.tokens} tokens, r {settings.r}, mini_r {settings.mini_r}. "
        "Ratio: a step over the frozen base's step of the same round, median (quartiles). Floor: the same ratio in FLOPs."
    )
    columns = (
        Column("dtype", "base"),
        Column("mode", "mode"),
        Column("contestant", "contestant"),
        Column("floor", "floor", ratio),
        Column("ratio", "ratio to the base", spread_ratio),
        Column("over_floor", "ratio ÷ floor", ratio),
        Column("seconds", "ms a step", spread_milliseconds),
    )
    return [Table("steps", "Training step", note, columns, rows)]


def step_floors(field: Field, settings: Settings) -> dict[Contestant, float]:
    """The least FLOPs of each contestant's step over the base's; LoRA's, which is in no cost model of ours, are counted."""
    base = count_step(field.probes[BASE], field.embedded)
    tokens = field.embedded.shape[1]
    floors = {}
    for contestant, probe in field.probes.items():
        if contestant.library == "base":
            floors[contestant] = 1.0
        elif contestant.method == "lora":
            floors[contestant] = count_step(probe, field.embedded) / base
        else:
            ours = field.probes[Contestant("misscompile", contestant.method, contestant.dropout)]
            added = added_flops(ours, contestant.method, tokens, settings.r, settings.mini_r)
            floors[contestant] = (base + added) / base
    return floors


def _trials(field: Field, settings: Settings) -> dict[tuple[str, Contestant], Trial]:
    trials = {}
    for mode in settings.modes:
        for contestant, probe in field.probes.items():
            forward = compile_apart(probe) if mode == "compiled" else probe
            trials[mode, contestant] = TrainingStep(probe, forward, field.embedded).trial()
    return trials

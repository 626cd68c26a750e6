"""How the costs grow with layers and rank, and a model of 70 billion parameters on the meta device."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import misscompile
from misscompile.benchmark.contestants import BASE, Contestant, enter, fill_blocks, line_up
from misscompile.benchmark.measure import TrainingStep, Trial, ratios, spread, take_turns
from misscompile.benchmark.models import build_model
from misscompile.benchmark.settings import Settings, dtype_named
from misscompile.benchmark.tables import Column, Row, Table, milliseconds, ratio, spread_milliseconds, spread_ratio
from misscompile.state import owners

PRESET = "small"
LAYERS = (1, 4, 16, 64)
RANKS = (8, 16, 32, 64, 128, 256)
LAYERS_OF_RANKS = 4
RANK_OF_LAYERS = 8
ROUNDS = 3
TOKENS = 64
LARGE = "llama-70b"


class LifeOfAnAdapter:
    """Adapt, save, merge, and load what was saved onto a fresh model: each timed apart, in this order."""

    def __init__(self, base: Any, contestant: Contestant, settings: Settings, folder: Path) -> None:
        self._base, self._contestant, self._settings, self._folder = base, contestant, settings, folder
        self.model: Any = None

    def trials(self) -> dict[str, Trial]:
        """The four, in the order in which they need one another."""
        return {
            "adapt": Trial(lambda: enter(self.model, self._contestant, self._settings), self._start_afresh),
            "save": Trial(lambda: misscompile.save_adapter(self.model, self._folder), lambda: fill_blocks(self.model)),
            "merge": Trial(lambda: misscompile.merge(self.model)),
            "load": Trial(lambda: misscompile.load_adapter(self.model, self._folder), self._start_afresh),
        }

    def _start_afresh(self) -> None:
        self.model = copy.deepcopy(self._base)


def run(settings: Settings) -> list[Table]:
    """Three tables: by layers, by rank, and the large model; of the first variant that is asked for."""
    contestant = Contestant("misscompile", settings.variants[0])
    by_layers = [_measure(contestant, settings, layers, RANK_OF_LAYERS) for layers in LAYERS]
    by_rank = [_measure(contestant, settings, LAYERS_OF_RANKS, r) for r in RANKS]
    shape = f"`{PRESET}`, {contestant.label}, {settings.dtypes[0]}, {TOKENS} tokens, medians of {ROUNDS} rounds"
    per_layer = (
        Column("layers", "layers"),
        Column("adapt_a_layer", "adapt", milliseconds),
        Column("step_a_layer", "added to a step", milliseconds),
        Column("save_a_layer", "save", milliseconds),
        Column("load_a_layer", "load", milliseconds),
        Column("merge_a_layer", "merge", milliseconds),
        Column("ratio", "step ÷ base's", spread_ratio),
    )
    whole = (
        Column("r", "r"),
        *(Column(key, key, spread_milliseconds) for key in ("adapt", "save", "load", "merge")),
        Column("ratio", "step ÷ base's", spread_ratio),
    )
    return [
        Table("growth_layers", "Growth with layers, ms a layer", f"{shape}, r {RANK_OF_LAYERS}.", per_layer, by_layers),
        Table("growth_rank", "Growth with rank, ms", f"{shape}, {LAYERS_OF_RANKS} layers.", whole, by_rank),
        _large(contestant, settings),
    ]


def _measure(contestant: Contestant, settings: Settings, layers: int, r: int) -> Row:
    sized = settings.with_rank(r)
    base = build_model(PRESET, dtype_named(settings.dtypes[0]), settings.device, num_hidden_layers=layers)
    with tempfile.TemporaryDirectory() as folder:
        life = LifeOfAnAdapter(base, contestant, sized, Path(folder))
        seconds = take_turns(life.trials(), ROUNDS, settings.device, warmup=1)
    field = line_up([BASE, contestant], sized, PRESET, settings.dtypes[0], TOKENS, num_hidden_layers=layers)
    steps = {c: TrainingStep(probe, probe, field.embedded).trial() for c, probe in field.probes.items()}
    taken = take_turns(steps, 2 * ROUNDS, settings.device)
    added = spread(taken[contestant])["median"] - spread(taken[BASE])["median"]
    row: Row = {"layers": layers, "r": r, "ratio": ratios(taken[contestant], taken[BASE]), "step_a_layer": added / layers}
    for verb, own in seconds.items():
        row[verb] = spread(own)
        row[f"{verb}_a_layer"] = row[verb]["median"] / layers
    return row


def _large(contestant: Contestant, settings: Settings) -> Table:
    model = build_model(LARGE, torch.bfloat16, "meta")
    start = time.perf_counter()
    enter(model, contestant, settings)
    adapted = time.perf_counter()
    text = misscompile.dump(model)
    row: Row = {
        "model": LARGE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sites": len(owners(model)),
        "adapt": adapted - start,
        "dump": time.perf_counter() - adapted,
        "lines": len(text.splitlines()),
    }
    columns = (
        Column("model", "model"),
        Column("parameters", "parameters", lambda value: f"{value / 1e9:.1f} billion"),
        Column("sites", "linears"),
        Column("adapt", "adapt, s", ratio),
        Column("dump", "dump, s", ratio),
    )
    note = f"{contestant.label}, r {settings.r}, on the meta device, where nothing is allocated."
    return Table("growth_large", "A large model", note, columns, [row])

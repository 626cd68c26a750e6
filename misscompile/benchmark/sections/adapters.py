"""Sections `adapt`, `merge` and `growth`: what is done to a model beside running it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import tempfile
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

import misscompile as mc
from misscompile.benchmark.contestants import BASE, PRESETS, Contestant, build_model, contestants, enter, enter_filled
from misscompile.benchmark.internals import adapted_linears
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Row, Table, columns, milliseconds, ratio, share, text
from misscompile.benchmark.timing import Trial, ratios, spread, take_turns
from misscompile.benchmark.training import line_up

BAT_PRODUCT = "the product of bat alone"
LAYERS, RANK_OF_LAYERS = (1, 4, 16, 64), 8
RANKS, LAYERS_OF_RANKS = (8, 16, 32, 64, 128, 256), 4
ROUNDS, TOKENS = 3, 64


def adapt(settings: Settings) -> list[Table]:
    """One table: a row for each contestant; the dtype makes no difference, so the first one is taken."""
    entries = contestants(settings)[1:]
    taken: dict[str, dict[Contestant, list[float]]] = {}
    for prefix, device in (("", settings.device), ("python_", "meta")):
        fresh = functools.partial(empty_model, settings, device)
        trials = {entry: Trial(fresh, functools.partial(enter, contestant=entry, settings=settings)) for entry in entries}
        taken[prefix] = take_turns(trials, 1 + settings.rounds, device, warmup=0)  # the first time is shown apart
    linears = len(adapted_linears(enter(empty_model(settings, "meta"), entries[0], settings)))
    rows: list[Row] = []
    for entry in entries:
        ours, rival = entry.provider == "misscompile", Contestant("peft", entry.method)
        row: Row = {"contestant": entry.label, "sites": linears if ours else None, "first": taken[""][entry][0]}
        for prefix, seconds in taken.items():
            own = seconds[entry][1:]
            against = ratios(own, seconds[rival][1:]) if ours and rival in seconds else None
            row |= {f"{prefix}seconds": spread(own), f"{prefix}ratio_to_peft": against}
            row[f"{prefix}times_faster"] = 1 / against["median"] if against else None
        rows.append(row)
    note = (
        f"`{settings.model_of('smollm2-135m')}`, {settings.dtypes[0]}, r {settings.r}. First: in this process, with what is "
        "imported and built once; then the median (quartiles) over fresh models in real memory, and over fresh models on "
        "the meta device, where nothing is allocated: what is left is the Python of setting up."
    )
    shown = columns(text, contestant="contestant") + columns(str, sites="linears")
    shown += columns(milliseconds, first="first, ms", seconds="ms") + columns(ratio, times_faster="times faster than PEFT")
    python = columns(milliseconds, python_seconds="meta device, ms")
    python += columns(ratio, python_times_faster="meta device, times faster")
    return [Table("adapt", "Adapting", note, shown + python, rows)]


def empty_model(settings: Settings, device: str) -> PreTrainedModel:
    """A fresh model to adapt; the weights of a preset are allocated and not written, since no value is read."""
    name, dtype = settings.model_of("smollm2-135m"), settings.dtypes[0]
    if name not in PRESETS or device == "meta":
        return build_model(name, dtype, device)
    return build_model(name, dtype, "meta").to_empty(device=torch.device(device))


def merge(settings: Settings) -> list[Table]:
    """One table: a row for each dtype and contestant, and for the product that bat cannot do without."""
    name, rows = settings.model_of("yardstick-4"), []
    for dtype in settings.dtypes:
        adapted = enter(build_model(name, dtype, settings.device), Contestant("misscompile", settings.variants[0]), settings)
        weights = [linear.get_parameter("weight").detach() for linear in adapted_linears(adapted)]
        trials = {"copy": copying(weights)}
        for entry in contestants(settings)[1:]:
            ours = entry.provider == "misscompile"
            if ours and entry.method == "bat":
                trials[BAT_PRODUCT] = multiplying(weights, settings.r)
            prepare = functools.partial(enter_filled, build_model(name, dtype, settings.device), entry, settings)
            # the model is plain again after it
            trials[entry.label] = Trial(prepare, mc.merge if ours else operator.methodcaller("merge_and_unload"))
        taken, size = take_turns(trials, settings.rounds, settings.device), sum(weight.nbytes for weight in weights)
        for label, own in taken.items():
            row = {"dtype": dtype, "contestant": label, "bytes": size, "seconds": spread(own)}
            row["gigabytes_a_second"] = size / spread(own)["median"] / 1e9
            rows.append(row | {"bandwidth_of_copy": ratios(taken["copy"], own)})
    note = (
        f"`{name}`, r {settings.r}, mini_r {settings.mini_r}. Bytes of the weights over the time of the merge, relative to "
        "the same of copying them once into memory that is there already. A merge of bat has to multiply each weight with "
        "its block: the product alone, in float32, is the most that it could reach."
    )
    shown = columns(text, dtype="weights", contestant="contestant")
    shown += columns(share, bandwidth_of_copy="of the copy's bandwidth") + columns(ratio, gigabytes_a_second="GB/s")
    return [Table("merge", "Merging", note, shown + columns(milliseconds, seconds="ms"), rows)]


def copying(weights: list[Tensor]) -> Trial:
    """A copy of `weights` into memory that is there already."""
    pairs = [(torch.zeros_like(weight), weight) for weight in weights]
    return Trial(lambda: pairs, lambda pairs: [kept.copy_(weight) for kept, weight in pairs])


def multiplying(weights: list[Tensor], r: int) -> Trial:
    """What a merge of bat has to compute: `W[o, k] B[o]` in float32, of each weight `(out, in)` whose sizes `r` divides."""
    fitting = [weight for weight in weights if not weight.shape[0] % r and not weight.shape[1] % r]
    shards = [weight.float().reshape(weight.shape[0] // r, weight.shape[1], r) for weight in fitting]
    memory = torch.zeros(max((own.numel() for own in shards), default=0), device=weights[0].device)
    products = [
        (own, torch.full((len(own), r, r), 1e-3, device=own.device), memory[: own.numel()].view(own.shape)) for own in shards
    ]
    return Trial(lambda: products, lambda products: [torch.bmm(own, block, out=out) for own, block, out in products])


def growth(settings: Settings) -> list[Table]:
    """Three tables: by layers, by rank, and the large model; of the first variant that is asked for."""
    entry = Contestant("misscompile", settings.variants[0])
    by_layers = [_sized_row(entry, dataclasses.replace(settings, r=RANK_OF_LAYERS), layers) for layers in LAYERS]
    by_rank = [_sized_row(entry, dataclasses.replace(settings, r=r), LAYERS_OF_RANKS) for r in RANKS]
    shape = f"`small`, {entry.label}, {settings.dtypes[0]}, {TOKENS} tokens, medians of {ROUNDS} rounds"
    step = columns(ratio, ratio="step ÷ base's")
    verbs = {"adapt": "adapt", "step": "added to a step", "save": "save", "load": "load", "merge": "merge"}
    per_layer = columns(str, layers="layers")
    per_layer += columns(milliseconds, **{f"{verb}_a_layer": header for verb, header in verbs.items()}) + step
    whole = columns(str, r="r") + columns(milliseconds, adapt="adapt", save="save", load="load", merge="merge") + step
    return [
        Table("growth_layers", "Growth with layers, ms a layer", f"{shape}, r {RANK_OF_LAYERS}.", per_layer, by_layers),
        Table("growth_rank", "Growth with rank, ms", f"{shape}, {LAYERS_OF_RANKS} layers.", whole, by_rank),
        _large_table(entry, settings),
    ]


def _sized_row(entry: Contestant, settings: Settings, layers: int) -> Row:
    base = build_model("small", settings.dtypes[0], settings.device, num_hidden_layers=layers)
    steps = line_up(base, [BASE, entry], settings, TOKENS)
    taken = take_turns({key: step.trial() for key, step in steps.items()}, 2 * ROUNDS, settings.device)
    added = spread(taken[entry])["median"] - spread(taken[BASE])["median"]
    row: Row = {"layers": layers, "r": settings.r, "step_a_layer": added / layers}
    row["ratio"] = ratios(taken[entry], taken[BASE])
    plain = functools.partial(copy.deepcopy, base)
    with tempfile.TemporaryDirectory() as folder:
        trials: dict[str, Trial] = {  # what is loaded was saved before in the same round
            "adapt": Trial(plain, lambda model: enter(model, entry, settings)),
            "save": Trial(lambda: enter_filled(plain(), entry, settings), lambda model: mc.save_adapter(model, folder)),
            "merge": Trial(lambda: enter_filled(plain(), entry, settings), mc.merge),
            "load": Trial(plain, lambda model: mc.load_adapter(model, folder)),
        }
        for verb, own in take_turns(trials, ROUNDS, settings.device).items():
            row |= {verb: spread(own), f"{verb}_a_layer": spread(own)["median"] / layers}
    return row


def _large_table(entry: Contestant, settings: Settings) -> Table:
    model = build_model("llama-70b", "bfloat16", "meta")
    start = time.perf_counter()
    enter(model, entry, settings)
    adapted = time.perf_counter()
    lines = len(mc.dump(model).splitlines())
    row: Row = {"adapt": adapted - start, "dump": time.perf_counter() - adapted, "lines": lines, "model": "llama-70b"}
    row |= {"sites": len(adapted_linears(model)), "parameters": sum(weight.numel() for weight in model.parameters())}
    shown = columns(text, model="model") + columns(lambda count: f"{count / 1e9:.1f} billion", parameters="parameters")
    shown += columns(str, sites="linears") + columns(ratio, adapt="adapt, s", dump="dump, s")
    note = f"{entry.label}, r {settings.r}, on the meta device, where nothing is allocated."
    return Table("growth_large", "A large model", note, shown, [row])

"""Sections `steps`, `memory` and `decode`: what running an adapted model takes over the frozen base."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import misscompile as mc
from misscompile.benchmark.contestants import BASE, Contestant, build_model, contestants, enter_filled
from misscompile.benchmark.internals import added_flops
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Row, Table, change, columns, mebibytes, milliseconds, ratio, text
from misscompile.benchmark.timing import Trial, over, ratios, spread, take_turns
from misscompile.benchmark.training import Steps, line_up

PROMPT, DECODED = 16, 3
CACHED = ", cached weight"
SAME_PARTITION = "aot_eager_decomp_partition"  # keeps for the backward what Inductor keeps, and generates no code
IDENTITY = columns(text, dtype="base", mode="mode", contestant="contestant")


def steps(settings: Settings) -> list[Table]:
    """One table: a row for each dtype, mode and contestant; bat in 16 bits also with `W + ΔW` rounded to them."""
    model, rows = settings.model_of("yardstick"), []
    for dtype in settings.dtypes:
        entries = contestants(settings)
        exact = Contestant("misscompile", "bat")
        if exact in entries and dtype != "float32":
            entries.insert(entries.index(exact) + 1, dataclasses.replace(exact, round_bat_weight=True))
        base = build_model(model, dtype, settings.device)
        eager = line_up(base, entries, settings, settings.tokens)
        floors = step_floors(eager, settings)
        compiled = {entry: step.compiled("inductor") for entry, step in eager.items()}
        lined_up = {mode: eager if mode == "eager" else compiled for mode in settings.modes}
        trials = {(mode, entry): step.trial() for mode, own in lined_up.items() for entry, step in own.items()}
        taken = take_turns(trials, settings.rounds, settings.device)
        for mode, own in lined_up.items():
            for row, entry in zip(_memory_rows(own, dtype, mode), own, strict=True):
                against, floor = ratios(taken[mode, entry], taken[mode, BASE]), floors[entry]
                row |= {"method": entry.method, "seconds": spread(taken[mode, entry])}
                rows.append(row | {"ratio": against, "floor": floor, "over_floor": against["median"] / floor})
    note = (
        f"`{model}`, layers: {base.config.num_hidden_layers}, {settings.tokens} tokens, r {settings.r}, "
        f"mini_r {settings.mini_r}. Ratio: a step over the frozen base's step of the same round, median "
        "(quartiles). Floor: the same ratio in FLOPs. Saved: bytes kept for the backward, and peak: "
        "the most memory of a step, over the base's. Rounded: `adapt(..., round_bat_weight=True)`."
    )
    timed = columns(ratio, floor="floor", ratio="ratio to the base", over_floor="ratio ÷ floor")
    timed += columns(milliseconds, seconds="ms a step")
    held = columns(change, saved_over_base="saved", peak_over_base="peak")
    return [Table("steps", "Training step", note, IDENTITY + timed + held, rows)]


def memory(settings: Settings) -> list[Table]:
    """One table: a row for each mode and contestant, in float32 if that is among the dtypes; balance also with dropout."""
    model, tokens = settings.model_of("yardstick-4"), settings.tokens // 2
    dtype = "float32" if "float32" in settings.dtypes else settings.dtypes[0]
    entries = contestants(settings)
    entries += [dataclasses.replace(entry, dropout=0.1) for entry in entries if entry.method == "balance"]
    eager = line_up(build_model(model, dtype, settings.device), entries, settings, tokens)
    # Under the compiler, dropout and its mask are the compiler's own, whoever asks for them.
    compiled = {entry: step.compiled(SAME_PARTITION) for entry, step in eager.items() if not entry.dropout}
    rows: list[Row] = []
    for mode in settings.modes:
        found = _memory_rows(eager if mode == "eager" else compiled, dtype, mode, with_peak=mode == "eager")
        balance = [row["saved"] for row in found if row["contestant"] == "misscompile balance"]
        rows += [row | {"saved_over_balance": row["saved"] / balance[0] if balance else None} for row in found]
    note = (
        f"`{model}`, {tokens} tokens, r {settings.r}, mini_r {settings.mini_r}. Saved: distinct storages "
        "kept for the backward, parameters left out. Peak: the most a step holds beyond what was allocated before it "
        "(compiled: in the table of the steps)."
    )
    saved = columns(mebibytes, saved="saved, MiB") + columns(change, saved_over_base="over the base")
    peak = columns(mebibytes, peak="peak, MiB") + columns(change, peak_over_base="over the base")
    shown = IDENTITY + saved + columns(ratio, saved_over_balance="÷ balance's") + peak
    return [Table("memory", "Memory of a training step", note, shown, rows)]


def _memory_rows(steps: Steps, dtype: str, mode: str, with_peak: bool = True) -> list[Row]:
    """For each step what it keeps and its peak, in bytes and over the base's, which is the first."""
    rows: list[Row] = []
    for entry, step in steps.items():
        step.clear().run()  # what is made once, compiled code above all, is no part of a step
        peak = step.peak_bytes() if with_peak else None
        names = {"dtype": dtype, "mode": mode, "contestant": entry.label, "provider": entry.provider}
        rows.append({**names, "saved": step.saved_bytes(), "peak": peak})
    for row in rows:
        row |= {f"{key}_over_base": over(row[key], rows[0][key]) for key in ("saved", "peak")}
    return rows


def step_floors(steps: Steps, settings: Settings) -> dict[Contestant, float]:
    """The least FLOPs of each contestant's step over the base's; LoRA's, which is in no cost model of ours, are counted."""
    base, floors = steps[BASE].flops(), {}
    for entry, step in steps.items():
        if entry.method in ("", "lora"):
            least = step.flops()
        else:
            ours = steps[dataclasses.replace(entry, provider="misscompile")]
            least = base + added_flops(ours.model, entry.method, ours.x.shape[1], settings.r, settings.mini_r)
        floors[entry] = least / base
    return floors


def decode(settings: Settings) -> list[Table]:
    """One table: a row for each dtype and contestant, and for ours with the effective weight kept."""
    name, rows = settings.model_of("smollm2-135m"), []
    for dtype in settings.dtypes:
        base = build_model(name, dtype, settings.device)
        models: dict[str, nn.Module] = {}
        for entry in contestants(settings):
            models[entry.label] = model = enter_filled(share_weights(base), entry, settings)
            if entry.provider == "misscompile":
                models[entry.label + CACHED] = mc.merge(copy.deepcopy(model), keep_adapters=True)
        read = {label: sum(parameter.nbytes for parameter in model.parameters()) for label, model in models.items()}
        generator = torch.Generator().manual_seed(4)
        prompt = torch.randint(0, base.config.vocab_size, (1, PROMPT), generator=generator).to(settings.device)
        trials = {label: _decoding(model, prompt) for label, model in models.items()}
        taken = take_turns(trials, settings.rounds, settings.device)
        for label, own in taken.items():
            more = over(read[BASE.label if label.endswith(CACHED) else label], read[BASE.label])
            row = {"dtype": dtype, "contestant": label, "bytes_over_base": more, "ratio": ratios(own, taken[BASE.label])}
            rows.append(row | {"seconds_a_token": spread([seconds / DECODED for seconds in own])})
    note = (
        f"`{name}`, batch 1, eager, r {settings.r}, mini_r {settings.mini_r}: {DECODED} tokens after a prompt of {PROMPT}. "
        "Bytes: the parameters that a token reads, over the base's. Cached weight: `misscompile.merge(model, "
        "keep_adapters=True)`, which reads neither the blocks nor the base weights that it keeps."
    )
    shown = columns(text, dtype="base", contestant="contestant") + columns(change, bytes_over_base="bytes over the base")
    shown += columns(ratio, ratio="ratio to the base") + columns(milliseconds, **{"seconds_a_token": "ms a token"})
    return [Table("decode", "Decoding", note, shown, rows)]


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules of `base` on its own parameters; of copied ones, the first would get the large pages."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def _decoding(model: nn.Module, prompt: Tensor) -> Trial:
    """`DECODED` tokens after `prompt (1, PROMPT)`, whose keys and values are there already."""
    model.eval()
    cache = DynamicCache()

    @torch.no_grad()
    def decode(tokens: Tensor, steps: int = DECODED) -> Tensor:
        for _ in range(steps):
            tokens = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return tokens

    first = decode(prompt, steps=1)

    def forget() -> Tensor:
        surplus = cache.get_seq_length() - PROMPT
        if surplus:
            cache.crop(-surplus)
        return first

    return Trial(forget, decode)

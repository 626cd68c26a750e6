"""Greedy decoding with a key-value cache, batch 1, eager: milliseconds a token."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import misscompile
from misscompile.benchmark.contestants import BASE, enter, entries, fill_blocks, share_weights
from misscompile.benchmark.measure import Trial, over, ratios, spread, take_turns
from misscompile.benchmark.models import build_model
from misscompile.benchmark.settings import Settings, dtype_named
from misscompile.benchmark.tables import Column, Row, Table, percent, spread_milliseconds, spread_ratio

PRESET = "smollm2-135m"
PROMPT, DECODED = 16, 3


class Decoding:
    """Decodes `DECODED` tokens after a prompt whose keys and values are there already.

    Args:
        model: a causal language model, adapted or not.
        prompt: token ids `(1, PROMPT)`.
    """

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self._model, self._cache = model.eval(), DynamicCache()
        self._first = self._next = self._predict(prompt)

    def prepare(self) -> None:
        """Forget what was decoded, and keep the keys and values of the prompt."""
        surplus = self._cache.get_seq_length() - PROMPT
        if surplus:
            self._cache.crop(-surplus)
        self._next = self._first

    def run(self) -> None:
        for _ in range(DECODED):
            self._next = self._predict(self._next)

    @torch.no_grad()
    def _predict(self, tokens: Tensor) -> Tensor:
        output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        best: Tensor = output.logits[:, -1:].argmax(-1)
        return best


def run(settings: Settings) -> list[Table]:
    """One table: a row for each dtype and contestant, and for ours with the effective weight kept."""
    rows = [row for dtype in settings.dtypes for row in _rows(settings, dtype)]
    note = (
        f"`{settings.preset(PRESET)}`, batch 1, eager, r {settings.r}, mini_r {settings.mini_r}: {DECODED} tokens after a "
        f"prompt of {PROMPT}. Bytes: the parameters that a token reads, over the base's. Cached weight: "
        "`misscompile.merge(model, keep_adapters=True)`, which reads neither the blocks nor the base weights that it keeps."
    )
    columns = (
        Column("dtype", "base"),
        Column("contestant", "contestant"),
        Column("bytes_over_base", "bytes over the base", percent),
        Column("ratio", "ratio to the base", spread_ratio),
        Column("seconds_a_token", "ms a token", spread_milliseconds),
    )
    return [Table("decode", "Decoding", note, columns, rows)]


def _rows(settings: Settings, dtype: str) -> list[Row]:
    """All read the same base weights in memory: with a copy for each, a machine's large pages go to the first ones.

    A merged model has weights of its own.
    """
    base = build_model(settings.preset(PRESET), dtype_named(dtype), settings.device)
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(0, base.config.vocab_size, (1, PROMPT), generator=generator).to(settings.device)
    trials: dict[str, Trial] = {}
    read: dict[str, int] = {}
    for contestant in entries(settings):
        model = enter(share_weights(base), contestant, settings)
        fill_blocks(model)
        models = {contestant.label: model}
        read[contestant.label] = parameter_bytes(model)
        if contestant.provider == "misscompile":
            cached = f"{contestant.label}, cached weight"
            models[cached] = misscompile.merge(copy.deepcopy(model), keep_adapters=True)
            read[cached] = parameter_bytes(base)
        for label, entered in models.items():
            decoding = Decoding(entered, prompt)
            trials[label] = Trial(decoding.run, decoding.prepare)
    seconds = take_turns(trials, settings.rounds, settings.device)
    return [
        {
            "dtype": dtype,
            "contestant": label,
            "bytes_over_base": over(read[label], read[BASE.label]),
            "seconds_a_token": spread([value / DECODED for value in own]),
            "ratio": ratios(own, seconds[BASE.label]),
        }
        for label, own in seconds.items()
    ]


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the distinct parameters of a model."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

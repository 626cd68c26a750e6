"""Who runs: the frozen base, misscompile's variants, and what PEFT has against them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import misscompile
from misscompile.benchmark.models import Probe, build_model, hidden_size, random_input
from misscompile.benchmark.settings import Settings, dtype_named

Provider = Literal["base", "misscompile", "peft"]
Form = Literal["", "rounded"]

INIT_WEIGHTS: dict[str, bool | str] = {"balance": True, "mini": "mini", "bat": "bat"}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A library and what it adds to the base.

    Args:
        provider: "base" adds nothing.
        method: a variant of MiSS, "lora", or "" for the base.
        dropout: probability of the adapter's dropout.
        form: "rounded" is bat with `round_bat_weight`.
    """

    provider: Provider
    method: str = ""
    dropout: float = 0.0
    form: Form = ""

    @property
    def label(self) -> str:
        suffix = f" dropout {self.dropout:g}" if self.dropout else ""
        name = f"{self.provider} {self.method}{suffix}".strip()
        return f"{name}, {self.form}" if self.form else name


BASE = Contestant("base")


def entries(settings: Settings, variants: tuple[str, ...] | None = None) -> list[Contestant]:
    """The base first, then each variant of misscompile and PEFT side by side, then LoRA."""
    found = [BASE]
    for variant in settings.variants if variants is None else variants:
        found.append(Contestant("misscompile", variant))
        if "peft" in settings.against:
            found.append(Contestant("peft", variant))
    if "lora" in settings.against:
        found.append(Contestant("peft", "lora"))
    return found


def lora_rank(r: int) -> int:
    """The rank at which LoRA has as many parameters as balance of rank `r` on a square layer."""
    return max(1, r // 2)


def enter(model: PreTrainedModel, contestant: Contestant, settings: Settings) -> nn.Module:
    """`model` with what the contestant adds, at its start values; changed in place."""
    if contestant.provider == "base":
        return model
    if contestant.method == "lora":
        rank = lora_rank(settings.r)
        lora = peft.LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=contestant.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return _peft_model(model, lora)
    fields: dict[str, Any] = {
        "r": settings.r,
        "mini_r": settings.mini_r,
        "miss_dropout": contestant.dropout,
        "init_weights": INIT_WEIGHTS[contestant.method],
        "target_modules": "all-linear",
    }
    if contestant.provider == "misscompile":
        adapted: nn.Module = misscompile.adapt(model, fields, round_bat_weight=contestant.form == "rounded")
        return adapted
    return _peft_model(model, peft.MissConfig(**fields))


def _peft_model(model: PreTrainedModel, config: peft.PeftConfig) -> nn.Module:
    adapted: nn.Module = peft.get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    return adapted


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules of `base` whose parameters are those of `base` themselves: for what never writes to them."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


@torch.no_grad()
def fill_blocks(model: nn.Module) -> None:
    """Give every trainable parameter small random values, so that no product is one with zeros."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))


@dataclasses.dataclass
class Field:
    """Every contestant on a model of its own with the same base weights, and the input that all are given."""

    base: PreTrainedModel
    probes: dict[Contestant, Probe]
    embedded: Tensor


def line_up(
    contestants: list[Contestant], settings: Settings, preset: str, dtype_name: str, tokens: int, **overrides: Any
) -> Field:
    """Build `preset` once and give each contestant a copy."""
    dtype, device = dtype_named(dtype_name), settings.device
    base = build_model(preset, dtype, device, **overrides)
    probes = {}
    for contestant in contestants:
        model = enter(copy.deepcopy(base), contestant, settings)
        fill_blocks(model)
        probes[contestant] = Probe(model, hidden_size(base), dtype, device)
    return Field(base, probes, random_input(base, tokens, device))

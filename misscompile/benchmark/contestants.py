"""Who runs: the frozen base, and what misscompile and PEFT add to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import misscompile as mc
from misscompile.benchmark.settings import VARIANTS, BenchmarkError, Settings

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")

PRESETS: dict[str, tuple[int, ...]] = {
    "yardstick": (768, 2048, 1, 12, 12, 64),
    "yardstick-4": (768, 2048, 4, 12, 12, 64),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-70b": (8192, 28672, 80, 64, 8, 128256),
    "small": (256, 512, 4, 4, 4, 64),
    "tiny": (32, 64, 2, 4, 4, 64),
}
"""The `SHAPE` of Llamas by name. Few layers have a small vocabulary: the output layer of a real one would be most of their
step and hide what adapters cost."""


def build_model(name: str, dtype: str, device: str = "cpu", **overrides: Any) -> PreTrainedModel:
    """A causal language model with every weight frozen, in training mode.

    Args:
        name: a name in `PRESETS` (random weights, equal at every call), or a folder or Hub id with real ones.
        dtype: of all weights, one of `settings.DTYPES`.
        device: where they are; "meta" allocates nothing.
        overrides: fields of the configuration of a preset to replace.

    Raises:
        BenchmarkError: no preset, folder or Hub id has this name.
    """
    torch.manual_seed(0)
    loader: Any = AutoModelForCausalLM  # its class methods carry no types
    model: Any
    if name in PRESETS:
        fields = dict(zip(SHAPE, PRESETS[name], strict=True)) | {"tie_word_embeddings": name == "smollm2-135m"} | overrides
        with torch.device(device):
            model = loader.from_config(LlamaConfig(**fields), dtype=getattr(torch, dtype))
    else:
        try:
            AutoConfig.from_pretrained(name)
            model = loader.from_pretrained(name, dtype=getattr(torch, dtype)).to(device)
        except (OSError, ValueError) as error:
            reason = f"nor a model that can be loaded: {str(error).strip().splitlines()[0]}"
            raise BenchmarkError(f"--model {name!r} is neither a preset ({', '.join(PRESETS)}) {reason}") from error
    frozen: PreTrainedModel = model.requires_grad_(False).train()
    return frozen


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A library and what it adds to the base: a variant of MiSS, "lora", or nothing."""

    provider: str
    method: str = ""
    dropout: float = 0.0
    round_bat_weight: bool = False

    @property
    def label(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.provider} {self.method}".strip() + dropout + (", rounded" if self.round_bat_weight else "")


BASE = Contestant("base")


def contestants(settings: Settings) -> list[Contestant]:
    """The base first, then each variant of misscompile and PEFT side by side, then LoRA."""
    providers = ("misscompile", "peft") if "peft" in settings.against else ("misscompile",)
    lora = [Contestant("peft", "lora")] if "lora" in settings.against else []
    return [BASE, *(Contestant(provider, variant) for variant in settings.variants for provider in providers), *lora]


def enter(model: PreTrainedModel, contestant: Contestant, settings: Settings) -> nn.Module:
    """`model` with what the contestant adds, at its start values; changed in place."""
    if contestant.provider == "base":
        return model
    narrowest = min(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    if settings.r > narrowest:  # all-linear would leave those out, and PEFT would not
        raise mc.ConfigError(f"r={settings.r} is more than the {narrowest} input features of a linear of the model.")
    fields: dict[str, Any] = {"r": settings.r, "target_modules": "all-linear"}
    config: peft.PeftConfig
    if contestant.method == "lora":
        fields["r"] = fields["lora_alpha"] = max(1, settings.r // 2)  # on a square layer as many parameters as balance
        config = peft.LoraConfig(**fields, lora_dropout=contestant.dropout, task_type="CAUSAL_LM")
    else:
        fields |= {"mini_r": settings.mini_r, "miss_dropout": contestant.dropout}
        fields["init_weights"] = VARIANTS[contestant.method]
        if contestant.provider == "misscompile":
            return mc.adapt(model, fields, round_bat_weight=contestant.round_bat_weight)
        config = peft.MissConfig(**fields)
    adapted: nn.Module = peft.get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    return adapted


@torch.no_grad()
def enter_filled(model: PreTrainedModel, contestant: Contestant, settings: Settings) -> nn.Module:
    """As `enter`, with small random values in what the contestant adds, so that no product is one with zeros."""
    adapted = enter(model, contestant, settings)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=generator))
    return adapted

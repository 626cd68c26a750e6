"""The models that are measured, and the probe that sends a gradient through every layer of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from misscompile.benchmark.settings import BenchmarkError

YARDSTICK_LAYER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    # An output layer of a real vocabulary would be most of the step of so few layers and hide what adapters cost.
    "vocab_size": 64,
}

PRESETS: dict[str, dict[str, Any]] = {
    "yardstick": {**YARDSTICK_LAYER, "num_hidden_layers": 1},
    "yardstick-4": {**YARDSTICK_LAYER, "num_hidden_layers": 4},
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 64,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    },
}
"""Llama configurations by name; their weights are random."""


def build_model(name: str, dtype: torch.dtype, device: str = "cpu", **overrides: Any) -> PreTrainedModel:
    """A causal language model with every weight frozen, in training mode.

    Args:
        name: a name in `PRESETS` (random weights, equal at every call), or a folder or Hub id with real ones.
        dtype: of all weights.
        device: where they are; "meta" allocates nothing.
        overrides: fields of the configuration of a preset to replace.

    Raises:
        BenchmarkError: no preset, folder or Hub id has this name.
    """
    torch.manual_seed(0)
    loader: Any = AutoModelForCausalLM  # its class methods carry no types
    model: PreTrainedModel
    if name in PRESETS:
        with torch.device(device):
            model = loader.from_config(LlamaConfig(**{**PRESETS[name], **overrides}), dtype=dtype)
    else:
        try:
            AutoConfig.from_pretrained(name)
            model = loader.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BenchmarkError(
                f"--model {name!r} is neither a preset ({', '.join(PRESETS)}) nor a model that can be loaded: {reason}"
            ) from error
        model.to(torch.device(device))  # type: ignore[arg-type]  # a decorator loses the signature
    model.requires_grad_(False)
    model.train()
    return model


class Probe(nn.Module):
    """A model whose input carries a gradient: one trainable vector is added to the output of the embedding.

    The backward of a frozen base thus runs through every layer for its input gradient, as an adapted model's does.

    Args:
        model: a causal language model, adapted or not.
        hidden: width of its embedding.
    """

    def __init__(self, model: nn.Module, hidden: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device))

    def forward(self, embedded: Tensor) -> Tensor:
        """Logits `(1, tokens, vocabulary)` of `embedded (1, tokens, hidden)`."""
        output: Tensor = self.model(inputs_embeds=embedded + self.shift, use_cache=False)[0]
        return output


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the embedding of `model`."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.embedding_dim


def random_input(model: PreTrainedModel, tokens: int, device: str) -> Tensor:
    """A fixed random embedding `(1, tokens, hidden)` in the dtype of `model`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, tokens, hidden_size(model), generator=generator).to(device, model.dtype)

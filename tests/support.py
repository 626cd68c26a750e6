"""What many tests need: tiny models, non-zero blocks, and the formulas of MiSS written out once more, slowly, in fp64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import misscompile as mc

VARIANTS: tuple[Any, ...] = (True, "mini", "bat")
"""`init_weights` of the three algebras."""


def stable_id(value: Any) -> str:
    """A name for a test's parameter that is the same in every process: no addresses, sets in order."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(value, key=repr)}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def fill_blocks(model: nn.Module, std: float = 0.05, seed: int = 1) -> nn.Module:
    """Give every block random values, the same for every model with the same block names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "miss_block" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.data.copy_(values)
    return model


def adapted(model: nn.Module, init_weights: Any = True, **fields: Any) -> nn.Module:
    """`model` with random non-zero blocks on all its linears."""
    values = {"r": 4, "mini_r": 2, "target_modules": "all-linear", "init_weights": init_weights} | fields
    return fill_blocks(mc.adapt(model, mc.MissConfig(**values)))


def reference_delta(init_weights: Any, block: Tensor, weight: Tensor) -> Tensor:
    """`ΔW (out, in)` element by element, from the formulas, in fp64."""
    block, weight = block.detach().double(), weight.detach().double()
    out_features, in_features = weight.shape
    delta = torch.zeros(out_features, in_features, dtype=torch.float64)
    if init_weights == "bat":
        r = block.shape[-1]
        for o in range(out_features // r):
            for k in range(in_features // r):
                piece = weight[o * r : (o + 1) * r, k * r : (k + 1) * r]
                delta[o * r : (o + 1) * r, k * r : (k + 1) * r] = piece @ block[o] + block[o]
        return delta
    r, columns = block.shape
    for o in range(out_features):
        for i in range(in_features):
            delta[o, i] = block[i % r, o % columns]
    return delta


def max_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).abs().max())


def rms_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).pow(2).mean().sqrt())


class TwoLinears(nn.Module):
    """Two non-square linears of different shape, one without a bias, with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 8, bias=False)
        self.down = nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def tiny_llama(**overrides: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(values | overrides))).eval()


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, n_inner=48)).eval()


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).eval()


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=3,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return ViTForImageClassification(config).eval()


def token_batch(batch: int = 2, length: int = 7, vocabulary: int = 64) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (tiny_llama, lambda: {"input_ids": token_batch(), "labels": token_batch()}),
    "gpt2": (tiny_gpt2, lambda: {"input_ids": token_batch(), "labels": token_batch()}),
    "bert": (tiny_bert, lambda: {"input_ids": token_batch(), "labels": torch.tensor([0, 2])}),
    "t5": (tiny_t5, lambda: {"input_ids": token_batch(), "labels": token_batch()}),
    "vit": (
        tiny_vit,
        lambda: {
            "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
            "labels": torch.tensor([0, 2]),
        },
    ),
}
"""Name to a maker of the tiny model and of one batch with labels."""

"""Tiny random models for the comparison with PEFT: how to make one, a batch, what to adapt, where the two differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from support import MODELS, token_batch
from torch import Tensor, nn

_INIT_STD = 0.2  # wide enough for an adapter to show in the output


@dataclasses.dataclass(frozen=True)
class Case:
    """One model. `r` of bat is 8 and `mini_r` is 4: they divide every width of the targets."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    targets: list[str] | str
    excluded: str
    """A target to leave out in the test of exclude_modules."""
    queries: tuple[str, ...] = ("q_proj", "v_proj")
    """Targets in the test of layers_to_transform."""
    head: str | None = None
    """A module to train in full in the test of modules_to_save."""
    peft_refuses: type[Exception] | None = None
    """What PEFT raises where we adapt, on purpose."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 24)])
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        y: Tensor = self.head(x)
        return y


class ConvolutionAndLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 4, 3), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.hidden(torch.relu(self.conv(x)).flatten(1))))
        return y


class EmbeddingAndLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(64, 16), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.hidden(self.embed(x))))
        return y


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return made


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": _INIT_STD,
}
_TEXT = _SIZES | {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = _TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_ENCODER = _TEXT | {"max_position_embeddings": 40, "num_labels": 3}
_IMAGES = _SIZES | {"image_size": 16, "patch_size": 8}


def _of(name: str, values: dict[str, Any], model: str) -> Callable[[], nn.Module]:
    """A model of `transformers` by the names of its config and class."""
    return _seeded(lambda: getattr(transformers, model)(getattr(transformers, name)(**values)))


def _clip() -> nn.Module:
    text = _TEXT | {"max_position_embeddings": 16, "projection_dim": 24}
    values = {"text_config": text, "vision_config": _IMAGES | {"projection_dim": 24}, "projection_dim": 24}
    return transformers.CLIPModel(transformers.CLIPConfig(**values))  # type: ignore[no-any-return]


_WHISPER = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 8, "vocab_size": 64},
    **{"max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"suppress_tokens": None, "begin_suppress_tokens": None, "init_std": _INIT_STD},
}
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 32}
_OPT = _TEXT | {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, "init_std": _INIT_STD}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": token_batch(), "labels": token_batch()}


def _classes() -> dict[str, Tensor]:
    return {"input_ids": token_batch(), "labels": torch.tensor([0, 2])}


_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]

CASES: dict[str, Case] = {
    "mlp": Case(_seeded(Mlp), lambda: {"x": _normal(3, 24)}, ["0", "1", "2"], "1", ("0", "1", "2"), "head"),
    "convolution": Case(_seeded(ConvolutionAndLinear), lambda: {"x": _normal(3, 3, 4, 4)}, ["hidden"], "head", head="head"),
    "embedding": Case(_seeded(EmbeddingAndLinear), lambda: {"x": token_batch()}, ["hidden"], "head", head="head"),
    "llama": Case(*MODELS["llama"], "all-linear", "down_proj", head="model.norm"),
    "mistral": Case(_of("MistralConfig", _DECODER, "MistralForCausalLM"), _tokens, "all-linear", "q_proj"),
    "qwen2": Case(_of("Qwen2Config", _DECODER, "Qwen2ForCausalLM"), _tokens, "all-linear", "q_proj"),
    "gemma": Case(_of("GemmaConfig", _DECODER | {"head_dim": 8}, "GemmaForCausalLM"), _tokens, "all-linear", "q_proj"),
    "phi": Case(_of("PhiConfig", _DECODER, "PhiForCausalLM"), _tokens, "all-linear", "q_proj"),
    "gpt2": Case(*MODELS["gpt2"], ["c_attn", "c_proj", "c_fc"], "c_fc", peft_refuses=TypeError),
    "opt": Case(_of("OPTConfig", _OPT, "OPTForCausalLM"), _tokens, "all-linear", "q_proj"),
    "bert": Case(*MODELS["bert"], _BERT, "key", ("query", "value"), "classifier"),
    "roberta": Case(_of("RobertaConfig", _ENCODER, "RobertaForSequenceClassification"), _classes, _BERT, "key"),
    "distilbert": Case(
        _of("DistilBertConfig", _DISTILBERT | {"num_labels": 3}, "DistilBertForSequenceClassification"),
        _classes,
        ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
        "k_lin",
    ),
    "t5": Case(*MODELS["t5"], "all-linear", "wi"),
    "vit": Case(*MODELS["vit"], ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], "fc1", head="classifier"),
    "clip": Case(
        _seeded(_clip),
        lambda: {"input_ids": token_batch(), "pixel_values": _normal(2, 3, 16, 16), "return_loss": torch.tensor(True)},
        "all-linear",
        "visual_projection",
    ),
    "whisper": Case(
        _of("WhisperConfig", _WHISPER, "WhisperForConditionalGeneration"),
        lambda: {"input_features": _normal(2, 8, 16), "labels": token_batch()},
        "all-linear",
        "fc1",
    ),
}

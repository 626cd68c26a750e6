"""Tiny models to adapt as whole graphs, in fp64 so that a tolerance hides nothing."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from support import MODELS, token_batch
from torch import Tensor, fx, nn

import misscompile as mc

Batch = dict[str, Tensor]


def tiny_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


def tiny_whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        vocab_size=64,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config).eval()


def tiny_albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=64,
        embedding_size=8,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return AlbertModel(config).eval()


class Decoding(nn.Module):
    """Two layers of `nn.TransformerDecoder`: self-attention, and cross-attention with key and value in one product."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(x, memory)  # type: ignore[no-any-return]


class CrossAttending(nn.Module):
    """An attention over keys and values of other widths, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, kdim=12, vdim=20, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.head(self.attn(x, key, value, need_weights=False)[0])  # type: ignore[no-any-return]


class ConvolutionNet(nn.Module):
    """Bottleneck blocks with 1×1 convolutions, batch norms and a linear head, as torchvision's are built."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.narrow = nn.Conv2d(8, 4, 1, bias=False)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.widen = nn.Conv2d(4, 16, 1)
        self.shortcut = nn.Conv2d(8, 16, 1, bias=False)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.widen(torch.tanh(self.middle(torch.tanh(self.narrow(x)))))
        return self.head(torch.tanh(y + self.shortcut(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tiny_encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _seeded(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind().eval()

    return make


def _whisper_batch() -> Batch:
    return {"input_features": _random(2, 8, 16), "labels": token_batch(2, 6)}


def _clip_batch() -> Batch:
    return {"input_ids": token_batch(2, 6), "pixel_values": _random(2, 3, 16, 16)}


ALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = MODELS | {
    "clip": (tiny_clip, _clip_batch),
    "whisper": (tiny_whisper, _whisper_batch),
    "albert": (tiny_albert, lambda: {"input_ids": token_batch()}),
    "encoder": (tiny_encoder, lambda: {"src": _random(3, 5, 16)}),
    "decoder": (_seeded(Decoding), lambda: {"x": _random(3, 5, 16), "memory": _random(3, 4, 16, seed=4)}),
    "cross attention": (
        _seeded(CrossAttending),
        lambda: {"x": _random(3, 5, 16), "key": _random(3, 4, 12, seed=4), "value": _random(3, 4, 20, seed=5)},
    ),
    "convolutions": (_seeded(ConvolutionNet), lambda: {"x": _random(2, 3, 12, 10)}),
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """The frozen model and its graph, by `capture`, or of the convolution network by `symbolic_trace`."""
    model = make_model(name)
    if name == "convolutions":
        return model, fx.symbolic_trace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, mc.capture(model, kwargs=make_batch(name))


def make_model(name: str) -> nn.Module:
    return ALL[name][0]().double().requires_grad_(False)


def make_batch(name: str) -> Batch:
    batch = ALL[name][1]()
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(output: Any) -> Tensor:
    """The loss of the model, or the sum of the squares of what it returns."""
    loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else torch.stack([t.pow(2).sum() for t in tensors(output)]).sum()


def largest_difference(first: Any, second: Any) -> float:
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    assert pairs
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)

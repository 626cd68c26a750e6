"""The models that the tests adapt: tiny ones of `transformers`, small modules of PyTorch, and one weight in one call.

`ZOO` holds every whole model with a batch for it. `captured` has its frozen fp64 copy and that copy's graph.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import misscompile as mc

Batch = dict[str, Tensor]
IN, OUT = 8, 12
"""The sizes of the weight of `holder`."""


# Modules


class TwoLinears(nn.Module):
    """Two non-square linears of different shape, one without a bias, with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 8, bias=False)
        self.down = nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


class Holder(nn.Module):
    """A module with one weight, of which `rule(weight, bias, x)` is the forward."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], bias: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(bias, dtype=torch.float64))
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.weight, self.bias, x)


class Model(nn.Module):
    """`proj` between two elementwise functions, so that the gradient of neither side is constant."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(torch.sin(x))
        return torch.tanh(y / 4)


class Repeating(nn.Module):
    """One linear that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return x


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


class BetweenOthers(nn.Module):
    """A linear and a linear head behind a module of another kind, a convolution or an embedding."""

    def __init__(self, first: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.hidden, self.head = first(), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.head(torch.relu(self.hidden(y if y.shape[-1] == 16 else y.flatten(1))))  # type: ignore[no-any-return]


def seeded(make: Callable[..., nn.Module], *args: Any) -> Callable[[], nn.Module]:
    """A maker of the same values every time, in evaluation mode."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return make(*args).eval()

    return made


two_linears = seeded(TwoLinears)


def holder(rule: Callable[..., Tensor], shape: tuple[int, ...] = (OUT, IN), bias: int = OUT) -> Model:
    torch.manual_seed(0)
    return Model(Holder(rule, shape, bias))


# Models of transformers

_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {"initializer_range": 0.2}  # wide enough for an adapter to show in the output
_TEXT = _SIZES | {"vocab_size": 64, "pad_token_id": 0}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_DECODER = _LLAMA | _ENDS | _WIDE
_ENCODER = _TEXT | _ENDS | _WIDE | {"max_position_embeddings": 40, "num_labels": 3}
_IMAGES = _SIZES | _WIDE | {"image_size": 16, "patch_size": 8}
_CLIP_TEXT = _TEXT | _ENDS | _WIDE | {"max_position_embeddings": 16, "projection_dim": 24}
_WHISPER: dict[str, Any] = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 8, "vocab_size": 64},
    **{"max_target_positions": 32, "pad_token_id": 0, "decoder_start_token_id": 1, "init_std": 0.2},
    **{"suppress_tokens": None, "begin_suppress_tokens": None},
}
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 32}
_OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.2}
_ALBERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "embedding_size": 8}

_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _DECODER | {"head_dim": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", _DECODER),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, "n_inner": 48},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", _TEXT | _ENDS | _OPT),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        _SIZES | _WIDE | {"vocab_size": 64, "max_position_embeddings": 32, "num_labels": 3},
    ),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _ENCODER),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", _DISTILBERT | {"num_labels": 3}),
    "albert": ("AlbertConfig", "AlbertModel", _ALBERT | _WIDE | {"vocab_size": 64, "max_position_embeddings": 32}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 64,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _IMAGES | {"num_labels": 3}),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": _CLIP_TEXT, "vision_config": _IMAGES | {"projection_dim": 24}, "projection_dim": 24},
    ),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER | _ENDS),
}
"""Name to the names of the config and the class, and the values of the config."""


def tiny(name: str, **overrides: Any) -> nn.Module:
    import transformers

    config, kind, values = _TRANSFORMERS[name]
    torch.manual_seed(0)
    made = getattr(transformers, kind)(getattr(transformers, config)(**(values | overrides)))
    return made.eval()  # type: ignore[no-any-return]


tiny_llama = functools.partial(tiny, "llama")
tiny_gpt2 = functools.partial(tiny, "gpt2")
tiny_bert = functools.partial(tiny, "bert")
tiny_t5 = functools.partial(tiny, "t5")
tiny_vit = functools.partial(tiny, "vit")


# Batches


def token_batch(batch: int = 2, length: int = 7, vocabulary: int = 64) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(batch: int = 2, length: int = 7) -> Batch:
    """Tokens, which are their own labels."""
    return {"input_ids": token_batch(batch, length), "labels": token_batch(batch, length)}


def classes() -> Batch:
    return {"input_ids": token_batch(), "labels": torch.tensor([0, 2])}


# The zoo


@dataclasses.dataclass(frozen=True)
class Case:
    """One model. What stands behind the batch is for the comparison with PEFT.

    An `r` of 8 for bat and a `mini_r` of 4 divide every width of the targets.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    targets: list[str] | str = "all-linear"
    excluded: str = ""
    """A target to leave out in the test of exclude_modules; empty where the model is not compared with PEFT's."""
    queries: tuple[str, ...] = ("q_proj", "v_proj")
    """Targets in the test of layers_to_transform."""
    head: str | None = None
    """A module to train in full in the test of modules_to_save."""
    peft_refuses: type[Exception] | None = None
    """What PEFT raises where we adapt, on purpose."""


def _of(name: str) -> Callable[[], nn.Module]:
    return functools.partial(tiny, name)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
_VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
_DISTILBERT_TARGETS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
_BY_CONVOLUTION, _BY_EMBEDDING = lambda: nn.Conv2d(3, 4, 3), lambda: nn.Embedding(64, 16)

ZOO: dict[str, Case] = {
    "mlp": Case(seeded(Mlp), lambda: {"x": normal(3, 24)}, ["0", "1", "2"], "1", ("0", "1", "2"), "head"),
    "convolution": Case(
        seeded(BetweenOthers, _BY_CONVOLUTION), lambda: {"x": normal(3, 3, 4, 4)}, ["hidden"], "head", head="head"
    ),
    "embedding": Case(seeded(BetweenOthers, _BY_EMBEDDING), lambda: {"x": token_batch()}, ["hidden"], "head", head="head"),
    "llama": Case(_of("llama"), tokens, "all-linear", "down_proj", head="model.norm"),
    "mistral": Case(_of("mistral"), tokens, "all-linear", "q_proj"),
    "qwen2": Case(_of("qwen2"), tokens, "all-linear", "q_proj"),
    "gemma": Case(_of("gemma"), tokens, "all-linear", "q_proj"),
    "phi": Case(_of("phi"), tokens, "all-linear", "q_proj"),
    "gpt2": Case(_of("gpt2"), tokens, ["c_attn", "c_proj", "c_fc"], "c_fc", peft_refuses=TypeError),
    "opt": Case(_of("opt"), tokens, "all-linear", "q_proj"),
    "bert": Case(_of("bert"), classes, _BERT, "key", ("query", "value"), "classifier"),
    "roberta": Case(_of("roberta"), classes, _BERT, "key"),
    "distilbert": Case(_of("distilbert"), classes, _DISTILBERT_TARGETS, "k_lin"),
    "albert": Case(_of("albert"), lambda: {"input_ids": token_batch()}),
    "t5": Case(_of("t5"), tokens, "all-linear", "wi"),
    "vit": Case(
        _of("vit"),
        lambda: {"pixel_values": normal(2, 3, 16, 16), "labels": torch.tensor([0, 2])},
        _VIT,
        "fc1",
        head="classifier",
    ),
    "clip": Case(
        _of("clip"),
        lambda: {"input_ids": token_batch(), "pixel_values": normal(2, 3, 16, 16)},
        "all-linear",
        "visual_projection",
    ),
    "whisper": Case(
        _of("whisper"), lambda: {"input_features": normal(2, 8, 16), "labels": token_batch()}, "all-linear", "fc1"
    ),
    "encoder": Case(seeded(_encoder), lambda: {"src": normal(3, 5, 16)}),
    "decoder": Case(seeded(Decoding), lambda: {"x": normal(3, 5, 16), "memory": normal(3, 4, 16, seed=4)}),
    "cross attention": Case(
        seeded(CrossAttending),
        lambda: {"x": normal(3, 5, 16), "key": normal(3, 4, 12, seed=4), "value": normal(3, 4, 20, seed=5)},
    ),
    "convolutions": Case(seeded(ConvolutionNet), lambda: {"x": normal(2, 3, 12, 10)}),
}


def make_model(name: str) -> nn.Module:
    """A model of the zoo in fp64, so that a tolerance hides nothing, and frozen."""
    return ZOO[name].make().double().requires_grad_(False)


def make_batch(name: str) -> Batch:
    return {key: value.double() if value.is_floating_point() else value for key, value in ZOO[name].batch().items()}


@functools.cache
def captured(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """The frozen model and its graph, by `capture`, or of the convolution network by `symbolic_trace`."""
    model = make_model(name)
    if name == "convolutions":
        return model, fx.symbolic_trace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, mc.capture(model, kwargs=make_batch(name))

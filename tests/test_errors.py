"""Bad input: each is a `MissError` that names what was wrong and what would do, with the model exactly as before.

`TABLE` has a row for each refusal: the call, its argument, the kind of the error and what its message must say.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from support import Trap, base_weight, fill_blocks, picture, reference_delta, says, stable_id
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from transformers import MixtralConfig, MixtralForCausalLM
from zoo import seeded, tiny_bert

import misscompile as mc
from misscompile.hosts import opening, owner_class  # internal: an error is raised in the middle of their steps

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning")


# The models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(12, 8), "up_proj": nn.Linear(8, 12)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["up_proj"](torch.tanh(layer["q_proj"](x)))
        y: Tensor = self.head(self.norm(x))
        return y


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ALL: dict[str, Any] = {"r": 2, "target_modules": "all-linear"}
plain = seeded(Net)
LINEARS = [*(f"layers.{i}.{name}_proj" for i in range(2) for name in ("q", "up")), "head"]


def named(*names: str, **fields: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": list(names)} | fields


def targets(rule: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": rule}


def adapted() -> nn.Module:
    return fill_blocks(mc.adapt(plain(), named("q_proj", "up_proj", r=3), "first"), std=0.3)


def merged() -> nn.Module:
    return mc.merge(adapted(), keep_adapters=True)


OPEN: list[Any] = []
"""The contexts of `disabled`, which would be left when they are collected."""


def disabled(model: nn.Module) -> nn.Module:
    OPEN.append(mc.disable_adapter(model))
    OPEN[-1].__enter__()
    return model


def left_disabled() -> nn.Module:
    with mc.disable_adapter(model := adapted()):
        return model


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def class_changed(model: nn.Module) -> nn.Module:
    """Half of the owners stand before the one whose class is another by now: they must not stay half way."""
    parametrize.register_parametrization(model.get_submodule("layers.1.q_proj"), "weight", Twice())
    return model


def tie(model: nn.Sequential) -> nn.Sequential:
    model[-1].weight = model[0].weight
    return model


class Scaled(nn.Linear):
    """Reads an attribute that a trace would freeze."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.scale


class ScaledTuple(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight, self.bias) * self.scale, x


class Router(nn.Linear):
    """Looks at values: it can neither be traced nor be tried on fake tensors."""

    def forward(self, x: Tensor) -> Any:
        scores = F.linear(x, self.weight, self.bias)
        return scores, [row.argmax().item() for row in scores]


class Grouped(nn.Linear):
    """A linear with another signature: rows go to groups of given sizes."""

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([F.linear(part, self.weight, self.bias) for part in x.split(sizes.tolist())])


class Narrow(nn.Linear):
    """Returns fewer features than it says, how many is an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)[..., : self.keep]


class TracedTuple(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight, self.bias), x


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias) + shift


class Turned(nn.Module):
    """A parametrization that turns the shape of a weight round."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.t()


def turned() -> nn.Module:
    model = nn.Sequential(OrderedDict(turned=nn.Linear(4, 6, bias=False), plain=nn.Linear(4, 6)))
    parametrize.register_parametrization(model.get_submodule("turned"), "weight", Turned(), unsafe=True)
    return model


class GroupedRows(nn.Linear):
    """As the grouped linear of DeepSeek-V4: each of 8 groups has features and a weight of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(8, -1, x.shape[-1]).transpose(1, 2)
        y = torch.bmm(x.reshape(-1, 8, x.shape[-1]).transpose(0, 1), weight).transpose(0, 1)
        return y.reshape(*x.shape[:-2], 8, -1)


class Sequences(nn.Linear):
    """Takes nothing but sequences, and looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return F.linear(x, self.weight, self.bias) if x.max().item() < 1e9 else x.new_zeros(batch, length, 4)


def sparse() -> nn.Module:
    model = chain(nn.Linear)()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr(), requires_grad=False)  # type: ignore[index]
    return model


class ScaledComplex(nn.Linear):
    """A linear over complex numbers that stays one node."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).real * self.scale


class Rotated(nn.Linear):
    """A linear with real weights that returns complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 1j * self.scale


def of_integers() -> nn.Module:
    model = chain(nn.Linear)()
    model[0].weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int32), requires_grad=False)  # type: ignore[index]
    return model


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(6, 4)), nn.Linear(4, 6))


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return chain(nn.Linear)()


class Answering(nn.Linear):
    """Has whatever attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        return 1.0 if name.startswith("miss_block") else super().__getattr__(name)


def chain(kind: type[nn.Module], **attributes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first = kind(6, 4)
        vars(first).update(attributes)
        return nn.Sequential(first, nn.Linear(4, 6))

    return make


def with_attribute(path: str, name: str, value: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = plain()
        setattr(model.get_submodule(path), name, value)
        return model

    return make


TINY: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
MIXTRAL = TINY | HEADS | {"intermediate_size": 12, "num_local_experts": 2, "num_experts_per_tok": 1}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "adapted": adapted,
    "merged": merged,
    "merged and unmerged": lambda: mc.unmerge(merged()),
    "merged for good": lambda: mc.merge(adapted()),
    "inside disable_adapter": lambda: disabled(adapted()),
    "inside it twice": lambda: disabled(disabled(adapted())),
    "after disable_adapter": left_disabled,
    "class changed": lambda: class_changed(adapted()),
    "class changed after merge": lambda: class_changed(merged()),
    "of type lama": with_attribute("", "config", SimpleNamespace(model_type="lama")),
    "with a buffer": with_attribute("head", "miss_block_default", nn.Buffer(torch.ones(1))),
    "linear": lambda: nn.Linear(6, 4),
    "adapted linear": lambda: mc.adapt(nn.Linear(6, 4), ALL),
    "20 linears": lambda: nn.Sequential(*(nn.Linear(6, 4) for _ in range(20))),
    "no linear": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
    "lazy": lambda: nn.Sequential(nn.Linear(6, 5), nn.LazyLinear(7), nn.Linear(7, 4)),
    "one feature": lambda: nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 4)),
    "tied to an embedding": lambda: tie(nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 4))),
    "lazy alone": lambda: nn.Sequential(nn.LazyLinear(7)),
    "scaled": chain(Scaled, scale=2.0),
    "scaled by its class": chain(Scaled),
    "tuple": chain(ScaledTuple, scale=2.0),
    "grouped": chain(Grouped),
    "narrow": chain(Narrow, keep=2),
    "answering": chain(Answering),
    "turned": turned,
    "grouped rows": lambda: nn.Sequential(GroupedRows(6, 24, bias=False), nn.Linear(24, 6)),
    "no outputs": lambda: nn.Sequential(nn.Linear(6, 0), nn.Linear(6, 4)),
    "no inputs": lambda: nn.Sequential(nn.Linear(0, 6), nn.Linear(6, 4)),
    "sparse": sparse,
    "complex": lambda: nn.Sequential(nn.Linear(6, 4, dtype=torch.complex64), nn.Linear(4, 6)),
    "scaled complex": chain(ScaledComplex, scale=2.0),
    "rotated": chain(Rotated, scale=2.0),
    "integers": of_integers,
    "scripted": scripted,
    "scripted whole": lambda: torch.jit.script(nn.Linear(6, 4)),
    "made under inference_mode": in_inference_mode,
    "adapted chain": lambda: mc.adapt(chain(nn.Linear)(), ALL),
    "adapted chain of bat": lambda: mc.adapt(chain(nn.Linear)(), ALL | {"init_weights": "bat", "miss_dropout": 0.1}),
    "adapted chain of mini": lambda: mc.adapt(chain(nn.Linear)(), ALL | {"init_weights": "mini"}),
    "Mixtral": seeded(lambda: MixtralForCausalLM(MixtralConfig(**MIXTRAL))),
    "BERT": tiny_bert,
}


def adapted_names(model: nn.Module) -> list[str]:
    return [name.rpartition(".miss_block")[0] for name, _ in model.named_parameters() if "miss_block" in name]


def kind_of(model: nn.Module, name: str) -> str:
    return f"{name} ({type(model.get_submodule(name)).__name__})"


A_NAME: tuple[Any, ...] = ({"first"}, 3)
"""What `merge` does not take for a list of names."""
REFUSED: dict[str, tuple[str, str, str, list[str]]] = {
    # the model, the module and its class, what is told of it, and the linears that can be adapted
    "lazy": ("lazy", "1", "its shape is not known yet; run the model once on real input first", ["0", "2"]),
    "tuple": ("tuple", "0", "found a tuple", ["1"]),
    "grouped": ("grouped", "0", "its forward is not a function of one input", ["1"]),
    "narrow": ("narrow", "0", "last dimension is 4, found a tensor of shape (2, 2)", ["1"]),
    "turned": ("turned", "turned", "its forward fails on 4 features (RuntimeError: mat1 and mat2 shapes", ["plain"]),
    "grouped rows": ("grouped rows", "0", "its forward fails on 6 features (RuntimeError: shape '[-1, 8, 6]'", ["1"]),
    "no outputs": ("no outputs", "0", "it has no outputs", ["1"]),
    "no inputs": ("no inputs", "0", "it has no inputs", ["1"]),
    "sparse": ("sparse", "0", "its weight is sparse (torch.sparse_csr); make it dense first", ["1"]),
    "complex": ("complex", "0", "its weight is torch.complex64, and an update is real", ["1"]),
    "scaled complex": ("scaled complex", "0", "its weight is torch.complex64, and an update is real", ["1"]),
    "rotated": ("rotated", "0", "last dimension is 4, found a complex tensor of shape (2, 4)", ["1"]),
    "integers": ("integers", "0", "its weight is torch.int32, and an update is real and floating-point", ["1"]),
    "scripted": ("scripted", "0", "it is compiled by TorchScript; adapt the module before scripting it", ["1"]),
    "fused experts": (
        "Mixtral",
        "model.layers.0.mlp.experts",
        "its gate_up_proj (2×24×8) is a stack of fused weights, not a linear",
        [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"],
    ),
}
PASSED_OVER = REFUSED | {
    # what "all-linear" leaves out, and a name does not
    "one feature": ("one feature", "0", "r=2 is more than its 1 input features; r of 1 to 1 would do", ["1"]),
    "tied to an embedding": ("tied to an embedding", "2", "its weight is tied to 0, an embedding", ["1"]),
}


# The table

VERBS: dict[str, Callable[[Any], Any]] = {
    "adapt": lambda model: mc.adapt(model, ALL, "second"),
    "load_adapter": lambda model: mc.load_adapter(model, "nowhere"),
    "save_adapter": lambda model: mc.save_adapter(model, "nowhere"),
    "merge": mc.merge,
    "unmerge": mc.unmerge,
    "unload": mc.unload,
    "set_adapter": lambda model: mc.set_adapter(model, "first"),
    "delete_adapter": lambda model: mc.delete_adapter(model, "first"),
    "disable_adapter": lambda model: mc.disable_adapter(model).__enter__(),
    "dump": mc.dump,
    "adapters": mc.adapters,
    "active_adapters": mc.active_adapters,
    "trainable_parameters": mc.trainable_parameters,
    "print_trainable_parameters": mc.print_trainable_parameters,
}


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "adapt": lambda model, config: mc.adapt(model, config),
    "adapt all linears with": lambda model, fields: mc.adapt(model, ALL | fields),
    "adapt as": lambda model, name: mc.adapt(model, ALL, name),
    "adapt as first": lambda model, config: mc.adapt(model, config, "first"),
    "adapt as second": lambda model, config: mc.adapt(model, config, "second"),
    "call": lambda model, verb: VERBS[verb](model),
    "set_adapter": mc.set_adapter,
    "delete_adapter": mc.delete_adapter,
    "merge": mc.merge,
    "merge and keep": lambda model, names: mc.merge(model, names, keep_adapters=True),
    "dump as": lambda model, value: mc.dump(model, format=value),
    "save_as_lora": mc.save_as_lora,
    "per-sample gradients": lambda model, x: call_for_per_sample_grads(model)(x),
}

CONFIG = "config: expected a misscompile.MissConfig, a peft.MissConfig or a dict, found"
NAME = "adapter_name: expected a string, found"
BAD_NAME = "a name becomes part of a parameter name, so it holds letters, digits, _ and - only"
NO_ADAPTER = "the model has no adapter: call adapt or load_adapter first."
NONE_OF = "the model has no adapter '{}': it has none; call adapt or load_adapter first."
NO_SECOND = "the model has no adapter 'second': it has 'first'."
MERGED = "layers.0.q_proj holds the merged adapter 'first'"
INSIDE = "was called inside disable_adapter(model): leave the context first."
OTHER_CLASS = "layers.1.q_proj: its class became ParametrizedLinear after it was adapted; undo that first"
INSTEAD = "...Name other modules, or add these to exclude_modules."
NO_LINEAR = "target_modules='all-linear': the model has no linear module beside its output layer."
NONE_TO_ADAPT = "target_modules='all-linear': no linear of this model can be adapted..."
NO_DEFAULT = "target_modules=None: there is no default"
NEEDS_WEIGHT = "'bat' needs the weight itself (init_weights=True or 'mini' do not)"
HAS_BLOCK = "it already has an attribute 'miss_block_default'"

TABLE: dict[tuple[str, str, type[BaseException], str], list[tuple[Any, ...]]] = {
    # what it is, the call, the kind, the models or "": rows of a model if "", the argument, and the message with gaps at ...
    ("no config", "adapt", mc.ArgumentError, "plain, adapted"): [
        *(
            (value, f"{CONFIG} {type(value).__name__}.")
            for value in (None, 3, "all-linear", [("r", 2)], object(), ["q_proj"])
        ),
        *((kind, f"{CONFIG} ...") for kind in (mc.MissConfig, peft.MissConfig)),
    ],
    ("a bad field", "adapt all linears with", mc.ConfigError, "plain, adapted"): [
        ({"r": 0}, "MissConfig.r=0: expected an integer of 1 or more."),
        ({"mini_r": 0}, "MissConfig.mini_r=0: expected an integer of 1 or more that divides out_features."),
        ({"init_weights": "BAT"}, "...init_weights='BAT': expected True (balance), False (balance, random start), 'bat'..."),
        ({"target_modules": "("}, "MissConfig.target_modules='(' is not a regular expression..."),
        ({"layers_to_transform": 1}, "MissConfig.layers_to_transform=1 cannot be combined..."),
        ({"target_module": ["head"]}, "MissConfig has no field 'target_module' (did you mean 'target_modules'?)."),
    ],
    ("no name", "adapt as", mc.ArgumentError, "plain, adapted"): [
        (value, f"{NAME} {type(value).__name__}.") for value in (None, 7, b"default", ["default"])
    ],
    ("a bad name", "adapt as", mc.ConfigError, "plain, adapted"): [
        ("", f"adapter_name='': {BAD_NAME}..."),
        ("a.b", f"adapter_name='a.b': {BAD_NAME}..."),
        (".", "...'_' would do."),
        ("v1.0", "...'v1_0' would do."),
        ("ﬁne", "adapter_name='ﬁne': ...in their normal form; 'fine' would do."),
        ("Ａ", "...'A' would do."),
    ],
    ("a name in use", "adapt as first", mc.StateError, "adapted"): [
        (ALL, "adapter_name='first' is in use (layers.0.q_proj): choose another name, ...delete_adapter(model, 'first')..."),
        (named("head"), "adapter_name='first' is in use..."),  # on other modules
    ],
    ("a name in use", "adapt", mc.StateError, "adapted linear"): [(ALL, "adapter_name='default' is in use ((root))...")],
    # nothing matches
    ("nothing matches", "adapt", mc.NoMatchError, "plain, adapted"): [
        (named("qproj"), "target_modules=['qproj'] matches no module of the model...closest: 'q_proj'..."),
        (targets("q_proj"), "target_modules='q_proj' ...closest: 'q_proj'...expression for the whole name..."),
        (named("self_attn"), "target_modules=['self_attn'] matches no module..."),
        (
            named("q_proj", exclude_modules=["q_proj"]),
            "...'layers.0.q_proj' and 1 more, but exclude_modules=['q_proj'] ...take all of it away...",
        ),
        (
            named("q_proj", layers_to_transform=[2]),
            "...'layers.0.q_proj' and 1 more, but none is in layers_to_transform=[2]...",
        ),
    ],
    ("of one model", "adapt", mc.NoMatchError, ""): [
        *(("no linear", targets(name), NO_LINEAR) for name in ("all-linear", "All-Linear")),
        ("lazy alone", ALL, f"{NONE_TO_ADAPT}0 (LazyLinear)...its shape is not known yet..."),
        ("BERT", named("classifer"), "...closest: 'classifier'..."),
    ],
    ("of one model", "adapt", mc.ConfigError, ""): [
        ("plain", {"r": 2}, f"{NO_DEFAULT} for model_type=None...'all-linear'...q_proj, up_proj, head."),
        ("of type lama", {"r": 2}, f"{NO_DEFAULT} for model_type='lama' (close: ['llama'...q_proj, up_proj, head."),
        ("linear", ALL | {"r": 7}, "...(root) (6→4)..."),
        ("20 linears", ALL | {"r": 7}, "...20 of 20...\n  0 (6→4)...\n  1 (6→4)...\n  4 (6→4)...\n  … and 15 more..."),
        ("plain", peft.LoraConfig(target_modules=["q_proj"]), "MissConfig.peft_type='LORA': expected 'MISS'..."),
    ],
    # Under `python -W error` what adapt tells is raised: then it has to be all or nothing as well.
    ("a warning made an error", "adapt", mc.MissWarning, "plain, adapted"): [
        (named("head", "w1"), "...'w1' matches no module...")
    ],
    # shapes
    ("a shape that does not fit", "adapt", mc.ConfigError, "plain, adapted"): [
        (
            named("q_proj", r=3, init_weights="bat"),
            "MissConfig.r=3 does not fit 2 of 2 chosen modules...s.0.q_proj (12→8)...s.1.q_proj (12→8)...r of 1, 2, 4...",
        ),
        (
            named("q_proj", "up_proj", "head", r=4, init_weights="bat"),
            "MissConfig.r=4 does not fit 1 of 5 chosen modules...head (12→9)...divides in and out...r of 1, 3 would do...",
        ),
        (
            named("q_proj", "up_proj", "head", init_weights="mini", mini_r=4),
            "MissConfig.mini_r=4 does not fit 1 of 5...head (12→9)...mini_r that divides out...mini_r of 1, 3, 9 would...",
        ),
        (
            named("up_proj", init_weights="mini", mini_r=16),
            "MissConfig.mini_r=16 does not fit 2 of 2...layers.0.up_proj (8→12)...mini_r of 1, 2, 3, 4, 6, 12 would do...",
        ),
        (
            named("q_proj", "up_proj", r=9),
            "MissConfig.r=9 does not fit 2 of 4...layers.0.up_proj (8→12)...more than its 8 input features...r of 1 to 8...",
        ),
        (named("head", r=64), "MissConfig.r=64 does not fit 1 of 1...head (12→9)...r of 1 to 12 would do..."),
        (
            named("head", r=13, init_weights="mini", mini_r=3),
            "MissConfig.r=13 does not fit 1 of 1...r of 1 to 12 would do...",
        ),
    ],
    # modules on which an adapter would have no effect
    ("no linear module", "adapt", mc.UnsupportedModuleError, "plain, adapted"): [
        (named("norm"), f"...norm (LayerNorm): it is not a linear module{INSTEAD}"),
        (named("embed"), f"...embed (Embedding): it is not a linear module{INSTEAD}"),
        (named("head", "norm"), f"...norm (LayerNorm){INSTEAD}"),
        (targets(r".*norm|head"), f"...norm (LayerNorm){INSTEAD}"),
        (named("layers.0"), f"...layers.0 (ModuleDict)...the linears inside: layers.0.q_proj, layers.0.up_proj{INSTEAD}"),
        (named("layers"), f"...layers (ModuleList)...layers.1.up_proj{INSTEAD}"),
    ],
    **{
        (f"{case} is named", "adapt", mc.UnsupportedModuleError, model): [
            (targets(chosen), f"...{kind_of(MODELS[model](), name)}...{reason}{INSTEAD}")
            for chosen in ([name], [name.rpartition(".")[2]], name.replace(".", r"\."), [others[0], name])
        ]
        for case, (model, name, reason, others) in REFUSED.items()
        if model != "Mixtral"
    },
    ("of one model", "adapt", mc.UnsupportedModuleError, ""): [
        ("Mixtral", named("q_proj", "experts"), "...model.layers.0.mlp.experts (MixtralExperts)..."),
        ("Mixtral", named("q_proj", "gate"), "...model.layers.0.mlp.gate (MixtralTopKRouter)..."),
        ("scaled", named("0", init_weights="bat"), f"...0 (Scaled)...self.scale...{NEEDS_WEIGHT}..."),
        ("with a buffer", named("head"), f"...head (Linear): {HAS_BLOCK}..."),  # of the block's name
        ("answering", named("0"), f"...0 (Answering): {HAS_BLOCK}..."),  # the class makes up that name
    ],
    ("made under inference_mode", "adapt", mc.NoMatchError, "made under inference_mode"): [
        (ALL | {"init_weights": start}, "...0 (Linear): its weight was made under torch.inference_mode, so that nothing...")
        for start in (True, "mini", "bat")
    ],
    ("all of it is compiled", "call", mc.ArgumentError, "scripted whole"): [
        (verb, "model: it is a TorchScript module, whose code is compiled; adapt the module before scripting it.")
        for verb in ("adapt", "load_adapter", "merge")
    ],
    ("no shape yet", "call", mc.StateError, "lazy"): [
        ("print_trainable_parameters", "1.weight: its shape is not known yet; run the model once on real input first.")
    ],
    ("no path", "save_as_lora", mc.ArgumentError, "adapted linear"): [
        (value, f"out: expected a path, found {type(value).__name__}.") for value in (5, None, ["lora"])
    ],
    (
        "expanded weights",
        "per-sample gradients",
        mc.ArgumentError,
        "adapted chain, adapted chain of mini, adapted chain of bat",
    ): [
        (
            torch.ones(2, 6),
            "call_for_per_sample_grads: its expanded weights cannot follow...torch.func.vmap(torch.func.grad...",
        )
    ],
    # a wrong state
    ("before unmerge", "adapt as second", mc.StateError, "merged"): [
        (config, f"adapt: {MERGED}; call unmerge(model) first.") for config in (ALL, named("head"))
    ],
    ("inside", "adapt as second", mc.StateError, "inside disable_adapter, inside it twice"): [(ALL, f"adapt {INSIDE}")],
    ("inside", "call", mc.StateError, "inside disable_adapter"): [
        (verb, f"{verb} {INSIDE}") for verb in ("merge", "unmerge", "unload", "set_adapter", "delete_adapter")
    ],
    ("without adapters", "call", mc.StateError, "plain"): [
        ("merge", "the model has no adapter: there is nothing to merge."),
        ("unmerge", "nothing is merged: unmerge undoes merge(model, keep_adapters=True)."),
        ("unload", NO_ADAPTER),
        ("disable_adapter", NO_ADAPTER),
        ("dump", "the model has no adapter: there is nothing to dump."),
    ],
    ("without adapters", "call", mc.UnknownAdapterError, "plain"): [
        (verb, NONE_OF.format(name))
        for verb, name in (("save_adapter", "default"), ("set_adapter", "first"), ("delete_adapter", "first"))
    ],
    ("before unmerge", "call", mc.StateError, "merged"): [
        (verb, f"...{MERGED}...call unmerge(model) first.") for verb in ("merge", "set_adapter", "delete_adapter")
    ],
    ("nothing is merged", "call", mc.StateError, "adapted, merged and unmerged"): [("unmerge", "nothing is merged...")],
    ("a module has another class by now", "call", mc.StateError, "class changed"): [
        (verb, f"{OTHER_CLASS}...") for verb in ("adapt", "set_adapter", "delete_adapter", "unload", "disable_adapter")
    ],
    ("a module has another class by now", "call", mc.StateError, "class changed after merge"): [
        (verb, f"{OTHER_CLASS}...") for verb in ("unload", "disable_adapter")
    ],
    # names and formats
    **{
        ("names", merge, kind, "adapted"): cases
        for merge in ("merge", "merge and keep")
        for kind, cases in {
            mc.UnknownAdapterError: [(["second"], NO_SECOND), (["first", "second"], NO_SECOND)],
            mc.ArgumentError: [
                *(
                    (value, f"adapter_names: expected a name or a list of names, found {type(value).__name__}.")
                    for value in A_NAME
                ),
                ([1], f"{NAME} int."),
            ],
            mc.StateError: [([], "no adapter is active: name the adapters to merge.")],
        }.items()
    },
    ("names", "set_adapter", mc.UnknownAdapterError, "adapted"): [("second", NO_SECOND), (["first", "second"], NO_SECOND)],
    ("names", "set_adapter", mc.ArgumentError, "adapted"): [
        (None, "adapter_name: expected a name or a list of names, found NoneType."),
        ([3], f"{NAME} int."),
    ],
    ("names", "delete_adapter", mc.UnknownAdapterError, "adapted"): [("second", NO_SECOND)],
    ("names", "delete_adapter", mc.ArgumentError, "adapted"): [(None, f"{NAME} NoneType."), (["first"], f"{NAME} list.")],
    ("no format", "dump as", mc.ArgumentError, "adapted"): [(value, "format=...") for value in ("yaml", None, 3, ["text"])],
}


def rows() -> Iterator[Any]:
    for (what, call, kind, models), cases in TABLE.items():
        for *one, argument, told in cases:
            shown = stable_id(argument) if len(stable_id(argument)) < 100 else type(argument).__name__
            for model in one or models.split(", "):
                yield pytest.param(model, call, argument, kind, told, id=f"{what}: {call} {shown} on {model}")


def input_of(model: nn.Module) -> tuple[Tensor, ...]:
    """An input of the models of which the output is compared too."""
    if isinstance(model, nn.Sequential) and type(model[0]) in (Scaled, Answering):
        return (torch.ones(2, 6),)
    return (TOKENS,) if isinstance(model, Net) else ()


@pytest.mark.parametrize(("model", "call", "argument", "kind", "told"), list(rows()))
def test_a_refusal_tells_what_would_do_and_changes_nothing(
    model: str, call: str, argument: Any, kind: type[BaseException], told: str
) -> None:
    made = MODELS[model]()
    before = picture(made, *input_of(made))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MissConfig has no field")  # of a config of another method
        with pytest.raises(kind) as caught:
            CALLS[call](made, argument)
    assert type(caught.value) is kind
    assert says(caught.value, told), caught.value
    assert picture(made, *input_of(made)) == before


@pytest.mark.parametrize("model", [None, 3, "llama", nn.Linear, torch.ones(2), {}, [nn.Linear(3, 2)]], ids=stable_id)
@pytest.mark.parametrize("verb", list(VERBS))
def test_no_verb_takes_something_else_than_a_module(verb: str, model: Any) -> None:
    with pytest.raises(mc.ArgumentError) as caught:
        VERBS[verb](model)
    assert str(caught.value) == f"model: expected a torch.nn.Module, found {type(model).__name__}."


def test_an_exported_program() -> None:
    program: Any = torch.export.export(nn.Sequential(nn.Linear(6, 4)), (torch.ones(2, 6),))
    with pytest.raises(mc.ArgumentError, match=r"found ExportedProgram \(adapt and load_adapter make a module of it\)"):
        mc.set_adapter(program, "default")


def test_the_picture_sees_an_adapter() -> None:
    """What the test of the table compares does change when something is adapted."""
    model = plain()
    before = picture(model, TOKENS)
    mc.adapt(model, ALL)
    after = picture(model, TOKENS)
    assert {key for key in before if before[key] != after[key]} == {"modules", "tensors", "state", "adapters", "held"}
    fill_blocks(model)
    assert picture(model, TOKENS)["output"] != before["output"]
    held = picture(model)["held"]
    mc.merge(model, keep_adapters=True)
    assert picture(model)["held"] != held
    mc.unload(model)
    assert picture(model)["modules"] == before["modules"]


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (mc.ConfigError, ValueError),
        (mc.NoMatchError, ValueError),
        (mc.UnsupportedModuleError, TypeError),
        (mc.ArgumentError, TypeError),
        (mc.UnknownAdapterError, KeyError),
        (mc.StateError, RuntimeError),
        (mc.MergeError, RuntimeError),
        (mc.CheckpointError, ValueError),
        (mc.CheckpointNotFoundError, FileNotFoundError),
        (mc.CheckpointNotFoundError, mc.CheckpointError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_kind_is_a_miss_error_and_a_familiar_one(kind: type[mc.MissError], base: type[Exception]) -> None:
    assert issubclass(kind, mc.MissError)
    assert issubclass(kind, base)
    assert str(kind("what was found; what would do")) == "what was found; what would do"  # KeyError alone would quote it


def test_the_bases_of_the_base_and_of_the_warning() -> None:
    assert mc.MissError.__bases__ == (Exception,)
    assert issubclass(mc.MissWarning, UserWarning)


# What is near a refusal and works


@pytest.mark.parametrize(
    "name", ["my-adapter", "a b", "ä", "class", "1", "weight", "'", 'a"b', "a\\b", "a\nb", '")#'], ids=stable_id
)
def test_an_odd_name_works_or_is_refused(name: str) -> None:
    model = plain()
    before = picture(model, TOKENS)
    try:
        mc.adapt(model, ALL, name)
    except mc.ConfigError as error:
        refused = str(error)
    else:
        assert [n for n, _ in mc.trainable_parameters(model)] == [f"{n}.miss_block_{name}" for n in LINEARS]
        fill_blocks(model)
        assert (model(TOKENS) - mc.merge(copy.deepcopy(model))(TOKENS)).abs().max() < 1e-6
        assert picture(model, TOKENS)["output"] != before["output"]
        return
    assert f"adapter_name={name!r}" in refused
    assert picture(model, TOKENS) == before


def test_an_entry_without_a_match_is_told_and_the_rest_is_adapted() -> None:
    model = plain()
    with pytest.warns(mc.MissWarning) as caught:
        mc.adapt(model, named("q_proj", "w1", exclude_modules=["hed"]))
    assert sorted(str(w.message) for w in caught) == [
        "exclude_modules entry 'hed' matches no module; closest: 'head', 'embed'",
        "target_modules entry 'w1' matches no module",
    ]
    assert [w.filename for w in caught] == [__file__] * 2
    assert adapted_names(model) == ["layers.0.q_proj", "layers.1.q_proj"]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("merged and unmerged", ALL),
        ("merged for good", ALL),
        ("after disable_adapter", ALL),
        ("lazy", ALL | {"exclude_modules": ["1"]}),
        ("scaled", named("0", init_weights="mini", mini_r=2)),
        *[("plain", named("q_proj", r=r, init_weights="bat")) for r in (1, 2, 4)],
        *[("plain", named("head", r=12, init_weights="mini", mini_r=r)) for r in (1, 3, 9)],
    ],
    ids=str,
)
def test_what_a_message_proposes_does(model: str, config: dict[str, Any]) -> None:
    made = mc.adapt(MODELS[model](), config, "second")  # without a warning
    assert mc.active_adapters(made) == ("second",)
    assert any("miss_block_second" in name for name, _ in mc.trainable_parameters(made))


@pytest.mark.parametrize("case", list(PASSED_OVER))
def test_under_all_linear_it_is_skipped_told_and_listed(case: str) -> None:
    of, name, reason, others = PASSED_OVER[case]
    model = MODELS[of]()
    refused = model.get_submodule(name)
    before = type(refused), list(vars(refused))
    with pytest.warns(mc.MissWarning) as caught:
        mc.adapt(model, ALL)
    assert any(reason in str(w.message) for w in caught)
    assert any(re.match(rf"{name} \(.*\)( and \d+ more are| is) not adapted: ", str(w.message)) for w in caught)
    assert [w.filename for w in caught] == [__file__] * len(caught)
    (line,) = [line for line in mc.dump(model).splitlines() if f"refused: {name} (" in line]
    assert reason in line
    assert adapted_names(model) == others
    assert (type(refused), list(vars(refused))) == before


def test_a_lazy_linear_after_its_first_run() -> None:
    model = MODELS["lazy"]()
    model(torch.ones(2, 6))
    assert adapted_names(mc.adapt(model, ALL)) == ["0", "1", "2"]


def test_a_router_that_cannot_be_tried_is_refused_by_name_at_the_latest_when_it_runs() -> None:
    model = nn.ModuleDict({"router": Router(6, 4)})

    def adapt_and_run() -> None:
        mc.adapt(model, named("router"))
        model["router"](torch.ones(2, 6))

    with pytest.raises(mc.UnsupportedModuleError, match="Router"):
        adapt_and_run()


@pytest.mark.parametrize("kind", [TracedTuple, TwoInputs])
def test_unusual_linears_that_can_be_traced_are_adapted_for_real(kind: type[nn.Linear]) -> None:
    x, shift = torch.randn(3, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    inputs = (x,) if kind is TracedTuple else (x, shift)
    layer: Any = nn.ModuleDict({"layer": kind(6, 4).double()})["layer"]
    before = layer(*inputs)
    fill_blocks(mc.adapt(nn.ModuleDict({"layer": layer}), named("layer")), std=0.5)
    after = layer(*inputs)
    if kind is TracedTuple:
        assert torch.equal(after[1], x)
        before, after = before[0], after[0]
    update = x @ reference_delta(True, layer.miss_block_default, base_weight(layer)).T
    torch.testing.assert_close(after, before + update, rtol=0, atol=1e-12)


def test_an_attribute_that_a_forward_reads_off_its_class_is_not_frozen_either() -> None:
    model: Any = mc.adapt(MODELS["scaled by its class"](), named("0"))
    x = torch.randn(3, 6)
    model[0].scale = 3.0
    torch.testing.assert_close(model[0](x), 3 * F.linear(x, base_weight(model[0]), model[0].bias), rtol=0, atol=1e-6)


def test_a_linear_that_takes_sequences_alone_and_looks_at_values_is_adapted() -> None:
    model: Any = fill_blocks(mc.adapt(chain(Sequences)(), ALL))
    x = torch.randn(2, 3, 6)
    y = F.linear(x, base_weight(model[0]), model[0].bias)
    y = y + x @ reference_delta(True, model[0].miss_block_default, base_weight(model[0])).T.float()
    torch.testing.assert_close(model[0](x), y, rtol=0, atol=1e-6)


def test_what_is_made_under_inference_mode_serves_and_what_is_adapted_there_trains(tmp_path: Path) -> None:
    trained = fill_blocks(mc.adapt(chain(nn.Linear)(), ALL))
    mc.save_adapter(trained, tmp_path)
    x, model, ours = torch.ones(2, 6), in_inference_mode(), chain(nn.Linear)()
    with torch.inference_mode():
        model.load_state_dict({name: value for name, value in trained.state_dict().items() if "miss" not in name})
    mc.load_adapter(model, tmp_path)
    assert torch.equal(model(x), trained(x))
    base = base_weight(model[0]).clone()  # type: ignore[index]
    for inside in (True, False):
        with torch.inference_mode(inside):
            merged = mc.merge(model, keep_adapters=True)
            torch.testing.assert_close(merged(x), trained(x), rtol=0, atol=1e-6)
            mc.unmerge(model)
        assert torch.equal(base_weight(model[0]), base)  # type: ignore[index]
    torch.testing.assert_close(mc.merge(model)(x), trained(x), rtol=0, atol=1e-6)
    with torch.inference_mode():
        ours = mc.load_adapter(mc.adapt(ours, ALL), tmp_path, "loaded", is_trainable=True)
    mc.set_adapter(ours, ["default", "loaded"])
    ours(x).sum().backward()
    assert all(parameter.grad is not None for _, parameter in mc.trainable_parameters(ours))


def test_all_linear_leaves_the_head_of_a_classifier_out() -> None:
    model = mc.adapt(tiny_bert(), ALL | {"task_type": "SEQ_CLS"})
    in_full = [name for name, _ in mc.trainable_parameters(model) if "miss_block" not in name]
    assert in_full == ["classifier.miss_copy_default:weight", "classifier.miss_copy_default:bias"]
    assert "classifier" not in adapted_names(model)


def test_an_adapter_named_twice_is_merged_once() -> None:
    model = adapted()
    expected = model(TOKENS)
    torch.testing.assert_close(mc.merge(model, ["first", "first"])(TOKENS), expected, rtol=0, atol=1e-5)


# An error in the middle


class OutOfLuckError(Exception):
    pass


STEPS: dict[str, tuple[Any, str]] = {
    "register_parameter": (nn.Module, "register_parameter"),
    "refresh_owner": (opening, "refresh_owner"),
    "set_class": (owner_class, "_set_class"),
    "zeros": (torch, "zeros"),
}


@pytest.mark.parametrize("base", ["plain", "adapted"])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OutOfLuckError("no luck"), KeyboardInterrupt("stop")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("step", list(STEPS))
def test_an_error_at_any_owner_leaves_the_model(base: str, step: str, error: BaseException, done: bool) -> None:
    """Each call of the step raises once, before or after it did its work, until adapt gets through."""
    owner, attribute = STEPS[step]
    model = MODELS[base]()
    before = picture(model, TOKENS)
    for k in itertools.count(1):
        trap, caught = Trap(k, error, done), None
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(owner, attribute, trap.guard(getattr(owner, attribute)), raising=False)
            try:
                mc.adapt(model, ALL, "second")
            except (OutOfLuckError, KeyboardInterrupt) as raised:
                caught = raised
        if trap.calls < k:
            break
        assert caught is error
        assert picture(model, TOKENS) == before
    assert k > 5  # one of each of the five owners, at least
    assert [name for name, _ in mc.trainable_parameters(model)] == [f"{name}.miss_block_second" for name in LINEARS]


def test_an_error_while_set_adapter_chooses_what_trains_leaves_the_model() -> None:
    model = mc.adapt(adapted(), ALL, "second")
    before = picture(model, TOKENS)
    trap = Trap(5, OutOfLuckError())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Parameter, "requires_grad_", trap.guard(nn.Parameter.requires_grad_), raising=False)
        with pytest.raises(OutOfLuckError):
            mc.set_adapter(model, "first")
    assert picture(model, TOKENS) == before
    assert mc.active_adapters(model) == ("second",)

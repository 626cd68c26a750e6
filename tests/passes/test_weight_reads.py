"""Modules whose forward does not run because a parent reads their weight: found, with a reason, and none too many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from support import adapted, fill_blocks, max_error
from torch import Tensor, nn
from zoo import ZOO, tiny_t5

import misscompile as mc
from misscompile.passes.weight_reads import find_read_weights, weight_uses

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(1, 8)[None]
WHY = "{} reads its weight directly, so that its own forward does not always run"


def read_weights(model: nn.Module) -> dict[str, str]:
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: read.reason for module, read in find_read_weights(model.modules()).items()}


# Modules of torch


class CallsSuper(nn.MultiheadAttention):
    def forward(self, *args: Tensor) -> Any:  # type: ignore[override]
        return super().forward(*args)


class Attention(nn.Module):
    def __init__(self, attention: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.attn(x, x, x)[0])
        return y


def test_what_is_named_is_refused_and_what_all_linear_finds_is_skipped_and_told() -> None:
    model = Attention()
    assert read_weights(model) == {"attn.out_proj": WHY.format("MultiheadAttention")}
    assert list(read_weights(Attention(CallsSuper))) == ["attn.out_proj"]
    text = r"attn\.out_proj \(NonDynamicallyQuantizableLinear\): MultiheadAttention reads its weight directly"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["out_proj", "up"]))
    assert type(model.up) is nn.Linear
    with pytest.warns(mc.MissWarning, match=r"attn\.out_proj .* is not adapted: MultiheadAttention reads"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    assert [name for name, _ in mc.trainable_parameters(model)] == ["up.miss_block_default"]
    assert "refused: attn.out_proj (NonDynamicallyQuantizableLinear): MultiheadAttention reads" in mc.dump(model)


def test_transformer_layers() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
    linears = {name for name in read_weights(model) if isinstance(model.get_submodule(name), nn.Linear)}
    assert linears == {f"layers.0.{name}" for name in ("self_attn.out_proj", "linear1", "linear2")}
    text = r"layers\.0\.linear1 \(Linear\): TransformerEncoderLayer reads its weight directly"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["linear1"]))

    model = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)  # has no fused path of its own
    assert set(read_weights(model)) == {"self_attn.out_proj", "multihead_attn.out_proj"}
    model.requires_grad_(False).eval()  # attention takes a fused path where nothing requires a gradient
    with torch.no_grad():
        before = model(X, X)
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["linear1", "linear2"]))
        assert torch.equal(model(X, X), before)
        assert max_error(fill_blocks(model)(X, X), before) > 1e-3


# Models of transformers


def tiny(name: str, kind: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(vocab_size=32, hidden_size=16, **sizes)
    return getattr(transformers, name + kind)(config).eval()  # type: ignore[no-any-return]


def test_mamba_hands_the_weights_of_its_projections_to_fused_kernels() -> None:
    model = tiny("Mamba", "ForCausalLM", state_size=4, num_hidden_layers=2, time_step_rank=4)
    mixers = [f"backbone.layers.{i}.mixer" for i in (0, 1)]
    read = {f"{mixer}.{name}" for mixer in mixers for name in ("conv1d", "x_proj", "dt_proj", "out_proj")}
    assert set(read_weights(model)) == read
    with pytest.raises(mc.UnsupportedModuleError, match=r"layers\.0\.mixer\.dt_proj .*MambaMixer reads its weight directly"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["dt_proj"]))
    before = model(IDS).logits
    with pytest.warns(mc.MissWarning) as told:
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    texts = [str(warning.message) for warning in told]
    assert any("dt_proj (Linear) and 1 more are not adapted: MambaMixer reads" in text for text in texts)
    assert any("x_proj (Linear) and 3 more are adapted, but not on every path: MambaMixer" in text for text in texts)
    adapted_names = {f"{mixer}.{name}.miss_block_default" for mixer in mixers for name in ("in_proj", "x_proj", "out_proj")}
    assert {name for name, _ in mc.trainable_parameters(model)} == adapted_names
    assert max_error(model(IDS).logits, before) < 1e-6
    assert max_error(fill_blocks(model)(IDS).logits, before) > 1e-3


def test_t5_looks_only_at_the_dtype_of_wo() -> None:
    model = tiny_t5()
    assert read_weights(model) == {}
    expected = [f"{name}.miss_block_default" for name, _ in model.named_modules() if name.endswith(".wo")]
    assert [name for name, _ in mc.trainable_parameters(adapted(model, target_modules=["wo"]))] == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_nothing_is_found_in_ordinary_models(name: str) -> None:
    model = ZOO[name].make()
    assert find_read_weights(model.modules()) == {}
    assert find_read_weights(adapted(model).modules()) == {}


_DEBERTA = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_RWKV = {"num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 32}
NOT_TAKEN: dict[str, tuple[Callable[[], nn.Module], list[str] | None]] = {
    "only where pretraining_tp > 1": (lambda: tiny("Bloom", "ForCausalLM", n_layer=1, n_head=2), ["dense"]),
    "only where query_states are given": (lambda: tiny("Deberta", "Model", **_DEBERTA), None),
    "rescaled in place, and called as ever": (lambda: tiny("Rwkv", "ForCausalLM", **_RWKV), None),
}


@pytest.mark.filterwarnings("ignore::misscompile.MissWarning")
@pytest.mark.parametrize("why", NOT_TAKEN)
def test_a_read_on_a_path_that_is_not_taken_does_not_shut_out_the_usual_targets(why: str) -> None:
    make, targets = NOT_TAKEN[why]
    model = make()
    with torch.no_grad():
        before = model(IDS)[0]
        mc.adapt(model, mc.MissConfig(r=4, target_modules=targets))
        assert max_error(fill_blocks(model, std=0.5)(IDS)[0], before) > 1e-4


# Forwards of all kinds


class Base(nn.Module):
    """What the forwards below work on."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12)
        self.inner, self.projs = nn.ModuleDict({"proj": nn.Linear(8, 12)}), nn.ModuleList([nn.Linear(8, 12)])
        self.weight, self.scale = nn.Parameter(torch.ones(12)), float(self.proj.weight.detach().std())

    def tie(self, other: nn.Linear) -> None:
        other.weight = self.proj.weight

    def forward(self, x: Tensor) -> Any:
        return self.proj(x)


class First(Base):
    """Reads through two methods, one of which comes back."""

    def forward(self, x: Tensor) -> Any:
        return self.forward(x[0]) if x.ndim > 5 else self._first(x)

    def _first(self, x: Tensor) -> Any:
        return self.second(x) if x.ndim else x

    def second(self, x: Tensor) -> Any:
        return self.forward(x) if x.ndim > 5 else F.linear(x, self.proj.weight)


class Inherits(First):
    pass


class CallsBase(First):
    def forward(self, x: Tensor) -> Any:
        return First.forward(self, x)


class CallsSuperToo(First):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2


def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


class Reads(Base):
    """Forwards that read the weight of a child, and their names say of which."""

    @property
    def matrix(self) -> Tensor:
        return self.proj.weight

    def proj__plainly(self, x: Tensor) -> Any:
        return F.linear(x, self.proj.weight, self.proj.bias)

    def proj__data(self, x: Tensor) -> Any:
        return x @ self.proj.weight.data.T

    @decorator
    def proj__below_a_decorator(self, x: Tensor) -> Any:
        return F.linear(x, self.proj.weight)

    def proj__beside_its_dtype(self, x: Tensor) -> Any:
        return F.linear(x.to(self.proj.weight.dtype), self.proj.weight)

    def proj__by_a_local_name(self, x: Tensor) -> Any:
        proj = self.proj
        return F.linear(x, proj.weight, proj.bias)

    def proj__by_a_property(self, x: Tensor) -> Any:
        return F.linear(x, self.matrix)

    def inner_proj__through_a_child(self, x: Tensor) -> Any:
        return F.linear(x, self.inner.proj.weight)

    def projs_0__by_an_index(self, x: Tensor) -> Any:
        return F.linear(x, self.projs[0].weight)

    def projs_0__in_a_loop(self, x: Tensor) -> Any:
        for proj in self.projs:
            x = F.linear(x, proj.weight)
        return x


class Calls(Base):
    """Forwards that read no weight of a child as a value."""

    def metadata(self, x: Tensor) -> Any:
        w, size = self.proj.weight.device, self.proj.weight.size(0)
        assert isinstance(self.proj.weight, Tensor)
        assert hasattr(self.proj.weight, "data")
        assert self.proj.weight.shape == (size, 8)
        assert self.proj.weight.dim() == self.proj.weight.ndim == 2
        assert self.proj.weight.numel() > 0
        return self.proj(x.to(w, self.proj.weight.dtype))

    def its_bias(self, x: Tensor) -> Any:
        return self.proj(x) - self.proj.bias

    def a_weight_of_its_own(self, x: Tensor) -> Any:
        return self.proj(x) * self.weight


class ReadsInInit(Base):
    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.proj.weight)


def kinds(source: type[nn.Module]) -> dict[str, type[nn.Module]]:
    """A class for each forward that `source` defines."""
    own = {name: function for name, function in vars(source).items() if callable(function) and name[0] != "_"}
    return {name: type(source.__name__, (source,), {"forward": function}) for name, function in own.items()}


READING = {f"proj__{kind.__name__}": kind for kind in (First, Inherits, CallsBase, CallsSuperToo)} | kinds(Reads)
CALLING = {kind.__name__: kind for kind in (Base, ReadsInInit)} | kinds(Calls)


@pytest.mark.parametrize("name", READING)
def test_a_read_is_found_however_it_is_spelled(name: str) -> None:
    model, child = READING[name](), name.split("__")[0].replace("_", ".")
    assert read_weights(model) == {child: WHY.format(type(model).__name__)}
    assert model(X).shape == (2, 3, 12)
    with pytest.raises(mc.UnsupportedModuleError, match=rf"{child} \(Linear\): {type(model).__name__} reads its weight"):
        adapted(model, target_modules=[child])


@pytest.mark.parametrize("name", CALLING)
def test_no_reads(name: str) -> None:
    model = CALLING[name]()
    assert weight_uses(type(model))[0] == ()
    before = model(X)
    adapted(model, target_modules=["proj"])
    assert max_error(model(X), before) > 1e-3


def test_what_is_no_module_or_has_no_source_is_passed_over() -> None:
    model = kinds(Reads)["proj__plainly"]()
    del model.proj
    assert find_read_weights(model.modules()) == {}
    namespace: dict[str, Any] = {"nn": nn}
    exec("class Built(nn.Module):\n    def forward(self, x):\n        return self.proj.weight @ x", namespace)
    for kind in (namespace["Built"], nn.Module, nn.ModuleList):
        assert weight_uses(kind)[0] == ()

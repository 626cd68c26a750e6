"""Modules whose forward does not run because a parent reads their weight: found, with a reason, and none too many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import adapted, fill_blocks, max_error
from torch import Tensor, nn
from zoo import ZOO, tiny_t5

import misscompile as mc
from misscompile.passes.weight_reads import find_read_weights, weight_uses

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def bypassed(model: nn.Module) -> dict[str, str]:
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: bypass.reason for module, bypass in find_read_weights(model.modules()).items()}


class _Attention(nn.Module):
    def __init__(self, attention: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.attn(x, x, x)[0])
        return y


def test_multihead_attention() -> None:
    reason = "MultiheadAttention reads its weight directly, so that its own forward does not always run"
    assert bypassed(_Attention()) == {"attn.out_proj": reason}


def test_what_is_named_is_refused_and_what_all_linear_finds_is_skipped_and_told() -> None:
    model = _Attention()
    text = r"attn\.out_proj \(NonDynamicallyQuantizableLinear\): MultiheadAttention reads its weight directly"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["out_proj", "up"]))
    assert type(model.up) is nn.Linear
    with pytest.warns(mc.MissWarning, match=r"attn\.out_proj .* is not adapted: MultiheadAttention reads"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    assert [name for name, _ in mc.trainable_parameters(model)] == ["up.miss_block_default"]
    assert "refused: attn.out_proj (NonDynamicallyQuantizableLinear): MultiheadAttention reads" in mc.dump(model)


def test_transformer_encoder_layer() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
    linears = {name for name in bypassed(model) if isinstance(model.get_submodule(name), nn.Linear)}
    assert linears == {f"layers.0.{name}" for name in ("self_attn.out_proj", "linear1", "linear2")}
    text = r"layers\.0\.linear1 \(Linear\): TransformerEncoderLayer reads its weight directly"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["linear1"]))


def test_transformer_decoder_layer_has_no_fused_path() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)
    assert set(bypassed(model)) == {"self_attn.out_proj", "multihead_attn.out_proj"}
    model.requires_grad_(False).eval()  # attention takes a fused path where nothing requires a gradient
    with torch.no_grad():
        before = model(X, X)
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["linear1", "linear2"]))
        assert torch.equal(model(X, X), before)
        assert max_error(fill_blocks(model)(X, X), before) > 1e-3


def test_mamba_hands_the_weights_of_its_projections_to_fused_kernels() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=32, time_step_rank=4)
    model = MambaForCausalLM(config).eval()
    mixers = [f"backbone.layers.{i}.mixer" for i in (0, 1)]
    read = {f"{mixer}.{name}" for mixer in mixers for name in ("conv1d", "x_proj", "dt_proj", "out_proj")}
    assert set(bypassed(model)) == read
    with pytest.raises(mc.UnsupportedModuleError, match=r"layers\.0\.mixer\.dt_proj .*MambaMixer reads its weight directly"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["dt_proj"]))
    ids = torch.arange(1, 8)[None]
    before = model(ids).logits
    with pytest.warns(mc.MissWarning) as told:
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    texts = [str(warning.message) for warning in told]
    assert any("dt_proj (Linear) and 1 more are not adapted: MambaMixer reads" in text for text in texts)
    assert any("x_proj (Linear) and 3 more are adapted, but not on every path: MambaMixer" in text for text in texts)
    adapted_names = {f"{mixer}.{name}.miss_block_default" for mixer in mixers for name in ("in_proj", "x_proj", "out_proj")}
    assert {name for name, _ in mc.trainable_parameters(model)} == adapted_names
    assert max_error(model(ids).logits, before) < 1e-6
    assert max_error(fill_blocks(model)(ids).logits, before) > 1e-3


def test_t5_looks_only_at_the_dtype_of_wo() -> None:
    model = tiny_t5()
    assert bypassed(model) == {}
    before = [name for name, module in model.named_modules() if name.endswith(".wo")]
    adapted(model, target_modules=["wo"])
    assert [name.rsplit(".", 1)[0] for name, _ in mc.trainable_parameters(model)] == before


@pytest.mark.parametrize("make", [pytest.param(ZOO[name].make, id=name) for name in ("llama", "gpt2", "bert", "vit")])
def test_nothing_is_found_in_ordinary_models(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert find_read_weights(model.modules()) == {}
    adapted(model)
    assert find_read_weights(model.modules()) == {}


def _bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))


def _deberta() -> nn.Module:
    from transformers import DebertaConfig, DebertaModel

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return DebertaModel(DebertaConfig(**sizes))


def _rwkv() -> nn.Module:
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    return RwkvForCausalLM(RwkvConfig(**sizes, intermediate_size=32))


@pytest.mark.filterwarnings("ignore::misscompile.MissWarning")
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (_bloom, ["dense"]),  # read only where pretraining_tp > 1, which no default is
        (_deberta, None),  # read only where query_states are given, which no model does
        (_rwkv, None),  # rescaled in place, and called as ever
    ],
)
def test_a_read_on_a_path_that_is_not_taken_does_not_shut_out_the_usual_targets(
    make: Callable[[], nn.Module], targets: list[str] | None
) -> None:
    model, ids = make().eval(), torch.arange(1, 8)[None]
    with torch.no_grad():
        before = model(ids)[0]
        mc.adapt(model, mc.MissConfig(r=4, target_modules=targets))
        assert max_error(fill_blocks(model, std=0.5)(ids)[0], before) > 1e-4


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Any:
        return self.proj(x)


class _Reads(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


class _ReadsData(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.data.T


class _ReadsInHelper(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self._first(x)

    def _first(self, x: Tensor) -> Tensor:
        return self._second(x) if x.ndim else x

    def _second(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


class _Recursive(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward(x[0]) if x.ndim > 2 else self._again(x)

    def _again(self, x: Tensor) -> Tensor:
        return self.forward(x) if x.ndim > 5 else F.linear(x, self.proj.weight)


class _Inherits(_Reads):
    pass


def _decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


class _Decorated(_Base):
    @_decorator
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


class _ReadsBesideMetadata(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.proj.weight.dtype), self.proj.weight)


@pytest.mark.parametrize(
    "kind", [_Reads, _ReadsData, _ReadsInHelper, _Recursive, _Inherits, _Decorated, _ReadsBesideMetadata]
)
def test_reads(kind: type[_Base]) -> None:
    assert weight_uses(kind)[0] == (("proj",),)
    assert list(bypassed(kind())) == ["proj"]


class _ReadsDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Base()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.proj.weight)


def test_a_read_through_a_child_names_the_reader() -> None:
    assert bypassed(_ReadsDeep()) == {
        "inner.proj": "_ReadsDeep reads its weight directly, so that its own forward does not always run"
    }


class _ReadsInInit(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = float(self.proj.weight.detach().std())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.proj.weight)


class _NeverCalled(_Base):
    def tie(self, other: nn.Linear) -> None:
        other.weight = self.proj.weight


class _Metadata(_Base):
    def forward(self, x: Tensor) -> Any:
        w, size = self.proj.weight.device, self.proj.weight.size(0)
        assert isinstance(self.proj.weight, Tensor)
        assert hasattr(self.proj.weight, "data")
        assert self.proj.weight.shape == (size, 8)
        assert self.proj.weight.dim() == self.proj.weight.ndim == 2
        assert self.proj.weight.numel() > 0
        return self.proj(x.to(w, self.proj.weight.dtype))


class _ReadsBias(_Base):
    def forward(self, x: Tensor) -> Any:
        return self.proj(x) - self.proj.bias


class _OwnWeight(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Any:
        return self.proj(x) * self.weight


@pytest.mark.parametrize("kind", [_Base, _ReadsInInit, _NeverCalled, _Metadata, _ReadsBias, _OwnWeight])
def test_no_reads(kind: type[_Base]) -> None:
    assert weight_uses(kind)[0] == ()
    model = kind()
    before = model(X)
    adapted(model, target_modules=["proj"])
    assert max_error(model(X), before) > 1e-3


def test_a_path_that_is_no_module_of_this_instance_is_passed_over() -> None:
    model = _Reads()
    del model.proj
    assert find_read_weights(model.modules()) == {}


def test_a_class_without_source_or_forward_is_passed_over() -> None:
    namespace: dict[str, Any] = {"nn": nn}
    exec("class Built(nn.Module):\n    def forward(self, x):\n        return self.proj.weight @ x", namespace)
    assert weight_uses(namespace["Built"])[0] == ()
    assert weight_uses(nn.Module)[0] == ()
    assert weight_uses(nn.ModuleList)[0] == ()


# --- reads that a search for `self.<child>.weight` in the forward does not see --------------------------------------


class _CallsSuper(nn.MultiheadAttention):
    def forward(self, *args: Tensor) -> Any:  # type: ignore[override]
        return super().forward(*args)


class _CallsBase(_Reads):
    def forward(self, x: Tensor) -> Tensor:
        return _Reads.forward(self, x)


class _SuperHelper(_ReadsInHelper):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class _Alias(_Base):
    def forward(self, x: Tensor) -> Tensor:
        proj = self.proj
        return F.linear(x, proj.weight, proj.bias)


class _Property(_Base):
    @property
    def matrix(self) -> Tensor:
        return self.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class _Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projs = nn.ModuleList([nn.Linear(8, 12)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.projs[0].weight)


class _Loop(_Indexed):
    def forward(self, x: Tensor) -> Tensor:
        for proj in self.projs:
            x = F.linear(x, proj.weight)
        return x


def test_a_subclass_of_multihead_attention_that_calls_super() -> None:
    assert list(bypassed(_Attention(_CallsSuper))) == ["attn.out_proj"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (_CallsBase, "proj"),
        (_SuperHelper, "proj"),
        (_Alias, "proj"),
        (_Property, "proj"),
        (_Indexed, "projs.0"),
        (_Loop, "projs.0"),
    ],
)
def test_an_adapter_acts_or_is_refused(kind: type[nn.Module], name: str) -> None:
    """An adapter that is accepted has an effect, however the parent's code spells the read."""
    model = kind()
    before = model(X)
    try:
        adapted(model, target_modules=[name])
    except mc.UnsupportedModuleError as error:
        assert name in str(error)  # noqa: PT017
        return
    assert max_error(model(X), before) > 1e-3

"""What an adapted owner gives to code that reads its weight: `W + ΔW` to a model's code, the parameter to its caretakers."""

from __future__ import annotations

import copy
import functools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from support import (
    VARIANTS,
    adapted,
    base_weight,
    blocks_of,
    fields,
    fill_blocks,
    max_error,
    reference_delta,
    reference_gradient,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D
from zoo import tiny_t5

import misscompile as mc
from misscompile.hosts import handed_out

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.arange(1, 8)[None]


def out(model: Callable[..., Any], x: Tensor) -> Tensor:
    """The first tensor that a model returns."""
    output = model(x)
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[no-any-return]


def reference(model: nn.Module, init_weights: Any) -> nn.Module:
    """A plain model whose weights are `W + ΔW`, from the formulas in fp64."""
    plain = mc.unload(copy.deepcopy(model))
    with torch.no_grad():
        for name, block in blocks_of(model).items():
            weight = base_weight(plain.get_submodule(name.rpartition(".")[0]))
            turned = isinstance(plain.get_submodule(name.rpartition(".")[0]), Conv1D)
            delta = reference_delta(init_weights, block, weight.t() if turned else weight)
            weight += (delta.t() if turned else delta).to(weight.dtype)
    return plain


def check(model: nn.Module, init_weights: Any, x: Tensor, tolerance: float = 1e-12) -> None:
    """Outputs, compiled outputs, block gradients and the merge are those of `W + ΔW`."""
    plain = reference(model, init_weights).requires_grad_()
    expected = out(plain, x)
    assert max_error(out(model, x), expected) <= tolerance
    torch.manual_seed(0)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    out(model, x).backward(cotangent)
    for name, block in blocks_of(model).items():
        owner = name.rpartition(".")[0]
        through = plain.get_submodule(owner).weight.grad
        turned = isinstance(plain.get_submodule(owner), Conv1D)
        base = base_weight(model.get_submodule(owner))
        through, base = (through.t(), base.t()) if turned else (through, base)
        assert max_error(block.grad, reference_gradient(init_weights, block, base, through)) <= 10 * tolerance, name
        assert block.grad.abs().max() > 1e-6, name
    merged = mc.merge(copy.deepcopy(model))
    assert max_error(out(merged, x), expected) <= tolerance
    with torch.no_grad():
        assert max_error(out(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected) <= tolerance


# Ways to read


class Base(nn.Module):
    """What the forwards below work on."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.turned = nn.Linear(8, 12), Conv1D(12, 8)
        self.inner, self.projs = nn.ModuleDict({"proj": nn.Linear(8, 12)}), nn.ModuleList([nn.Linear(8, 12)])
        self.kept = [self.proj]

    def forward(self, x: Tensor) -> Any:
        return self.proj(x)


def helper(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


class Reads(Base):
    """Forwards that read the weight of a child, and their names say of which."""

    def proj__plainly(self, x: Tensor) -> Any:
        return F.linear(x, self.proj.weight, self.proj.bias)

    def proj__in_a_method(self, x: Tensor) -> Any:
        return x @ self.matrix()

    def matrix(self) -> Tensor:
        return self.proj.weight.t()

    def proj__in_a_helper(self, x: Tensor) -> Any:
        return helper(x, self.proj)

    def proj__in_a_closure(self, x: Tensor) -> Any:
        return (lambda: F.linear(x, self.proj.weight))()

    def proj__by_getattr(self, x: Tensor) -> Any:
        return F.linear(x, getattr(self.proj, "weight"))  # noqa: B009

    def proj__by_a_local_name(self, x: Tensor) -> Any:
        proj, weight = self.proj, self.proj.weight
        return F.linear(x, weight, proj.bias)

    def proj__by_a_plain_list(self, x: Tensor) -> Any:
        return F.linear(x, self.kept[0].weight)

    @decorator
    def proj__below_a_decorator(self, x: Tensor) -> Any:
        return F.linear(x, self.proj.weight)

    def proj__beside_its_dtype(self, x: Tensor) -> Any:
        return F.linear(x.to(self.proj.weight.dtype), self.proj.weight)

    def proj__scaled(self, x: Tensor) -> Any:
        return F.linear(x, self.proj.weight / self.proj.weight.norm(dim=1, keepdim=True))

    def proj__called_and_read(self, x: Tensor) -> Any:
        return self.proj(x) * F.linear(x.flip(-1), self.proj.weight)

    def proj__added_in_place(self, x: Tensor) -> Any:
        return x @ torch.zeros(12, 8, dtype=x.dtype).add_(self.proj.weight).t()

    def inner_proj__through_a_child(self, x: Tensor) -> Any:
        return F.linear(x, self.inner.proj.weight)

    def projs_0__in_a_loop(self, x: Tensor) -> Any:
        for proj in self.projs:
            x = F.linear(x, proj.weight)
        return x

    def turned__as_it_is_stored(self, x: Tensor) -> Any:
        return x @ self.turned.weight + self.turned.bias

    def proj__by_its_tied_transpose(self, x: Tensor) -> Any:
        return self.proj(x) @ self.proj.weight  # an autoencoder


READING = [name for name in vars(Reads) if "__" in name and name[0] != "_"]


def make(forward: str) -> nn.Module:
    torch.manual_seed(1)
    model = type("Reading", (Reads,), {"forward": vars(Reads)[forward]})().double()
    nn.init.normal_(model.turned.weight)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("forward", READING)
def test_a_reader_computes_with_the_adapted_weight_however_it_is_spelled(forward: str, init_weights: Any) -> None:
    model, child = make(forward), forward.split("__")[0].replace("_", ".")
    before = out(model, X)
    mc.adapt(model, fields(init_weights, target_modules=re.escape(child)))
    assert torch.equal(out(model, X), before)
    check(fill_blocks(model, std=0.3), init_weights, X)


def test_a_forward_set_on_the_instance_of_a_parent_is_a_reader_too() -> None:
    model = Base().double()
    model.forward = lambda x: F.linear(x, model.proj.weight)  # type: ignore[method-assign]
    mc.adapt(model, fields(target_modules=["proj"]))
    fill_blocks(model)
    delta = reference_delta(True, model.proj.miss_block_default, base_weight(model.proj))
    assert max_error(model(X), X @ (base_weight(model.proj) + delta).t()) < 1e-12


def test_several_adapters_add_up_and_what_does_not_act_is_not_read() -> None:
    model = mc.adapt(make("proj__plainly"), fields("bat", target_modules=["proj"]))
    mc.adapt(model, fields("mini", target_modules=["proj"]), "other")
    fill_blocks(model)
    owner, base = model.proj, base_weight(model.proj)
    bat = reference_delta("bat", owner.miss_block_default, base)
    mini = reference_delta("mini", owner.miss_block_other, base)
    assert max_error(owner.weight.detach(), base + mini) < 1e-12
    mc.set_adapter(model, ["default", "other"])
    assert max_error(owner.weight.detach(), base + bat + mini) < 1e-12
    with mc.disable_adapter(model):
        assert owner.weight is base
    mc.merge(model, keep_adapters=True)
    assert owner.weight is base
    mc.unmerge(model)
    mc.unload(model)
    assert owner.weight is base


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_16_bit_weight_is_rounded_once(init_weights: Any) -> None:
    model = make("proj__plainly").bfloat16()
    mc.adapt(model, fields(init_weights, target_modules=["proj"]))
    fill_blocks(model, std=0.3)
    base = base_weight(model.proj)
    exact = base.double() + reference_delta(init_weights, model.proj.miss_block_default, base)
    assert model.proj.weight.dtype is torch.bfloat16
    rounded = (exact - exact.bfloat16().double()).abs().max()
    assert (model.proj.weight.double() - exact).abs().max() <= 1.01 * rounded


# Modules and models whose own code reads


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attn(x, x, x, need_weights=False)[0])
        return y


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(OrderedDict(encoder=layer, head=nn.Linear(8, 4)))


def tiny(name: str, kind: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(vocab_size=32, hidden_size=16, **sizes)
    return getattr(transformers, name + kind)(config)  # type: ignore[no-any-return]


_DEBERTA = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_dropout_prob": 0.0}
_DEBERTA |= {"attention_probs_dropout_prob": 0.0}
_MAMBA = {"state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4, "use_cache": False}
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    # a model, its input, and last names among the linears that its code reads
    "nn.MultiheadAttention": (Attention, X, {"out_proj"}),
    "nn.TransformerEncoderLayer": (encoder, X, {"out_proj", "linear1", "linear2"}),
    "Mamba": (lambda: tiny("Mamba", "ForCausalLM", **_MAMBA), IDS, {"in_proj", "x_proj", "dt_proj", "out_proj"}),
    "DeBERTa": (lambda: tiny("Deberta", "Model", **_DEBERTA), IDS, {"in_proj"}),
}


@pytest.mark.filterwarnings("error::misscompile.MissWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("init_weights", [True, "bat"])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights(name: str, init_weights: Any, training: bool) -> None:
    make, x, read = MODELS[name]
    torch.manual_seed(0)
    model = make().double().train(training).requires_grad_(False)  # torch takes another kernel where gradients are needed
    before = out(model, x)
    mc.adapt(model, fields(init_weights))
    names = {block.split(".")[-2] for block in blocks_of(model)}
    assert read <= names
    assert max_error(out(model, x), before) < 1e-14
    fill_blocks(model, std=0.1)
    plain = reference(model, init_weights)
    expected = out(plain, x)
    assert max_error(out(model, x), expected) < 1e-10
    assert max_error(expected, before) > 1e-3
    with torch.no_grad():  # the fused kernels
        assert max_error(out(model, x), expected) < 1e-10
    out(model, x).square().sum().backward()
    assert all(block.grad is not None and block.grad.abs().max() > 0 for block in blocks_of(model).values())
    assert max_error(out(mc.merge(model), x), expected) < 1e-10


def test_a_model_that_rescales_its_weights_in_its_forward_rescales_the_base() -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "attention_hidden_size": 16, "intermediate_size": 32, "rescale_every": 2}
    model, base = (tiny("Rwkv", "ForCausalLM", **sizes, use_cache=False).eval() for _ in range(2))
    base.load_state_dict(model.state_dict())
    mc.adapt(model, fields(target_modules=["output", "value"]))
    with torch.no_grad():
        assert torch.equal(out(model, IDS), out(base, IDS))
    assert torch.equal(base_weight(model.rwkv.blocks[2].attention.output), base_weight(base.rwkv.blocks[2].attention.output))


# Caretakers


class Uses(nn.Module):
    """What code does with a weight without computing with it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(8, 12), nn.Linear(8, 12)


def _asks_for_metadata(m: Uses) -> None:
    assert isinstance(m.proj.weight, nn.Parameter)
    assert m.proj.weight.dtype is m.proj.weight.data.dtype
    assert hasattr(m.proj.weight, "data")
    assert m.proj.weight.shape == (m.proj.weight.size(0), 8)
    assert m.proj.weight.device.type == "cpu"
    assert m.proj.weight is base_weight(m.proj)


def _writes(m: Uses) -> None:
    with torch.no_grad():
        m.proj.weight.copy_(torch.ones(12, 8))
        m.proj.weight[0] = 2.0
        m.proj.weight.data.mul_(3.0)
        m.proj.weight += 1.0
        nn.init.constant_(m.other.weight, 1.0)
    m.proj.weight.data = m.proj.weight.data.clone()
    m.proj.weight.requires_grad = True
    m.proj.weight.requires_grad_(False)
    assert base_weight(m.proj)[:2, 0].tolist() == [7.0, 4.0]


def _ties_and_unties(m: Uses) -> None:
    m.other.weight = m.proj.weight
    assert base_weight(m.other) is base_weight(m.proj)
    m.proj.weight = nn.Parameter(m.proj.weight.detach().clone())
    assert torch.equal(base_weight(m.other), base_weight(m.proj))
    assert base_weight(m.other) is not base_weight(m.proj)


def _asks_by_name(m: Uses) -> None:
    assert m.get_parameter("proj.weight") is base_weight(m.proj)
    assert dict(m.named_parameters())["proj.weight"] is base_weight(m.proj)
    assert m.state_dict()["proj.weight"].data_ptr() == base_weight(m.proj).data_ptr()


def _prunes_and_moves(m: Uses) -> None:
    accelerate.utils.set_module_tensor_to_device(m, "proj.weight", "cpu", value=torch.ones(12, 8))
    assert torch.equal(base_weight(m.proj), torch.ones(12, 8))
    nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in m.parameters())), m.parameters())
    assert not base_weight(m.proj).any()


USES = [_asks_for_metadata, _writes, _ties_and_unties, _asks_by_name, _prunes_and_moves]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_who_takes_care_of_a_parameter_meets_the_parameter(use: Callable[[Uses], None]) -> None:
    model = mc.adapt(Uses(), fields(target_modules=["proj", "other"]))
    fill_blocks(model, std=0.5)
    with mock.patch.object(handed_out, "add_updates", side_effect=AssertionError("computed")):
        use(model)


def test_t5_asks_for_the_dtype_of_wo_at_every_call_and_nothing_is_computed_for_it() -> None:
    model = adapted(tiny_t5(), target_modules=["wo"])
    with mock.patch.object(handed_out, "add_updates", side_effect=AssertionError("computed")):
        model(IDS, decoder_input_ids=IDS)


def test_code_without_a_source_reads_the_adapted_weight() -> None:
    model = adapted(Uses(), target_modules=["proj"])
    namespace: dict[str, Any] = {"m": model}
    exec("def read(): return m.proj.weight\nread_it = read()", namespace)
    delta = reference_delta(True, model.proj.miss_block_default, base_weight(model.proj))
    assert max_error(namespace["read_it"], base_weight(model.proj) + delta) < 1e-6


@pytest.mark.parametrize("name", ["accelerated_models", "peftlab", "misscompile_zoo", "torch.nn.utilsx"])
def test_a_module_whose_name_only_begins_like_a_caretaker_s_computes(name: str) -> None:
    model = adapted(Uses(), target_modules=["proj"])
    namespace: dict[str, Any] = {"m": model, "__name__": name}
    exec("read_it = m.proj.weight", namespace)
    assert namespace["read_it"] is not base_weight(model.proj)
    namespace["__name__"] = "accelerate.utils"
    exec("read_it = m.proj.weight", namespace)
    assert namespace["read_it"] is base_weight(model.proj)


def test_a_weight_parametrized_before_or_after() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = Uses().double()
    parametrize.register_parametrization(model.proj, "weight", Doubled())
    adapted(model, target_modules=["proj"])
    original = model.proj.parametrizations["weight"].original
    delta = reference_delta(True, model.proj.miss_block_default, original)
    assert max_error(model.proj.weight, 2 * original + delta) < 1e-12
    assert max_error(model.proj(X), X @ (2 * original + delta).t() + model.proj.bias) < 1e-12

    model = adapted(Uses().double(), target_modules=["proj"])
    parametrize.register_parametrization(model.proj, "weight", Doubled())
    original = model.proj.parametrizations["weight"].original
    delta = reference_delta(True, model.proj.miss_block_default, original)
    assert max_error(model.proj(X), X @ (2 * original + delta).t() + model.proj.bias) < 1e-12

"""The faults of the reference implementation that this library does not repeat, a test each, in the order of the list."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import VARIANTS, adapted, fill_blocks, max_error, reference_delta
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import TwoLinears, tiny_gpt2, tiny_llama, token_batch

import misscompile as mc


def _layer(dtype: torch.dtype = torch.float32, in_features: int = 12, out_features: int = 20) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features).to(dtype))


def _adapt(model: nn.Module, init_weights: Any = True, name: str = "default", **fields: Any) -> nn.Module:
    values = {"r": 4, "mini_r": 2, "target_modules": ["0"], "init_weights": init_weights} | fields
    mc.adapt(model, mc.MissConfig(**values), adapter_name=name)
    block = getattr(model[0], f"miss_block_{name}")
    block.data.copy_(torch.randn(block.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model


def _expected(model: nn.Module, x: Tensor, *named: tuple[str, Any]) -> Tensor:
    """The output of one linear with the updates of some adapters, from the formulas."""
    weight = model[0].weight.detach().double()
    total = sum((reference_delta(kind, getattr(model[0], f"miss_block_{name}"), weight) for name, kind in named), weight)
    return F.linear(x.double(), total, model[0].bias.double())


def test_01_merging_never_touches_a_block_and_unmerge_works_on_bf16_mini() -> None:
    model, x = _adapt(_layer(torch.bfloat16), "mini"), torch.randn(3, 12).bfloat16()
    block, weight, y = model[0].miss_block_default.clone(), model[0].weight.clone(), model(x)
    mc.merge(model, keep_adapters=True)
    assert torch.equal(model[0].miss_block_default, block)
    assert not torch.equal(model[0].weight, weight)
    mc.unmerge(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_02_a_low_precision_adapter_does_not_round_the_base(init_weights: Any) -> None:
    model = _adapt(_layer(), init_weights)
    model[0].miss_block_default.data = model[0].miss_block_default.data.bfloat16()
    weight = model[0].weight.detach().clone()
    delta = reference_delta(init_weights, model[0].miss_block_default, weight)
    mc.merge(model)
    assert model[0].weight.dtype == torch.float32
    assert max_error(model[0].weight, weight.double() + delta) < 1e-6


def test_03_a_variant_belongs_to_its_adapter() -> None:
    model, x = _layer(), torch.randn(3, 12)
    for name, kind in (("one", True), ("three", "mini"), ("seven77", "bat")):
        _adapt(model, kind, name)
    for names in (("one",), ("three",), ("seven77",), ("one", "seven77"), ("three", "one", "seven77")):
        mc.set_adapter(model, list(names))
        kinds = {"one": True, "three": "mini", "seven77": "bat"}
        assert max_error(model(x), _expected(model, x, *((n, kinds[n]) for n in names))) < 1e-5


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_04_dropout_is_honoured_by_every_variant(init_weights: Any) -> None:
    model, x = _adapt(_layer(), init_weights, miss_dropout=0.5), torch.randn(30, 12)
    still = model.eval()(x)
    assert torch.equal(model(x), still)
    model.train()
    assert max_error(model(x), still) > 1e-2
    assert max_error(model(x), model(x)) > 1e-2


def test_05_unmerge_of_bat_is_exact_even_where_one_plus_b_is_singular() -> None:
    model = _adapt(_layer(torch.bfloat16), "bat")
    model[0].miss_block_default.data.copy_(-torch.eye(4).expand(5, 4, 4))
    weight = model[0].weight.detach().clone()
    mc.merge(model, keep_adapters=True)
    assert not torch.equal(model[0].weight, weight)
    mc.unmerge(model)
    assert torch.equal(model[0].weight, weight)


class _Recorder(TorchDispatchMode):
    """Notes dtype and shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made.append((str(func), result.dtype, tuple(result.shape)))
        return result


def test_06_bat_on_a_bf16_base_runs_its_products_in_bf16_and_keeps_the_storage() -> None:
    model, x = _adapt(_layer(torch.bfloat16, 16, 24), "bat"), torch.randn(9, 16).bfloat16()
    storage = model[0].weight.data_ptr(), model[0].miss_block_default.data_ptr()
    with _Recorder() as recorder:
        model(x)
    products = [dtype for name, dtype, _ in recorder.made if any(op in name for op in ("mm", "linear"))]
    assert len(products) >= 3
    assert set(products) == {torch.bfloat16}
    assert not any("clone" in name and shape == (24, 16) for name, _, shape in recorder.made)
    assert (model[0].weight.data_ptr(), model[0].miss_block_default.data_ptr()) == storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_07_bat_keeps_the_base_hooks_and_the_gradient_of_an_unfrozen_weight(dtype: torch.dtype) -> None:
    model, x = _adapt(_layer(dtype), "bat"), torch.randn(3, 12).to(dtype)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[0].weight.requires_grad_(True)
    y = model(x)
    assert max_error(y, 2 * _expected(model, x, ("default", "bat"))) < (1e-5 if dtype is torch.float32 else 5e-2)
    y.sum().backward()
    weight = model[0].weight.detach().double().requires_grad_()
    block = model[0].miss_block_default.detach().double()
    pieces = torch.stack([p @ b + b for p, b in zip(weight.view(5, 4, 3, 4).transpose(1, 2), block, strict=True)])
    total = weight + pieces.transpose(1, 2).reshape(20, 12)
    (2 * F.linear(x.double(), total)).sum().backward()
    assert max_error(model[0].weight.grad, weight.grad) < (1e-5 if dtype is torch.float32 else 5e-2)


def test_08_two_bat_adapters_do_not_depend_on_their_order() -> None:
    model, x = _adapt(_adapt(_layer(), "bat", "a"), "bat", "bbb"), torch.randn(3, 12)
    results = []
    for names in (["a", "bbb"], ["bbb", "a"]):
        mc.set_adapter(model, names)
        results.append(model(x))
        assert max_error(results[-1], _expected(model, x, ("a", "bat"), ("bbb", "bat"))) < 1e-5
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_09_under_autocast_the_output_has_the_dtype_of_the_base(init_weights: Any, base: torch.dtype) -> None:
    plain, x = _layer(base), torch.randn(3, 12).to(base)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x).dtype
        assert _adapt(plain, init_weights)(x).dtype == expected == torch.bfloat16


def test_10_the_dtype_of_one_adapter_does_not_truncate_the_input_of_another() -> None:
    model, x = _adapt(_adapt(_layer(), True, "low"), True, "high4"), torch.randn(3, 12)
    model[0].miss_block_low.data = model[0].miss_block_low.data.bfloat16()
    mc.set_adapter(model, ["low", "high4"])
    assert max_error(model(x), _expected(model, x, ("low", True), ("high4", True))) < 1e-5


@pytest.mark.parametrize("value", ["BAT", "balance", "Mini", "gaussian", 1, None])
def test_11_an_unknown_init_weights_is_an_error(value: Any) -> None:
    with pytest.raises(mc.ConfigError, match=r"init_weights=.*'bat' or 'mini'"):
        mc.MissConfig(init_weights=value)


def test_12_a_bad_mini_r_is_told_with_the_values_that_would_do() -> None:
    with pytest.raises(mc.ConfigError, match=r"mini_r=0: expected an integer of 1 or more"):
        mc.MissConfig(init_weights="mini", mini_r=0)
    with pytest.raises(mc.ConfigError, match=r"mini_r=3 .*\n.*0 \(12→20\).*mini_r of 1, 2, 4, 5, 10, 20 would do"):
        mc.adapt(_layer(), mc.MissConfig(r=4, init_weights="mini", mini_r=3, target_modules=["0"]))


def test_13_an_error_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    calls = 0
    register = nn.Module.register_parameter

    def failing(self: nn.Module, name: str, parameter: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise MemoryError("no room for the ninth block")
        register(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", failing)
    with pytest.raises(MemoryError):
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    assert [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()] == before
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == flags


class _TupleRouter(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class _Grouped(nn.Linear):
    """A grouped linear: the same attributes, another signature and meaning, and a loop that no trace follows."""

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        parts = [part @ self.weight.T for part in x.split(sizes) if part.abs().sum() > 0]
        return torch.cat(parts)


def test_14_modules_whose_forward_does_not_run_or_is_no_linear_are_adapted_for_real_or_refused() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)
    for name in ("self_attn.out_proj", "linear1", "linear2"):
        with pytest.raises(mc.UnsupportedModuleError, match=rf"layers\.0\.{name}.*reads its weight directly"):
            mc.adapt(encoder, mc.MissConfig(r=4, target_modules=[name]))
    both = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4), "head": nn.Linear(16, 12)})
    with pytest.warns(mc.MissWarning, match=r"attention\.out_proj .*is not adapted"):
        mc.adapt(both, mc.MissConfig(r=4, target_modules="all-linear"))
    assert "refused: attention.out_proj" in mc.dump(both)

    router, x = nn.Sequential(_TupleRouter(12, 20)), torch.randn(3, 12)
    base = router(x)[0]
    _adapt(router)
    assert max_error(router(x)[0], base) > 1e-2
    assert max_error(router(x)[0], _expected(router, x, ("default", True))) < 1e-5
    assert torch.equal(router(x)[1], router(x)[0].argmax(-1))
    with pytest.raises(mc.UnsupportedModuleError, match=r"0 \(_Grouped\).*not a function of one input"):
        mc.adapt(nn.Sequential(_Grouped(12, 20)), mc.MissConfig(r=4, target_modules=["0"]))


def test_14_mambas_time_step_projection_is_refused_by_name() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(mc.UnsupportedModuleError, match=r"dt_proj \(Linear\): MambaMixer reads its weight directly"):
        mc.adapt(model, mc.MissConfig(r=1, target_modules=["dt_proj"]))
    mc.adapt(model, mc.MissConfig(r=4, target_modules=["in_proj"]))


def test_15_gpt2s_conv1d_is_adapted() -> None:
    model, ids = tiny_gpt2(), token_batch()
    base = model(ids).logits
    mc.adapt(model, mc.MissConfig(r=8, target_modules=["c_attn", "c_proj"]))
    assert torch.equal(model(ids).logits, base)
    assert max_error(fill_blocks(model)(ids).logits, base) > 1e-2


def test_16_a_tied_lm_head_is_never_merged_into_the_embedding() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(mc.MissWarning, match="shares its weight"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["lm_head"]))
    fill_blocks(model)
    weight = model.lm_head.weight.detach().clone()
    with pytest.raises(mc.MergeError, match="Untie"):
        mc.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, weight)


def test_17_a_linear_under_two_names_has_one_adapter_at_every_call_site() -> None:
    shared = nn.Linear(12, 12)
    model, x = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(12, 20)}), torch.randn(3, 12)
    mc.adapt(model, mc.MissConfig(r=4, target_modules=["second"]))
    fill_blocks(model)
    assert [name for name, _ in mc.trainable_parameters(model)] == ["first.miss_block_default"]
    assert model["first"] is model["second"]
    delta = reference_delta(True, shared.miss_block_default, shared.weight)
    expected = F.linear(x.double(), shared.weight.double() + delta, shared.bias.double())
    assert max_error(model["first"](x), expected) < 1e-5
    mc.merge(model)
    assert max_error(model["second"](x), expected) < 1e-5


def test_18_merging_one_of_two_active_adapters_keeps_the_other_in_the_forward() -> None:
    model, x = _adapt(_adapt(_layer(), True, "a"), "mini", "bbb"), torch.randn(3, 12)
    mc.set_adapter(model, ["a", "bbb"])
    expected = model(x)
    mc.merge(model, adapter_names=["a"])
    assert mc.active_adapters(model) == ("bbb",)
    torch.testing.assert_close(model(x), expected)
    mc.merge(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_19_a_forward_under_disabled_does_not_unmerge() -> None:
    model, x = _adapt(_layer(), "bat"), torch.randn(3, 12)
    base = F.linear(x, model[0].weight, model[0].bias)
    mc.merge(model, keep_adapters=True)
    merged, weight = model(x), model[0].weight.detach().clone()
    with mc.disable_adapter(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), merged)
    assert torch.equal(model[0].weight, weight)


def test_20_list_entries_that_match_nothing_are_told_with_the_closest_names() -> None:
    with pytest.warns(mc.MissWarning, match=r"target_modules entry 'q_porj' matches no module; closest: 'q_proj'"):
        mc.adapt(tiny_llama(), mc.MissConfig(r=4, target_modules=["v_proj", "q_porj"]))
    with pytest.warns(mc.MissWarning, match="exclude_modules entry 'lm_haed' matches no module; closest: 'lm_head'"):
        mc.adapt(tiny_llama(), mc.MissConfig(r=4, target_modules=["v_proj"], exclude_modules=["lm_haed"]))


@pytest.mark.parametrize("r", [4, 5])
@pytest.mark.parametrize("init_weights", [True, "mini"])
def test_21_the_full_width_input_is_neither_cast_nor_copied(init_weights: Any, r: int) -> None:
    model, x = _adapt(_layer(torch.bfloat16, 12, 20), init_weights, r=r), torch.randn(9, 12).bfloat16()
    with _Recorder() as recorder:
        model(x)
    views = ("view", "unsqueeze", "slice", "as_strided", "detach", "alias", "reshape", "unflatten")
    wide = [(name, dtype) for name, dtype, shape in recorder.made if shape[0] == 9 and shape[-1] == 12]
    assert all(dtype == torch.bfloat16 and any(view in name for view in views) for name, dtype in wide), wide
    sums = [(dtype, shape) for name, dtype, shape in recorder.made if "sum" in name]
    assert sums == [(torch.float32, (9, r))]


def test_22_fused_expert_weights_are_told_by_all_linear() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", mc.MissWarning)
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    told = [str(warning.message) for warning in caught]
    assert any("model.layers.0.mlp.experts" in text and "fused weights" in text for text in told), told
    assert "refused: model.layers.1.mlp.experts" in mc.dump(model)


def test_two_linears_fixture_is_not_square() -> None:
    """The other tests' power rests on it."""
    assert all(m.in_features != m.out_features for m in adapted(TwoLinears()).modules() if isinstance(m, nn.Linear))

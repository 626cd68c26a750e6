"""What an adapted model must keep working with: torch.compile, generate, copies, hooks, tied weights, meta, …"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import VARIANTS, adapted, fill_blocks, max_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations
from zoo import TwoLinears, tiny_gpt2, tiny_llama, token_batch

import misscompile as mc

IDS = token_batch()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_compiles_to_one_graph_for_inference_and_training(init_weights: Any) -> None:
    for training in (False, True):
        torch._dynamo.reset()
        model = adapted(tiny_llama(), init_weights, miss_dropout=0.1 if training else 0.0).train(training)
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(2):
            loss = compiled(input_ids=IDS, labels=IDS).loss
        assert counter.frame_count == 1
        if training:
            loss.backward()
            assert all(parameter.grad is not None for _, parameter in mc.trainable_parameters(model))


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("r", [4, 5])
def test_inductor_computes_what_eager_computes(init_weights: Any, r: int) -> None:
    if init_weights == "bat" and r == 5:
        pytest.skip("bat needs r to divide in")
    model = adapted(TwoLinears(), init_weights, r=r)
    x = torch.randn(3, 5, 12, requires_grad=True)

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        parameters = [parameter for _, parameter in mc.trainable_parameters(model)]
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]

    expected = step(model)
    actual = step(torch.compile(model, fullgraph=True))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("input_gradients", "graphs"), [(False, 2), (True, 1)])
def test_equal_layers_compiled_one_by_one_share_their_graph(input_gradients: bool, graphs: int) -> None:
    model = adapted(tiny_llama(num_hidden_layers=5)).train()
    if input_gradients:
        model.enable_input_require_grads()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert counter.frame_count == graphs


def test_new_values_and_seen_states_recompile_nothing() -> None:
    model, counter = adapted(tiny_llama()), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        first = compiled(IDS).logits
        with mc.disable_adapter(model):
            base = compiled(IDS).logits
        assert counter.frame_count == 2
        fill_blocks(model, seed=5)
        second = compiled(IDS).logits
        with mc.disable_adapter(model):
            assert torch.equal(compiled(IDS).logits, base)
    assert counter.frame_count == 2
    assert max_error(first, base) > 1e-3
    assert max_error(second, first) > 1e-3


def test_generates_with_dynamic_and_static_cache() -> None:
    model = fill_blocks(adapted(tiny_llama()), std=0.3)
    mask = torch.ones_like(IDS)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    dynamic = model.generate(IDS, **options)
    static = model.generate(IDS, cache_implementation="static", **options)
    assert torch.equal(dynamic, static)
    with mc.disable_adapter(model):
        assert not torch.equal(model.generate(IDS, **options), dynamic)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_deepcopy_and_pickle_are_adapted_models_of_their_own(init_weights: Any) -> None:
    model = adapted(tiny_llama(), init_weights)
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(logits(other), expected)
        mc.unload(other)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copies[0]), logits(tiny_llama()))


def test_an_unpickled_model_works_in_a_fresh_process(tmp_path: Any) -> None:
    import subprocess
    import sys

    model = adapted(TwoLinears(), "bat")
    x = torch.randn(3, 12)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]);"
        "model, x, y = torch.load(sys.argv[1], weights_only=False);"
        "assert torch.equal(model(x), y); import misscompile; misscompile.merge(model);"
        "assert type(model.up) is torch.nn.Linear; torch.testing.assert_close(model(x), y)"
    )
    import support

    folder = str(__import__("pathlib").Path(support.__file__).parent)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt"), folder], check=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = adapted(tiny_llama()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [parameter.grad for _, parameter in mc.trainable_parameters(model)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert a is not None
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b)


def test_a_base_checkpoint_loads_before_and_after_adapting() -> None:
    state = {name: torch.randn_like(value) * 0.1 for name, value in tiny_llama().state_dict().items()}
    before, after = tiny_llama(), adapted(tiny_llama())
    before.load_state_dict(state)
    adapted(before)
    after.load_state_dict(state)
    assert torch.equal(logits(before), logits(after))
    assert max_error(logits(after), logits(adapted(tiny_llama()))) > 1e-3
    with pytest.raises(RuntimeError, match=r"q_proj\.weight"):
        after.load_state_dict({k: v for k, v in state.items() if "q_proj" not in k})
    full = after.state_dict()
    assert sum("miss_block" in key for key in full) == 14
    assert set(full) - {key for key in full if "miss_block" in key} == set(state)


class _Count:
    """An accelerate hook that counts its calls."""

    def __new__(cls) -> Any:
        from accelerate.hooks import ModelHook

        class Hook(ModelHook):
            calls = 0

            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                self.calls += 1
                return args, kwargs

        return Hook()


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks_put_on_before_or_after(when: str) -> None:
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    expected, base = logits(adapted(tiny_llama())), logits(tiny_llama())
    model, hook = tiny_llama(), _Count()

    def add_hooks() -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                add_hook_to_module(module, hook)

    if when == "before":
        add_hooks()
    adapted(model)
    if when == "after":
        add_hooks()
    assert torch.equal(logits(model), expected)
    assert hook.calls == 15
    with mc.disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    merged = mc.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), expected)
    remove_hook_from_module(model, recurse=True)
    hook.calls = 0
    assert torch.equal(logits(model), expected)
    assert hook.calls == 0
    mc.unload(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [False, True])
def test_dispatch_model_with_a_device_map(when: str, offload: bool, tmp_path: Any) -> None:
    from accelerate import dispatch_model

    expected = logits(adapted(tiny_llama()))
    model = tiny_llama()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk" if offload else "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}

    def dispatch() -> None:
        dispatch_model(model, device_map=places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    if when == "after":
        adapted(model)
        dispatch()
    else:
        dispatch()
        if offload:
            config = mc.MissConfig(r=4, target_modules=["q_proj"])
            with pytest.raises(mc.UnsupportedModuleError, match=r"layers\.1\.self_attn\.q_proj.*offloads"):
                mc.adapt(model, config)
            return
        adapted(model)
    assert hasattr(model.model.layers[1].mlp.up_proj, "_hf_hook")
    assert torch.equal(logits(model), expected)
    if not offload:
        mc.merge(model)
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_parametrized_linears(init_weights: Any) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        first, second = nn.Linear(12, 8), nn.Linear(8, 20)
        return nn.Sequential(parametrizations.weight_norm(first), nn.Tanh(), parametrizations.orthogonal(second))

    x = torch.randn(3, 12)
    model = build()
    base = model(x)
    mc.adapt(model, mc.MissConfig(r=4, mini_r=2, target_modules="all-linear", init_weights=init_weights))
    assert torch.equal(model(x), base)
    fill_blocks(model)
    y = model(x)
    assert max_error(y, base) > 1e-3
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    with pytest.raises(mc.MergeError, match="parametrized"):
        mc.merge(twin, keep_adapters=True)
    mc.merge(twin)
    assert [type(twin[0]), type(twin[2])] == [nn.Linear, nn.Linear]
    assert {name for name, _ in twin.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(twin(x), y)
    assert torch.equal(model(x), y)
    mc.unload(model)
    assert torch.equal(model(x), base)
    assert hasattr(model[0], "parametrizations")


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear", init_weights=False))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert "14 sites" in mc.dump(model)
    with pytest.raises(mc.MergeError, match=r"q_proj.*meta"):
        mc.merge(model)
    filled = adapted(tiny_llama())
    model.load_state_dict(filled.state_dict(), assign=True)
    torch.testing.assert_close(
        model.model.layers[0].mlp(torch.ones(1, 32)), filled.model.layers[0].mlp(torch.ones(1, 32)), rtol=0, atol=0
    )


def test_a_tied_output_layer_is_not_merged_into_the_embedding() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    with pytest.warns(mc.MissWarning, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["lm_head"]))
    fill_blocks(model)
    expected = logits(model)
    with pytest.raises(mc.MergeError, match=r"lm_head.*model\.embed_tokens\.weight.*Untie"):
        mc.merge(model)
    assert torch.equal(logits(model), expected)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    mc.merge(model)
    torch.testing.assert_close(logits(model), expected)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_linears_that_share_a_weight_share_their_block() -> None:
    model = TwoLinears()
    model.other = nn.Linear(12, 8, bias=False)
    model.other.weight = model.up.weight
    mc.adapt(model, mc.MissConfig(r=4, target_modules=["up", "other"]))
    assert model.up.miss_block_default is model.other.miss_block_default
    fill_blocks(model)
    x = torch.randn(3, 12)
    expected = model.up(x)
    assert torch.equal(model.other(x), expected)
    mc.merge(model)
    assert model.up.weight is model.other.weight
    torch.testing.assert_close(model.up(x), expected)


@pytest.mark.parametrize("wrap", ["compile", "data parallel"])
def test_wrappers_are_adapted_inside(wrap: str) -> None:
    inner = TwoLinears()
    model = torch.compile(inner, backend="eager") if wrap == "compile" else nn.DataParallel(inner)
    x = torch.randn(70, 12)  # of few tokens, eager mode adds the product in another form than a compiled graph
    base = model(x)
    assert mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear")) is model
    fill_blocks(inner)
    assert max_error(model(x), base) > 1e-3
    assert torch.equal(model(x), inner(x))
    torch.testing.assert_close(model(x[:3]), inner(x[:3]))
    assert mc.unload(model) is model
    assert torch.equal(model(x), base)


def test_hooks_of_the_base_layer_still_run_and_an_unfrozen_weight_gets_its_gradient() -> None:
    for init_weights in VARIANTS:
        model = adapted(TwoLinears(), init_weights)
        seen: list[str] = []
        model.up.register_forward_hook(lambda *_, seen=seen: seen.append("forward"))
        model.up.register_forward_pre_hook(lambda *_, seen=seen: seen.append("pre"))
        model.up.weight.requires_grad_(True)
        model(torch.randn(3, 12)).sum().backward()
        assert seen == ["pre", "forward"]
        assert float(model.up.weight.grad.abs().max()) > 0


def test_the_module_tree_classes_and_names_stay() -> None:
    for make in (tiny_llama, tiny_gpt2):
        model = make()
        tree = [(name, type(module).__name__) for name, module in model.named_modules()]
        classes = [(name, type(module)) for name, module in model.named_modules()]
        names = [name for name, _ in model.named_parameters()]
        adapted(model)
        assert [(name, type(module).__name__) for name, module in model.named_modules()] == tree
        assert all(isinstance(model.get_submodule(name), kind) for name, kind in classes)
        assert [name for name, _ in model.named_parameters() if "miss_block" not in name] == names
        assert all("miss_block" in name for name, _ in mc.trainable_parameters(model))


def test_disable_nests_and_survives_an_error() -> None:
    model, x = adapted(TwoLinears()), torch.randn(3, 12)
    y = model(x)
    base = TwoLinears()
    base.load_state_dict(model.state_dict(), strict=False)
    with mc.disable_adapter(model) as inside:
        assert inside is model
        with mc.disable_adapter(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), y)
    with pytest.raises(ZeroDivisionError), mc.disable_adapter(model):
        _ = 1 / 0
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_merge_unmerge_and_unload_are_bit_exact(init_weights: Any, dtype: torch.dtype) -> None:
    model = adapted(TwoLinears().to(dtype), init_weights)
    x = torch.randn(3, 12).to(dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    y = model(x)
    mc.merge(model, keep_adapters=True)
    assert max_error(model(x), y) < (1e-5 if dtype is torch.float32 else 2e-2)
    assert not torch.equal(model.up.weight, weights["up.weight"])
    assert torch.equal(model.up.miss_block_default, weights["up.miss_block_default"])
    merged = model(x)
    with mc.disable_adapter(model):
        assert torch.equal(model.up.weight, weights["up.weight"])
        inside = model(x)
    assert torch.equal(model(x), merged)
    twin = copy.deepcopy(model)
    mc.unmerge(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)
    with mc.disable_adapter(model):
        assert torch.equal(model(x), inside)
    mc.unload(twin)
    assert torch.equal(twin(x), inside)
    assert type(twin.up) is nn.Linear
    with pytest.raises(mc.StateError, match="nothing is merged"):
        mc.unmerge(model)


def test_unmerge_refuses_when_the_weight_changed_since() -> None:
    model = adapted(TwoLinears())
    mc.merge(model, keep_adapters=True)
    with torch.no_grad():
        model.down.weight.add_(1.0)
    changed = model.down.weight.detach().clone()
    with pytest.raises(mc.MergeError, match=r"down.*changed"):
        mc.unmerge(model)
    assert torch.equal(model.down.weight, changed)


def test_printed_sentence_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    import peft

    config = {"r": 4, "target_modules": ["up", "down"]}
    peft.get_peft_model(TwoLinears(), peft.MissConfig(**config)).print_trainable_parameters()
    expected = capsys.readouterr().out
    mc.print_trainable_parameters(mc.adapt(TwoLinears(), mc.MissConfig(**config)))
    assert capsys.readouterr().out == expected
    assert expected.startswith("trainable params: 112 ||")


def test_conv1d_is_adapted_and_merged_in_its_own_layout() -> None:
    for init_weights in VARIANTS:
        model = adapted(tiny_gpt2(), init_weights)
        y = logits(model)
        assert max_error(y, logits(tiny_gpt2())) > 1e-3
        mc.merge(model)
        assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)


def test_nothing_is_warned_on_an_ordinary_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mc.MissWarning)
        adapted(tiny_llama())

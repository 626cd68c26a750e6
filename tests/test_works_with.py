"""What an adapted model must keep working with: torch.compile, generate, copies, hooks, device maps, meta, wrappers, …"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from support import VARIANTS, adapted, fields, fill_blocks, max_error, run, state
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations
from zoo import TwoLinears, tiny_gpt2, tiny_llama, token_batch

import misscompile as mc

IDS = token_batch()
variants = pytest.mark.parametrize("init_weights", VARIANTS)


# torch.compile


@variants
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


@pytest.mark.parametrize(("init_weights", "r"), [(True, 4), (True, 5), ("mini", 4), ("mini", 5), ("bat", 4)])
def test_inductor_computes_what_eager_computes(init_weights: Any, r: int) -> None:
    model = adapted(TwoLinears(), init_weights, r=r)
    x = torch.randn(3, 5, 12, requires_grad=True)

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *(p for _, p in mc.trainable_parameters(model))])]

    expected = step(model)
    torch.testing.assert_close(step(torch.compile(model, fullgraph=True)), expected, rtol=1e-4, atol=1e-5)


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
    first = run(compiled, IDS)
    with mc.disable_adapter(model):
        base = run(compiled, IDS)
    assert counter.frame_count == 2
    fill_blocks(model, seed=5)
    second = run(compiled, IDS)
    with mc.disable_adapter(model):
        assert torch.equal(run(compiled, IDS), base)
    assert counter.frame_count == 2
    assert max_error(first, base) > 1e-3
    assert max_error(second, first) > 1e-3


# Generation, copies, checkpoints


def test_generates_with_dynamic_and_static_cache() -> None:
    model = fill_blocks(adapted(tiny_llama()), std=0.3)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    dynamic = model.generate(IDS, **options)
    assert torch.equal(dynamic, model.generate(IDS, cache_implementation="static", **options))
    with mc.disable_adapter(model):
        assert not torch.equal(model.generate(IDS, **options), dynamic)


@variants
def test_deepcopy_and_pickle_are_adapted_models_of_their_own(init_weights: Any) -> None:
    model = adapted(tiny_llama(), init_weights)
    expected = run(model, IDS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(run(other, IDS), expected)
        mc.unload(other)
        assert torch.equal(run(other, IDS), run(tiny_llama(), IDS))
    assert torch.equal(run(model, IDS), expected)


def test_an_unpickled_model_works_in_a_fresh_process(tmp_path: Path) -> None:
    model = adapted(TwoLinears(), "bat")
    x = torch.randn(3, 12)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]);"
        "model, x, y = torch.load(sys.argv[1], weights_only=False);"
        "assert torch.equal(model(x), y); import misscompile; misscompile.merge(model);"
        "assert type(model.up) is torch.nn.Linear; torch.testing.assert_close(model(x), y)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt"), str(Path(__file__).parent)], check=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Any]:
        model = adapted(tiny_llama()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [parameter.grad for _, parameter in mc.trainable_parameters(model)]

    expected = gradients(False)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected)
    torch.testing.assert_close(gradients(True), expected)


def test_a_base_checkpoint_loads_before_and_after_adapting() -> None:
    values = {name: torch.randn_like(value) * 0.1 for name, value in tiny_llama().state_dict().items()}
    before, after = tiny_llama(), adapted(tiny_llama())
    before.load_state_dict(values)
    adapted(before)
    after.load_state_dict(values)
    assert torch.equal(run(before, IDS), run(after, IDS))
    assert max_error(run(after, IDS), run(adapted(tiny_llama()), IDS)) > 1e-3
    with pytest.raises(RuntimeError, match=r"q_proj\.weight"):
        after.load_state_dict({k: v for k, v in values.items() if "q_proj" not in k})
    blocks = {key for key in after.state_dict() if "miss_block" in key}
    assert len(blocks) == 14
    assert set(after.state_dict()) - blocks == set(values)


# Hooks and wrappers of others


class _Count(ModelHook):
    """Counts its calls."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks_put_on_before_or_after(when: str) -> None:
    expected, base = run(adapted(tiny_llama()), IDS), run(tiny_llama(), IDS)
    model, hook = tiny_llama(), _Count()

    def add_hooks() -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                add_hook_to_module(module, hook)

    for step in (add_hooks, lambda: adapted(model))[:: 1 if when == "before" else -1]:
        step()
    assert torch.equal(run(model, IDS), expected)
    assert hook.calls == 15
    with mc.disable_adapter(model):
        assert torch.equal(run(model, IDS), base)
    assert torch.equal(run(model, IDS), expected)
    assert torch.equal(run(copy.deepcopy(model), IDS), expected)
    torch.testing.assert_close(run(mc.merge(copy.deepcopy(model)), IDS), expected)
    remove_hook_from_module(model, recurse=True)
    hook.calls = 0
    assert torch.equal(run(model, IDS), expected)
    assert hook.calls == 0
    mc.unload(model)
    assert torch.equal(run(model, IDS), base)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [False, True])
def test_dispatch_model_with_a_device_map(when: str, offload: bool, tmp_path: Path) -> None:
    expected, model = run(adapted(tiny_llama()), IDS), tiny_llama()
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places["model.layers.1"] = "disk" if offload else "cpu"

    def dispatch() -> None:
        dispatch_model(model, device_map=places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    if when == "before":
        dispatch()
        if offload:
            with pytest.raises(mc.UnsupportedModuleError, match=r"layers\.1\.self_attn\.q_proj.*offloads"):
                mc.adapt(model, mc.MissConfig(r=4, target_modules=["q_proj"]))
            return
    adapted(model)
    if when == "after":
        dispatch()
    assert hasattr(model.model.layers[1].mlp.up_proj, "_hf_hook")
    assert torch.equal(run(model, IDS), expected)
    if not offload:
        torch.testing.assert_close(run(mc.merge(model), IDS), expected)


@variants
def test_parametrized_linears(init_weights: Any) -> None:
    first, second = parametrizations.weight_norm(nn.Linear(12, 8)), parametrizations.orthogonal(nn.Linear(8, 20))
    model, x = nn.Sequential(first, nn.Tanh(), second), torch.randn(3, 12)
    base = model(x)
    mc.adapt(model, mc.MissConfig(**fields(init_weights)))
    assert torch.equal(model(x), base)
    y = fill_blocks(model)(x)
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
    mlps = [each.model.layers[0].mlp for each in (model, filled)]
    assert torch.equal(*(mlp(torch.ones(1, 32)) for mlp in mlps))


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


# What a user sees


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_the_module_tree_classes_and_names_stay(make: Callable[[], nn.Module]) -> None:
    model = make()
    classes = [(name, type(module)) for name, module in model.named_modules()]
    names = [name for name, _ in model.named_parameters()]
    adapted(model)
    assert [(name, type(module).__name__) for name, module in model.named_modules()] == [(n, k.__name__) for n, k in classes]
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


def test_unmerge_refuses_when_the_weight_changed_since() -> None:
    model = mc.merge(adapted(TwoLinears()), keep_adapters=True)
    with torch.no_grad():
        model.down.weight.add_(1.0)
    changed = state(model)
    with pytest.raises(mc.MergeError, match=r"down.*changed"):
        mc.unmerge(model)
    torch.testing.assert_close(state(model), changed, rtol=0, atol=0)


def test_printed_sentence_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"r": 4, "target_modules": ["up", "down"]}
    peft.get_peft_model(TwoLinears(), peft.MissConfig(**config)).print_trainable_parameters()
    expected = capsys.readouterr().out
    mc.print_trainable_parameters(mc.adapt(TwoLinears(), mc.MissConfig(**config)))
    assert capsys.readouterr().out == expected
    assert expected.startswith("trainable params: 112 ||")


def test_nothing_is_warned_on_an_ordinary_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mc.MissWarning)
        adapted(tiny_llama())

"""What is trained in full beside the blocks (modules_to_save, bias), and the ways in which values get onto a model."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import max_error, reference_delta, run, same, shake, snapshot, state, train_step
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from zoo import normal, seeded, tiny_bert, tiny_llama, token_batch

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
X = normal(6, 12, seed=2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.down(self.norm(torch.tanh(self.up(x))))))
        return y


plain = seeded(Net)
HEAD, NORM, OWN = {"head.weight", "head.bias"}, {"norm.weight", "norm.bias"}, {"up.bias", "down.bias"}
TRAINED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "none": ({}, set()),
    "MiSS_only": ({"bias": "MiSS_only"}, OWN),
    "all": ({"bias": "all"}, OWN | {"norm.bias", "head.bias"}),
    "head": ({"modules_to_save": ["head"]}, HEAD),
    "norm and MiSS_only": ({"modules_to_save": ["norm"], "bias": "MiSS_only"}, NORM | OWN),
    "head and all": ({"modules_to_save": ["head"], "bias": "all"}, HEAD | OWN | {"norm.bias"}),
    "head, norm and MiSS_only": ({"modules_to_save": ["head", "norm"], "bias": "MiSS_only"}, HEAD | NORM | OWN),
}
MOST = "head, norm and MiSS_only"
FORMS: dict[str, dict[str, Any]] = {
    "balance": {},
    "r divides no width": {"r": 5},
    "random start": {"r": 3, "init_weights": False},
    "mini": {"init_weights": "mini"},
    "mini, r divides no width": {"r": 5, "init_weights": "mini", "mini_r": 4},
    "bat": {"init_weights": "bat"},
}
cases = pytest.mark.parametrize("case", list(TRAINED))
forms = pytest.mark.parametrize("form", list(FORMS))
three_forms = pytest.mark.parametrize("form", ["balance", "mini", "bat"])


def config(case: str = "head", form: str = "balance", **fields: Any) -> dict[str, Any]:
    return {"r": 4, "mini_r": 2, "target_modules": ["up", "down"]} | TRAINED[case][0] | FORMS[form] | fields


def adapted(case: str = "head", form: str = "balance", seed: int = 1, **fields: Any) -> nn.Module:
    return shake(mc.adapt(plain(), config(case, form, **fields)), seed).eval()


def copies(model: nn.Module, adapter: str = "default") -> set[str]:
    """The base names of the tensors that one adapter trains in full."""
    marker = f"miss_copy_{adapter}:"
    return {name.replace(marker, "") for name, _ in model.named_parameters() if marker in name}


def copy_of(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    return model.get_parameter(f"{path}.miss_copy_default:{own}").detach().clone()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Trained, disabled, unloaded


@cases
def test_what_is_trained_in_full_starts_at_the_base_and_trains(case: str) -> None:
    model = mc.adapt(plain(), config(case))
    assert torch.equal(run(model, X), run(plain(), X))
    assert copies(model) == TRAINED[case][1]
    assert len(mc.trainable_parameters(model)) == 2 + len(TRAINED[case][1])
    base, before = state(plain()), state(model)
    train_step(model, X)
    after = state(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name, _ in mc.trainable_parameters(model)
    }
    assert all(torch.equal(after[name], value) for name, value in base.items())


class Spectrum(nn.Module):
    """A real linear and a complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(12, 8), nn.Linear(8, 5, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).to(torch.complex64)).abs()  # type: ignore[no-any-return]


@pytest.mark.parametrize("route", ["module", "captured"])
def test_a_complex_module_to_save_trains_and_is_saved_loaded_and_merged(route: str, tmp_path: Path) -> None:
    make = seeded(Spectrum) if route == "module" else lambda: mc.capture(seeded(Spectrum)(), (X,))
    model = mc.adapt(make(), {"r": 4, "target_modules": ["up"], "modules_to_save": ["head"]})
    assert len(mc.trainable_parameters(model)) == 3
    before = run(model, X)
    mc.set_adapter(model, "default")
    train_step(shake(model), X)
    expected = run(model, X)
    assert max_error(expected, before) > 1e-2
    mc.save_adapter(model, tmp_path)
    assert torch.equal(run(mc.load_adapter(make(), tmp_path), X), expected)
    assert max_error(run(mc.merge(model), X), expected) < 1e-5
    head = model.get_parameter("head.weight")
    assert max_error(head.imag, seeded(Spectrum)().head.weight.imag) > 1e-2


@cases
@pytest.mark.parametrize("end", [mc.unload, lambda model: mc.delete_adapter(model, "default")], ids=["unload", "delete"])
def test_the_names_stay_and_disable_and_unload_restore_every_bit(case: str, end: Callable[[nn.Module], Any]) -> None:
    model, base = adapted(case), plain()
    expected = run(model, X)
    assert max_error(expected, run(base, X)) > 1e-2
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]  # no wrapper
    assert all(isinstance(module, type(base.get_submodule(name))) for name, module in model.named_modules())
    assert same({name: value for name, value in state(model).items() if "miss_" not in name}, state(base))
    with mc.disable_adapter(model):
        assert torch.equal(run(model, X), run(base, X))
    assert torch.equal(run(model, X), expected)
    end(model)
    assert same(state(model), state(base))
    assert torch.equal(run(model, X), run(base, X))
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in base.named_modules()}


def test_one_copy_for_each_adapter() -> None:
    model = adapted("head")
    first = run(model, X)
    shake(mc.adapt(model, config("head", bias="MiSS_only"), "other"), seed=7)
    second = run(model, X)
    assert max_error(second, first) > 1e-2
    assert copies(model) == HEAD
    assert copies(model, "other") == HEAD | OWN
    for name, expected in (("default", first), ("other", second), ("default", first)):
        mc.set_adapter(model, name)
        assert torch.equal(run(model, X), expected)
        assert all(f"_{name}" in parameter for parameter, _ in mc.trainable_parameters(model))
    mc.delete_adapter(model, "other")
    assert torch.equal(run(model, X), first)
    assert copies(model, "other") == set()


def test_two_adapters_that_train_one_tensor_are_neither_active_nor_merged_together() -> None:
    model = mc.adapt(adapted("head"), config("head"), "other")
    before = snapshot(model, X)
    for verb in (mc.set_adapter, mc.merge, functools.partial(mc.merge, keep_adapters=True)):
        with pytest.raises(mc.StateError, match=r"both train head\.(weight|bias)"):
            verb(model, ["default", "other"])
    assert snapshot(model, X) == before
    shake(mc.adapt(model, config("MiSS_only"), "biases"), seed=3)
    mc.set_adapter(model, ["default", "biases"])  # these two have nothing in common
    assert mc.active_adapters(model) == ("default", "biases")
    assert torch.isfinite(run(model, X)).all()


class Shifting(nn.Module):
    """Two biases, and the names of two adapters and theirs that give one string: `a` and `c_bias`, `a_c` and `bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias, self.c_bias = (
            nn.Linear(12, 8, bias=False),
            nn.Parameter(torch.zeros(8)),
            nn.Parameter(torch.zeros(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x) + self.bias) * 2 + self.c_bias


@pytest.mark.parametrize("route", ["module", "captured", "exported again"])
def test_names_of_adapters_and_of_tensors_stay_apart(route: str, tmp_path: Path) -> None:
    inner: Any = nn.Sequential(seeded(Shifting)())
    model = inner if route == "module" else mc.capture(inner, (X,))
    outputs = {}
    for seed, name in enumerate(("a", "a_c")):
        model = shake(mc.adapt(model, {"r": 4, "target_modules": ["up"], "bias": "all"}, name), seed)
        outputs[name] = run(model, X)
        mc.save_adapter(model, tmp_path / name, name)
    for name, expected in outputs.items():
        mc.set_adapter(model, name)
        assert torch.equal(run(model, X), expected)
        assert len(mc.trainable_parameters(model)) == 3
        if route == "exported again":
            again = mc.merge(torch.export.export(model, (X,)))
            assert_close(run(again, X), expected)
            assert {"0.up.weight", "0.bias", "0.c_bias"} <= {n for n, _ in again.named_parameters()}
    mc.set_adapter(model, "a")
    mc.delete_adapter(model, "a_c")
    assert torch.equal(run(model, X), outputs["a"])
    for name, expected in outputs.items():
        assert torch.equal(run(mc.load_adapter(model, tmp_path / name, f"{name}_again"), X), expected)


class Averaging(nn.Module):
    """Keeps a running mean, by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("ema", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        if self.training:
            self.ema = 0.5 * self.ema + 0.5 * y.detach().mean(0)
        return y + self.ema


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_module_to_save_assigns_to_itself_is_what_it_reads(compiled: bool, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(12, 8), seeded(Averaging)())
    plain_one, model = copy.deepcopy(base), mc.adapt(base, config(target_modules=["0"], modules_to_save=["1"]))
    plain_one.train(), model.train()
    called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    for _ in range(3):
        assert torch.equal(called(X), plain_one(X))
    found = model[1].ema
    assert not torch.equal(found, torch.zeros(8))
    mc.save_adapter(model, tmp_path)
    assert torch.equal(load_file(tmp_path / WEIGHTS)[f"{PREFIX}1.ema"], found)
    with mc.disable_adapter(model):
        assert torch.equal(model[1].ema, torch.zeros(8))  # the base's has nothing of it
    mc.merge(model)
    assert torch.equal(model[1].ema, found)


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_is_loaded_into_the_base_beside_its_copies(assign: bool) -> None:
    model = mc.adapt(
        nn.Sequential(nn.Linear(12, 8), seeded(Averaging)()), config(target_modules=["0"], modules_to_save=["1"])
    )
    values = {name: value + 1 for name, value in state(model).items() if "miss" not in name}
    before = run(shake(model).eval(), X)
    model.load_state_dict(
        {name: value for name, value in values.items() if name.startswith("1.")}, strict=False, assign=assign
    )
    assert torch.equal(run(model, X), before)
    with mc.disable_adapter(model):
        assert torch.equal(model[1].ema, values["1.ema"])
        assert torch.equal(model[1].proj.weight, values["1.proj.weight"])


def test_a_block_and_a_copy_of_one_weight_are_not_active_together() -> None:
    model = shake(mc.adapt(adapted("head"), {"r": 4, "target_modules": ["head"]}, "other"), seed=3)
    before = snapshot(model, X)
    for names in (["default", "other"], ["other", "default"]):
        for verb in (mc.set_adapter, mc.merge):
            with pytest.raises(mc.StateError, match=r"both train head\.weight, one of them in full"):
                verb(model, names)
    assert snapshot(model, X) == before


@pytest.mark.parametrize("make", [copy.deepcopy, fx.symbolic_trace], ids=["module", "graph"])
def test_merging_one_adapter_leaves_the_copy_that_another_one_trains(make: Callable[[nn.Module], Any]) -> None:
    """The copy stands under the name of the weight while it acts; the blocks of others are of the base's weight."""
    model = shake(mc.adapt(make(plain()), {"r": 4, "target_modules": ["up"]}, "blocks"), seed=3)
    only_blocks = run(model, X)
    model = shake(mc.adapt(model, {"r": 4, "target_modules": ["down"], "modules_to_save": ["up"]}, "copies"), seed=4)
    active = run(model, X)
    mc.merge(model, ["blocks"])
    assert torch.equal(run(model, X), active)
    mc.delete_adapter(model, "copies")
    assert_close(run(model, X), only_blocks)


class TwinNet(Net):
    """`down` has a twin of the same weight, and `head` a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(8, 20, bias=False)
        self.twin.weight, self.again = self.down.weight, self.head

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        y: Tensor = self.again(torch.tanh(self.down(h) - self.twin(torch.sin(h))))
        return y


@pytest.mark.parametrize("make", [copy.deepcopy, fx.symbolic_trace], ids=["module", "graph"])
def test_tied_modules_share_a_block_while_another_adapter_trains_one_of_them(make: Callable[[nn.Module], Any]) -> None:
    rules = {"r": 4, "target_modules": ["up"], "modules_to_save": ["twin"]}
    model = mc.adapt(mc.adapt(make(TwinNet()), rules, "copies"), {"r": 4, "target_modules": ["down", "twin"]}, "blocks")
    assert model.down.miss_block_blocks is model.twin.miss_block_blocks
    expected = run(shake(model), X)
    assert_close(run(mc.merge(model, "blocks"), X), expected)


def test_a_module_to_save_is_no_target_under_another_name() -> None:
    model = mc.adapt(TwinNet(), {"r": 4, "target_modules": ["up", "head"], "modules_to_save": ["again"]})
    assert copies(model) == HEAD
    assert [name for name, _ in model.named_parameters() if "miss_block" in name] == ["up.miss_block_default"]
    with pytest.raises(mc.NoMatchError, match=r"modules_to_save=\['again'\] takes 'head'"):
        mc.adapt(TwinNet(), {"r": 4, "target_modules": ["head"], "modules_to_save": ["again"]})


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_classification_task_adds_the_classifier(task: str, tmp_path: Path) -> None:
    model = mc.adapt(tiny_bert(), {"r": 4, "target_modules": ["query", "value"], "task_type": task})
    assert copies(model) == {"classifier.weight", "classifier.bias"}
    mc.save_adapter(shake(model), tmp_path)
    assert f"{PREFIX}classifier.weight" in load_file(tmp_path / WEIGHTS)
    loaded = mc.load_adapter(tiny_bert(), tmp_path)
    assert torch.equal(run(loaded, token_batch()), run(model, token_batch()))


# Merged, compiled, copied


@cases
@three_forms
def test_merge_writes_the_copies_and_unmerge_takes_them_back(case: str, form: str) -> None:
    model = adapted(case, form)
    expected, before = run(model, X), state(model)
    trained = {name: copy_of(model, name) for name in TRAINED[case][1]}
    mc.merge(model, keep_adapters=True)
    assert_close(run(model, X), expected)
    with mc.disable_adapter(model):
        assert torch.equal(run(model, X), run(plain(), X))
    mc.unmerge(model)
    assert same(state(model), before)
    assert torch.equal(run(model, X), expected)
    mc.merge(model)
    assert list(state(model)) == list(state(plain()))
    assert_close(run(model, X), expected)
    assert all(torch.equal(state(model)[name], value) for name, value in trained.items())


@pytest.mark.parametrize("keep_adapters", [False, True])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_merging_a_copy_of_a_tied_weight_is_refused_or_exact(saved: str, keep_adapters: bool) -> None:
    """The other module of the tie must not change with it, as it silently does in PEFT."""
    fields = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": [saved]}
    model = shake(mc.adapt(tiny_llama(tie_word_embeddings=True), fields)).eval()
    before, expected = state(model), run(model, token_batch())
    try:
        mc.merge(model, keep_adapters=keep_adapters)
    except mc.MergeError:
        assert same(state(model), before)
    assert max_error(run(model, token_batch()), expected) < 1e-4


def test_running_statistics_belong_to_the_copy(tmp_path: Path) -> None:
    make = seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)))
    model = shake(mc.adapt(make(), {"r": 4, "target_modules": ["0"], "modules_to_save": ["1"]}))
    model.train()(X)
    model.eval()
    with mc.disable_adapter(model):
        assert torch.equal(run(model, X), run(make(), X))
    mc.save_adapter(model, tmp_path)
    assert torch.equal(run(mc.load_adapter(make(), tmp_path), X), run(model, X))
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), X), run(model, X))
    expected = run(model, X)
    assert_close(run(mc.merge(model), X), expected)


@three_forms
def test_one_graph_under_compile(form: str) -> None:
    model = adapted(MOST, form)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_close(compiled(X), model(X))
    compiled(X).square().mean().backward()
    assert counter.frame_count == 1
    assert all(parameter.grad is not None for _, parameter in mc.trainable_parameters(model))
    shake(model, seed=9)  # other values in place
    assert_close(compiled(X), model(X))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_whole_adapted_model_of_its_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(MOST)
    twin, expected = clone(model), run(model, X)
    assert torch.equal(run(twin, X), expected)
    assert same(state(twin), state(model))
    shake(twin, seed=5)
    assert max_error(run(twin, X), expected) > 1e-2
    mc.unload(twin)
    assert torch.equal(run(twin, X), run(plain(), X))
    assert torch.equal(run(model, X), expected)


# Files


@cases
@forms
def test_files_both_ways_with_peft(tmp_path: Path, case: str, form: str) -> None:
    fields, expected = TRAINED[case]
    model = adapted(case, form)
    mc.save_adapter(model, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / WEIGHTS)
    biases = {f"{name}.base_layer.bias" for name in ("up", "down") if f"{name}.bias" in expected}
    assert {key.removeprefix(PREFIX) for key in stored} == (expected - OWN) | biases | {"up.miss_block", "down.miss_block"}
    for name in expected:  # the base's own tensors are not what is stored
        key = name.replace(".bias", ".base_layer.bias") if name in OWN else name
        assert torch.equal(stored[f"{PREFIX}{key}"], copy_of(model, name))
        assert not torch.equal(stored[f"{PREFIX}{key}"], plain().get_parameter(name))
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (written["bias"], written["modules_to_save"]) == (fields.get("bias", "none"), fields.get("modules_to_save"))
    assert torch.equal(run(mc.load_adapter(plain(), tmp_path / "ours"), X), run(model, X))
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours").eval()
    assert_close(run(theirs, X), run(model, X))
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_file(tmp_path / "theirs" / WEIGHTS)
    if case != "head and all":  # there PEFT writes the biases of the head under two of its own names too
        assert back.keys() == stored.keys()
    assert all(torch.equal(back[key], value) for key, value in stored.items())
    assert torch.equal(run(mc.load_adapter(plain(), tmp_path / "theirs"), X), run(model, X))


@cases
@forms
def test_what_peft_trained_in_full_is_read(tmp_path: Path, case: str, form: str) -> None:
    theirs = peft.get_peft_model(plain(), peft.MissConfig(**config(case, form))).eval()
    assert isinstance(theirs, peft.PeftModel)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mc.load_adapter(plain(), tmp_path / "theirs")
    torch.testing.assert_close(run(ours, X), run(theirs, X), rtol=0, atol=1e-5)
    mc.save_adapter(ours, tmp_path / "ours")
    assert torch.equal(run(mc.load_adapter(plain(), tmp_path / "ours"), X), run(ours, X))
    with mc.disable_adapter(ours):
        assert torch.equal(run(ours, X), run(plain(), X))


def edit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], Any]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def as_bone(folder: Path) -> None:
    """MiSS under its first name: another `peft_type` and another name of the block."""
    values = json.loads((folder / CONFIG).read_text()) | {"peft_type": "BONE"}
    dropped = ("miss_dropout", "mini_r")
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key not in dropped}))
    edit(lambda found: {key.replace("miss_block", "bone_block"): value for key, value in found.items()})(folder)


@pytest.mark.parametrize("form", ["balance", "r divides no width", "bat"])
def test_bone_checkpoints(tmp_path: Path, form: str) -> None:
    model = adapted("head", form)
    mc.save_adapter(model, tmp_path)
    as_bone(tmp_path)
    loaded = mc.load_adapter(plain(), tmp_path)
    assert same(state(loaded), state(model))
    assert torch.equal(run(loaded, X), run(model, X))
    swapped = mc.hotswap_adapter(adapted("head", form, seed=8), tmp_path)
    assert torch.equal(run(swapped, X), run(model, X))
    if form != "bat":  # which a folder alone cannot be a LoRA of
        mc.save_as_lora(tmp_path, tmp_path / "lora", base_model=plain())
        assert_close(run(peft.PeftModel.from_pretrained(plain(), tmp_path / "lora").eval(), X), run(model, X))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_low_cpu_mem_usage_loads_the_same(tmp_path: Path, is_trainable: bool) -> None:
    model = adapted(MOST)
    mc.save_adapter(model, tmp_path)
    stored = (tmp_path / WEIGHTS).read_bytes()
    loaded = mc.load_adapter(plain(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=True)
    assert torch.equal(run(loaded, X), run(model, X))
    assert bool(mc.trainable_parameters(loaded)) == is_trainable
    if is_trainable:  # the file is mapped privately: training does not write to it
        shake(loaded)
        assert (tmp_path / WEIGHTS).read_bytes() == stored


# Hot swap


@cases
@three_forms
def test_a_swap_has_the_other_values_and_recompiles_nothing(tmp_path: Path, case: str, form: str) -> None:
    other = adapted(case, form, seed=4)
    mc.save_adapter(other, tmp_path)
    model = adapted(case, form)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    before = run(compiled, X)
    parameters = dict(model.named_parameters())
    assert mc.hotswap_adapter(model, tmp_path) is model
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert max_error(run(compiled, X), before) > 1e-2
    assert torch.equal(run(model, X), run(other, X))
    assert_close(run(compiled, X), run(other, X))
    assert counter.frame_count == 1
    assert mc.trainable_parameters(model)


BLOCK, WEIGHT = f"{PREFIX}up.miss_block", f"{PREFIX}head.weight"
SWAP, BOTH = ("swap",), ("swap", "load")
MISMATCHES: dict[str, tuple[tuple[str, ...], dict[str, Any], Callable[[Path], Any], str]] = {
    # what refuses it, the fields of the adapter in the folder, what happens to its files, and what is told
    "another rank": (SWAP, {"r": 2}, bool, "shape"),
    "another variant": (SWAP, {"init_weights": "mini"}, bool, "variant"),
    "another dropout": (SWAP, {"miss_dropout": 0.5}, bool, "miss_dropout"),
    "fewer modules": (SWAP, {"target_modules": ["up"]}, bool, "down.miss_block"),
    "more modules": (SWAP, {"target_modules": ["up", "down", "head"], "modules_to_save": None}, bool, "head"),
    "no head": (SWAP, {"modules_to_save": None}, bool, "head"),
    "biases too": (SWAP, {"bias": "MiSS_only"}, bool, "bias"),
    "a missing key": (BOTH, {}, edit(lambda t: {k: v for k, v in t.items() if k != WEIGHT}), r"head\.weight"),
    "a surplus key": (
        BOTH,
        {},
        edit(lambda t: t | {f"{PREFIX}norm.weight": torch.zeros(8)}),
        rf"key '{PREFIX}norm\.weight'",
    ),
    "no such tensor": (BOTH, {}, edit(lambda t: t | {f"{PREFIX}head.scale": torch.zeros(5)}), rf"key '{PREFIX}head\.scale'"),
    "an unknown module": (BOTH, {}, edit(lambda t: t | {f"{PREFIX}side.miss_block": torch.zeros(4, 8)}), "side"),
    "a shape": (BOTH, {}, edit(lambda t: t | {WEIGHT: torch.zeros(4, 20)}), rf"key '{WEIGHT}' has shape \(4, 20\)"),
    "integers": (BOTH, {}, edit(lambda t: t | {WEIGHT: torch.zeros(5, 20).long()}), rf"'{WEIGHT}'"),
    "a block of integers": (BOTH, {}, edit(lambda t: t | {BLOCK: torch.zeros(4, 8).long()}), rf"'{BLOCK}'"),
    "a block of Bone that is missing": (
        BOTH,
        {"modules_to_save": None},
        lambda folder: (as_bone(folder), edit(lambda t: {k: v for k, v in t.items() if "down" not in k})(folder)),
        "down",
    ),
    "damaged": (BOTH, {}, lambda folder: (folder / WEIGHTS).write_bytes(b"no tensors here"), "safetensors"),
}


@pytest.mark.parametrize(("how", "case"), [(how, case) for case, (hows, *_) in MISMATCHES.items() for how in hows])
def test_a_folder_that_does_not_fit_changes_nothing(tmp_path: Path, how: str, case: str) -> None:
    _, fields, damage, told = MISMATCHES[case]
    mc.save_adapter(adapted("head", seed=4, **fields), tmp_path)
    damage(tmp_path)
    model = adapted("head") if how == "swap" else plain()
    before = snapshot(model, X)
    with pytest.raises(mc.CheckpointError, match=told) as caught:
        mc.hotswap_adapter(model, tmp_path) if how == "swap" else mc.load_adapter(model, tmp_path)
    if "key" in told:
        assert str(caught.value).startswith(str(tmp_path / WEIGHTS))
    assert snapshot(model, X) == before


@pytest.mark.parametrize(
    ("make", "folder", "name", "kind", "told"),
    [
        (adapted, "", "other", mc.UnknownAdapterError, "'other'"),
        (plain, "", "default", mc.UnknownAdapterError, "'default'"),
        (adapted, "nothing", "default", mc.CheckpointNotFoundError, "nothing"),
        (lambda: mc.merge(adapted(), keep_adapters=True), "", "default", mc.StateError, "unmerge"),
    ],
    ids=["another name", "no adapter", "no folder", "a merged model"],
)
def test_a_swap_in_a_wrong_state(
    tmp_path: Path, make: Callable[[], nn.Module], folder: str, name: str, kind: type[Exception], told: str
) -> None:
    mc.save_adapter(adapted("head", seed=4), tmp_path)
    model = make()
    before = snapshot(model, X)
    with pytest.raises(kind, match=told):
        mc.hotswap_adapter(model, tmp_path / folder, name)
    assert snapshot(model, X) == before


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The working directory is an empty one, in which the id of a repository is no folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return monkeypatch


def test_the_id_of_a_repository(tmp_path: Path, hub: pytest.MonkeyPatch) -> None:
    model = adapted("head")
    mc.save_adapter(model, tmp_path / "downloaded")
    asked: list[tuple[str, Any]] = []

    def download(repository: str, revision: str | None = None, **options: Any) -> str:
        asked.append((repository, revision))
        assert set(options["allow_patterns"]) == {CONFIG, WEIGHTS}
        return str(tmp_path / "downloaded")

    hub.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(run(mc.load_adapter(plain(), "someone/adapter", revision="v2"), X), run(model, X))
    swapped = mc.hotswap_adapter(adapted("head", seed=6), "someone/adapter")
    assert torch.equal(run(swapped, X), run(model, X))
    assert asked == [("someone/adapter", "v2"), ("someone/adapter", None)]


def test_a_local_folder_comes_before_the_hub(hub: pytest.MonkeyPatch) -> None:
    mc.save_adapter(adapted("head"), "someone/adapter")
    hub.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    mc.load_adapter(plain(), "someone/adapter")


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("offline"), "not cached"])
def test_a_repository_that_cannot_be_reached(hub: pytest.MonkeyPatch, error: Any) -> None:
    if error == "not cached":
        error = huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    def download(*_: Any, **__: Any) -> str:
        raise error

    hub.setattr(huggingface_hub, "snapshot_download", download)
    model = plain()
    before = snapshot(model, X)
    with pytest.raises(mc.CheckpointNotFoundError, match="someone/adapter"):
        mc.load_adapter(model, "someone/adapter")
    assert snapshot(model, X) == before


# Tied weights on every route


class TiedNet(nn.Module):
    """An embedding and an output layer with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.out = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.middle(self.embed(ids))))
        return y


class TiedLinears(nn.Module):
    """Two linears with one weight behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.left, self.right = nn.Embedding(20, 12), nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.right.weight = self.left.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y: Tensor = self.left(x) + self.right(x).sin()
        return y


IDS = token_batch(3, 5, 20)


def reloaded_program(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (IDS,)), buffer)
    return torch.export.load(buffer)


TIED_ROUTES: dict[str, Callable[[nn.Module], Any]] = {
    "module": copy.deepcopy,
    "captured": lambda model: mc.capture(model, (IDS,)),
    "exported": lambda model: torch.export.export(model, (IDS,)),
    "loaded program": reloaded_program,
    "traced": fx.symbolic_trace,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", ["embed", "out"])
@pytest.mark.parametrize("route", TIED_ROUTES)
def test_of_two_tied_modules_the_one_that_is_saved_is_trained(route: str, saved: str, tmp_path: Path) -> None:
    base, fields = seeded(TiedNet)().double(), {"r": 4, "target_modules": ["middle"], "modules_to_save": [saved]}
    model = shake(mc.adapt(TIED_ROUTES[route](base), fields))
    expected = copy.deepcopy(base)
    block = model.get_parameter("middle.miss_block_default")
    expected.middle.weight.data += reference_delta(True, block, base.middle.weight)
    trained = model.get_parameter(f"{saved}.miss_copy_default:weight")
    expected.get_submodule(saved).weight = nn.Parameter(trained.detach().clone())
    assert max_error(expected(IDS), base(IDS)) > 1e-2
    assert max_error(model(IDS), expected(IDS)) < 1e-12
    with mc.disable_adapter(model):
        assert max_error(model(IDS), base(IDS)) < 1e-14
    mc.save_adapter(model, tmp_path)
    for other in TIED_ROUTES.values():
        assert max_error(mc.load_adapter(other(base), tmp_path)(IDS), expected(IDS)) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", TIED_ROUTES)
def test_tied_linears_share_one_block_and_are_merged_as_one(route: str) -> None:
    """A program that was saved and loaded has two parameters over one memory."""
    base = seeded(TiedLinears)().double()
    model = shake(mc.adapt(TIED_ROUTES[route](base), {"r": 4, "target_modules": ["left", "right"]}))
    blocks = {name: p for name, p in model.named_parameters(remove_duplicate=False) if "miss_block" in name}
    assert len(blocks) == 2
    assert len(set(map(id, blocks.values()))) == 1
    weight = base.left.weight + reference_delta(True, next(iter(blocks.values())), base.left.weight)
    product = base.embed(IDS) @ weight.t()
    expected = product + product.sin()
    assert max_error(model(IDS), expected) < 1e-12
    mc.merge(model)
    assert max_error(model(IDS), expected) < 1e-12
    assert model.get_parameter("left.weight") is model.get_parameter("right.weight")

"""What is trained in full beside the blocks (modules_to_save, bias), and the ways in which values get onto a model."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import max_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from zoo import tiny_bert, tiny_llama, token_batch

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_FIELDS: dict[str, Any] = {"r": 4, "mini_r": 2, "target_modules": ["up", "down"]}
VARIANTS: tuple[Any, ...] = (True, "mini", "bat")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.down(self.norm(torch.tanh(self.up(x))))))
        return y


TRAINED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "none": ({}, set()),
    "MiSS_only": ({"bias": "MiSS_only"}, {"up.bias", "down.bias"}),
    "all": ({"bias": "all"}, {"up.bias", "norm.bias", "down.bias", "head.bias"}),
    "head": ({"modules_to_save": ["head"]}, {"head.weight", "head.bias"}),
    "head, norm and MiSS_only": (
        {"modules_to_save": ["head", "norm"], "bias": "MiSS_only"},
        {"head.weight", "head.bias", "norm.weight", "norm.bias", "up.bias", "down.bias"},
    ),
}
cases = pytest.mark.parametrize("case", list(TRAINED))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def x() -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model: Any) -> Tensor:
    y: Tensor = model(x())
    return y


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Other values in all that trains."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in mc.trainable_parameters(model):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted(case: str = "head", init_weights: Any = True, seed: int = 1, **fields: Any) -> nn.Module:
    config = BASE_FIELDS | TRAINED[case][0] | {"init_weights": init_weights} | fields
    return shake(mc.adapt(plain(), config), seed).eval()


def copies(model: nn.Module, adapter: str = "default") -> set[str]:
    """The base names of the tensors that one adapter trains in full."""
    marker = f"miss_copy_{adapter}_"
    return {name.replace(marker, "") for name, _ in model.named_parameters() if marker in name}


# Trained, disabled, unloaded


@cases
def test_what_is_trained_in_full_starts_at_the_base_and_trains(case: str) -> None:
    model = mc.adapt(plain(), BASE_FIELDS | TRAINED[case][0])
    assert torch.equal(run(model), run(plain()))
    assert copies(model) == TRAINED[case][1]
    assert len(mc.trainable_parameters(model)) == 2 + len(TRAINED[case][1])
    base, before = state(plain()), state(model)
    optimizer = torch.optim.SGD([p for _, p in mc.trainable_parameters(model)], lr=0.1)
    model(x()).square().mean().backward()
    optimizer.step()
    after = state(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name, _ in mc.trainable_parameters(model)
    }
    assert all(torch.equal(after[name], value) for name, value in base.items())


@cases
def test_disable_and_unload_restore_every_bit(case: str) -> None:
    model = adapted(case)
    base, expected = plain(), run(adapted(case))
    assert (run(model) - run(base)).abs().max() > 1e-2
    with mc.disable_adapter(model):
        assert torch.equal(run(model), run(base))
    assert torch.equal(run(model), expected)
    mc.unload(model)
    assert same(state(model), state(base))
    assert torch.equal(run(model), run(base))
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in base.named_modules()}


def test_delete_gives_the_base_back() -> None:
    model = adapted("head, norm and MiSS_only")
    mc.delete_adapter(model, "default")
    assert same(state(model), state(plain()))
    assert torch.equal(run(model), run(plain()))


@cases
def test_there_is_no_wrapper_and_no_name_changes(case: str) -> None:
    model, base = adapted(case), plain()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert all(isinstance(module, type(base.get_submodule(name))) for name, module in model.named_modules())
    own = [name for name, _ in model.named_parameters() if "miss_" not in name]
    assert own == [name for name, _ in base.named_parameters()]
    for name, value in base.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], value)


def test_one_copy_for_each_adapter() -> None:
    model = adapted("head")
    first = run(model)
    shake(mc.adapt(model, BASE_FIELDS | {"modules_to_save": ["head"], "bias": "MiSS_only"}, "other"), seed=7)
    second = run(model)
    assert (second - first).abs().max() > 1e-2
    assert copies(model) == {"head.weight", "head.bias"}
    assert copies(model, "other") == {"head.weight", "head.bias", "up.bias", "down.bias"}
    for name, expected in (("default", first), ("other", second), ("default", first)):
        mc.set_adapter(model, name)
        assert torch.equal(run(model), expected)
        assert all(f"_{name}" in parameter for parameter, _ in mc.trainable_parameters(model))
    mc.delete_adapter(model, "other")
    assert torch.equal(run(model), first)
    assert copies(model, "other") == set()


def test_two_adapters_that_train_one_tensor_are_not_active_together() -> None:
    model = adapted("head")
    mc.adapt(model, BASE_FIELDS | {"modules_to_save": ["head"]}, "other")
    before, expected = mc.active_adapters(model), run(model)
    with pytest.raises(mc.StateError, match=r"both train head\.(weight|bias)"):
        mc.set_adapter(model, ["default", "other"])
    assert mc.active_adapters(model) == before
    assert torch.equal(run(model), expected)
    shake(mc.adapt(model, BASE_FIELDS | {"bias": "MiSS_only"}, "biases"), seed=3)
    mc.set_adapter(model, ["default", "biases"])  # these two have nothing in common
    assert mc.active_adapters(model) == ("default", "biases")
    assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_classification_task_adds_the_classifier(task: str, tmp_path: Path) -> None:
    model = mc.adapt(tiny_bert(), {"r": 4, "target_modules": ["query", "value"], "task_type": task})
    assert copies(model) == {"classifier.weight", "classifier.bias"}
    mc.save_adapter(shake(model), tmp_path)
    assert f"{PREFIX}classifier.weight" in load_file(tmp_path / WEIGHTS)
    loaded = mc.load_adapter(tiny_bert(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(token_batch()).logits, model(token_batch()).logits)


# Merged, compiled, copied


@cases
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_merge_writes_the_copies_and_unmerge_takes_them_back(case: str, init_weights: Any) -> None:
    model = adapted(case, init_weights)
    expected, before = run(model), state(model)
    mc.merge(model, keep_adapters=True)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    with mc.disable_adapter(model):
        assert torch.equal(run(model), run(plain()))
    mc.unmerge(model)
    assert same(state(model), before)
    assert torch.equal(run(model), expected)
    mc.merge(model)
    assert list(state(model)) == list(state(plain()))
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    for name in TRAINED[case][1]:
        assert torch.equal(state(model)[name], next(v for key, v in before.items() if _is_copy_of(key, name)))


def _is_copy_of(key: str, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return key == f"{path}.miss_copy_default_{own}"


@pytest.mark.parametrize("keep_adapters", [False, True])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_merging_a_copy_of_a_tied_weight_is_refused_or_exact(saved: str, keep_adapters: bool) -> None:
    """The other module of the tie must not change with it, as it silently does in PEFT."""
    fields = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": [saved]}
    model = shake(mc.adapt(tiny_llama(tie_word_embeddings=True), fields)).eval()
    before = state(model)
    with torch.no_grad():
        expected = model(token_batch()).logits
        try:
            mc.merge(model, keep_adapters=keep_adapters)
        except mc.MergeError:
            assert same(state(model), before)
        assert max_error(model(token_batch()).logits, expected) < 1e-4


def test_running_statistics_belong_to_the_copy(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).eval()

    model = shake(mc.adapt(make(), {"r": 4, "target_modules": ["0"], "modules_to_save": ["1"]}))
    model.train()(x())
    model.eval()
    with mc.disable_adapter(model):
        assert torch.equal(run(model), run(make()))
    mc.save_adapter(model, tmp_path)
    assert torch.equal(run(mc.load_adapter(make(), tmp_path)), run(model))
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(make(), tmp_path).eval()), run(model))
    expected = run(model)
    torch.testing.assert_close(run(mc.merge(model)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_one_graph_under_compile(init_weights: Any) -> None:
    model = adapted("head, norm and MiSS_only", init_weights)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x()), model(x()), rtol=1e-5, atol=1e-6)
    compiled(x()).square().mean().backward()
    assert counter.frame_count == 1
    assert all(parameter.grad is not None for _, parameter in mc.trainable_parameters(model))
    shake(model, seed=9)  # other values in place
    torch.testing.assert_close(compiled(x()), model(x()), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_whole_adapted_model_of_its_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted("head, norm and MiSS_only")
    twin, expected = clone(model), run(model)
    assert torch.equal(run(twin), expected)
    assert same(state(twin), state(model))
    shake(twin, seed=5)
    assert (run(twin) - expected).abs().max() > 1e-2
    assert torch.equal(run(model), expected)
    mc.unload(twin)
    assert torch.equal(run(twin), run(plain()))
    assert torch.equal(run(model), expected)


# Files


@cases
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_files_both_ways_with_peft(tmp_path: Path, case: str, init_weights: Any) -> None:
    model = adapted(case, init_weights)
    mc.save_adapter(model, tmp_path / "ours")
    assert torch.equal(run(mc.load_adapter(plain(), tmp_path / "ours")), run(model))
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(theirs), run(model), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    assert torch.equal(run(mc.load_adapter(plain(), tmp_path / "theirs")), run(model))


def _as_bone(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text()) | {"peft_type": "BONE"}
    dropped = ("miss_dropout", "mini_r")
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key not in dropped}))
    renamed = {key.replace("miss_block", "bone_block"): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_bone_checkpoints(tmp_path: Path, init_weights: Any) -> None:
    model = adapted("head", init_weights)
    mc.save_adapter(model, tmp_path)
    _as_bone(tmp_path)
    loaded = mc.load_adapter(plain(), tmp_path)
    assert torch.equal(run(loaded), run(model))
    swapped = mc.hotswap_adapter(adapted("head", init_weights, seed=8), tmp_path)
    assert torch.equal(run(swapped), run(model))


def test_a_bone_block_that_is_not_there_is_told(tmp_path: Path) -> None:
    mc.save_adapter(adapted("none"), tmp_path)
    _as_bone(tmp_path)
    kept = {key: value for key, value in load_file(tmp_path / WEIGHTS).items() if "down" not in key}
    save_file(kept, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(mc.CheckpointError, match="down"):
        mc.load_adapter(plain(), tmp_path)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_low_cpu_mem_usage_loads_the_same(tmp_path: Path, is_trainable: bool) -> None:
    model = adapted("head, norm and MiSS_only")
    mc.save_adapter(model, tmp_path)
    stored = (tmp_path / WEIGHTS).read_bytes()
    loaded = mc.load_adapter(plain(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=True)
    assert torch.equal(run(loaded), run(model))
    assert bool(mc.trainable_parameters(loaded)) == is_trainable
    if is_trainable:  # the file is mapped privately: training does not write to it
        shake(loaded)
        assert (tmp_path / WEIGHTS).read_bytes() == stored


# Hot swap


@cases
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_swap_has_the_other_values_and_recompiles_nothing(tmp_path: Path, case: str, init_weights: Any) -> None:
    other = adapted(case, init_weights, seed=4)
    mc.save_adapter(other, tmp_path)
    model = adapted(case, init_weights)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    before = run(compiled)
    parameters = dict(model.named_parameters())
    assert mc.hotswap_adapter(model, tmp_path) is model
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert (run(compiled) - before).abs().max() > 1e-2
    assert torch.equal(run(model), run(other))
    torch.testing.assert_close(run(compiled), run(other), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    assert mc.trainable_parameters(model)


def _edit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return edit


LAST = f"{PREFIX}head.weight"
MISMATCHES: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "another rank": ({"r": 2}, lambda folder: None, "shape"),
    "another variant": ({"init_weights": "mini"}, lambda folder: None, "variant"),
    "another dropout": ({"miss_dropout": 0.5}, lambda folder: None, "miss_dropout"),
    "fewer modules": ({"target_modules": ["up"]}, lambda folder: None, "down.miss_block"),
    "more modules": ({"target_modules": ["up", "down", "head"], "modules_to_save": None}, lambda folder: None, "head"),
    "no head": ({"modules_to_save": None}, lambda folder: None, "head"),
    "biases too": ({"bias": "MiSS_only"}, lambda folder: None, "bias"),
    "missing key": ({}, _edit(lambda t: {k: v for k, v in t.items() if k != LAST}), "head.weight"),
    "surplus key": ({}, _edit(lambda t: t | {f"{PREFIX}norm.weight": torch.zeros(8)}), "norm.weight"),
    "unknown module": ({}, _edit(lambda t: t | {f"{PREFIX}side.miss_block": torch.zeros(4, 8)}), "side"),
    "a shape": ({}, _edit(lambda t: t | {LAST: torch.zeros(5, 21)}), "head.weight"),
    "integers": ({}, _edit(lambda t: t | {LAST: torch.zeros(5, 20, dtype=torch.int64)}), "head.weight"),
    "a block of integers": (
        {},
        _edit(lambda t: t | {f"{PREFIX}up.miss_block": torch.zeros(4, 8, dtype=torch.int64)}),
        "up.miss_block",
    ),
    "damaged": ({}, lambda folder: (folder / WEIGHTS).write_bytes(b"no tensors here") and None, "safetensors"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("case", list(MISMATCHES))
def test_a_swap_is_all_or_nothing(tmp_path: Path, case: str) -> None:
    fields, damage, told = MISMATCHES[case]
    mc.save_adapter(adapted("head", seed=4, **fields), tmp_path)
    damage(tmp_path)
    model = adapted("head")
    before, expected = state(model), run(model)
    with pytest.raises(mc.CheckpointError, match=told):
        mc.hotswap_adapter(model, tmp_path)
    assert same(state(model), before)
    assert torch.equal(run(model), expected)


def test_a_swap_in_a_wrong_state(tmp_path: Path) -> None:
    mc.save_adapter(adapted("head", seed=4), tmp_path)
    with pytest.raises(mc.UnknownAdapterError):
        mc.hotswap_adapter(adapted("head"), tmp_path, "other")
    with pytest.raises(mc.UnknownAdapterError):
        mc.hotswap_adapter(plain(), tmp_path)
    with pytest.raises(mc.CheckpointNotFoundError):
        mc.hotswap_adapter(adapted("head"), tmp_path / "nothing")
    model = mc.merge(adapted("head"), keep_adapters=True)
    before = state(model)
    with pytest.raises(mc.StateError, match="unmerge"):
        mc.hotswap_adapter(model, tmp_path)
    assert same(state(model), before)


# The Hub


def test_the_id_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("head")
    mc.save_adapter(model, tmp_path / "downloaded")
    asked: list[tuple[str, Any]] = []

    def download(repository: str, revision: str | None = None, **options: Any) -> str:
        asked.append((repository, revision))
        assert set(options["allow_patterns"]) == {CONFIG, WEIGHTS}
        return str(tmp_path / "downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(run(mc.load_adapter(plain(), "someone/adapter", revision="v2")), run(model))
    swapped = mc.hotswap_adapter(adapted("head", seed=6), "someone/adapter")
    assert torch.equal(run(swapped), run(model))
    assert asked == [("someone/adapter", "v2"), ("someone/adapter", None)]


def test_a_local_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mc.save_adapter(adapted("head"), tmp_path / "someone" / "adapter")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    mc.load_adapter(plain(), "someone/adapter")


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("offline"), "not cached"])
def test_a_repository_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    if error == "not cached":
        error = huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    model = plain()
    with pytest.raises(mc.CheckpointNotFoundError, match="someone/adapter"):
        mc.load_adapter(model, "someone/adapter")
    assert same(state(model), state(plain()))

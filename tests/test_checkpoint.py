"""Adapters on disk: round trips, PEFT's folder format both ways, and every way in which a folder can be wrong."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import Trap, blocks_of, fill_blocks, run, same, says, snapshot, stable_id
from torch import Tensor, nn
from zoo import normal, seeded, tiny_llama, token_batch, two_linears

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning", "error:.*adapter.*:UserWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP, DOWN = "base_model.model.up.miss_block", "base_model.model.down.miss_block"

FIELDS: dict[str, dict[str, Any]] = {
    "balance": {"r": 5},  # divides neither 12 nor 8
    "random start": {"r": 3, "init_weights": False},
    "mini": {"r": 5, "init_weights": "mini", "mini_r": 4},
    "bat": {"r": 4, "init_weights": "bat"},
}
TARGETS = {"target_modules": ["up", "down"]}
X = normal(3, 12, seed=2)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Any]] = {
    "two linears": (two_linears, X, ["up", "down"]),
    "llama": (tiny_llama, token_batch(), "all-linear"),
}
variants = pytest.mark.parametrize("variant", list(FIELDS))
models = pytest.mark.parametrize("of", list(MODELS))


def adapted(variant: str = "balance", base: nn.Module | None = None, name: str = "default", **fields: Any) -> nn.Module:
    """A model with random non-zero blocks."""
    config = TARGETS | FIELDS[variant] | fields
    return fill_blocks(mc.adapt(two_linears() if base is None else base, config, name), std=0.3)


def adapted_llama(**fields: Any) -> nn.Module:
    return adapted(base=tiny_llama(), **fields)


def blocks(model: nn.Module) -> dict[str, Tensor]:
    return {name: block.detach().clone() for name, block in blocks_of(model).items()}


def read_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return values


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Break = Callable[[Path], Any]


def tensors(change: Change) -> Break:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


# Round trips


@variants
@pytest.mark.parametrize(("of", "dropout"), [("two linears", 0.0), ("two linears", 0.25), ("llama", 0.25)])
def test_round_trip(tmp_path: Path, of: str, variant: str, dropout: float) -> None:
    make, x, targets = MODELS[of]
    saved = adapted(variant, make(), target_modules=targets, miss_dropout=dropout)
    assert not torch.equal(run(saved, x), run(make(), x))
    mc.save_adapter(saved, tmp_path / "adapter")
    loaded = make()
    assert mc.load_adapter(loaded, tmp_path / "adapter") is loaded
    assert same(blocks(loaded), blocks(saved))
    assert torch.equal(run(loaded, x), run(saved, x))
    dropped = []
    for model in (saved.train(), loaded.train()):  # the dropout came along
        torch.manual_seed(5)
        dropped.append(run(model, x))
    assert torch.equal(*dropped)
    assert torch.equal(dropped[0], run(saved.eval(), x)) == (dropout == 0.0)


@variants
@pytest.mark.parametrize("autocast", [True, False])
def test_round_trip_on_a_16_bit_base(tmp_path: Path, variant: str, autocast: bool) -> None:
    base = two_linears().bfloat16()
    saved = fill_blocks(mc.adapt(base, TARGETS | FIELDS[variant], autocast_adapter_dtype=autocast), std=0.3)
    mc.save_adapter(saved, tmp_path)
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    loaded = mc.load_adapter(two_linears().bfloat16(), tmp_path)
    assert {value.dtype for value in blocks(loaded).values()} == {torch.float32}
    assert torch.equal(run(loaded, X.bfloat16()), run(saved, X.bfloat16()))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_what_trains_after_a_load(tmp_path: Path, is_trainable: bool) -> None:
    mc.save_adapter(adapted(), str(tmp_path))
    loaded = mc.load_adapter(two_linears(), str(tmp_path), is_trainable=is_trainable)
    expected = ["up.miss_block_default", "down.miss_block_default"] if is_trainable else []
    assert [name for name, _ in mc.trainable_parameters(loaded)] == expected


def test_a_loaded_adapter_saves_to_the_same_files(tmp_path: Path) -> None:
    mc.save_adapter(adapted("mini", miss_dropout=0.1), tmp_path / "a")
    mc.save_adapter(mc.load_adapter(two_linears(), tmp_path / "a", "other"), tmp_path / "b", "other")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_two_adapters_are_saved_one_by_one_and_loaded_on_one_model(tmp_path: Path) -> None:
    model = adapted("balance", name="first")
    model = fill_blocks(mc.adapt(model, TARGETS | FIELDS["bat"], "second"), std=0.3, seed=2)
    mc.save_adapter(model, tmp_path / "1", "first")
    mc.save_adapter(model, tmp_path / "2", "second")
    assert load_file(tmp_path / "1" / WEIGHTS)[DOWN].shape == (5, 20)
    assert load_file(tmp_path / "2" / WEIGHTS)[DOWN].shape == (5, 4, 4)
    both = mc.load_adapter(mc.load_adapter(two_linears(), tmp_path / "1", "first"), tmp_path / "2", "second")
    assert same(blocks(both), blocks(model))
    assert torch.equal(run(both, X), run(model, X))  # the second one acts on both
    assert torch.equal(run(both, X), run(mc.load_adapter(two_linears(), tmp_path / "2"), X))


def test_saving_reads_the_blocks_and_changes_nothing(tmp_path: Path) -> None:
    model = adapted()
    before = snapshot(model, X)
    mc.save_adapter(model, tmp_path / "active")
    with mc.disable_adapter(model):
        mc.save_adapter(model, tmp_path / "disabled")
    assert snapshot(model, X) == before
    mc.save_adapter(mc.merge(model, keep_adapters=True), tmp_path / "merged")
    assert files(tmp_path / "active") == files(tmp_path / "disabled") == files(tmp_path / "merged")


# The files


@pytest.mark.parametrize(
    ("variant", "up", "down"),
    [
        ("balance", (5, 8), (5, 20)),
        ("random start", (3, 8), (3, 20)),
        ("mini", (5, 4), (5, 4)),
        ("bat", (2, 4, 4), (5, 4, 4)),
    ],
)
def test_keys_shapes_and_metadata(tmp_path: Path, variant: str, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    model = adapted(variant, name="some-name")
    mc.save_adapter(model, tmp_path / "adapter", "some-name")
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG, WEIGHTS]
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert sorted(found) == [DOWN, UP]
    assert (found[UP].shape, found[DOWN].shape) == (up, down)
    assert torch.equal(found[UP], model.get_parameter("up.miss_block_some-name"))
    assert torch.equal(found[DOWN], model.get_parameter("down.miss_block_some-name"))


def test_keys_of_a_llama(tmp_path: Path) -> None:
    mc.save_adapter(adapted_llama(target_modules=["q_proj", "layers.1.mlp.down_proj"]), tmp_path)
    assert {key: tuple(value.shape) for key, value in load_file(tmp_path / WEIGHTS).items()} == {
        "base_model.model.model.layers.0.self_attn.q_proj.miss_block": (5, 32),
        "base_model.model.model.layers.1.self_attn.q_proj.miss_block": (5, 32),
        "base_model.model.model.layers.1.mlp.down_proj.miss_block": (5, 32),
    }


def test_the_config_file(tmp_path: Path) -> None:
    mc.save_adapter(adapted("mini", miss_dropout=0.125, task_type="FEATURE_EXTRACTION", revision="v1"), tmp_path)
    unset = ["auto_mapping", "base_model_name_or_path", "exclude_modules"]
    unset += ["layers_pattern", "layers_to_transform", "modules_to_save"]
    assert read_config(tmp_path) == dict.fromkeys(unset) | {
        "bias": "none",
        "inference_mode": True,
        "init_weights": "mini",
        "mini_r": 4,
        "miss_dropout": 0.125,
        "peft_type": "MISS",
        "r": 5,
        "revision": "v1",
        "target_modules": ["up", "down"],
        "task_type": "FEATURE_EXTRACTION",
    }


def test_the_config_file_follows_the_config_that_was_adapted_with(tmp_path: Path) -> None:
    """What the user does with the own config afterwards does not change what was saved."""
    config = mc.MissConfig(r=5, target_modules=["up", "down"])
    model = mc.adapt(two_linears(), config)
    config.r = 3
    assert isinstance(config.target_modules, list)
    config.target_modules.remove("down")
    mc.save_adapter(model, tmp_path)
    assert (read_config(tmp_path)["r"], read_config(tmp_path)["target_modules"]) == (5, ["up", "down"])
    mc.load_adapter(two_linears(), tmp_path)


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({"target_modules": r"model\.layers\.1\..*(q|up)_proj"}, {}),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, {}),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, {}),
        (
            {"target_modules": {"v_proj", "k_proj"}, "exclude_modules": ["layers.0.self_attn.v_proj"]},
            {"target_modules": ["k_proj", "v_proj"]},
        ),
        # rules that look at the model are resolved to names
        ({"target_modules": None}, {"target_modules": ["self_attn.q_proj", "self_attn.v_proj"]}),
        ({"target_modules": "All-Linear"}, {"target_modules": ATTENTION + MLP}),
    ],
    ids=stable_id,
)
def test_rules_are_saved_as_rules(tmp_path: Path, fields: dict[str, Any], written: dict[str, Any]) -> None:
    saved = adapted_llama(**fields)
    mc.save_adapter(saved, tmp_path)
    expected = fields | written
    if fields["target_modules"] in (None, "All-Linear"):
        expected["target_modules"] = [f"model.layers.{i}.{name}" for i in range(2) for name in written["target_modules"]]
    assert {field: read_config(tmp_path)[field] for field in fields} == expected
    loaded = mc.load_adapter(tiny_llama(), tmp_path)
    assert same(blocks(loaded), blocks(saved))
    assert torch.equal(run(loaded, token_batch()), run(saved, token_batch()))


@pytest.mark.parametrize(
    ("given", "written"),
    [({}, "org/tiny"), ({"base_model_name_or_path": "org/config"}, "org/config")],
    ids=["from the model", "from the config"],
)
def test_the_name_of_the_base_model_is_written(tmp_path: Path, given: dict[str, Any], written: str) -> None:
    model = tiny_llama()
    model.name_or_path = "org/tiny"
    mc.save_adapter(adapted(base=model, target_modules=["q_proj"], **given), tmp_path)
    assert read_config(tmp_path)["base_model_name_or_path"] == written


# With PEFT


def peft_model(variant: str, make: Callable[[], nn.Module] = two_linears, **fields: Any) -> peft.PeftModel:
    model = peft.get_peft_model(make(), peft.MissConfig(**(TARGETS | FIELDS[variant] | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3 if make is two_linears else 0.05)
    return model.eval()


def by_peft(folder: Path, make: Callable[[], nn.Module] = two_linears) -> nn.Module:
    return peft.PeftModel.from_pretrained(make(), folder).eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@variants
@models
def test_peft_reads_what_we_write(tmp_path: Path, variant: str, of: str) -> None:
    make, x, targets = MODELS[of]
    ours = adapted(variant, make(), target_modules=targets, miss_dropout=0.5).eval()
    mc.save_adapter(ours, tmp_path)
    theirs = by_peft(tmp_path, make)
    assert (run(ours, x) - run(make(), x)).abs().max() > 0.05
    assert_close(run(theirs, x), run(ours, x))
    found = peft.get_peft_model_state_dict(theirs)
    assert same(dict(sorted(found.items())), dict(sorted(load_file(tmp_path / WEIGHTS).items())))


@variants
@models
def test_we_read_what_peft_writes(tmp_path: Path, variant: str, of: str) -> None:
    make, x, targets = MODELS[of]
    theirs = peft_model(variant, make, target_modules=targets, miss_dropout=0.5)
    theirs.save_pretrained(tmp_path)
    assert (run(theirs, x) - run(make(), x)).abs().max() > 0.05
    assert_close(run(mc.load_adapter(make(), tmp_path), x), run(theirs, x))


@pytest.mark.parametrize("variant", ["balance", "mini"])
def test_dropout_is_peft_s_in_training(tmp_path: Path, variant: str) -> None:
    """With an r that divides every width, where PEFT pads nothing, one seed drops the same elements."""
    ours = adapted(variant, r=4, miss_dropout=0.5)
    mc.save_adapter(ours, tmp_path)
    undropped, dropped = run(ours.eval(), X), []
    for model in (ours, by_peft(tmp_path)):
        torch.manual_seed(11)
        dropped.append(run(model.train(), X))
    assert_close(*dropped)
    assert (undropped - dropped[0]).abs().max() > 0.05


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["0.self_attn.o_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_rules_choose_the_same_modules_in_both(tmp_path: Path, fields: dict[str, Any]) -> None:
    ours = adapted_llama(**fields)
    mc.save_adapter(ours, tmp_path / "ours")
    assert_close(run(by_peft(tmp_path / "ours", tiny_llama), token_batch()), run(ours, token_batch()))
    theirs = peft_model("balance", tiny_llama, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    assert sorted(load_file(tmp_path / "theirs" / WEIGHTS)) == sorted(load_file(tmp_path / "ours" / WEIGHTS))
    assert_close(run(mc.load_adapter(tiny_llama(), tmp_path / "theirs"), token_batch()), run(theirs, token_batch()))


def test_the_base_weight_that_peft_saves_with_a_targeted_output_layer_is_read_over(tmp_path: Path) -> None:
    theirs = peft_model("balance", tiny_llama, target_modules=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    assert_close(run(mc.load_adapter(tiny_llama(), tmp_path), token_batch()), run(theirs, token_batch()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.a(x) + self.b(x).tanh()
        return y


def test_linears_that_share_a_weight_come_back_from_peft_as_they_were(tmp_path: Path) -> None:
    """PEFT gives each of them a block of its own: they are kept apart, or refused by name, but none is dropped."""
    theirs = peft_model("balance", seeded(Tied), target_modules=["a", "b"], r=2)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    try:
        ours = mc.load_adapter(seeded(Tied)(), tmp_path)
    except mc.CheckpointError as error:
        refusal = str(error)
    else:
        assert_close(run(ours, x), run(theirs, x))
        return
    assert "base_model.model.b.miss_block" in refusal


# Compiled wrappers


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "DataParallel"]
)
def test_a_wrapped_model_saves_and_loads_as_the_model_inside(tmp_path: Path, wrap: Any) -> None:
    plain = adapted()
    mc.save_adapter(plain, tmp_path / "plain")
    mc.save_adapter(wrap(adapted()), tmp_path / "adapted first")
    mc.save_adapter(adapted(base=wrap(two_linears())), tmp_path / "wrapped first")
    assert files(tmp_path / "adapted first") == files(tmp_path / "plain")
    assert files(tmp_path / "wrapped first")[0] == files(tmp_path / "plain")[0]
    assert sorted(load_file(tmp_path / "wrapped first" / WEIGHTS)) == [DOWN, UP]
    inside = two_linears()
    wrapped = wrap(inside)
    assert mc.load_adapter(wrapped, tmp_path / "plain") is wrapped
    assert same(blocks(inside), blocks(plain))
    torch.testing.assert_close(run(wrapped, X), run(plain, X), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.model", "_orig_mod.base_model.model.model"),
        (".layers.0.", ".layers.0._orig_mod."),
        (".miss_block", "._orig_mod.miss_block"),
    ],
    ids=["root", "whole wrapper", "layer", "linear"],
)
def test_keys_of_a_compiled_wrapper_are_read(tmp_path: Path, old: str, new: str) -> None:
    saved = adapted_llama(target_modules=["q_proj", "down_proj"])
    mc.save_adapter(saved, tmp_path)
    tensors(lambda found: {key.replace(old, new): value for key, value in found.items()})(tmp_path)
    assert any("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS))
    assert same(blocks(mc.load_adapter(tiny_llama(), tmp_path)), blocks(saved))


def compile_layers(model: nn.Module) -> nn.Module:
    layers: Any = model.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", ["layers.1.mlp.up_proj"]], ids=str)
def test_layers_compiled_one_by_one(tmp_path: Path, targets: Any) -> None:
    """Regional compilation puts `_orig_mod` into the names: what is saved there is the adapter of the plain model."""
    plain = adapted_llama(target_modules=targets)
    mc.save_adapter(compile_layers(plain), tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS))
    assert "_orig_mod" not in (tmp_path / CONFIG).read_text()
    for base in (tiny_llama(), compile_layers(tiny_llama())):
        found = blocks(mc.load_adapter(base, tmp_path)).values()
        assert all(torch.equal(a, b) for a, b in zip(found, blocks(plain).values(), strict=True))


# A folder that is there already


def test_saving_over_an_adapter_replaces_it_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    mc.save_adapter(adapted("balance"), folder)
    (folder / "README.md").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / CONFIG).write_text("mine too")
    bat = adapted("bat")
    mc.save_adapter(bat, folder)
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS, "sub"]
    assert os.listdir(tmp_path) == ["adapter"]
    assert ((folder / "README.md").read_text(), (folder / "sub" / CONFIG).read_text()) == ("mine", "mine too")
    assert same(blocks(mc.load_adapter(two_linears(), folder)), blocks(bat))


def test_a_disk_that_fails_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    mc.save_adapter(adapted("balance"), folder)
    before = files(folder)

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        mc.save_adapter(adapted("bat"), folder)
    assert files(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


# A call that is wrong: the model and the folders are as they were


BASES: dict[str, Callable[[], nn.Module]] = {
    "plain": two_linears,
    "adapted": adapted,
    "first": lambda: adapted("mini", name="first"),
    "merged": lambda: mc.merge(adapted("mini", name="first"), keep_adapters=True),
    "meta": lambda: adapted().to("meta"),
    "both": lambda: mc.adapt(adapted(), TARGETS | FIELDS["bat"], "second"),
}
Call = Callable[[Any, Path], Any]


def save(*name: Any, to: str = "new") -> Call:
    return lambda model, home: mc.save_adapter(model, home / to, *name)


def load(*name: Any, of: str = "adapter") -> Call:
    return lambda model, home: mc.load_adapter(model, home / of, *name)


def load_inside(model: nn.Module, home: Path) -> None:
    with mc.disable_adapter(model):
        mc.load_adapter(model, home / "adapter")


HAS = "it has 'default', 'second'."
NO_NAME = "adapter_name: expected a string, found"
NO_FOLDER = "there is no such folder; pass one written by save_adapter or by PEFT."
NO_ADAPTER = f"...{CONFIG}: not found; adapters are in its subfolders ['adapter'..."
REFUSALS: dict[str, tuple[str, Call, type[BaseException], str]] = {
    # the model, the call beside a folder with an adapter and a file, the kind, and what is told
    "save another": ("both", save("other"), mc.UnknownAdapterError, f"the model has no adapter 'other': {HAS}"),
    "save an empty name": ("both", save(""), mc.UnknownAdapterError, f"the model has no adapter '': {HAS}"),
    "save None": ("both", save(None), mc.ArgumentError, f"{NO_NAME} NoneType."),
    "save a list": ("both", save(["default"]), mc.ArgumentError, f"{NO_NAME} list."),
    "save no values": ("meta", save(), mc.CheckpointError, "...up... is on the meta device and has no values to save..."),
    "save over a file": (
        "adapted",
        save(to="a file"),
        mc.CheckpointError,
        "/.../a file: an adapter is saved into a folder...",
    ),
    "load as first": ("first", load("first"), mc.StateError, "adapter_name='first' is in use (up): choose another..."),
    "load as a.b": ("first", load("a.b"), mc.ConfigError, "adapter_name='a.b': a name becomes part of a parameter..."),
    "load as an empty name": ("first", load(""), mc.ConfigError, "adapter_name=''..."),
    "load as a number": ("first", load(7), mc.ArgumentError, f"{NO_NAME} int."),
    "load from nowhere": ("plain", load(of="nowhere"), mc.CheckpointNotFoundError, f"/.../nowhere: {NO_FOLDER}"),
    "load from a file": ("plain", load(of="a file"), mc.CheckpointNotFoundError, f"/.../a file: {NO_FOLDER}"),
    "load from the folder above": ("plain", load(of=""), mc.CheckpointNotFoundError, NO_ADAPTER),
    "load on a merged model": (
        "merged",
        load(),
        mc.StateError,
        "adapt: up holds the merged adapter 'first'; call unmerge(model) first.",
    ),
    "load inside": ("first", load_inside, mc.StateError, "...inside disable_adapter(model): leave the context first..."),
}
NO_PATH = "folder: expected a path, found {}..."
for folder in (None, 3, b"adapter", ["adapter"]):
    told = NO_PATH.format(type(folder).__name__)
    REFUSALS[f"save to {folder!r}"] = ("adapted", lambda m, _, to=folder: mc.save_adapter(m, to), mc.ArgumentError, told)
    REFUSALS[f"load from {folder!r}"] = ("plain", lambda m, _, of=folder: mc.load_adapter(m, of), mc.ArgumentError, told)


@pytest.mark.parametrize("case", list(REFUSALS))
def test_a_wrong_call(tmp_path: Path, case: str) -> None:
    base, call, kind, told = REFUSALS[case]
    mc.save_adapter(adapted("balance"), tmp_path / "adapter")
    (tmp_path / "a file").write_text("a file")
    model = BASES[base]()
    x = () if next(model.parameters()).is_meta else (X,)
    before = snapshot(model, *x)
    with pytest.raises(kind) as caught:
        call(model, tmp_path)
    assert type(caught.value) is kind
    assert says(caught.value, told), caught.value
    assert snapshot(model, *x) == before
    assert sorted(os.listdir(tmp_path)) == ["a file", "adapter"]
    assert (tmp_path / "a file").read_text() == "a file"


# A folder that is wrong: the error names the file or the key, and the model is as it was


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("exploded", "w"))


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({UP: Bomb()}, folder / "adapter_model.bin")


def folder_in_place_of(name: str) -> Break:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def whole(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Break:
    """The bytes of the file change."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def text(content: str | bytes) -> Break:
    return whole(lambda _: content if isinstance(content, bytes) else content.encode(), CONFIG)


def block(change: Callable[[Tensor], Tensor]) -> Break:
    return tensors(lambda found: found | {DOWN: change(found[DOWN]).contiguous()})


def another_key(key: str) -> Break:
    return tensors(lambda found: found | {key: found[UP].clone()})


def fields(**values: Any) -> Break:
    return lambda folder: (folder / CONFIG).write_text(json.dumps(read_config(folder) | values))


def of_method(config: type[peft.PeftConfig]) -> Break:
    return lambda folder: config(target_modules=["up", "down"]).save_pretrained(folder)


NOT_WHOLE = ": not a whole safetensors file ("
NEEDED = "but balance with r=5 on a 8→20 linear needs (5, 20)."
PICKLES = "There is adapter_model.bin, but pickles are never read: save it with safetensors first."
NO_MODULE = "is for a module that this model does not have"
INTEGERS = {"I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn"}
OF_WEIGHTS: dict[str, tuple[Break, str]] = {
    # what happens to the folder, and what is told behind the name of the file
    "no weights": (remove(WEIGHTS), ": not found."),
    "a folder as weights": (folder_in_place_of(WEIGHTS), ": not found."),
    "a pickle": (pickle_instead, f": not found. {PICKLES}"),
    "a pickle under the name": (lambda folder: torch.save({UP: Bomb()}, folder / WEIGHTS), NOT_WHOLE),
    "a bare pickle": (whole(lambda _: pickle.dumps(Bomb())), NOT_WHOLE),
    "empty weights": (whole(lambda _: b""), NOT_WHOLE),
    "text": (whole(lambda _: b"<html>404 not found, try again later</html>"), NOT_WHOLE),
    "a git-lfs pointer": (whole(lambda _: b"version https://git-lfs.github.com/spec/v1\nsize 1"), NOT_WHOLE),
    "a huge header": (whole(lambda _: struct.pack("<Q", 2**62) + b"{}"), NOT_WHOLE),
    "a header that is no JSON": (whole(lambda _: struct.pack("<Q", 4) + b"{{{{"), NOT_WHOLE),
    "a header alone": (whole(lambda _: struct.pack("<Q", 2) + b"{}"), f"...key {UP!r} is missing"),
    "cut after 7 bytes": (whole(lambda data: data[:7]), NOT_WHOLE),
    "cut in the header": (whole(lambda data: data[:40]), NOT_WHOLE),
    "cut by one byte": (whole(lambda data: data[:-1]), NOT_WHOLE),
    "cut in the middle": (whole(lambda data: data[:-200]), NOT_WHOLE),
    "bytes too many": (whole(lambda data: data + b"\0" * 8), NOT_WHOLE),
    "no tensors": (tensors(lambda found: {}), f"...key {UP!r} is missing, although the config chooses"),
    "a key is missing": (tensors(lambda found: {UP: found[UP]}), f"...key {DOWN!r} is missing"),
    "no module": (another_key("base_model.model.upp.miss_block"), f"...model.upp.miss_block' {NO_MODULE}...closest: 'up'"),
    "not chosen": (fields(target_modules=["up"]), f"...key {DOWN!r} is for a module that the config does not choose."),
    "a key of the root": (another_key("base_model.model.miss_block"), "...key 'base_model.model.miss_block' is for"),
    "twice": (
        tensors(lambda t: t | {UP.replace("up", "_orig_mod.up"): t[UP] + 1}),
        "...key 'base_model.model.up.miss_block' differs from 'base_model.model._orig_mod.up.miss_block', but this...",
    ),
    "foreign": (tensors(lambda t: {"model.up.weight": t[UP]}), "...key 'model.up.weight' is not one of...base_model.model."),
    "a key of LoRA": (another_key("base_model.model.up.lora_A.weight"), "...key 'base_model.model.up.lora_A.weight' is"),
    "a key with an adapter name": (another_key(f"{UP}.default"), f"...key '{UP}.default' is"),
    "a transposed block": (block(lambda b: b.t()), f"...key {DOWN!r} has shape (20, 5), {NEEDED}"),
    "a row too many": (block(lambda b: torch.cat([b, b[:1]])), f"...key {DOWN!r} has shape (6, 20), {NEEDED}"),
    "a flat block": (block(lambda b: b.flatten()), f"...key {DOWN!r} has shape (100,), {NEEDED}"),
    "a scalar": (block(lambda b: b[0, 0]), f"...key {DOWN!r} has shape (), {NEEDED}"),
    "no rows": (block(lambda b: b[:0]), f"...key {DOWN!r} has shape (0, 20), {NEEDED}"),
    **{
        f"dtype {name}": (
            block(lambda b, dtype=dtype: b.to(getattr(torch, dtype))),  # type: ignore[misc]
            f"...key {DOWN!r} has dtype {name}; a block has one of F64, F32, F16, BF16.",
        )
        for name, dtype in INTEGERS.items()
    },
    "another r": (fields(r=4), f"...key {UP!r} has shape (5, 8)...r=4...needs (4, 8)"),
    "another variant": (fields(init_weights="mini", mini_r=4), f"...{UP!r} has shape (5, 8)...mini"),
}
OF_CONFIG: dict[str, tuple[Break, str]] = {
    "no config": (remove(CONFIG), ": not found."),
    "a folder as config": (folder_in_place_of(CONFIG), ": not found."),
    "a config of LoRA": (of_method(peft.LoraConfig), "...MissConfig.peft_type='LORA'"),
    "a config of OFT": (of_method(peft.OFTConfig), "...MissConfig.peft_type='OFT'"),
    "an empty config": (text(""), ""),
    "a cut config": (text('{"peft_type": "MISS", "r":'), ""),
    "a config that is a list": (text('["MISS"]'), "...expected a JSON object, found list"),
    "a config that is no UTF-8": (text(b'{"r": "\xff\xfe"}'), "...utf-8"),
    "a text as r": (fields(r="5"), "...MissConfig.r='5': expected an integer"),
    "no r": (fields(r=None), "...MissConfig.r=None"),
    "an unknown variant": (fields(init_weights="BAT"), "...MissConfig.init_weights='BAT'"),
}
DOES_NOT_FIT: dict[str, tuple[Break, str]] = {
    "an r that does not fit": (fields(init_weights="bat"), "...does not fit this model...MissConfig.r=5"),
    "an r above the width": (fields(r=9), "...does not fit this model...MissConfig.r=9...down (8→20)"),
    "no match": (fields(target_modules=["q"]), "...does not fit this model...target_modules=['q'] matches no module"),
    "no names, and a model of no known type": (fields(target_modules=None), "...target_modules=None"),
}
BROKEN = {
    case: (break_it, name + told)
    for name, table in ((f"/{WEIGHTS}", OF_WEIGHTS), (f"/{CONFIG}", OF_CONFIG), ("", DOES_NOT_FIT))
    for case, (break_it, told) in table.items()
}


@pytest.mark.parametrize("base", ["plain", "first"])
@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, base: str) -> None:
    break_it, told = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    mc.save_adapter(adapted("balance"), folder)
    break_it(folder)
    model = BASES[base]()
    before = snapshot(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fields of another method
        with pytest.raises(mc.CheckpointError) as caught:
            mc.load_adapter(model, folder)
    assert type(caught.value) is (mc.CheckpointNotFoundError if ": not found." in told else mc.CheckpointError)
    assert says(caught.value, f"{folder}{told}..."), caught.value
    assert snapshot(model, X) == before
    assert not Path("exploded").exists()


def test_the_unbroken_folder_loads(tmp_path: Path) -> None:
    """The cases above fail for what was broken, not for what they share."""
    mc.save_adapter(adapted("balance"), tmp_path)
    before = snapshot(model := BASES["first"](), X)
    mc.load_adapter(model, tmp_path)
    assert snapshot(model, X) != before


MISSING = "key 'base_model.model.inner.up.miss_block' is missing, although the config"


def other(**sizes: tuple[int, int]) -> nn.Module:
    return nn.Sequential(OrderedDict((name, nn.Linear(*size)) for name, size in sizes.items()))


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (other(up=(12, 8)), f"key {DOWN!r} {NO_MODULE}. Is it the base model that the"),
        (
            other(up=(12, 8), down=(8, 21)),
            f"key {DOWN!r} has shape (5, 20), but balance with r=5 on a 8→21 linear needs (5, 21).",
        ),
        (
            other(up=(12, 6), down=(6, 20)),
            f"key {UP!r} has shape (5, 8), but balance with r=5 on a 12→6 linear needs (5, 6).",
        ),
        (other(up=(12, 4), down=(4, 20)), "down (4→20): r=5 is more than its 4 input features"),
        (nn.Sequential(OrderedDict(up=nn.Linear(12, 8), down=nn.Linear(8, 20), inner=other(up=(20, 8)))), MISSING),
        (nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 20)), f"key {DOWN!r} is for a module that this model does not"),
    ],
    ids=["a module less", "other out", "other width", "too narrow", "a module more", "other names"],
)
def test_a_wrong_base_model(tmp_path: Path, base: nn.Module, told: str) -> None:
    mc.save_adapter(adapted("balance"), tmp_path)
    before = snapshot(base, X)
    with pytest.raises(mc.CheckpointError) as caught:
        mc.load_adapter(base, tmp_path)
    assert says(caught.value, f"{tmp_path}...{told}..."), caught.value
    assert snapshot(base, X) == before


def test_an_error_half_way_through_the_registration_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mc.save_adapter(adapted("balance"), tmp_path)
    model = BASES["first"]()
    before = snapshot(model, X)
    trap = Trap(2, RuntimeError("out of memory"))
    monkeypatch.setattr(nn.Module, "register_parameter", trap.guard(nn.Module.register_parameter))
    with pytest.raises(RuntimeError, match="out of memory"):
        mc.load_adapter(model, tmp_path)
    assert trap.calls == 2
    assert snapshot(model, X) == before

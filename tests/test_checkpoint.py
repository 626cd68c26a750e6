"""Adapters on disk: round trips, PEFT's folder format both ways, and every way in which a folder can be wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import fill_blocks, stable_id
from torch import Tensor, nn
from zoo import TwoLinears, tiny_llama, token_batch

import misscompile as mc
from misscompile import (
    ArgumentError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    MissError,
    StateError,
    UnknownAdapterError,
)

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning", "error:.*adapter.*:UserWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP, DOWN = "base_model.model.up.miss_block", "base_model.model.down.miss_block"

FIELDS: dict[str, dict[str, Any]] = {
    "balance": {"r": 5},  # divides neither 12 nor 8
    "random start": {"r": 3, "init_weights": False},
    "mini": {"r": 5, "init_weights": "mini", "mini_r": 4},
    "bat": {"r": 4, "init_weights": "bat"},
}
SHAPES = {
    "balance": ((5, 8), (5, 20)),
    "random start": ((3, 8), (3, 20)),
    "mini": ((5, 4), (5, 4)),
    "bat": ((2, 4, 4), (5, 4, 4)),
}
TARGETS = {"target_modules": ["up", "down"]}

variants = pytest.mark.parametrize("variant", list(FIELDS))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def two_linears() -> nn.Module:
    torch.manual_seed(0)
    return TwoLinears().eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "two linears": (two_linears, lambda: torch.randn(3, 12, generator=torch.Generator().manual_seed(2))),
    "llama": (tiny_llama, token_batch),
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def adapted(variant: str = "balance", base: nn.Module | None = None, name: str = "default", **fields: Any) -> nn.Module:
    """A model with random non-zero blocks."""
    config = TARGETS | FIELDS[variant] | fields
    return fill_blocks(mc.adapt(two_linears() if base is None else base, config, name), std=0.3)


def blocks(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "miss_block" in name}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def read_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return values


def change_config(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(read_config(folder) | fields))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


# Round trips


@variants
@pytest.mark.parametrize(("model", "dropout"), [("two linears", 0.0), ("two linears", 0.25), ("llama", 0.25)])
def test_round_trip(tmp_path: Path, model: str, variant: str, dropout: float) -> None:
    make, batch = MODELS[model]
    targets = "all-linear" if model == "llama" else ["up", "down"]
    saved = adapted(variant, make(), target_modules=targets, miss_dropout=dropout)
    assert not torch.equal(run(saved, batch()), run(make(), batch()))
    mc.save_adapter(saved, tmp_path / "adapter")
    loaded = make()
    assert mc.load_adapter(loaded, tmp_path / "adapter") is loaded
    assert_equal(blocks(loaded), blocks(saved))
    assert torch.equal(run(loaded, batch()), run(saved, batch()))
    saved.train(), loaded.train()  # the dropout came along
    torch.manual_seed(5)
    expected = run(saved, batch())
    torch.manual_seed(5)
    assert torch.equal(run(loaded, batch()), expected)
    assert torch.equal(expected, run(saved.eval(), batch())) == (dropout == 0.0)


@variants
@pytest.mark.parametrize("autocast", [True, False])
def test_round_trip_on_a_16_bit_base(tmp_path: Path, variant: str, autocast: bool) -> None:
    def make() -> nn.Module:
        return two_linears().bfloat16()

    saved = fill_blocks(mc.adapt(make(), TARGETS | FIELDS[variant], autocast_adapter_dtype=autocast), std=0.3)
    mc.save_adapter(saved, tmp_path)
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    loaded = mc.load_adapter(make(), tmp_path)
    assert {value.dtype for value in blocks(loaded).values()} == {torch.float32}
    x = MODELS["two linears"][1]().bfloat16()
    assert torch.equal(run(loaded, x), run(saved, x))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_what_trains_after_a_load(tmp_path: Path, is_trainable: bool) -> None:
    mc.save_adapter(adapted(), tmp_path)
    loaded = mc.load_adapter(two_linears(), tmp_path, is_trainable=is_trainable)
    expected = ["up.miss_block_default", "down.miss_block_default"] if is_trainable else []
    assert [name for name, _ in mc.trainable_parameters(loaded)] == expected


def test_a_loaded_adapter_saves_to_the_same_files(tmp_path: Path) -> None:
    mc.save_adapter(adapted("mini", miss_dropout=0.1), tmp_path / "a")
    mc.save_adapter(mc.load_adapter(two_linears(), tmp_path / "a", "other"), tmp_path / "b", "other")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_two_adapters_are_saved_one_by_one_and_loaded_on_one_model(tmp_path: Path) -> None:
    model = adapted("balance", name="first")
    model = fill_blocks(mc.adapt(model, TARGETS | FIELDS["bat"], "second"), std=0.3, seed=2)
    x = MODELS["two linears"][1]()
    mc.save_adapter(model, tmp_path / "1", "first")
    mc.save_adapter(model, tmp_path / "2", "second")
    assert load_file(tmp_path / "1" / WEIGHTS)[DOWN].shape == (5, 20)
    assert load_file(tmp_path / "2" / WEIGHTS)[DOWN].shape == (5, 4, 4)
    both = mc.load_adapter(mc.load_adapter(two_linears(), tmp_path / "1", "first"), tmp_path / "2", "second")
    assert_equal(blocks(both), blocks(model))
    assert torch.equal(run(both, x), run(model, x))  # the second one acts on both
    alone = mc.load_adapter(two_linears(), tmp_path / "2")
    assert torch.equal(run(both, x), run(alone, x))


def test_saving_reads_the_blocks_and_changes_nothing(tmp_path: Path) -> None:
    model = adapted()
    before, x = blocks(model), MODELS["two linears"][1]()
    y = run(model, x)
    mc.save_adapter(model, tmp_path / "active")
    with mc.disable_adapter(model):
        mc.save_adapter(model, tmp_path / "disabled")
    mc.save_adapter(mc.merge(model, keep_adapters=True), tmp_path / "merged")
    mc.unmerge(model)
    assert_equal(blocks(model), before)
    assert torch.equal(run(model, x), y)
    files = [(tmp_path / state / WEIGHTS).read_bytes() for state in ("active", "disabled", "merged")]
    assert files[0] == files[1] == files[2]


# The files


@variants
def test_keys_shapes_and_metadata(tmp_path: Path, variant: str) -> None:
    model = adapted(variant, name="some-name")
    mc.save_adapter(model, tmp_path / "adapter", "some-name")
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG, WEIGHTS]
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert sorted(found) == [DOWN, UP]
    assert (found[UP].shape, found[DOWN].shape) == SHAPES[variant]
    assert torch.equal(found[UP], model.get_parameter("up.miss_block_some-name"))
    assert torch.equal(found[DOWN], model.get_parameter("down.miss_block_some-name"))


def test_keys_of_a_llama(tmp_path: Path) -> None:
    mc.save_adapter(adapted(base=tiny_llama(), target_modules=["q_proj", "layers.1.mlp.down_proj"]), tmp_path)
    assert {key: tuple(value.shape) for key, value in load_file(tmp_path / WEIGHTS).items()} == {
        "base_model.model.model.layers.0.self_attn.q_proj.miss_block": (5, 32),
        "base_model.model.model.layers.1.self_attn.q_proj.miss_block": (5, 32),
        "base_model.model.model.layers.1.mlp.down_proj.miss_block": (5, 32),
    }


def test_the_config_file(tmp_path: Path) -> None:
    mc.save_adapter(adapted("mini", miss_dropout=0.125, task_type="FEATURE_EXTRACTION", revision="v1"), tmp_path)
    assert read_config(tmp_path) == {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": "mini",
        "layers_pattern": None,
        "layers_to_transform": None,
        "mini_r": 4,
        "miss_dropout": 0.125,
        "modules_to_save": None,
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


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"model\.layers\.1\..*(q|up)_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": {"v_proj", "k_proj"}, "exclude_modules": ["layers.0.self_attn.v_proj"]},
    ],
    ids=str,
)
def test_rules_are_saved_as_rules(tmp_path: Path, fields: dict[str, Any]) -> None:
    saved = adapted(base=tiny_llama(), **fields)
    mc.save_adapter(saved, tmp_path)
    written = read_config(tmp_path)
    for field, value in fields.items():
        assert written[field] == (sorted(value) if isinstance(value, set) else value)
    assert_equal(blocks(mc.load_adapter(tiny_llama(), tmp_path)), blocks(saved))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(None, ["self_attn.q_proj", "self_attn.v_proj"]), ("All-Linear", None)],
    ids=["None", "all-linear"],
)
def test_rules_that_look_at_the_model_are_resolved_to_names(
    tmp_path: Path, targets: Any, expected: list[str] | None
) -> None:
    saved = adapted(base=tiny_llama(), target_modules=targets)
    mc.save_adapter(saved, tmp_path)
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    inside = expected or attention + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert read_config(tmp_path)["target_modules"] == [f"model.layers.{i}.{name}" for i in range(2) for name in inside]
    loaded = mc.load_adapter(tiny_llama(), tmp_path)
    assert_equal(blocks(loaded), blocks(saved))
    assert torch.equal(run(loaded, token_batch()), run(saved, token_batch()))


def test_the_name_of_the_base_model_is_written(tmp_path: Path) -> None:
    model = tiny_llama()
    model.name_or_path = "org/tiny"
    mc.save_adapter(adapted(base=model, target_modules=["q_proj"]), tmp_path / "from the model")
    assert read_config(tmp_path / "from the model")["base_model_name_or_path"] == "org/tiny"
    other = adapted(base=model, target_modules=["q_proj"], base_model_name_or_path="org/config", name="b")
    mc.save_adapter(other, tmp_path / "from the config", "b")
    assert read_config(tmp_path / "from the config")["base_model_name_or_path"] == "org/config"


# With PEFT


def peft_model(variant: str, make: Callable[[], nn.Module] = two_linears, **fields: Any) -> peft.PeftModel:
    model = peft.get_peft_model(make(), peft.MissConfig(**(TARGETS | FIELDS[variant] | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3 if make is two_linears else 0.05)
    return model.eval()


@variants
@pytest.mark.parametrize("model", list(MODELS))
def test_peft_reads_what_we_write(tmp_path: Path, variant: str, model: str) -> None:
    make, batch = MODELS[model]
    targets = "all-linear" if model == "llama" else ["up", "down"]
    ours = adapted(variant, make(), target_modules=targets, miss_dropout=0.5).eval()
    mc.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    expected = run(ours, batch())
    assert (expected - run(make(), batch())).abs().max() > 0.05
    torch.testing.assert_close(run(theirs, batch()), expected, rtol=0, atol=1e-5)
    found = peft.get_peft_model_state_dict(theirs)
    assert_equal(dict(sorted(found.items())), dict(sorted(load_file(tmp_path / WEIGHTS).items())))


@variants
@pytest.mark.parametrize("model", list(MODELS))
def test_we_read_what_peft_writes(tmp_path: Path, variant: str, model: str) -> None:
    make, batch = MODELS[model]
    targets = "all-linear" if model == "llama" else ["up", "down"]
    theirs = peft_model(variant, make, target_modules=targets, miss_dropout=0.5)
    theirs.save_pretrained(tmp_path)
    ours = mc.load_adapter(make(), tmp_path)
    expected = run(theirs, batch())
    assert (expected - run(make(), batch())).abs().max() > 0.05
    torch.testing.assert_close(run(ours, batch()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["balance", "mini"])
def test_dropout_is_peft_s_in_training(tmp_path: Path, variant: str) -> None:
    """With an r that divides every width, where PEFT pads nothing, one seed drops the same elements."""
    ours = adapted(variant, r=4, miss_dropout=0.5)
    mc.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(two_linears(), tmp_path)
    x = MODELS["two linears"][1]()
    undropped = run(ours.eval(), x)
    torch.manual_seed(11)
    expected = run(theirs.train(), x)
    torch.manual_seed(11)
    torch.testing.assert_close(run(ours.train(), x), expected, rtol=0, atol=1e-5)
    assert (undropped - expected).abs().max() > 0.05


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
    ours = adapted(base=tiny_llama(), **fields)
    mc.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(theirs, token_batch()), run(ours, token_batch()), rtol=0, atol=1e-5)
    back = peft_model("balance", tiny_llama, **fields)
    back.save_pretrained(tmp_path / "theirs")
    assert sorted(load_file(tmp_path / "theirs" / WEIGHTS)) == sorted(load_file(tmp_path / "ours" / WEIGHTS))
    loaded = mc.load_adapter(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(run(loaded, token_batch()), run(back, token_batch()), rtol=0, atol=1e-5)


def test_the_base_weight_that_peft_saves_with_a_targeted_output_layer_is_read_over(tmp_path: Path) -> None:
    theirs = peft_model("balance", tiny_llama, target_modules=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    loaded = mc.load_adapter(tiny_llama(), tmp_path)
    torch.testing.assert_close(run(loaded, token_batch()), run(theirs, token_batch()), rtol=0, atol=1e-5)


def test_linears_that_share_a_weight_come_back_from_peft_as_they_were(tmp_path: Path) -> None:
    """PEFT gives each of them a block of its own: they are kept apart, or refused by name, but none is dropped."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.a(x) + self.b(x).tanh()

    theirs = peft_model("balance", Tied, target_modules=["a", "b"], r=2)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    try:
        ours = mc.load_adapter(Tied(), tmp_path)
    except CheckpointError as error:
        refusal = str(error)
    else:
        torch.testing.assert_close(run(ours, x), run(theirs, x), rtol=0, atol=1e-5)
        return
    assert "base_model.model.b.miss_block" in refusal


# What is trained in full beside the blocks


class Extended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down, self.head = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.down(self.norm(self.up(x)))))
        return y


def randomize(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _, parameter in mc.trainable_parameters(model):
            parameter.normal_(std=0.3)
    return model.eval()


IN_FULL: dict[str, tuple[dict[str, Any], set[str]]] = {
    "head": ({"modules_to_save": ["head"]}, {"head.weight", "head.bias"}),
    "MiSS_only": ({"bias": "MiSS_only"}, {"up.base_layer.bias", "down.base_layer.bias"}),
    "all": ({"bias": "all"}, {"up.base_layer.bias", "down.base_layer.bias", "norm.bias", "head.bias"}),
    "norm and MiSS_only": (
        {"modules_to_save": ["norm"], "bias": "MiSS_only"},
        {"norm.weight", "norm.bias", "up.base_layer.bias", "down.base_layer.bias"},
    ),
    "head and all": (
        {"modules_to_save": ["head"], "bias": "all"},
        {"head.weight", "head.bias", "up.base_layer.bias", "down.base_layer.bias", "norm.bias"},
    ),
}

in_full = pytest.mark.parametrize("case", list(IN_FULL))


@in_full
@variants
def test_what_is_trained_in_full_comes_back_and_is_read_by_peft(tmp_path: Path, case: str, variant: str) -> None:
    fields, expected = IN_FULL[case]
    x = MODELS["two linears"][1]()
    ours = randomize(mc.adapt(Extended(), TARGETS | FIELDS[variant] | fields))
    mc.save_adapter(ours, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {key.removeprefix("base_model.model.") for key in stored} == expected | {"up.miss_block", "down.miss_block"}
    assert (read_config(tmp_path)["bias"], read_config(tmp_path)["modules_to_save"]) == (
        fields.get("bias", "none"),
        fields.get("modules_to_save"),
    )
    for key in expected:  # the base's own tensors are not what is stored
        assert not torch.equal(stored[f"base_model.model.{key}"], Extended().get_parameter(key.replace("base_layer.", "")))
    loaded = mc.load_adapter(Extended(), tmp_path).eval()
    assert torch.equal(run(loaded, x), run(ours, x))
    theirs = peft.PeftModel.from_pretrained(Extended(), tmp_path).eval()
    torch.testing.assert_close(run(theirs, x), run(ours, x), rtol=0, atol=1e-5)


@in_full
@variants
def test_what_peft_trained_in_full_is_read(tmp_path: Path, case: str, variant: str) -> None:
    fields, _ = IN_FULL[case]
    x = MODELS["two linears"][1]()
    theirs = randomize(peft.get_peft_model(Extended(), peft.MissConfig(**(TARGETS | FIELDS[variant] | fields))))
    assert isinstance(theirs, peft.PeftModel)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mc.load_adapter(Extended(), tmp_path / "theirs").eval()
    expected = run(theirs, x)
    torch.testing.assert_close(run(ours, x), expected, rtol=0, atol=1e-5)
    mc.save_adapter(ours, tmp_path / "ours")
    again = mc.load_adapter(Extended(), tmp_path / "ours").eval()
    assert torch.equal(run(again, x), run(ours, x))
    with mc.disable_adapter(ours):
        assert torch.equal(run(ours, x), run(Extended().eval(), x))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {key: v for key, v in t.items() if key != "base_model.model.head.weight"}, "head.weight"),
        (
            lambda t: t | {"base_model.model.head.weight": torch.zeros(4, 20)},
            "key 'base_model.model.head.weight' has shape (4, 20)",
        ),
        (lambda t: t | {"base_model.model.head.scale": torch.zeros(5)}, "key 'base_model.model.head.scale'"),
        (lambda t: t | {"base_model.model.norm.weight": torch.zeros(8)}, "key 'base_model.model.norm.weight'"),
        (
            lambda t: t | {"base_model.model.head.weight": torch.zeros(5, 20, dtype=torch.int64)},
            "'base_model.model.head.weight'",
        ),
    ],
    ids=["missing", "other shape", "no such tensor", "not trained", "integers"],
)
def test_a_broken_tensor_of_a_module_to_save(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    mc.save_adapter(mc.adapt(Extended(), TARGETS | FIELDS["balance"] | {"modules_to_save": ["head"]}), tmp_path)
    change_weights(tmp_path, change)
    model = Extended()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        mc.load_adapter(model, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / WEIGHTS))
    assert told in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("variant", ["balance", "bat"])
def test_a_folder_of_bone(tmp_path: Path, variant: str) -> None:
    """MiSS under its first name: another `peft_type` and another name of the block."""
    ours = adapted(variant)
    mc.save_adapter(ours, tmp_path)
    change_weights(tmp_path, lambda tensors: {key.replace("miss_block", "bone_block"): v for key, v in tensors.items()})
    values = {k: v for k, v in read_config(tmp_path).items() if k not in ("miss_dropout", "mini_r")} | {"peft_type": "BONE"}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert_equal(blocks(mc.load_adapter(two_linears(), tmp_path)), blocks(ours))


# Compiled wrappers


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "DataParallel"]
)
def test_a_wrapped_model_saves_and_loads_as_the_model_inside(tmp_path: Path, wrap: Any) -> None:
    plain = adapted()
    mc.save_adapter(plain, tmp_path / "plain")
    mc.save_adapter(wrap(adapted()), tmp_path / "adapted first")
    mc.save_adapter(
        fill_blocks(mc.adapt(wrap(two_linears()), TARGETS | FIELDS["balance"]), std=0.3), tmp_path / "wrapped first"
    )
    for name in ("adapted first", "wrapped first"):
        assert (tmp_path / name / CONFIG).read_bytes() == (tmp_path / "plain" / CONFIG).read_bytes()
        assert sorted(load_file(tmp_path / name / WEIGHTS)) == [DOWN, UP]
    assert (tmp_path / "adapted first" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
    inside = two_linears()
    wrapped = wrap(inside)
    assert mc.load_adapter(wrapped, tmp_path / "plain") is wrapped
    assert_equal(blocks(inside), blocks(plain))
    x = MODELS["two linears"][1]()
    torch.testing.assert_close(run(wrapped, x), run(plain, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("base_model.model.", "_orig_mod.base_model.model."),
        lambda key: key.replace(".layers.0.", ".layers.0._orig_mod."),
        lambda key: key.replace(".miss_block", "._orig_mod.miss_block"),
    ],
    ids=["root", "whole wrapper", "layer", "linear"],
)
def test_keys_of_a_compiled_wrapper_are_read(tmp_path: Path, rename: Callable[[str], str]) -> None:
    saved = adapted(base=tiny_llama(), target_modules=["q_proj", "down_proj"])
    mc.save_adapter(saved, tmp_path)
    change_weights(tmp_path, lambda tensors: {rename(key): value for key, value in tensors.items()})
    assert any("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS))
    assert_equal(blocks(mc.load_adapter(tiny_llama(), tmp_path)), blocks(saved))


def compile_layers(model: nn.Module) -> nn.Module:
    layers: Any = model.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", ["layers.1.mlp.up_proj"]], ids=str)
def test_layers_compiled_one_by_one(tmp_path: Path, targets: Any) -> None:
    """Regional compilation puts `_orig_mod` into the names: what is saved there is the adapter of the plain model."""
    plain = adapted(base=tiny_llama(), target_modules=targets)
    mc.save_adapter(compile_layers(plain), tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS))
    assert "_orig_mod" not in (tmp_path / CONFIG).read_text()
    expected = list(blocks(plain).values())
    for base in (tiny_llama(), compile_layers(tiny_llama())):
        found = list(blocks(mc.load_adapter(base, tmp_path)).values())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
    assert_equal(blocks(mc.load_adapter(two_linears(), folder)), blocks(bat))


def test_a_disk_that_fails_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    mc.save_adapter(adapted("balance"), folder)
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        mc.save_adapter(adapted("bat"), folder)
    assert {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)} == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/adapter: an adapter is saved into a folder, and this is a file"):
        mc.save_adapter(adapted(), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "a file"


def test_a_block_without_values_is_not_saved(tmp_path: Path) -> None:
    model = adapted().to("meta")
    with pytest.raises(CheckpointError, match=r"up.* is on the meta device and has no values to save"):
        mc.save_adapter(model, tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("other", UnknownAdapterError, "the model has no adapter 'other': it has 'default', 'second'."),
        ("", UnknownAdapterError, "the model has no adapter '': it has 'default', 'second'."),
        (None, ArgumentError, "adapter_name: expected a string, found NoneType."),
        (["default"], ArgumentError, "adapter_name: expected a string, found list."),
    ],
    ids=stable_id,
)
def test_saving_an_adapter_that_is_not_there(tmp_path: Path, name: Any, kind: type[MissError], told: str) -> None:
    model = mc.adapt(adapted(), TARGETS | FIELDS["bat"], "second")
    with pytest.raises(kind) as caught:
        mc.save_adapter(model, tmp_path / "adapter", name)
    assert str(caught.value) == told
    assert os.listdir(tmp_path) == []


def test_saving_a_model_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownAdapterError, match="the model has no adapter 'default': it has none; call adapt or load"
    ) as caught:
        mc.save_adapter(two_linears(), tmp_path / "adapter")
    assert isinstance(caught.value, KeyError)
    assert os.listdir(tmp_path) == []


# A folder that is wrong: the error names the file or the key, and the model is as it was


def snapshot(model: nn.Module) -> Any:
    """Everything an error must leave alone: classes, attributes, parameters (the same objects), flags and outputs."""
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().numpy().tobytes()) for name, p in model.named_parameters()]
    return modules, parameters, run(model, MODELS["two linears"][1]()).numpy().tobytes()


def plain_base() -> nn.Module:
    return two_linears()


def adapted_base() -> nn.Module:
    return adapted("mini", name="first")


def copy_up(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return tensors | {key: tensors[UP].clone()}


def rewrite(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, change)


def replace_block(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return rewrite(lambda tensors: tensors | {DOWN: change(tensors[DOWN]).contiguous()})


def cut_weights(length: int) -> Callable[[Path], None]:
    """Keep so many bytes of the file, counted from the end where it is negative."""

    def cut(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])

    return cut


def write_weights(data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(data)

    return write


def write_config(text: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def set_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **fields)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("exploded", "w"))


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({UP: Bomb()}, folder / "adapter_model.bin")


def pickle_under_the_name(folder: Path) -> None:
    torch.save({UP: Bomb()}, folder / WEIGHTS)


def folder_in_place_of(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


NOT_WHOLE = [WEIGHTS + ": not a whole safetensors file ("]
HUGE_HEADER = struct.pack("<Q", 2**62) + b"{}"
HEADER_ONLY = struct.pack("<Q", 2) + b"{}"
NO_JSON = struct.pack("<Q", 4) + b"{{{{"

Break = Callable[[Path], Any]
BROKEN: dict[str, tuple[Break, type[CheckpointError], list[str]]] = {
    # files
    "no config": (remove(CONFIG), CheckpointNotFoundError, [CONFIG + ": not found."]),
    "no weights": (remove(WEIGHTS), CheckpointNotFoundError, [WEIGHTS + ": not found."]),
    "a folder as config": (folder_in_place_of(CONFIG), CheckpointNotFoundError, [CONFIG + ": not found."]),
    "a folder as weights": (folder_in_place_of(WEIGHTS), CheckpointNotFoundError, [WEIGHTS + ": not found."]),
    "a pickle": (
        pickle_instead,
        CheckpointNotFoundError,
        [
            WEIGHTS + ": not found.",
            "There is adapter_model.bin, but pickles are never read: save it with safetensors first.",
        ],
    ),
    "a pickle under the name": (pickle_under_the_name, CheckpointError, NOT_WHOLE),
    "a bare pickle": (write_weights(pickle.dumps(Bomb())), CheckpointError, NOT_WHOLE),
    "empty weights": (write_weights(b""), CheckpointError, NOT_WHOLE),
    "text": (write_weights(b"<html>404 not found, try again later</html>"), CheckpointError, NOT_WHOLE),
    "a git-lfs pointer": (write_weights(b"version https://git-lfs.github.com/spec/v1\nsize 1"), CheckpointError, NOT_WHOLE),
    "a huge header": (write_weights(HUGE_HEADER), CheckpointError, NOT_WHOLE),
    "a header that is no JSON": (write_weights(NO_JSON), CheckpointError, NOT_WHOLE),
    "a header alone": (write_weights(HEADER_ONLY), CheckpointError, [WEIGHTS, f"key {UP!r} is missing"]),
    "cut after 7 bytes": (cut_weights(7), CheckpointError, NOT_WHOLE),
    "cut in the header": (cut_weights(40), CheckpointError, NOT_WHOLE),
    "cut by one byte": (cut_weights(-1), CheckpointError, NOT_WHOLE),
    "cut in the middle": (cut_weights(-200), CheckpointError, NOT_WHOLE),
    "bytes too many": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0" * 8),
        CheckpointError,
        NOT_WHOLE,
    ),
    # keys
    "no tensors": (rewrite(lambda t: {}), CheckpointError, [WEIGHTS, f"key {UP!r} is missing, although the config chooses"]),
    "a key is missing": (rewrite(lambda t: {UP: t[UP]}), CheckpointError, [WEIGHTS, f"key {DOWN!r} is missing"]),
    "a key of no module": (
        rewrite(lambda t: copy_up(t, "base_model.model.upp.miss_block")),
        CheckpointError,
        [WEIGHTS, "key 'base_model.model.upp.miss_block' is for a module that this model does not have", "closest: 'up'"],
    ),
    "a key of a module that is not chosen": (
        set_config(target_modules=["up"]),
        CheckpointError,
        [WEIGHTS, f"key {DOWN!r} is for a module that the config does not choose."],
    ),
    "a key of the root": (
        rewrite(lambda t: copy_up(t, "base_model.model.miss_block")),
        CheckpointError,
        [WEIGHTS, "key 'base_model.model.miss_block' is for"],
    ),
    "two keys of one module": (
        rewrite(lambda t: copy_up(t, UP.replace("up", "_orig_mod.up"))),
        CheckpointError,
        [WEIGHTS, "base_model.model._orig_mod.up.miss_block", UP],
    ),
    "a foreign file": (
        rewrite(lambda t: {"model.up.weight": t[UP]}),
        CheckpointError,
        [WEIGHTS, "key 'model.up.weight' is not one of", "base_model.model."],
    ),
    "a key of LoRA": (
        rewrite(lambda t: copy_up(t, "base_model.model.up.lora_A.weight")),
        CheckpointError,
        [WEIGHTS, "key 'base_model.model.up.lora_A.weight' is"],
    ),
    "a key with an adapter name": (
        rewrite(lambda t: copy_up(t, UP + ".default")),
        CheckpointError,
        [WEIGHTS, f"key '{UP}.default' is"],
    ),
    # shapes and dtypes
    "a transposed block": (
        replace_block(lambda b: b.t()),
        CheckpointError,
        [WEIGHTS, f"key {DOWN!r} has shape (20, 5), but balance with r=5 on a 8→20 linear needs (5, 20)."],
    ),
    "a row too many": (
        replace_block(lambda b: torch.cat([b, b[:1]])),
        CheckpointError,
        [WEIGHTS, f"key {DOWN!r} has shape (6, 20)", "(5, 20)"],
    ),
    "a flat block": (
        replace_block(lambda b: b.flatten()),
        CheckpointError,
        [WEIGHTS, f"{DOWN!r} has shape (100,)", "(5, 20)"],
    ),
    "a scalar": (replace_block(lambda b: b[0, 0]), CheckpointError, [WEIGHTS, f"{DOWN!r} has shape ()", "(5, 20)"]),
    "no rows": (replace_block(lambda b: b[:0]), CheckpointError, [WEIGHTS, f"{DOWN!r} has shape (0, 20)", "(5, 20)"]),
    **{
        f"dtype {name}": (
            replace_block(lambda b, dtype=dtype: b.to(dtype)),  # type: ignore[misc]
            CheckpointError,
            [WEIGHTS, f"key {DOWN!r} has dtype {name}; a block has one of F64, F32, F16, BF16."],
        )
        for name, dtype in {
            "I64": torch.int64,
            "I32": torch.int32,
            "I8": torch.int8,
            "U8": torch.uint8,
            "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn,
        }.items()
    },
    # the config
    "another r": (set_config(r=4), CheckpointError, [WEIGHTS, f"key {UP!r} has shape (5, 8)", "r=4", "needs (4, 8)"]),
    "another variant": (
        set_config(init_weights="mini", mini_r=4),
        CheckpointError,
        [WEIGHTS, f"{UP!r} has shape (5, 8)", "mini"],
    ),
    "an r that does not fit": (
        set_config(init_weights="bat"),
        CheckpointError,
        ["does not fit this model", "MissConfig.r=5"],
    ),
    "an r above the width": (set_config(r=9), CheckpointError, ["does not fit this model", "MissConfig.r=9", "down (8→20)"]),
    "a config of LoRA": (
        lambda folder: peft.LoraConfig(target_modules=["up", "down"]).save_pretrained(folder),
        CheckpointError,
        [CONFIG, "MissConfig.peft_type='LORA'"],
    ),
    "a config of OFT": (
        lambda folder: peft.OFTConfig(target_modules=["up", "down"]).save_pretrained(folder),
        CheckpointError,
        [CONFIG, "MissConfig.peft_type='OFT'"],
    ),
    "an empty config": (write_config(""), CheckpointError, [CONFIG]),
    "a cut config": (write_config('{"peft_type": "MISS", "r":'), CheckpointError, [CONFIG]),
    "a config that is a list": (write_config('["MISS"]'), CheckpointError, [CONFIG, "expected a JSON object, found list"]),
    "a config that is no UTF-8": (write_config(b'{"r": "\xff\xfe"}'), CheckpointError, [CONFIG, "utf-8"]),
    "a text as r": (set_config(r="5"), CheckpointError, [CONFIG, "MissConfig.r='5': expected an integer"]),
    "no r": (set_config(r=None), CheckpointError, [CONFIG, "MissConfig.r=None"]),
    "an unknown variant": (set_config(init_weights="BAT"), CheckpointError, [CONFIG, "MissConfig.init_weights='BAT'"]),
    "names that match nothing": (
        set_config(target_modules=["q_proj"]),
        CheckpointError,
        ["does not fit this model", "target_modules=['q_proj'] matches no module"],
    ),
    "no names, and a model of no known type": (set_config(target_modules=None), CheckpointError, ["target_modules=None"]),
}


@pytest.mark.parametrize("base", [plain_base, adapted_base], ids=["plain", "adapted"])
@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, base: Callable[[], nn.Module]) -> None:
    break_it, kind, told = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    mc.save_adapter(adapted("balance"), folder)
    break_it(folder)
    model = base()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fields of another method
        with pytest.raises(CheckpointError) as caught:
            mc.load_adapter(model, folder)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith(str(folder))
    assert [part for part in told if part not in message] == [], message
    assert snapshot(model) == before
    assert not Path("exploded").exists()


def test_the_unbroken_folder_loads(tmp_path: Path) -> None:
    """The cases above fail for what was broken, not for what they share."""
    mc.save_adapter(adapted("balance"), tmp_path)
    before = snapshot(model := adapted_base())
    mc.load_adapter(model, tmp_path)
    assert snapshot(model) != before


@pytest.mark.parametrize("name", ["nowhere", "a file"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_text("")
    model = two_linears()
    before = snapshot(model)
    with pytest.raises(CheckpointNotFoundError) as caught:
        mc.load_adapter(model, tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: there is no such folder; pass one written by save_adapter or by PEFT."
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, ValueError)
    assert snapshot(model) == before


def test_an_adapter_in_a_subfolder_is_hinted_at(tmp_path: Path) -> None:
    mc.save_adapter(adapted(), tmp_path / "one")
    mc.save_adapter(adapted(), tmp_path / "two")
    with pytest.raises(
        CheckpointNotFoundError, match=r"adapter_config\.json: not found; adapters are in its subfolders \['one'"
    ):
        mc.load_adapter(two_linears(), tmp_path)


class Other(nn.Module):
    def __init__(self, up: int, down: int | None, more: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(12, up)
        if down is not None:
            self.down = nn.Linear(up, down)
        if more:
            self.inner = nn.ModuleDict({"up": nn.Linear(12, 8)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        return self.down(y) if hasattr(self, "down") else y


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: Other(8, None),
            f"key {DOWN!r} is for a module that this model does not have. Is it the base model that the",
        ),
        (lambda: Other(8, 21), f"key {DOWN!r} has shape (5, 20), but balance with r=5 on a 8→21 linear needs (5, 21)."),
        (lambda: Other(6, 20), f"key {UP!r} has shape (5, 8), but balance with r=5 on a 12→6 linear needs (5, 6)."),
        (lambda: Other(4, 20), "down (4→20): r=5 is more than its 4 input features"),
        (lambda: Other(8, 20, more=True), "key 'base_model.model.inner.up.miss_block' is missing, although the config"),
        (
            lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 20)),
            f"key {DOWN!r} is for a module that this model does not",
        ),
    ],
    ids=["a module less", "other out", "other width", "too narrow", "a module more", "other names"],
)
def test_a_wrong_base_model(tmp_path: Path, make: Callable[[], nn.Module], told: str) -> None:
    mc.save_adapter(adapted("balance"), tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        mc.load_adapter(model, tmp_path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("first", StateError, "adapter_name='first' is in use (up): choose another name"),
        ("a.b", ConfigError, "adapter_name='a.b': a name becomes part of a parameter name"),
        ("", ConfigError, "adapter_name=''"),
        (7, ArgumentError, "adapter_name: expected a string, found int."),
    ],
    ids=stable_id,
)
def test_a_wrong_name_for_the_loaded_adapter(tmp_path: Path, name: Any, kind: type[MissError], told: str) -> None:
    mc.save_adapter(adapted("balance"), tmp_path)
    model = adapted_base()
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        mc.load_adapter(model, tmp_path, name)
    assert told in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("folder", [None, 3, b"adapter", ["adapter"]], ids=stable_id)
@pytest.mark.parametrize("verb", [mc.save_adapter, mc.load_adapter], ids=lambda verb: verb.__name__)
def test_a_folder_that_is_no_path(verb: Any, folder: Any) -> None:
    model = adapted() if verb is mc.save_adapter else two_linears()
    with pytest.raises(ArgumentError, match=f"folder: expected a path, found {type(folder).__name__}"):
        verb(model, folder)


def test_strings_and_path_likes_are_paths(tmp_path: Path) -> None:
    mc.save_adapter(adapted(), str(tmp_path / "a"))
    assert mc.load_adapter(two_linears(), str(tmp_path / "a")) is not None


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_loading_in_a_wrong_state(tmp_path: Path, state: str) -> None:
    model = adapted("balance", name="first")
    mc.save_adapter(model, tmp_path, "first")
    told = r"up holds the merged adapter 'first': call unmerge\(model\)"
    with contextlib.ExitStack() as stack:
        if state == "merged":
            mc.merge(model, keep_adapters=True)
        else:
            told = r"called inside disable_adapter\(model\): leave the context first"
            stack.enter_context(mc.disable_adapter(model))
        before = snapshot(model)
        with pytest.raises(StateError, match=told):
            mc.load_adapter(model, tmp_path)
        assert snapshot(model) == before


def test_an_error_half_way_through_the_registration_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mc.save_adapter(adapted("balance"), tmp_path)
    model = adapted_base()
    before = snapshot(model)
    register, calls = nn.Module.register_parameter, []

    def fail_at_the_second(self: nn.Module, name: str, param: Any) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        register(self, name, param)

    monkeypatch.setattr(nn.Module, "register_parameter", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        mc.load_adapter(model, tmp_path)
    assert calls == ["miss_block_default", "miss_block_default"]
    assert snapshot(model) == before

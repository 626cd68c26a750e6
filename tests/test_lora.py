"""`save_as_lora`: exact for balance and mini, cut off by rank or energy for bat with the error told, read by PEFT's LoRA."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import adapted, fill_blocks, max_error, reference_delta
from torch import Tensor, nn
from zoo import TwoLinears, tiny_bert, tiny_gpt2, tiny_llama, token_batch

import misscompile as mc

EXACT: tuple[Any, ...] = (True, False, "mini")
BOTH = {"up": (8, 12), "down": (20, 8)}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def two_linears(init_weights: Any = True, **fields: Any) -> nn.Module:
    return adapted(_plain(), init_weights, **({"target_modules": ["up", "down"]} | fields))


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return TwoLinears().eval()


def _x(batch: int = 5) -> Tensor:
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(2))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    """`B A` of one layer, in fp64."""
    down, up = (tensors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
    return up @ down


def _as_lora(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base, folder).eval()


# Exact


@pytest.mark.parametrize("init_weights", EXACT)
@pytest.mark.parametrize("r", [4, 5])
def test_a_lora_of_linears_is_exact(tmp_path: Path, init_weights: Any, r: int) -> None:
    """Also where r divides neither width."""
    model = two_linears(init_weights, r=r)
    errors = mc.save_as_lora(model, tmp_path)
    assert errors == [mc.LoraError(name, r, 0.0) for name in BOTH]
    config, tensors = read(tmp_path)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", r, r)
    for name, shape in BOTH.items():
        owner = model.get_submodule(name)
        delta = reference_delta(init_weights, owner.get_parameter("miss_block_default"), owner.weight)
        assert delta.shape == shape
        assert torch.equal(product(tensors, name), delta)
    with torch.no_grad():
        theirs = _as_lora(_plain(), tmp_path)
        assert max_error(theirs(_x()), _plain()(_x())) > 0.05
        torch.testing.assert_close(theirs(_x()), model(_x()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_weights", EXACT)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_lora_of_a_transformer_is_exact(tmp_path: Path, name: str, init_weights: Any) -> None:
    make = {"gpt2": tiny_gpt2, "llama": tiny_llama}[name]
    model = adapted(make(), init_weights)
    errors = mc.save_as_lora(model, tmp_path)
    assert len(errors) == len(read(tmp_path)[1]) / 2
    with torch.no_grad():
        expected = model(token_batch()).logits
        assert max_error(expected, make()(token_batch()).logits) > 1e-2
        torch.testing.assert_close(_as_lora(make(), tmp_path)(token_batch()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init_weights", EXACT)
@pytest.mark.parametrize("base", ["meta model", "folder", "folder of the config"])
def test_from_a_folder_it_is_what_it_is_from_the_model(tmp_path: Path, base: str, init_weights: Any) -> None:
    base_folder = tmp_path / "base"
    base_folder.mkdir()
    save_file(_plain().state_dict(), base_folder / "model.safetensors")
    (base_folder / "config.json").write_text('{"model_type": "none"}')
    model = two_linears(init_weights, base_model_name_or_path=str(base_folder))
    mc.save_adapter(model, tmp_path / "adapter")
    with torch.device("meta"):
        meta = TwoLinears()
    source: Any = {"meta model": meta, "folder": base_folder, "folder of the config": None}[base]
    from_folder = mc.save_as_lora(tmp_path / "adapter", tmp_path / "a", base_model=source)
    from_model = mc.save_as_lora(model, tmp_path / "b")
    assert sorted(from_folder, key=str) == sorted(from_model, key=str)
    (config, tensors), (expected_config, expected) = read(tmp_path / "a"), read(tmp_path / "b")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    assert sorted(config.pop("target_modules")) == sorted(expected_config.pop("target_modules"))
    assert config == expected_config


def test_a_folder_of_bone(tmp_path: Path) -> None:
    model = two_linears(True)
    mc.save_adapter(model, tmp_path)
    config, tensors = read(tmp_path)
    renamed = {key.replace("miss_block", "bone_block"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BONE"}))
    mc.save_as_lora(tmp_path, tmp_path / "out", base_model=_plain())
    with torch.no_grad():
        torch.testing.assert_close(_as_lora(_plain(), tmp_path / "out")(_x()), model(_x()), rtol=1e-5, atol=1e-6)


def test_a_name_that_ends_another_takes_no_other_module(tmp_path: Path) -> None:
    """`up` in a LoRA's target_modules would also choose `inner.up`."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.inner, model.up = nn.ModuleDict({"up": nn.Linear(12, 12)}), nn.Linear(12, 12)
        return model

    model = fill_blocks(mc.adapt(make(), {"r": 4, "target_modules": "up"}))
    mc.save_as_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    adapted_names = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted_names == {"up"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_conv1d_from_a_folder_needs_the_model(tmp_path: Path) -> None:
    model = adapted(tiny_gpt2(), "mini")
    mc.save_adapter(model, tmp_path / "adapter")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    with pytest.raises(mc.CheckpointError, match="Conv1D"):
        mc.save_as_lora(tmp_path / "adapter", tmp_path / "out", base_model=tmp_path / "base")
    assert not (tmp_path / "out").exists()
    mc.save_as_lora(tmp_path / "adapter", tmp_path / "out", base_model=tiny_gpt2().to("meta"))
    with torch.no_grad():
        actual = _as_lora(tiny_gpt2(), tmp_path / "out")(token_batch()).logits
        torch.testing.assert_close(actual, model(token_batch()).logits, rtol=1e-4, atol=1e-5)


def test_heads_and_biases_go_along(tmp_path: Path) -> None:
    fields = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "MiSS_only"}
    model = adapted(tiny_bert(), **fields)
    with torch.no_grad():
        for _, parameter in mc.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    mc.save_as_lora(model, tmp_path)
    config, _ = read(tmp_path)
    assert (config["task_type"], config["bias"], config["modules_to_save"]) == ("SEQ_CLS", "lora_only", ["classifier"])
    with torch.no_grad():
        actual, expected = _as_lora(tiny_bert(), tmp_path)(token_batch()).logits, model(token_batch()).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_one_of_two_adapters_and_a_16_bit_block(tmp_path: Path) -> None:
    model = two_linears("mini")
    fill_blocks(mc.adapt(model, {"r": 3, "target_modules": ["up"]}, "other"), seed=5)
    mc.save_as_lora(model, tmp_path, "other")
    assert {key.split(".")[2] for key in read(tmp_path)[1]} == {"up"}
    mc.set_adapter(model, "other")
    with torch.no_grad():
        torch.testing.assert_close(_as_lora(_plain(), tmp_path)(_x()), model(_x()), rtol=1e-5, atol=1e-6)
    half = fill_blocks(mc.adapt(_plain().bfloat16(), {"r": 4, "target_modules": ["up"]}, autocast_adapter_dtype=False))
    mc.save_as_lora(half, tmp_path)
    assert {value.dtype for value in read(tmp_path)[1].values()} == {torch.bfloat16}


# bat


def _bat(base: nn.Module | None = None) -> nn.Module:
    fields = {"r": 4, "init_weights": "bat", "target_modules": ["up", "down"] if base is None else "all-linear"}
    return fill_blocks(mc.adapt(_plain() if base is None else base, fields), std=0.3)


def _deltas(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        owner = model.get_submodule(name)
        weight = owner.weight if isinstance(owner, nn.Linear) else owner.weight.T
        found[name] = reference_delta("bat", owner.get_parameter("miss_block_default"), weight)
    return found


@pytest.mark.parametrize("cut", [{"rank": 1}, {"rank": 3}, {"rank": 99}, {"energy": 0.5}, {"energy": 0.9}, {"energy": 1.0}])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_error_of_bat_is_that_of_the_files(tmp_path: Path, kind: str, cut: dict[str, Any]) -> None:
    model = _bat(None if kind == "linear" else tiny_gpt2())
    errors = mc.save_as_lora(model, tmp_path, **cut)
    config, tensors = read(tmp_path)
    for error in errors:
        delta = _deltas(model, [error.module])[error.module]
        lost = float((delta - product(tensors, error.module)).norm() / delta.norm())
        assert lost == pytest.approx(error.relative_error, rel=1e-4, abs=1e-6)
        singular = torch.linalg.svdvals(delta).square()
        kept = singular.cumsum(0) / singular.sum()
        best = float((1 - kept[error.rank - 1]).clamp_min(0).sqrt())
        assert error.relative_error == pytest.approx(best, abs=1e-6)
        if "rank" in cut:
            assert error.rank == min(cut["rank"], *delta.shape)
        else:
            assert kept[error.rank - 1] >= cut["energy"] - 1e-9
            assert error.rank == 1 or kept[error.rank - 2] < cut["energy"]
        assert tensors[f"base_model.model.{error.module}.lora_A.weight"].shape == (error.rank, delta.shape[1])
    assert config["r"] == config["lora_alpha"] == max(error.rank for error in errors)


@pytest.mark.parametrize("cut", [{"rank": 99}, {"energy": 0.8}])
def test_peft_computes_with_the_factors_of_bat(tmp_path: Path, cut: dict[str, Any]) -> None:
    """With another rank in each layer too: every layer's scale is 1."""
    model = _bat()
    mc.save_as_lora(model, tmp_path, **cut)
    _, tensors = read(tmp_path)
    reference = copy.deepcopy(_plain())
    with torch.no_grad():
        for name in BOTH:
            reference.get_submodule(name).weight += product(tensors, name).float()
        torch.testing.assert_close(_as_lora(_plain(), tmp_path)(_x()), reference(_x()), rtol=1e-4, atol=1e-5)
        if "rank" in cut:
            torch.testing.assert_close(reference(_x()), model(_x()), rtol=1e-4, atol=1e-5)


def test_bat_that_is_still_zero_loses_nothing(tmp_path: Path) -> None:
    model = mc.adapt(_plain(), {"r": 4, "init_weights": "bat", "target_modules": ["up"]})
    assert mc.save_as_lora(model, tmp_path / "rank", rank=2) == [mc.LoraError("up", 2, 0.0)]
    (error,) = mc.save_as_lora(model, tmp_path / "energy", energy=0.9)
    assert (error.rank, error.relative_error) == (1, 0.0)  # the least rank that keeps all of nothing
    assert not product(read(tmp_path / "energy")[1], "up").any()


# Bad arguments


@pytest.mark.parametrize(
    ("init_weights", "fields", "kind"),
    [
        (True, {"rank": 4}, mc.ArgumentError),
        ("mini", {"energy": 0.5}, mc.ArgumentError),
        ("bat", {}, mc.ArgumentError),
        ("bat", {"rank": 2, "energy": 0.5}, mc.ArgumentError),
        ("bat", {"rank": 0}, mc.ConfigError),
        ("bat", {"rank": True}, mc.ConfigError),
        ("bat", {"rank": 2.5}, mc.ConfigError),
        ("bat", {"energy": 0.0}, mc.ConfigError),
        ("bat", {"energy": 1.5}, mc.ConfigError),
        ("bat", {"energy": float("nan")}, mc.ConfigError),
        (True, {"adapter_name": "other"}, mc.UnknownAdapterError),
    ],
)
def test_bad_arguments(tmp_path: Path, init_weights: Any, fields: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        mc.save_as_lora(two_linears(init_weights), tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_energy_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(mc.ConfigError):
        mc.save_as_lora(two_linears("bat"), tmp_path / "out", energy="most")  # type: ignore[arg-type]


def test_rank_and_energy_are_for_bat_from_a_folder_too(tmp_path: Path) -> None:
    mc.save_adapter(two_linears(True), tmp_path / "adapter")
    with pytest.raises(mc.ArgumentError, match="for bat"):
        mc.save_as_lora(tmp_path / "adapter", tmp_path / "out", rank=2, base_model=_plain())


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    mc.save_adapter(two_linears("bat"), tmp_path / "bat")
    with pytest.raises(mc.CheckpointError, match="bat"):
        mc.save_as_lora(tmp_path / "bat", tmp_path / "out", rank=2, base_model=_plain())
    mc.save_adapter(two_linears(True), tmp_path / "balance")
    with pytest.raises(mc.CheckpointError, match="base_model"):
        mc.save_as_lora(tmp_path / "balance", tmp_path / "out")
    with pytest.raises(mc.CheckpointError, match=r"no linear '(up|down)'"):
        mc.save_as_lora(tmp_path / "balance", tmp_path / "out", base_model=nn.Sequential(nn.Linear(12, 8)))
    with pytest.raises(mc.CheckpointError, match="safetensors"):
        mc.save_as_lora(tmp_path / "balance", tmp_path / "out", base_model=tmp_path)
    with pytest.raises(mc.CheckpointNotFoundError):
        mc.save_as_lora(tmp_path / "nothing", tmp_path / "out", base_model=_plain())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("init_weights", "sizes"),
    [(True, (8, 40)), (True, (8, 21)), ("mini", (8, 21)), (True, (3, 20))],
    ids=["twice the width", "another width", "mini_r does not divide it", "r is above in_features"],
)
def test_a_base_model_of_other_sizes_is_refused(tmp_path: Path, init_weights: Any, sizes: tuple[int, int]) -> None:
    """A block of balance says how many outputs its linear has; a block of mini has some that it cannot have."""
    mc.save_adapter(two_linears(init_weights), tmp_path / "adapter")
    base = _plain()
    base.down = nn.Linear(*sizes)
    with pytest.raises(mc.CheckpointError, match="down"):
        mc.save_as_lora(tmp_path / "adapter", tmp_path / "out", base_model=base)


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    model = mc.merge(two_linears(True), keep_adapters=True)
    with pytest.raises(mc.StateError, match="unmerge"):
        mc.save_as_lora(model, tmp_path / "out")
    mc.save_as_lora(mc.unmerge(model), tmp_path / "out")


def test_a_message_does_not_print_the_whole_base_model(tmp_path: Path) -> None:
    mc.save_adapter(two_linears(True), tmp_path / "balance")
    with pytest.raises(mc.CheckpointError) as caught:
        mc.save_as_lora(tmp_path / "balance", tmp_path / "out", base_model=nn.Sequential(nn.Linear(12, 8)))
    assert "\n" not in str(caught.value)

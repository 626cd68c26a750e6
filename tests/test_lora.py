"""`save_as_lora`: exact for balance and mini, cut off by rank or energy for bat with the error told, read by PEFT's LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import adapted, fill_blocks, matrix_of, max_error, reference_delta, run, says, shake
from torch import Tensor, nn
from zoo import normal, tiny_bert, tiny_gpt2, tiny_llama, token_batch, two_linears

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")

Fidelity = mc.LoraFidelity
EXACT: tuple[Any, ...] = (True, False, "mini")
BOTH = {"up": (8, 12), "down": (20, 8)}
X = normal(5, 12, seed=2)
exact = pytest.mark.parametrize("init_weights", EXACT)


def adapted_linears(init_weights: Any = True, **fields: Any) -> nn.Module:
    return adapted(two_linears(), init_weights, **fields)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    """`B A` of one layer, in fp64."""
    down, up = (tensors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
    return up @ down


def as_lora(folder: Path, make: Callable[[], nn.Module] = two_linears) -> nn.Module:
    return peft.PeftModel.from_pretrained(make(), folder).eval()


def delta_of(model: nn.Module, name: str, init_weights: Any) -> Tensor:
    owner = model.get_submodule(name)
    return reference_delta(init_weights, owner.get_parameter("miss_block_default"), matrix_of(owner))


def test_a_folder_without_a_block_is_refused(tmp_path: Path) -> None:
    mc.save_adapter(adapted_linears(), tmp_path / "adapter")
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(mc.CheckpointError, match=r"adapter: its adapter_model\.safetensors has no block"):
        mc.save_as_lora(tmp_path / "adapter", tmp_path / "out", base_model=two_linears())
    assert not (tmp_path / "out").exists()


# Exact


@exact
@pytest.mark.parametrize("r", [4, 5])
def test_a_lora_of_linears_is_exact(tmp_path: Path, init_weights: Any, r: int) -> None:
    """Also where r divides neither width."""
    model = adapted_linears(init_weights, r=r)
    assert mc.save_as_lora(model, tmp_path) == [Fidelity(name, r, 0.0) for name in BOTH]
    config, tensors = read(tmp_path)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", r, r)
    for name, shape in BOTH.items():
        delta = delta_of(model, name, init_weights)
        assert delta.shape == shape
        assert torch.equal(product(tensors, name), delta)
    assert max_error(run(model, X), run(two_linears(), X)) > 0.05
    torch.testing.assert_close(run(as_lora(tmp_path), X), run(model, X), rtol=1e-5, atol=1e-6)


@exact
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_a_lora_of_a_transformer_is_exact(tmp_path: Path, make: Callable[[], nn.Module], init_weights: Any) -> None:
    model = adapted(make(), init_weights)
    errors = mc.save_as_lora(model, tmp_path)
    assert len(errors) == len(read(tmp_path)[1]) / 2
    expected = run(model, token_batch())
    assert max_error(expected, run(make(), token_batch())) > 1e-2
    torch.testing.assert_close(run(as_lora(tmp_path, make), token_batch()), expected, rtol=1e-4, atol=1e-5)


@exact
@pytest.mark.parametrize("base", ["meta model", "folder", "folder of the config"])
def test_from_a_folder_it_is_what_it_is_from_the_model(tmp_path: Path, base: str, init_weights: Any) -> None:
    base_folder = tmp_path / "base"
    base_folder.mkdir()
    save_file(two_linears().state_dict(), base_folder / "model.safetensors")
    (base_folder / "config.json").write_text('{"model_type": "none"}')
    model = adapted_linears(init_weights, base_model_name_or_path=str(base_folder))
    mc.save_adapter(model, tmp_path / "adapter")
    source: Any = {"meta model": two_linears().to("meta"), "folder": base_folder, "folder of the config": None}[base]
    from_folder = mc.save_as_lora(tmp_path / "adapter", tmp_path / "a", base_model=source)
    from_model = mc.save_as_lora(model, tmp_path / "b")
    assert sorted(from_folder, key=str) == sorted(from_model, key=str)
    (config, tensors), (expected_config, expected) = read(tmp_path / "a"), read(tmp_path / "b")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    assert sorted(config.pop("target_modules")) == sorted(expected_config.pop("target_modules"))
    assert config == expected_config


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


def test_conv1d_from_a_folder_needs_the_model(tmp_path: Path) -> None:
    model = adapted(tiny_gpt2(), "mini")
    mc.save_adapter(model, tmp_path / "adapter")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    with pytest.raises(mc.CheckpointError, match="Conv1D"):
        mc.save_as_lora(tmp_path / "adapter", tmp_path / "out", base_model=tmp_path / "base")
    assert not (tmp_path / "out").exists()
    mc.save_as_lora(tmp_path / "adapter", tmp_path / "out", base_model=tiny_gpt2().to("meta"))
    actual = run(as_lora(tmp_path / "out", tiny_gpt2), token_batch())
    torch.testing.assert_close(actual, run(model, token_batch()), rtol=1e-4, atol=1e-5)


def test_heads_and_biases_go_along(tmp_path: Path) -> None:
    fields = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "MiSS_only"}
    model = shake(adapted(tiny_bert(), **fields), std=0.1)
    mc.save_as_lora(model, tmp_path)
    config, _ = read(tmp_path)
    assert (config["task_type"], config["bias"], config["modules_to_save"]) == ("SEQ_CLS", "lora_only", ["classifier"])
    actual = run(as_lora(tmp_path, tiny_bert), token_batch())
    torch.testing.assert_close(actual, run(model, token_batch()), rtol=1e-4, atol=1e-5)


def test_one_of_two_adapters_and_a_16_bit_block(tmp_path: Path) -> None:
    model = adapted_linears("mini")
    fill_blocks(mc.adapt(model, {"r": 3, "target_modules": ["up"]}, "other"), seed=5)
    mc.save_as_lora(model, tmp_path, "other")
    assert {key.split(".")[2] for key in read(tmp_path)[1]} == {"up"}
    mc.set_adapter(model, "other")
    torch.testing.assert_close(run(as_lora(tmp_path), X), run(model, X), rtol=1e-5, atol=1e-6)
    half = mc.adapt(two_linears().bfloat16(), {"r": 4, "target_modules": ["up"]}, autocast_adapter_dtype=False)
    mc.save_as_lora(fill_blocks(half), tmp_path)
    assert {value.dtype for value in read(tmp_path)[1].values()} == {torch.bfloat16}


# bat


@pytest.mark.parametrize("cut", [{"rank": 1}, {"rank": 3}, {"rank": 99}, {"energy": 0.5}, {"energy": 0.9}, {"energy": 1.0}])
@pytest.mark.parametrize("make", [two_linears, tiny_gpt2], ids=["linear", "conv1d"])
def test_the_error_of_bat_is_that_of_the_files(tmp_path: Path, make: Callable[[], nn.Module], cut: dict[str, Any]) -> None:
    model = fill_blocks(adapted(make(), "bat"), std=0.3)
    errors = mc.save_as_lora(model, tmp_path, **cut)
    config, tensors = read(tmp_path)
    for error in errors:
        delta = delta_of(model, error.module, "bat")
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
    model = fill_blocks(adapted_linears("bat"), std=0.3)
    mc.save_as_lora(model, tmp_path, **cut)
    reference = two_linears()
    for name in BOTH:
        reference.get_submodule(name).weight.data += product(read(tmp_path)[1], name).float()
    torch.testing.assert_close(run(as_lora(tmp_path), X), run(reference, X), rtol=1e-4, atol=1e-5)
    if "rank" in cut:
        torch.testing.assert_close(run(reference, X), run(model, X), rtol=1e-4, atol=1e-5)


def test_bat_of_a_whole_graph_is_that_of_the_view_of_its_weight(tmp_path: Path) -> None:
    """A square product from the right, one that is not square, a convolution, and a part of a fused projection."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.convolution = nn.MultiheadAttention(8, 2, batch_first=True), nn.Conv1d(8, 12, 1)
            self.square, self.down = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.randn(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.attn(x, x, x, need_weights=False)[0]
            return torch.tanh(self.convolution(x.transpose(1, 2)).transpose(1, 2)) @ self.square @ self.down

    torch.manual_seed(0)
    model, x = Mixed().eval(), normal(2, 5, 8)
    rules = {"r": 4, "init_weights": "bat", "target_modules": ["k", "convolution", "square", "down"]}
    graph = fill_blocks(mc.adapt(mc.capture(model, (x,)), rules), std=0.3)
    weights = {
        "attn.k": model.attn.in_proj_weight[8:16],
        "convolution": model.convolution.weight.flatten(1),
        "square": model.square.t(),
        "down": model.down.t(),
    }
    errors = mc.save_as_lora(graph, tmp_path, rank=3)
    assert sorted(error.module.rstrip("#") for error in errors) == sorted(weights)
    for error in errors:
        weight = weights[error.module.rstrip("#")].double()
        delta = reference_delta("bat", graph.get_submodule(error.module).miss_block_default, weight)
        lost = float((delta - product(read(tmp_path)[1], error.module)).norm() / delta.norm())
        assert lost == pytest.approx(error.relative_error, rel=1e-4)
        assert 0 < lost < 1


def test_bat_that_is_still_zero_loses_nothing(tmp_path: Path) -> None:
    model = mc.adapt(two_linears(), {"r": 4, "init_weights": "bat", "target_modules": ["up"]})
    assert mc.save_as_lora(model, tmp_path / "rank", rank=2) == [Fidelity("up", 2, 0.0)]
    (error,) = mc.save_as_lora(model, tmp_path / "energy", energy=0.9)
    assert (error.rank, error.relative_error) == (1, 0.0)  # the least rank that keeps all of nothing
    assert not product(read(tmp_path / "energy")[1], "up").any()


# Bad arguments

OTHER_DOWN: list[tuple[Any, tuple[int, int]]] = [
    # A block of balance says how many outputs its linear has; a block of mini has some that it cannot have.
    (True, (8, 40)),  # twice the width
    (True, (8, 21)),
    ("mini", (8, 21)),  # mini_r does not divide it
    (True, (3, 20)),  # r is above in_features
]


def with_down(sizes: tuple[int, int]) -> nn.Module:
    base = two_linears()
    base.down = nn.Linear(*sizes)
    return base


OTHER = nn.Sequential(nn.Linear(12, 8))
REFUSALS: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    # from a model or a folder, its init_weights, the arguments, the kind, and what is told
    ("model", True, {"rank": 4}, mc.ArgumentError, "...for bat..."),
    ("model", "mini", {"energy": 0.5}, mc.ArgumentError, "...for bat..."),
    ("folder", True, {"rank": 2, "base_model": two_linears()}, mc.ArgumentError, "...for bat..."),
    ("model", "bat", {}, mc.ArgumentError, "...rank...energy..."),
    ("model", "bat", {"rank": 2, "energy": 0.5}, mc.ArgumentError, "...rank...energy..."),
    *[("model", "bat", {"rank": value}, mc.ConfigError, f"rank={value!r}...") for value in (0, True, 2.5)],
    *[
        ("model", "bat", {"energy": value}, mc.ConfigError, f"energy={value!r}...")
        for value in (0.0, 1.5, float("nan"), "most")
    ],
    ("model", True, {"adapter_name": "other"}, mc.UnknownAdapterError, "...'other'..."),
    ("merged model", True, {}, mc.StateError, "...unmerge..."),
    ("folder", "bat", {"rank": 2, "base_model": two_linears()}, mc.CheckpointError, "...bat..."),
    ("folder", True, {}, mc.CheckpointError, "...base_model..."),
    ("folder", True, {"base_model": OTHER}, mc.CheckpointError, "...no linear '...'..."),
    ("folder", True, {"base_model": Path(__file__).parent}, mc.CheckpointError, "...safetensors..."),
    ("nothing", True, {"base_model": two_linears()}, mc.CheckpointNotFoundError, "...nothing..."),
    *[("folder", init, {"base_model": with_down(sizes)}, mc.CheckpointError, "...down...") for init, sizes in OTHER_DOWN],
]


@pytest.mark.parametrize(
    ("source", "init_weights", "arguments", "kind", "told"),
    REFUSALS,
    ids=[f"{source} of {init} with {', '.join(arguments)}" for source, init, arguments, *_ in REFUSALS],
)
def test_refusals(
    tmp_path: Path, source: str, init_weights: Any, arguments: dict[str, Any], kind: type[Exception], told: str
) -> None:
    """A message does not print the whole base model."""
    model = adapted_linears(init_weights)
    mc.save_adapter(model, tmp_path / "folder")
    if source == "merged model":
        mc.merge(model, keep_adapters=True)
    with pytest.raises(kind) as caught:
        mc.save_as_lora(model if "model" in source else tmp_path / source, tmp_path / "out", **arguments)
    assert type(caught.value) is kind
    assert says(caught.value, told), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unmerged_model_is_saved(tmp_path: Path) -> None:
    mc.save_as_lora(mc.unmerge(mc.merge(adapted_linears(), keep_adapters=True)), tmp_path)
    assert read(tmp_path)[0]["peft_type"] == "LORA"

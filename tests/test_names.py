"""Names: a folder that is written on one route is read on every other one, and by PEFT, whatever modules are called."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import blocks_of, fields, max_error, shake
from torch import Tensor, fx, nn
from zoo import Repeating, TwoLinears, normal, seeded

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore")
X = normal(3, 12, dtype=torch.float64)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXACT = 1e-12


class Chain(nn.Module):
    """Linears 12→8→6→4 under any names; a dot makes a container."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name, sizes in zip(names, ((12, 8), (8, 6), (6, 4)), strict=False):
            parent, _, last = name.rpartition(".")
            if parent and parent not in self._modules:
                self.add_module(parent, nn.Module())
            self.get_submodule(parent).add_module(last, nn.Linear(*sizes))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


class Alias(nn.Module):
    """One linear under two names, and a container under two names; each is called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = self.a
        self.enc = nn.ModuleDict({"lin": nn.Linear(12, 8)})
        self.dec = self.enc
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.head(self.enc["lin"](x) * self.dec["lin"](torch.sin(x)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two linears with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def with_lora() -> nn.Module:
    lora = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    return peft.inject_adapter_in_model(lora, TwoLinears())


MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "module": copy.deepcopy,
    "captured": lambda model: mc.capture(model, (X,)),
    "traced": fx.symbolic_trace,
    "exported": lambda model: torch.export.export(model, (X,)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    blocks: set[str]
    """The names of the keys that hold a block."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    routes: tuple[str, ...] = tuple(MAKES)
    peft: tuple[str, ...] = ("reads", "writes")
    """Whether PEFT reads our folder and we read its, with equal outputs."""


ODD = ("base_layer", "modules_to_save.x", "original_module")
INSIDE = ("proj.base_layer", "out")
HASH = ("a#1", "b#", "c")
ALIASES = {"a", "b", "enc.lin", "dec.lin", "head"}
GRAPHS_AND_MODULE = ("module", "captured", "exported")
CASES: dict[str, Case] = {
    "a number sign": Case(seeded(Chain, *HASH), set(HASH)),
    "a number sign, named": Case(seeded(Chain, *HASH), {"a#1"}, {"target_modules": ["a#1"]}),
    "PEFT's words": Case(seeded(Chain, *ODD), set(ODD)),
    "PEFT's words, biases": Case(seeded(Chain, *ODD), set(ODD), {"bias": "all"}),
    "PEFT's words, saved": Case(
        seeded(Chain, *ODD), {"base_layer"}, {"target_modules": ["base_layer"], "modules_to_save": ["original_module"]}
    ),
    "PEFT's words, biases of the others": Case(
        seeded(Chain, *ODD), {"original_module"}, {"target_modules": ["original_module"], "bias": "all"}
    ),
    "PEFT's words inside": Case(seeded(Chain, *INSIDE), set(INSIDE), {"bias": "MiSS_only"}),
    "a root": Case(lambda: nn.Linear(12, 8), {""}, peft=()),  # PEFT takes no root
    # PEFT wraps one name, and a call by the other goes round it; a traced graph has one name left
    "several names": Case(seeded(Alias), ALIASES, routes=GRAPHS_AND_MODULE, peft=()),
    "several names, biases": Case(seeded(Alias), ALIASES, {"bias": "all"}, ("module", "captured", "traced"), peft=()),
    "one of several names": Case(
        seeded(Alias), {"enc.lin", "dec.lin"}, {"target_modules": ["dec.lin"]}, ("module", "captured"), peft=()
    ),
    "several names, saved": Case(
        seeded(Alias), {"head"}, {"target_modules": ["head"], "modules_to_save": ["b"]}, ("module", "captured"), peft=()
    ),
    "a tied weight": Case(seeded(Tied), {"a", "b"}, peft=("reads",)),  # PEFT gives each name a block of its own
    "one of a tied weight": Case(seeded(Tied), {"b"}, {"target_modules": ["b"]}),
    "LoRA inside": Case(with_lora, {"up.base_layer", "down"}, routes=GRAPHS_AND_MODULE, peft=()),
    "LoRA inside, biases": Case(with_lora, {"up.base_layer", "down"}, {"bias": "all"}, routes=GRAPHS_AND_MODULE, peft=()),
}


@pytest.mark.parametrize("writer", [*MAKES, "peft"])
@pytest.mark.parametrize("name", CASES)
def test_a_folder_passes_between_the_routes(name: str, writer: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, rules = case.make().double(), fields(**case.changes)
    if writer == "peft":
        if "writes" not in case.peft:
            pytest.skip("PEFT cannot, or computes something else")
        written = shake(peft.get_peft_model(copy.deepcopy(base), peft.MissConfig(**rules)))
        written.save_pretrained(tmp_path)
    elif writer not in case.routes:
        pytest.skip("a graph of this kind has other names")
    else:
        written = shake(mc.adapt(MAKES[writer](base), rules))
        mc.save_adapter(written, tmp_path)
        keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / WEIGHTS)}
        names = {key.removesuffix("miss_block").removesuffix(".") for key in keys if key.endswith("miss_block")}
        assert names == case.blocks if writer != "traced" else names <= case.blocks
    expected = written(X)
    assert max_error(expected, base(X)) > 1e-2
    for reader in case.routes:
        assert max_error(mc.load_adapter(MAKES[reader](base), tmp_path)(X), expected) < EXACT, reader
    if "reads" in case.peft and writer != "peft":
        assert max_error(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(X), expected) < 1e-5


def test_a_file_with_one_of_a_modules_names_loads_and_is_swapped_in(tmp_path: Path) -> None:
    base = seeded(Alias)().double()
    model = shake(mc.adapt(copy.deepcopy(base), fields(bias="all")))
    mc.save_adapter(model, tmp_path)
    expected = model(X)
    for name in ("a.", "b."):
        left = load_file(tmp_path / WEIGHTS)
        left = {key: value for key, value in left.items() if not key.startswith(f"base_model.model.{name}")}
        folder = tmp_path / name
        folder.mkdir()
        save_file(left, folder / WEIGHTS)
        (folder / CONFIG).write_text((tmp_path / CONFIG).read_text())
        assert max_error(mc.load_adapter(copy.deepcopy(base), folder)(X), expected) < EXACT
        shake(model, seed=7)
        assert max_error(model(X), expected) > 1e-2
        assert max_error(mc.hotswap_adapter(model, folder)(X), expected) < EXACT


def test_two_names_of_a_module_must_hold_one_value(tmp_path: Path) -> None:
    base = seeded(Alias)().double()
    model = shake(mc.adapt(copy.deepcopy(base), fields(bias="all")))
    mc.save_adapter(model, tmp_path)
    expected, tensors = model(X), load_file(tmp_path / WEIGHTS)
    for key, other in (("b.miss_block", "a.miss_block"), ("b.base_layer.bias", "a.base_layer.bias")):
        changed = tensors[f"base_model.model.{key}"] + 1
        save_file(tensors | {f"base_model.model.{key}": changed}, tmp_path / WEIGHTS)
        text = rf"key 'base_model\.model\.{key}' differs from 'base_model\.model\.{other}', but this model has one module"
        for verb in (lambda: mc.load_adapter(copy.deepcopy(base), tmp_path), lambda: mc.hotswap_adapter(model, tmp_path)):
            with pytest.raises(mc.CheckpointError, match=text):
                verb()
    assert torch.equal(model(X), expected)


def test_a_name_that_this_model_lacks_is_passed_over_where_the_file_says_that_it_repeats_another(tmp_path: Path) -> None:
    base = seeded(Alias)().double()
    model = shake(mc.adapt(copy.deepcopy(base), fields()))
    mc.save_adapter(model, tmp_path)
    assert max_error(mc.load_adapter(fx.symbolic_trace(base), tmp_path)(X), model(X)) < EXACT
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        repeats = [f"base_model.model.{name}.miss_block" for name in ("b", "dec.lin")]
        assert sorted(json.loads(file.metadata()["repeats"])) == repeats
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    with pytest.raises(
        mc.CheckpointError, match=r"key 'base_model\.model\.b\.miss_block' is for a module that this model does"
    ):
        mc.load_adapter(fx.symbolic_trace(base), tmp_path)


def test_the_base_that_peft_stores_with_an_output_layer_must_be_the_models(tmp_path: Path) -> None:
    base = seeded(Chain, "up", "lm_head")().double()
    model = shake(mc.adapt(copy.deepcopy(base), fields()))
    mc.save_adapter(model, tmp_path)
    expected, tensors = model(X), load_file(tmp_path / WEIGHTS)
    stored = {
        f"base_model.model.lm_head.base_layer.{name}": base.lm_head.get_parameter(name).data for name in ("weight", "bias")
    }
    save_file(tensors | stored, tmp_path / WEIGHTS)
    assert max_error(mc.load_adapter(copy.deepcopy(base), tmp_path)(X), expected) < EXACT
    assert max_error(mc.hotswap_adapter(model, tmp_path)(X), expected) < EXACT
    for key in stored:
        save_file(tensors | stored | {key: stored[key] + 1}, tmp_path / WEIGHTS)
        with pytest.raises(mc.CheckpointError, match=rf"key '{key}' is of the base, and this model's differs"):
            mc.load_adapter(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("route", ["captured", "traced"])
def test_blocks_of_single_calls_load_though_all_linear_chose_them(route: str, tmp_path: Path) -> None:
    base = seeded(Repeating)().double()
    model = shake(mc.adapt(MAKES[route](base), fields(), per_call_site=True))
    mc.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["step"]
    for reader in ("captured", "traced", "exported"):
        loaded = mc.load_adapter(MAKES[reader](base), tmp_path)
        assert list(blocks_of(loaded)) == [f"step#{call}.miss_block_default" for call in range(3)]
        assert max_error(loaded(X), model(X)) < EXACT


class NumberedTwice(nn.Module):
    """A linear that is called twice, and one whose name is that of a call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a", nn.Linear(12, 12))
        self.add_module("a#1", nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self._modules["a#1"](self._modules["a"](self._modules["a"](x)))  # type: ignore[misc, no-any-return]


def test_a_module_is_not_taken_for_a_call_of_another_one(tmp_path: Path) -> None:
    base = seeded(NumberedTwice)().double()
    model = shake(mc.adapt(MAKES["captured"](base), fields()))
    mc.save_adapter(model, tmp_path)
    for reader in MAKES:
        assert max_error(mc.load_adapter(MAKES[reader](base), tmp_path)(X), model(X)) < EXACT
    with pytest.raises(
        mc.UnsupportedModuleError, match=r"a: the block of a call would be held by 'a#1', which is a linear itself"
    ):
        mc.adapt(MAKES["captured"](base), fields(), per_call_site=True)


class LikeOurs(nn.Module):
    """Modules and tensors that are called as ours are, for an adapter `default`."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.miss_block_lin, self.miss_copy_x = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.lin.miss_copy_default_gain = nn.Parameter(torch.randn(8))
        self.miss_gain = nn.Parameter(torch.randn(8))
        self.register_buffer("permiss_x", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) * self.miss_gain * self.lin.miss_copy_default_gain + self.permiss_x
        return self.miss_copy_x(self.miss_block_lin(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("route", MAKES)
def test_what_is_ours_is_told_by_the_record_and_not_by_a_name(route: str, tmp_path: Path) -> None:
    base = seeded(LikeOurs)().double()
    given = MAKES[route](base)
    model = shake(mc.adapt(given, fields(bias="MiSS_only", target_modules=["lin", "miss_block_lin"])))
    active = model(X)
    if route != "module":
        own = dict(base.named_parameters())
        assert all(value.data_ptr() == own[name].data_ptr() for name, value in model.named_parameters() if name in own)
    mc.save_adapter(model, tmp_path)
    assert max_error(mc.load_adapter(MAKES[route](base), tmp_path)(X), active) < EXACT
    mc.merge(model, keep_adapters=True)
    assert max_error(model(X), active) < EXACT
    mc.unmerge(model)
    assert torch.equal(model(X), active)
    mc.unload(model)
    assert max_error(model(X), base(X)) == 0
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]


def test_an_exported_graph_tells_what_an_adapter_trained_in_full_by_its_tags() -> None:
    base = seeded(LikeOurs)().double()
    model = shake(mc.adapt(mc.capture(base, (X,)), fields(bias="all", target_modules=["lin"])))
    active = model(X)
    again = mc.adapt(torch.export.export(model, (X,)), fields(target_modules=["lin"]), "other")
    mc.set_adapter(again, ["default", "other"])
    assert max_error(again(X), active) < EXACT
    assert {name for name, _ in again.named_parameters() if "default" in name} == {
        "lin.miss_block_default",
        "lin.miss_copy_default_gain",
    }
    mc.merge(again)
    assert max_error(again(X), active) < EXACT


@pytest.mark.parametrize("route", MAKES)
@pytest.mark.parametrize(
    ("held", "error", "text"),
    [
        ("miss_block_default", mc.UnsupportedModuleError, r"lin \(.*\): it already has an attribute 'miss_block_default'"),
        (
            "miss_copy_default:bias",
            mc.ConfigError,
            r"the trained copy of lin\.bias would be 'miss_copy_default:bias'",
        ),
    ],
)
def test_a_name_that_something_else_has_is_refused(held: str, error: Any, text: str, route: str) -> None:
    base = seeded(LikeOurs)().double()
    base.lin.register_parameter(held, nn.Parameter(torch.randn(8, dtype=torch.float64)))
    given = MAKES[route](base)
    with pytest.raises(error, match=text):
        mc.adapt(given, fields(bias="all", target_modules=["lin"]))

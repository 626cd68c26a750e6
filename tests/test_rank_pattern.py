"""`rank_pattern`: ranks by name, on both routes, in files, and in what PEFT reads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import VARIANTS, blocks_of, fill_blocks, gradients, max_error, reference_delta, run
from torch import Tensor, nn

import misscompile as mc
from misscompile.rules.names import rank_of

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
RANKS = {"up": 2, r"layers\.1\..*": 1}
"""Of `layers.1.up`, whose name both take, the longer entry wins."""
SIZES = {"layers.0.up": (2, 12), "layers.0.down": (4, 8), "layers.1.up": (1, 12), "layers.1.down": (1, 8)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model(route: str) -> nn.Module:
    torch.manual_seed(0)
    made = Model().double()
    return mc.capture(made, (X,)) if route == "graph" else made


def config(init_weights: Any = True, **fields: Any) -> mc.MissConfig:
    return mc.MissConfig(
        **({"r": 4, "target_modules": "all-linear", "init_weights": init_weights, "rank_pattern": RANKS} | fields)
    )


def shapes(adapted: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".miss_block_default"): tuple(block.shape) for name, block in blocks_of(adapted).items()}


@pytest.mark.parametrize(
    ("name", "ranks", "rank"),
    [
        ("layers.0.up", RANKS, 2),
        ("layers.1.up", RANKS, 1),
        ("layers.0.down", RANKS, 64),
        ("up", RANKS, 2),
        ("layers.0.bup", RANKS, 64),  # a suffix is of whole segments
        ("layers.0.up.x", RANKS, 64),
        ("a.experts", {"experts": 8}, 8),
        ("a.experts", None, 64),
        ("layers.1.q", {"q": 1, "1.q": 2, "layers.1.q": 3}, 3),
    ],
)
def test_the_longest_entry_that_takes_a_name_gives_its_rank(name: str, ranks: Any, rank: int) -> None:
    assert rank_of(mc.MissConfig(rank_pattern=ranks), name) == rank


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("route", ["modules", "graph"])
def test_outputs_gradients_and_merge(route: str, init_weights: Any) -> None:
    adapted = fill_blocks(mc.adapt(model(route), config(init_weights)))
    if init_weights is True:
        assert shapes(adapted) == SIZES
    plain = model("modules")
    with torch.no_grad():
        for name, block in blocks_of(adapted).items():
            owner = plain.get_submodule(name.rpartition(".")[0])
            assert isinstance(owner, nn.Linear)
            owner.weight += reference_delta(init_weights, block, owner.weight)
    assert max_error(run(adapted, X), run(plain, X)) < 1e-12
    assert all(gradient.abs().max() > 0 for gradient in gradients(adapted, X).values())
    assert max_error(run(mc.merge(adapted), X), run(plain, X)) < 1e-12


@pytest.mark.parametrize("route", ["modules", "graph"])
def test_a_folder_carries_the_ranks_and_says_that_peft_cannot_read_it(tmp_path: Path, route: str) -> None:
    adapted = fill_blocks(mc.adapt(model("modules"), config()))
    with pytest.warns(mc.MissWarning, match="misscompile reads it, PEFT's MiSS cannot, which has no rank_pattern"):
        mc.save_adapter(adapted, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == RANKS
    loaded = mc.load_adapter(model(route), tmp_path)
    assert shapes(loaded) == SIZES
    assert max_error(run(loaded, X), run(adapted, X)) < 1e-12
    with pytest.warns(UserWarning, match="rank_pattern"), pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(model("modules"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.save_adapter(mc.adapt(model("modules"), config(rank_pattern=None)), tmp_path)
    assert "rank_pattern" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("ignore::misscompile.MissWarning")
@pytest.mark.parametrize("source", ["model", "folder"])
def test_peft_reads_the_ranks_as_lora(tmp_path: Path, source: str) -> None:
    adapted = fill_blocks(mc.adapt(model("modules"), config()))
    mc.save_adapter(adapted, tmp_path / "miss")
    given = adapted if source == "model" else tmp_path / "miss"
    mc.save_as_lora(given, tmp_path / "lora", base_model=None if source == "model" else model("modules"))
    lora = peft.PeftModel.from_pretrained(model("modules"), tmp_path / "lora").double()
    assert max_error(run(lora, X), run(adapted, X)) < 1e-6


def test_an_exported_graph_gives_the_ranks_back(tmp_path: Path) -> None:
    adapted = fill_blocks(mc.adapt(model("graph"), config()))
    recovered = mc.merge(mc.adapt(torch.export.export(adapted, (X,)), config(rank_pattern=None), "second"), "default")
    assert max_error(run(recovered, X), run(adapted, X)) < 1e-12


def test_an_entry_that_takes_no_adapted_module_is_told() -> None:
    with pytest.warns(mc.MissWarning, match=r"rank_pattern entry 'upp' matches no adapted module; closest: 'up'"):
        adapted = mc.adapt(model("modules"), config(rank_pattern={"upp": 2}))
    assert {shape[0] for shape in shapes(adapted).values()} == {4}


def test_a_rank_that_does_not_fit_names_the_field() -> None:
    plain = model("modules")
    with pytest.raises(mc.ConfigError) as caught:
        mc.adapt(plain, config(target_modules=["up"], rank_pattern={"1.up": 9}))
    assert str(caught.value) == (
        "MissConfig.rank_pattern={'1.up': 9} does not fit 1 of 2 chosen modules:\n"
        "  layers.1.up (8→12): r=9 is more than its 8 input features; r of 1 to 8 would do"
    )
    assert not blocks_of(plain)

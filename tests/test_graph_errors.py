"""Whole graphs that cannot be adapted, or not so: named, with what was found and what to do; and the rules of selection."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import TRACERS, blocks_of, fill_blocks
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import IN, OUT, TwoLinears, captured, holder, tiny_llama, token_batch

import misscompile as mc
from misscompile.errors import UnsupportedModuleError
from misscompile.hosts.whole_graph import WholeGraph

X = torch.randn(3, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EVERY = {"r": 2, "target_modules": "all-linear"}
PROJ = {"r": 2, "target_modules": ["proj"]}
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "always::misscompile.MissWarning", "ignore::DeprecationWarning"
)


def plain() -> nn.Module:
    return holder(lambda w, b, x: F.linear(x, w, b))


@pytest.mark.parametrize("config", [EVERY, PROJ])
def test_refuses_a_graph_without_owner_names(config: dict[str, Any]) -> None:
    graph = make_fx(plain())(X)
    with pytest.raises(UnsupportedModuleError) as error:
        mc.adapt(graph, config)
    message = str(error.value)
    assert "have no owner's name (the first is '_param_constant0'" in message
    assert "Make the graph with misscompile.capture or torch.export.export, which keep the names" in message


def test_passes_over_what_all_linear_cannot_adapt_and_tells_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Linear(IN, IN)
            self.experts = nn.Parameter(torch.randn(3, IN, OUT))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.good(x), self.experts)

    graph = TRACERS["export"](Mixed().double(), X)
    with pytest.warns(mc.MissWarning, match=r"experts \(bmm.*\) is not adapted: its weight is a stack of fused weights"):
        adapted = mc.adapt(graph, EVERY)
    assert list(blocks_of(adapted)) == ["good.miss_block_default"]
    with pytest.raises(UnsupportedModuleError, match="stack of fused weights"):
        mc.adapt(graph, {"r": 2, "target_modules": ["good", "experts"]})


def test_merge_refuses_a_tied_weight_in_two_forms() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.encode.weight.t()) @ self.decode.weight

    model = Tied().double()
    graph = TRACERS["export"](model, X)
    graph.decode.weight = graph.encode.weight  # two names for one parameter
    adapted = fill_blocks(mc.adapt(graph, EVERY))
    before = adapted(X)
    with pytest.raises(mc.MergeError, match=r"decode and encode read one weight in two forms|encode and decode read"):
        mc.merge(adapted)
    assert torch.equal(adapted(X), before)


def test_merge_refuses_a_weight_that_is_read_elsewhere() -> None:
    graph = TRACERS["export"](holder(lambda w, b, x: F.linear(x, w, b) * w.sum()), X)
    adapted = fill_blocks(mc.adapt(graph, PROJ))
    before = adapted(X)
    with pytest.raises(mc.MergeError, match=r"proj: its weight is also read by 'sum_1' \(aten\.sum\.default\)"):
        mc.merge(adapted)
    assert torch.equal(adapted(X), before)


def test_only_graph_modules_and_programs_are_graphs() -> None:
    program: Any = torch.export.export(TwoLinears(), (torch.randn(3, 12),))
    with pytest.raises(mc.ArgumentError, match=r"model: expected a torch.nn.Module, found Graph"):
        mc.adapt(program.graph, EVERY)
    with pytest.raises(mc.ArgumentError, match="found ExportedProgram"):
        mc.unload(program)
    with pytest.raises(mc.StateError, match="the model has no adapter"):
        mc.merge(program)


@functools.cache
def llama() -> WholeGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mc.capture(
            tiny_llama(num_hidden_layers=3, hidden_size=16, intermediate_size=24), kwargs={"input_ids": token_batch()}
        )


def chosen(**fields: Any) -> set[str]:
    adapted = mc.adapt(llama(), {"r": 2} | fields)
    return {name.removesuffix(".miss_block_default").removeprefix("model.layers.") for name in blocks_of(adapted)}


def test_target_rules_choose_as_on_modules() -> None:
    attention = {f"{i}.self_attn.{p}" for i in range(3) for p in ("q_proj", "v_proj")}
    assert chosen(target_modules=["q_proj", "v_proj"]) == attention
    assert chosen() == attention  # the default of its model_type
    assert chosen(target_modules=r".*\.1\.mlp\.(gate|up)_proj") == {"1.mlp.gate_proj", "1.mlp.up_proj"}
    assert chosen(target_modules=["self_attn.q_proj"], layers_to_transform=[0, 2]) == {
        "0.self_attn.q_proj",
        "2.self_attn.q_proj",
    }
    assert chosen(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers") == {"1.self_attn.q_proj"}
    assert chosen(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]) == {
        f"{i}.self_attn.q_proj" for i in range(3)
    }
    every = chosen(target_modules="all-linear")
    assert len(every) == 21
    assert not any("lm_head" in name for name in every)


def test_typos_are_told_with_the_closest_names() -> None:
    with pytest.raises(
        mc.NoMatchError, match=r"target_modules=\['q_prj'\] matches no module of the model; closest: 'q_proj'"
    ):
        mc.adapt(llama(), {"r": 2, "target_modules": ["q_prj"]})
    with pytest.warns(mc.MissWarning, match=r"target_modules entry 'w1' matches no module"):
        assert len(chosen(target_modules=["q_proj", "w1"])) == 3
    with pytest.warns(mc.MissWarning, match=r"exclude_modules entry 'vproj' matches no module; closest: 'v_proj'"):
        chosen(target_modules=["q_proj"], exclude_modules=["vproj"])
    with pytest.warns(mc.MissWarning, match="layers_to_transform index 7 is the layer of no targeted module"):
        chosen(target_modules=["q_proj"], layers_to_transform=[0, 7])
    with pytest.raises(
        UnsupportedModuleError, match=r"self_attn \(module\): .*linears inside: model\.layers\.0\.self_attn\.\w_proj"
    ):
        mc.adapt(llama(), {"r": 2, "target_modules": ["self_attn"]})


def test_a_model_type_without_a_default_is_told() -> None:
    with pytest.raises(mc.ConfigError, match=r"no default for model_type=None.*linear names of this model: up, down"):
        mc.adapt(mc.capture(TwoLinears(), (torch.randn(3, 12),)), {"r": 2})


def test_ranks_that_do_not_fit_are_told_by_site() -> None:
    with pytest.raises(
        mc.ConfigError, match=r"MissConfig\.r=33 does not fit .*\n  model\.layers\.0\.self_attn\.q_proj \(16→16\)"
    ):
        mc.adapt(llama(), {"r": 33, "target_modules": ["q_proj"]})
    _, decoder = captured("decoder")
    with pytest.raises(mc.ConfigError, match=r"multihead_attn\.q \(16→16\): 'bat' needs an r that divides in and out"):
        mc.adapt(decoder, {"r": 3, "target_modules": ["multihead_attn.q"], "init_weights": "bat"})

"""Whole graphs that cannot be adapted, or not so: named, with what was found and what to do; and the rules of selection."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import TRACERS, blocks_of, fill_blocks, graph_list, max_error
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import IN, OUT, Model, TwoLinears, captured, holder, tiny_llama, token_batch

import misscompile as mc
from misscompile.errors import UnsupportedModuleError
from misscompile.graphs import WholeGraph

X = torch.randn(3, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EVERY = {"r": 2, "target_modules": "all-linear"}
PROJ = {"r": 2, "target_modules": ["proj"]}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("always", mc.MissWarning)
        yield


def mutating(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        w.mul_(1.5)
    return F.linear(x, w, b)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(OUT, IN).double())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def plain() -> nn.Module:
    return holder(lambda w, b, x: F.linear(x, w, b))


def lifted() -> fx.GraphModule:
    return torch.export.export(plain(), (X,), strict=False).graph_module


def inference_kernel() -> Any:
    class Encoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.TransformerEncoderLayer(IN, 2, OUT, batch_first=True, dropout=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)  # type: ignore[no-any-return]

    with torch.no_grad():
        return torch.export.export(Encoding().eval().requires_grad_(False), (X.float(),), strict=True)


def detached() -> fx.GraphModule:
    return TRACERS["export"](holder(lambda w, b, x: F.linear(x, w, b).detach()), X)


def mutated() -> fx.GraphModule:
    return TRACERS["export"](holder(mutating), X)


def of_a_buffer() -> fx.GraphModule:
    return TRACERS["export"](Model(Buffered()), X)


BAD: dict[str, tuple[Any, str, str, str]] = {
    "parameters that are inputs": (
        lifted,
        "proj",
        "its weight is the input 'p_proj_weight' of the graph, not a parameter of it",
        "adapt the program itself or its module()",
    ),
    "an inference-only export": (
        inference_kernel,
        "proj.linear1",
        "its weight goes into aten._transformer_encoder_layer_fwd.default, an inference kernel without a gradient",
        "use misscompile.capture",
    ),
    "a detached output": (detached, "proj", "no gradient comes back to it past 'detach'", "detach"),
    "an in-place change": (
        mutated,
        "proj",
        "its weight 'proj.weight' is changed in place by",
        "take that out of the forward",
    ),
    "a buffer": (of_a_buffer, "proj", "its weight 'proj.weight' is a buffer or a constant, not a parameter", "a parameter"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_by_name_with_what_to_do(case: str) -> None:
    make, name, reason, advice = BAD[case]
    graph = make()
    before = graph_list(graph.graph)
    with pytest.raises(UnsupportedModuleError) as error:
        mc.adapt(graph, {"r": 2, "target_modules": [name.rpartition(".")[2]]})
    message = str(error.value)
    assert f"\n  {name} (" in message
    assert reason in message
    assert advice in message
    assert "Name other modules, or add these to exclude_modules" in message
    with pytest.raises(mc.NoMatchError, match="no linear of this model can be adapted") as error:
        mc.adapt(graph, EVERY)
    assert reason in str(error.value)
    assert graph_list(graph.graph) == before


@pytest.mark.parametrize("config", [EVERY, PROJ])
def test_refuses_a_graph_without_owner_names(config: dict[str, Any]) -> None:
    graph = make_fx(plain())(X)
    with pytest.raises(UnsupportedModuleError) as error:
        mc.adapt(graph, config)
    message = str(error.value)
    assert "have no owner's name (the first is '_param_constant0'" in message
    assert "Make the graph with misscompile.capture or torch.export.export, which keep the names" in message


def test_refuses_one_name_twice() -> None:
    adapted = mc.adapt(TRACERS["export"](plain(), X), PROJ)
    with pytest.raises(
        mc.StateError, match=r"adapter_name='default' is in use \(proj\).*delete_adapter\(model, 'default'\)"
    ):
        mc.adapt(adapted, PROJ)
    with pytest.raises(mc.StateError, match="is in use"):
        mc.adapt(adapted, EVERY, "default")
    assert list(mc.adapters(mc.adapt(adapted, PROJ, "second"))) == ["default", "second"]


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


def test_one_linear_more_than_one_form_is_refused() -> None:
    graph = TRACERS["export"](holder(lambda w, b, x: F.linear(torch.tanh(F.linear(x, w)), w.t())), X)
    with pytest.raises(UnsupportedModuleError, match="its weight is read in 2 forms that overlap"):
        mc.adapt(graph, PROJ)


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


class Repeating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(IN, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(torch.tanh(self.step(x)))  # type: ignore[no-any-return]


def test_shared_and_own_blocks_of_one_weight_do_not_mix() -> None:
    graph = TRACERS["export"](Repeating().double(), X)
    shared = mc.adapt(graph, EVERY, "shared")
    with pytest.raises(
        mc.StateError, match=r"step: the adapter 'shared' has one block for all its calls.*per_call_site=False"
    ):
        mc.adapt(shared, EVERY, "own", per_call_site=True)
    own = mc.adapt(graph, EVERY, "own", per_call_site=True)
    with pytest.raises(
        mc.StateError, match=r"step: the adapter 'own' has a block for each of its calls.*per_call_site=True"
    ):
        mc.adapt(own, EVERY, "shared")
    both = fill_blocks(mc.adapt(own, EVERY, "second", per_call_site=True))
    mc.set_adapter(both, ["own", "second"])
    assert len(blocks_of(both)) == 4
    output = both(X)
    mc.merge(both)
    assert max_error(both(X), output) < 1e-12


def test_attention_called_twice_unshares_all_of_its_projections() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(IN, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            memory = x[:, :3] * 2  # key and value are one product, the query is another
            for _ in range(2):
                x = self.attn(x, memory, memory, need_weights=False)[0]
            return x

    graph = TRACERS["export"](Twice().double(), X)
    fields = {"r": 2, "target_modules": ["q", "k", "v"]}
    adapted = fill_blocks(mc.adapt(graph, fields, per_call_site=True), std=0.3)
    assert len(blocks_of(adapted)) == 6
    output = adapted(X)
    mc.merge(adapted, keep_adapters=True)
    assert max_error(adapted(X), output) < 1e-12
    mc.unmerge(adapted)
    assert torch.equal(adapted(X), output)
    mc.merge(adapted)
    assert max_error(adapted(X), output) < 1e-12
    names = {name for name, _ in adapted.named_parameters() if "in_proj_weight" in name}
    assert names == {"attn.in_proj_weight#0", "attn.in_proj_weight#1"}


def test_per_call_site_is_for_graphs() -> None:
    with pytest.raises(mc.ArgumentError, match=r"per_call_site=True: .* use misscompile\.capture first"):
        mc.adapt(TwoLinears(), EVERY, per_call_site=True)


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
    with pytest.raises(mc.ConfigError, match=r"no default for a graph of model_type=None.*linear names: up, down"):
        mc.adapt(mc.capture(TwoLinears(), (torch.randn(3, 12),)), {"r": 2})


def test_ranks_that_do_not_fit_are_told_by_site() -> None:
    with pytest.raises(
        mc.ConfigError, match=r"MissConfig\.r=33 does not fit .*\n  model\.layers\.0\.self_attn\.q_proj \(16→16\)"
    ):
        mc.adapt(llama(), {"r": 33, "target_modules": ["q_proj"]})
    _, decoder = captured("decoder")
    with pytest.raises(mc.ConfigError, match=r"multihead_attn\.q \(16→16\): 'bat' needs an r that divides in and out"):
        mc.adapt(decoder, {"r": 3, "target_modules": ["multihead_attn.q"], "init_weights": "bat"})

"""One weight that a graph calls several times: one block for all its calls, or one for each, which a merge unshares."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    TRACERS,
    VARIANTS,
    blocks_of,
    fields,
    fill_blocks,
    gradients,
    graph_list,
    largest_difference,
    max_error,
    reference_delta,
    snapshot,
    state,
)
from torch import Tensor, fx, nn
from zoo import IN, Repeating, TwoLinears, captured, make_batch, normal

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore")
X = normal(3, 12, dtype=torch.float64)
TOLERANCE = 1e-9
GROUP = "encoder.albert_layer_groups.0.albert_layers.0"


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_albert_has_one_block_for_all_calls_of_a_weight(init_weights: Any) -> None:
    _, graph = captured("albert")
    batch, rules = make_batch("albert"), fields(init_weights, target_modules=["query", "ffn"])
    shared = fill_blocks(mc.adapt(graph, rules))
    assert len(blocks_of(shared)) == 2
    own = mc.adapt(graph, rules, per_call_site=True)
    assert largest_difference(own(**batch), graph(**batch)) == 0
    names = [f"{GROUP}.{part}#{call}.miss_block_default" for part in ("attention.query", "ffn") for call in range(3)]
    assert sorted(blocks_of(own)) == names
    for name, block in blocks_of(own).items():  # the same values at every call compute what one block does
        block.data.copy_(blocks_of(shared)[name.replace(name[name.index("#") :][:2], "")])
    assert largest_difference(own(**batch), shared(**batch)) < TOLERANCE


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_albert_merges_by_unsharing(init_weights: Any, tmp_path: Path) -> None:
    model, graph = captured("albert")
    batch, before = make_batch("albert"), (snapshot(graph), snapshot(model))
    rules = fields(init_weights, target_modules=["query", "ffn"])
    adapted = fill_blocks(mc.adapt(graph, rules, per_call_site=True))
    output, found = adapted(**batch), list(gradients(adapted, **batch).values())
    assert all(gradient.abs().max() > 0 for gradient in found)
    assert not torch.equal(found[0], found[1])
    mc.save_adapter(adapted, tmp_path)
    assert largest_difference(mc.load_adapter(graph, tmp_path, is_trainable=True)(**batch), output) == 0

    mc.merge(adapted, keep_adapters=True)
    assert largest_difference(adapted(**batch), output) < TOLERANCE
    mc.unmerge(adapted)
    assert largest_difference(adapted(**batch), output) == 0
    mc.merge(adapted)
    assert largest_difference(adapted(**batch), output) < TOLERANCE
    weight = f"{GROUP}.ffn.weight"
    names = [name for name, _ in adapted.named_parameters() if name.startswith(weight)]
    assert names == [f"{weight}#{call}" for call in range(3)]
    assert not torch.equal(adapted.get_parameter(names[0]), adapted.get_parameter(names[1]))
    calls = [(op, target) for op, target, *_ in graph_list(graph) if op == "call_function"]
    assert [(op, target) for op, target, *_ in graph_list(adapted) if op == "call_function"] == calls
    assert (snapshot(graph), snapshot(model)) == before

    with pytest.raises(mc.MissError, match=r"linears inside: encoder\.albert_layer_groups\.0\.albert_layers\.0\.ffn#0, "):
        mc.adapt(adapted, rules)  # each call has a weight and so an owner of its own now
    again = fill_blocks(mc.adapt(adapted, rules | {"target_modules": r".*\.ffn#[02]"}))
    assert len(blocks_of(again)) == 2
    output = again(**batch)
    mc.merge(again)
    assert largest_difference(again(**batch), output) < TOLERANCE
    assert graph_list(again) == graph_list(adapted)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_module_that_the_tracer_kept_is_unshared_by_a_merge(init_weights: Any) -> None:
    torch.manual_seed(0)
    model = Repeating().double()
    graph = fx.symbolic_trace(model)
    own = fill_blocks(mc.adapt(graph, fields(init_weights), per_call_site=True), std=0.2)
    assert list(blocks_of(own)) == [f"step#{call}.miss_block_default" for call in range(3)]
    expected = X
    for block in blocks_of(own).values():
        weight = model.step.weight + reference_delta(init_weights, block, model.step.weight)
        expected = torch.tanh(nn.functional.linear(expected, weight, model.step.bias))
    output = own(X)
    assert max_error(output, expected) < 1e-12
    mc.merge(own, keep_adapters=True)
    assert max_error(own(X), expected) < 1e-12
    with mc.disable_adapter(own):
        assert torch.equal(own(X), model(X))
    assert max_error(own(X), expected) < 1e-12
    mc.unmerge(own)
    assert torch.equal(own(X), output)
    undone = mc.unload(copy.deepcopy(own))
    assert graph_list(undone) == graph_list(graph)
    assert [name for name, _ in undone.named_modules()] == [name for name, _ in graph.named_modules()]
    mc.merge(own)
    assert max_error(own(X), expected) < 1e-12
    assert [name for name, _ in own.named_parameters()] == ["step.bias", "step#0.weight", "step#1.weight", "step#2.weight"]
    assert {type(own.get_submodule(f"step#{call}")) for call in range(3)} == {nn.Linear}
    calls = [str(node.target) for node in own.graph.nodes if node.op == "call_module"]
    assert calls == [f"step#{call}" for call in range(3)]
    assert torch.equal(graph(X), model(X))


def test_merge_refuses_to_clone_a_module_with_trained_copies() -> None:
    own = mc.adapt(fx.symbolic_trace(Repeating().double()), fields(bias="all"), per_call_site=True)
    before = fill_blocks(own)(X)
    with pytest.raises(mc.MergeError, match="step#0: its module 'step' is one node of the graph and has trained tensors"):
        mc.merge(own)
    assert torch.equal(own(X), before)


def test_shared_and_own_blocks_of_one_weight_do_not_mix() -> None:
    graph = TRACERS["export"](Repeating().double(), X)
    shared = mc.adapt(graph, fields(), "shared")
    text = r"step: the adapter 'shared' has one block for all its calls.*per_call_site=False"
    with pytest.raises(mc.StateError, match=text):
        mc.adapt(shared, fields(), "own", per_call_site=True)
    own = mc.adapt(graph, fields(), "own", per_call_site=True)
    text = r"step: the adapter 'own' has a block for each of its calls.*per_call_site=True"
    with pytest.raises(mc.StateError, match=text):
        mc.adapt(own, fields(), "shared")
    both = fill_blocks(mc.adapt(own, fields(), "second", per_call_site=True))
    mc.set_adapter(both, ["own", "second"])
    assert len(blocks_of(both)) == 6
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

    x = normal(3, 5, IN, dtype=torch.float64)
    graph = TRACERS["export"](Twice().double(), x)
    adapted = fill_blocks(mc.adapt(graph, fields(r=2, target_modules=["q", "k", "v"]), per_call_site=True), std=0.3)
    assert len(blocks_of(adapted)) == 6
    output, before = adapted(x), state(adapted)
    mc.merge(adapted, keep_adapters=True)
    assert max_error(adapted(x), output) < 1e-12
    mc.unmerge(adapted)
    assert torch.equal(adapted(x), output)
    assert state(adapted).keys() == before.keys()
    mc.merge(adapted)
    assert max_error(adapted(x), output) < 1e-12
    names = {name for name, _ in adapted.named_parameters() if "in_proj_weight" in name}
    assert names == {"attn.in_proj_weight#0", "attn.in_proj_weight#1"}


def test_per_call_site_is_for_graphs() -> None:
    with pytest.raises(mc.ArgumentError, match=r"per_call_site=True: .* use misscompile\.capture first"):
        mc.adapt(TwoLinears(), fields(), per_call_site=True)

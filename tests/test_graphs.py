"""Whole graphs of many models: equal to the module route, to their base, and on disk, and merged to the base's nodes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VARIANTS, blocks_of, fields, fill_blocks, gradients, graph_list, largest_difference, max_error, snapshot
from torch import fx, nn
from zoo import captured, make_batch

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore")
MODULE_ROUTE = ("llama", "gpt2", "bert", "t5", "vit", "clip", "whisper", "albert")
"""Models that the module route can adapt wholly."""
GRAPH_ONLY = ("encoder", "decoder", "cross attention", "convolutions")
TOLERANCE = 1e-9


def config(name: str, init_weights: Any) -> dict[str, Any]:
    narrow = {"exclude_modules": ["classifier"]} if name in ("bert", "vit") else {}  # three outputs
    return fields(init_weights, **narrow, **({"r": 2} if name == "convolutions" else {}))


def assert_equals_the_module_route(
    base: nn.Module, graph: fx.GraphModule, name: str, adapted: nn.Module, output: Any, tmp_path: Path
) -> None:
    """Outputs and gradients of the adapted module, and its files and the graph's on the other route."""
    batch = make_batch(name)
    (adapter,) = mc.adapters(adapted).values()
    model = fill_blocks(mc.adapt(copy.deepcopy(base), adapter))
    assert {n for n, _ in mc.trainable_parameters(adapted)} == {n for n, _ in mc.trainable_parameters(model)}
    expected = model(**batch)
    assert largest_difference(output, expected) < TOLERANCE
    wanted, found = gradients(model, **batch), gradients(adapted, **batch)
    assert all(
        max_error(found[name], value) < TOLERANCE * max(1.0, float(value.abs().max())) for name, value in wanted.items()
    )
    mc.save_adapter(model, tmp_path / "module")
    onto_module = mc.load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    onto_graph = mc.load_adapter(graph, tmp_path / "module", is_trainable=True)
    assert largest_difference(onto_module(**batch), expected) == 0
    assert largest_difference(onto_graph(**batch), output) == 0


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("name", [*MODULE_ROUTE, *GRAPH_ONLY])
def test_adapts_saves_and_merges_as_the_module_route_does(name: str, init_weights: Any, tmp_path: Path) -> None:
    model, graph = captured(name)
    batch = make_batch(name)
    before = snapshot(graph), snapshot(model)
    adapted = mc.adapt(graph, config(name, init_weights))
    assert adapted is not graph
    with torch.no_grad():  # a product whose weight wants a gradient may take another kernel
        assert largest_difference(adapted(**batch), graph(**batch)) == 0
    assert largest_difference(adapted(**batch), graph(**batch)) < 1e-14

    fill_blocks(adapted)
    output = adapted(**batch)
    assert largest_difference(output, graph(**batch)) > 1e-4
    found = gradients(adapted, **batch)
    assert list(found) == list(blocks_of(adapted)) != []
    assert all(gradient.abs().max() > 0 for gradient in found.values())

    mc.save_adapter(adapted, tmp_path)
    if name in MODULE_ROUTE:
        assert_equals_the_module_route(model, graph, name, adapted, output, tmp_path)
    else:
        assert largest_difference(mc.load_adapter(graph, tmp_path, is_trainable=True)(**batch), output) == 0

    mc.merge(adapted)
    assert largest_difference(adapted(**batch), output) < TOLERANCE
    assert graph_list(adapted) == graph_list(graph)
    assert [n for n, _ in adapted.named_parameters()] == [n for n, _ in graph.named_parameters()]
    assert (snapshot(graph), snapshot(model)) == before


def test_names_the_projections_of_attention_and_the_convolutions() -> None:
    def blocks(name: str, *targets: str, r: int = 4) -> dict[str, tuple[int, ...]]:
        found = blocks_of(mc.adapt(captured(name)[1], {"r": r, "target_modules": list(targets) or "all-linear"}))
        return {key.removesuffix(".miss_block_default"): tuple(block.shape) for key, block in found.items()}

    layer = ["linear1", "multihead_attn.out_proj", "multihead_attn.q", "multihead_attn.v"]
    layer += ["self_attn.out_proj", "self_attn.q", "self_attn.v"]
    expected = [f"decoder.layers.{i}.{name}" for i in range(2) for name in layer]
    assert sorted(blocks("decoder", "q", "v", "out_proj", "linear1")) == expected
    attention = {f"attn.{name}": (4, 16) for name in ("q", "k", "v", "out_proj")}
    assert blocks("cross attention") == attention | {"head": (4, 4)}
    assert sorted(blocks("convolutions", r=2)) == ["head", "narrow", "shortcut", "widen"]  # not the wide kernels


def test_gpt2s_tied_head_is_left_out_or_refused_by_merge() -> None:
    _, graph = captured("gpt2")
    batch = make_batch("gpt2")
    names = blocks_of(mc.adapt(graph, fields()))
    assert not any("lm_head" in name or "wte" in name for name in names)
    head = fill_blocks(mc.adapt(graph, fields(target_modules=["lm_head"])))
    assert len(blocks_of(head)) == 1
    assert largest_difference(head(**batch), graph(**batch)) > 1e-4
    with pytest.raises(mc.MergeError, match="its weight is also read by 'embedding'"):
        mc.merge(head)


def test_a_sequence_classifier_trains_its_head_without_being_told(tmp_path: Path) -> None:
    model, graph = captured("bert")
    batch = make_batch("bert")
    config = fields(task_type="SEQ_CLS", target_modules=["query", "value"])
    trained, module = mc.adapt(graph, config), mc.adapt(copy.deepcopy(model), config)
    names = {name for name, _ in mc.trainable_parameters(trained)}
    assert {"classifier.miss_copy_default_weight", "classifier.miss_copy_default_bias"} <= names
    assert names == {name for name, _ in mc.trainable_parameters(module)}
    for each in (fill_blocks(trained), fill_blocks(module)):
        with torch.no_grad():
            each.get_parameter("classifier.miss_copy_default_bias").add_(0.5)
    outputs = trained(**batch), module(**batch)
    assert largest_difference(*outputs) < 1e-9
    ours, expected = gradients(trained, **batch), gradients(module, **batch)
    assert all(max_error(ours[name], expected[name]) < 1e-9 for name in names)
    mc.save_adapter(trained, tmp_path)
    assert largest_difference(mc.load_adapter(copy.deepcopy(model), tmp_path)(**batch), outputs[0]) < 1e-9
    mc.merge(trained)
    assert largest_difference(trained(**batch), outputs[0]) < 1e-9
    assert graph_list(trained) == graph_list(graph)

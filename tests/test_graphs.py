"""Whole graphs of many models: equal to the module route, to their base, and on disk, and merged to the base's nodes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VARIANTS, blocks_of, fill_blocks, graph_list, largest_difference, loss_of
from torch import fx, nn
from zoo import captured, make_batch

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore")
MODULE_ROUTE = ("llama", "gpt2", "bert", "t5", "vit", "clip", "whisper", "albert")
"""Models that the module route can adapt wholly."""
GRAPH_ONLY = ("encoder", "decoder", "cross attention", "convolutions")
TOLERANCE = 1e-9


def config(name: str, init_weights: Any) -> mc.MissConfig:
    values: dict[str, Any] = {"r": 4, "mini_r": 2, "target_modules": "all-linear", "init_weights": init_weights}
    if name in ("bert", "vit"):
        values["exclude_modules"] = ["classifier"]  # three outputs
    if name == "convolutions":
        values |= {"r": 2}
    return mc.MissConfig(**values)


def snapshot(graph: nn.Module) -> Any:
    code = graph.code if isinstance(graph, fx.GraphModule) else ""
    values = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in graph.state_dict().items()}
    return code, values, {name: p.requires_grad for name, p in graph.named_parameters()}, graph.training


def assert_unchanged(graph: nn.Module, before: Any) -> None:
    code, values, requires_grad, training = before
    now = graph.state_dict()
    assert list(now) == list(values)
    assert all(torch.equal(now[name], value) and now[name].data_ptr() == place for name, (value, place) in values.items())
    assert {name: p.requires_grad for name, p in graph.named_parameters()} == requires_grad
    assert (graph.code if isinstance(graph, fx.GraphModule) else "") == code
    assert graph.training == training


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
    loss_of(expected).backward()
    references = blocks_of(model)
    for block, parameter in blocks_of(adapted).items():
        reference = references[block].grad
        assert parameter.grad is not None
        assert reference is not None
        assert torch.allclose(parameter.grad, reference, rtol=0, atol=TOLERANCE * max(1.0, float(reference.abs().max())))
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
    loss_of(output).backward()
    gradients = {block: parameter.grad for block, parameter in blocks_of(adapted).items()}
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert [n for n, p in adapted.named_parameters() if p.grad is not None] == list(gradients)

    mc.save_adapter(adapted, tmp_path)
    if name in MODULE_ROUTE:
        assert_equals_the_module_route(model, graph, name, adapted, output, tmp_path)
    else:
        assert largest_difference(mc.load_adapter(graph, tmp_path, is_trainable=True)(**batch), output) == 0

    mc.merge(adapted)
    assert largest_difference(adapted(**batch), output) < TOLERANCE
    assert graph_list(adapted) == graph_list(graph)
    assert [n for n, _ in adapted.named_parameters()] == [n for n, _ in graph.named_parameters()]
    assert_unchanged(graph, before[0])
    assert_unchanged(model, before[1])


def test_names_the_projections_of_attention() -> None:
    _, graph = captured("decoder")
    adapted = mc.adapt(graph, {"r": 4, "target_modules": ["q", "v", "out_proj", "linear1"]})
    layer = ["linear1", "multihead_attn.out_proj", "multihead_attn.q", "multihead_attn.v"]
    layer += ["self_attn.out_proj", "self_attn.q", "self_attn.v"]
    expected = [f"decoder.layers.{i}.{name}.miss_block_default" for i in range(2) for name in layer]
    assert sorted(blocks_of(adapted)) == expected
    _, graph = captured("cross attention")
    blocks = blocks_of(mc.adapt(graph, {"r": 4, "target_modules": "all-linear"}))
    assert {name.split(".")[-2]: tuple(block.shape) for name, block in blocks.items()} == {
        **dict.fromkeys(("q", "k", "v", "out_proj"), (4, 16)),
        "head": (4, 4),
    }


def test_names_the_convolutions_and_leaves_the_wide_kernels() -> None:
    _, graph = captured("convolutions")
    blocks = blocks_of(mc.adapt(graph, {"r": 2, "target_modules": "all-linear"}))
    assert sorted(name.split(".")[0] for name in blocks) == ["head", "narrow", "shortcut", "widen"]


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_albert_has_one_block_for_all_calls_of_a_weight(init_weights: Any) -> None:
    _, graph = captured("albert")
    batch = make_batch("albert")
    fields = {"r": 4, "mini_r": 2, "target_modules": ["query", "ffn"], "init_weights": init_weights}
    shared = fill_blocks(mc.adapt(graph, fields))
    assert len(blocks_of(shared)) == 2
    own = mc.adapt(graph, fields, per_call_site=True)
    assert largest_difference(own(**batch), graph(**batch)) == 0
    group = "encoder.albert_layer_groups.0.albert_layers.0"
    names = [f"{group}.{part}#{call}.miss_block_default" for part in ("attention.query", "ffn") for call in range(3)]
    assert sorted(blocks_of(own)) == names
    for name, block in blocks_of(own).items():  # the same values at every call compute what one block does
        block.data.copy_(blocks_of(shared)[name.replace(name[name.index("#") :][:2], "")])
    assert largest_difference(own(**batch), shared(**batch)) < TOLERANCE


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_albert_merges_by_unsharing(init_weights: Any, tmp_path: Path) -> None:
    model, graph = captured("albert")
    batch = make_batch("albert")
    before = snapshot(graph), snapshot(model)
    fields = {"r": 4, "mini_r": 2, "target_modules": ["query", "ffn"], "init_weights": init_weights}
    adapted = fill_blocks(mc.adapt(graph, fields, per_call_site=True))
    output = adapted(**batch)
    loss_of(output).backward()
    gradients = [block.grad for block in blocks_of(adapted).values()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert not torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    mc.save_adapter(adapted, tmp_path)
    assert largest_difference(mc.load_adapter(graph, tmp_path, is_trainable=True)(**batch), output) == 0

    mc.merge(adapted, keep_adapters=True)
    assert largest_difference(adapted(**batch), output) < TOLERANCE
    mc.unmerge(adapted)
    assert largest_difference(adapted(**batch), output) == 0
    mc.merge(adapted)
    assert largest_difference(adapted(**batch), output) < TOLERANCE
    weight = "encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    names = [name for name, _ in adapted.named_parameters() if name.startswith(weight)]
    assert names == [f"{weight}#{call}" for call in range(3)]
    values = [adapted.get_parameter(name) for name in names]
    assert not torch.equal(values[0], values[1])
    calls = [(op, target) for op, target, *_ in graph_list(graph) if op == "call_function"]
    assert [(op, target) for op, target, *_ in graph_list(adapted) if op == "call_function"] == calls
    assert_unchanged(graph, before[0])
    assert_unchanged(model, before[1])

    with pytest.raises(mc.MissError, match=r"linears inside: encoder\.albert_layer_groups\.0\.albert_layers\.0\.ffn#0, "):
        mc.adapt(adapted, fields)  # each call has a weight and so an owner of its own now
    again = fill_blocks(mc.adapt(adapted, fields | {"target_modules": r".*\.ffn#[02]"}))
    assert len(blocks_of(again)) == 2
    output = again(**batch)
    mc.merge(again)
    assert largest_difference(again(**batch), output) < TOLERANCE
    assert graph_list(again) == graph_list(adapted)

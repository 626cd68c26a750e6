"""The verbs on whole graphs: several adapters, switching, disabling, deleting, merging some, copies, and tensors in full."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VARIANTS, blocks_of, fill_blocks, graph_list, largest_difference, loss_of, max_error, reference_delta
from torch import Tensor, fx, nn
from zoo import TwoLinears, captured, make_batch

import misscompile as mc
from misscompile.bat import bat_linear
from misscompile.graphs import WholeGraph

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LINEARS = ("up", "down")


@functools.cache
def base() -> tuple[nn.Module, WholeGraph]:
    torch.manual_seed(0)
    model = TwoLinears().double().requires_grad_(False)
    return model, mc.capture(model, (X,))


def fields(init_weights: Any = True, **changes: Any) -> dict[str, Any]:
    return {"r": 4, "mini_r": 2, "target_modules": "all-linear", "init_weights": init_weights} | changes


def adapted(*variants: Any) -> WholeGraph:
    """A graph with one adapter of each variant, named by number, of non-zero values; the last one is active."""
    graph: Any = base()[1]
    for number, variant in enumerate(variants):
        graph = mc.adapt(graph, fields(variant), f"a{number}")
    return fill_blocks(graph, std=0.2)  # type: ignore[return-value]


def reference(graph: nn.Module, *active: tuple[int, Any]) -> Tensor:
    """What the model computes with these adapters, from the formulas: the sum of the ΔW of each from the base weight."""
    model = copy.deepcopy(base()[0])
    for name in LINEARS:
        weight = model.get_submodule(name).weight
        deltas = [
            reference_delta(variant, graph.get_submodule(name).get_parameter(f"miss_block_a{number}"), weight)
            for number, variant in active
        ]
        weight.data += sum(deltas, start=torch.zeros_like(weight))
    result: Tensor = model(X)
    return result


def test_several_adapters_of_different_variants_on_one_graph() -> None:
    graph = adapted(*VARIANTS)
    assert mc.active_adapters(graph) == ("a2",)
    assert list(mc.adapters(graph)) == ["a0", "a1", "a2"]
    numbered = list(enumerate(VARIANTS))
    for number, variant in numbered:
        mc.set_adapter(graph, f"a{number}")
        assert max_error(graph(X), reference(graph, (number, variant))) < 1e-12
        assert {name for name, _ in mc.trainable_parameters(graph)} == {f"{n}.miss_block_a{number}" for n in LINEARS}
    for names in (["a0", "a2"], ["a2", "a0"], ["a0", "a1", "a2"]):
        mc.set_adapter(graph, names)
        assert max_error(graph(X), reference(graph, *(numbered[int(name[1])] for name in names))) < 1e-12
    mc.set_adapter(graph, [])
    assert torch.equal(graph(X), base()[1](X))
    assert graph.code == base()[1].code


def test_an_adapter_is_added_to_a_new_graph() -> None:
    first = adapted(True)
    before = graph_list(first), {name: value.clone() for name, value in first.state_dict().items()}
    second = mc.adapt(first, fields("mini"), "other")
    assert second is not first
    assert graph_list(first) == before[0]
    assert list(first.state_dict()) == list(before[1])
    assert mc.active_adapters(first) == ("a0",)
    assert len(blocks_of(second)) == 4
    fill_blocks(second)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in before[1].items())  # blocks are copies
    weights = [graph.get_parameter("up.weight").data_ptr() for graph in (first, second, base()[1], base()[0])]
    assert len(set(weights)) == 1  # base values are not


def test_disable_nests_and_restores() -> None:
    graph = adapted(True)
    active, code = graph(X), graph.code
    with mc.disable_adapter(graph):
        assert torch.equal(graph(X), base()[1](X))
        assert graph_list(graph) == graph_list(base()[1])
        with mc.disable_adapter(graph):
            assert torch.equal(graph(X), base()[1](X))
        assert torch.equal(graph(X), base()[1](X))
        with pytest.raises(mc.StateError, match="disable_adapter"):
            mc.merge(graph)
        with pytest.raises(mc.StateError, match="disable_adapter"):
            mc.set_adapter(graph, "a0")
    assert torch.equal(graph(X), active)
    assert graph.code == code
    with pytest.raises(ValueError, match="mine"), mc.disable_adapter(graph):
        raise ValueError("mine")
    assert torch.equal(graph(X), active)


def test_delete_and_unload() -> None:
    graph = adapted(True, "bat")
    mc.delete_adapter(graph, "a0")
    assert set(blocks_of(graph)) == {f"{name}.miss_block_a1" for name in LINEARS}
    assert max_error(graph(X), reference(graph, (1, "bat"))) < 1e-12
    with pytest.raises(mc.UnknownAdapterError):
        mc.set_adapter(graph, "a0")
    mc.unload(graph)
    assert graph.code == base()[1].code
    assert graph_list(graph) == graph_list(base()[1])
    assert [n for n, _ in graph.named_modules()] == [n for n, _ in base()[1].named_modules()]
    assert [n for n, _ in graph.named_parameters()] == [n for n, _ in base()[1].named_parameters()]
    with pytest.raises(mc.StateError, match="no adapter"):
        mc.unload(graph)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_merge_of_some_leaves_the_others(init_weights: Any) -> None:
    graph = adapted(init_weights, True)
    mc.set_adapter(graph, ["a0", "a1"])
    expected = graph(X)
    blocks = {name: block.detach().clone() for name, block in blocks_of(graph).items() if name.endswith("a1")}
    mc.merge(graph, ["a0"])
    assert max_error(graph(X), expected) < 1e-12
    assert list(mc.adapters(graph)) == ["a1"]
    assert {name: torch.equal(value, blocks[name]) for name, value in blocks_of(graph).items()} == dict.fromkeys(
        blocks, True
    )
    assert any("miss_block_a1" in target for _, target, *_ in graph_list(graph))
    mc.merge(graph)
    assert max_error(graph(X), expected) < 1e-12
    assert graph_list(graph) == graph_list(base()[1])


def test_merge_refuses_while_bat_stays_active_and_drops_what_is_inactive() -> None:
    graph = adapted(True, "bat")
    mc.set_adapter(graph, ["a0", "a1"])
    before = graph(X)
    with pytest.raises(mc.MergeError, match="'bat' adapter 'a1' that would stay active"):
        mc.merge(graph, ["a0"])
    assert torch.equal(graph(X), before)
    mc.set_adapter(graph, "a0")
    expected = graph(X)
    with pytest.warns(mc.MissWarning, match=r"removed the inactive adapters \['a1'\]"):
        mc.merge(graph)
    assert max_error(graph(X), expected) < 1e-12
    assert blocks_of(graph) == {}


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_unmerge_brings_every_bit_back(init_weights: Any) -> None:
    graph = adapted(init_weights)
    active, weights = graph(X), {n: p.detach().clone() for n, p in graph.named_parameters()}
    mc.merge(graph, keep_adapters=True)
    merged = graph(X)
    assert max_error(merged, active) < 1e-12
    assert graph_list(graph) == graph_list(base()[1])
    assert not torch.equal(graph.get_parameter("up.weight"), weights["up.weight"])
    assert torch.equal(base()[1].get_parameter("up.weight"), weights["up.weight"])
    with mc.disable_adapter(graph):
        assert torch.equal(graph(X), base()[1](X))
    assert torch.equal(graph(X), merged)
    for verb in (lambda: mc.merge(graph), lambda: mc.adapt(graph, fields(), "new"), lambda: mc.set_adapter(graph, "a0")):
        with pytest.raises(mc.StateError, match=r"call unmerge\(model\)"):
            verb()
    mc.unmerge(graph)
    assert torch.equal(graph(X), active)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in graph.named_parameters())
    with pytest.raises(mc.StateError, match="nothing is merged"):
        mc.unmerge(graph)


def test_unmerge_refuses_after_a_change() -> None:
    graph = adapted(True)
    mc.merge(graph, keep_adapters=True)
    with torch.no_grad():
        graph.get_parameter("down.weight").add_(1)
    changed = graph(X)
    with pytest.raises(mc.MergeError, match=r"down\.weight was changed after it was merged"):
        mc.unmerge(graph)
    assert torch.equal(graph(X), changed)


def test_unload_of_a_merged_graph_gives_the_base_back() -> None:
    graph = adapted("mini")
    mc.merge(graph, keep_adapters=True)
    mc.unload(graph)
    assert torch.equal(graph(X), base()[1](X))
    assert graph.code == base()[1].code


def test_merge_refuses_values_that_are_not_finite() -> None:
    graph = adapted(True)
    graph.get_parameter("up.miss_block_a0").data[0, 0] = float("inf")
    code = graph.code
    with pytest.raises(mc.MergeError, match=r"up\.weight"):
        mc.merge(graph)
    assert graph.code == code


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_copy_is_a_graph_of_its_own(init_weights: Any) -> None:
    graph = adapted(init_weights)
    active = graph(X)
    copied = copy.deepcopy(graph)
    assert torch.equal(copied(X), active)
    fill_blocks(copied, seed=9)
    assert not torch.equal(copied(X), active)
    assert torch.equal(graph(X), active)
    mc.merge(copied)
    assert torch.equal(graph(X), active)
    with mc.disable_adapter(graph):
        assert torch.equal(graph(X), base()[1](X))
    mc.unload(graph)
    assert graph_list(graph) == graph_list(copied)


def test_bat_changes_its_form_with_the_dtype() -> None:
    graph = adapted("bat")
    wide, code = graph(X), graph.code
    graph.to(torch.bfloat16)
    assert graph.code != code
    two_products = [node.args[4] for node in graph.graph.nodes if node.target is bat_linear]
    assert two_products == [True, True]  # 16 bits have no room for small updates in W + ΔW
    assert graph(X.bfloat16()).dtype == torch.bfloat16
    assert max_error(graph(X.bfloat16()), wide) < 0.1
    graph.to(torch.float32)
    assert graph.code == code
    assert max_error(graph(X.float()), wide) < 0.1  # the values were rounded on the way


@pytest.mark.parametrize("bias", ["all", "MiSS_only"])
@pytest.mark.parametrize("kept", [False, True])
def test_biases_are_trained_disabled_saved_and_merged(bias: str, kept: bool, tmp_path: Path) -> None:
    model, graph = base()
    values = model.down.bias.clone()
    trained = fill_blocks(mc.adapt(graph, fields(bias=bias)))
    assert {n for n, _ in mc.trainable_parameters(trained)} == {
        *("up.miss_block_default", "down.miss_block_default", "down.miss_copy_default_bias")
    }
    copy_ = trained.get_parameter("down.miss_copy_default_bias")
    with torch.no_grad():
        copy_.add_(0.5)
    output = trained(X)
    loss_of(output).backward()
    assert copy_.grad is not None
    assert max_error(copy_.grad, 2 * output.detach().sum(0)) < 1e-12
    with mc.disable_adapter(trained):
        assert torch.equal(trained(X), graph(X))
    mc.save_adapter(trained, tmp_path)
    assert torch.equal(mc.load_adapter(graph, tmp_path, is_trainable=True)(X), output)
    assert max_error(mc.load_adapter(copy.deepcopy(model), tmp_path)(X), output) < 1e-12
    mc.merge(trained, keep_adapters=kept)
    assert max_error(trained(X), output) < 1e-12
    assert torch.equal(trained.get_parameter("down.bias"), values + 0.5)
    if kept:
        with mc.disable_adapter(trained):
            assert torch.equal(trained(X), graph(X))
        mc.unmerge(trained)
        assert torch.equal(trained(X), output)
        mc.unload(trained)
        assert torch.equal(trained(X), graph(X))
    else:
        assert graph_list(trained) == graph_list(graph)
        assert list(trained.state_dict()) == list(graph.state_dict())
    assert torch.equal(model.down.bias, values)
    assert torch.equal(graph.get_parameter("down.bias"), values)


def test_modules_to_save_are_trained_disabled_saved_and_merged(tmp_path: Path) -> None:
    model, graph = base()
    weight = model.down.weight.clone()
    trained = fill_blocks(mc.adapt(graph, fields(target_modules=["up"], modules_to_save=["down"])))
    names = {"up.miss_block_default", "down.miss_copy_default_weight", "down.miss_copy_default_bias"}
    assert {n for n, _ in mc.trainable_parameters(trained)} == names
    assert torch.equal(trained(X)[:0], graph(X)[:0])
    loss_of(trained(X)).backward()
    assert all(parameter.grad is not None for _, parameter in mc.trainable_parameters(trained))
    with torch.no_grad():
        trained.get_parameter("down.miss_copy_default_weight").mul_(1.5)
    output = trained(X)
    with mc.disable_adapter(trained):
        assert torch.equal(trained(X), graph(X))
    mc.save_adapter(trained, tmp_path)
    assert torch.equal(mc.load_adapter(graph, tmp_path, is_trainable=True)(X), output)
    assert max_error(mc.load_adapter(copy.deepcopy(model), tmp_path)(X), output) < 1e-12
    mc.merge(trained)
    assert max_error(trained(X), output) < 1e-12
    assert graph_list(trained) == graph_list(graph)
    assert torch.equal(model.down.weight, weight)
    assert torch.equal(graph.get_parameter("down.weight"), weight)


def test_modules_that_the_tracer_kept_take_adapters_and_copies() -> None:
    model = copy.deepcopy(base()[0])
    graph = fx.symbolic_trace(model)
    adapted_graph = fill_blocks(mc.adapt(graph, fields(bias="all")))
    with torch.no_grad():
        adapted_graph.get_parameter("down.miss_copy_default_bias").add_(0.5)
    output = adapted_graph(X)
    expected = copy.deepcopy(model)
    for name in LINEARS:
        linear = expected.get_submodule(name)
        linear.weight.data += reference_delta(True, adapted_graph.get_submodule(name).miss_block_default, linear.weight)
    expected.down.bias.data += 0.5
    assert max_error(output, expected(X)) < 1e-12
    with mc.disable_adapter(adapted_graph):
        assert torch.equal(adapted_graph(X), model(X))
    mc.merge(adapted_graph)
    assert max_error(adapted_graph(X), output) < 1e-12
    assert graph_list(adapted_graph) == graph_list(graph)
    assert type(adapted_graph.down) is nn.Linear
    assert torch.equal(graph(X), base()[0](X))


def test_hotswap_changes_values_and_not_the_graph(tmp_path: Path) -> None:
    graph = adapted(True)
    mc.save_adapter(graph, tmp_path, "a0")
    output, code = graph(X), graph.code
    fill_blocks(graph, seed=7)
    assert not torch.equal(graph(X), output)
    mc.hotswap_adapter(graph, tmp_path, "a0")
    assert torch.equal(graph(X), output)
    assert graph.code == code


def test_a_graph_inside_a_model_is_switched_with_it() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    outer = Outer(adapted(True))
    active = outer(X)
    with mc.disable_adapter(outer):
        assert torch.equal(outer(X), base()[1](X))
    assert torch.equal(outer(X), active)
    mc.merge(outer)
    assert max_error(outer(X), active) < 1e-12
    assert blocks_of(outer) == {}


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
    for output in outputs:
        loss_of(output).backward()
    for name in names:
        ours, expected = trained.get_parameter(name).grad, module.get_parameter(name).grad
        assert ours is not None
        assert expected is not None
        assert max_error(ours, expected) < 1e-9
    mc.save_adapter(trained, tmp_path)
    assert largest_difference(mc.load_adapter(copy.deepcopy(model), tmp_path)(**batch), outputs[0]) < 1e-9
    mc.merge(trained)
    assert largest_difference(trained(**batch), outputs[0]) < 1e-9
    assert graph_list(trained) == graph_list(graph)


class Repeating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return x


def test_merge_refuses_to_clone_a_module_with_trained_copies() -> None:
    own = mc.adapt(fx.symbolic_trace(Repeating().double()), fields(bias="all"), per_call_site=True)
    before = fill_blocks(own)(X)
    with pytest.raises(mc.MergeError, match="step#0: its module 'step' is one node of the graph and has trained tensors"):
        mc.merge(own)
    assert torch.equal(own(X), before)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_module_that_the_tracer_kept_is_unshared_by_a_merge(init_weights: Any) -> None:
    torch.manual_seed(0)
    model = Repeating().double()
    graph = fx.symbolic_trace(model)
    own = fill_blocks(mc.adapt(graph, fields(init_weights), per_call_site=True), std=0.2)
    blocks = {name: block.detach().clone() for name, block in blocks_of(own).items()}
    assert list(blocks) == [f"step#{call}.miss_block_default" for call in range(3)]
    expected = X
    for block in blocks.values():
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
    assert [str(node.target) for node in own.graph.nodes if node.op == "call_module"] == [
        f"step#{call}" for call in range(3)
    ]
    assert torch.equal(graph(X), model(X))

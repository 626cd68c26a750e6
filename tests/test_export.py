"""Whole graphs leave PyTorch's Python: through torch.export files, AOTInductor and ONNX Runtime, adapted and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from support import VARIANTS, fill_blocks
from torch import Tensor
from zoo import tiny_bert, token_batch

import misscompile as mc

Batch = dict[str, Tensor]


def batch(size: int, length: int) -> Batch:
    ids = token_batch(size, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


EXAMPLE, OTHER = batch(2, 7), batch(3, 5)


def dims() -> dict[str, Any]:
    size, length = torch.export.Dim("batch", min=2, max=16), torch.export.Dim("length", min=2, max=32)
    return {name: {0: size, 1: length} for name in EXAMPLE}


@pytest.fixture(scope="module")
def base() -> Any:
    return mc.capture(tiny_bert(), kwargs=EXAMPLE)


def adapted(base: Any, init_weights: Any, merged: bool) -> Any:
    rules = {"r": 4, "mini_r": 2, "init_weights": init_weights, "target_modules": ["query", "dense"]}
    graph = mc.adapt(base, rules | {"exclude_modules": ["pooler.dense"]})
    fill_blocks(graph)
    return mc.merge(graph).eval() if merged else graph.eval()


def expected(graph: Any, base: Any) -> Tensor:
    """Its logits, which are not those of the base."""
    with torch.no_grad():
        logits: Tensor = graph(**OTHER).logits
        assert not torch.allclose(logits, base.eval()(**OTHER).logits, atol=1e-3)
    return logits


@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_saved_program_computes_the_same(base: Any, init_weights: Any, merged: bool, tmp_path: Path) -> None:
    graph = adapted(base, init_weights, merged)
    program = torch.export.export(graph, (), EXAMPLE, dynamic_shapes=dims())
    torch.export.save(program, tmp_path / "model.pt2")
    loaded: Any = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(**OTHER).logits, expected(graph, base), atol=0, rtol=0)


@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_onnx_runtime_computes_the_same(base: Any, init_weights: Any, merged: bool, tmp_path: Path) -> None:
    graph = adapted(base, init_weights, merged)
    program: Any = torch.onnx.export(graph, (), kwargs=EXAMPLE, dynamo=True, dynamic_shapes=dims(), verbose=False)
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {entry.name: OTHER[entry.name].numpy() for entry in session.get_inputs()})
    np.testing.assert_allclose(logits, expected(graph, base).numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("init_weights", "merged"), [(True, False), ("bat", True)], ids=["adapted", "merged"])
def test_aot_inductor_computes_the_same(base: Any, init_weights: Any, merged: bool, tmp_path: Path) -> None:
    graph = adapted(base, init_weights, merged)
    with torch.no_grad():
        program = torch.export.export(graph, (), EXAMPLE, dynamic_shapes=dims())
        package: Any = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled: Any = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(compiled(**OTHER).logits, expected(graph, base), atol=1e-5, rtol=0)


def node_shapes(graph: Any) -> list[tuple[Any, ...]]:
    """A graph without the names of its nodes: operation, target, and which earlier nodes it reads."""
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    read = lambda value: torch.fx.node.map_arg(value, place.__getitem__)  # noqa: E731
    return [(n.op, str(n.target), str(read(n.args)), str(read(n.kwargs))) for n in graph.graph.nodes]


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_program_that_was_exported_while_adapted_is_merged(base: Any, init_weights: Any, tmp_path: Path) -> None:
    graph = adapted(base, init_weights, merged=False)
    more = {"r": 2, "miss_dropout": 0.2, "target_modules": ["query"]}
    graph = mc.adapt(graph, more, "more")
    mc.set_adapter(graph, ["default", "more"])
    fill_blocks(graph).eval()
    torch.export.save(torch.export.export(graph, (), EXAMPLE, dynamic_shapes=dims()), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    module: Any = program.module()
    merged = mc.merge(module)
    assert merged is not module
    assert not [name for name, _ in merged.named_parameters() if "miss" in name]
    logits = expected(graph, base)
    torch.testing.assert_close(merged(**OTHER).logits, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(module(**OTHER).logits, logits, atol=1e-5, rtol=0)  # the given one is as it was
    plain = torch.export.export(copy.deepcopy(base).eval(), (), EXAMPLE, dynamic_shapes=dims()).module()
    assert node_shapes(merged) == node_shapes(plain)


def test_the_adapters_of_an_exported_program_are_read_back(base: Any) -> None:
    graph = mc.adapt(adapted(base, "mini", merged=False), {"r": 2, "miss_dropout": 0.2, "target_modules": ["query"]}, "more")
    fill_blocks(graph).eval()
    mc.set_adapter(graph, ["default", "more"])
    program = torch.export.export(graph, (), EXAMPLE, dynamic_shapes=dims())
    again = mc.adapt(program, {"r": 2, "target_modules": ["key"]}, "third")
    configs = mc.adapters(again)
    assert [(c.variant, c.r, c.mini_r) for c in configs.values()] == [("mini", 4, 2), ("balance", 2, 1), ("balance", 2, 1)]
    assert configs["more"].miss_dropout == 0.2
    mc.set_adapter(again, ["default", "more"])
    torch.testing.assert_close(again.eval()(**OTHER).logits, expected(graph, base), atol=1e-6, rtol=0)
    with pytest.raises(mc.StateError, match="adapter_name='more' is in use"):
        mc.adapt(program, {"r": 2, "target_modules": ["key"]}, "more")


def test_only_the_dropout_of_the_base_freezes_the_mode_of_an_exported_program() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    graph = mc.adapt(mc.capture(plain, (x,)), {"r": 4, "miss_dropout": 0.5, "target_modules": "all-linear"})
    program = torch.export.export(fill_blocks(graph).eval(), (x,))
    again = mc.adapt(program, {"r": 2, "target_modules": ["0"]}, "more")
    mc.set_adapter(again, "default")
    torch.testing.assert_close(again.eval()(x), graph(x))
    assert not torch.allclose(again.train()(x), graph(x))  # the dropout acts

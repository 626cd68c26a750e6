"""Whole graphs leave PyTorch's Python: through torch.export files, AOTInductor and ONNX Runtime, adapted and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from support import VARIANTS, blocks_of, fields, fill_blocks, graph_list, max_error, run, with_deltas
from torch import Tensor, fx, nn
from zoo import normal, tiny_bert, token_batch, two_linears

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


def adapted(base: Any, init_weights: Any, merged: bool = False) -> Any:
    changes = {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]}
    graph = fill_blocks(mc.adapt(base, fields(init_weights, **changes)))
    return (mc.merge(graph) if merged else graph).eval()


def two_adapters(base: Any, init_weights: Any) -> Any:
    graph = mc.adapt(adapted(base, init_weights), {"r": 2, "miss_dropout": 0.2, "target_modules": ["query"]}, "more")
    mc.set_adapter(graph, ["default", "more"])
    return fill_blocks(graph).eval()


def exported(graph: Any) -> torch.export.ExportedProgram:
    return torch.export.export(graph, (), EXAMPLE, dynamic_shapes=dims())


def expected(graph: Any, base: Any) -> Tensor:
    """Its logits, which are not those of the base."""
    logits = run(graph, **OTHER)
    assert max_error(logits, run(base.eval(), **OTHER)) > 1e-3
    return logits


every_form = pytest.mark.parametrize(
    ("init_weights", "merged"), [(variant, merged) for variant in VARIANTS for merged in (False, True)]
)


@every_form
def test_a_saved_program_computes_the_same(base: Any, init_weights: Any, merged: bool, tmp_path: Path) -> None:
    graph = adapted(base, init_weights, merged)
    torch.export.save(exported(graph), tmp_path / "model.pt2")
    loaded: Any = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(run(loaded, **OTHER), expected(graph, base))


@every_form
def test_onnx_runtime_computes_the_same(base: Any, init_weights: Any, merged: bool, tmp_path: Path) -> None:
    graph = adapted(base, init_weights, merged)
    program: Any = torch.onnx.export(graph, (), kwargs=EXAMPLE, dynamo=True, dynamic_shapes=dims(), verbose=False)
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {entry.name: OTHER[entry.name].numpy() for entry in session.get_inputs()})
    assert max_error(torch.from_numpy(logits), expected(graph, base)) < 1e-5


@pytest.mark.parametrize(("init_weights", "merged"), [(True, False), ("bat", True)], ids=["adapted", "merged"])
def test_aot_inductor_computes_the_same(base: Any, init_weights: Any, merged: bool, tmp_path: Path) -> None:
    graph = adapted(base, init_weights, merged)
    with torch.no_grad():
        package: Any = torch._inductor.aoti_compile_and_package(exported(graph), package_path=str(tmp_path / "model.pt2"))
        compiled: Any = torch._inductor.aoti_load_package(package)
    assert max_error(run(compiled, **OTHER), expected(graph, base)) < 1e-5


def node_shapes(graph: Any) -> list[tuple[Any, ...]]:
    """A graph without the names of its nodes: operation, target, and which earlier nodes it reads."""
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    read = lambda value: torch.fx.node.map_arg(value, place.__getitem__)  # noqa: E731
    return [(n.op, str(n.target), str(read(n.args)), str(read(n.kwargs))) for n in graph.graph.nodes]


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_program_that_was_exported_while_adapted_is_merged(base: Any, init_weights: Any, tmp_path: Path) -> None:
    graph = two_adapters(base, init_weights)
    torch.export.save(exported(graph), tmp_path / "model.pt2")
    module: Any = torch.export.load(tmp_path / "model.pt2").module()
    merged = mc.merge(module)
    assert merged is not module
    assert blocks_of(merged) == {}
    logits = expected(graph, base)
    assert max_error(run(merged, **OTHER), logits) < 1e-5
    assert max_error(run(module, **OTHER), logits) < 1e-5  # the given one is as it was
    assert node_shapes(merged) == node_shapes(exported(copy.deepcopy(base).eval()).module())


class Square(nn.Module):
    """A square weight between two that are not, of which one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.square, self.down = nn.Linear(12, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.square(torch.tanh(self.up(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(3, 12), (2, 5, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("trace", ["traced", "captured"])
def test_a_decomposed_program_is_merged(
    trace: str, init_weights: Any, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    plain, x = Square().to(dtype).eval(), normal(*shape).to(dtype)
    graph = fx.symbolic_trace(plain) if trace == "traced" else mc.capture(plain, (x,))
    graph = fill_blocks(mc.adapt(graph, fields(init_weights)), std=0.2)
    rows = ({0: torch.export.Dim("rows", min=2, max=9)},)
    program, base = (torch.export.export(m, (x,), dynamic_shapes=rows).run_decompositions() for m in (graph, plain))
    wanted = run(with_deltas(plain.double(), graph, default=init_weights), x.double())
    assert max_error(run(plain, x.double()), wanted) > 0.1
    assert max_error(run(program.module(), x), wanted) < tolerance
    assert list(mc.adapters(mc.adapt(program, fields(), "second"))) == ["default", "second"]
    merged = mc.merge(program)
    assert max_error(run(merged, x), wanted) < tolerance
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in plain.named_parameters()]
    operations = [[op[1] for op in graph_list(g) if "sym_size" not in op[1]] for g in (merged, base.module())]
    assert operations[0] == operations[1]  # an unread size may be left


def test_the_adapters_of_an_exported_program_are_read_back(base: Any) -> None:
    graph = two_adapters(base, "mini")
    program = exported(graph)
    again = mc.adapt(program, {"r": 2, "target_modules": ["key"]}, "third")
    configs = mc.adapters(again)
    assert [(c.variant, c.r, c.mini_r) for c in configs.values()] == [("mini", 4, 2), ("balance", 2, 1), ("balance", 2, 1)]
    assert configs["more"].miss_dropout == 0.2
    mc.set_adapter(again, ["default", "more"])
    assert max_error(run(again.eval(), **OTHER), expected(graph, base)) < 1e-6
    with pytest.raises(mc.StateError, match="adapter_name='more' is in use"):
        mc.adapt(program, {"r": 2, "target_modules": ["key"]}, "more")


@pytest.mark.parametrize("init_weights", [True, "mini"])
def test_a_program_that_lost_the_tags_of_an_update_is_refused_with_what_to_do(init_weights: Any) -> None:
    x = normal(3, 12, dtype=torch.float64)
    graph = fill_blocks(mc.adapt(mc.capture(two_linears().double(), (x,)), fields(init_weights)))
    program = torch.export.export(graph, (x,), strict=True)
    text = r"up\.miss_block_default: not every operation .* export the adapted graph with strict=False"
    for verb in (mc.merge, lambda given: mc.adapt(given, fields(), "more")):
        with pytest.raises(mc.StateError, match=text):
            verb(program)


def test_only_the_dropout_of_the_base_freezes_the_mode_of_an_exported_program() -> None:
    x = normal(3, 12, dtype=torch.float64)
    graph = mc.adapt(mc.capture(two_linears().double(), (x,)), fields(miss_dropout=0.5))
    program = torch.export.export(fill_blocks(graph).eval(), (x,))
    again = mc.adapt(program, fields(target_modules=["up"]), "more")
    mc.set_adapter(again, "default")
    assert max_error(run(again.eval(), x), run(graph, x)) < 1e-12
    assert max_error(run(again.train(), x), run(graph, x)) > 1e-3  # the dropout acts

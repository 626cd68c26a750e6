"""Whole graphs that cannot be adapted, or not so: named, with what was found and what to do; and the rules of selection."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import TRACERS, blocks_of, fill_blocks, max_error, says, snapshot
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import IN, OUT, TwoLinears, captured, holder, tiny_llama, token_batch

import misscompile as mc

X = torch.randn(3, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EVERY = {"r": 2, "target_modules": "all-linear"}
PROJ = {"r": 2, "target_modules": ["proj"]}
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "always::misscompile.MissWarning", "ignore::DeprecationWarning"
)


@pytest.mark.parametrize("config", [EVERY, PROJ])
def test_refuses_a_graph_without_owner_names(config: dict[str, Any]) -> None:
    graph = make_fx(holder(lambda w, b, x: F.linear(x, w, b)))(X)
    with pytest.raises(mc.UnsupportedModuleError) as error:
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
    with pytest.raises(mc.UnsupportedModuleError, match="stack of fused weights"):
        mc.adapt(graph, {"r": 2, "target_modules": ["good", "experts"]})


class Read(nn.Module):
    """One linear weight, read in another dtype or in its own."""

    def __init__(self, stored: torch.dtype, read: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(OUT, IN, dtype=stored), requires_grad=False)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.read is None else self.weight.to(self.read))


class Around(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize(
    ("stored", "read", "told"),
    [
        (torch.complex64, None, "its weight is torch.complex64, and an update is real and floating-point..."),
        (torch.int8, None, "its weight is torch.int8, and an update is real and floating-point..."),
        (torch.int8, torch.float64, "its weight is torch.int8, and an update is real and floating-point..."),
        (torch.float32, torch.complex64, "its weight is read as torch.complex64 by 'to' (...), and an update is real..."),
    ],
    ids=["complex", "integers", "integers read as floats", "read as complex"],
)
def test_refuses_a_weight_that_is_or_becomes_no_real_floating_point_number(
    tracer: str, stored: torch.dtype, read: torch.dtype | None, told: str
) -> None:
    graph = TRACERS[tracer](Around(Read(stored, read)), torch.ones(3, IN, dtype=read or stored))
    before = snapshot(graph)
    with pytest.raises(mc.UnsupportedModuleError) as error:
        mc.adapt(graph, PROJ)
    assert says(error.value, f"...proj (...): {told}")
    assert snapshot(graph) == before


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.encode.weight.t()) @ self.decode.weight


def tied() -> fx.GraphModule:
    graph = TRACERS["export"](Tied().double(), X)
    graph.decode.weight = graph.encode.weight  # two names for one parameter
    return graph


UNMERGED: dict[str, tuple[Callable[[], fx.GraphModule], str]] = {
    "added to its own product": (
        lambda: TRACERS["export"](holder(lambda w, b, x: torch.addmm(w, x[0, :3, :3], w[:, :3].t()), (3, 3)), X),
        r"proj: its weight is also read by 'addmm' \(aten\.addmm\.default\)",
    ),
    "tied in two forms": (tied, r"(decode and encode|encode and decode) read one weight, each with blocks of its own"),
    "read elsewhere": (
        lambda: TRACERS["export"](holder(lambda w, b, x: F.linear(x, w, b) * w.sum()), X),
        r"proj: its weight is also read by 'sum_1' \(aten\.sum\.default\)",
    ),
}


@pytest.mark.parametrize("case", UNMERGED)
def test_merge_refuses_a_weight_with_other_uses(case: str) -> None:
    make, text = UNMERGED[case]
    adapted = fill_blocks(mc.adapt(make(), EVERY))
    before = snapshot(adapted, X)
    with pytest.raises(mc.MergeError, match=text):
        mc.merge(adapted)
    assert snapshot(adapted, X) == before


def set_forward(module: nn.Linear) -> None:
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)  # type: ignore[method-assign]


OTHER_CODE: dict[str, Callable[[Any], object]] = {
    "a hook in front": lambda module: module.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "a hook behind": lambda module: module.register_forward_hook(lambda _, args, output: torch.tanh(output)),
    "a hook on gradients": lambda module: module.register_full_backward_hook(lambda _, inner, outer: (2 * inner[0],)),
    "a forward of its own": set_forward,
}


@pytest.mark.parametrize("case", OTHER_CODE)
def test_refuses_a_module_in_one_node_that_runs_more_than_its_class_tells(case: str) -> None:
    model, x = TwoLinears().double(), torch.randn(3, 12, dtype=torch.float64)
    OTHER_CODE[case](model.up)
    graph, reason = fx.symbolic_trace(model), "it is one node with hooks or a forward set on it.*use misscompile.capture"
    before = snapshot(graph, x)
    with pytest.raises(mc.UnsupportedModuleError, match=rf"\n  up \(Linear\): {reason}"):
        mc.adapt(graph, {"r": 2, "target_modules": ["up"]})
    with pytest.warns(mc.MissWarning, match=rf"up \(Linear\) is not adapted: {reason}"):
        assert list(blocks_of(mc.adapt(graph, EVERY))) == ["down.miss_block_default"]
    assert snapshot(graph, x) == before
    if case != "a forward of its own":  # in the graph of a capture, hooks are nodes of their own
        captured = fill_blocks(mc.adapt(mc.capture(model, (x,)), EVERY))
        y = captured(x)
        assert max_error(mc.merge(captured)(x), y) < 1e-12


def test_refuses_a_weight_that_a_hook_makes() -> None:
    model, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(12, 8))).double(), torch.randn(3, 12, dtype=torch.float64)
    model(x)  # its weight is no leaf now
    for graph in (fx.symbolic_trace(model), mc.capture(model, (x,))):
        y = graph(x)
        with pytest.raises(
            mc.UnsupportedModuleError, match=r"a weight that is no plain parameter|computed by '_weight_norm'"
        ):
            mc.adapt(graph, {"r": 2, "target_modules": ["0"]})
        assert torch.equal(graph(x), y)


def test_only_graph_modules_and_programs_are_graphs() -> None:
    program: Any = torch.export.export(TwoLinears(), (torch.randn(3, 12),))
    with pytest.raises(mc.ArgumentError, match=r"model: expected a torch.nn.Module, found Graph"):
        mc.adapt(program.graph, EVERY)
    with pytest.raises(mc.ArgumentError, match="found ExportedProgram"):
        mc.unload(program)
    module = mc.adapt(TwoLinears(), {"r": 2, "target_modules": "all-linear"})  # whose forwards leave no tags in an export
    for given in (program, torch.export.export(module, (torch.randn(3, 12),))):
        with pytest.raises(mc.StateError, match=r"the model has no adapter that its graph tells of.*before exporting it"):
            mc.merge(given)


@functools.cache
def llama() -> tuple[nn.Module, fx.GraphModule]:
    model = tiny_llama(num_hidden_layers=3, hidden_size=16, intermediate_size=24)
    return model, mc.capture(model, kwargs={"input_ids": token_batch()})


def outcome(model: nn.Module, rules: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The layers and modules that the rules choose, or the error, and what is told beside it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", mc.MissWarning)
        try:
            names = list(blocks_of(mc.adapt(model, {"r": 2} | rules)))
        except mc.MissError as error:
            names = [type(error).__name__, str(error)]
    names = [name.removesuffix(".miss_block_default").removeprefix("model.layers.") for name in names]
    return names, [str(warning.message) for warning in told]


def on(*targets: str, **changes: Any) -> dict[str, Any]:
    return {"target_modules": list(targets)} | changes


RULES: list[tuple[dict[str, Any], list[str] | int | str]] = [
    (on("q_proj", "v_proj"), [f"{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qv"]),
    ({}, [f"{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qv"]),  # the default of its model_type
    ({"target_modules": r".*\.1\.mlp\.(gate|up)_proj"}, ["1.mlp.gate_proj", "1.mlp.up_proj"]),
    (on("self_attn.q_proj", layers_to_transform=[0, 2]), ["0.self_attn.q_proj", "2.self_attn.q_proj"]),
    (on("q_proj", layers_to_transform=1, layers_pattern="layers"), ["1.self_attn.q_proj"]),
    (on("q_proj", "v_proj", exclude_modules=["v_proj"]), [f"{layer}.self_attn.q_proj" for layer in range(3)]),
    ({"target_modules": "all-linear"}, 21),  # all but the head
    (on("q_proj", "w1"), r"target_modules entry 'w1' matches no module"),
    (on("q_proj", exclude_modules=["vproj"]), r"exclude_modules entry 'vproj' matches no module; closest: 'v_proj'"),
    (on("q_proj", layers_to_transform=[0, 7]), "layers_to_transform index 7 is the layer of no targeted module"),
    (on("q_prj"), r"NoMatchError target_modules=\['q_prj'\] matches no module of the model; closest: 'q_proj'"),
    (on("q_proj", r=33), r"ConfigError MissConfig\.r=33 does not fit .*\n  model\.layers\.0\.self_attn\.q_proj \(16→16\)"),
]


def test_target_rules_choose_and_tell_as_on_modules() -> None:
    model, graph = llama()
    for rules, expected in RULES:
        names, told = outcome(graph, rules)
        assert (names, told) == outcome(copy.deepcopy(model), rules)
        if isinstance(expected, str):
            assert re.search(expected, "\n".join([" ".join(names), *told]))
        else:
            assert (names if isinstance(expected, list) else len(names)) == expected
    with pytest.raises(
        mc.UnsupportedModuleError, match=r"self_attn \(module\): .*linears inside: model\.layers\.0\.self_attn\.\w_"
    ):
        mc.adapt(graph, on("self_attn"))
    _, decoder = captured("decoder")
    with pytest.raises(mc.ConfigError, match=r"multihead_attn\.q \(16→16\): 'bat' needs an r that divides in and out"):
        mc.adapt(decoder, {"r": 3, "target_modules": ["multihead_attn.q"], "init_weights": "bat"})
    with pytest.raises(mc.ConfigError, match=r"no default for model_type=None.*linear names of this model: up, down"):
        mc.adapt(mc.capture(TwoLinears(), (torch.randn(3, 12),)), {"r": 2})


def test_a_weight_that_a_module_holds_under_another_name_is_adapted(tmp_path: Path) -> None:
    class Table(nn.Linear):
        def __init__(self) -> None:
            super().__init__(OUT, IN)
            self.table = nn.Parameter(torch.randn(IN, OUT))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x @ self.table)

    graph = TRACERS["export"](nn.Sequential(Table().double()), X)
    before = snapshot(graph)
    for rules in ({"target_modules": ["table"]}, {"target_modules": "all-linear"}):
        adapted = fill_blocks(mc.adapt(graph, {"r": 2} | rules))
        y = adapted(X)
        assert not torch.equal(y, graph(X))
        mc.save_adapter(adapted, tmp_path)
        assert torch.equal(mc.load_adapter(graph, tmp_path)(X), y)
        program = torch.export.export(adapted, (X,))
        for model in (adapted, program):
            assert max_error(mc.merge(model)(X), y) < 1e-12
    assert snapshot(graph) == before


class _Tied(nn.Module):
    """An embedding that a decoder shares, and a linear of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.narrow, self.decoder = (
            nn.Embedding(20, 8),
            nn.Linear(8, 8),
            nn.Linear(1, 8),
            nn.Linear(8, 20),
        )
        self.decoder.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        y: Tensor = self.decoder(self.up(h) + self.narrow(h[..., :1]))
        return y


@pytest.mark.parametrize("trace", ["captured", "traced"])
def test_all_linear_passes_over_what_is_tied_to_an_embedding_and_what_r_does_not_fit(trace: str) -> None:
    ids = torch.arange(6).view(2, 3)
    graph = mc.capture(_Tied(), (ids,)) if trace == "captured" else fx.symbolic_trace(_Tied())
    with pytest.warns(mc.MissWarning) as caught:
        adapted = mc.adapt(graph, EVERY)
    reader = "embedding" if trace == "captured" else "table"
    assert sorted(str(warning.message) for warning in caught) == [
        f"decoder (linear) is not adapted: its weight is tied to the embedding that {reader!r} reads",
        "narrow (1→8) is not adapted: r=2 is more than its 1 input features; r of 1 to 1 would do",
    ]
    assert list(blocks_of(adapted)) == ["up.miss_block_default"]
    before = fill_blocks(adapted)(ids)
    assert max_error(mc.merge(adapted)(ids), before) < 1e-6

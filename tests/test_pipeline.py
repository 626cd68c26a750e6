"""The runner of the passes, what it logs, and which owners share a class."""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import adapted, snapshot
from torch import Tensor, fx, nn
from zoo import TwoLinears, tiny_gpt2, tiny_llama

import misscompile as mc
from misscompile.hosts import owner_class  # internal: which passes it runs
from misscompile.passes import runner

LOGGER = "misscompile.passes"


def scope_of() -> Any:
    """All that the runner reads of a scope."""
    return SimpleNamespace(graph=fx.symbolic_trace(TwoLinears()).graph, label="TwoLinears")


def test_the_runner_runs_all_passes_in_order_and_changes_nothing_itself() -> None:
    def first(scope: Any) -> int:
        return 1

    def second(scope: Any) -> int:
        return 2

    scope = scope_of()
    before = str(scope.graph)
    reports = runner.run_passes((first, second, first), scope)
    assert [(report.name, report.matches, report.changed) for report in reports] == [
        ("first", 1, {}),
        ("second", 2, {}),
        ("first", 1, {}),
    ]
    assert all(report.seconds >= 0 for report in reports)
    assert runner.run_passes((), scope) == []
    assert str(scope.graph) == before


def test_a_report_counts_the_operations_that_a_pass_added_and_removed() -> None:
    def square_in_place_of_tanh(scope: Any) -> int:
        node = next(node for node in scope.graph.nodes if node.target is torch.tanh)
        with scope.graph.inserting_after(node):
            square = scope.graph.call_function(torch.square, node.args)
        node.replace_all_uses_with(square)
        scope.graph.erase_node(node)
        return 1

    (report,) = runner.run_passes((square_in_place_of_tanh,), scope_of())
    assert report.changed == {"square": 1, "tanh": -1}


def test_the_pipelines() -> None:
    """Every change of a graph runs one of these."""
    pipelines = {
        "CAPTURE": ["inline_regions", "name_reads"],
        "BOTH_MODES": ["follow_mode"],
        "ADAPT": ["insert_updates"],
        "RECOVER": ["restore_weights", "find_sites", "strip_updates", "find_sites"],
        "UNSHARE": ["unshare_weights", "drop_unread"],
    }
    for name, passes in pipelines.items():
        assert [scope_pass.__name__ for scope_pass in getattr(runner, name)] == passes


def _reads_before_it_is_there(scope: Any) -> int:
    placeholder = next(iter(scope.graph.nodes))
    with scope.graph.inserting_before(placeholder):
        scope.graph.call_function(torch.neg, (placeholder,))
    return 1


def _reads_from_another_graph(scope: Any) -> int:
    placeholder = next(iter(scope_of().graph.nodes))
    next(node for node in scope.graph.nodes if node.op == "call_module").args = (placeholder,)
    return 1


@pytest.mark.parametrize("broken", [_reads_before_it_is_there, _reads_from_another_graph])
def test_a_broken_pass_is_caught_right_behind_it(broken: Any) -> None:
    def never(scope: Any) -> int:
        raise AssertionError("the next pass ran on a broken graph")

    with pytest.raises(RuntimeError, match=r"Argument|before"):
        runner.run_passes((lambda scope: 0, broken, never), scope_of())


def test_a_broken_pass_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = TwoLinears(), torch.randn(3, 12)
    y, before = model(x), snapshot(model, x)
    config = mc.MissConfig(r=3, miss_dropout=0.123, target_modules="all-linear")
    monkeypatch.setattr(owner_class, "ADAPT", (_reads_before_it_is_there, *runner.ADAPT))
    with pytest.raises(RuntimeError):
        mc.adapt(model, config)
    assert snapshot(model, x) == before
    monkeypatch.undo()  # nothing broken was kept in a cache either
    mc.adapt(model, config)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(("level", "size"), [(logging.DEBUG, 7), (logging.INFO, 11)])  # sizes that no other test has cached
def test_the_log_shows_the_graph_before_and_after_at_debug_alone(
    caplog: pytest.LogCaptureFixture, level: int, size: int
) -> None:
    with caplog.at_level(level, logger=LOGGER):
        adapted(nn.Sequential(nn.Linear(13, size)), mini_r=1)
    told = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    if level > logging.DEBUG:
        assert told == []
        return
    (text,) = told
    head, _, graph = text.partition("\n")
    assert re.fullmatch(
        r"Linear after insert_updates: 1 matches, [\d.]+ ms, \+1 add_update, \+1 get_attr, \+1 sum_shards", head
    )
    assert "miss_block_default" in graph


def test_a_whole_graph_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)))
    with caplog.at_level(logging.DEBUG, LOGGER):
        adapted(graph)
    told = [record.getMessage().split(",")[0] for record in caplog.records]
    passes = {"inline_regions": 0, "name_reads": 0, "insert_updates": 2}
    assert told == [f"whole graph after {name}: {matches} matches" for name, matches in passes.items()]


def kind_of(owner: nn.Module, **changes: Any) -> type:
    """The class of an owner that is adapted for it."""
    return type(adapted(nn.Sequential(owner), target_modules=["0"], **changes)[0])


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ({"head_dim": 10}, {"32→40": 30, "32→20": 60, "40→32": 30, "32→48": 60, "48→32": 30}),
        ({}, {"32→32": 60, "32→16": 60, "32→48": 60, "48→32": 30}),  # q and o are square here, and one structure
    ],
)
def test_210_sites_of_30_layers_need_about_five_classes(overrides: dict[str, int], sizes: dict[str, int]) -> None:
    model = adapted(tiny_llama(num_hidden_layers=30, vocab_size=8, **overrides))
    found = [module for module in model.modules() if hasattr(module, "miss_block_default")]
    assert len(found) == 210
    assert Counter(f"{owner.in_features}→{owner.out_features}" for owner in found) == sizes
    assert len({type(owner) for owner in found}) == len(sizes)
    assert mc.dump(model, "code").count("# after") == len(sizes)


def test_gpt2_needs_four() -> None:
    found = [module for module in adapted(tiny_gpt2()).modules() if hasattr(module, "miss_block_default")]
    assert len(found) == 8
    assert len({type(owner) for owner in found}) == 4


class _Sub(nn.Linear):
    pass


def _with(name: str, value: Any) -> nn.Module:
    owner = nn.Linear(12, 8)
    if isinstance(value, Tensor):
        owner.register_buffer(name, value)
    else:
        setattr(owner, name, value)
    return owner


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(12, 8, bias=False),
        nn.Linear(8, 12),
        _Sub(12, 8),
        _with("extra", torch.ones(3)),
        _with("child", nn.Identity()),
    ],
    ids=["bias", "shape", "class", "buffer", "child"],
)
def test_another_structure_is_another_class(other: nn.Linear) -> None:
    kind = kind_of(nn.Linear(12, 8))
    assert kind_of(nn.Linear(12, 8)) is kind
    assert kind_of(other) is not kind


def test_values_dtypes_modes_and_gradient_flags_are_no_structure() -> None:
    assert kind_of(_with("note", "mine").eval().requires_grad_(False)) is kind_of(nn.Linear(12, 8))
    assert kind_of(nn.Linear(12, 8).double()) is kind_of(nn.Linear(12, 8))


def test_a_class_is_built_once_for_each_set_of_blocks_and_order() -> None:
    """Each is derived from the base's own trace: of the blocks that were there before, none is in its code."""
    sets = [["a"], ["b"], ["a", "b"], ["b", "a"]]

    def kinds() -> list[type]:
        model = nn.Sequential(nn.Linear(12, 8))
        for name, init_weights in (("a", True), ("b", "mini")):
            mc.adapt(model, mc.MissConfig(r=4, mini_r=2, init_weights=init_weights, target_modules=["0"]), name)
        found = []
        for names in sets:
            mc.set_adapter(model, names)
            found.append(type(model[0]))
            with mc.disable_adapter(model):
                disabled = type(model[0])
            assert type(model[0]) is found[-1]
        return [*found, disabled]

    first = kinds()
    assert len(set(first)) == len(sets) + 1
    assert kinds() == first
    codes = [inspect.getsource(kind.forward) for kind in first[:-1]]
    assert [[name for name in "ab" if f"miss_block_{name}" in code] for code in codes] == [sorted(names) for names in sets]


def test_a_second_adapter_finds_the_class_that_it_would_have_alone() -> None:
    model = adapted(nn.Sequential(nn.Linear(12, 8)))
    mc.adapt(model, mc.MissConfig(r=2, target_modules=["0"]), "b")
    mc.set_adapter(model, "b")
    alone = mc.adapt(nn.Sequential(nn.Linear(12, 8)), mc.MissConfig(r=2, target_modules=["0"]), "b")
    assert type(model[0]) is type(alone[0])


class _NotItsWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.abs().T


def test_opaque_owners_of_one_class_share_too() -> None:
    assert kind_of(_NotItsWeight(12, 8)) is kind_of(_NotItsWeight(12, 8))


def test_owners_with_a_forward_of_their_own_share_nothing() -> None:
    def build(factor: float) -> nn.Linear:
        owner = nn.Linear(12, 8)
        owner.forward = lambda x: F.linear(x, owner.weight) * factor  # type: ignore[method-assign]
        return owner

    first, second = build(1.0), build(2.0)
    model = adapted(nn.Sequential(first, nn.Tanh(), nn.Linear(8, 12), second, nn.Linear(8, 12)))
    assert type(first) is not type(second)
    assert type(model[2]) is type(model[4])


def test_deleting_the_last_adapter_restores_the_owner() -> None:
    model = adapted(TwoLinears())
    mc.adapt(model, mc.MissConfig(r=2, target_modules=["up"]), "b")
    mc.delete_adapter(model, "default")
    assert [name for name, _ in model.up.named_parameters()] == ["weight", "miss_block_b"]
    mc.delete_adapter(model, "b")
    assert type(model.up) is nn.Linear
    assert set(vars(model.up)) == set(vars(nn.Linear(12, 8)))

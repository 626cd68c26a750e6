"""The order of the passes, the runner, and which owners share a trace and a class."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from misscompile.passes import find, insert, install, trace
from support import adapted
from torch import Tensor, fx, nn
from zoo import TwoLinears, tiny_gpt2, tiny_llama

import misscompile as mc
from misscompile import pipeline
from misscompile.graphs import ADAPT_GRAPH
from misscompile.pipeline import ADAPT, run_passes, specialize, trace_scope
from misscompile.plan import Block, Scope
from misscompile.state import STATE, owners

BLOCK = Block("a", "balance", 4, 1, 0.0)


def scope_of(owner: nn.Module, *blocks: Block) -> Scope:
    """A scope of its own: what `trace_scope` returns is shared."""
    scope = Scope(type(owner), 12, 8, torch.float32, blocks=blocks)
    trace.trace_forward(scope, owner, None)
    return scope


# --- order and runner --------------------------------------------------------------------------------------------------


def test_the_order_of_the_passes() -> None:
    assert isinstance(ADAPT, tuple)
    assert [scope_pass.__name__ for scope_pass in ADAPT] == ["find_sites", "insert_updates", "generate_forward"]
    assert list(ADAPT) == [find.find_sites, insert.insert_updates, install.generate_forward]


def test_the_runner_runs_all_passes_in_order_and_returns_nothing() -> None:
    ran: list[str] = []

    def first(scope: Scope) -> None:
        ran.append("first")

    def second(scope: Scope) -> None:
        ran.append("second")

    scope = scope_of(nn.Linear(12, 8))
    before = str(scope.graph)
    assert run_passes((first, second, first), scope) is None  # type: ignore[func-returns-value]
    assert ran == ["first", "second", "first"]
    run_passes((), scope)
    assert str(scope.graph) == before


def _reads_before_it_is_there(scope: Scope) -> None:
    placeholder = next(iter(scope.graph.nodes))
    with scope.graph.inserting_before(placeholder):
        scope.graph.call_function(torch.neg, (placeholder,))


def _reads_from_another_graph(scope: Scope) -> None:
    other = scope_of(nn.Linear(12, 8)).graph
    placeholder = next(iter(other.nodes))
    next(node for node in scope.graph.nodes if node.target is F.linear).args = (placeholder,)


@pytest.mark.parametrize("broken", [_reads_before_it_is_there, _reads_from_another_graph])
def test_a_broken_pass_is_caught_right_behind_it(broken: Any) -> None:
    def never(scope: Scope) -> None:
        raise AssertionError("the next pass ran on a broken graph")

    with pytest.raises(RuntimeError, match=r"Argument|before"):
        run_passes((find.find_sites, broken, never), scope_of(nn.Linear(12, 8)))


def test_a_broken_pass_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = TwoLinears(), torch.randn(3, 12)
    y, kinds = model(x), [type(module) for module in model.modules()]
    monkeypatch.setattr(pipeline, "ADAPT", (find.find_sites, _reads_before_it_is_there, install.generate_forward))
    with pytest.raises(RuntimeError):
        mc.adapt(model, mc.MissConfig(r=3, miss_dropout=0.123, target_modules="all-linear"))
    assert [type(module) for module in model.modules()] == kinds
    assert [name for name, _ in model.named_parameters()] == ["up.weight", "down.weight", "down.bias"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(x), y)
    monkeypatch.undo()  # nothing broken was kept in a cache either
    mc.adapt(model, mc.MissConfig(r=3, miss_dropout=0.123, target_modules="all-linear"))
    assert torch.equal(model(x), y)


def test_the_log_shows_the_graph_before_and_after(caplog: pytest.LogCaptureFixture) -> None:
    scope = scope_of(nn.Linear(12, 8), BLOCK)
    before = str(scope.graph)
    with caplog.at_level(logging.DEBUG, logger="misscompile.passes"):
        run_passes(ADAPT, scope)
    assert [record.name for record in caplog.records] == ["misscompile.passes"] * 2
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"Linear after find_sites:\n{before}"
    assert second == f"Linear after insert_updates:\n{scope.graph}"
    assert "miss_block_a" in second
    assert "miss_block_a" not in first


def test_the_log_is_silent_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="misscompile.passes"):
        run_passes(ADAPT, scope_of(nn.Linear(12, 8), BLOCK))
    assert caplog.records == []


# --- sharing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ({"head_dim": 10}, {"32→40": 30, "32→20": 60, "40→32": 30, "32→48": 60, "48→32": 30}),
        ({}, {"32→32": 60, "32→16": 60, "32→48": 60, "48→32": 30}),  # q and o are square here, and one structure
    ],
)
def test_210_sites_of_30_layers_need_about_five_scopes(overrides: dict[str, int], sizes: dict[str, int]) -> None:
    model = adapted(tiny_llama(num_hidden_layers=30, vocab_size=8, **overrides))
    found = list(owners(model).values())
    assert len(found) == 210
    counts = Counter(type(owner) for owner in found)
    assert len(counts) == len(sizes)
    scopes = {kind: kind.scope for kind in counts}  # type: ignore[attr-defined]
    assert len(set(scopes.values())) == len(sizes)
    assert {f"{s.in_features}→{s.out_features}": counts[kind] for kind, s in scopes.items()} == sizes
    assert len({trace_scope(owner, (owner.in_features, owner.out_features)) for owner in found}) == len(sizes)
    assert mc.dump(model, "code").count("# after") == len(sizes)


def test_gpt2_needs_four() -> None:
    assert len({type(owner) for owner in owners(adapted(tiny_gpt2())).values()}) == 4


class _Sub(nn.Linear):
    pass


def _with_buffer() -> nn.Module:
    owner = nn.Linear(12, 8)
    owner.register_buffer("extra", torch.ones(3))
    return owner


def _with_child() -> nn.Module:
    owner = nn.Linear(12, 8)
    owner.child = nn.Identity()
    return owner


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(12, 8, bias=False),
        nn.Linear(8, 12),
        nn.Linear(12, 8).double(),
        _Sub(12, 8),
        _with_buffer(),
        _with_child(),
    ],
    ids=["bias", "shape", "dtype", "class", "buffer", "child"],
)
def test_another_structure_is_another_scope(other: nn.Linear) -> None:
    scope = trace_scope(nn.Linear(12, 8), (12, 8))
    assert trace_scope(nn.Linear(12, 8), (12, 8)) is scope
    assert trace_scope(other, (other.in_features, other.out_features)) is not scope


def test_values_modes_and_gradient_flags_are_no_structure() -> None:
    scope = trace_scope(nn.Linear(12, 8), (12, 8))
    other = nn.Linear(12, 8).eval().requires_grad_(False)
    other.note = "mine"
    assert trace_scope(other, (12, 8)) is scope
    assert specialize(other, (12, 8), (BLOCK,)) is specialize(nn.Linear(12, 8), (12, 8), (BLOCK,))


def test_an_adapted_owner_has_the_scope_of_its_base() -> None:
    scope = trace_scope(nn.Linear(12, 8), (12, 8))
    owner = adapted(nn.Sequential(nn.Linear(12, 8)))[0]
    assert trace_scope(owner, (12, 8)) is scope
    assert scope.base_class is nn.Linear
    assert (scope.blocks, scope.forward, scope.code) == ((), None, "")
    assert "miss_block" not in scope.base_code
    assert type(owner).scope is not scope
    assert type(owner).scope.base_code == scope.base_code


def test_specialising_changes_neither_the_owner_nor_the_shared_trace() -> None:
    owner = nn.Linear(12, 8)
    base = trace_scope(owner, (12, 8))
    before, members = str(base.graph), dict(vars(owner))
    kind = specialize(owner, (12, 8), (BLOCK,))
    assert str(base.graph) == before
    assert dict(vars(owner)) == members
    assert type(owner) is nn.Linear
    assert "miss_block_a" in kind.scope.code


def test_a_class_is_built_once_for_each_set_of_blocks_and_order() -> None:
    second = Block("b", "mini", 4, 2, 0.0)
    sets = [(), (BLOCK,), (second,), (BLOCK, second), (second, BLOCK)]
    kinds = [specialize(nn.Linear(12, 8), (12, 8), blocks) for blocks in sets]
    assert len(set(kinds)) == len(sets)
    assert [specialize(nn.Linear(12, 8), (12, 8), blocks) for blocks in sets] == kinds


class _NotItsWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.abs().T


def test_opaque_owners_of_one_class_share_too() -> None:
    scope = trace_scope(_NotItsWeight(12, 8), (12, 8))
    assert scope.opaque == "its forward does not call its own weight as a linear"
    assert len(scope.sites) == 1
    assert trace_scope(_NotItsWeight(12, 8), (12, 8)) is scope
    assert specialize(_NotItsWeight(12, 8), (12, 8), (BLOCK,)) is specialize(_NotItsWeight(12, 8), (12, 8), (BLOCK,))


def test_owners_with_a_forward_of_their_own_share_nothing() -> None:
    def build(factor: float) -> nn.Linear:
        owner = nn.Linear(12, 8)
        owner.forward = lambda x: F.linear(x, owner.weight) * factor  # type: ignore[method-assign]
        return owner

    first, second = build(1.0), build(2.0)
    assert trace_scope(first, (12, 8)) is not trace_scope(second, (12, 8))
    model = adapted(nn.Sequential(first, nn.Tanh(), nn.Linear(8, 12), second, nn.Linear(8, 12)))
    assert type(first) is not type(second)
    assert type(model[2]) is type(model[4])


def test_refresh_derives_the_class_from_the_record_alone() -> None:
    owner = adapted(nn.Sequential(nn.Linear(12, 8)))[0]
    kind, state = type(owner), vars(owner)[STATE]
    state.disabled = 1
    pipeline.refresh_owner(owner)
    assert type(owner) is not kind
    state.disabled = 0
    pipeline.refresh_owner(owner)
    assert type(owner) is kind


def test_removing_the_last_block_restores_the_owner() -> None:
    model = adapted(TwoLinears())
    mc.adapt(model, mc.MissConfig(r=2, target_modules=["up"]), "b")
    pipeline.remove_from_owner(model.up, ["default"])
    assert [name for name, _ in model.up.named_parameters()] == ["weight", "miss_block_b"]
    pipeline.remove_from_owner(model.up, ["b", "unknown"])
    assert type(model.up) is nn.Linear
    assert set(vars(model.up)) == set(vars(nn.Linear(12, 8)))


def test_a_whole_graph_is_rewritten_in_this_order_and_each_change_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert [model_pass.__name__ for model_pass in ADAPT_GRAPH] == ["insert_updates", "share_sums"]
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)))
    with caplog.at_level(logging.DEBUG, "misscompile.passes"):
        mc.adapt(graph, mc.MissConfig(r=4, target_modules="all-linear"))
    told = [record.getMessage().splitlines()[0] for record in caplog.records]
    assert told == ["whole graph after insert_updates:"]  # no two sites share an input: nothing to share

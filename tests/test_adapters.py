"""Several adapters on one model: which act, which train, what compiling again costs, and taking them away."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import max_error, reference_delta
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from zoo import TwoLinears, tiny_llama, token_batch

import misscompile as mc

KINDS: dict[str, Any] = {"a": True, "b": "mini", "c": "bat"}


def _three_adapters() -> nn.Module:
    model = TwoLinears()
    for seed, (name, kind) in enumerate(KINDS.items()):
        mc.adapt(model, mc.MissConfig(r=4, mini_r=2, init_weights=kind, target_modules=["up", "down"]), name)
        for owner in (model.up, model.down):
            block = getattr(owner, f"miss_block_{name}")
            block.data.copy_(torch.randn(block.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return model


def _expected(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> Tensor:
    def linear(owner: nn.Linear, value: Tensor) -> Tensor:
        weight = owner.weight.detach().double()
        total = sum((reference_delta(KINDS[n], getattr(owner, f"miss_block_{n}"), weight) for n in names), weight)
        return F.linear(value, total, None if owner.bias is None else owner.bias.double())

    return linear(model.down, torch.tanh(linear(model.up, x.double())))


def test_any_set_in_any_order_is_the_sum_of_the_updates() -> None:
    model, x = _three_adapters(), torch.randn(5, 12)
    assert mc.active_adapters(model) == ("c",)
    assert list(mc.adapters(model)) == ["a", "b", "c"]
    assert mc.adapters(model)["b"].init_weights == "mini"
    for count in (1, 2, 3):
        for names in itertools.permutations(KINDS, count):
            mc.set_adapter(model, list(names))
            assert mc.active_adapters(model) == names
            assert max_error(model(x), _expected(model, x, names)) < 1e-5
            trained = {name.rsplit("_", 1)[-1] for name, _ in mc.trainable_parameters(model)}
            assert trained == set(names)
    mc.set_adapter(model, [])
    assert max_error(model(x), _expected(model, x, ())) < 1e-6
    assert mc.trainable_parameters(model) == []


def test_switching_between_seen_sets_recompiles_nothing_and_a_new_one_costs_one_graph() -> None:
    model = tiny_llama()
    for name, kind in KINDS.items():
        mc.adapt(model, mc.MissConfig(r=4, mini_r=2, init_weights=kind, target_modules=["q_proj", "down_proj"]), name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    sets = (["a"], ["b"], ["a", "c"])
    with torch.no_grad():
        for expected, names in enumerate(sets, start=1):
            mc.set_adapter(model, names)
            compiled(token_batch())
            assert counter.frame_count == expected
        for names in (*sets, *reversed(sets)):
            mc.set_adapter(model, names)
            compiled(token_batch())
    assert counter.frame_count == len(sets)


def test_a_second_adapter_on_other_modules_leaves_the_first_ones_alone() -> None:
    model, x = TwoLinears(), torch.randn(3, 12)
    mc.adapt(model, mc.MissConfig(r=4, target_modules=["up"]), "first")
    mc.adapt(model, mc.MissConfig(r=4, target_modules=["down"]), "second")
    assert type(model.up).scope.blocks == ()
    mc.set_adapter(model, ["first", "second"])
    assert [name for name, _ in mc.trainable_parameters(model)] == ["up.miss_block_first", "down.miss_block_second"]
    mc.delete_adapter(model, "first")
    assert type(model.up) is nn.Linear
    assert mc.active_adapters(model) == ("second",)
    model(x).sum().backward()
    assert model.down.miss_block_second.grad is not None


def test_deleting_the_only_active_adapter_is_told() -> None:
    model, x = _three_adapters(), torch.randn(3, 12)
    with pytest.warns(mc.MissWarning, match=r"no adapter is active now; set_adapter can activate \['a', 'b'\]"):
        mc.delete_adapter(model, "c")
    assert max_error(model(x), _expected(model, x, ())) < 1e-6
    assert "miss_block_c" not in dict(model.up.named_parameters())
    mc.delete_adapter(model, "a")
    mc.delete_adapter(model, "b")
    assert type(model.up) is nn.Linear


def test_merging_some_leaves_the_others_and_unmerge_brings_back_every_bit() -> None:
    model, x = _three_adapters(), torch.randn(3, 12)
    mc.set_adapter(model, ["a", "b"])
    weight, expected = model.up.weight.detach().clone(), model(x)
    mc.merge(model, adapter_names=["b"], keep_adapters=True)
    assert not torch.equal(model.up.weight, weight)
    torch.testing.assert_close(model(x), expected)
    mc.unmerge(model)
    assert torch.equal(model.up.weight, weight)
    assert torch.equal(model(x), expected)
    mc.set_adapter(model, ["a", "c"])
    with pytest.raises(mc.MergeError, match=r"up: the 'bat' adapter 'c' that would stay active"):
        mc.merge(model, adapter_names=["a"])
    assert torch.equal(model.up.weight, weight)
    mc.set_adapter(model, "a")
    with pytest.warns(mc.MissWarning, match=r"removed the inactive adapters \['b', 'c'\] without folding them"):
        mc.merge(model)
    assert type(model.up) is nn.Linear


def test_23_hot_swapping_takes_the_values_of_a_file_and_recompiles_nothing(tmp_path: Any) -> None:
    def trained(seed: int) -> nn.Module:
        model = mc.adapt(tiny_llama(), mc.MissConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for _, parameter in mc.trainable_parameters(model):
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
        return model

    other, model, ids = trained(5), trained(6), token_batch()
    mc.save_adapter(other, tmp_path / "other")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        before = compiled(ids).logits
        mc.hotswap_adapter(model, tmp_path / "other")
        after = compiled(ids).logits
        assert max_error(after, before) > 1e-2
        torch.testing.assert_close(after, other(ids).logits)
    assert counter.frame_count == 1
    mc.save_adapter(mc.adapt(tiny_llama(), mc.MissConfig(r=8, target_modules=["q_proj", "down_proj"])), tmp_path / "wide")
    with pytest.raises(mc.CheckpointError, match=r"q_proj\.miss_block' has shape \(8, 32\), on the model it is \(4, 32\)"):
        mc.hotswap_adapter(model, tmp_path / "wide")
    with torch.no_grad():
        assert torch.equal(compiled(ids).logits, after)

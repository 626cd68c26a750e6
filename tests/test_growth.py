"""Costs that must not grow faster than the model, held by what is done and how often: no clock is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from misscompile.passes import trace
from support import VARIANTS, fill_blocks
from torch import nn
from zoo import tiny_llama, token_batch

import misscompile as mc
from misscompile import cost, pipeline, state
from misscompile.targets import exact_targets, select_names

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the model was walked and a forward was traced, from empty caches on."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str, users: tuple[Any, ...] = ()) -> None:
        function = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        for user in (owner, *users):
            monkeypatch.setattr(user, name, counting)

    from misscompile import adapting, merging, planning

    monkeypatch.setattr(pipeline, "_traced", {})
    monkeypatch.setattr(pipeline, "_classes", {})
    count(state, "named_modules", (adapting, merging, planning))
    count(trace, "trace_forward", (pipeline,))
    count(pipeline, "make_class")
    count(pipeline, "run_passes")
    return counted


def _verbs(model: nn.Module) -> Iterator[str]:
    mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    yield "adapt"
    mc.set_adapter(model, "default")
    yield "set_adapter"
    mc.merge(model)
    yield "merge"


def test_walks_traces_and_classes_do_not_grow_with_the_layers(calls: Counter[str]) -> None:
    found = []
    for layers in (1, 6):
        pipeline._traced.clear()
        pipeline._classes.clear()
        counts = {}
        for verb in _verbs(tiny_llama(num_hidden_layers=layers)):
            counts[verb] = Counter(calls)
            calls.clear()
        found.append(counts)
    assert found[0] == found[1]
    assert found[0]["adapt"]["trace_forward"] == found[0]["adapt"]["run_passes"] == 4  # shapes: q and o, k and v, up, down
    assert found[0]["adapt"]["named_modules"] == 1


class _Counted(str):
    """A name that counts how often it is compared with an entry."""

    tests = 0

    def endswith(self, *args: Any) -> bool:
        type(self).tests += 1
        return super().endswith(*args)

    def __eq__(self, other: object) -> bool:
        type(self).tests += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_a_list_that_names_every_module_is_not_tried_against_every_name() -> None:
    """`save_adapter` writes such a list for "all-linear"."""
    names = [_Counted(f"model.layers.{i}.{part}") for i in range(200) for part in LINEARS]
    _Counted.tests = 0
    config = mc.MissConfig(target_modules=[str(name) for name in names], exclude_modules=[str(names[0])])
    chosen = select_names(config, names, config.target_modules or (), ()).chosen
    assert list(chosen) == names[1:]
    assert exact_targets(names, names) == names
    assert _Counted.tests < 20 * len(names)


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_70b_llama_on_the_meta_device(init_weights: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    mc.adapt(model, mc.MissConfig(r=64, mini_r=64, init_weights=init_weights, target_modules="all-linear"))
    blocks = dict(mc.trainable_parameters(model))
    assert len(blocks) == 560
    assert all(block.is_meta for block in blocks.values())
    shapes = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]
    expression = cost.PARAMETERS["balance" if init_weights is True else init_weights]
    expected = 80 * sum(cost.evaluate(expression, 1, *shape, 64, 64) for shape in shapes)
    assert sum(block.numel() for block in blocks.values()) == expected
    text = mc.dump(model)
    assert f"560 sites, {expected:,} parameters, 0 refused" in text
    assert text.count("_proj") == 560


def _compile(model: nn.Module) -> tuple[Callable[..., Any], list[int]]:
    """`model` compiled in one graph, and the number of guards of each compilation so far."""
    guards: list[int] = []

    def keep_all(entries: Any) -> list[bool]:
        guards.append(len(entries))
        return [True] * len(entries)

    return torch.compile(model, backend="eager", fullgraph=True, options={"guard_filter_fn": keep_all}), guards


def _step(model: Callable[..., Any], length: int = 7) -> None:
    tokens = token_batch(length=length)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_guards_of_a_compiled_model_over_its_base(init_weights: Any) -> None:
    """Each parameter has guards of its own, and so has whatever else a generated forward reads."""
    base = tiny_llama(num_hidden_layers=4).train()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    base.get_input_embeddings().weight.requires_grad_(True)
    compiled, base_guards = _compile(base)
    _step(compiled)
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=4).train()
    mc.adapt(model, mc.MissConfig(r=4, mini_r=2, init_weights=init_weights, target_modules="all-linear"))
    compiled, guards = _compile(fill_blocks(model))
    _step(compiled)
    assert len(base_guards) == len(guards) == 1
    assert base_guards[0] > 100
    assert guards[0] <= 1.15 * base_guards[0]
    _step(compiled)
    assert len(guards) == 1  # a second step
    with mc.disable_adapter(model), torch.no_grad():
        compiled(input_ids=token_batch())
    graphs = len(guards)
    _step(compiled)
    with mc.disable_adapter(model), torch.no_grad():
        compiled(input_ids=token_batch())
    assert len(guards) == graphs  # both forms are kept
    _step(compiled, 9)
    dynamic = len(guards)
    assert dynamic == graphs + 1
    _step(compiled, 11)
    _step(compiled, 14)
    assert len(guards) == dynamic  # one graph for every length

"""Costs that must not grow faster than the model, held by what is done and how often: no clock is read."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import VARIANTS, adapted, fields
from torch import fx, nn
from zoo import tiny_llama, token_batch

import misscompile as mc
from misscompile.rules.names import exact_targets, select_names

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
variants = pytest.mark.parametrize("init_weights", VARIANTS)


def calls_of_verbs(layers: int) -> dict[str, int]:
    """How many functions of Python each verb calls on a model of so many layers."""
    model, counted = tiny_llama(num_hidden_layers=layers), {}
    verbs: dict[str, Callable[[], Any]] = {
        "adapt": lambda: mc.adapt(model, mc.MissConfig(**fields())),
        "set_adapter": lambda: mc.set_adapter(model, "default"),
        "merge": lambda: mc.merge(model),
    }
    for name, verb in verbs.items():
        events: list[str] = []
        gc.disable()  # a collection would call the finalizers of whatever other tests left
        sys.setprofile(lambda frame, event, _, events=events: events.append(event))
        try:
            verb()
        finally:
            sys.setprofile(None)
            gc.enable()
        counted[name] = events.count("call")
    return counted


def test_verbs_do_as_much_for_every_layer_and_trace_equal_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls_of_verbs(1)
    traced: list[str] = []

    def count(owner: type, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: traced.append(name) or function(*args, **kwargs))

    for owner, name in ((fx.Tracer, "trace"), (fx.Graph, "lint"), (fx.Graph, "python_code")):
        count(owner, name)
    one, three, five = (calls_of_verbs(layers) for layers in (1, 3, 5))
    assert traced == []
    assert min(one.values()) > 100
    for verb in one:
        assert five[verb] - three[verb] == pytest.approx(three[verb] - one[verb], rel=0.02), verb
    adapted(tiny_llama(num_hidden_layers=5), r=7)
    assert traced.count("python_code") == 4  # shapes: q and o, k and v, gate and up, down


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


@variants
def test_a_70b_llama_on_the_meta_device(init_weights: Any) -> None:
    r = m = 64
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    with torch.device("meta"):
        model = tiny_llama(**sizes, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=2048)
    mc.adapt(model, mc.MissConfig(**fields(init_weights, r=r, mini_r=m)))
    blocks = dict(mc.trainable_parameters(model))
    assert len(blocks) == 560
    assert all(block.is_meta for block in blocks.values())
    expected = 80 * r * (7 * m if init_weights == "mini" else 3 * 8192 + 2 * 1024 + 2 * 28672)
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


@variants
def test_guards_of_a_compiled_model_over_its_base(init_weights: Any) -> None:
    """Each parameter has guards of its own, and so has whatever else a generated forward reads."""
    base = tiny_llama(num_hidden_layers=4).train().requires_grad_(False)
    base.get_input_embeddings().weight.requires_grad_(True)
    compiled, base_guards = _compile(base)
    _step(compiled)
    torch._dynamo.reset()
    model = adapted(tiny_llama(num_hidden_layers=4), init_weights).train()
    compiled, guards = _compile(model)

    def step_disabled() -> None:
        with mc.disable_adapter(model), torch.no_grad():
            compiled(input_ids=token_batch())

    _step(compiled)
    assert len(base_guards) == len(guards) == 1
    assert base_guards[0] > 100
    assert guards[0] <= 1.15 * base_guards[0]
    _step(compiled)
    assert len(guards) == 1  # a second step
    step_disabled()
    graphs = len(guards)
    _step(compiled)
    step_disabled()
    assert len(guards) == graphs  # both forms are kept
    _step(compiled, 9)
    assert len(guards) == graphs + 1
    _step(compiled, 11)
    _step(compiled, 14)
    assert len(guards) == graphs + 1  # one graph for every length

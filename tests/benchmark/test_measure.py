"""How things are measured: turns, spreads, bytes, FLOPs and guards, each against a number worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from misscompile.benchmark.compilation import SAME_PARTITION, CompiledForward, counted_graphs
from misscompile.benchmark.contestants import (
    BASE,
    Contestant,
    enter,
    entries,
    fill_blocks,
    line_up,
    lora_rank,
    share_weights,
)
from misscompile.benchmark.floor import count_step
from misscompile.benchmark.measure import TrainingStep, Trial, over, ratios, spread, take_turns
from misscompile.benchmark.memory import peak_bytes, saved_bytes
from misscompile.benchmark.models import PRESETS, build_model
from misscompile.benchmark.sections.steps import step_floors
from misscompile.benchmark.settings import Settings

SETTINGS = Settings(model="tiny", tokens=16, r=4, mini_r=8, rounds=2, threads=1)
N = 1 << 16
BYTES = 4 * N


class Shifted(nn.Module):
    """`f(x + shift)`, `shift` being trainable and as large as `x`; `scale` is another parameter that `f` may use."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.shift, self.scale = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.ones(N), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x + self.shift, self.scale)


def step_of(f: Callable[[Tensor, Tensor], Tensor], backend: str | None = None) -> TrainingStep:
    model = Shifted(f)
    compute = model if backend is None else torch.compile(model, backend=backend, dynamic=False)
    return TrainingStep(model, compute, torch.randn(N))


def test_trials_take_turns_and_neither_warm_up_nor_preparation_count() -> None:
    calls: list[str] = []
    trials = {
        name: Trial(lambda name=name: calls.append(name), lambda name=name: calls.append(f"prepare {name}"))  # type: ignore[misc]
        for name in "AB"
    }
    seconds = take_turns(trials, rounds=3, device="cpu", warmup=2)
    assert calls == ["prepare A", "A", "prepare B", "B"] * 5
    assert {name: len(own) for name, own in seconds.items()} == {"A": 3, "B": 3}


def test_a_ratio_is_the_spread_of_the_quotients_of_each_round() -> None:
    found = ratios([2.0, 9.0, 8.0, 4.0, 10.0], [1.0, 3.0, 2.0, 4.0, 2.0])
    assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0, "values": [2.0, 3.0, 4.0, 1.0, 5.0]}
    assert spread([1.0, 3.0])["median"] == 2.0
    assert over(3.0, 2.0) == 0.5
    assert over(None, 2.0) is None


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x, scale: x.sin(), BYTES),  # its input
        (lambda x, scale: x.sin().exp(), 2 * BYTES),  # its input, and the result of exp
        (lambda x, scale: x * scale, 0),  # the other factor, which is a parameter
        (lambda x, scale: x[: N // 2].sin() + x[N // 2 :].cos(), BYTES),  # two views of one storage
    ],
)
def test_saved_bytes_of_an_eager_forward(f: Callable[[Tensor, Tensor], Tensor], expected: int) -> None:
    assert saved_bytes(step_of(f)) == expected


@pytest.mark.parametrize("backend", [SAME_PARTITION, "inductor"])
def test_saved_bytes_of_a_compiled_forward(backend: str) -> None:
    # exp is recomputed from sin's result or sin's input is kept: in any case the input alone is enough, and is there
    step = step_of(lambda x, scale: x.sin().exp() * scale, backend)
    step.run()
    assert saved_bytes(step) == BYTES


def test_the_peak_of_a_step_is_what_it_holds_at_a_time() -> None:
    step = step_of(lambda x, scale: x.sin())
    step.run()
    peak = peak_bytes(step, "cpu")
    assert peak is not None
    assert 4 * BYTES <= peak < 4.1 * BYTES  # x + shift, its sine, and in the backward its cosine and the gradient
    assert step.model.get_parameter("shift").grad is not None


def test_the_flops_and_the_floors_of_a_step_are_those_worked_out_by_hand() -> None:
    tokens, r, m = SETTINGS.tokens, SETTINGS.r, SETTINGS.mini_r
    shape = PRESETS["tiny"]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    sites = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    linears = sum(4 * tokens * i * o for i, o in sites)  # a forward and an input gradient
    attention = 3 * 2 * (2 * tokens**2 * hidden)  # scores and values; two products in the backward for each
    base = layers * (linears + attention) + 4 * tokens * hidden * shape["vocab_size"]

    field = line_up(entries(SETTINGS), SETTINGS, "tiny", "float32", tokens)
    assert count_step(field.probes[BASE], field.embedded) == base
    floors = step_floors(field, SETTINGS)
    added = {
        Contestant("misscompile", "balance"): sum(6 * tokens * r * o for _, o in sites),
        Contestant("misscompile", "mini"): sum(6 * tokens * r * m for _ in sites),
        Contestant("peft", "lora"): sum(6 * tokens * lora_rank(r) * (i + o) for i, o in sites),
    }
    assert floors[BASE] == 1.0
    for contestant, flops in added.items():
        assert floors[contestant] == pytest.approx((base + layers * flops) / base, rel=1e-12), contestant
    assert floors[Contestant("peft", "balance")] == floors[Contestant("misscompile", "balance")]
    weight_gradients = layers * sum(2 * tokens * i * o for i, o in sites)
    assert floors[Contestant("misscompile", "bat")] >= (base + weight_gradients) / base


def test_every_contestant_starts_from_the_same_weights_and_has_what_it_is_called_after() -> None:
    field = line_up(entries(SETTINGS), SETTINGS, "tiny", "bfloat16", SETTINGS.tokens)
    weight = field.base.get_parameter("model.layers.1.mlp.up_proj.weight")
    for contestant, probe in field.probes.items():
        parameters = dict(probe.named_parameters())
        (found,) = [p for name, p in parameters.items() if re_base(name) == "model.layers.1.mlp.up_proj.weight"]
        torch.testing.assert_close(found, weight, rtol=0, atol=0)
        trained = {name for name, p in parameters.items() if p.requires_grad} - {"shift"}
        word = {"base": None, "misscompile": "miss_block", "peft": "miss_block"}[contestant.provider]
        word = "lora_" if contestant.method == "lora" else word
        assert bool(trained) == (word is not None)
        assert all(word is not None and word in name and bool(parameters[name].any()) for name in trained)


def test_models_that_share_their_weights_have_modules_of_their_own_and_leave_the_base_as_it_was() -> None:
    base = build_model("tiny", torch.float32)
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.arange(8).view(1, 8)
    expected = base(ids).logits
    for contestant in entries(SETTINGS):
        model = enter(share_weights(base), contestant, SETTINGS)
        fill_blocks(model)
        assert model is not base
        shared = {id(parameter) for parameter in base.parameters()}
        assert shared <= {id(parameter) for parameter in model.parameters()}
        changed = contestant != BASE
        assert torch.equal(model.eval()(ids).logits, expected) != changed
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())
    assert base.training
    assert torch.equal(base(ids).logits, expected)


def test_rounded_bat_is_one_product_of_16_bit_weights() -> None:
    exact = Contestant("misscompile", "bat")
    rounded = dataclasses.replace(exact, form="rounded")
    field = line_up([BASE, exact, rounded], SETTINGS, "tiny", "bfloat16", SETTINGS.tokens)
    base, two, one = (count_step(field.probes[c], field.embedded) for c in (BASE, exact, rounded))
    shape = PRESETS["tiny"]
    linears = 4 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"]
    assert two - one == shape["num_hidden_layers"] * 2 * SETTINGS.tokens * linears  # the second product of the forward
    assert base < one
    floors = step_floors(field, SETTINGS)
    assert floors[rounded] == floors[exact] > 1


def re_base(name: str) -> str:
    """A parameter's name on the base, without the wrappers of the probe and of PEFT."""
    return name.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer.", ".")


def test_probes_do_not_share_what_dynamo_compiled_for_them() -> None:
    field = line_up([BASE, Contestant("misscompile", "balance")], SETTINGS, "tiny", "float32", SETTINGS.tokens)
    forwards = {contestant: CompiledForward(probe, backend="eager") for contestant, probe in field.probes.items()}
    for contestant, forward in forwards.items():
        assert forward.guards() == 0
        with counted_graphs() as found:
            torch.testing.assert_close(forward(field.embedded), field.probes[contestant](field.embedded))
        assert found == {"graphs": 1, "breaks": 0}
        before = forward.guards()
        with counted_graphs() as found:
            forward(field.embedded)
        assert found == {"graphs": 0, "breaks": 0}
        assert forward.guards() == before > 0
    assert forwards[Contestant("misscompile", "balance")].guards() > forwards[BASE].guards()

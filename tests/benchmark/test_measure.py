"""How things are measured: turns, spreads, bytes, FLOPs and guards, each against a number worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from misscompile.benchmark.contestants import BASE, Contestant, build_model, contestants, enter_filled
from misscompile.benchmark.sections.compiler import count_graphs
from misscompile.benchmark.sections.running import SAME_PARTITION, share_weights, step_floors
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.timing import Trial, over, ratios, spread, take_turns
from misscompile.benchmark.training import Steps, TrainingStep, line_up

SETTINGS = Settings(model="tiny", tokens=16, r=4, mini_r=8, rounds=2, threads=1)
BALANCE, BAT = Contestant("misscompile", "balance"), Contestant("misscompile", "bat")
TOKENS, R, M, HIDDEN, INNER, LAYERS, VOCABULARY = 16, 4, 8, 32, 64, 2, 64
SITES = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]  # (in, out) of a layer's linears
N = 1 << 16
BYTES = 4 * N


class Shifted(nn.Module):
    """`f(x + shift)`, `shift` being trainable and as large as `x`; `scale` is another parameter that `f` may use."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f
        self.shift, self.scale = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.ones(N), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x + self.shift, self.scale)
        return y


def line_up_tiny(entries: list[Contestant], dtype: str) -> Steps:
    return line_up(build_model("tiny", dtype), entries, SETTINGS, TOKENS)


def test_trials_take_turns_and_neither_warm_up_nor_preparation_count() -> None:
    calls: list[str] = []

    def prepare(name: str) -> str:
        calls.append(f"prepare {name}")
        return name

    trials = {name: Trial(lambda name=name: prepare(name), calls.append) for name in "AB"}  # type: ignore[misc]
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
    ("f", "backend", "expected"),
    [
        (lambda x, scale: x.sin(), None, BYTES),  # its input
        (lambda x, scale: x.sin().exp(), None, 2 * BYTES),  # its input, and the result of exp
        (lambda x, scale: x * scale, None, 0),  # the other factor, which is a parameter
        (lambda x, scale: x[: N // 2].sin() + x[N // 2 :].cos(), None, BYTES),  # two views of one storage
        # exp is recomputed from sin's result or sin's input is kept: the input alone is enough, and is there
        (lambda x, scale: x.sin().exp() * scale, SAME_PARTITION, BYTES),
        (lambda x, scale: x.sin().exp() * scale, "inductor", BYTES),
    ],
)
def test_saved_bytes(f: Any, backend: str | None, expected: int) -> None:
    step = TrainingStep(Shifted(f), torch.randn(N), backend)
    step.run()
    assert step.saved_bytes() == expected


def test_the_peak_of_a_step_is_what_it_holds_at_a_time(capfd: pytest.CaptureFixture[str]) -> None:
    step = TrainingStep(Shifted(lambda x, scale: x.sin()), torch.randn(N))
    step.run()
    peak = step.peak_bytes()
    assert peak is not None
    assert 4 * BYTES <= peak < 4.1 * BYTES  # x + shift, its sine, and in the backward its cosine and the gradient
    assert step.model.get_parameter("shift").grad is not None
    assert capfd.readouterr().err == ""


def test_the_flops_and_the_floors_of_a_step_are_those_worked_out_by_hand() -> None:
    linears = sum(4 * TOKENS * i * o for i, o in SITES)  # a forward and an input gradient
    attention = 3 * 2 * (2 * TOKENS**2 * HIDDEN)  # scores and values; two products in the backward for each
    base = LAYERS * (linears + attention) + 4 * TOKENS * HIDDEN * VOCABULARY
    steps = line_up_tiny(contestants(SETTINGS), "float32")
    assert steps[BASE].flops() == base
    floors = step_floors(steps, SETTINGS)
    added = {
        BASE: 0,
        BALANCE: sum(6 * TOKENS * R * o for _, o in SITES),
        Contestant("misscompile", "mini"): sum(6 * TOKENS * R * M for _ in SITES),
        Contestant("peft", "lora"): sum(6 * TOKENS * (R // 2) * (i + o) for i, o in SITES),
    }
    for contestant, flops in added.items():
        assert floors[contestant] == pytest.approx((base + LAYERS * flops) / base, rel=1e-12), contestant
    assert floors[Contestant("peft", "balance")] == floors[BALANCE]
    weight_gradients = LAYERS * sum(2 * TOKENS * i * o for i, o in SITES)
    assert floors[BAT] >= (base + weight_gradients) / base


def test_rounded_bat_is_one_product_of_16_bit_weights() -> None:
    rounded = dataclasses.replace(BAT, round_bat_weight=True)
    steps = line_up_tiny([BASE, BAT, rounded], "bfloat16")
    base, two, one = (step.flops() for step in steps.values())
    assert two - one == LAYERS * sum(2 * TOKENS * i * o for i, o in SITES)  # the second product of the forward
    assert base < one
    floors = step_floors(steps, SETTINGS)
    assert floors[rounded] == floors[BAT] > 1


def test_every_contestant_starts_from_the_same_weights_and_has_what_it_is_called_after() -> None:
    base = build_model("tiny", "bfloat16")
    probed = "layers.1.mlp.up_proj."
    for contestant, step in line_up(base, contestants(SETTINGS), SETTINGS, TOKENS).items():
        parameters = dict(step.model.named_parameters())
        (found,) = [p for name, p in parameters.items() if probed in name and name.endswith("weight") and "lora" not in name]
        torch.testing.assert_close(found, base.get_parameter(f"model.{probed}weight"), rtol=0, atol=0)
        trained = {name for name, p in parameters.items() if p.requires_grad} - {"shift"}
        word = "lora_" if contestant.method == "lora" else "miss_block"
        assert bool(trained) == (contestant != BASE)
        assert all(word in name and bool(parameters[name].any()) for name in trained)


def test_models_that_share_their_weights_have_modules_of_their_own_and_leave_the_base_as_it_was() -> None:
    base = build_model("tiny", "float32")
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.arange(8).view(1, 8)
    expected = base(ids).logits
    for contestant in contestants(SETTINGS):
        model = enter_filled(share_weights(base), contestant, SETTINGS)
        assert model is not base
        assert {id(parameter) for parameter in base.parameters()} <= {id(parameter) for parameter in model.parameters()}
        assert torch.equal(model.eval()(ids).logits, expected) == (contestant == BASE)
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())
    assert base.training
    assert torch.equal(base(ids).logits, expected)


def test_steps_do_not_share_what_dynamo_compiled_for_them() -> None:
    eager = line_up_tiny([BASE, BALANCE], "float32")
    compiled = {contestant: step.compiled("eager") for contestant, step in eager.items()}
    for contestant, step in compiled.items():
        assert step.guards() == 0
        assert count_graphs(step) == (1, 0)
        before = step.guards()
        assert count_graphs(step) == (0, 0)
        assert step.guards() == before > 0
        eager[contestant].clear().run()
        gradients = [parameter.grad for parameter in step.model.parameters()]
        step.clear().run()
        torch.testing.assert_close([parameter.grad for parameter in step.model.parameters()], gradients)
    assert compiled[BALANCE].guards() > compiled[BASE].guards()

"""Tiny models × variants × options, beside PEFT: modules, parameters, outputs, gradients, merges, files, training."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import max_error, reference_delta
from torch import Tensor, nn
from zoo import ZOO, Case

import misscompile as mc

CASES = {name: case for name, case in ZOO.items() if case.excluded}
VARIANTS: tuple[Any, ...] = (True, False, "mini", "bat")
COMPARED = [name for name, case in CASES.items() if case.peft_refuses is None]
REFUSED = [name for name, case in CASES.items() if case.peft_refuses is not None]
OPTIONS = ("dropout", "modules_to_save", "bias", "exclude_modules", "layers_to_transform")
OPTION_MODELS = ("mlp", "llama", "bert", "vit")
CURVE_MODELS = ("mlp", "llama", "bert")

pytestmark = [pytest.mark.filterwarnings("error::misscompile.MissWarning")]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _fields(case: Case, init_weights: Any, option: str = "plain") -> dict[str, Any]:
    r = 8 if init_weights == "bat" else 5  # 5 divides none of the widths: the last shard is short
    fields = {"r": r, "mini_r": 4, "init_weights": init_weights, "target_modules": case.targets}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "dropout": {"miss_dropout": 0.5},
        "modules_to_save": {"modules_to_save": [case.head]},
        "bias": {"bias": "MiSS_only"},
        "exclude_modules": {"exclude_modules": [case.excluded]},
        "layers_to_transform": {"layers_to_transform": [1], "target_modules": list(case.queries)},
    }
    return fields | options[option]


def trained_by_us(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The trainable parameters by the keys of PEFT's files, without their prefix."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in mc.trainable_parameters(model):
        path, _, own = name.rpartition(".")
        copied = own.removeprefix(f"miss_copy_{adapter}_")
        if own == f"miss_block_{adapter}":
            key = f"{path}.miss_block"
        else:
            assert copied != own, name
            inner = ".base_layer" if hasattr(model.get_submodule(path), f"miss_block_{adapter}") else ""
            key = f"{path}{inner}.{copied}"
        found[key] = parameter
    return found


def trained_by_peft(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    return {
        re.sub(rf"\.modules_to_save\.{adapter}|(?<=miss_block)\.{adapter}$", "", name.removeprefix("base_model.model.")): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _pair(case: Case, fields: dict[str, Any]) -> tuple[nn.Module, peft.PeftModel]:
    """The model adapted by us and by PEFT, with the same random values of all that trains."""
    ours = mc.adapt(case.make(), mc.MissConfig(**fields))
    theirs = peft.get_peft_model(case.make(), peft.MissConfig(**fields)).eval()
    mine, reference = trained_by_us(ours), trained_by_peft(theirs)
    assert {key: tuple(p.shape) for key, p in mine.items()} == {key: tuple(p.shape) for key, p in reference.items()}
    assert any(key.endswith("miss_block") for key in mine)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key in sorted(mine):
            values = torch.randn(mine[key].shape, generator=generator) * 0.05
            base = mine[key] if not key.endswith("miss_block") else 0.0
            mine[key].copy_(base + values)
            reference[key].copy_(mine[key])
    return ours, theirs


def _run(model: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    """The output and a scalar loss."""
    found = model(**case.batch())
    if isinstance(found, Tensor):
        return found, (found - 1.0).square().mean()
    logits = getattr(found, "logits", None)
    if logits is None:
        return found.logits_per_image, found.logits_per_image.square().mean()
    return logits, found.loss


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-5, what: str = "output") -> None:
    """Equal up to `relative` of the largest element."""
    scale = float(expected.detach().abs().max())
    assert actual.shape == expected.shape, what
    assert max_error(actual, expected) <= relative * scale + 1e-9, f"{what}: {max_error(actual, expected) / scale:.2e}"


def _compare(case: Case, fields: dict[str, Any], folder: Path) -> None:
    ours, theirs = _pair(case, fields)
    (actual, loss), (expected, reference_loss) = _run(ours, case), _run(theirs, case)
    assert max_error(expected, _run(case.make(), case)[0]) > 1e-3 * float(expected.detach().abs().max())
    assert_near(actual, expected)

    loss.backward()
    reference_loss.backward()
    reference = trained_by_peft(theirs)
    for key, parameter in trained_by_us(ours).items():
        gradient, wanted = parameter.grad, reference[key].grad
        assert (gradient is None) == (wanted is None), key
        if gradient is not None and wanted is not None:
            scale = float(wanted.abs().max())
            assert max_error(gradient, wanted) <= 1e-4 * scale + 1e-6, key

    mc.save_adapter(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    weights = "adapter_model.safetensors"
    mine, stored = load_file(folder / "ours" / weights), load_file(folder / "theirs" / weights)
    assert mine.keys() == stored.keys()
    assert all(torch.equal(mine[key], stored[key]) for key in mine)
    with torch.no_grad():
        assert_near(_run(peft.PeftModel.from_pretrained(case.make(), folder / "ours").eval(), case)[0], expected)
        assert_near(_run(mc.load_adapter(case.make(), folder / "theirs"), case)[0], expected)

    merged, wanted_state = mc.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == wanted_state.keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, wanted_state[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("name", COMPARED)
def test_every_model_as_in_peft(name: str, init_weights: Any, tmp_path: Path) -> None:
    _compare(CASES[name], _fields(CASES[name], init_weights), tmp_path)


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", OPTION_MODELS)
def test_every_option_as_in_peft(name: str, option: str, init_weights: Any, tmp_path: Path) -> None:
    case = CASES[name]
    fields = _fields(case, init_weights, option)
    if name == "mlp" and option == "layers_to_transform":
        # a bare `layers.0` root has no segment before it: PEFT finds no layer, we do
        assert list(trained_by_us(mc.adapt(case.make(), mc.MissConfig(**fields)))) == ["layers.1.miss_block"]
        return
    if name == "llama" and option == "bias":  # it has none to train
        fields["bias"] = "all"
    _compare(case, fields, tmp_path)


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_refuses_equals_the_formulas(name: str, init_weights: Any, tmp_path: Path) -> None:
    case = CASES[name]
    fields = _fields(case, init_weights)
    assert case.peft_refuses is not None
    with pytest.raises(case.peft_refuses):
        peft.get_peft_model(case.make(), peft.MissConfig(**fields))
    ours, reference = mc.adapt(case.make(), mc.MissConfig(**fields)), case.make()
    with torch.no_grad():
        for index, (key, block) in enumerate(trained_by_us(ours).items()):
            block.copy_(torch.randn(block.shape, generator=torch.Generator().manual_seed(index)) * 0.05)
            weight = reference.get_submodule(key.removesuffix(".miss_block")).weight  # (in, out)
            weight += reference_delta(init_weights, block, weight.T).T.float()
    expected = _run(reference, case)[0]
    assert_near(_run(ours, case)[0], expected)
    mc.save_adapter(ours, tmp_path)
    assert_near(_run(mc.load_adapter(case.make(), tmp_path), case)[0], expected)
    assert_near(_run(mc.merge(ours), case)[0], expected)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("name", CURVE_MODELS)
def test_twenty_steps_have_the_loss_curve_of_peft(name: str, init_weights: Any, optimizer: str) -> None:
    case = CASES[name]
    curves = []
    for model in _pair(case, _fields(case, init_weights)):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        step = (
            torch.optim.SGD(parameters, lr=1e-2) if optimizer == "SGD" else torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)
        )
        losses = []
        for _ in range(20):
            step.zero_grad()
            loss = _run(model, case)[1]
            loss.backward()
            step.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    ours, theirs = curves
    assert ours[-1] < 0.999 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)

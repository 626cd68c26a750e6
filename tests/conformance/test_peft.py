"""Tiny models × variants × options beside PEFT: modules, parameters, outputs, gradients, files, merges, training.

GPT-2, which PEFT refuses, is compared with a plain model whose weights are `W + ΔW` from the formulas. The configurations
that documentation and examples of MiSS give are compared in the same way, each on a model of the architecture it is for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import differentiable_delta, max_error, run, train_step
from torch import Tensor, nn
from zoo import ZOO, Case, tiny

import misscompile as mc

VARIANTS: tuple[Any, ...] = (True, False, "mini", "bat")
CASES = {name: case for name, case in ZOO.items() if case.excluded}
OPTIONS = ("dropout", "modules_to_save", "bias", "exclude_modules", "layers_to_transform")
OPTION_MODELS = ("mlp", "llama", "bert", "vit")
CURVE_MODELS = ("mlp", "llama", "bert")

pytestmark = [pytest.mark.filterwarnings("error::misscompile.MissWarning")]
variants = pytest.mark.parametrize("init_weights", VARIANTS)


# What trains, by the keys of PEFT's files without their prefix


def trained_by_us(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name, parameter in mc.trainable_parameters(model):
        path, _, own = name.rpartition(".")
        copied = own.removeprefix("miss_copy_default:")
        if own == "miss_block_default":
            key = f"{path}.miss_block"
        else:
            assert copied != own, name
            inner = ".base_layer" if hasattr(model.get_submodule(path), "miss_block_default") else ""
            key = f"{path}{inner}.{copied}"
        found[key] = parameter
    return found


def trained_by_peft(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        re.sub(r"\.modules_to_save\.default|(?<=miss_block)\.default$", "", name.removeprefix("base_model.model.")): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter]) -> None:
    """Random values, the same for the same keys and shapes; what is trained in full keeps its own below them."""
    generator = torch.Generator().manual_seed(1)
    for key, parameter in sorted(parameters.items()):
        values = torch.randn(parameter.shape, generator=generator) * 0.05
        parameter.copy_(values if key.endswith("miss_block") else parameter + values)


# The comparisons


def output_and_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Where the model has no loss, its first output stands for it."""
    found = model(**batch)
    if getattr(found, "loss", None) is not None:
        return found[1], found.loss
    y = found if isinstance(found, Tensor) else found[0]
    return y, (y - 1.0).square().mean()


def assert_near(
    actual: Tensor, expected: Tensor, relative: float = 1e-5, absolute: float = 1e-9, what: str = "output"
) -> None:
    """Equal up to `relative` of the largest element."""
    assert actual.shape == expected.shape, what
    assert max_error(actual, expected) <= relative * float(expected.detach().abs().max()) + absolute, what


def assert_gradients(parameters: dict[str, nn.Parameter], reference: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        gradient, wanted = parameter.grad, reference[key].grad
        assert (gradient is None) == (wanted is None), key
        if gradient is not None and wanted is not None:
            assert_near(gradient, wanted, 1e-4, 1e-6, key)


def pair(case: Case, fields: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model adapted by us and by PEFT, with the same random values of all that trains."""
    ours = mc.adapt(case.make(), mc.MissConfig(**fields))
    theirs = peft.get_peft_model(case.make(), peft.MissConfig(**copy.deepcopy(fields))).eval()  # it extends lists in place
    mine, reference = trained_by_us(ours), trained_by_peft(theirs)
    assert {key: tuple(p.shape) for key, p in mine.items()} == {key: tuple(p.shape) for key, p in reference.items()}
    assert any(key.endswith("miss_block") for key in mine)
    fill(mine)
    fill(reference)
    return ours, theirs


def compare(case: Case, fields: dict[str, Any], folder: Path) -> None:
    if case.peft_refuses is not None:
        compare_with_the_formulas(case, fields, folder)
        return
    (ours, theirs), batch = pair(case, fields), case.batch()
    (actual, loss), (expected, reference_loss) = output_and_loss(ours, batch), output_and_loss(theirs, batch)
    assert max_error(expected, output_and_loss(case.make(), batch)[0]) > 1e-3 * float(expected.detach().abs().max())
    assert_near(actual, expected)
    loss.backward()
    reference_loss.backward()
    assert_gradients(trained_by_us(ours), trained_by_peft(theirs))

    mc.save_adapter(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    mine, stored = (load_file(folder / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert mine.keys() == stored.keys()
    assert all(torch.equal(mine[key], stored[key]) for key in mine)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "modules_to_save entry 'score'")  # PEFT's file of a classifier names two heads
        loaded = mc.load_adapter(case.make(), folder / "theirs")
    for other in (loaded, peft.PeftModel.from_pretrained(case.make(), folder / "ours").eval()):
        assert_near(output_and_loss(other, batch)[0], expected)

    merged, wanted = mc.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)


def compare_with_the_formulas(case: Case, fields: dict[str, Any], folder: Path) -> None:
    assert case.peft_refuses is not None
    with pytest.raises(case.peft_refuses):
        peft.get_peft_model(case.make(), peft.MissConfig(**fields))
    ours, reference, batch = mc.adapt(case.make(), mc.MissConfig(**fields)), case.make().double(), case.batch()
    mine = trained_by_us(ours)
    fill(mine)
    leaves = {key: block.detach().double().requires_grad_() for key, block in mine.items()}
    weights = {}
    for key, leaf in leaves.items():
        name = key.replace("miss_block", "weight")
        weight = reference.get_parameter(name).detach()  # (in, out)
        weights[name] = weight + differentiable_delta(fields.get("init_weights", True), leaf, weight.T).T
    updated = functools.partial(torch.func.functional_call, reference, weights)
    (actual, loss), (expected, reference_loss) = (
        output_and_loss(ours, batch),
        output_and_loss(lambda **b: updated((), b), batch),
    )
    assert max_error(expected, output_and_loss(reference, batch)[0]) > 1e-3 * float(expected.detach().abs().max())
    assert_near(actual, expected)
    loss.backward()
    reference_loss.backward()
    assert_gradients(mine, leaves)

    mc.save_adapter(ours, folder)
    assert_near(output_and_loss(mc.load_adapter(case.make(), folder), batch)[0], expected)
    mc.merge(ours)
    assert_near(output_and_loss(ours, batch)[0], expected)
    for name, weight in weights.items():
        torch.testing.assert_close(ours.get_parameter(name), weight.float(), rtol=1e-5, atol=1e-6)


# Models × variants × options


def fields_of(case: Case, init_weights: Any, option: str = "plain") -> dict[str, Any]:
    r = 8 if init_weights == "bat" else 5  # 5 divides none of the widths: the last shard is short
    fields = {"r": r, "mini_r": 4, "init_weights": init_weights, "target_modules": case.targets}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "dropout": {"miss_dropout": 0.5},
        "modules_to_save": {"modules_to_save": [case.head]},
        "bias": {"bias": "all" if case is CASES["llama"] else "MiSS_only"},  # a Llama has none to train
        "exclude_modules": {"exclude_modules": [case.excluded]},
        "layers_to_transform": {"layers_to_transform": [1], "target_modules": list(case.queries)},
    }
    return fields | options[option]


@variants
@pytest.mark.parametrize("name", CASES)
def test_every_model(name: str, init_weights: Any, tmp_path: Path) -> None:
    compare(CASES[name], fields_of(CASES[name], init_weights), tmp_path)


@variants
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", OPTION_MODELS)
def test_every_option(name: str, option: str, init_weights: Any, tmp_path: Path) -> None:
    case = CASES[name]
    fields = fields_of(case, init_weights, option)
    if name == "mlp" and option == "layers_to_transform":
        # a bare `layers.0` root has no segment before it: PEFT finds no layer, we do
        assert list(trained_by_us(mc.adapt(case.make(), mc.MissConfig(**fields)))) == ["layers.1.miss_block"]
        return
    compare(case, fields, tmp_path)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@variants
@pytest.mark.parametrize("name", CURVE_MODELS)
def test_twenty_steps_have_the_loss_curve_of_peft(name: str, init_weights: Any, optimizer: str) -> None:
    case = CASES[name]
    options = {"lr": 1e-2} if optimizer == "SGD" else {"lr": 1e-3, "eps": 1e-5}
    curves = []
    for model in pair(case, fields_of(case, init_weights)):
        step = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], **options)
        losses = []
        for _ in range(20):
            step.zero_grad()
            loss = output_and_loss(model, case.batch())[1]
            loss.backward()
            step.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    ours, theirs = curves
    assert ours[-1] < 0.999 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


# Documented configurations

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
OUT = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64, "gate_proj": 96, "up_proj": 96, "down_proj": 64}
Shapes = dict[str, tuple[int, ...]]


def llama(layers: int = 2) -> Case:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "initializer_range": 0.1}
    return dataclasses.replace(ZOO["llama"], make=functools.partial(tiny, "llama", **sizes))


def gpt2() -> Case:
    make = functools.partial(tiny, "gpt2", n_embd=64, n_inner=None, initializer_range=0.1)
    return dataclasses.replace(ZOO["gpt2"], make=make)


def of_llama(r: int, *names: str, layers: int = 2, shape: tuple[int, ...] = ()) -> Shapes:
    """The shapes of balance blocks, or `shape` of each."""
    parents = {name: "mlp" if name in MLP else "self_attn" for name in names}
    paths = [(name, f"model.layers.{i}.{parents[name]}.{name}.miss_block") for i in range(layers) for name in names]
    return {path: shape or (r, OUT[name]) for name, path in paths}


def in_both(path: str, own: str = "miss_block", **shapes: tuple[int, ...]) -> Shapes:
    """In each of two layers; `__` stands for a dot."""
    return {f"{path.format(i)}.{name.replace('__', '.')}.{own}": shape for i in range(2) for name, shape in shapes.items()}


DOCUMENTED: dict[str, tuple[Case, dict[str, Any], Shapes]] = {
    "gpt2's attention and projections": (
        gpt2(),
        {"r": 64, "target_modules": ["c_attn", "c_proj"]},
        in_both("transformer.h.{}", attn__c_attn=(64, 192), attn__c_proj=(64, 64), mlp__c_proj=(64, 64)),
    ),
    "mini on query and value": (
        llama(),
        {"r": 32, "mini_r": 4, "miss_dropout": 0.1, "init_weights": "mini", "target_modules": ["q_proj", "v_proj"]},
        of_llama(32, "q_proj", "v_proj", shape=(32, 4)),
    ),
    "bat with dropout on the fused attention": (
        gpt2(),
        {"r": 64, "miss_dropout": 0.05, "init_weights": "bat", "target_modules": ["attn.c_attn"]},
        in_both("transformer.h.{}", attn__c_attn=(3, 64, 64)),
    ),
    # both excludes name modules of the model: no mistake, although the expression leaves them out by itself
    "an expression and excludes": (
        llama(),
        {"r": 16, "target_modules": r".*\.(q_proj|v_proj)$", "exclude_modules": ["lm_head", "embed_tokens"]},
        of_llama(16, "q_proj", "v_proj"),
    ),
    "all-linear with a mini_r that has no effect": (
        llama(),
        {"r": 32, "mini_r": 2, "target_modules": "all-linear"},
        of_llama(32, *ATTENTION, *MLP),
    ),
    "some layers": (
        llama(4),
        {"target_modules": list(ATTENTION), "layers_to_transform": [0, 1, 2], "layers_pattern": "layers", "r": 16},
        of_llama(16, *ATTENTION, layers=3),
    ),
    "a sequence classifier with its head and biases": (
        ZOO["bert"],
        {"r": 16, "target_modules": ["query", "value"], "bias": "MiSS_only"}
        | {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        in_both("bert.encoder.layer.{}.attention.self", query=(16, 32), value=(16, 32))
        | in_both("bert.encoder.layer.{}.attention.self", "base_layer.bias", query=(32,), value=(32,))
        | {"classifier.weight": (3, 32), "classifier.bias": (3,)},
    ),
    "gpt2 by partial paths with dropout": (
        gpt2(),
        {"r": 32, "miss_dropout": 0.1, "target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]},
        in_both("transformer.h.{}", attn__c_attn=(32, 192), attn__c_proj=(32, 64), mlp__c_fc=(32, 256)),
    ),
    "a llama with every field": (
        llama(),
        {
            **{
                "task_type": "CAUSAL_LM",
                "inference_mode": False,
                "r": 16,
                "miss_dropout": 0.05,
                "mini_r": 1,
                "bias": "none",
            },
            **{"target_modules": [*ATTENTION, *MLP], "exclude_modules": ["lm_head"], "init_weights": True},
            **{"layers_to_transform": None, "layers_pattern": None, "modules_to_save": None},
            **{"base_model_name_or_path": "tiny", "revision": "main"},
        },
        of_llama(16, *ATTENTION, *MLP),
    ),
}


def start(case: Case, fields: dict[str, Any]) -> nn.Module:
    """The adapted model, of which the output is that of the base, bit for bit."""
    model = mc.adapt(case.make(), mc.MissConfig(**fields))
    assert torch.equal(run(model, **case.batch()), run(case.make(), **case.batch()))
    return model


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_configuration(name: str, tmp_path: Path) -> None:
    case, fields, shapes = DOCUMENTED[name]
    model, batch = start(case, fields), case.batch()
    assert mc.adapters(model)["default"] == mc.MissConfig(**fields)
    assert {key: tuple(parameter.shape) for key, parameter in trained_by_us(model).items()} == shapes

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        first = float(model(**batch).loss)
    train_step(model.train(), lr=1e-3, **batch)
    with torch.no_grad():
        assert float(model.eval()(**batch).loss) < first
    trained = [name for name, _ in mc.trainable_parameters(model)]
    for name, parameter in model.named_parameters():  # what is trained moves, and nothing else
        assert torch.equal(parameter, before[name]) is (name not in trained), name
    compare(case, fields, tmp_path)


@pytest.mark.parametrize(("init_weights", "count"), [(True, 14336), ("bat", 14336), ("mini", 896)])
def test_parameter_counts_of_the_variants_side_by_side(init_weights: Any, count: int) -> None:
    """Per linear: balance `r·out`, mini `r·m`, bat `r·out` too, as `out/r` blocks of `r×r`."""
    fields = {"r": 16, "mini_r": 4, "init_weights": init_weights, "target_modules": "all-linear"}
    assert sum(block.numel() for block in trained_by_us(start(llama(), fields)).values()) == count
    assert peft.get_peft_model(llama().make(), peft.MissConfig(**fields)).get_nb_trainable_parameters()[0] == count

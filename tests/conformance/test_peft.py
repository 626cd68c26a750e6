"""Outputs, gradients and merged weights against PEFT on tiny models; GPT-2, which PEFT refuses, against the formulas."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from support import fill_blocks, max_error, reference_delta
from torch import Tensor, nn
from zoo import ZOO

import misscompile as mc

TARGETS = {
    "llama": "all-linear",
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "vit": ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "value"],
}


def _fields(name: str, init_weights: Any) -> dict[str, Any]:
    r = 8 if init_weights == "bat" else 5  # 5 divides none of the widths: the last shard is short
    return {"r": r, "mini_r": 4, "init_weights": init_weights, "target_modules": TARGETS[name]}


def _peft_model(name: str, fields: dict[str, Any]) -> nn.Module:
    return fill_blocks_of_peft(peft.get_peft_model(ZOO[name].make(), peft.MissConfig(**fields)))


def fill_blocks_of_peft(model: nn.Module) -> nn.Module:
    """The values that `fill_blocks` gives the same modules: sorted by module name, from one seed."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(_peft_blocks(model).items()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05)
    return model


def _peft_blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".miss_block.default"): parameter
        for name, parameter in model.named_parameters()
        if "miss_block" in name
    }


def _our_blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.removesuffix(".miss_block_default"): p for n, p in model.named_parameters() if "miss_block" in n}


@pytest.mark.parametrize("init_weights", [True, False, "mini", "bat"])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore::misscompile.MissWarning")  # ViT's list names the projections of two naming schemes
def test_outputs_gradients_and_merged_weights_equal_pefts(name: str, init_weights: Any) -> None:
    fields = _fields(name, init_weights)
    make, batch = ZOO[name].make, ZOO[name].batch
    theirs = _peft_model(name, fields)
    ours = fill_blocks(mc.adapt(make(), mc.MissConfig(**fields)))
    our_blocks, their_blocks = _our_blocks(ours), _peft_blocks(theirs)
    assert our_blocks.keys() == their_blocks.keys()
    assert len(our_blocks) >= 8
    assert all(torch.equal(our_blocks[key], their_blocks[key]) for key in our_blocks)

    base = make()(**batch()).logits
    actual, expected = ours(**batch()), theirs(**batch())
    assert max_error(expected.logits, base) > 1e-2
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=2e-5)
    actual.loss.backward()
    expected.loss.backward()
    for key, block in our_blocks.items():
        gradient, reference = block.grad, their_blocks[key].grad
        assert gradient is not None
        assert reference is not None
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-6 + 1e-4 * float(reference.abs().max()))

    merged, reference = mc.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == reference.keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, reference[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_weights", [True, "mini", "bat"])
def test_gpt2_equals_the_formulas(init_weights: Any) -> None:
    """PEFT raises a TypeError on `Conv1D`; the reference is a plain GPT-2 whose weights hold `W + ΔW`."""
    make, batch = ZOO["gpt2"].make, ZOO["gpt2"].batch
    fields = {"r": 8, "mini_r": 4, "init_weights": init_weights, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    with pytest.raises(TypeError):
        peft.get_peft_model(make(), peft.MissConfig(**fields))
    ours = fill_blocks(mc.adapt(make(), mc.MissConfig(**fields)))
    reference = make()
    leaves: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, block in _our_blocks(ours).items():
            weight = reference.get_submodule(name).weight  # (in, out)
            weight += reference_delta(init_weights, block, weight.T).T.float()
            leaves[name] = weight
    assert len(leaves) == 8
    actual, expected = ours(**batch()), reference(**batch())
    assert max_error(expected.logits, make()(**batch()).logits) > 1e-2
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=2e-5)
    actual.loss.backward()
    expected.loss.backward()
    for name, block in _our_blocks(ours).items():
        weight = make().get_submodule(name).weight.detach().T.double()
        leaf = block.detach().double().requires_grad_()
        delta = _differentiable_delta(init_weights, leaf, weight)
        (gradient,) = torch.autograd.grad(delta, leaf, leaves[name].grad.T.double())
        assert block.grad is not None
        torch.testing.assert_close(block.grad.double(), gradient, rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max()))
    mc.merge(ours)
    for name, weight in leaves.items():
        torch.testing.assert_close(ours.get_submodule(name).weight, weight, rtol=1e-5, atol=1e-6)


def _differentiable_delta(init_weights: Any, block: Tensor, weight: Tensor) -> Tensor:
    """The formulas by index arithmetic, so that autograd can go through them."""
    out_features, in_features = weight.shape
    o, i = torch.arange(out_features), torch.arange(in_features)
    if init_weights == "bat":
        r = block.shape[-1]
        rows = [
            torch.cat([w @ b + b for w in strip.split(r, dim=1)], dim=1)
            for strip, b in zip(weight.split(r, dim=0), block, strict=True)
        ]
        return torch.cat(rows)
    r, columns = block.shape
    return block[i % r][:, o % columns].T

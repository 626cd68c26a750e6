"""bat as one call: its three forms and their gradients against the formulas, what it keeps, and what it composes with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import adapted, differentiable_delta, kept_for_backward, max_error, rms_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from zoo import tiny_llama, tokens

import misscompile as mc
from misscompile.kernels import bat  # internal: its two functions on plain tensors

IN, OUT = 12, 20
PARTITIONED = "aot_eager_decomp_partition"
"""A backend with the partitioner that Inductor uses, which decides what is kept."""
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
both_forms = pytest.mark.parametrize("form", ["one product", "two products"])


def operands(dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = (2, 5)) -> list[Tensor]:
    """x, weight, bias and blocks of two ranks."""
    shapes = [(*lead, IN), (OUT, IN), (OUT,), (5, 4, 4), (10, 2, 2)]
    made = [torch.randn(shape, dtype=torch.float64) * 0.5 for shape in shapes]
    return [t.to(dtype if i < 3 or dtype.itemsize > 2 else torch.float32).requires_grad_() for i, t in enumerate(made)]


def expected(x: Tensor, weight: Tensor, bias: Tensor, *blocks: Tensor) -> Tensor:
    return F.linear(x, sum((differentiable_delta("bat", block, weight) for block in blocks), weight), bias)


@both_forms
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 5)])
def test_output_and_every_gradient(form: Any, lead: tuple[int, ...]) -> None:
    values = operands(lead=lead)
    x, weight, bias, *blocks = values
    y, wanted = bat._bat_linear(x, weight, bias, form, blocks), expected(*values)
    assert y.shape == (*lead, OUT)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn_like(y)
    found, exact = (torch.autograd.grad(result, values, upstream, materialize_grads=True) for result in (y, wanted))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["one product", "two products", "beside the base"])
def test_gradients_of_gradients(form: Any) -> None:
    x, weight, bias, *blocks = operands(lead=(3,))

    def run(x: Tensor, weight: Tensor, *blocks: Tensor) -> Tensor:
        if form == "beside the base":
            return bat.add_bat(x[..., :1] * 2, x, weight, blocks[0])
        return bat._bat_linear(x, weight, bias, form, blocks)

    assert torch.autograd.gradcheck(run, (x, weight, *blocks))
    assert torch.autograd.gradgradcheck(run, (x, weight, *blocks))


@both_forms
def test_forward_mode(form: Any) -> None:
    x, weight, bias, *blocks = operands()
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        y = bat._bat_linear(forward_ad.make_dual(x, direction), weight, bias, form, blocks)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    assert max_error(tangent, expected(direction, weight, torch.zeros_like(bias), *blocks)) < 1e-12


@both_forms
@pytest.mark.parametrize("wanted", range(5))
def test_only_what_is_asked_for_gets_a_gradient(form: Any, wanted: int) -> None:
    values = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands())]
    x, weight, bias, *blocks = values
    bat._bat_linear(x, weight, bias, form, blocks).sum().backward()
    assert [t.grad is not None for t in values] == [i == wanted for i in range(5)]
    (gradient,) = torch.autograd.grad(expected(*values).sum(), values[wanted])
    assert max_error(values[wanted].grad, gradient) < 1e-11


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_the_factored_form(lead: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> None:
    x, weight, bias, *blocks = operands(dtype, lead)
    if transposed:
        weight = weight.t().contiguous().t()
    y = bat.bat_linear(x, weight, bias, blocks, False)
    assert y.dtype == dtype
    wanted = expected(*(t.double() for t in (x, weight, bias, *blocks)))
    assert y.shape == wanted.shape
    if wanted.numel():
        assert max_error(y, wanted) < (1e-12 if dtype is torch.float64 else 0.02 * float(wanted.abs().max()))
    zeros = [torch.zeros_like(block) for block in blocks]
    assert torch.equal(bat.bat_linear(x, weight, bias, zeros, False), F.linear(x, weight, bias))


def test_round_bat_weight_is_kept_by_copies_switches_and_loads(tmp_path: Any) -> None:
    """It shows in the class of an owner, which is one for all owners of equal structure."""

    def kind(model: nn.Module) -> type:
        return type(model.model.layers[0].self_attn.q_proj)

    def make(init_weights: Any, round_weight: bool) -> nn.Module:
        config = mc.MissConfig(r=4, init_weights=init_weights, target_modules=["q_proj"])
        return mc.adapt(tiny_llama().bfloat16(), config, round_bat_weight=round_weight)

    model, exact = make("bat", True), kind(make("bat", False))
    rounded = kind(model)
    assert rounded is not exact
    with mc.disable_adapter(model):
        assert kind(model) is not rounded
    assert kind(model) is kind(copy.deepcopy(model)) is rounded
    mc.save_adapter(model, tmp_path)
    assert kind(mc.load_adapter(tiny_llama().bfloat16(), tmp_path, round_bat_weight=True)) is rounded
    assert kind(mc.load_adapter(tiny_llama().bfloat16(), tmp_path)) is exact
    assert kind(make(True, True)) is kind(make(True, False))  # no other class for what does not depend on it


def linear(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 48).to(dtype))
    return adapted(model, "bat", r=8, miss_dropout=dropout)  # type: ignore[return-value]


def gradients(run: Any, model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `x` and the block."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(run(leaf).float().square().sum(), [leaf, model[0].miss_block_default])  # type: ignore[return-value]


@both_dtypes
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_the_size_of_the_weight_is_kept(dtype: torch.dtype, compiled: bool) -> None:
    model, x = linear(dtype), torch.randn(96, 32).to(dtype).requires_grad_()
    run: Any = model
    if compiled:
        run = torch.compile(model, backend=PARTITIONED, fullgraph=True)
        run(x).sum().backward()
    assert kept_for_backward(lambda: run(x), x, *model.parameters()) == []


def test_one_graph_for_all_lengths() -> None:
    """The form for few tokens is chosen inside of the operator, when it runs."""
    model = linear().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (9, 40, 33, 2, 3, 7, 90):
            x = torch.randn(length, 32)
            assert max_error(compiled(x), model(x)) < 1e-5
    assert counter.frame_count == 1


@both_dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_gradients_are_those_of_eager(dtype: torch.dtype, dropout: float) -> None:
    model, x = linear(dtype, dropout).train(dropout == 0.0), torch.randn(70, 32).to(dtype)
    compiled = torch.compile(model, backend=PARTITIONED, fullgraph=True)
    for a, b in zip(gradients(compiled, model, x), gradients(model, model, x), strict=True):
        assert max_error(a, b) <= (1e-4 if dtype is torch.float32 else 0.02) * float(b.abs().max())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model, x = linear(dropout=0.3), torch.randn(70, 32, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        run(x).square().sum().backward()  # reentrant checkpoints know no torch.autograd.grad
        found.append((x.grad.clone(), model[0].miss_block_default.grad.clone()))
        x.grad = model[0].miss_block_default.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_has_the_gradients_of_the_base_dtype() -> None:
    model, x = linear(), torch.randn(70, 32)

    def low(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        assert y.dtype is torch.bfloat16
        return y

    for a, b in zip(gradients(low, model, x), gradients(model, model, x), strict=True):
        assert a.dtype is torch.float32
        assert rms_error(a, b) < 0.02 * rms_error(b, torch.zeros(()))


@both_dtypes
def test_function_transforms_take_the_plain_operations(dtype: torch.dtype) -> None:
    model, x, name = linear(dtype), torch.randn(7, 32).to(dtype), "0.miss_block_default"
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(block: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters | {name: block}, x).float().square().sum()

    block = parameters[name]
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(block, x)
    _, whole = gradients(model, model, x)
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    assert rms_error(per_sample.sum(0), whole) < tolerance * rms_error(whole, torch.zeros(()))
    _, tangent = torch.func.jvp(lambda b: loss(b, x), (block,), (block,))
    assert float(tangent) == pytest.approx(float((whole * block).sum()), rel=0.02)


def test_a_whole_model_trains_in_steps_that_lower_its_loss() -> None:
    model = mc.adapt(tiny_llama().bfloat16(), mc.MissConfig(r=4, init_weights="bat", target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for _, p in mc.trainable_parameters(model)], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**tokens()).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3

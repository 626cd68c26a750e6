"""Dropout without a kept mask: the numbers, the gradients and the random stream of `F.dropout`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import adapted, kept_for_backward
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from zoo import two_linears

from misscompile.kernels.dropout import dropout


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (50, 12))).to(dtype).requires_grad_()


def run(function: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient and the next random number."""
    torch.manual_seed(3)
    y = function(x, *args)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return y, gradient, torch.rand(2)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(50, 12), (3, 7, 12), (12,), (0, 12)])
def test_equals_dropout_and_leaves_the_stream_where_it_does(
    dtype: torch.dtype, p: float, training: bool, shape: tuple[int, ...]
) -> None:
    x = sample(*shape, dtype=dtype)
    assert_equal(run(dropout, x, p, training), run(F.dropout, x, p, training))


def test_other_memory_orders_get_the_same_mask_back() -> None:
    x = torch.randn(12, 50).t().requires_grad_()
    assert_equal(run(dropout, x, 0.5, True), run(F.dropout, x, 0.5, True))
    y = dropout(leaf := sample(), 0.5, True)
    upstream = torch.randn(12, 50).t()
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    assert torch.equal(gradient, torch.where(y != 0, upstream / 0.5, torch.zeros(())))


def test_keeps_the_state_of_the_generator_and_nothing_else() -> None:
    x = sample(4096, 64)
    assert [t.nbytes for t in kept_for_backward(lambda: dropout(x, 0.5, True))] == [torch.get_rng_state().nbytes]


def test_a_model_keeps_a_state_more_for_each_site() -> None:
    """A mask would be as large as its input."""

    def kept(p: float) -> int:
        model = adapted(two_linears(), miss_dropout=p).train()
        x = torch.randn(200, 12).requires_grad_()
        found = kept_for_backward(lambda: model(x), *model.parameters())
        return sum(t.untyped_storage().nbytes() for t in found)

    assert kept(0.1) == kept(0.0) + 2 * torch.get_rng_state().nbytes


def test_backward_later_and_in_another_order() -> None:
    """Whatever is drawn in between, each backward finds the mask of its forward, twice if asked."""
    x, z = sample(), sample()
    first, second = dropout(x, 0.5, True), dropout(z, 0.5, True)
    torch.rand(1000)
    before = torch.get_rng_state()
    for y, leaf in ((second, z), (first, x), (first, x)):
        (gradient,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        assert torch.equal(gradient != 0, y != 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_that_draw_at_any_moment_disturb_no_gradient() -> None:
    wrong: list[int] = []
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.rand(7)

    def train(number: int) -> None:
        x = torch.ones(400, 12, requires_grad=True)
        for _ in range(400):
            y = dropout(x, 0.5, True)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            wrong.extend([number] * (not torch.equal(gradient, y.detach())))

    drawing = threading.Thread(target=draw)
    training = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in (drawing, *training):
        thread.start()
    for thread in training:
        thread.join()
    done.set()
    drawing.join()
    assert wrong == []


def test_threads_draw_masks_of_their_own() -> None:
    masks: list[Tensor] = []
    x = torch.ones(100, 12, requires_grad=True)

    def draw() -> None:
        masks.extend(dropout(x, 0.5, True).detach() for _ in range(200))

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({mask.numpy().tobytes() for mask in masks}) == 400


@pytest.mark.parametrize(
    "batched",
    [
        lambda y, x, g: torch.autograd.grad(y, x, g, True, is_grads_batched=True)[0],
        lambda y, x, g: torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, True)[0])(g),
    ],
)
def test_batched_gradients_find_the_mask_of_the_forward(batched: Any) -> None:
    x = sample(5, 4)
    y, upstream = dropout(x, 0.5, True), torch.randn(3, 5, 4)
    before = torch.get_rng_state()
    expected = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in upstream])
    assert torch.equal(batched(y, x, upstream), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_of_gradients() -> None:
    x = sample(5, 4, dtype=torch.float64)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dropout(x * x, 0.5, True)

    assert torch.autograd.gradcheck(seeded, (x,))
    assert torch.autograd.gradgradcheck(seeded, (x,))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    x = sample()

    def direct(x: Tensor) -> Tensor:
        return dropout(dropout(x, 0.5, True).sin(), 0.3, True)

    results = []
    for function in (direct, lambda x: checkpoint(direct, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    assert_equal(*results)


def test_function_transforms_and_compile_use_dropout_itself() -> None:
    x = sample()
    each = torch.func.vmap(lambda row: dropout(row, 0.5, True), randomness="different")(x.detach())
    assert 0.2 < float((each == 0).float().mean()) < 0.8
    gradient = torch.func.grad(lambda x: dropout(x, 0.5, True).sum())(x.detach())
    assert set(gradient.unique().tolist()) == {0.0, 2.0}
    y = torch.compile(lambda x: dropout(x, 0.5, True), backend="aot_eager", fullgraph=True)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, y != 0)

"""Equal shard sums of one input, shared in eager mode."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import adapted, fill_blocks, max_error, tiny_llama, token_batch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import misscompile as mc
from misscompile import sharing
from misscompile.sharing import share_sum


class Attention(nn.Module):
    """Three calls on one input, one of another width, and one on what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.q, self.k, self.v = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(12, 20), nn.Linear(12, 8)
        self.o = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        y: Tensor = self.o(self.q(h) * self.k(h).sum(-1, keepdim=True).tanh() + self.v(h))
        return y


SITES, INPUTS = 5, 2  # linears, and inputs that others made: that of q, k and v, and that of o; `up` reads a leaf


def model_and_input(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = adapted(Attention().to(dtype), r=fields.pop("r", 4), **fields)
    return model, torch.randn(7, 5, dtype=dtype)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return [p.grad.clone() for _, p in mc.trainable_parameters(model) if p.grad is not None]


def sums_kept(run: Callable[[], Any], r: int = 4) -> int:
    """Distinct tensors of `r` columns that a call keeps for its backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1] == r and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return len(kept)


def not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_is_shareable", lambda x: False)


@pytest.mark.parametrize("init_weights", [True, "mini"])
@pytest.mark.parametrize("r", [4, 5])
def test_one_sum_is_kept_for_each_input_and_nothing_changes(
    init_weights: Any, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = model_and_input(init_weights=init_weights, r=r, mini_r=2)
    run = lambda: model(x)  # noqa: E731
    kept, output, shared = sums_kept(run, r), run(), gradients(model, run)
    not_shared(monkeypatch)
    assert (kept, sums_kept(run, r)) == (1 + INPUTS, SITES)
    assert torch.equal(output, run())
    assert len(shared) == SITES
    for ours, plain in zip(shared, gradients(model, run), strict=True):
        assert max_error(ours, plain) <= 1e-14 * float(plain.abs().max())


def test_a_layer_of_a_language_model_keeps_four_sums() -> None:
    """q, k and v read one input, gate and up another, o and down their own."""
    model = adapted(tiny_llama(num_hidden_layers=2), r=4)
    model.enable_input_require_grads()
    ids = token_batch()
    assert sums_kept(lambda: model(ids)) == 2 * 4


def input_and_sum() -> tuple[Tensor, Callable[[], Tensor]]:
    x = torch.randn(3, 8, requires_grad=True) * 1
    return x, lambda: torch.unflatten(x, -1, (2, 4)).sum(-2)


def test_the_earlier_sum_is_found_while_autograd_keeps_it() -> None:
    x, make = input_and_sum()
    block = torch.randn(4, 6, requires_grad=True)
    first = share_sum(make(), x)
    address, y = first.data_ptr(), first @ block
    del first
    gc.collect()
    assert share_sum(make(), x).data_ptr() == address
    del y
    gc.collect()
    fresh = make()
    assert share_sum(fresh, x) is fresh


def _in_place(x: Tensor) -> None:
    x.mul_(2)


def _detached(x: Tensor) -> None:
    x.detach_()


@pytest.mark.parametrize("change", [_in_place, _detached])
def test_a_changed_input_has_another_sum(change: Callable[[Tensor], None]) -> None:
    x, make = input_and_sum()
    kept = share_sum(make(), x)
    change(x)
    fresh = make()
    assert share_sum(fresh, x) is fresh is not kept


def test_another_input_rank_or_dtype_has_another_sum() -> None:
    x, make = input_and_sum()
    other = x.clone()
    narrow, double = torch.unflatten(x, -1, (4, 2)).sum(-2), make().double()
    sums = [make(), narrow, double]
    assert [share_sum(s, x) for s in sums] == sums
    again = [make(), torch.unflatten(x, -1, (4, 2)).sum(-2), make().double()]
    assert all(share_sum(new, x) is old for new, old in zip(again, sums, strict=True))
    fresh = make()
    assert share_sum(fresh, other) is fresh


def test_values_that_autograd_cannot_vouch_for_are_not_shared() -> None:
    """A program may fill a leaf again through `.data`, and a call without gradients keeps no sum."""
    leaf = torch.randn(3, 8, requires_grad=True)
    first, second = (torch.unflatten(leaf, -1, (2, 4)).sum(-2) for _ in range(2))
    assert share_sum(first, leaf) is first
    assert share_sum(second, leaf) is second
    x, make = input_and_sum()
    for guard in (torch.no_grad(), torch.inference_mode(), FlopCounterMode(display=False)):
        with guard:
            first, second = make(), make()
            assert share_sum(first, x) is first
            assert share_sum(second, x) is second
    with torch.inference_mode():
        unversioned = torch.randn(3, 8)
    assert share_sum(first, unversioned) is first


def test_a_thread_finds_its_own_sums_alone() -> None:
    x, make = input_and_sum()
    first = share_sum(make(), x)
    found: list[bool] = []

    def other() -> None:
        fresh = make()
        found.append(share_sum(fresh, x) is fresh)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [True]
    assert share_sum(make(), x) is first


def test_nothing_outlives_the_output() -> None:
    """The sum of the last call would hold the graph, and with it all activations, until the next one."""
    model, x = model_and_input()
    activations: list[weakref.ref[Tensor]] = []
    model.q.register_forward_hook(lambda module, args, output: activations.append(weakref.ref(args[0])))
    output = model(x)
    del output
    gc.collect()
    assert len(activations) == 1
    assert activations[0]() is None


def test_two_adapters_share_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_input()
    mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear", init_weights="mini", mini_r=2), "second")
    mc.adapt(model, mc.MissConfig(r=3, target_modules=["q", "k"]), "third")
    mc.set_adapter(model, ["default", "second", "third"])
    fill_blocks(model)
    run = lambda: model(x)  # noqa: E731
    assert sums_kept(run) == 2 + INPUTS  # `up` reads a leaf, twice
    assert sums_kept(run, 3) == 1
    shared = gradients(model, run)
    not_shared(monkeypatch)
    for ours, plain in zip(shared, gradients(model, run), strict=True):
        assert max_error(ours, plain) <= 1e-14 * float(plain.abs().max())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_what_was_shared(reentrant: bool) -> None:
    model, x = model_and_input()
    x = x.requires_grad_()
    expected = gradients(model, lambda: model(x))
    for ours, plain in zip(gradients(model, lambda: checkpoint(model, x, use_reentrant=reentrant)), expected, strict=True):
        assert max_error(ours, plain) <= 1e-14 * float(plain.abs().max())


def test_selective_checkpointing_recomputes_what_was_shared() -> None:
    def keep_sums(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.sum.dim_IntList else CheckpointPolicy.PREFER_RECOMPUTE

    model, x = model_and_input()
    first = torch.randn(7, 12, dtype=x.dtype, requires_grad=True)

    def part(h: Tensor) -> Tensor:
        y: Tensor = model.k(h)
        return y

    def mixed() -> Tensor:
        """The input of the checkpointed call has a sum from outside of it."""
        h = first * 1
        outside = model.q(h)
        contexts = lambda: create_selective_checkpoint_contexts(keep_sums)  # noqa: E731
        inside: Tensor = checkpoint(part, h, use_reentrant=False, context_fn=contexts)
        return torch.cat([outside, inside], -1)

    mixed_gradients = gradients(model, mixed)
    plain = gradients(model, lambda: torch.cat([model.q(first), model.k(first)], -1))
    assert all(max_error(a, b) <= 1e-14 * float(b.abs().max()) for a, b in zip(mixed_gradients, plain, strict=True))


def test_transforms_and_compilation_see_plain_operations() -> None:
    model, x = model_and_input(torch.float32)
    parameters = dict(model.named_parameters())
    expected = model(x).detach()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(model, parameters, (x,))
        return y.square().sum()

    model.zero_grad()
    model(x).square().sum().backward()
    for name, gradient in torch.func.grad(loss)(parameters).items():
        grad = model.get_parameter(name).grad
        if grad is not None:
            assert max_error(gradient, grad) <= 1e-5 * float(grad.abs().max())
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    many = torch.randn(70, 5)  # few tokens take another form in eager mode
    assert torch.equal(compiled(many), model(many))
    assert max_error(compiled(x), expected) <= 1e-6 * float(expected.abs().max())
    assert not any("share" in target for target in seen)
    exported = torch.export.export(model, (x,))
    assert not any("share" in str(node.target) for node in exported.graph.nodes)

"""What many tests need: non-zero blocks, the formulas of MiSS written out once more in fp64, and ways to run and compare."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import misscompile as mc

VARIANTS: tuple[Any, ...] = (True, "mini", "bat")
"""`init_weights` of the three algebras."""


def stable_id(value: Any) -> str:
    """A name for a test's parameter that is the same in every process: no addresses, sets in order."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(value, key=repr)}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def fields(init_weights: Any = True, **changes: Any) -> dict[str, Any]:
    """The fields of a config on all linears, with `changes`."""
    return {"r": 4, "mini_r": 2, "target_modules": "all-linear", "init_weights": init_weights} | changes


def adapted(model: nn.Module, init_weights: Any = True, **changes: Any) -> nn.Module:
    """`model` with random non-zero blocks on all its linears."""
    return fill_blocks(mc.adapt(model, mc.MissConfig(**fields(init_weights, **changes))))


def fill_blocks(model: nn.Module, std: float = 0.05, seed: int = 1) -> nn.Module:
    """Give every block random values, the same for every model with the same block names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "miss_block" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.data.copy_(values)
    return model


@torch.no_grad()
def shake(model: nn.Module, seed: int = 1, std: float = 0.2) -> nn.Module:
    """Other values in all that trains, the copies of modules to save as well."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in mc.trainable_parameters(model):
        parameter.add_((torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std).to(parameter.dtype))
    return model


def blocks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "miss_block" in name}


def reference_delta(init_weights: Any, block: Tensor, weight: Tensor) -> Tensor:
    """`ΔW (out, in)` element by element, from the formulas, in fp64."""
    block, weight = block.detach().double(), weight.detach().double()
    out_features, in_features = weight.shape
    delta = torch.zeros(out_features, in_features, dtype=torch.float64)
    if init_weights == "bat":
        r = block.shape[-1]
        for o in range(out_features // r):
            for k in range(in_features // r):
                piece = weight[o * r : (o + 1) * r, k * r : (k + 1) * r]
                delta[o * r : (o + 1) * r, k * r : (k + 1) * r] = piece @ block[o] + block[o]
        return delta
    r, columns = block.shape
    for o in range(out_features):
        for i in range(in_features):
            delta[o, i] = block[i % r, o % columns]
    return delta


def reference_gradient(init_weights: Any, block: Tensor, weight: Tensor, weight_gradient: Tensor) -> Tensor:
    """Gradient of a block from that of `W + ΔW`: ΔW is linear in the block, so entry by entry through the formulas."""
    gradient = torch.zeros(block.numel(), dtype=torch.float64)
    for index in range(block.numel()):
        basis = torch.zeros(block.numel(), dtype=torch.float64)
        basis[index] = 1
        gradient[index] = (reference_delta(init_weights, basis.view(block.shape), weight) * weight_gradient).sum()
    return gradient.view(block.shape)


def base_weight(owner: nn.Module) -> nn.Parameter:
    """The weight that is registered on a module; its attribute gives `W + ΔW` while adapters act."""
    weight = owner._parameters["weight"]
    assert weight is not None
    return weight


def matrix_of(owner: nn.Module) -> Tensor:
    """The base weight of an owner as `(out, in)` in fp64: `Conv1D` of GPT-2 stores it the other way around."""
    weight = base_weight(owner).detach().double()
    return weight.t() if hasattr(owner, "nf") else weight


def with_deltas(base: nn.Module, model: nn.Module, **active: Any) -> nn.Module:
    """A copy of `base` with the updates of the adapters of `model` added to its weights, from the formulas.

    `active` are names of adapters and their `init_weights`. All updates are of the base weight.
    """
    expected = copy.deepcopy(base)
    for name, block in blocks_of(model).items():
        path, _, adapter = name.rpartition(".miss_block_")
        if adapter in active:
            owner, weight = expected.get_submodule(path), matrix_of(base.get_submodule(path))
            delta = reference_delta(active[adapter], block, weight)
            owner.weight.data += (delta.t() if hasattr(owner, "nf") else delta).to(owner.weight.dtype)
    return expected


def max_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).abs().max())


def rms_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).pow(2).mean().sqrt())


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(output: Any) -> Tensor:
    """The loss of the model, or the sum of the squares of what it returns."""
    loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else torch.stack([t.pow(2).sum() for t in tensors(output)]).sum()


def largest_difference(first: Any, second: Any) -> float:
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    assert pairs
    return max(max_error(a, b) for a, b in pairs)


@torch.no_grad()
def run(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """What the model returns without gradients; of an output of transformers the logits."""
    output: Any = model(*args, **kwargs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The gradients of `loss_of` what the model returns, of every parameter that has one, by name."""
    model.zero_grad()
    loss_of(model(*args, **kwargs)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def train_step(model: nn.Module, *args: Any, lr: float = 0.1, **kwargs: Any) -> float:
    """One step of SGD on all that trains; the loss before it."""
    model.zero_grad()
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    with torch.no_grad():
        for _, parameter in mc.trainable_parameters(model):
            if parameter.grad is not None:
                parameter.sub_(lr * parameter.grad)
    return float(loss.detach())


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all values by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit by bit, in names, order and dtypes too."""
    return list(first) == list(second) and all(
        value.dtype == other.dtype and torch.equal(value, other)
        for value, other in zip(first.values(), second.values(), strict=True)
    )


def _bytes(tensor: Tensor) -> bytes | None:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
        return None
    return tensor.detach().to_dense().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Everything that an error must leave alone; `args` are an input of which the output is compared too."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "modules": [(n, id(m), type(m), list(vars(m)), m.training) for n, m in model.named_modules(remove_duplicate=False)],
        "tensors": [
            (n, id(t), type(t), t.requires_grad, t.dtype, t.shape if _bytes(t) else None, _bytes(t)) for n, t in every
        ],
        "state": list(model.state_dict()),
        "code": [m.code for m in model.modules() if isinstance(m, fx.GraphModule)],
        "adapters": [{name: vars(config) for name, config in mc.adapters(model).items()}, mc.active_adapters(model)],
        "output": [_bytes(t) for t in tensors(model(*args, **kwargs))] if args or kwargs else [],
    }


def picture(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`snapshot`, and what else the modules hold: the adapters' records too."""
    apart = ("_parameters", "_buffers", "_modules")
    held = [repr({key: value for key, value in vars(m).items() if key not in apart}) for m in model.modules()]
    return snapshot(model, *args, **kwargs) | {"held": held}


def trace_forward_code(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """By `torch.fx.symbolic_trace`: torch functions, tensor methods and `call_module` nodes."""
    return fx.symbolic_trace(model)


def trace_export(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """By `torch.export`: aten operators."""
    return torch.export.export(model, (x,), strict=False).module()  # type: ignore[return-value]


TRACERS: dict[str, Callable[[nn.Module, Tensor], fx.GraphModule]] = {"fx": trace_forward_code, "export": trace_export}


def graph_list(graph: fx.Graph | fx.GraphModule) -> list[tuple[str, str, str, str]]:
    """A graph as a list of its nodes, which is equal for equal graphs."""
    nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else graph.nodes
    return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in nodes]


def says(message: object, told: str) -> bool:
    """Whether a message is `told`, where three dots stand for any text."""
    pieces = [re.escape(piece) for piece in told.split("...")]
    return re.fullmatch(".*".join(pieces), str(message), re.DOTALL) is not None


class Trap:
    """Counts the calls of what it guards and raises at the k-th, before or after that one is done."""

    def __init__(self, at: int, error: BaseException, done: bool = False) -> None:
        self.at, self.error, self.done, self.calls = at, error, done, 0

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at and not self.done:
                raise self.error
            result = function(*args, **kwargs)
            if self.calls == self.at:
                raise self.error
            return result

        return guarded


def differentiable_delta(init_weights: Any, block: Tensor, weight: Tensor) -> Tensor:
    """`reference_delta` by index arithmetic, in the dtype of its operands, so that autograd can go through it."""
    out_features, in_features = weight.shape
    if init_weights == "bat":
        r = block.shape[-1]
        pieces = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # W[o, k]
        return (pieces @ block.unsqueeze(1) + block.unsqueeze(1)).transpose(1, 2).reshape(weight.shape)
    r, columns = block.shape
    return block[torch.arange(in_features) % r][:, torch.arange(out_features) % columns].T


def kept_for_backward(call: Callable[[], Any], *owned: Tensor) -> list[Tensor]:
    """What autograd keeps of a call for the backward, each storage once, without those of the given tensors."""
    kept: dict[int, Tensor] = {}  # alive, so that no later tensor is given the same place
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return [tensor for place, tensor in kept.items() if place not in known]

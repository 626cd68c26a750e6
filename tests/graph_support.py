"""What the tests of whole graphs need: modules that call one weight in one form, and graphs as lists to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import reference_delta
from torch import Tensor, fx, nn

IN, OUT = 8, 12


class Holder(nn.Module):
    """A module with one weight, of which `rule(weight, bias, x)` is the forward."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], bias: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(bias, dtype=torch.float64))
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.weight, self.bias, x)


class Model(nn.Module):
    """`proj` between two elementwise functions, so that the gradient of neither side is constant."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(torch.sin(x))
        return torch.tanh(y / 4)


def holder(rule: Callable[..., Tensor], shape: tuple[int, ...] = (OUT, IN), bias: int = OUT) -> Model:
    torch.manual_seed(0)
    return Model(Holder(rule, shape, bias))


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


def blocks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "miss_block" in name}


def reference_gradient(init_weights: Any, block: Tensor, weight: Tensor, weight_gradient: Tensor) -> Tensor:
    """Gradient of a block from that of `W + ΔW`: ΔW is linear in the block, so entry by entry through the formulas."""
    gradient = torch.zeros(block.numel(), dtype=torch.float64)
    for index in range(block.numel()):
        basis = torch.zeros(block.numel(), dtype=torch.float64)
        basis[index] = 1
        gradient[index] = (reference_delta(init_weights, basis.view(block.shape), weight) * weight_gradient).sum()
    return gradient.view(block.shape)

"""All that the benchmark reads of misscompile beside its public interface and its errors."""

from __future__ import annotations

from typing import get_args

from torch import nn

from misscompile.record.walk import owner_states, owners
from misscompile.variants import VARIANTS, Form


def adapted_linears(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that misscompile adapted, each with its base `weight`."""
    return list(owners(model).values())


def added_flops(adapted: nn.Module, variant: str, tokens: int, r: int, mini_r: int) -> int:
    """FLOPs that `variant` adds to a training step over all linears of `adapted`; of several forms the least."""
    flops, forms = VARIANTS[variant].step_flops, get_args(Form)
    shapes = [state.shape for state in owner_states(adapted).values() if state.shape is not None]
    return sum(min(flops(tokens, *shape, r, mini_r, form) for form in forms) for shape in shapes)

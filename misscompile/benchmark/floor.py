"""The floor of a step: the FLOPs that have to be done, relative to those of the frozen base's step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from misscompile import cost
from misscompile.benchmark.measure import TrainingStep
from misscompile.benchmark.models import Probe
from misscompile.state import owner_states


def count_step(probe: Probe, embedded: torch.Tensor) -> int:
    """FLOPs of one forward and backward of `probe`, as `torch.utils.flop_counter` counts them.

    Attention is counted in its plain form: the counter has no entry for the fused kernel of CPUs, and fused kernels
    recompute in the backward, which is a choice and not work that has to be done.
    """
    step = TrainingStep(probe, probe, embedded)
    step.prepare()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.run()
    step.prepare()
    return int(counter.get_total_flops())


def added_flops(adapted: nn.Module, variant: str, tokens: int, r: int, mini_r: int) -> int:
    """FLOPs that `variant` adds to a step over all adapted sites, by `misscompile.cost`; of several forms the least."""
    forms = [expression for form, expression in cost.STEP.items() if form.split()[0] == variant]
    shapes = [state.shape for state in owner_states(adapted).values() if state.shape is not None]
    return sum(min(cost.evaluate(form, tokens, *shape, r, mini_r) for form in forms) for shape in shapes)

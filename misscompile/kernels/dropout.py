"""Dropout that keeps the state of the random generator instead of a mask as large as its input.

    forward     y = F.dropout(x, p)        remembers the state from which its mask was drawn
    backward    dx = F.dropout(dy, p)      from the same state, hence with the same mask

The numbers drawn are those of `F.dropout`, so a seed gives the same model; the backward draws them once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misscompile.kernels.device import can_redraw, random_state, set_random_state


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout(x, p, training)`, in eager training without a saved mask.

    Under `torch.compile` and `torch.func` transforms, while a CUDA graph is captured, on tensor subclasses and on devices
    other than CPU and CUDA it is `F.dropout` itself: there a state cannot be read, or the compiler decides what is kept.
    """
    if not training or p in (0.0, 1.0) or not (x.requires_grad and torch.is_grad_enabled()) or not can_redraw(x):
        return F.dropout(x, p, training)
    dropped: Tensor = _Redrawn.apply(x, p)  # type: ignore[no-untyped-call]
    return dropped


class _Redrawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(random_state(x.device))
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()  # the mask is drawn in the order of the memory
        (state,) = ctx.saved_tensors
        device = gradient.device
        current = random_state(device)
        set_random_state(state, device)
        try:
            return F.dropout(gradient, ctx.p), None
        finally:
            set_random_state(current, device)

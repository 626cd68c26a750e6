"""Dropout that keeps the state of the random generator instead of a mask as large as its input.

    forward     y = x · mask        remembers the state from which the mask was drawn
    backward    dx = dy · mask      drawn once more, from the same state

On a CPU the numbers drawn are those of `F.dropout`, so a seed gives the same model. A mask is drawn from a generator of its
own: other threads may draw from the default one at any moment.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misscompile.kernels.device import can_redraw, default_generator, outside_vmap

_DRAWING = threading.Lock()


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
        default = default_generator(x.device)
        with _DRAWING:  # two threads must not draw one mask
            state = default.get_state()
            mask, after = _draw_mask(x.shape, x.dtype, x.device, p, state)
            default.set_state(after)
        ctx.p, ctx.shape, ctx.dtype, ctx.device = p, x.shape, x.dtype, x.device
        ctx.save_for_backward(state)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with outside_vmap():  # for which the mask is no random number: it is the one of the forward
            mask, _ = _draw_mask(ctx.shape, ctx.dtype, ctx.device, ctx.p, *ctx.saved_tensors)
        return gradients[0] * mask, None


def _draw_mask(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, p: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A mask of `1 / (1 - p)` and zeros, and the state of the generator behind it."""
    generator = torch.Generator(device)
    generator.set_state(state)
    mask = torch.empty(shape, dtype=dtype, device=device).bernoulli_(1 - p, generator=generator).div_(1 - p)
    return mask, generator.get_state()

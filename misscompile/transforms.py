"""Whether something around a call needs to see its plain operations."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a `torch.func` transform, or eager forward-mode differentiation, runs: plain operations are what composes."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0

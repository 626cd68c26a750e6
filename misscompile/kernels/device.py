"""Which form of an operation is taken where: every test of a device and every threshold.

The constants were measured on CPUs and hold there alone. Elsewhere an operation takes its plain form.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from misscompile.errors import ArgumentError
from misscompile.variants import Form

MANY_TOKENS = 64
"""From here on a product over 16-bit tokens is worth a preparation of its own."""

VECTOR = 64
"""Bytes in a vector register."""

GROUP = 64
"""Values that mini adds at a time where `m` values fill no vector register (best of 32, 64, 128)."""

CACHED = 1 << 20
"""Elements that a merge widens, sums and rounds at a time, 4 MiB in float32 (best of 2^17 to 2^24)."""


def has_few_tokens(x: Tensor) -> bool:
    """Whether `x (…, features)` has so few tokens that each call costs more than its arithmetic.

    Never in an exported graph, which is for any number of tokens.
    """
    return x.is_cpu and not torch.compiler.is_exporting() and x.numel() < MANY_TOKENS * x.shape[-1]


def takes_operators(x: Tensor) -> bool:
    """Whether operators of this library may stand in the graph that `torch.compile` is making.

    Each kernel that Inductor generates for a CPU is a run of the C++ compiler; on a GPU it fuses more. An exported graph
    has to run without the library. A tensor subclass (`DTensor`) or a transform of `torch.func` knows no operator of ours.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return False
    return type(x) is Tensor and x.device.type == "cpu"


def takes_factored(x: Tensor, r: int, form: Form) -> bool:
    """Whether bat's factored form takes no more FLOPs for `x (…, in)`; this is counted, so it holds on every device.

    It takes two products of the base's size. Forming ΔW takes as many FLOPs as `r` tokens do in one such product.
    """
    few = r if form == "two products" else r // 2
    return not torch.compiler.is_exporting() and x.numel() <= few * x.shape[-1]


def fills_vector(dtype: torch.dtype, m: int) -> bool:
    """Whether `m` values fill a vector register."""
    return m * dtype.itemsize >= VECTOR


def group_width(y: Tensor, m: int) -> int:
    """How many outputs mini's update of `m` values is added to at a time: a multiple of `m` that divides the outputs.

    An innermost loop of a few values takes up to ten times as long, so the update is repeated until it fills one. Few
    tokens do not pay for the repetition, a compiler makes one loop of both, and a single value is not read in a loop.
    """
    outputs = y.shape[-1]
    if torch.compiler.is_compiling() or not y.is_cpu or has_few_tokens(y) or m == 1 or fills_vector(y.dtype, m):
        return m
    return next((width for width in range(m, outputs, m) if width >= GROUP and outputs % width == 0), outputs)


def is_transformed() -> bool:
    """Whether a `torch.func` transform, or eager forward-mode differentiation, runs: plain operations are what composes."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def check_blocks(*blocks: Tensor) -> None:
    """Refuse the expanded weights of `torch.nn.utils._per_sample_grad`, which know a few calls of torch and no other.

    Raises:
        ArgumentError: a block is one.
    """
    if not torch.compiler.is_compiling() and any(type(block).__name__ == "ExpandedWeight" for block in blocks):
        raise ArgumentError(
            "call_for_per_sample_grads: its expanded weights cannot follow the update of an adapter. Take the gradients of "
            "each sample by torch.func.vmap(torch.func.grad(...)) over torch.func.functional_call(model, ...)."
        )


def can_redraw(x: Tensor) -> bool:
    """Whether the state from which a dropout mask of `x` is drawn can be read and set again."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_contiguous() or x.numel() == 0:
        return False
    if is_transformed():
        return False
    if x.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return x.device.type == "cpu"


def default_generator(device: torch.device) -> torch.Generator:
    """The generator from which the values on this device are drawn."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def outside_vmap() -> AbstractContextManager[None]:
    """A context in which no `vmap` that runs sees what is called, neither that of `torch.func` nor that of autograd."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
    keys = keys.add("VmapMode")  # of which the enum has no member
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(keys)
    return guard


def fold_parts(weight: Tensor) -> int:
    """Into how many parts a merge cuts `weight (out, in)`, each of which stays in the cache."""
    return max(-(-weight.numel() // CACHED), 1) if weight.is_cpu else 1

"""One shard sum for all calls on one input, in eager mode.

q, k and v (or gate and up) read the same tensor in modules that know nothing of each other, and each keeps its sum for the
backward. Here a sum is replaced by the one that the last call made of the very same input, so that autograd keeps one. A
whole graph shares them by a pass (`passes/share.py`), AOTAutograd by itself.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class _Last(threading.local):
    """The input of the last call in this thread, its version, and the sums made of it by rank, dtype and stream.

    All are weak: a sum is found as long as autograd keeps it for a backward, and nothing lives longer than without this.
    """

    def __init__(self) -> None:
        self.x: TensorWeakRef | None = None
        self.version = -1
        self.sums: dict[tuple[int, torch.dtype, torch.Stream | None], TensorWeakRef] = {}


_LAST = _Last()


def share_sum(s: Tensor, x: Tensor) -> Tensor:
    """`s`, or the tensor of equal values that an earlier call with this very `x` was given.

    Args:
        s: the sum of the shards of `x`, `(…, r)`.
        x: the input of a site, `(…, in)`. Autograd has to know its values as it has to for a tensor that it saves: a change
            in place counts as a version. A leaf, which a program may fill again through `.data`, shares nothing.
    """
    if torch.compiler.is_compiling() or not _is_shareable(x):
        return s
    # on another stream the earlier sum may not be there yet
    key = s.shape[-1], s.dtype, torch.cuda.current_stream(x.device) if x.is_cuda else None
    if _LAST.x is None or _LAST.x() is not x or _LAST.version != x._version:
        _LAST.x, _LAST.version, _LAST.sums = TensorWeakRef(x), x._version, {}
    earlier = _LAST.sums[key]() if key in _LAST.sums else None
    if isinstance(earlier, Tensor):
        return earlier
    _LAST.sums[key] = TensorWeakRef(s)
    return s


def _is_shareable(x: Tensor) -> bool:
    """Whether autograd keeps what is made of `x`, and no dispatch mode counts or records the operations."""
    if x.grad_fn is None or type(x) is not Tensor or not torch.is_grad_enabled():
        return False
    return x.device.type in ("cpu", "cuda") and not torch._C._len_torch_dispatch_stack()

"""`torch.compile` for measurements: one function, one cache, and what Dynamo made of it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from misscompile.benchmark.models import Probe

SAME_PARTITION = "aot_eager_decomp_partition"
"""A backend that decides what to keep for the backward as Inductor does, and generates no code."""


class CompiledForward:
    """`torch.compile` of the forward of `probe`, apart from every other probe's.

    Dynamo keeps what it compiled by code object. Probes share theirs, so that each call would first check the guards of
    the probes before it, and the ninth probe would reach the limit of recompilations: each gets a code object of its own.
    """

    def __init__(self, probe: Probe, **options: Any) -> None:
        function = type(probe).forward
        self._code = function.__code__.replace()
        apart = types.FunctionType(self._code, function.__globals__, function.__name__)
        self._call: Callable[[Tensor], Tensor] = torch.compile(types.MethodType(apart, probe), dynamic=False, **options)

    def __call__(self, embedded: Tensor) -> Tensor:
        return self._call(embedded)

    def guards(self) -> int:
        """Nodes of Dynamo's guard tree, as `TORCH_LOGS=guards` prints it: the checks, and the reads that lead to them."""
        entries = _debug_get_cache_entry_list(self._code)
        return sum(str(entry.guard_manager).count("+- ") for entry in entries)


@contextmanager
def counted_graphs() -> Iterator[dict[str, int]]:
    """A dict that holds, after the context, the graphs that Dynamo compiled in it and the breaks between them."""
    found: dict[str, int] = {}
    counters.clear()
    yield found
    found["graphs"] = int(counters["stats"]["unique_graphs"])
    found["breaks"] = int(sum(counters["graph_break"].values()))


@contextmanager
def nothing_compiled_before() -> Iterator[None]:
    """A context in which Dynamo, AOTAutograd and Inductor find nothing that was compiled before, in memory or on disk."""
    torch._dynamo.reset()
    with fresh_cache():
        yield

"""`torch.compile` for measurements: one function, one cache."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from misscompile.benchmark.measure import Forward
from misscompile.benchmark.models import Probe


def compile_apart(probe: Probe, **options: Any) -> Forward:
    """`torch.compile` of the forward of `probe`, apart from every other probe's.

    Dynamo keeps what it compiled by code object. Probes share theirs, so that each call would first check the guards of
    the probes before it, and the ninth probe would reach the limit of recompilations: each gets a code object of its own.
    """
    function = type(probe).forward
    apart = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled: Callable[..., Any] = torch.compile(types.MethodType(apart, probe), dynamic=False, **options)
    return compiled

"""Where a run took place: machine, versions, threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from misscompile.benchmark.settings import Settings

PACKAGES = ("misscompile", "torch", "transformers", "peft")


def describe_machine(settings: Settings) -> dict[str, str | int]:
    """CPU model, cores this process may use, device, threads, and the versions of Python and the libraries compared."""
    found: dict[str, str | int] = {
        "cpu": cpu_model(),
        "cores": _usable_cores(),
        "device": _device_name(settings.device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return found | {package: _version(package) for package in PACKAGES}


def cpu_model() -> str:
    """The name of the processor, with its bf16 instructions, which decide how a bf16 product runs."""
    info = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(device: str) -> str:
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a clone
        import misscompile

        return misscompile.__version__ if package == "misscompile" else "not installed"

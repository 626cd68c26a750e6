"""A run: the sections in order, their tables on the console, and the files of `--out`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from rich.console import Console
from rich.markdown import Markdown

import misscompile as mc
from misscompile.benchmark.plot import draw
from misscompile.benchmark.sections import adapters, compiler, running
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Table

SECTIONS: dict[str, Callable[[Settings], list[Table]]] = {
    "steps": running.steps,
    "memory": running.memory,
    "adapt": adapters.adapt,
    "compile": lambda settings: [compiler.count_table(settings), compiler.time_table(settings)],
    "decode": running.decode,
    "merge": adapters.merge,
    "growth": adapters.growth,
    "fusion": compiler.fusion,
}


def report(settings: Settings, out: Path | None, console: Console) -> None:
    """Run the benchmark, print each section as it is done, and write `bench.json`, `.md`, `.png` and `.svg` into `out`.

    The files are written anew after every section, so that a run that is stopped leaves what it has measured.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    tables: list[Table] = []
    taken: dict[str, float] = {}
    for name, found, seconds in run_sections(settings):
        if not tables:
            machine = _machine(settings)  # within the run, whose thread count it tells
            console.print(_sentence(machine), "\n", highlight=False)
        for table in found:
            console.print(Markdown(table.markdown()))
        console.print(f"[dim]{name}: {seconds:.0f} s[/dim]\n", highlight=False)
        tables += found
        taken[name] = seconds
        if out is not None:
            content = {
                "machine": machine,
                "settings": dataclasses.asdict(settings),
                "seconds": taken,
                "tables": {table.key: {"title": table.title, "note": table.note, "rows": table.rows} for table in tables},
            }
            (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            paragraphs = [_sentence(machine) + "\n", *(table.markdown() for table in tables)]
            (out / "bench.md").write_text("\n".join(paragraphs), encoding="utf-8")
            draw(tables, _sentence(machine), [out / "bench.png", out / "bench.svg"])


def run_sections(settings: Settings) -> Iterator[tuple[str, list[Table], float]]:
    """Run the chosen sections in order: the name of each, its tables, and the seconds that it took.

    For the time of the run, torch has the thread count of the settings, and the libraries compared warn of nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    with warnings.catch_warnings(action="ignore"):
        try:
            for name in settings.sections:
                start = time.perf_counter()
                torch._dynamo.reset()
                tables = SECTIONS[name](settings)
                yield name, tables, time.perf_counter() - start
        finally:
            torch.set_num_threads(threads)


def _machine(settings: Settings) -> dict[str, str | int]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kind = torch.device(settings.device).type
    return {
        # the vector instructions decide how a bf16 product runs
        "cpu": f"{[*names, platform.processor() or platform.machine()][0]} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "device": torch.cuda.get_device_name(settings.device) if kind == "cuda" else kind,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{library.__name__: str(library.__version__) for library in (torch, transformers, peft, mc)},
    }


def _sentence(machine: dict[str, str | int]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft", "misscompile"))
    return (
        f"{machine['cpu']}, {machine['cores']} cores, device {machine['device']}, {machine['threads']} threads, "
        f"{machine['system']}; {versions}."
    )

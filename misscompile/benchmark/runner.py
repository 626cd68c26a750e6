"""A run: the sections in order, with everything fixed that would make two runs differ."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from misscompile.benchmark.sections import adapt, compiling, decode, fusion, growth, memory, merge, steps
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Table

SECTIONS: dict[str, Callable[[Settings], list[Table]]] = {
    "steps": steps.run,
    "memory": memory.run,
    "adapt": adapt.run,
    "compile": compiling.run,
    "decode": decode.run,
    "merge": merge.run,
    "growth": growth.run,
    "fusion": fusion.run,
}


def run_sections(settings: Settings) -> Iterator[tuple[str, list[Table], float]]:
    """Run the chosen sections in order: the name of each, its tables, and the seconds that it took."""
    with _fixed(settings):
        for name in settings.sections:
            start = time.perf_counter()
            torch._dynamo.reset()
            tables = SECTIONS[name](settings)
            yield name, tables, time.perf_counter() - start


@contextlib.contextmanager
def _fixed(settings: Settings) -> Iterator[None]:
    """The thread count for the time of the run, and no warnings of the libraries compared in between the tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads(threads)

"""What a person and a program get to see of a run: tables on the console, and the files of `--out`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from misscompile.benchmark.machine import describe_machine
from misscompile.benchmark.plot import draw
from misscompile.benchmark.runner import run_sections
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Table


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
            machine = describe_machine(settings)
            console.print(_sentence(machine), "\n", highlight=False)
        for table in found:
            show(table, console)
        console.print(f"[dim]{name}: {seconds:.0f} s[/dim]\n", highlight=False)
        tables += found
        taken[name] = seconds
        if out is not None:
            write_files(out, settings, machine, tables, taken)


def show(table: Table, console: Console) -> None:
    """Print one table with its note."""
    shown = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in table.columns:
        shown.add_column(column.header, justify=column.justify, no_wrap=True)
    for row in table.rows:
        shown.add_row(*(column.cell(row).replace("`", "") for column in table.columns))
    console.print(f"[bold]{table.title}[/bold]\n{table.note.replace('`', '')}\n", highlight=False)
    console.print(shown, "\n", highlight=False)


def write_files(
    out: Path, settings: Settings, machine: dict[str, str | int], tables: list[Table], taken: dict[str, float]
) -> None:
    """Write the raw values as JSON, the tables as Markdown, and the plot as PNG and SVG."""
    content: dict[str, Any] = {
        "machine": machine,
        "settings": dataclasses.asdict(settings),
        "seconds": taken,
        "tables": {table.key: {"title": table.title, "note": table.note, "rows": table.rows} for table in tables},
    }
    (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sections = "\n".join(table.markdown() for table in tables)
    (out / "bench.md").write_text(f"{_sentence(machine)}\n\n{sections}", encoding="utf-8")
    draw(tables, _sentence(machine), [out / "bench.png", out / "bench.svg"])


def _sentence(machine: dict[str, str | int]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft", "misscompile"))
    return (
        f"{machine['cpu']}, {machine['cores']} cores, device {machine['device']}, {machine['threads']} threads, "
        f"{machine['system']}; {versions}."
    )

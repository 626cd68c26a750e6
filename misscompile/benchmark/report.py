"""What a person and a program get to see of a run: tables on the console, and the files of `--out`."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from misscompile.benchmark.machine import describe_machine
from misscompile.benchmark.runner import run_sections
from misscompile.benchmark.settings import Settings
from misscompile.benchmark.tables import Table


def report(settings: Settings, out: Path | None, console: Console) -> None:
    """Run the benchmark and print each section as it is done."""
    tables: list[Table] = []
    for name, found, seconds in run_sections(settings):
        if not tables:
            console.print(", ".join(f"{key} {value}" for key, value in describe_machine(settings).items()))
        for table in found:
            show(table, console)
        console.print(f"[dim]{name}: {seconds:.0f} s[/dim]")
        tables += found


def show(table: Table, console: Console) -> None:
    """Print one table."""
    shown = RichTable(title=table.title, caption=table.note.replace("`", ""), box=SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(table.columns):
        shown.add_column(column.header, justify="right" if index else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*(column.cell(row) for column in table.columns))
    console.print(shown)

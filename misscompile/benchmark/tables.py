"""Tables of results: raw values for JSON, and how a person reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

ratio = "{:.3f}".format
seconds = "{:.1f}".format
change = "{:+.1%}".format
share = "{:.0%}".format


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.1f}" if value < 1 else f"{1e3 * value:,.0f}"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}"


def text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(f"`{name}`" for name in value) or "none"


@dataclasses.dataclass(frozen=True)
class Column:
    """A key of the rows, its heading, and how its values are written; of a `timing.spread`, the median and quartiles are."""

    key: str
    header: str
    write: Callable[[Any], str]

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        if isinstance(value, dict):
            median, low, high = (self.write(value[part]) for part in ("median", "q1", "q3"))
            return f"{median} ({low}–{high})"
        return "–" if value is None else self.write(value)


def columns(write: Callable[[Any], str], /, **headers: str) -> list[Column]:
    """A column for each key with its heading, all written alike."""
    return [Column(key, header, write) for key, header in headers.items()]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of JSON values and the columns that are shown of them; `key` is unique in a run, `note` says how to read it."""

    key: str
    title: str
    note: str
    columns: list[Column]
    rows: list[Row]

    def markdown(self) -> str:
        """The table with its heading and note as GitHub's Markdown."""
        lines = [
            [column.header for column in self.columns],
            ["---" if column.write is text else "---:" for column in self.columns],
            *([column.cell(row) for column in self.columns] for row in self.rows),
        ]
        return f"### {self.title}\n\n{self.note}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

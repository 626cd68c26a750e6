"""Tables of results: raw values for JSON, and how a person reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

Row = dict[str, Any]
MISSING = "–"
TEXTS = ("dtype", "mode", "contestant", "variant", "model", "sum_kernels")
"""Keys whose values are texts; they go to the left, numbers to the right."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A key of the rows, its heading, and how its values are written."""

    key: str
    header: str
    write: Callable[[Any], str] = str

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        return MISSING if value is None else self.write(value)

    @property
    def justify(self) -> Literal["left", "right"]:
        return "left" if self.key in TEXTS else "right"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of JSON values and the columns that are shown of them.

    Args:
        key: a name for programs, unique in a run.
        title: a heading.
        note: what was run and how to read it.
        columns: what is shown; rows may hold more.
        rows: JSON values by column key.
    """

    key: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: list[Row]

    def markdown(self) -> str:
        """The table with its heading and note as GitHub's Markdown."""
        lines = [
            "| " + " | ".join(column.header for column in self.columns) + " |",
            "|" + "|".join("---" if column.justify == "left" else "---:" for column in self.columns) + "|",
            *("| " + " | ".join(column.cell(row) for column in self.columns) + " |" for row in self.rows),
        ]
        return f"### {self.title}\n\n{self.note}\n\n" + "\n".join(lines) + "\n"


def ratio(value: float) -> str:
    return f"{value:.3f}"


def spread_ratio(value: Row) -> str:
    return f"{value['median']:.3f} ({value['q1']:.3f}–{value['q3']:.3f})"


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.1f}" if value < 1 else f"{1e3 * value:,.0f}"


def spread_milliseconds(value: Row) -> str:
    return f"{milliseconds(value['median'])} ({milliseconds(value['q1'])}–{milliseconds(value['q3'])})"


def spread_seconds(value: Row) -> str:
    return f"{value['median']:.1f} ({value['q1']:.1f}–{value['q3']:.1f})"


def spread_percent(value: Row) -> str:
    return f"{value['median']:.0%} ({value['q1']:.0%}–{value['q3']:.0%})"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}"


def percent(value: float) -> str:
    return f"{value:+.1%}"

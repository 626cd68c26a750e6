"""The plot of a run: training steps by dtype and mode, what is saved for the backward, and decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from misscompile.benchmark.tables import Row, Table

COLOURS = {"misscompile": "#0b6fb8", "peft": "#d1662b"}  # told apart by colour-blind readers and by their lightness in grey
TICKS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 16.0)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def draw(tables: Iterable[Table], caption: str, files: Iterable[Path]) -> None:
    """Draw what `tables` hold into each of `files`, whose suffixes tell the formats; nothing if no table can be drawn."""
    found = {table.key: table.rows for table in tables}
    panels = list(_panels(found))
    if not panels:
        return
    rows = -(-len(panels) // 2)
    tallest = max(len(lines) for _, lines, _ in panels)
    figure = Figure(figsize=(11, rows * (1.1 + 0.32 * tallest) + 1.0), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, lines, unit) in zip(grid, panels, strict=False):
        _draw_panel(axes, title, lines, unit)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    marks = [Line2D([], [], color=colour, marker="o", linewidth=2, label=name) for name, colour in COLOURS.items()]
    marks.append(Line2D([], [], color="black", marker="|", linestyle="", markersize=13, label="floor, counted in FLOPs"))
    marks.append(Line2D([], [], color="0.5", linestyle="--", label="frozen base"))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    figure.supxlabel(f"point: median; bar: quartiles of the rounds. {caption}", fontsize=7, color="0.35", wrap=True)
    with rc_context({"svg.fonttype": "none"}):  # text that can be searched and read aloud
        for file in files:
            figure.savefig(file, dpi=150)


def _panels(found: dict[str, list[Row]]) -> Iterable[tuple[str, list[Row], str]]:
    """Title, lines and unit of each panel; a line has a label, a provider, a middle, and perhaps quartiles and a floor."""
    for (dtype, mode), rows in itertools.groupby(found.get("steps", []), lambda row: (row["dtype"], row["mode"])):
        lines = [_line(row, row["ratio"], row["floor"]) for row in rows if row["provider"] != "base"]
        yield f"Training step, {SHORT[dtype]} base, {mode}", lines, "time ÷ frozen base's"
    for (dtype, mode), rows in itertools.groupby(found.get("memory", []), lambda row: (row["dtype"], row["mode"])):
        lines = [_line(row, 1 + row["saved_over_base"]) for row in rows if row["provider"] != "base"]
        yield f"Kept for the backward, {SHORT[dtype]} base, {mode}", lines, "bytes ÷ frozen base's"
    for dtype, rows in itertools.groupby(found.get("decode", []), lambda row: row["dtype"]):
        lines = [_line(row, row["ratio"]) for row in rows if row["contestant"] != "base"]
        yield f"Decoding, {SHORT[dtype]} base, eager", lines, "time a token ÷ base's"


def _line(row: Row, value: Any, floor: float | None = None) -> Row:
    provider, _, label = row["contestant"].partition(" ")
    middle, low, high = (value["median"], value["q1"], value["q3"]) if isinstance(value, dict) else (value, value, value)
    return {"provider": provider, "label": label, "middle": middle, "low": low, "high": high, "floor": floor}


def _draw_panel(axes: Axes, title: str, lines: list[Row], unit: str) -> None:
    labels = list(dict.fromkeys(line["label"] for line in lines))
    for line in lines:
        shift = -0.17 if line["provider"] == "misscompile" else 0.17
        y = labels.index(line["label"]) + shift
        colour = COLOURS[line["provider"]]
        axes.plot([line["low"], line["high"]], [y, y], color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt")
        axes.plot(line["middle"], y, "o", color=colour, markersize=6)
        axes.annotate(
            f"{line['middle']:.2f}",
            (max(line["middle"], line["high"]), y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )
        if line["floor"] is not None:
            axes.plot(line["floor"], y, "|", color="black", markersize=13, markeredgewidth=1.4)
    values = [value for line in lines for value in (line["low"], line["high"], line["middle"])]
    low, high = min(0.97, *values) * 0.98, max(1.3, *values) * 1.12
    axes.axvline(1.0, color="0.5", linestyle="--", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    shown = [tick for tick in TICKS if tick <= high and (tick != 1.1 or high < 3)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=8)
    axes.grid(axis="x", color="0.9", zorder=-1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)

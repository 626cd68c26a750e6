"""The plot of a run: training steps by dtype and mode, what is saved for the backward, and decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from misscompile.benchmark.tables import Row, Table
from misscompile.benchmark.timing import spread

# colour and place; told apart by colour-blind readers, and by their lightness in grey
STYLES = {"misscompile": ("#0b6fb8", -0.17), "peft": ("#d1662b", 0.17)}
TICKS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 16.0)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

PLOTTED: dict[str, tuple[str, str, Callable[[Row], Row]]] = {
    "steps": ("Training step", "time ÷ frozen base's", lambda row: row["ratio"]),
    "memory": ("Kept for the backward", "bytes ÷ frozen base's", lambda row: spread([1 + row["saved_over_base"]] * 2)),
    "decode": ("Decoding", "time a token ÷ base's", lambda row: row["ratio"]),
}
"""By table: what it is about, the axis, and the spread of a row."""


def draw(tables: Iterable[Table], caption: str, files: Iterable[Path]) -> None:
    """Draw what `tables` hold into each of `files`, whose suffixes tell the formats; nothing if no table can be drawn."""
    panels = [
        (key, dtype, mode, [row for row in rows if row["contestant"] != "base"])
        for key in PLOTTED
        for table in tables
        if table.key == key
        for (dtype, mode), rows in itertools.groupby(table.rows, lambda row: (row["dtype"], row.get("mode", "eager")))
    ]
    if not panels:
        return
    height = -(-len(panels) // 2)
    tallest = max(len(rows) for *_, rows in panels)
    figure = Figure(figsize=(11, height * (1.1 + 0.32 * tallest) + 1.0), layout="constrained")
    for index, (key, dtype, mode, rows) in enumerate(panels):
        subject, unit, spread_of = PLOTTED[key]
        axes = figure.add_subplot(height, 2, index + 1)
        axes.set_title(f"{subject}, {SHORT[dtype]} base, {mode}", fontsize=10, loc="left")
        axes.set_xlabel(unit, fontsize=8)
        _draw_panel(axes, rows, [spread_of(row) for row in rows])
    marks = [Line2D([], [], color=colour, marker="o", linewidth=2, label=name) for name, (colour, _) in STYLES.items()]
    marks.append(Line2D([], [], color="black", marker="|", linestyle="", markersize=13, label="floor, counted in FLOPs"))
    marks.append(Line2D([], [], color="0.5", linestyle="--", label="frozen base"))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    figure.supxlabel(f"point: median; bar: quartiles of the rounds. {caption}", fontsize=7, color="0.35", wrap=True)
    with rc_context({"svg.fonttype": "none"}):  # text that can be searched and read aloud
        for file in files:
            figure.savefig(file, dpi=150)


def _draw_panel(axes: Axes, rows: list[Row], spreads: list[Row]) -> None:
    names = [row["contestant"].split(" ", 1) for row in rows]
    labels = list(dict.fromkeys(label for _, label in names))
    for (provider, label), row, value in zip(names, rows, spreads, strict=True):
        colour, shift = STYLES[provider]
        y, middle, ends = labels.index(label) + shift, value["median"], (value["q1"], value["q3"])
        axes.plot(ends, [y, y], color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt")
        axes.plot(middle, y, "o", color=colour, markersize=6)
        place: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{middle:.2f}", (max(middle, *ends), y), color=colour, fontsize=8, **place)
        if "floor" in row:
            axes.plot(row["floor"], y, "|", color="black", markersize=13, markeredgewidth=1.4)
    values = [value[part] for value in spreads for part in ("median", "q1", "q3")]
    low, high = min(0.97, *values) * 0.98, max(1.3, *values) * 1.12
    axes.axvline(1.0, color="0.5", linestyle="--", linewidth=1, zorder=0)
    axes.set(xscale="log", xlim=(low, high), ylim=(len(labels) - 0.45, -0.55))
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick <= high and (tick != 1.1 or high < 3)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(axis="x", color="0.9", zorder=-1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)

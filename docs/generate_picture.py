"""Draw docs/architecture.svg, the way of the data and the rooms: `python docs/generate_picture.py`."""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).with_name("architecture.svg")
FIXED = """
  text { font: 14px system-ui, sans-serif; text-anchor: middle } .small { font-size: 12px }
  .left { text-anchor: start } .right { text-anchor: end } .bold { font-weight: 600 }
  .arrow { stroke-width: 1.5; fill: none; marker-end: url(#head) } .brace { stroke-dasharray: 4 4; fill: none }
"""
LIGHT = {"card": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "line": "#818b98"} | {
    "user": "#eef0f3",
    "read": "#ddf0ff",
    "write": "#ffe9d4",
}
DARK = {"card": "#161b22", "ink": "#f0f6fc", "soft": "#b1bac4", "line": "#8b949e"} | {
    "user": "#30363d",
    "read": "#17395c",
    "write": "#5a3413",
}
ROOMS = [
    ("verbs", "what a user calls: adapt, switch, merge, save, dump"),
    ("hosts", "a module tree or a whole graph, behind one interface"),
    ("passes", "graph to graph: find, insert, strip, unshare"),
    ("kernels", "how a device computes it"),
    ("variants", "the algebra: balance, mini, bat"),
    ("record", "site, block, plan; the record on an owner"),
    ("rules", "which names a config chooses"),
]
WIDTH, HEIGHT = 960, 650


def box(x: int, y: int, kind: str, title: str, *small: str, width: int = 150, height: int = 62) -> str:
    """A box around `(x, y)`, with a title and small lines below it."""
    top = y - 8 * len(small) + 5
    text = f'<text class="bold" x="{x}" y="{top}">{title}</text>'
    text += "".join(f'<text class="small" x="{x}" y="{top + 17 * n}">{line}</text>' for n, line in enumerate(small, 1))
    frame = f'x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="8"'
    return f'<rect class="box {kind}" {frame}/>{text}\n'


def arrow(path: str) -> str:
    """A line with a head at its end."""
    return f'<path class="arrow" d="{path}"/>\n'


def label(x: int, y: int, text: str, kind: str = "small") -> str:
    """A line of text without a box."""
    return f'<text class="{kind}" x="{x}" y="{y}">{text}</text>\n'


def colours(palette: dict[str, str]) -> str:
    """The rules that depend on the palette; written out, since not every viewer knows variables."""
    rules = [f".{kind} {{ fill: {palette[kind]} }}" for kind in ("card", "user", "read", "write")]
    rules += [f"text {{ fill: {palette['ink']} }} .small {{ fill: {palette['soft']} }} .head {{ fill: {palette['line']} }}"]
    return " ".join([*rules, f".box, .arrow, .brace {{ stroke: {palette['line']} }}"])


def draw() -> str:
    """The picture."""
    parts = [label(480, 34, "adapt(model, config)", "bold")]
    parts.append('<rect class="brace" x="196" y="54" width="748" height="190" rx="10"/>\n')
    parts.append(label(906, 234, "nothing is changed", "small right"))
    row, second = 102, 312
    parts += [box(96, row, "user", "model", "module or graph", width=136)]
    parts += [
        box(x, row, "read", t, s) for x, t, s in ((288, "host", "hosts"), (478, "names", "hosts"), (668, "rules", "rules"))
    ]
    parts += [box(858, row, "read", "plan", "verbs: all is checked")]
    parts += [box(478, 202, "read", "find", "passes: sites, or refusals with reasons", width=300, height=56)]
    parts += [arrow(f"M{x} {row} h{w}") for x, w in ((164, 45), (363, 36), (553, 36), (743, 36))]
    parts += [arrow("M288 133 V202 H324"), arrow("M628 202 H858 V137"), arrow("M920 133 V312 H844")]
    parts.append('<rect class="brace" x="196" y="264" width="670" height="96" rx="10"/>\n')
    parts.append(label(530, 380, "all or nothing: undone as a whole if anything raises"))
    parts += [box(760, second, "write", "register", "hosts: blocks, record", width=160)]
    parts += [box(530, second, "write", "insert", "passes: updates in the graph", width=190)]
    parts += [box(300, second, "write", "install", "hosts: class or graph", width=160)]
    parts += [box(96, second, "user", "model, adapted", "the same object", "(a graph: a new one)", width=148, height=74)]
    parts += [arrow("M680 312 H629"), arrow("M435 312 H384"), arrow("M220 312 H174")]
    parts += [box(96, 432, "write", "merge", "fold, drop the blocks", width=160), arrow("M96 349 V397")]
    parts += [box(96, 532, "user", "plain weights", width=148, height=46), arrow("M96 463 V505")]
    parts += [box(96, 604, "read", "dump, save", "read any of it", width=148, height=52)]
    top = 420
    parts.append(label(236, top - 6, "The rooms: imports go down only", "bold left"))
    for index, (name, purpose) in enumerate(ROOMS):
        y = top + 8 + 28 * index
        parts.append(f'<rect class="box user" x="236" y="{y}" width="500" height="24" rx="5"/>')
        parts.append(label(250, y + 17, name, "bold left") + label(340, y + 17, purpose, "small left"))
    parts.append(f'<rect class="box user" x="752" y="{top + 36}" width="112" height="136" rx="5"/>')
    parts += [
        label(808, top + 92, "storage", "bold"),
        label(808, top + 112, "files; above"),
        label(808, top + 128, "rules only"),
    ]
    parts.append(arrow(f"M892 {top + 10} V{top + 196}"))
    parts.append(label(486, 642, "above verbs: the public names, benchmark, cli. below rules: errors."))
    head = '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>\n'
    card = f'<rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="12"/>\n'
    attributes = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    style = f"<style>{FIXED}  {colours(LIGHT)}\n  @media (prefers-color-scheme: dark) {{ {colours(DARK)} }}\n</style>\n"
    title = "<title>The way of the data, and the rooms</title>\n"
    return f"<svg {attributes}>\n{title}{style}{head}{card}{''.join(parts)}</svg>\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")

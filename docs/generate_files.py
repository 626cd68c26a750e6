"""Renew the table of files in docs/architecture.md from the first sentence of each file's docstring: `make api`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
ROOMS = ["cli", "benchmark", "verbs", "hosts", "passes", "kernels", "variants", "record", "storage", "rules", "errors"]
"""From top to bottom."""
START, END = "<!-- made by docs/generate_files.py -->\n", "<!-- end -->\n"


def render() -> str:
    """The page with its table renewed."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    rows = [_row(ROOT / "misscompile/__init__.py")]
    for room in ROOMS:
        folder = ROOT / ("passes" if room == "passes" else f"misscompile/{room}")
        files = sorted(folder.rglob("*.py"), key=lambda file: (file.parent, file.name != "__init__.py", file.name))
        rows += [_row(file) for file in files or [folder.with_suffix(".py")]]
    table = "| file | its one purpose |\n|---|---|\n" + "".join(rows)
    return f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}"


def _row(file: Path) -> str:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    purpose = " ".join(doc.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".:").replace("|", r"\|") + "."
    path = file.relative_to(ROOT).as_posix()
    folder = path.removesuffix("__init__.py")
    return f"| **`{folder}`** | **{purpose}** |\n" if folder != path else f"| `{path}` | {purpose} |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

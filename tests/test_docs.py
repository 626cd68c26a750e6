"""The pages say what the code is: generated parts are current, what they name exists, and imports go down."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]

RANKS = ["__main__", "cli", "benchmark", "misscompile", "verbs", "hosts", "passes", "kernels", "variants", "record"]
RANKS += ["rules", "errors"]
"""From top to bottom; `misscompile` is the `__init__` with the public names."""
BELOW = {room: {*RANKS[rank + 1 :]} for rank, room in enumerate(RANKS)}
BELOW["storage"] = {"rules", "errors"}
for _room in ("cli", "benchmark", "verbs"):
    BELOW[_room].add("storage")


@pytest.mark.parametrize("script", ["generate_api", "generate_files"])
def test_a_generated_page_is_current(script: str) -> None:
    names = runpy.run_path(str(ROOT / f"docs/{script}.py"))
    page: Path = names["PAGE"]
    is_current = page.read_text(encoding="utf-8") == names["render"]()
    assert is_current, f"docs/{page.name} is not what the docstrings say now. Run: make api"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_what_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    files = re.findall(r"(?<![\w/.-])((?:misscompile|passes|tests|examples|docs)/[\w./-]*[\w/])", text)
    missing += [name for name in files if not (ROOT / name).exists()]
    missing += [name for name in re.findall(r"(?<![\w./])misscompile(?:\.\w+)+", text) if not _resolves(name)]
    assert not missing


def _resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_the_numbers_against_peft_are_those_of_the_last_run(page: str) -> None:
    printed = set(_numbers((ROOT / "docs/bench/bench.md").read_text(encoding="utf-8")))
    rows = re.findall(
        r"^\|.*\bmisscompile\b.*\bPEFT\b.*\n\|[-|: ]*\n((?:\|.*\n)+)", (ROOT / page).read_text(), flags=re.MULTILINE
    )
    assert rows
    cells = [cell for table in rows for row in table.splitlines() for cell in row.split("|")[2:]]
    unknown = [number for cell in cells for number in _numbers(cell) if number not in printed]
    assert not unknown, f"docs/bench/bench.md has no {unknown}: copy the numbers of the last run into {page}"


def _numbers(text: str) -> list[str]:
    return re.findall(r"[+-]?\d+(?:\.\d+)?%?", text)


def test_the_hooks_use_the_linter_of_the_constraints() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    rev = re.search(r"ruff-pre-commit\n\s+rev: v(.+)", hooks)
    assert rev is not None
    assert f"ruff=={rev[1]}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@functools.cache
def modules() -> dict[str, Path]:
    """Every file of the package by the name under which it is imported."""
    found = {}
    for folder, prefix in ((ROOT / "misscompile", "misscompile"), (ROOT / "passes", "misscompile.passes")):
        for file in folder.rglob("*.py"):
            parts = [part for part in file.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[".".join([prefix, *parts])] = file
    return found


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    """Every module of this package that a file imports, inside functions too, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names if name.name.partition(".")[0] == "misscompile")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            if node.module and node.module.partition(".")[0] == "misscompile":
                for name in node.names:
                    inner = f"{node.module}.{name.name}"
                    yield inner if inner in modules() else node.module, node.lineno


def room_of(module: str) -> str:
    """The room of a module: its folder, or the file itself beside the rooms."""
    return module.split(".")[1] if "." in module else module


def test_imports_between_rooms_go_down() -> None:
    known, wrong = modules(), []
    for module, file in known.items():
        room = room_of(module)
        assert room in BELOW, f"{module}: no room of this name; add it to RANKS and to docs/architecture.md"
        for imported, line in imports_of(file):
            where = f"{file.relative_to(ROOT)}:{line} imports {imported}"
            if imported not in known:
                wrong.append(f"{where}, which does not exist")
            elif room_of(imported) not in {room, *BELOW[room]}:
                wrong.append(f"{where}: {room} is not above {room_of(imported)}")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_through_others() -> None:
    known = modules()
    edges = {module: {name for name, _ in imports_of(file) if name in known} for module, file in known.items()}
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a cycle of imports: {json.dumps(error.args[1])}") from None


def test_the_rules_need_no_torch() -> None:
    for file in (ROOT / "misscompile/rules").glob("*.py"):
        assert not re.search(r"^\s*(import|from) torch\b", file.read_text(encoding="utf-8"), flags=re.MULTILINE), file

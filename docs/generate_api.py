"""Write docs/api.md from the docstrings of everything that `misscompile` exports: `make api`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import misscompile

PAGE = Path(__file__).with_name("api.md")
ROOMS = ("verbs", "hosts", "rules", "errors")
HEAD = """# API

Everything that `misscompile` exports. The page is made of the docstrings by `docs/generate_api.py`; `make api` renews it.

| name | what it is |
|---|---|
"""


def render() -> str:
    """The page: a table of all names, then one part for each file that defines some of them."""
    exported = {name: getattr(misscompile, name) for name in misscompile.__all__}
    parts: dict[str, list[str]] = {}
    for name, value in sorted(exported.items(), key=lambda item: _place(item[1].__module__)):
        parts.setdefault(value.__module__, []).append(f"### `{name}`\n\n{_describe(value)}\n")
    table = [f"| `{name}` | {_first_sentence(inspect.getdoc(value) or '')} |\n" for name, value in exported.items()]
    return HEAD + "".join(table) + "".join(f"\n## {_link(module)}\n\n" + "\n".join(of) for module, of in parts.items())


def _place(module: str) -> tuple[int, str]:
    return ROOMS.index(module.split(".")[1]), module


def _link(module: str) -> str:
    path = module.replace(".", "/") + ".py"
    return f"[{path}](../{path})"


def _describe(value: Any) -> str:
    doc = _markdown(inspect.getdoc(value) or "")
    if isinstance(value, type) and issubclass(value, Exception):
        return f"{doc} A kind of {', '.join(f'`{base.__name__}`' for base in value.__bases__)}."
    lines = [f"```python\n{_signature(value)}\n```\n", doc]
    for name, member in vars(value).items() if isinstance(value, type) else ():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            call = (
                "" if isinstance(member, property) else re.sub(r"^\((self|cls),? ?", "(", str(inspect.signature(function)))
            )
            lines.append(f"\n**`{name}{_plain(call)}`**\n\n{_markdown(inspect.getdoc(function) or '')}")
    return "\n".join(lines)


def _signature(value: Any) -> str:
    """On one line, or on one for each argument."""
    text = _plain(f"{value.__name__}{inspect.signature(value)}")
    arguments, _, result = text.partition("(")[2].rpartition(")")
    several = "".join(f"    {argument},\n" for argument in re.split(r", (?=\w+:|\*)", arguments))
    return text if len(text) <= 100 else f"{value.__name__}(\n{several}){result}"


def _plain(signature: str) -> str:
    """A signature with its annotations as in the source, without the quotes of strings."""
    return re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", signature).removesuffix(" -> None")


def _markdown(doc: str) -> str:
    """A docstring with its sections as lists."""
    doc = re.sub(r"^(Args|Returns|Raises|Yields):$", r"**\1**\n", doc, flags=re.MULTILINE)
    doc = re.sub(r"^    (\w[\w, ]*):\s+", lambda m: f"- `{m[1].replace(', ', '`, `')}`: ", doc, flags=re.MULTILINE)
    return re.sub(r"^    ( *)", lambda m: "  " if m[1] else "", doc, flags=re.MULTILINE).rstrip()


def _first_sentence(doc: str) -> str:
    text = " ".join(doc.partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".").replace("|", r"\|") + "."


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

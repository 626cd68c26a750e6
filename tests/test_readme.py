"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run_block(index: int) -> dict[str, Any]:
    """The names that one Python block of the README leaves."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(blocks[index], "README.md", "exec"), names)
    return names


def test_the_twenty_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_block(0)
    assert "trainable params:" in capsys.readouterr().out
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "out/merged/model.safetensors").is_file()
    assert not [name for name, _ in names["model"].named_parameters() if "miss" in name]


def test_the_whole_graph_runs() -> None:
    names = run_block(1)
    graph, merged = names["graph"], names["adapted"]
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in graph.named_parameters()]
    assert merged.code == graph.code

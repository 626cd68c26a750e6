"""The command: what it refuses and how it says so, and the files it leaves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner
from zoo import tiny_llama

from misscompile.benchmark.contestants import build_model
from misscompile.benchmark.settings import BenchmarkError, Settings
from misscompile.cli import app

QUICK = ["--model", "tiny", "--tokens", "16", "--r", "4", "--rounds", "2", "--dtype", "float32", "--modes", "eager"]


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["bench", *QUICK, *options])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16, float16, float32"]),
        (["--variants", "balance,bone"], ["--variants", "bone", "balance, bat, mini"]),
        (["--variants", ""], ["--variants", "empty"]),
        (["--against", "dora"], ["--against", "dora", "peft, lora"]),
        (["--modes", "fast"], ["--modes", "fast", "eager, compiled"]),
        (["--sections", "step"], ["--sections", "step", "steps, memory, adapt"]),
        (["--rounds", "1"], ["--rounds 1", "2 or more"]),
        (["--tokens", "0"], ["--tokens 0"]),
        (["--threads", "0"], ["--threads 0"]),
        (["--device", "warp"], ["--device", "warp"]),
        (["--model", "/no/such/folder", "--sections", "steps"], ["--model", "/no/such/folder", "yardstick", "tiny"]),
        (["--r", "64", "--sections", "adapt"], ["r=64", "32 input features"]),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_option(options: list[str], words: list[str]) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_a_missing_extra_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    result = run()
    assert result.exit_code == 2
    assert result.stderr == "misscompile bench: matplotlib not installed: run `pip install 'misscompile[bench]'`.\n"


def test_a_run_prints_its_machine_and_writes_json_tables_and_plots(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "new" / "folder"
    result = run("--sections", "steps,memory,decode", "--variants", "mini", "--threads", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    content = json.loads((out / "bench.json").read_text())
    expected = {"threads": 1, "torch": torch.__version__, "transformers": transformers.__version__}
    assert content["machine"] | expected == content["machine"]
    assert content["settings"]["variants"] == ["mini"]
    assert set(content["seconds"]) == set(content["tables"]) == {"steps", "memory", "decode"}
    markdown = (out / "bench.md").read_text()
    for text in (result.stdout, markdown):
        words = ("cores", "1 threads", "Training step", "peft mini", "Decoding")
        assert all(word in " ".join(text.split()) for word in words)
    assert markdown.count("| misscompile mini |") == 3
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    drawn = ("Training step, fp32 base, eager", "Kept for the backward", "Decoding", "frozen base", "floor")
    assert all(text in (out / "bench.svg").read_text() for text in drawn)


def test_a_folder_is_a_model_and_its_weights_are_read_and_frozen(tmp_path: Path) -> None:
    saved = tiny_llama()
    saved.save_pretrained(tmp_path)
    model = build_model(str(tmp_path), "float32")
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=0, check_stride=False)


def test_only_the_yardstick_leaves_the_shape_to_the_section() -> None:
    assert Settings().model_of("smollm2-135m") == "smollm2-135m"
    assert Settings(model="tiny").model_of("smollm2-135m") == "tiny"
    with pytest.raises(BenchmarkError, match="--mini-r 0"):
        Settings(mini_r=0)

"""The command line: `misscompile <command>`, or `python -m misscompile <command>`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

from misscompile.errors import MissError

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    raise SystemExit(f"misscompile: {error.name} is not installed: run `pip install typer rich`.") from error

app = typer.Typer(
    name="misscompile",
    help="MiSS fine-tuning as a compiler for torch models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BENCH_NEEDS = ("transformers", "peft", "sympy", "matplotlib")
WIDTH = 140
"""Columns of output that goes to a file or a pipe."""


@app.callback()
def main() -> None:
    """MiSS fine-tuning as a compiler for torch models."""


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="yardstick, another preset (smollm2-135m, tiny), or the folder or Hub id of a model.")
    ] = "yardstick",
    dtype: Annotated[str, typer.Option(help="Dtypes of the base, separated by commas.")] = "bfloat16,float32",
    variants: Annotated[str, typer.Option(help="Variants of MiSS, separated by commas.")] = "balance,mini,bat",
    against: Annotated[str, typer.Option(help="What to compare with: peft (its MiSS), lora, or ''.")] = "peft,lora",
    modes: Annotated[str, typer.Option(help="eager, compiled or both.")] = "eager,compiled",
    sections: Annotated[
        str, typer.Option(help="What to measure: all, or some of steps,memory,adapt,compile,decode,merge,growth,fusion.")
    ] = "all",
    device: Annotated[str, typer.Option(help="Any device of torch's: cpu, cuda, mps, …")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Rounds after the warm-up, in each of which every candidate runs once.")] = 10,
    tokens: Annotated[int, typer.Option(help="Tokens of a training step.")] = 1024,
    r: Annotated[int, typer.Option("--r", help="Rank; LoRA gets half of it, for as many parameters.")] = 64,
    mini_r: Annotated[int, typer.Option("--mini-r", help="Width of mini's block.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of torch's CPU kernels.")] = 2,
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench.json, bench.md, bench.png and bench.svg.", file_okay=False)
    ] = None,
) -> None:
    """Measure misscompile, PEFT and the frozen base in turn: steps, memory, adapting, compiling, decoding, merging."""
    try:
        missing = [package for package in BENCH_NEEDS if importlib.util.find_spec(package) is None]
        if missing:
            raise MissError(f"{', '.join(missing)} not installed: run `pip install 'misscompile[bench]'`.")
        from misscompile.benchmark.report import report
        from misscompile.benchmark.settings import SECTIONS, Settings

        settings = Settings(
            model=model,
            dtypes=_split(dtype),
            variants=_split(variants),
            against=_split(against),
            modes=_split(modes),
            sections=SECTIONS if sections == "all" else _split(sections),
            device=device,
            rounds=rounds,
            tokens=tokens,
            r=r,
            mini_r=mini_r,
            threads=threads,
        )
        console = Console()
        report(settings, out, console if console.is_terminal else Console(width=WIDTH))
    except MissError as error:
        typer.echo(f"misscompile bench: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def _split(names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))

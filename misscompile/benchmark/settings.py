"""What a run of the benchmark measures: the options of the command, checked before anything runs."""

from __future__ import annotations

import dataclasses

import torch

from misscompile.errors import MissError

VARIANTS: dict[str, bool | str] = {"balance": True, "bat": "bat", "mini": "mini"}
"""The variants of MiSS, each with its `init_weights` in the configurations of misscompile and of PEFT."""
RIVALS = ("peft", "lora")
MODES = ("eager", "compiled")
SECTIONS = ("steps", "memory", "adapt", "compile", "decode", "merge", "growth", "fusion")
DTYPES = ("bfloat16", "float16", "float32")


class BenchmarkError(MissError, ValueError):
    """An option of the benchmark cannot be used, or something that it needs is not installed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `misscompile bench`, which describes them; every value is checked when the object is made.

    With the default model, each section takes the shape that is customary for it; any other is used throughout.

    Raises:
        BenchmarkError: a value cannot be used; the message names the option and what would do.
    """

    model: str = "yardstick"
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    variants: tuple[str, ...] = ("balance", "mini", "bat")
    against: tuple[str, ...] = RIVALS
    modes: tuple[str, ...] = MODES
    sections: tuple[str, ...] = SECTIONS
    device: str = "cpu"
    rounds: int = 10
    tokens: int = 1024
    r: int = 64
    mini_r: int = 8
    threads: int = 2

    def __post_init__(self) -> None:
        for option, names, known in (
            ("--dtype", self.dtypes, DTYPES),
            ("--variants", self.variants, VARIANTS),
            ("--against", self.against, RIVALS),
            ("--modes", self.modes, MODES),
            ("--sections", self.sections, SECTIONS),
        ):
            problems = [repr(name) for name in names if name not in known]
            if not names and option != "--against":
                problems = ["is empty"]
            for problem in problems:
                raise BenchmarkError(f"{option} {problem}: expected one or more of {', '.join(known)}, separated by commas.")
        for name, least in {"rounds": 2, "tokens": 2, "r": 1, "mini_r": 1, "threads": 1}.items():
            if getattr(self, name) < least:
                raise BenchmarkError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {least} or more.")
        try:
            torch.empty(1, device=torch.device(self.device))
        except (RuntimeError, AssertionError) as error:  # CUDA that is not compiled in is an AssertionError
            reason = str(error).strip().splitlines()[0]
            raise BenchmarkError(f"--device {self.device!r} cannot be used here: {reason}") from error

    def model_of(self, customary: str) -> str:
        """The model of a section whose customary one is `customary`: that, unless the user named a model."""
        return customary if self.model == "yardstick" else self.model

"""What a run of the benchmark measures: the options of the command, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from misscompile.config import Variant
from misscompile.errors import MissError

Mode = Literal["eager", "compiled"]
Rival = Literal["peft", "lora"]
SectionName = Literal["steps", "memory", "adapt", "compile", "decode", "merge", "growth", "fusion"]

VARIANTS: tuple[str, ...] = get_args(Variant)
MODES: tuple[str, ...] = get_args(Mode)
RIVALS: tuple[str, ...] = get_args(Rival)
SECTIONS: tuple[str, ...] = get_args(SectionName)
DTYPES = ("bfloat16", "float16", "float32")

YARDSTICK = "yardstick"


class BenchmarkError(MissError, ValueError):
    """An option of the benchmark cannot be used, or something that it needs is not installed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a run; every value is checked when the object is made.

    Args:
        model: a preset of `models.PRESETS`, or the folder or Hub id of a causal language model. With the default,
            "yardstick", each section takes the shape that is customary for it; any other model is used throughout.
        dtypes: dtypes of the base; adapters are float32 wherever the base is 16-bit.
        variants: which of balance, mini and bat.
        against: "peft" for PEFT's MiSS of the same variants, "lora" for PEFT's LoRA of equal parameters; may be empty.
        modes: "eager", "compiled" (`torch.compile`) or both.
        sections: what to measure.
        device: where the models run.
        rounds: rounds after the warm-up; in each, all candidates take their turn.
        tokens: tokens of a training step (batch 1).
        r, mini_r: rank, and the width of mini's block.
        threads: threads of torch's CPU kernels.

    Raises:
        BenchmarkError: a value cannot be used; the message names the option and what would do.
    """

    model: str = YARDSTICK
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
        _check_names("--dtype", self.dtypes, DTYPES, required=True)
        _check_names("--variants", self.variants, VARIANTS, required=True)
        _check_names("--against", self.against, RIVALS)
        _check_names("--modes", self.modes, MODES, required=True)
        _check_names("--sections", self.sections, SECTIONS, required=True)
        for option, value, least in (
            ("--rounds", self.rounds, 2),
            ("--tokens", self.tokens, 2),
            ("--r", self.r, 1),
            ("--mini-r", self.mini_r, 1),
            ("--threads", self.threads, 1),
        ):
            if value < least:
                raise BenchmarkError(f"{option} {value}: expected {least} or more.")
        _check_device(self.device)

    def with_rank(self, r: int) -> Settings:
        """These settings with another rank."""
        return dataclasses.replace(self, r=r)

    def preset(self, customary: str) -> str:
        """The model of a section whose customary shape is `customary`: that, unless the user named a model."""
        return customary if self.model == YARDSTICK else self.model


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of an entry of `DTYPES`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_names(option: str, names: Sequence[str], known: Sequence[str], required: bool = False) -> None:
    for name in names:
        if name not in known:
            raise BenchmarkError(f"{option} {name!r}: expected one or more of {', '.join(known)}, separated by commas.")
    if required and not names:
        raise BenchmarkError(f"{option} is empty: expected one or more of {', '.join(known)}, separated by commas.")


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # CUDA that is not compiled in is an AssertionError
        reason = str(error).strip().splitlines()[0]
        raise BenchmarkError(f"--device {name!r} cannot be used here: {reason}") from error

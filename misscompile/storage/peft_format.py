"""PEFT's adapter folder as files: names, headers, tensors and configs, with no model in it.

Nothing is ever unpickled. Names, shapes and dtypes are known from the safetensors header before a tensor is read.
A *name* here is a key without the prefix `base_model.model.`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from misscompile.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, MissError
from misscompile.rules.config import PEFT_TYPE, MissConfig
from misscompile.rules.names import strip_wrappers
from misscompile.storage.atomic_files import replace_files

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
BLOCK = "miss_block"
DTYPES = ("F64", "F32", "F16", "BF16")
_REPEATS = "repeats"
"""Key of the header's metadata: which tensors stand under another name of their module too, as JSON."""
_BONE_BLOCK = "bone_block"  # MiSS's name before it was published
_PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file, known from its header alone."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    repeats: bool = False
    """Whether the file says that the tensor stands under another name of its module too."""

    def error(self, what: str) -> CheckpointError:
        """The error that says `what` of this entry."""
        return CheckpointError(f"{self.path}: key {self.key!r} {what}")

    def check(self, shape: tuple[int, ...], is_floating: bool, shape_told: str, dtype_told: str) -> None:
        """Refuse another shape, and a dtype that is no float where one is needed. The texts say what would fit."""
        if self.shape != shape:
            raise self.error(f"has shape {self.shape}{shape_told}")
        if is_floating and self.dtype not in DTYPES:
            raise self.error(f"has dtype {self.dtype}{dtype_told}")


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], repeats: Sequence[str] = ()
) -> None:
    """Write the two files of an adapter folder, both or neither. `tensors` are given by name.

    `repeats` are names of tensors that stand under another name too.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: an adapter is saved into a folder, and this is a file.")
    for name, value in tensors.items():
        if value.is_meta:
            raise CheckpointError(f"{PREFIX}{name}: it is on the meta device and has no values to save.")
    # safetensors refuses tensors that share memory
    values = {PREFIX + name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "pt"} | ({_REPEATS: json.dumps([PREFIX + name for name in repeats])} if repeats else {})
    replace_files(folder, {WEIGHTS_FILE: save(values, metadata=metadata), CONFIG_FILE: text.encode()})


def find_folder(folder: object, revision: str | None = None) -> Path:
    """The local folder of an adapter, downloaded from the Hub where `folder` is the id of a repository."""
    path = to_path(folder, "folder")
    if path.is_dir() or not isinstance(folder, str) or not _HUB_ID.fullmatch(folder):
        return path
    try:
        from huggingface_hub import snapshot_download  # optional
    except ImportError:
        return path
    try:
        return Path(snapshot_download(folder, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (OSError, ValueError) as error:  # the Hub's own errors are OSErrors
        raise CheckpointNotFoundError(
            f"{folder}: there is no such folder, and no such repository could be reached on the Hub ({error})."
        ) from error


def read_config(folder: Path) -> MissConfig:
    """The config of an adapter folder, of MiSS or of Bone."""
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: there is no such folder; pass one written by save_adapter or by PEFT.")
    path = folder / CONFIG_FILE
    if not path.is_file():
        inside = sorted(child.name for child in folder.iterdir() if (child / CONFIG_FILE).is_file())
        hint = f"; adapters are in its subfolders {inside}" if inside else ""
        raise CheckpointNotFoundError(f"{path}: not found{hint}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise CheckpointError(f"expected a JSON object, found {type(values).__name__}.")
        if values.get("peft_type") == "BONE":
            values["peft_type"] = PEFT_TYPE
        return MissConfig.from_dict(values)
    except (ValueError, MissError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_entries(path: Path) -> list[Entry]:
    """Every tensor of a safetensors file, without reading one."""
    if not path.is_file():
        pickles = [name for name in _PICKLE_FILES if (path.parent / name).is_file()]
        hint = f" There is {pickles[0]}, but pickles are never read: save it with safetensors first." if pickles else ""
        raise CheckpointNotFoundError(f"{path}: not found.{hint}")
    with _open(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        repeats = json.loads((file.metadata() or {}).get(_REPEATS, "[]"))
        return [
            Entry(path, key, tuple(part.get_shape()), str(part.get_dtype()), key in repeats) for key, part in slices.items()
        ]


@torch.inference_mode(False)  # a block may be the tensor that was read
def read_tensors(entries: Mapping[K, Entry]) -> dict[K, Tensor]:
    """The tensors of entries of one file, mapped into memory."""
    if not entries:
        return {}
    with _open(next(iter(entries.values())).path) as file:
        return {name: file.get_tensor(entry.key) for name, entry in entries.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}).") from error


def strip_key(key: str) -> str:
    """The name in a key: without PEFT's prefix and what wrappers add, and with Bone's block called MiSS's."""
    name = strip_wrappers(key).removeprefix(PREFIX)
    return name.removesuffix(_BONE_BLOCK) + BLOCK if name.endswith(_BONE_BLOCK) else name


def to_path(value: object, argument: str) -> Path:
    """The path that a user gave as `argument`."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"{argument}: expected a path, found {type(value).__name__}.")
    return Path(value)

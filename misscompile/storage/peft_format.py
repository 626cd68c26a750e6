"""PEFT's adapter folder as files: names, headers, tensors and configs, with no model in it.

Nothing is ever unpickled; names, shapes and dtypes are known from the safetensors header before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from misscompile.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, MissError
from misscompile.rules.config import PEFT_TYPE, MissConfig
from misscompile.storage.atomic_files import replace_files

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
PREFIX = "base_model.model."
BLOCK = "miss_block"
BLOCK_NAMES = (BLOCK, "bone_block")
DTYPES = ("F64", "F32", "F16", "BF16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Header = dict[str, tuple[tuple[int, ...], str]]
"""Key to shape and dtype name."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file, known from its header alone."""

    key: str
    shape: tuple[int, ...]
    dtype: str


def write_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the two files of an adapter folder, both or neither."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    replace_files(path, {WEIGHTS_FILE: save(dict(tensors), metadata={"format": "pt"}), CONFIG_FILE: text.encode()})


def find_folder(folder: object, revision: str | None = None) -> Path:
    """The local folder of an adapter, downloaded from the Hub where `folder` is the id of a repository.

    Raises:
        ArgumentError, CheckpointNotFoundError: it is no path, or there is no such folder or repository.
    """
    path = to_path(folder)
    if path.is_dir() or not isinstance(folder, str) or not _HUB_ID.fullmatch(folder):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        return path
    try:
        return Path(snapshot_download(folder, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointNotFoundError(
            f"{folder}: there is no such folder, and no such repository could be reached on the Hub ({error})."
        ) from error


def read_config(folder: Path) -> MissConfig:
    """The config of an adapter folder.

    Raises:
        CheckpointNotFoundError, CheckpointError: it is missing, damaged, or of another method.
    """
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
        if values.get("peft_type") == "BONE":  # MiSS's name before it was published
            values = values | {"peft_type": PEFT_TYPE}
        return MissConfig.from_dict(values)
    except (ValueError, MissError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_header(path: Path) -> Header:
    """Shape and dtype name of every tensor in a safetensors file, without reading one.

    Raises:
        CheckpointNotFoundError, CheckpointError: it is missing, truncated, or no safetensors file.
    """
    if not path.is_file():
        pickles = [name for name in _PICKLE_FILES if (path.parent / name).is_file()]
        hint = f" There is {pickles[0]}, but pickles are never read: save it with safetensors first." if pickles else ""
        raise CheckpointNotFoundError(f"{path}: not found.{hint}")
    with open_tensors(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an adapter folder, with the keys as `save_adapter` writes them."""
    path = folder / WEIGHTS_FILE
    keys = read_header(path)
    with open_tensors(path) as file:
        return {f"{PREFIX}{strip_key(key)}": file.get_tensor(key) for key in keys}


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped into memory.

    Raises:
        CheckpointError: it is damaged or of another kind.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}).") from error


def strip_key(key: str) -> str:
    """A key without PEFT's prefix and what a compiled wrapper adds, and with the block's own name where it was Bone's."""
    plain = key.replace("_orig_mod.", "").removeprefix(PREFIX)
    return plain.removesuffix(BLOCK_NAMES[1]) + BLOCK if plain.endswith(BLOCK_NAMES[1]) else plain


def to_path(folder: object) -> Path:
    """`folder` as a path.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(f"folder: expected a path, found {type(folder).__name__}.")
    return Path(folder)

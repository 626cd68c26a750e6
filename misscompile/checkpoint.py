"""Adapters on disk, in PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<module path>.miss_block`. Nothing is ever unpickled; names, shapes and dtypes are checked
from the safetensors header before a tensor is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from misscompile import variants
from misscompile.adapting import install_plan
from misscompile.config import MissConfig
from misscompile.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, MissError
from misscompile.files import replace_files
from misscompile.passes.register import create_blocks
from misscompile.plan import Plan
from misscompile.planning import check_adapter_name, plan_adapter
from misscompile.state import STATE, owners, require_adapter, unwrap_model
from misscompile.targets import closest

M = TypeVar("M", bound=nn.Module)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_PREFIX = "base_model.model."
_BLOCK = "miss_block"
_DTYPES = ("F64", "F32", "F16", "BF16")

Header = dict[str, tuple[tuple[int, ...], str]]
"""Key to shape and dtype name."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write one adapter so that `load_adapter` and `peft.PeftModel.from_pretrained` read it.

    The two files appear together: a crash at any moment leaves the old folder whole. Other files in it are kept.

    Args:
        model: an adapted model, or a wrapper around it.
        folder: created where needed.
        adapter_name: the adapter to write.

    Raises:
        UnknownAdapterError: the model has no such adapter.
        CheckpointError: a block is on the meta device, or `folder` is a file.
        OSError: the disk is full or not writable.
    """
    root, path = unwrap_model(model), _folder(folder)
    adapter = require_adapter(root, adapter_name)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: an adapter is saved into a folder, and this is a file.")
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    for name, owner in owners(root).items():
        block = vars(owner)[STATE].blocks.get(adapter_name)
        if block is not None:
            value = owner.get_parameter(block.parameter).detach()
            if value.is_meta:
                raise CheckpointError(f"{name}: its block is on the meta device and has no values to save.")
            names.append(name)
            tensors[_key(name)] = value.cpu().contiguous().clone()
    config = _config_to_write(root, adapter.config, names)
    replace_files(
        path,
        {
            WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
            CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        },
    )


def load_adapter(model: M, folder: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False) -> M:
    """Put a saved adapter on `model` in place and make it the active one.

    Args:
        model: a plain or adapted model of the architecture that the adapter was trained on.
        folder: written by `save_adapter` or by PEFT.
        adapter_name: the name it gets here; not in use on this model.
        is_trainable: let its blocks require gradients.

    Returns:
        `model`, the same object.

    Raises:
        CheckpointNotFoundError: the folder or one of its files is not there.
        CheckpointError: the files are damaged, hold another method or pickles, or do not fit this model (missing,
            surplus or mis-shaped keys, each named). The model is left as it was.
        StateError, ConfigError: the adapter name is in use or not valid.
    """
    root, path = unwrap_model(model), _folder(folder)
    check_adapter_name(root, adapter_name)
    config = read_config(path)
    config.inference_mode = not is_trainable
    weights = path / WEIGHTS_FILE
    header = read_header(weights)
    keys = _match_modules(root, weights, header)
    try:
        plan = plan_adapter(root, config, adapter_name)
    except MissError as error:
        raise CheckpointError(f"{path}: the adapter does not fit this model: {error}") from error
    _check_keys(weights, plan, header, keys)
    plan.adapter.trainable = is_trainable
    with _open(weights) as file:
        values = {target.name: file.get_tensor(keys[target.name]) for target in plan.targets}
    create_blocks(plan, autocast_adapter_dtype=True, values=values)
    install_plan(root, plan)
    return model


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
    with _open(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}).") from error


def _match_modules(root: nn.Module, path: Path, header: Header) -> dict[str, str]:
    """Canonical module name to key, for every key of the file."""
    modules = dict(root.named_modules(remove_duplicate=False))
    canonical = {module: name for name, module in root.named_modules()}
    keys: dict[str, str] = {}
    for key in header:
        name = _module_name(key)
        if name is None:
            raise CheckpointError(f"{path}: key {key!r} is not one of a MiSS adapter ({_PREFIX}<module>.{_BLOCK}).")
        if name not in modules:
            raise CheckpointError(
                f"{path}: key {key!r} is for a module that this model does not have{closest(name, modules)}. Is it the "
                "base model that the adapter was trained on?"
            )
        keys[canonical[modules[name]]] = key
    return keys


def _check_keys(path: Path, plan: Plan, header: Header, keys: Mapping[str, str]) -> None:
    config = plan.adapter.config
    for target in plan.targets:
        if target.name not in keys:
            raise CheckpointError(f"{path}: key {_key(target.name)!r} is missing, although the config chooses that module.")
        key = keys[target.name]
        shape, dtype = header[key]
        sizes = (config.r, config.mini_r, target.in_features, target.out_features)
        expected = variants.block_shape(config.variant, *sizes)
        if shape != expected:
            raise CheckpointError(
                f"{path}: key {key!r} has shape {shape}, but {config.variant} with r={config.r} on a "
                f"{target.in_features}→{target.out_features} linear needs {expected}."
            )
        if dtype not in _DTYPES:
            raise CheckpointError(f"{path}: key {key!r} has dtype {dtype}; a block has one of {', '.join(_DTYPES)}.")
    surplus = set(keys) - {target.name for target in plan.targets}
    if surplus:
        raise CheckpointError(f"{path}: key {keys[min(surplus)]!r} is for a module that the config does not choose.")


def _config_to_write(root: nn.Module, config: MissConfig, names: list[str]) -> dict[str, Any]:
    values = config.to_dict() | {"inference_mode": True}
    if config.target_modules is None or config.selects_all_linear:  # what was chosen here, wherever it is read
        values["target_modules"] = names
    if values["base_model_name_or_path"] is None:
        name = getattr(root, "name_or_path", None)
        values["base_model_name_or_path"] = name if isinstance(name, str) and name else None
    return {key: value for key, value in values.items() if key != "peft_version" or value is not None}


def _key(module_name: str) -> str:
    return f"{_PREFIX}{module_name}.{_BLOCK}" if module_name else f"{_PREFIX}{_BLOCK}"


def _module_name(key: str) -> str | None:
    """The module of a block's key, or None where it is no such key; `_orig_mod.` comes from a compiled wrapper."""
    path = key.replace("_orig_mod.", "")
    if not path.startswith(_PREFIX) or path.rsplit(".", 1)[-1] != _BLOCK:
        return None
    return path.removeprefix(_PREFIX).removesuffix(_BLOCK).removesuffix(".")


def _folder(folder: object) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(f"folder: expected a path, found {type(folder).__name__}.")
    return Path(folder)

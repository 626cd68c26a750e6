"""Adapters on disk, in PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<module path>.miss_block`; `….weight` and so on for modules to save; for biases `….bias`, or
`….base_layer.bias` on an adapted linear. Nothing is ever unpickled; names, shapes and dtypes are checked from the
safetensors header before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, fx, nn

from misscompile.errors import CheckpointError, MissError, StateError
from misscompile.hosts.base import Host
from misscompile.hosts.opening import hosts_in, open_host
from misscompile.hosts.register import create_blocks, create_copies
from misscompile.hosts.whole_graph import WholeGraph
from misscompile.record.state import STATE, OwnerState, base_tensor, copy_name
from misscompile.record.walk import join, named_modules, owner_states, owners, require_adapter, unwrap_model
from misscompile.record.words import Adapter, Plan
from misscompile.rules.names import closest, exact_targets
from misscompile.storage.peft_format import (
    BLOCK,
    BLOCK_NAMES,
    DTYPES,
    PREFIX,
    WEIGHTS_FILE,
    Entry,
    Header,
    find_folder,
    open_tensors,
    read_config,
    read_header,
    strip_key,
    to_path,
    write_folder,
)
from misscompile.variants import VARIANTS
from misscompile.verbs.adapt import install_plan
from misscompile.verbs.plan import check_adapter_name, make_plan

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass
class Keys:
    """The entries of a file by what they stand for: blocks by module name, other tensors by module and own name."""

    blocks: dict[str, Entry]
    tensors: dict[tuple[nn.Module, str], Entry]


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write one adapter so that `load_adapter` and `peft.PeftModel.from_pretrained` read it.

    The two files appear together: a crash at any moment leaves the old folder whole. Other files in it are kept.

    Args:
        model: an adapted model, or a wrapper around it.
        folder: created where needed.
        adapter_name: the adapter to write; its blocks, its biases and its modules to save.

    Raises:
        UnknownAdapterError: the model has no such adapter.
        CheckpointError: a tensor is on the meta device, or `folder` is a file.
        OSError: the disk is full or not writable.
    """
    root, path = unwrap_model(model), to_path(folder)
    adapter = require_adapter(root, adapter_name)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: an adapter is saved into a folder, and this is a file.")
    live = adapter_tensors(root, adapter_name)
    for key, value in live.items():
        if value.is_meta:
            raise CheckpointError(f"{key}: it is on the meta device and has no values to save.")
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in live.items()}
    config = _config_to_write(root, adapter)
    write_folder(path, tensors, config)


@overload
def load_adapter(
    model: fx.GraphModule | torch.export.ExportedProgram,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **options: Any,
) -> WholeGraph: ...


@overload
def load_adapter(
    model: M,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **options: Any,
) -> M: ...


def load_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    low_cpu_mem_usage: bool = False,
    round_bat_weight: bool = False,
    revision: str | None = None,
) -> Any:
    """Put a saved adapter on `model` in place, of a graph on a new one, and make it the active one.

    Args:
        model: a plain or adapted model of the architecture that the adapter was trained on.
        folder: written by `save_adapter` or by PEFT (MiSS, or Bone with balance or bat); or the id of a repository on
            the Hugging Face Hub, when `huggingface_hub` is installed and can reach it.
        adapter_name: the name it gets here; not in use on this model.
        is_trainable: let its blocks require gradients.
        low_cpu_mem_usage: use the memory-mapped values of the file where device and dtype allow it, without a copy.
        round_bat_weight: as in `misscompile.adapt`.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        `model`, the same object; of a graph a new `GraphModule`.

    Raises:
        CheckpointNotFoundError: the folder or one of its files is not there.
        CheckpointError: the files are damaged, hold another method or pickles, or do not fit this model (missing,
            surplus or mis-shaped keys, each named). The model is left as it was.
        StateError, ConfigError: the adapter name is in use or not valid.
    """
    host = open_host(model, "load_adapter")
    check_adapter_name(adapter_name, owner_states(host.root))
    path = find_folder(folder, revision)
    config = read_config(path)
    config.inference_mode = not is_trainable
    weights = path / WEIGHTS_FILE
    header = read_header(weights)
    host.per_call_site = any("#" in key for key in header)
    keys = sort_keys(host, weights, header)
    try:
        plan = make_plan(host, config, adapter_name, round_bat_weight)
    except MissError as error:
        raise CheckpointError(f"{path}: the adapter does not fit this model: {error}") from error
    _check_blocks(weights, plan, keys)
    _check_tensors(host, weights, plan, keys)
    plan.adapter.trainable = is_trainable
    with open_tensors(weights) as file:
        blocks = {target.name: file.get_tensor(keys.blocks[target.name].key) for target in plan.targets}
        copies = {owner: {name: _value(file, keys, owner, name) for name in names} for owner, names in plan.copied.items()}
    _check_shared(weights, plan, keys, blocks)
    create_blocks(plan, True, blocks, copy=not low_cpu_mem_usage)
    create_copies(plan, copies, copy=not low_cpu_mem_usage)
    install_plan(host, plan)
    return host.result(model)


@torch.no_grad()
def hotswap_adapter(
    model: M, folder: str | os.PathLike[str], adapter_name: str = "default", *, revision: str | None = None
) -> M:
    """Put the values of a saved adapter into one that is on the model: same variant and shapes, nothing recompiles.

    Args:
        model: an adapted model.
        folder: as for `load_adapter`.
        adapter_name: the adapter whose values are replaced.

    Returns:
        `model`, the same object.

    Raises:
        UnknownAdapterError: the model has no such adapter.
        StateError: it is merged.
        CheckpointError: the file holds another variant, rank, or set of tensors. Nothing is changed then.
    """
    root = unwrap_model(model)
    adapter = require_adapter(root, adapter_name)
    if any(adapter_name in state.merged for state in owner_states(root).values()):
        raise StateError(f"the adapter {adapter_name!r} is merged: call unmerge(model) before swapping its values.")
    path = find_folder(folder, revision)
    config, weights = read_config(path), path / WEIGHTS_FILE
    for field in ("variant", "miss_dropout"):
        if getattr(config, field) != getattr(adapter.config, field):
            raise CheckpointError(
                f"{path}: its {field} is {getattr(config, field)!r}, that of the adapter on the model "
                f"{getattr(adapter.config, field)!r}: load it under a new name with load_adapter instead."
            )
    keys = sort_keys(hosts_in(root)[0], weights, read_header(weights))
    live = {strip_key(key): value for key, value in adapter_tensors(root, adapter_name).items()}
    there = {strip_key(entry.key): entry for entry in (*keys.blocks.values(), *keys.tensors.values())}
    _check_live(weights, live, there)
    with open_tensors(weights) as file:
        values = {name: file.get_tensor(entry.key) for name, entry in there.items()}
    for name, value in values.items():
        live[name].copy_(value)
    return model


def _check_live(path: Path, live: Mapping[str, Tensor], there: Mapping[str, Entry]) -> None:
    """Hold the tensors of a file against those of the adapter that they are swapped into."""
    for name in (*live, *there):
        if name not in there or name not in live:
            what = "is missing" if name not in there else "is not part of the adapter on the model"
            raise CheckpointError(f"{path}: key {PREFIX + name!r} {what}.")
        entry, tensor = there[name], live[name]
        if tensor.is_floating_point() and entry.dtype not in DTYPES:
            raise CheckpointError(f"{path}: key {entry.key!r} has dtype {entry.dtype}; it takes {', '.join(DTYPES)}.")
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: key {entry.key!r} has shape {entry.shape}, on the model it is {tuple(tensor.shape)}: load it "
                "under a new name with load_adapter instead."
            )


def adapter_tensors(root: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter registered on the model, by the key under which PEFT stores it."""
    tensors: dict[str, Tensor] = {}
    for name, owner in owners(root).items():
        state: OwnerState = vars(owner)[STATE]
        block = state.blocks.get(adapter_name)
        if block is not None:
            tensors[PREFIX + join(name, BLOCK)] = owner.get_parameter(block.parameter)
        for tensor in state.copies.get(adapter_name, ()):
            key = join(name, "" if block is None else "base_layer", tensor)
            tensors[PREFIX + key] = getattr(owner, copy_name(adapter_name, tensor))
    return tensors


def sort_keys(host: Host, path: Path, header: Header) -> Keys:
    """Say of every key of the file what it stands for on this model.

    Raises:
        CheckpointError: a key stands for nothing; the message names it.
    """
    block_names, keys = host.block_names(), Keys({}, {})
    for key, (shape, dtype) in header.items():
        if not key.replace("_orig_mod.", "").startswith(PREFIX):
            raise CheckpointError(f"{path}: key {key!r} is not one of a MiSS adapter: it does not start with {PREFIX!r}.")
        module_name, _, tensor = f".{strip_key(key)}".rpartition(".")
        module_name = module_name.removeprefix(".")
        if any(part in module_name.split(".") for part in ("modules_to_save", "original_module")):
            continue  # PEFT repeats what stands under the plain name too
        inner = module_name.removesuffix("base_layer").removesuffix(".")
        owner, entry = host.modules.get(inner), Entry(key, shape, dtype)
        if tensor in BLOCK_NAMES:
            if inner not in block_names:
                raise CheckpointError(
                    f"{path}: key {key!r} is for a module that this model does not have{closest(inner, block_names)}. Is "
                    "it the base model that the adapter was trained on?"
                )
            if (name := block_names[inner]) in keys.blocks:
                other = keys.blocks[name].key
                raise CheckpointError(f"{path}: the keys {other!r} and {key!r} are for one module, which has one block.")
            keys.blocks[name] = entry
        elif owner is None:
            raise CheckpointError(f"{path}: key {key!r} is not one of a MiSS adapter on this model.")
        elif tensor in (*owner._parameters, *owner._buffers):
            if inner == module_name or "bias" in tensor:  # a targeted output layer's frozen weight is no part of it
                keys.tensors[owner, tensor] = entry
        else:
            raise CheckpointError(f"{path}: key {key!r} stands for nothing that {inner or 'the model'} has.")
    return keys


def _check_blocks(path: Path, plan: Plan, keys: Keys) -> None:
    config = plan.adapter.config
    for target in plan.targets:
        entry = keys.blocks.get(target.name)
        if entry is None:
            raise CheckpointError(
                f"{path}: key '{PREFIX}{target.name}.{BLOCK}' is missing, although the config chooses that module."
            )
        sizes = (config.r, config.mini_r, target.in_features, target.out_features)
        expected = VARIANTS[config.variant].block_shape(*sizes)
        if entry.shape != expected:
            raise CheckpointError(
                f"{path}: key {entry.key!r} has shape {entry.shape}, but {config.variant} with r={config.r} on a "
                f"{target.in_features}→{target.out_features} linear needs {expected}."
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: key {entry.key!r} has dtype {entry.dtype}; a block has one of {', '.join(DTYPES)}."
            )
    surplus = set(keys.blocks) - {target.name for target in plan.targets}
    if surplus:
        key = keys.blocks[min(surplus)].key
        raise CheckpointError(f"{path}: key {key!r} is for a module that the config does not choose.")


def _check_shared(path: Path, plan: Plan, keys: Keys, blocks: Mapping[str, Tensor]) -> None:
    """Linears that share a weight share their block here; PEFT gives each one of its own."""
    first: dict[object, str] = {}
    for target in plan.targets:
        name = first.setdefault(target.shared_by, target.name)
        if name != target.name and not torch.equal(blocks[name], blocks[target.name]):
            raise CheckpointError(
                f"{path}: key {keys.blocks[target.name].key!r} differs from {keys.blocks[name].key!r}, but the two modules "
                "share one weight and so one block. Untie the weight before loading."
            )


def _check_tensors(host: Host, path: Path, plan: Plan, keys: Keys) -> None:
    """Hold the tensors of the file against those the adapter trains in full, and take in what else PEFT stores."""
    for owner, names in plan.copied.items():
        for name in names:
            if (owner, name) not in keys.tensors and name in owner._parameters:
                raise CheckpointError(
                    f"{path}: a key for {host.canonical[owner]}.{name} is missing, although the config trains it (modules_to_save="
                    f"{plan.adapter.config.modules_to_save}, bias={plan.adapter.config.bias!r})."
                )
    for (owner, name), entry in keys.tensors.items():
        base = base_tensor(owner, name)
        expected = tuple(base.shape)
        if base.is_floating_point() and entry.dtype not in DTYPES:
            raise CheckpointError(f"{path}: key {entry.key!r} has dtype {entry.dtype}, the model's is {base.dtype}.")
        if entry.shape != expected:
            raise CheckpointError(f"{path}: key {entry.key!r} has shape {entry.shape}, the model's is {expected}.")
        if name not in plan.copied.get(owner, ()):
            # PEFT calls every parameter with "bias" in its name a bias, and stores embeddings that were resized
            stored = plan.adapter.config.bias == "all" and "bias" in entry.key
            if not stored and owner not in _embeddings(host.root):
                raise CheckpointError(f"{path}: key {entry.key!r} is for a tensor that the config does not train.")
            plan.copied[owner] = (*plan.copied.get(owner, ()), name)


def _embeddings(root: nn.Module) -> list[nn.Module]:
    getters = (getattr(root, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for get in getters if callable(get) and isinstance(module := get(), nn.Module)]


def _value(file: Any, keys: Keys, owner: nn.Module, name: str) -> Tensor:
    entry = keys.tensors.get((owner, name))
    return base_tensor(owner, name) if entry is None else file.get_tensor(entry.key)  # a buffer that PEFT left out


def _config_to_write(root: nn.Module, adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    values = config.to_dict() | {"inference_mode": True}
    if config.target_modules is None or config.selects_all_linear:  # what was chosen here, wherever it is read
        chosen = [n for n, state in owner_states(root).items() if adapter.name in state.blocks]
        values["target_modules"] = exact_targets(chosen, list(named_modules(root, remove_duplicate=False)))
    if values["base_model_name_or_path"] is None:
        name = getattr(root, "name_or_path", None)
        values["base_model_name_or_path"] = name if isinstance(name, str) and name else None
    return {key: value for key, value in values.items() if key != "peft_version" or value is not None}

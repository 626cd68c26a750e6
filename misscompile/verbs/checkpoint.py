"""Adapters on disk, in PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from misscompile.errors import CheckpointError, MissError, MissWarning, StateError
from misscompile.hosts.base import Host
from misscompile.hosts.opening import hosts_in, open_host
from misscompile.hosts.register import create_blocks, create_copies
from misscompile.record.spread import check_before_wrapping, check_whole, one_writer, own_part, part_like, whole
from misscompile.record.state import base_tensor
from misscompile.record.walk import named_modules, owner_states, require_adapter, unwrap_model
from misscompile.record.words import Adapter, Plan
from misscompile.rules.names import exact_targets
from misscompile.storage.peft_format import (
    BLOCK,
    WEIGHTS_FILE,
    find_folder,
    read_config,
    read_entries,
    read_tensors,
    to_path,
    write_folder,
)
from misscompile.verbs.adapt import M, install_plan
from misscompile.verbs.file_keys import (
    Keys,
    check_blocks,
    check_frozen,
    check_live,
    check_repeated,
    check_shapes,
    check_shared_blocks,
    check_trained_in_full,
    keys_of,
    live_tensors,
    rule_names,
    sort_keys,
)
from misscompile.verbs.plan import check_adapter_name, check_complete, make_plan


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write one adapter so that `load_adapter` and `peft.PeftModel.from_pretrained` read it.

    The two files appear together: a crash at any moment leaves the old folder whole. Other files in it are kept.

    Args:
        model: an adapted model, or a wrapper around it. Of one that is sharded by FSDP2 or tensor parallel, every process
            makes the call: the blocks are gathered, and one process writes.
        folder: created where needed.
        adapter_name: the adapter to write; its blocks, its biases and its modules to save.

    Raises:
        UnknownAdapterError: the model has no such adapter.
        CheckpointError: a tensor is on the meta device or has not the shape that its layer needs, a module that the config
            chooses has no block (it was replaced after adapting), or `folder` is a file.
        StateError: FSDP1 or ZeRO-3 holds the parameters in parts.
        OSError: the disk is full or not writable.
    """
    root, path = unwrap_model(model), to_path(folder, "folder")
    adapter = require_adapter(root, adapter_name)
    check_whole(model, "save_adapter")
    check_complete(hosts_in(root)[0], adapter)
    live = live_tensors(root, adapter_name)
    keys = keys_of(root, adapter_name, live)
    check_shapes(live, adapter_name, keys)
    values = {held: whole(tensor) for held, tensor in live.items()}
    tensors = {key: values[held] for held, names in keys.items() for key in names}
    repeats = [key for names in keys.values() for key in names[1:]]
    with one_writer(live.values()) as writes:
        if writes:
            write_folder(path, tensors, _config_to_write(root, adapter), repeats)
    if adapter.config.rank_pattern:
        told = "misscompile reads it, PEFT's MiSS cannot, which has no rank_pattern; save_as_lora writes a folder for PEFT"
        warnings.warn(f"{path}: {told}.", MissWarning, stacklevel=2)


def load_adapter(
    model: M | torch.export.ExportedProgram,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    *,
    low_cpu_mem_usage: bool = False,
    round_bat_weight: bool = False,
    revision: str | None = None,
) -> M:
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
        StateError: the model is distributed already, and the blocks could not act or train.
    """
    check_before_wrapping(model, "load_adapter", is_trainable)
    host = open_host(model, "load_adapter")
    check_adapter_name(adapter_name, owner_states(host.root))
    plan, keys = _plan_to_load(host, find_folder(folder, revision), adapter_name, is_trainable, round_bat_weight)
    check_repeated(keys)
    blocks, tensors = read_tensors(keys.blocks), read_tensors(keys.tensors)
    check_shared_blocks(keys, plan, blocks)
    copies = {
        owner: {name: tensors.get((owner, name), base_tensor(owner, name)) for name in names}  # PEFT leaves some buffers out
        for owner, names in plan.copied.items()
    }
    create_blocks(plan, True, blocks, copy=not low_cpu_mem_usage)
    create_copies(plan, copies, copy=not low_cpu_mem_usage)
    install_plan(host, plan)
    return host.result(model)  # type: ignore[no-any-return]


def _plan_to_load(host: Host, folder: Path, adapter_name: str, trainable: bool, round_bat_weight: bool) -> tuple[Plan, Keys]:
    """The plan of the config in a folder, and the entries of its file, which are found to fit."""
    config, weights = read_config(folder), folder / WEIGHTS_FILE
    config.inference_mode = not trainable
    entries = read_entries(weights)
    keys = sort_keys(host, weights, entries)
    host.per_call_site = host.are_calls(keys.blocks)
    try:
        plan = make_plan(host, config, adapter_name, round_bat_weight, trainable)
    except StateError:
        raise
    except MissError as error:
        raise CheckpointError(f"{folder}: the adapter does not fit this model: {error}") from error
    check_blocks(keys, plan)
    check_trained_in_full(keys, plan, host)
    return plan, keys


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
        StateError: it is merged, or FSDP1 or ZeRO-3 holds the parameters in parts.
        CheckpointError: the file holds another variant, rank, or set of tensors. Nothing is changed then.
    """
    root = unwrap_model(model)
    check_whole(model, "hotswap_adapter")
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
    host = hosts_in(root)[0]
    keys = sort_keys(host, weights, read_entries(weights))
    live = live_tensors(root, adapter_name)
    check_frozen(keys, {owner for owner, tensor in live if tensor == BLOCK}, live)
    stored = {(host.modules[name], BLOCK): entry for name, entry in keys.blocks.items()} | keys.tensors
    check_live(weights, stored, live, keys_of(root, adapter_name, live))
    check_repeated(keys)
    for held, value in read_tensors(stored).items():
        own_part(live[held].detach()).copy_(part_like(live[held], value))
    return model


def _config_to_write(root: nn.Module, adapter: Adapter) -> dict[str, Any]:
    config, chosen = adapter.config, rule_names(root, adapter.name)
    values = config.to_dict() | {"inference_mode": True}
    aliased = len(chosen) > sum(adapter.name in state.blocks for state in owner_states(root).values())
    # what was chosen here, wherever it is read; only "all-linear" chooses a model that is a linear itself
    if (config.target_modules is None or config.selects_all_linear or aliased) and "" not in chosen:
        names = [*named_modules(root, remove_duplicate=False), *chosen]
        values["target_modules"] = exact_targets(chosen, names)
        if isinstance(values["target_modules"], str):  # which goes with no rules for layers, and needs none
            values |= {"layers_to_transform": None, "layers_pattern": None}
    name = getattr(root, "name_or_path", None)
    if config.base_model_name_or_path is None and isinstance(name, str):
        values["base_model_name_or_path"] = name or None
    if config.peft_version is None:
        del values["peft_version"]
    return values

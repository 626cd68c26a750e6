"""MiSS adapters written as PEFT LoRA checkpoints, for servers and tools that read LoRA.

Balance and mini are LoRA with a frozen matrix, `ΔW = B A` with `A[j, i] = [i ≡ j mod r]`: they convert exactly, without an
SVD. bat depends on the weight in full rank; it is cut off by a singular value decomposition, and the error is told.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from misscompile.errors import ArgumentError, CheckpointError, ConfigError, StateError
from misscompile.hosts.opening import adapted_owners
from misscompile.passes.find_sites import linear_shape
from misscompile.passes.weight_paths import take_view
from misscompile.record.spread import check_whole, one_writer, whole
from misscompile.record.state import STATE
from misscompile.record.walk import join, named_modules, owner_states, require_adapter, unwrap_model
from misscompile.rules.config import MissConfig
from misscompile.rules.names import closest, exact_targets, rank_of
from misscompile.storage.peft_format import (
    BLOCK,
    PREFIX,
    WEIGHTS_FILE,
    find_folder,
    read_config,
    read_entries,
    read_tensors,
    strip_key,
    to_path,
    write_folder,
)
from misscompile.variants import VARIANTS, SummedVariant
from misscompile.verbs.file_keys import adapter_tensors, live_tensors


@dataclasses.dataclass(frozen=True)
class LoraFidelity:
    """How exact a layer is as LoRA: its rank there, and `‖ΔW − B A‖ / ‖ΔW‖` in the Frobenius norm, 0 where it is exact."""

    module: str
    rank: int
    relative_error: float


def save_as_lora(
    model_or_folder: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    rank: int | None = None,
    energy: float | None = None,
    base_model: str | os.PathLike[str] | nn.Module | None = None,
) -> list[LoraFidelity]:
    """Write an adapter as a PEFT LoRA checkpoint with scale 1.

    Args:
        model_or_folder: an adapted model, or a saved adapter of balance or mini, which needs no model.
        out: the folder to write.
        adapter_name: which adapter of the model.
        rank: for bat, the number of singular values kept in every layer.
        energy: for bat instead of `rank`, the share of the squared singular values, in (0, 1], to keep in every layer.
        base_model: for a folder, where the sizes of the adapted linears are known from: a model (the meta device will
            do), or the folder of the base model, of which only the file headers are read. By default the
            `base_model_name_or_path` of the adapter's config.

    Returns:
        The rank and relative error of each layer; the errors are 0 for balance and mini.

    Raises:
        ConfigError, ArgumentError: `rank` and `energy` are not possible values, or missing for bat.
        CheckpointError: bat from a folder alone, sizes that cannot be found, or `out` is a file.
        UnknownAdapterError, StateError: the model has no such adapter, or it is merged; or FSDP1 or ZeRO-3 holds the
            parameters in parts.
    """
    path = to_path(out, "out")
    if isinstance(model_or_folder, nn.Module):
        root = unwrap_model(model_or_folder)
        check_whole(model_or_folder, "save_as_lora")
        config = require_adapter(root, adapter_name).config
        _check_cut(config, rank, energy)
        tensors = adapter_tensors(root, adapter_name)
        factors = _factors_of_model(root, adapter_name, rank, energy)
        held = live_tensors(root, adapter_name).values()
    else:
        folder = find_folder(model_or_folder)
        config = read_config(folder)
        if isinstance(VARIANTS[config.variant], SummedVariant):
            _check_cut(config, rank, energy)
        tensors = read_tensors({strip_key(entry.key): entry for entry in read_entries(folder / WEIGHTS_FILE)})
        factors = _factors_of_folder(folder, config, tensors, base_model)
        root = base_model if isinstance(base_model, nn.Module) else nn.Module()
        held = {}.values()
    written = {name: value for name, value in tensors.items() if name.rpartition(".")[2] != BLOCK}
    for name, factor in factors.items():
        written |= {join(name, "lora_A.weight"): factor.down, join(name, "lora_B.weight"): factor.up}
    names = list(named_modules(root, remove_duplicate=False))
    with one_writer(held) as writes:
        if writes:
            write_folder(path, written, _lora_config(config, factors, names))
    return [LoraFidelity(name, factor.down.shape[0], factor.error) for name, factor in factors.items()]


class _Factors(NamedTuple):
    """`A (rank, in)` and `B (out, rank)` of one layer, and the relative error of `B A`."""

    down: Tensor
    up: Tensor
    error: float = 0.0


def _truncated_factors(delta: Tensor, rank: int | None, energy: float | None) -> _Factors:
    """The best `A (k, in)`, `B (out, k)` for `delta (out, in)` with `k = rank` or the least `k` that keeps `energy`."""
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    total = s.square().sum()
    if rank is None and total == 0:
        rank = 1
    elif rank is None:
        kept = s.square().cumsum(0) / total
        rank = int((kept < float(energy or 1.0) - 1e-12).sum()) + 1
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    lost = (s[rank:].square().sum() / total).sqrt() if total > 0 else total
    return _Factors(root.unsqueeze(1) * vt[:rank], u[:, :rank] * root, float(lost))


def _factors_of_model(root: nn.Module, adapter_name: str, rank: int | None, energy: float | None) -> dict[str, _Factors]:
    if any(adapter_name in state.merged for state in owner_states(root).values()):
        raise StateError(f"the adapter {adapter_name!r} is merged: call unmerge(model) first.")
    factors: dict[str, _Factors] = {}
    for name, (host, own_name, owner) in adapted_owners(root).items():
        block = vars(owner)[STATE].blocks.get(adapter_name)
        if block is None:
            continue
        site, values = host.sites_of(own_name)[0], whole(owner.get_parameter(block.parameter)).detach().cpu()
        variant = VARIANTS[block.variant]
        if isinstance(variant, SummedVariant):
            factors[name] = _Factors(*variant.lora_factors(values, site.in_features, site.out_features))
            continue
        assert site.path is not None
        weight = take_view(whole(host.stored_weight(own_name, site)).detach().contiguous(), site.path.view).cpu().double()
        down, up, error = _truncated_factors(variant.delta_weight(values, weight), rank, energy)
        factors[name] = _Factors(down.to(values.dtype), up.to(values.dtype), error)
    return factors


def _factors_of_folder(
    folder: Path, config: MissConfig, tensors: Mapping[str, Tensor], base_model: object
) -> dict[str, _Factors]:
    variant = VARIANTS[config.variant]
    if not isinstance(variant, SummedVariant):
        raise CheckpointError(
            f"{folder}: {config.variant} is a function of the base weight: load it onto its model and pass the model."
        )
    source = base_model if base_model is not None else config.base_model_name_or_path
    if source is None:
        raise CheckpointError(f"{folder}: the config names no base model; pass base_model, a model or its folder.")
    shapes = _shapes(source)
    factors: dict[str, _Factors] = {}
    for key, block in tensors.items():
        name, _, tensor = key.rpartition(".")
        if tensor != BLOCK:
            continue
        if name not in shapes:
            raise CheckpointError(f"{folder}: the base model has no linear {name!r}{closest(name, shapes)}.")
        sizes = rank_of(config, name), config.mini_r, *shapes[name]
        if variant.shape_problem(*sizes) is not None or tuple(block.shape) != variant.block_shape(*sizes):
            raise CheckpointError(
                f"{folder}: key {PREFIX + key!r} has shape {tuple(block.shape)}, which does not fit the base model's "
                f"{shapes[name][0]}→{shapes[name][1]} linear: is it the one that the adapter was trained on?"
            )
        factors[name] = _Factors(*variant.lora_factors(block, *shapes[name]))
    if not factors:
        raise CheckpointError(f"{folder}: its {WEIGHTS_FILE} has no block; was it written for another model or method?")
    return factors


def _shapes(source: object) -> dict[str, tuple[int, int]]:
    """`(in, out)` of the linears of a base model, by module name: from a model, or from the headers of its files."""
    if isinstance(source, nn.Module):
        found = {name: linear_shape(module) for name, module in source.named_modules()}
        return {name: shape for name, shape in found.items() if shape is not None}
    folder = find_folder(source)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise CheckpointError(
            f"{folder}: no safetensors files of a base model here; pass base_model, a model or its folder."
        )
    if any(kind in (folder / "config.json").read_text() for kind in ('"gpt2"', '"openai-gpt"', '"imagegpt"')):
        raise CheckpointError(f"{folder}: its files do not tell a Conv1D's in from its out; pass the model as base_model.")
    weights = [e for file in files for e in read_entries(file) if e.key.endswith(".weight") and len(e.shape) == 2]
    return {entry.key.removesuffix(".weight"): (entry.shape[1], entry.shape[0]) for entry in weights}


def _check_cut(config: MissConfig, rank: int | None, energy: float | None) -> None:
    """Refuse a `rank` or an `energy` that is impossible, missing for bat, or without meaning for another variant."""
    if isinstance(VARIANTS[config.variant], SummedVariant):
        if rank is not None or energy is not None:
            raise ArgumentError(f"rank and energy are for bat: {config.variant} converts exactly, at rank r={config.r}.")
    elif (rank is None) == (energy is None):
        raise ArgumentError("bat is cut off by a singular value decomposition: give either rank or energy.")
    elif rank is not None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(f"rank={rank!r}: expected an integer of 1 or more.")
    elif not isinstance(energy, (int, float)) or isinstance(energy, bool) or not 0.0 < energy <= 1.0:
        raise ConfigError(f"energy={energy!r}: expected a share in (0, 1].")


def _lora_config(config: MissConfig, factors: Mapping[str, _Factors], names: list[str]) -> dict[str, Any]:
    """PEFT's `LoraConfig` of the factors, on a model with these module names."""
    ranks = {name: factor.down.shape[0] for name, factor in factors.items()}
    largest = max(ranks.values())
    own = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,  # scale = alpha / r = 1
        "rank_pattern": own,
        "alpha_pattern": own,
        "lora_dropout": config.miss_dropout,
        "target_modules": exact_targets(list(factors), names),
        "bias": "lora_only" if config.bias == "MiSS_only" else config.bias,
        "inference_mode": True,
    }
    carried = ("modules_to_save", "task_type", "base_model_name_or_path", "revision")
    return values | {field: getattr(config, field) for field in carried}

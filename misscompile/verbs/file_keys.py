"""What the keys of an adapter's file stand for on a model, and whether the file fits.

key below `base_model.model.`             stands for
<module>.miss_block                       the block of a linear
<module>.<tensor>                         a tensor that is trained in full: of a module to save, or a bias
<module>.base_layer.<tensor>              the same, where the module has a block as well
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from misscompile.errors import CheckpointError
from misscompile.hosts.base import Host
from misscompile.record.state import STATE, OwnerState, base_tensor, copy_name
from misscompile.record.walk import join, owners
from misscompile.record.words import Plan
from misscompile.rules.names import closest
from misscompile.storage.peft_format import BLOCK, DTYPES, PREFIX, Entry, strip_key
from misscompile.variants import VARIANTS

_FLOATS = ", ".join(DTYPES)


@dataclasses.dataclass
class Keys:
    """The entries of a file by what they stand for: blocks by site name, other tensors by module and own name."""

    path: Path
    blocks: dict[str, Entry]
    tensors: dict[tuple[nn.Module, str], Entry]


def adapter_tensors(root: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter registered on the model, by the name under which PEFT stores it."""
    tensors: dict[str, Tensor] = {}
    for name, owner in owners(root).items():
        state: OwnerState = vars(owner)[STATE]
        block = state.blocks.get(adapter_name)
        if block is not None:
            tensors[join(name, BLOCK)] = owner.get_parameter(block.parameter)
        for tensor in state.copies.get(adapter_name, ()):
            key = join(name, "" if block is None else "base_layer", tensor)
            tensors[key] = getattr(owner, copy_name(adapter_name, tensor))
    return tensors


def sort_keys(host: Host, path: Path, entries: Iterable[Entry]) -> Keys:
    """Say of every entry of a file what it stands for on this model. One that stands for nothing is an error."""
    block_names, keys = host.block_names(), Keys(path, {}, {})
    for entry in entries:
        if not entry.key.replace("_orig_mod.", "").startswith(PREFIX):
            raise entry.error(f"is not one of a MiSS adapter: it does not start with {PREFIX!r}.")
        path_in_file, _, tensor = strip_key(entry.key).rpartition(".")
        if any(part in path_in_file.split(".") for part in ("modules_to_save", "original_module")):
            continue  # PEFT repeats what stands under the plain name too
        module_name = path_in_file.removesuffix("base_layer").removesuffix(".")
        owner = host.modules.get(module_name)
        if tensor == BLOCK:
            if module_name not in block_names:
                raise entry.error(
                    f"is for a module that this model does not have{closest(module_name, block_names)}. Is it the base "
                    "model that the adapter was trained on?"
                )
            other = keys.blocks.setdefault(block_names[module_name], entry)
            if other is not entry:
                raise CheckpointError(
                    f"{path}: the keys {other.key!r} and {entry.key!r} are for one module, which has one block."
                )
        elif owner is None:
            raise entry.error("is not one of a MiSS adapter on this model.")
        elif tensor not in (*owner._parameters, *owner._buffers):
            raise entry.error(f"stands for nothing that {module_name or 'the model'} has.")
        elif module_name == path_in_file or "bias" in tensor:  # a targeted output layer's frozen weight is no part of it
            keys.tensors[owner, tensor] = entry
    return keys


def check_blocks(keys: Keys, plan: Plan) -> None:
    """Hold the blocks of a file against those that a plan creates."""
    config, chosen = plan.adapter.config, {target.name for target in plan.targets}
    for target in plan.targets:
        entry = keys.blocks.get(target.name)
        if entry is None:
            raise CheckpointError(
                f"{keys.path}: key '{PREFIX}{target.name}.{BLOCK}' is missing, although the config chooses that module."
            )
        sizes = target.in_features, target.out_features
        r = target.block.r
        needed = VARIANTS[config.variant].block_shape(r, config.mini_r, *sizes)
        told = f", but {config.variant} with r={r} on a {sizes[0]}→{sizes[1]} linear needs {needed}."
        entry.check(needed, True, told, f"; a block has one of {_FLOATS}.")
    surplus = keys.blocks.keys() - chosen
    if surplus:
        raise keys.blocks[min(surplus)].error("is for a module that the config does not choose.")


def check_shared_blocks(keys: Keys, plan: Plan, blocks: Mapping[str, Tensor]) -> None:
    """Linears that share a weight share their block here. PEFT gives each one of its own, so their values must agree."""
    first: dict[object, str] = {}
    for target in plan.targets:
        name = first.setdefault(target.shared_by, target.name)
        if name == target.name:
            continue
        one, other = blocks[name].double(), blocks[target.name].double()
        if not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
            raise keys.blocks[target.name].error(
                f"differs from {keys.blocks[name].key!r}, but the two modules share one weight and so one block. Untie the "
                "weight before loading."
            )


def check_trained_in_full(keys: Keys, plan: Plan, host: Host) -> None:
    """Hold the other tensors of a file against those that a plan copies, and add to the plan what else PEFT stores."""
    config = plan.adapter.config
    for owner, names in plan.copied.items():
        for name in names:
            if (owner, name) not in keys.tensors and name in owner._parameters:
                raise CheckpointError(
                    f"{keys.path}: a key for {host.canonical[owner]}.{name} is missing, although the config trains it "
                    f"(modules_to_save={config.modules_to_save}, bias={config.bias!r})."
                )
    for (owner, name), entry in keys.tensors.items():
        base = base_tensor(owner, name)
        shape = tuple(base.shape)
        entry.check(shape, base.is_floating_point(), f", the model's is {shape}.", f", the model's is {base.dtype}.")
        if name not in plan.copied.get(owner, ()):
            # PEFT calls every parameter with "bias" in its name a bias, and stores embeddings that were resized
            if not (config.bias == "all" and "bias" in entry.key) and owner not in _embeddings(host.root):
                raise entry.error("is for a tensor that the config does not train.")
            plan.copied[owner] = (*plan.copied.get(owner, ()), name)


def _embeddings(root: nn.Module) -> list[nn.Module]:
    getters = (getattr(root, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [get() for get in getters if callable(get)]


def check_live(keys: Keys, stored: Mapping[str, Entry], live: Mapping[str, Tensor]) -> None:
    """Hold the tensors of a file against those of the adapter that they are swapped into, both by name."""
    for name in (*live, *stored):
        if name not in stored:
            raise CheckpointError(f"{keys.path}: key {PREFIX + name!r} is missing.")
        if name not in live:
            raise CheckpointError(f"{keys.path}: key {PREFIX + name!r} is not part of the adapter on the model.")
        shape = tuple(live[name].shape)
        told = f", on the model it is {shape}: load it under a new name with load_adapter instead."
        stored[name].check(shape, live[name].is_floating_point(), told, f"; it takes {_FLOATS}.")

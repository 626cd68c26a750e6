"""What the keys of an adapter's file stand for on a model, and whether the file fits.

key below `base_model.model.`             stands for
<module>.miss_block                       the block of a linear
<module>.<tensor>                         a tensor that is trained in full: of a module to save, or a bias
<module>.base_layer.<tensor>              the same, where the module has a block as well

A key is looked up among those that the model's own names make, and never taken apart: a module may be called `base_layer`.
A module that the model reaches by several names is written under each, and read under any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from misscompile.errors import CheckpointError
from misscompile.hosts.base import Host
from misscompile.passes.find_sites import linear_shape
from misscompile.record.spread import reshard, whole
from misscompile.record.state import STATE, OwnerState, base_tensor, copy_name
from misscompile.record.walk import join, named_modules, owners, require_adapter
from misscompile.record.words import Plan
from misscompile.rules.names import closest, strip_wrappers
from misscompile.storage.peft_format import BLOCK, DTYPES, PREFIX, Entry, read_tensors, strip_key
from misscompile.variants import VARIANTS

_FLOATS = ", ".join(DTYPES)


Held = tuple[nn.Module, str]
"""A module and `miss_block`, or the own name of a tensor that is trained in full there."""


@dataclasses.dataclass
class Keys:
    """The entries of a file by what they stand for: blocks by target name, other tensors by module and own name."""

    path: Path
    blocks: dict[str, Entry] = dataclasses.field(default_factory=dict)
    tensors: dict[Held, Entry] = dataclasses.field(default_factory=dict)
    repeated: list[tuple[Entry, Entry]] = dataclasses.field(default_factory=list)
    """Two entries that stand for one tensor."""


def live_tensors(root: nn.Module, adapter_name: str) -> dict[Held, Tensor]:
    """What an adapter registered on the model."""
    reshard(root)
    tensors: dict[Held, Tensor] = {}
    for owner in owners(root).values():
        state: OwnerState = vars(owner)[STATE]
        if adapter_name in state.blocks:
            tensors[owner, BLOCK] = owner.get_parameter(state.blocks[adapter_name].parameter)
        for tensor in state.copies.get(adapter_name, ()):
            tensors[owner, tensor] = getattr(owner, copy_name(adapter_name, tensor))
    return tensors


def adapter_tensors(root: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter registered on the model, by every name under which a file has it."""
    live = live_tensors(root, adapter_name)
    live = {held: whole(tensor) for held, tensor in live.items()}
    return {key: live[held] for held, keys in keys_of(root, adapter_name, live).items() for key in keys}


def keys_of(root: nn.Module, adapter_name: str, live: Iterable[Held]) -> dict[Held, list[str]]:
    """The names under which PEFT stores or looks for each of the `live_tensors` of an adapter, the first one first."""
    names, held = names_in_file(root), set(live)
    saved = tuple(require_adapter(root, adapter_name).config.modules_to_save or ())
    adapted = {name for owner, tensor in held if tensor == BLOCK for name in names[owner]}
    keys: dict[Held, list[str]] = {}
    for owner, tensor in live:
        told = names[owner]
        if (owner, BLOCK) not in held:  # PEFT wraps a module to save under the names that its rule takes
            told = [name for name in told if any(prefix.endswith(saved) for prefix in _prefixes(name))] or told[:1]
        keys[owner, tensor] = [join(name, BLOCK) if tensor == BLOCK else _tensor_key(name, tensor, adapted) for name in told]
    return keys


def check_shapes(live: Mapping[Held, Tensor], adapter_name: str, names: Mapping[Held, Sequence[str]]) -> None:
    """Refuse tensors that a folder should not hold: a wrapper left a part of each, or the layer was resized since."""
    for (owner, tensor), value in live.items():
        state: OwnerState = vars(owner)[STATE]
        if tensor != BLOCK:
            needed = tuple(base_tensor(owner, tensor).shape)
        else:
            block, shape = state.blocks[adapter_name], linear_shape(owner)
            assert state.shape is not None
            sizes = state.shape if state.in_graph or shape is None else shape
            needed = VARIANTS[block.variant].block_shape(block.r, block.mini_r, *sizes)
        if tuple(value.shape) != needed:
            raise CheckpointError(
                f"{names[owner, tensor][0]}: it has shape {tuple(value.shape)} here and needs {needed}. Where a wrapper "
                "holds the rest, gather the parameters first; where the layer was resized, resize it before adapting."
            )


def names_in_file(root: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of each module of a model, as a file has it: what a bare parameter's block is on has that one's name."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(root, remove_duplicate=False).items():
        state: OwnerState | None = vars(module).get(STATE)
        site = None if state is None or state.stands_for is None else _sibling(name, state.stands_for)
        names.setdefault(module, []).append(name if site is None or name != f"{site}#" else site)
    return names


def rule_names(root: nn.Module, adapter_name: str) -> list[str]:
    """The names by which rules choose what an adapter has blocks on."""
    names = []
    for module, own in names_in_file(root).items():
        state: OwnerState | None = vars(module).get(STATE)
        if state is not None and adapter_name in state.blocks:
            names += own if state.stands_for is None else [_sibling(name, state.stands_for) for name in own]
    return list(dict.fromkeys(names))


def sort_keys(host: Host, path: Path, entries: Sequence[Entry]) -> Keys:
    """Say of every entry of a file what it stands for on this model. One that stands for nothing is an error."""
    block_names, keys, others = host.block_names(), Keys(path), list[Entry]()
    for entry in entries:
        if not strip_wrappers(entry.key).startswith(PREFIX):
            raise entry.error(f"is not one of a MiSS adapter: it does not start with {PREFIX!r}.")
        name, _, tensor = strip_key(entry.key).rpartition(".")
        if tensor == BLOCK and (name in block_names or not _may_be_missing(entry, name)):
            if name not in block_names:
                raise entry.error(
                    f"is for a module that this model does not have{closest(name, block_names)}. Is it the base "
                    "model that the adapter was trained on?"
                )
            first = keys.blocks.setdefault(block_names[name], entry)
            keys.repeated += [(first, entry)] if first is not entry else []
        else:
            others.append(entry)
    for entry, found in _find_tensors(host, keys, others):
        first = keys.tensors.setdefault(found, entry)
        keys.repeated += [(first, entry)] if first is not entry else []
    return keys


def _find_tensors(host: Host, keys: Keys, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Held]]:
    """What each entry of a file stands for that is no block: a module and the name that this gives the tensor."""
    if not entries:
        return
    own = {host.modules[name] for name in keys.blocks if name in host.modules}
    adapted = {name for name, module in host.modules.items() if module in own}
    adapted |= {strip_key(entry.key).rpartition(".")[0] for entry in keys.blocks.values()}  # in a graph, homes come later
    plain, known = dict[str, Held](), dict[str, Held]()
    for name, module in host.modules.items():
        for tensor in (*module._parameters, *module._buffers):
            plain[join(name, tensor)] = known[_tensor_key(name, tensor, adapted)] = module, tensor
    for entry in entries:
        key = strip_key(entry.key)
        name, _, tensor = key.rpartition(".")
        found = known.get(key, plain.get(key))
        if found is not None:
            yield entry, found
        elif not _may_be_missing(entry, name):
            raise entry.error(
                f"stands for nothing that {name.removesuffix('.base_layer') or 'the model'} has."
                if name.removesuffix("base_layer").removesuffix(".") in host.modules
                else "is not one of a MiSS adapter on this model."
            )


def _may_be_missing(entry: Entry, name: str) -> bool:
    """Whether an entry, of the module `name`, repeats what stands under another name too: PEFT adds some of its own."""
    return entry.repeats or not {"modules_to_save", "original_module"}.isdisjoint(name.split("."))


def _tensor_key(name: str, tensor: str, adapted: Collection[str]) -> str:
    """The name of a tensor in a file: PEFT's layer around each adapted module puts `base_layer` behind its name."""
    path = [part for prefix in _prefixes(name) for part in (prefix.rpartition(".")[2], "base_layer" * (prefix in adapted))]
    return join(*path, tensor)


def _prefixes(name: str) -> list[str]:
    """`["", "a", "a.b"]` for `"a.b"`."""
    segments = name.split(".") if name else []
    return [".".join(segments[:end]) for end in range(len(segments) + 1)]


def _sibling(name: str, last: str) -> str:
    return join(name.rpartition(".")[0], last)


def check_frozen(keys: Keys, adapted: Collection[nn.Module], trained: Collection[Held]) -> None:
    """Take what PEFT stores of the base of a targeted output layer out of the keys. It must be that of this model."""
    for owner, tensor in [held for held in keys.tensors if held[0] in adapted and held not in trained]:
        entry, base = keys.tensors.pop((owner, tensor)), base_tensor(owner, tensor)
        value = read_tensors({0: entry})[0]
        if base.is_floating_point() and not base.is_meta and not torch.equal(value.to(base.dtype), base.detach().cpu()):
            raise entry.error(
                "is of the base, and this model's differs. Is it the base model that the adapter was trained on?"
            )


def check_repeated(keys: Keys) -> None:
    """A module that has two names in a file has one value: both entries must agree."""
    for first, other in keys.repeated:
        one, two = read_tensors({0: first, 1: other}).values()
        if one.shape != two.shape or not torch.allclose(one.double(), two.double(), rtol=0, atol=0, equal_nan=True):
            raise other.error(f"differs from {first.key!r}, but this model has one module of both names, with one value.")


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
    trained = {(owner, name) for owner, names in plan.copied.items() for name in names}
    check_frozen(keys, {target.owner for target in plan.targets}, trained)
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


def check_live(
    path: Path, stored: Mapping[Held, Entry], live: Mapping[Held, Tensor], names: Mapping[Held, Sequence[str]]
) -> None:
    """Hold the tensors of a file against those of the adapter that they are swapped into."""
    for held in (*live, *stored):
        if held not in stored:
            raise CheckpointError(f"{path}: key {PREFIX + names[held][0]!r} is missing.")
        if held not in live:
            raise stored[held].error("is not part of the adapter on the model.")
        shape = tuple(live[held].shape)
        told = f", on the model it is {shape}: load it under a new name with load_adapter instead."
        stored[held].check(shape, live[held].is_floating_point(), told, f"; it takes {_FLOATS}.")

"""From a host and a config to a complete, checked `Plan`. Nothing here changes the model."""

from __future__ import annotations

import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from misscompile.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    NoMatchError,
    StateError,
    UnsupportedModuleError,
)
from misscompile.hosts.base import Host, has_attribute
from misscompile.hosts.modules import refusal_notes
from misscompile.record.spread import check_before_spreading
from misscompile.record.state import STATE, OwnerState, copy_name
from misscompile.record.walk import check_enabled, check_unmerged, join
from misscompile.record.words import Adapter, Block, Plan, Refusal, Target
from misscompile.rules.config import MissConfig
from misscompile.rules.model_types import TARGETS_BY_MODEL_TYPE
from misscompile.rules.names import rank_of, ranks_without_effect, select_names
from misscompile.variants import VARIANTS

_CLASSIFIER_NAMES = ("score", "classifier")
_TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that a task trains in full without being told, as PEFT's model classes do."""
_SHOWN = 5


def make_plan(
    host: Host, config: MissConfig, adapter_name: str, round_bat_weight: bool = False, trainable: bool = True
) -> Plan:
    """Choose the sites of a model, look at each, and say what will be registered where. Errors are those of `adapt`."""
    check_adapter_name(adapter_name, host.states())
    names, linears = host.names(), host.linear_names()
    config = _with_task_heads(config, host.modules)
    implicit = config.selects_all_linear  # found by a rule, not named: what cannot be adapted is passed over and told
    refusals = host.passed_over() if implicit else []
    if implicit and not linears:
        _check_refusals(refusals, [], implicit)
    outputs = _outputs(host.output_names(), config, names)
    selection = select_names(config, names, _targets(host, config, linears), set(linears) - outputs)
    rounds = round_bat_weight and VARIANTS[config.variant].reads_weight
    block = Block(adapter_name, config.variant, config.r, config.mini_r, float(config.miss_dropout), rounds)
    saved = [host.modules[name] for name in selection.saved if name in host.modules]
    whole = {inner for outer in saved for inner in outer.modules()}
    chosen = [name for name in selection.chosen if host.modules.get(name) not in whole]  # not under another name either
    if not chosen:
        raise NoMatchError(
            f"modules_to_save={config.modules_to_save!r} takes {selection.chosen[0]!r} and all else targeted."
        )
    check_before_spreading(host.root, {name: host.modules[name] for name in chosen if name in host.modules}, trainable)
    looked = [found for name in chosen for found in host.look(name, dataclasses.replace(block, r=rank_of(config, name)))]
    targets = [found for found in looked if isinstance(found, Target)]
    refusals = [*refusals, *(found for found in looked if isinstance(found, Refusal))]
    idle = {t.name: Refusal(t.name, type(t.owner).__name__, why) for t in targets if (why := _weight_problem(t, trainable))}
    targets, refusals = [target for target in targets if target.name not in idle], [*refusals, *idle.values()]
    _check_refusals(refusals, targets, implicit)
    targets, misfits = _fitting(targets, config, implicit)
    refusals += misfits
    copied = _trained_in_full(host, config, whole, targets)
    _check_names_free(host, copied, adapter_name)
    check_before_spreading(host.root, {host.canonical[module]: module for module in copied}, trains=True)
    ranks = ranks_without_effect(config, [target.name for target in targets])
    notes = [*selection.notes, *ranks, *refusal_notes("not adapted:", refusals), *host.notes(targets)]
    return Plan(Adapter(adapter_name, config, trainable, tuple(refusals)), host.canonical, targets, notes, copied)


def check_complete(host: Host, adapter: Adapter) -> None:
    """Refuse to save an adapter where a module that its config names has none of it: the folder could not be loaded.

    Raises:
        CheckpointError: naming the module.
    """
    config = adapter.config
    if host.in_graph or config.target_modules is None or config.selects_all_linear:  # saved as the names that have blocks
        return
    try:
        selection = select_names(config, host.names(), config.target_modules, ())
    except NoMatchError:  # a part of the model
        return
    whole = {inner: name for name in selection.saved for inner in host.modules[name].modules()}
    needed = {host.modules[name]: name for name in selection.chosen if host.modules[name] not in whole}
    needed |= {inner: host.canonical[inner] for inner in whole if any(p is not None for p in inner._parameters.values())}
    for module, name in needed.items():
        state: OwnerState | None = vars(module).get(STATE)
        if state is None or adapter.name not in state.adapters:
            raise CheckpointError(
                f"{name}: the config of {adapter.name!r} chooses it, and it has nothing of that adapter, since it was made "
                "after adapting (resize_token_embeddings makes a new output layer). Make it before adapting."
            )


def check_adapter_name(name: object, states: Mapping[str, OwnerState]) -> None:
    """Refuse a name that cannot be a new adapter of a model with these records, and a model that cannot take one now."""
    if not isinstance(name, str):
        raise ArgumentError(f"adapter_name: expected a string, found {type(name).__name__}.")
    plain = unicodedata.normalize("NFKC", name)  # as Python reads a name in generated code
    if plain != name or not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(
            f"adapter_name={name!r}: a name becomes part of a parameter name, so it holds letters, digits, _ and - only (no "
            f"dot), in their normal form; {re.sub(r'[^-A-Za-z0-9_]+', '_', plain) or 'default'!r} would do."
        )
    check_enabled(states, "adapt")
    for owner_name, state in states.items():
        if name in state.adapters:
            raise StateError(
                f"adapter_name={name!r} is in use ({owner_name or '(root)'}): choose another name, or remove that adapter "
                f"first with delete_adapter(model, {name!r})."
            )
    check_unmerged(states, "adapt")


def _targets(host: Host, config: MissConfig, linears: Sequence[str]) -> Collection[str] | str:
    """`target_modules`, or the names that the model-type table gives in place of None."""
    if config.target_modules is not None:
        return config.target_modules
    model_type = host.model_type()
    if model_type not in TARGETS_BY_MODEL_TYPE:
        suffixes = dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears)
        known = difflib.get_close_matches(str(model_type), list(TARGETS_BY_MODEL_TYPE), n=2)
        raise ConfigError(
            f"target_modules=None: there is no default for model_type={model_type!r}"
            f"{f' (close: {known})' if known else ''}. Set target_modules to 'all-linear' or to some of the linear "
            f"names of this model: {', '.join(suffixes) or 'none found'}."
        )
    return TARGETS_BY_MODEL_TYPE[model_type]


def _outputs(embedding: set[str], config: MissConfig, names: Sequence[str]) -> set[str]:
    """What "all-linear" leaves out: the output embedding, or the head of a sequence classifier with all it holds."""
    if embedding or config.task_type != "SEQ_CLS":
        return embedding
    head = next((name for name in _CLASSIFIER_NAMES if name in names), None)
    return set() if head is None else {name for name in names if name == head or name.startswith(f"{head}.")}


def _with_task_heads(config: MissConfig, names: Collection[str]) -> MissConfig:
    """`config` with the head of its task among the modules to save."""
    heads = [head for head in _TASK_HEADS.get(config.task_type or "", ()) if any(name.endswith(head) for name in names)]
    saved = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    return dataclasses.replace(config, modules_to_save=saved or None)


def _trained_in_full(
    host: Host, config: MissConfig, whole: Collection[nn.Module], targets: Sequence[Target]
) -> dict[nn.Module, tuple[str, ...]]:
    """The tensors of each module that the adapter trains beside its blocks: all of `whole`, and biases."""
    biases = host.biases(targets) if config.bias == "MiSS_only" else {}
    found: dict[nn.Module, tuple[str, ...]] = {}
    for module, module_name in host.canonical.items():
        names: list[str] = []
        parameters = list(module._parameters.keys())  # that of a scripted module iterates by index
        if module in whole:
            names += parameters
            names += (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        else:
            every, own = config.bias == "all", biases.get(module, ())
            names += (name for name in parameters if name in own or (every and "bias" in name))
        ours = vars(module)[STATE].all_registered() if STATE in vars(module) else ()
        names = [name for name in names if getattr(module, name) is not None and name not in ours]
        if names:
            _check_copies_act(module, module_name)
            found[module] = tuple(names)
    return found


def _check_names_free(host: Host, copied: Mapping[nn.Module, Sequence[str]], adapter_name: str) -> None:
    """Refuse a copy whose name something else has."""
    for module, tensors in copied.items():
        for tensor in tensors:
            if has_attribute(module, name := copy_name(adapter_name, tensor)):
                raise ConfigError(
                    f"adapter_name={adapter_name!r}: the trained copy of {join(host.canonical[module], tensor)} would be "
                    f"{name!r}, which its module has already; choose another name."
                )


def _check_copies_act(module: nn.Module, module_name: str) -> None:
    if isinstance(module, nn.RNNBase):
        raise UnsupportedModuleError(
            f"{module_name or 'the model itself'} ({type(module).__name__}) keeps its weights in a list of its own, so that "
            "a trained copy of them would have no effect: leave it out of modules_to_save and bias."
        )


def _weight_problem(target: Target, trainable: bool) -> str | None:
    """Why no update can be added to what a linear computes, whatever its forward."""
    if 0 in (target.in_features, target.out_features):
        return f"it has no {'outputs' if target.in_features else 'inputs'}"
    weight = target.weight
    if weight is None:
        return None
    if weight.layout != torch.strided:
        return f"its weight is sparse ({weight.layout}); make it dense first (weight.to_dense())"
    packed = target.scope is not None and target.scope.opaque is not None and not weight.is_complex()
    if not weight.is_floating_point() and not packed:
        return f"its weight is {weight.dtype}, and an update is real and floating-point"
    if weight.is_inference() and trainable:
        return (
            "its weight was made under torch.inference_mode, so that nothing can be trained through it; make the model "
            "outside of it, or load the adapter for inference"
        )
    return None


def _check_refusals(refusals: Sequence[Refusal], targets: Sequence[Target], implicit: bool) -> None:
    if not refusals or (implicit and targets):
        return
    listed = _listed([f"{refusal.name} ({refusal.kind}): {refusal.reason}" for refusal in refusals])
    if implicit:
        raise NoMatchError(f"target_modules='all-linear': no linear of this model can be adapted.{listed}")
    raise UnsupportedModuleError(
        f"target_modules names modules on which an adapter would have no effect:{listed}\n"
        "Name other modules, or add these to exclude_modules."
    )


def _fitting(targets: list[Target], config: MissConfig, implicit: bool) -> tuple[list[Target], list[Refusal]]:
    """The targets that blocks of this config fit, and why not the others; an error if such a one was named, or none fits."""
    fields, misfits = set(), {}
    for target in targets:
        sizes = target.in_features, target.out_features
        problem = VARIANTS[config.variant].shape_problem(target.block.r, config.mini_r, *sizes)
        if problem is not None:
            fields.add(problem[0] if problem[0] != "r" or target.block.r == config.r else "rank_pattern")
            misfits[target.name] = Refusal(target.name, "→".join(map(str, sizes)), problem[1])
    if misfits and not (implicit and len(misfits) < len(targets)):
        field = next(field for field in ("r", "rank_pattern", "mini_r") if field in fields)
        problems = [f"{misfit.name or '(root)'} ({misfit.kind}): {misfit.reason}" for misfit in misfits.values()]
        raise ConfigError(
            f"MissConfig.{field}={getattr(config, field)} does not fit {len(problems)} of {len(targets)} chosen modules:"
            f"{_listed(problems)}"
        )
    return [target for target in targets if target.name not in misfits], list(misfits.values())


def _listed(lines: Sequence[str]) -> str:
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:_SHOWN], *more])

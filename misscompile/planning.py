"""From a model and a config to a complete, checked `Plan`. Nothing here changes the model."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from misscompile import variants
from misscompile.config import MissConfig
from misscompile.errors import ArgumentError, ConfigError, NoMatchError, StateError, UnsupportedModuleError
from misscompile.model_types import TARGETS_BY_MODEL_TYPE
from misscompile.passes.bypass import Bypass, find_bypassed
from misscompile.passes.find import linear_shape
from misscompile.passes.install import find_foreign_forward
from misscompile.passes.trace import probe_opaque
from misscompile.pipeline import trace_scope
from misscompile.plan import Adapter, Block, Plan, Refusal, Target
from misscompile.state import STATE, OwnerState, has_attribute, inside_disabled, named_modules, records
from misscompile.targets import Selection, select_names

_CLASSIFIER_NAMES = ("score", "classifier")
_TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that a task trains in full without being told, as PEFT's model classes do."""
_SHOWN = 5


def plan_adapter(model: nn.Module, config: MissConfig, adapter_name: str) -> Plan:
    """Choose the modules of an ordinary model, look at each, and say what will be registered where.

    Raises:
        ConfigError, NoMatchError, UnsupportedModuleError, StateError, ArgumentError: see `misscompile.adapt`.
    """
    modules = named_modules(model, remove_duplicate=False)
    check_adapter_name(adapter_name, records(modules))
    config = with_task_heads(config, modules)
    canonical = canonical_names(modules)
    if linear_shape(model) is None:
        del modules[""]
    selection = _select(model, config, modules)
    implicit = config.selects_all_linear  # found by a rule, not named: what cannot be adapted is passed over and told
    bypassed = find_bypassed(canonical)
    block = Block(adapter_name, config.variant, config.r, config.mini_r, float(config.miss_dropout))
    targets: list[Target] = []
    refusals: list[Refusal] = _fused_experts(canonical) if implicit else []
    for owner in dict.fromkeys(modules[name] for name in selection.chosen):
        found = _target(canonical[owner], owner, block, bypassed)
        if isinstance(found, Target):
            targets.append(found)
        else:
            refusals.append(found)
    check_refusals(refusals, targets, implicit)
    check_shapes(targets, config)
    partly = [Refusal(t.name, type(t.owner).__name__, bypassed[t.owner].reason) for t in targets if t.owner in bypassed]
    notes = [
        *selection.notes,
        *refusal_notes("not adapted:", refusals),
        *refusal_notes("adapted, but not on every path:", partly),
    ]
    adapter = Adapter(adapter_name, config, refusals=tuple(refusals))
    copied = trained_in_full(model, config, [modules[name] for name in selection.saved], targets)
    return Plan(adapter, canonical, targets, notes + _shared_weights(canonical, targets), copied)


def check_adapter_name(name: object, states: Mapping[str, OwnerState]) -> None:
    """Refuse a name that cannot be a new adapter of a model with these records, and a model that cannot take one now."""
    if not isinstance(name, str):
        raise ArgumentError(f"adapter_name: expected a string, found {type(name).__name__}.")
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(
            f"adapter_name={name!r}: a name becomes part of a parameter name, so it holds letters, digits, _ and - only (no "
            f"dot); {re.sub(r'[^-A-Za-z0-9_]+', '_', name) or 'default'!r} would do."
        )
    for owner_name, state in states.items():
        if state.disabled:
            raise inside_disabled("adapt")
        if name in state.adapters:
            raise StateError(
                f"adapter_name={name!r} is in use ({owner_name or '(root)'}): choose another name, or remove that adapter "
                f"first with delete_adapter(model, {name!r})."
            )
        if state.merged:
            raise StateError(
                f"{owner_name} holds the merged adapter {state.merged[0]!r}: call unmerge(model) before adapting again."
            )


def with_task_heads(config: MissConfig, names: Collection[str]) -> MissConfig:
    """`config` with the head of its task among the modules to save."""
    saved = list(config.modules_to_save or ())
    for head in _TASK_HEADS.get(config.task_type or "", ()):
        if head not in saved and any(name.endswith(head) for name in names):
            saved.append(head)
    return dataclasses.replace(config, modules_to_save=saved or None)


def trained_in_full(
    model: nn.Module, config: MissConfig, saved: Sequence[nn.Module], targets: Sequence[Target]
) -> dict[nn.Module, tuple[str, ...]]:
    """The tensors of each module that the adapter trains beside its blocks."""
    found: dict[nn.Module, dict[str, None]] = {}
    for module in dict.fromkeys(inner for outer in saved for inner in outer.modules()):
        buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        own = [name for name in (*module._parameters, *buffers) if getattr(module, name) is not None]
        found.setdefault(module, {}).update(dict.fromkeys(own))
    if config.bias != "none":
        modules = model.modules() if config.bias == "all" else [target.owner for target in targets]
        for module in modules:
            own = [name for name, value in module._parameters.items() if "bias" in name and value is not None]
            found.setdefault(module, {}).update(dict.fromkeys(own))
    registered = {module: set(vars(module)[STATE].all_registered()) for module in found if STATE in vars(module)}
    result = {m: tuple(n for n in names if n not in registered.get(m, ())) for m, names in found.items()}
    for module, names in result.items():
        if names and isinstance(module, nn.RNNBase):
            raise UnsupportedModuleError(
                f"{_name_of(model, module)} ({type(module).__name__}) keeps its weights in a list of its own, so that a "
                "trained copy of them would have no effect: leave it out of modules_to_save and bias."
            )
    return {module: names for module, names in result.items() if names}


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in named_modules(model).items() if other is module) or "the model itself"


def canonical_names(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Each module with the first of the names under which the model reaches it."""
    canonical: dict[nn.Module, str] = {}
    for name, module in modules.items():
        canonical.setdefault(module, name)
    return canonical


def _select(model: nn.Module, config: MissConfig, modules: dict[str, nn.Module]) -> Selection:
    linears = {name: module for name, module in modules.items() if _is_linear(module)}
    targets: Collection[str] | str
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in TARGETS_BY_MODEL_TYPE:
            suffixes = dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears)
            known = difflib.get_close_matches(str(model_type), list(TARGETS_BY_MODEL_TYPE), n=2)
            raise ConfigError(
                f"target_modules=None: there is no default for model_type={model_type!r}"
                f"{f' (close: {known})' if known else ''}. Set target_modules to 'all-linear' or to some of the linear "
                f"names of this model: {', '.join(suffixes) or 'none found'}."
            )
        targets = TARGETS_BY_MODEL_TYPE[model_type]
    else:
        targets = config.target_modules
    outputs = _output_layers(model, config)
    all_linear = {name for name, module in linears.items() if module not in outputs}
    return select_names(config, list(modules), targets, all_linear)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    named_linear = "linear" in type(module).__name__.lower() or "nf" in vars(module)
    return named_linear and linear_shape(module) is not None


def _output_layers(model: nn.Module, config: MissConfig) -> set[nn.Module]:
    """What "all-linear" leaves out: the output embedding, or the head of a sequence classifier."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if output is not None:
        return {output}
    if config.task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in _CLASSIFIER_NAMES)
        head = next((head for head in heads if isinstance(head, nn.Module)), None)
        return set() if head is None else {head, *head.modules()}
    return set()


def _target(name: str, owner: nn.Module, block: Block, bypassed: dict[nn.Module, Bypass]) -> Target | Refusal:
    kind = type(owner).__name__
    shape = linear_shape(owner)
    if shape is None:
        return Refusal(name, kind, f"it is not a linear module{_linears_inside(name, owner)}")
    if owner in bypassed and not bypassed[owner].called:
        return Refusal(name, kind, bypassed[owner].reason)
    if any(nn.parameter.is_lazy(p) for p in owner._parameters.values() if p is not None):
        return Refusal(name, kind, "its shape is not known yet; run the model once on real input first")
    if getattr(vars(owner).get("_hf_hook"), "offload", False):
        return Refusal(name, kind, "accelerate offloads its weight; adapt the model before dispatching it")
    if STATE not in vars(owner) and has_attribute(owner, block.parameter):
        return Refusal(name, kind, f"it already has an attribute {block.parameter!r}")
    scope = trace_scope(owner, shape)
    if scope.opaque is not None:
        problem = None if find_foreign_forward(owner) else probe_opaque(owner, scope.base_class, shape)
        if problem is None and block.variant == "bat":
            problem = f"{scope.opaque}, and 'bat' needs the weight itself (init_weights=True or 'mini' do not)"
        if problem is not None:
            return Refusal(name, kind, problem)
    return Target(name, owner, *shape, block, scope)


def _linears_inside(name: str, owner: nn.Module) -> str:
    inside = [f"{name}.{child}" for child, module in owner.named_modules() if child and _is_linear(module)]
    return f" (the linears inside: {', '.join(inside[:_SHOWN])})" if inside else ""


def _fused_experts(canonical: Mapping[nn.Module, str]) -> list[Refusal]:
    found: list[Refusal] = []
    for module, name in canonical.items():
        if type(module).__module__.startswith("torch.nn."):
            continue
        for parameter_name, parameter in module._parameters.items():
            if parameter is None or "miss_block" in parameter_name:
                continue
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                shape = "×".join(map(str, parameter.shape))
                reason = f"its {parameter_name} ({shape}) is a stack of fused weights, not a linear"
                found.append(Refusal(name, type(module).__name__, reason))
                break
    return found


def refusal_notes(what: str, refusals: Sequence[Refusal]) -> list[str]:
    """One sentence for each reason: a model with many layers should not warn once for each of them."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        grouped.setdefault((refusal.kind, refusal.reason), []).append(refusal.name)
    notes = []
    for (kind, reason), names in grouped.items():
        more, verb = (f" and {len(names) - 1} more", "are") if len(names) > 1 else ("", "is")
        notes.append(f"{names[0]} ({kind}){more} {verb} {what} {reason}")
    return notes


def check_refusals(refusals: Sequence[Refusal], targets: Sequence[Target], implicit: bool) -> None:
    if implicit and targets:
        return
    if refusals:
        lines = [f"\n  {r.name} ({r.kind}): {r.reason}" for r in refusals[:_SHOWN]]
        more = f"\n  … and {len(refusals) - _SHOWN} more" if len(refusals) > _SHOWN else ""
        if implicit:
            raise NoMatchError(f"target_modules='all-linear': no linear of this model can be adapted.{''.join(lines)}{more}")
        raise UnsupportedModuleError(
            f"target_modules names modules on which an adapter would have no effect:{''.join(lines)}{more}\n"
            "Name other modules, or add these to exclude_modules."
        )


def check_shapes(targets: Sequence[Target], config: MissConfig) -> None:
    problems = [
        f"\n  {t.name or '(root)'} ({t.in_features}→{t.out_features}): {problem}"
        for t in targets
        if (problem := variants.shape_problem(config.variant, config.r, config.mini_r, t.in_features, t.out_features))
    ]
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        field = "mini_r" if config.variant == "mini" and config.r <= min(t.in_features for t in targets) else "r"
        raise ConfigError(
            f"MissConfig.{field}={getattr(config, field)} does not fit {len(problems)} of {len(targets)} chosen modules:"
            f"{''.join(problems[:_SHOWN])}{more}"
        )


def _shared_weights(canonical: Mapping[nn.Module, str], targets: Sequence[Target]) -> list[str]:
    """A note for each adapted weight that modules outside the plan use too: the merge will refuse it."""
    owners = {target.owner for target in targets}
    users: dict[int, str] = {}
    for module, name in canonical.items():
        if module not in owners:
            for parameter_name, parameter in module._parameters.items():
                if parameter is not None:
                    users[id(parameter)] = f"{name}.{parameter_name}" if name else parameter_name
    return [
        f"{target.name} shares its weight with {user}: the adapter acts on this module alone, and merge will "
        "refuse until the weight is untied"
        for target in targets
        if (user := users.get(id(target.owner._parameters.get("weight")))) is not None
    ]

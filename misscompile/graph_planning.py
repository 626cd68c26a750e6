"""From a whole graph and a config to a complete, checked `Plan`. The base graph is not changed."""

from __future__ import annotations

from collections.abc import Collection

from misscompile.config import MissConfig
from misscompile.errors import ConfigError, StateError, UnsupportedModuleError
from misscompile.graphs import (
    GraphRecord,
    WholeGraph,
    call_names,
    call_owner,
    find_graph_sites,
    owner_state,
    record_of,
    require_container,
)
from misscompile.model_types import TARGETS_BY_MODEL_TYPE
from misscompile.plan import Adapter, Block, ModelScope, Plan, Refusal, Site, Target
from misscompile.planning import (
    canonical_names,
    check_adapter_name,
    check_refusals,
    check_shapes,
    refusal_notes,
    trained_in_full,
    with_task_heads,
)
from misscompile.state import named_modules, owner_states
from misscompile.targets import Selection, select_names

_CLASSIFIER_NAMES = ("score", "classifier")


def plan_graph_adapter(root: WholeGraph, config: MissConfig, adapter_name: str, per_call_site: bool) -> Plan:
    """Choose the linear calls of a whole graph and say what will be registered where.

    Args:
        root: a graph of its own: containers for the blocks are added to it.
        config: the rules; its names are those of the modules that own the weights.
        adapter_name: not in use on `root`.
        per_call_site: give each call of a weight that is called several times a block of its own.

    Raises:
        ConfigError, NoMatchError, UnsupportedModuleError, StateError, ArgumentError: see `misscompile.adapt`.
    """
    check_adapter_name(adapter_name, owner_states(root))
    config = with_task_heads(config, named_modules(root))
    scope = find_graph_sites(root)
    calls = call_names(scope)
    _check_names(scope, calls)
    refused = {refusal.name: refusal for refusal in scope.refusals}
    if config.selects_all_linear and not calls:
        check_refusals(scope.refusals, [], implicit=True)
    containers = [name for name in named_modules(root, remove_duplicate=False) if name]
    selection = _select(root, config, calls, [*containers, *calls, *refused])
    implicit = config.selects_all_linear
    block = Block(adapter_name, config.variant, config.r, config.mini_r, float(config.miss_dropout))
    targets: list[Target] = []
    refusals: list[Refusal] = list(scope.refusals) if implicit else []
    for name in selection.chosen:
        if name in calls:
            targets += _targets(root, name, calls[name], block, per_call_site)
        elif name in refused:
            refusals.append(refused[name])
        elif not implicit:
            refusals.append(Refusal(name, "module", f"the graph has no linear call of its own weight{_inside(name, calls)}"))
    check_refusals(refusals, targets, implicit)
    check_shapes(targets, config)
    told = [*selection.notes, *refusal_notes("not adapted:", refusals)]
    modules = named_modules(root, remove_duplicate=False)
    copied = trained_in_full(root, config, [modules[name] for name in selection.saved], targets)
    adapter = Adapter(adapter_name, config, refusals=tuple(refusals))
    return Plan(adapter, canonical_names(modules), targets, told, copied)


def _check_names(scope: ModelScope, calls: dict[str, list[Site]]) -> None:
    if not calls and scope.unnamed:
        raise UnsupportedModuleError(
            f"the weights of {len(scope.unnamed)} linear calls of the graph have no owner's name (the first is "
            f"{scope.unnamed[0]!r}, and no nn_module_stack tells its module), so that no rule can choose among them. Make "
            "the graph with misscompile.capture or torch.export.export, which keep the names."
        )


def _targets(root: WholeGraph, name: str, calls: list[Site], block: Block, per_call_site: bool) -> list[Target]:
    own = per_call_site and len(calls) > 1
    _check_sharing(root, name, calls, own)
    owners = [call_owner(name, index) for index in range(len(calls))] if own else [name]
    targets = []
    for owner, site in zip(owners, calls, strict=False):
        assert site.path is not None
        weight = root.get_parameter(site.path.parameter)
        shared = (id(weight), site.path.steps, owner if own else "")
        sizes = site.in_features, site.out_features
        targets.append(Target(owner, require_container(root, owner), *sizes, block, weight=weight, shared_by=shared))
    return targets


def _check_sharing(root: WholeGraph, name: str, calls: list[Site], own: bool) -> None:
    """Refuse an adapter that shares what another one does not: a call has one owner."""
    for other in [name] if own else [call_owner(name, index) for index in range(len(calls))]:
        state = owner_state(root, other)
        if state is not None and state.blocks:
            had = "one block for all its calls" if own else "a block for each of its calls"
            raise StateError(
                f"{name}: the adapter {next(iter(state.blocks))!r} has {had}; adapt with per_call_site={not own} as well, "
                "or on a graph without that adapter."
            )


def _inside(name: str, calls: Collection[str]) -> str:
    inside = [call for call in calls if call.startswith((f"{name}.", f"{name}#"))]
    return f" (linears inside: {', '.join(inside[:5])})" if inside else ""


def _select(root: WholeGraph, config: MissConfig, calls: dict[str, list[Site]], names: list[str]) -> Selection:
    record = record_of(root)
    targets: Collection[str] | str
    if config.target_modules is None:
        if record.model_type not in TARGETS_BY_MODEL_TYPE:
            suffixes = dict.fromkeys(name.rsplit(".", 1)[-1] for name in calls)
            raise ConfigError(
                f"target_modules=None: there is no default for a graph of model_type={record.model_type!r}. Set "
                f"target_modules to 'all-linear' or to some of its linear names: {', '.join(suffixes) or 'none found'}."
            )
        targets = TARGETS_BY_MODEL_TYPE[record.model_type]
    else:
        targets = config.target_modules
    outputs = _output_names(record, config, names)
    all_linear = [name for name in calls if name not in outputs]
    return select_names(config, list(dict.fromkeys(names)), targets, all_linear)


def _output_names(record: GraphRecord, config: MissConfig, names: list[str]) -> set[str]:
    if record.outputs or config.task_type != "SEQ_CLS":
        return set(record.outputs)
    head = next((name for name in _CLASSIFIER_NAMES if name in names), None)
    return set() if head is None else {name for name in names if name == head or name.startswith(f"{head}.")}

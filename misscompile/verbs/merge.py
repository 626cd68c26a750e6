"""`merge` and `unmerge`: adapters folded into the weights, for export or on trial."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from misscompile.errors import MergeError, MissWarning, StateError
from misscompile.hosts.base import LastWrite, check_copies_finite, check_copies_unshared
from misscompile.hosts.opening import (
    check_graphs_whole,
    forget_kept,
    hosts_in,
    open_adapted,
    parts_of_graphs,
    refresh,
    refresh_graphs,
    swap_merged,
)
from misscompile.hosts.owner_class import check_classes, remove_from_owner, restore_owner
from misscompile.hosts.recover import holds_exported_adapters
from misscompile.record.spread import check_whole, forget_removed, reshard
from misscompile.record.state import STATE, is_current
from misscompile.record.transaction import Undo, deferred_interrupt, transaction
from misscompile.record.walk import (
    adapters_of,
    check_enabled,
    named_modules,
    owner_states,
    owners,
    require_adapters,
    unwrap_model,
)
from misscompile.verbs.adapt import M
from misscompile.verbs.switch import active_adapters, check_copies_apart


def merge(
    model: M | torch.export.ExportedProgram, adapter_names: str | Sequence[str] | None = None, keep_adapters: bool = False
) -> M:
    """Fold adapters into the weights in place, summed in float32 or wider and rounded once to the dtype of the weight.

    Args:
        model: an adapted model; or an exported program, or its module, that was exported from an adapted graph.
        adapter_names: the adapters to fold, one name or several, which are then removed while all others stay. By default
            the active ones are folded, every adapter is removed, and the modules are plain again.
        keep_adapters: keep the blocks, and a copy of each base weight, so that `unmerge` brings every bit back.

    Returns:
        `model`, the same object; of a foreign graph a new `GraphModule`. A parametrized weight becomes a plain one. The
        weights of a graph are new parameters: the values that it shares with another model are not written.

    Raises:
        MergeError: a result is not finite although the base's was, or a weight cannot be folded because its module's
            forward is opaque, it is on the meta device or offloaded, or something reads its memory on which not the same
            blocks act. Nothing is changed then.
        StateError: the model has no adapter, is merged already, or is inside `disable_adapter`; or two of the adapters
            train one tensor in full; or FSDP1 or ZeRO-3 holds its parameters in parts.
        UnknownAdapterError: a name is not on the model.

    Whatever else it raises, the model is as it was. A module tree's weights are written in place, without a second copy to
    go back to: that is the last step, with all its memory taken before, and Ctrl-C waits for its end.

    Of a model that is sharded by FSDP2 or tensor parallel, every process makes the call. Each weight is gathered in turn.
    """
    exported = holds_exported_adapters(model)
    root = open_adapted(model, "merge")
    check_whole(root if exported else model, "merge")  # type: ignore[arg-type]
    reshard(root)
    names = _names_to_merge(root, adapter_names)
    adapted = owners(root)
    check_classes(adapted)
    check_graphs_whole(root, adapted, "merge")
    check_copies_unshared(root, names)
    check_copies_finite(root, names)
    hosts = hosts_in(root)
    folds = [host.plan_folds(names, keep_adapters) for host in hosts]
    for fold in itertools.chain(*folds):
        fold.check()  # every result is known to be as finite as its weight before a weight changes
    removed = [name for name in adapters_of(root) if adapter_names is None and not keep_adapters and name not in names]
    if removed:  # a filter may turn the warning into an error
        warnings.warn(f"merge removed the inactive adapters {removed} without folding them.", MissWarning, stacklevel=2)
    with transaction(named_modules(root).values(), parts_of_graphs(root)) as undo:
        for name, owner in adapted.items():
            if removed:
                remove_from_owner(owner, removed, name)
        last = [host.write_folds(planned, names, keep_adapters, undo) for host, planned in zip(hosts, folds, strict=True)]
        refresh_graphs(root)
        _write_in_place(itertools.chain(*last), undo)
    forget_removed(root)
    return root if exported else model  # type: ignore[return-value]


def _write_in_place(writes: Iterable[LastWrite], undo: Undo) -> None:
    with deferred_interrupt():
        for modules, write in writes:
            write()
            undo.settle(modules)


def unmerge(model: M) -> M:
    """Undo `merge(model, keep_adapters=True)`: the base weights return bit for bit and the adapters act again.

    Returns:
        `model`, the same object.

    Raises:
        StateError: nothing is merged, or the model is inside `disable_adapter`.
        MergeError: a weight has other values than the merge gave it, so that its base is no longer the kept one.
    """
    root = unwrap_model(model)
    check_whole(model, "unmerge")
    reshard(root)
    check_enabled(owner_states(root), "unmerge")
    adapted = owners(root)
    if not any(vars(owner)[STATE].merged for owner in adapted.values()):
        raise StateError("nothing is merged: unmerge undoes merge(model, keep_adapters=True).")
    check_graphs_whole(root, adapted, "unmerge")
    for name, owner in adapted.items():
        for tensor, kept in vars(owner)[STATE].kept.items():
            if not is_current(kept, owner, tensor):
                raise MergeError(
                    f"{name}: its {tensor} was changed after it was merged, so unmerge would throw that change away. "
                    "Load the merged values again, then call unmerge; or load the base weights after unload(model)."
                )
    with transaction(named_modules(root).values(), parts_of_graphs(root)) as undo:
        swap_merged(root, adapted, undo)
        forget_kept(root)
        for name, owner in adapted.items():
            if not vars(owner)[STATE].adapters:  # it held a weight of a graph, and no block
                restore_owner(owner, name)
        refresh(root, {name: owner for name, owner in adapted.items() if STATE in vars(owner)})
    return model


def _names_to_merge(root: nn.Module, adapter_names: object) -> tuple[str, ...]:
    states = owner_states(root)
    if not states:
        raise StateError("the model has no adapter: there is nothing to merge.")
    check_enabled(states, "merge")
    for name, state in states.items():
        if state.merged:
            raise StateError(f"{name} holds the merged adapter {state.merged[0]!r} already: call unmerge(model) first.")
    names = active_adapters(root) if adapter_names is None else require_adapters(root, adapter_names, "adapter_names")
    if not names:
        raise StateError("no adapter is active: name the adapters to merge.")
    check_copies_apart(states, names)
    return names

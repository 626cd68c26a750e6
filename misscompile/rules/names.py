"""Which module names a `MissConfig` selects: pure functions over names, with no model and no torch.

The rules are those of PEFT (`check_target_module_exists`, `_maybe_include_all_linear_layers`), applied in the order
exclude, modules_to_save, target, layers.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from misscompile.errors import NoMatchError
from misscompile.rules.config import MissConfig, as_list

WRAPPING = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments that wrappers (`torch.compile`, FSDP1, activation checkpointing) add to the names of a model."""


def strip_wrappers(name: str) -> str:
    """A dotted name without what wrappers add."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPING)


@dataclasses.dataclass(frozen=True)
class Selection:
    """`chosen` and `saved` (modules_to_save) names in model order, and a sentence for each entry without effect."""

    chosen: tuple[str, ...]
    saved: tuple[str, ...]
    notes: tuple[str, ...]


def select_names(
    config: MissConfig, names: Sequence[str], targets: Collection[str] | str, all_linear: Collection[str]
) -> Selection:
    """Apply the selection rules of `config` to the module names of a model; an error where nothing is chosen.

    Args:
        config: gives every rule but the targets.
        names: every module name of the model, in model order.
        targets: `config.target_modules`, or the names that the model-type table gives in place of None.
        all_linear: the names that `"all-linear"` stands for on this model.
    """
    exclude, to_save = config.exclude_modules or (), tuple(config.modules_to_save or ())
    excluded = set(_matching(exclude, names))
    saved = tuple(name for name in names if name.endswith(to_save))
    notes = _without_effect("exclude_modules", _unmatched(exclude, names), names)
    unsaved = [entry for entry in to_save if not any(name.endswith(entry) for name in names)]
    notes += _without_effect("modules_to_save", unsaved, names)
    if config.selects_all_linear:
        targeted = [name for name in names if name in all_linear]
    else:
        targeted = [name for name in _matching(targets, names) if name]
        notes += _without_effect("target_modules", _unmatched(targets, names), names)
    taken, inside_saved = excluded.union(saved), tuple(f"{name}." for name in saved)
    kept = [name for name in targeted if name not in taken and not name.startswith(inside_saved)]
    exact = () if isinstance(targets, str) else set(targets)
    chosen = tuple(name for name in kept if name in exact or _in_layers(config, name))
    notes += _missing_layers(config, targeted)
    if not chosen:
        raise NoMatchError(_nothing_chosen(config, targets, names, targeted, kept))
    return Selection(chosen, saved, tuple(notes))


def layer_index(name: str, patterns: Sequence[str]) -> int | None:
    """The layer number in a dotted name: the one after the first match of a pattern, or the first numbered segment."""
    for pattern in patterns or (None,):
        before = r"(?:^|\.)" if pattern is None else rf"(?:^|\.)(?:{pattern})\."
        found = re.search(before + r"(?P<index>\d+)(?=\.|$)", name)
        if found:
            return int(found["index"])
    return None


def rank_of(config: MissConfig, name: str) -> int:
    """The rank of the block on `name`: by the longest entry of `rank_pattern` that takes the name, or else `r`."""
    ranks = config.rank_pattern or {}
    taken = [entry for entry in ranks if _takes(entry, name)]
    return ranks[max(taken, key=len)] if taken else config.r


def ranks_without_effect(config: MissConfig, chosen: Sequence[str]) -> list[str]:
    """A sentence for each entry of `rank_pattern` that takes none of the chosen names."""
    unused = [entry for entry in config.rank_pattern or () if not any(_takes(entry, name) for name in chosen)]
    return [f"rank_pattern entry {entry!r} matches no adapted module{closest(entry, chosen)}" for entry in unused]


def _takes(entry: str, name: str) -> bool:
    """Whether an entry of `rank_pattern`, an expression for a name or for its last segments, takes a name (as in PEFT)."""
    return re.fullmatch(rf"(?:.*\.)?(?:{entry})", name) is not None


def exact_targets(chosen: Sequence[str], names: Sequence[str]) -> list[str] | str:
    """`target_modules` that chooses exactly `chosen` among `names`: a list, or an expression where a suffix says more."""
    if set(_matching(chosen, names)) <= set(chosen):
        return list(chosen)
    return "|".join(re.escape(name) for name in chosen)


def closest(entry: str, names: Iterable[str]) -> str:
    """`"; closest: 'a', 'b'"` for the names (or their last segments) most like `entry`, or an empty string."""
    candidates: dict[str, None] = {}
    for name in names:
        segments = name.split(".")
        depth = min(entry.count(".") + 1, len(segments))
        candidates[".".join(segments[-depth:])] = None
    found = difflib.get_close_matches(entry, [c for c in candidates if c and not c.isdigit()], n=3, cutoff=0.5)
    return f"; closest: {', '.join(map(repr, found))}" if found else ""


def _matching(rule: Collection[str] | str, names: Iterable[str]) -> list[str]:
    """The names that a rule takes. The entries of a list are looked up, not tried one by one: it may name every module."""
    if isinstance(rule, str):
        return [name for name in names if re.fullmatch(rule, name)]
    entries = set(rule)
    if not entries:
        return []
    return [name for name in names if not entries.isdisjoint(_suffixes(name))]


def _suffixes(name: str) -> list[str]:
    """`["a.b.c", "b.c", "c"]` for `"a.b.c"`: the list entries that would take it."""
    segments = name.split(".")
    return [".".join(segments[start:]) for start in range(len(segments))]


def _unmatched(rule: Collection[str] | str, names: Sequence[str]) -> list[str]:
    """The entries of a rule that take no name."""
    if isinstance(rule, str):
        return [] if _matching(rule, names) else [rule]
    return sorted(set(rule).difference(*map(_suffixes, names))) if rule else []


def _without_effect(field: str, entries: Iterable[str], names: Sequence[str]) -> list[str]:
    return [f"{field} entry {entry!r} matches no module{closest(entry, names)}" for entry in entries]


def _in_layers(config: MissConfig, name: str) -> bool:
    layers = config.layers_to_transform
    return layers is None or layer_index(name, as_list(config.layers_pattern)) in as_list(layers)


def _missing_layers(config: MissConfig, targeted: Sequence[str]) -> list[str]:
    """A sentence for each layer index, and each pattern, that none of the targeted modules has."""
    layers, patterns = as_list(config.layers_to_transform), as_list(config.layers_pattern)
    indices = [layer_index(name, patterns) for name in targeted] if layers else []
    found = {index for index in indices if index is not None}
    there = f"they are in layers {min(found)} to {max(found)}" if found else "they are in no layers"
    notes = [
        f"layers_to_transform index {index} is the layer of no targeted module; {there}"
        for index in layers
        if index not in found
    ]
    unused = [pattern for pattern in patterns if all(layer_index(name, [pattern]) is None for name in targeted)]
    return notes + [f"layers_pattern {pattern!r} is in the name of no targeted module" for pattern in unused]


def _nothing_chosen(
    config: MissConfig, targets: Collection[str] | str, names: Sequence[str], targeted: list[str], kept: list[str]
) -> str:
    """Why: nothing is targeted, everything is taken away, or nothing is in the layers."""
    if not targeted and config.selects_all_linear:
        return "target_modules='all-linear': the model has no linear module beside its output layer."
    entries = [targets] if isinstance(targets, str) else sorted(targets)
    rule = f"target_modules={targets if isinstance(targets, str) else entries!r} matches"
    if not targeted:
        return (
            f"{rule} no module of the model{''.join(closest(entry, names) for entry in entries)}. A list entry matches a "
            "whole name or its last segments; a string is a regular expression for the whole name."
        )
    if not kept:
        return (
            f"{rule} {targeted[0]!r}{_and_more(targeted)}, but exclude_modules={config.exclude_modules!r} and "
            f"modules_to_save={config.modules_to_save!r} take all of it away."
        )
    return (
        f"{rule} {kept[0]!r}{_and_more(kept)}, but none is in layers_to_transform={config.layers_to_transform!r} "
        f"(layers_pattern={config.layers_pattern!r})."
    )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

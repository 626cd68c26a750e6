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
from misscompile.rules.config import MissConfig


@dataclasses.dataclass(frozen=True)
class Selection:
    """`chosen` and `saved` (modules_to_save) names in model order, and a sentence for each entry without effect."""

    chosen: tuple[str, ...]
    saved: tuple[str, ...]
    notes: tuple[str, ...]


def select_names(
    config: MissConfig, names: Sequence[str], targets: Collection[str] | str, all_linear: Collection[str]
) -> Selection:
    """Apply the selection rules of `config` to the module names of a model.

    Args:
        config: gives exclude_modules, modules_to_save, layers_to_transform and layers_pattern.
        names: every module name of the model, in model order.
        targets: `config.target_modules`, or the names that the model-type table gives in place of None.
        all_linear: the names that `"all-linear"` stands for on this model.

    Raises:
        NoMatchError: nothing is chosen; the message names the rule that emptied the selection and the closest names.
    """
    notes: list[str] = []
    excluded = set(_matching(config.exclude_modules, names)) if config.exclude_modules is not None else set()
    notes += _unmatched("exclude_modules", config.exclude_modules, names)
    to_save = tuple(config.modules_to_save or ())
    saved = tuple(name for name in names if name.endswith(to_save))
    notes += [
        f"modules_to_save entry {entry!r} matches no module{closest(entry, names)}"
        for entry in to_save
        if not any(name.endswith(entry) for name in names)
    ]
    taken, inside_saved = excluded.union(saved), tuple(f"{name}." for name in saved)
    if isinstance(targets, str) and config.selects_all_linear:
        targeted = [name for name in names if name in all_linear]
    else:
        targeted = [name for name in _matching(targets, names) if name]
        notes += _unmatched("target_modules", targets, names)
    kept = [n for n in targeted if n not in taken and not n.startswith(inside_saved)]
    exact = set() if isinstance(targets, str) else set(targets)
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
    return [name for name in names if not entries.isdisjoint(_suffixes(name))]


def _suffixes(name: str) -> list[str]:
    """`["a.b.c", "b.c", "c"]` for `"a.b.c"`: the list entries that would take it."""
    segments = name.split(".")
    return [".".join(segments[start:]) for start in range(len(segments))]


def _unmatched(field: str, rule: Collection[str] | str | None, names: Sequence[str]) -> list[str]:
    if rule is None:
        return []
    if isinstance(rule, str):
        unmatched = [] if any(re.fullmatch(rule, name) for name in names) else [rule]
    else:
        unmatched = sorted(set(rule).difference(*map(_suffixes, names)))
    return [f"{field} entry {entry!r} matches no module{closest(entry, names)}" for entry in unmatched]


def _in_layers(config: MissConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None:
        return True
    patterns = config.layers_pattern
    index = layer_index(name, [patterns] if isinstance(patterns, str) else list(patterns or ()))
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _missing_layers(config: MissConfig, targeted: Sequence[str]) -> list[str]:
    """A sentence for each layer index, and each pattern, that none of the targeted modules has."""
    if config.layers_to_transform is None:
        return []
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else list(config.layers_pattern or ())
    found = {layer_index(name, patterns) for name in targeted} - {None}
    layers = config.layers_to_transform
    missing = [index for index in ([layers] if isinstance(layers, int) else layers) if index not in found]
    there = f"they are in layers {min(found)} to {max(found)}" if found else "they are in no layers"  # type: ignore[type-var]
    notes = [f"layers_to_transform index {index} is the layer of no targeted module; {there}" for index in missing]
    unused = [p for p in patterns if not any(layer_index(name, [p]) is not None for name in targeted)]
    return notes + [f"layers_pattern {pattern!r} is in the name of no targeted module" for pattern in unused]


def _nothing_chosen(
    config: MissConfig, targets: Collection[str] | str, names: Sequence[str], targeted: list[str], kept: list[str]
) -> str:
    shown = repr(targets) if isinstance(targets, str) else repr(sorted(targets))
    if not targeted:
        if isinstance(targets, str) and config.selects_all_linear:
            return "target_modules='all-linear': the model has no linear module beside its output layer."
        hints = "".join(closest(entry, names) for entry in ([targets] if isinstance(targets, str) else sorted(targets)))
        return (
            f"target_modules={shown} matches no module of the model{hints}. A list entry matches a whole name or its "
            "last segments; a string is a regular expression for the whole name."
        )
    if not kept:
        return (
            f"target_modules={shown} matches {targeted[0]!r}{_and_more(targeted)}, but exclude_modules="
            f"{config.exclude_modules!r} and modules_to_save={config.modules_to_save!r} take all of it away."
        )
    return (
        f"target_modules={shown} matches {kept[0]!r}{_and_more(kept)}, but none is in layers_to_transform="
        f"{config.layers_to_transform!r} (layers_pattern={config.layers_pattern!r})."
    )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

"""The one runner for every change of a graph, and the order of the passes.

A pass is a plain function over a `Scope` that returns how many places it matched. It neither lints nor times nor logs.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from torch import fx

from misscompile.passes.find_sites import find_sites
from misscompile.passes.follow_mode import follow_mode
from misscompile.passes.inline_regions import inline_regions
from misscompile.passes.insert_updates import insert_updates
from misscompile.passes.linear_calls import target_name
from misscompile.passes.name_reads import name_reads
from misscompile.passes.strip_updates import restore_weights, strip_updates
from misscompile.passes.unshare_weights import drop_unread, unshare_weights
from misscompile.record.words import Scope

logger = logging.getLogger("misscompile.passes")

Pass = Callable[[Scope], int]

CAPTURE: tuple[Pass, ...] = (inline_regions, name_reads)
"""What happens to an exported graph."""

BOTH_MODES: tuple[Pass, ...] = (follow_mode,)
"""What happens to the graph of training mode, where the one of evaluation mode was traced too."""

ADAPT: tuple[Pass, ...] = (insert_updates,)
"""What happens to a copy of a traced or captured graph whose sites are found and have their blocks."""

RECOVER: tuple[Pass, ...] = (restore_weights, find_sites, strip_updates, find_sites)
"""What happens to a graph that was exported while adapted: it becomes that of its base."""

UNSHARE: tuple[Pass, ...] = (unshare_weights, drop_unread)
"""What a merge does to a graph in which calls of one weight have a block each."""


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did to one scope."""

    name: str
    seconds: float
    matches: int
    changed: dict[str, int]
    """Operation to how many more (or, below zero, fewer) of it there are."""


def run_passes(passes: Sequence[Pass], scope: Scope) -> list[PassReport]:
    """Run `passes` over `scope` in their order, lint the graph after each, and log each at DEBUG."""
    reports = []
    for scope_pass in passes:
        name, before, start = scope_pass.__name__, _operations(scope.graph), time.perf_counter()
        matches = scope_pass(scope)
        seconds = time.perf_counter() - start
        scope.graph.lint()
        after = _operations(scope.graph)
        changed = {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}
        reports.append(PassReport(name, seconds, matches, changed))
        if logger.isEnabledFor(logging.DEBUG):
            diff = ", ".join(f"{count:+d} {op}" for op, count in changed.items()) or "no change"
            code = f"\n{scope.graph}" if changed else ""
            logger.debug("%s after %s: %d matches, %.2f ms, %s%s", scope.label, name, matches, 1e3 * seconds, diff, code)
    return reports


def _operations(graph: fx.Graph) -> Counter[str]:
    """How often each operation occurs; what only names something counts by its kind."""
    named = {"placeholder", "get_attr", "output"}
    return Counter(node.op if node.op in named else target_name(node) for node in graph.nodes)

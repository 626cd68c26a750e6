"""Show what was rewritten where: a table of sites and refusals, or the code of each distinct scope before and after."""

from __future__ import annotations

import dataclasses
import io
from typing import Literal

import torch
from torch import nn

from misscompile.errors import ArgumentError, StateError
from misscompile.hosts.opening import adapted_owners, open_adapted
from misscompile.hosts.owner_class import REWRITE, Specialised, readable_code
from misscompile.hosts.whole_graph import record_of, whole_graphs
from misscompile.passes.insert_updates import update_form
from misscompile.record.state import STATE, OwnerState
from misscompile.record.walk import adapters_of, owner_states, owners
from misscompile.record.words import Block, Site
from misscompile.variants import VARIANTS

TOKENS = 1024
"""Tokens of the step whose FLOPs the table counts; only bat's share depends on it."""


def dump(model: nn.Module, format: Literal["text", "code"] = "text") -> str:
    """A readable account of an adapted model.

    Args:
        model: an adapted model, or a wrapper around it.
        format: `"text"`, a table with a row for each site and adapter (name, kind, in→out, variant, r, parameters,
            FLOPs that the adapter adds to its base in a training step of 1,024 tokens, and the site's share of the FLOPs
            of all adapted sites), then every module that the rules chose and the plan refused, with the reason;
            `"code"`, the torch.fx code of each distinct scope, or of a whole graph, before and after the rewrite.

    Raises:
        StateError: the model has no adapter.
        ArgumentError: an unknown format.
    """
    root = open_adapted(model, "dump")
    if not owner_states(root):
        raise StateError("the model has no adapter: there is nothing to dump.")
    if format not in ("text", "code"):
        raise ArgumentError(f"format={format!r}: expected 'text' or 'code'.")
    return _text(root) if format == "text" else _code(root)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One block of one owner. FLOPs are those of a training step, over all calls of the weight."""

    name: str
    kind: str
    owner: nn.Module
    block: Block
    site: Site
    base: int
    added: int

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner.get_parameter(self.block.parameter)

    def cells(self, total: int) -> tuple[str, ...]:
        """What the table shows; `total` is the FLOPs of all adapted sites."""
        block, variant = self.block, self.block.variant
        if len(self.parameter.shape) == 2 and self.parameter.shape[1] == block.mini_r != self.site.out_features:
            variant += f" m={block.mini_r}"
        adapter, sizes = (
            block.adapter + _status(self.owner, block.adapter),
            f"{self.site.in_features}→{self.site.out_features}",
        )
        shares = f"{self.added / self.base:+.2%}", f"{(self.base + self.added) / total:.2%}"
        return self.name, self.kind, adapter, sizes, variant, str(block.r), f"{self.parameter.numel():,}", *shares


def _status(owner: nn.Module, adapter: str) -> str:
    """What follows the name of an adapter that does not act."""
    state: OwnerState = vars(owner)[STATE]
    if adapter in state.merged:
        return " (merged)"
    if state.disabled:
        return " (disabled)"
    return "" if adapter in state.active else " (inactive)"


def _rows(root: nn.Module) -> list[_Row]:
    rows = []
    for name, (host, own_name, owner) in adapted_owners(root).items():
        sites, state = host.sites_of(own_name), vars(owner)[STATE]
        site, kind = sites[0], host.kind_of(own_name)
        base = len(sites) * 4 * TOKENS * site.in_features * site.out_features
        dtype = host.stored_weight(own_name, site).dtype if site.path is not None else torch.float32
        for block in state.blocks.values():
            sizes = TOKENS, site.in_features, site.out_features, block.r, block.mini_r
            added = len(sites) * VARIANTS[block.variant].step_flops(*sizes, update_form(site, block, dtype))
            rows.append(_Row(name or "(root)", kind, owner, block, site, base, added))
    return rows


def _text(root: nn.Module) -> str:
    rows = _rows(root)
    total = sum(row.added for row in rows) + sum({row.owner: row.base for row in rows}.values())
    lines = [_render([row.cells(total) for row in rows]), ""]
    for adapter in adapters_of(root).values():
        own = [row for row in rows if row.block.adapter == adapter.name]
        count = sum(parameter.numel() for parameter in {row.parameter for row in own})  # sites may share a block
        sites = f"{len(own)} site{'s' * (len(own) != 1)}"
        lines.append(f"adapter {adapter.name!r}: {sites}, {count:,} parameters, {len(adapter.refusals)} refused")
        for name, state in owner_states(root).items():
            if adapter.name in state.copies:
                lines.append(f"  trained in full: {name or '(root)'}: {', '.join(state.copies[adapter.name])}")
        lines += [f"  refused: {refusal.name} ({refusal.kind}): {refusal.reason}" for refusal in adapter.refusals]
    return "\n".join(lines)


def _code(root: nn.Module) -> str:
    parts = []
    for graph in whole_graphs(root.modules()):
        before, after = readable_code(record_of(graph).base), readable_code(graph.graph)
        parts.append(f"# whole graph\n# before\n{before}\n\n# after\n{after}")
    names: dict[Specialised, list[str]] = {}
    for name, owner in owners(root).items():
        if hasattr(type(owner), REWRITE):
            names.setdefault(getattr(type(owner), REWRITE), []).append(name or "(root)")
    for rewrite, sites in names.items():
        scope = rewrite.base
        assert scope.shape is not None
        count = f"{len(sites)} owner{'s' * (len(sites) != 1)}"
        listed = ", ".join([*sites[:4], "…"] if len(sites) > 4 else sites)
        title = f"# {scope.label} {scope.shape[0]}→{scope.shape[1]}, {count}: {listed}"
        note = f"\n# opaque: {scope.opaque}" if scope.opaque else ""
        parts.append(f"{title}{note}\n# before\n{readable_code(scope.graph)}\n\n# after\n{rewrite.code}")
    return "\n\n\n".join(parts)


def _render(rows: list[tuple[str, ...]]) -> str:
    from rich.box import SIMPLE_HEAD  # not at the top: importing misscompile needs no rich
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    words, numbers = ("site", "kind", "adapter"), ("in→out", "variant", "r", "parameters", "added FLOPs", "share of FLOPs")
    for header in words + numbers:
        table.add_column(header, justify="left" if header in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: a name may look like Rich's markup
    out = io.StringIO()
    Console(file=out, width=1000, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

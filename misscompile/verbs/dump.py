"""Show what was rewritten where: a table of sites and refusals, or the code of each distinct scope before and after."""

from __future__ import annotations

import io
from typing import Literal, NamedTuple

import torch
from torch import nn

from misscompile.errors import ArgumentError, StateError
from misscompile.hosts.opening import adapted_owners, hosts_in, open_adapted
from misscompile.passes.insert_updates import update_form
from misscompile.record.state import STATE, OwnerState
from misscompile.record.walk import adapters_of, owner_states
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
    return _text(root) if format == "text" else "\n\n\n".join(part for host in hosts_in(root) for part in host.code())


class _Row(NamedTuple):
    """One block of one owner. FLOPs are those of a training step, over all calls of the weight."""

    adapter: str
    owner: nn.Module
    parameter: nn.Parameter
    base: int
    added: int
    cells: tuple[str, ...]
    """What the table shows before the share of all FLOPs."""


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
            parameter = owner.get_parameter(block.parameter)
            is_mini = len(parameter.shape) == 2 and parameter.shape[1] == block.mini_r != site.out_features
            cells = (
                name or "(root)",
                kind,
                block.adapter + _status(state, block.adapter),
                f"{site.in_features}→{site.out_features}",
                block.variant + (f" m={block.mini_r}" if is_mini else ""),
                str(block.r),
                f"{parameter.numel():,}",
                f"{added / base:+.2%}",
            )
            rows.append(_Row(block.adapter, owner, parameter, base, added, cells))
    return rows


def _status(state: OwnerState, adapter: str) -> str:
    """What follows the name of an adapter that does not act."""
    if adapter in state.merged:
        return " (merged)"
    if state.disabled:
        return " (disabled)"
    return "" if adapter in state.active else " (inactive)"


def _text(root: nn.Module) -> str:
    rows = _rows(root)
    total = sum(row.added for row in rows) + sum({row.owner: row.base for row in rows}.values())
    lines = [_render([(*row.cells, f"{(row.base + row.added) / total:.2%}") for row in rows]), ""]
    for adapter in adapters_of(root).values():
        own = [row for row in rows if row.adapter == adapter.name]
        count = sum(parameter.numel() for parameter in {row.parameter for row in own})  # sites may share a block
        sites = f"{len(own)} site{'s' * (len(own) != 1)}"
        lines.append(f"adapter {adapter.name!r}: {sites}, {count:,} parameters, {len(adapter.refusals)} refused")
        for name, state in owner_states(root).items():
            if adapter.name in state.copies:
                lines.append(f"  trained in full: {name or '(root)'}: {', '.join(state.copies[adapter.name])}")
        lines += [f"  refused: {refusal.name} ({refusal.kind}): {refusal.reason}" for refusal in adapter.refusals]
    return "\n".join(lines)


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

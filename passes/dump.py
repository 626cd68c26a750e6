"""Show what was rewritten where: a table of sites and refusals, or the code of each distinct scope before and after."""

from __future__ import annotations

import io
from typing import Literal

from misscompile.passes.insert import training_form
from misscompile.passes.install import readable_code
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from misscompile import cost
from misscompile.adapting import open_model
from misscompile.errors import ArgumentError, StateError
from misscompile.graphs import WholeGraph, call_names, call_owner, copy_nodes, find_graph_sites, record_of, whole_graphs
from misscompile.pipeline import trace_scope
from misscompile.plan import Block, Scope, Site
from misscompile.recovery import holds_exported_adapters
from misscompile.state import OwnerState, adapters_of, owner_states, owners, unwrap_model

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
    root = open_model(model) if holds_exported_adapters(model) else unwrap_model(model)
    if not owner_states(root):
        raise StateError("the model has no adapter: there is nothing to dump.")
    if format == "text":
        return _text(root)
    if format == "code":
        return _code(root)
    raise ArgumentError(f"format={format!r}: expected 'text' or 'code'.")


def _text(root: nn.Module) -> str:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("site", "kind", "adapter"):
        table.add_column(header, no_wrap=True)
    for header in ("in→out", "variant", "r", "parameters", "added FLOPs", "share of FLOPs"):
        table.add_column(header, justify="right", no_wrap=True)
    adapted = owners(root)
    calls = {name: sites for graph in whole_graphs(root.modules()) for name, sites in _graph_calls(root, graph).items()}
    rows = []
    for name, state in owner_states(root).items():
        if state.shape is None or not state.blocks:
            continue
        kind, site, count = _describe(adapted[name], state, calls.get(name, []))
        for block in state.blocks.values():
            base, added = (count * flops for flops in _step_flops(site, block))
            rows.append((name or "(root)", kind, block, state, adapted[name], site, base, added))
    total = sum(added for *_, added in rows) + sum({owner: base for *_, owner, _, base, _ in rows}.values())
    for name, kind, block, state, owner, block_site, base, added in rows:
        sizes = f"{block_site.in_features}→{block_site.out_features}"
        parameters = f"{owner.get_parameter(block.parameter).numel():,}"
        variant = f"{block.variant} m={block.mini_r}" if block.variant == "mini" else block.variant
        shares = f"{added / base:+.2%}", f"{(base + added) / total:.2%}"
        table.add_row(name, kind, _status(block, state), sizes, variant, str(block.r), parameters, *shares)
    lines = [_render(table), ""]
    for adapter in adapters_of(root).values():
        own = [row for row in rows if row[2].adapter == adapter.name]
        count = sum(p.numel() for p in {row[4].get_parameter(row[2].parameter) for row in own})
        sites = f"{len(own)} site{'s' * (len(own) != 1)}"
        lines.append(f"adapter {adapter.name!r}: {sites}, {count:,} parameters, {len(adapter.refusals)} refused")
        for name, state in owner_states(root).items():
            if adapter.name in state.copies:
                lines.append(f"  trained in full: {name or '(root)'}: {', '.join(state.copies[adapter.name])}")
        lines += [f"  refused: {refusal.name} ({refusal.kind}): {refusal.reason}" for refusal in adapter.refusals]
    return "\n".join(lines)


def _status(block: Block, state: OwnerState) -> str:
    if block.adapter in state.merged:
        return f"{block.adapter} (merged)"
    if state.disabled:
        return f"{block.adapter} (disabled)"
    return block.adapter if block.adapter in state.active else f"{block.adapter} (inactive)"


def _graph_calls(root: nn.Module, graph: WholeGraph) -> dict[str, list[Site]]:
    """The calls in a whole graph by the name of the owner of their block, below `root`."""
    prefix = next((f"{name}." for name, module in root.named_modules() if name and module is graph), "")
    found: dict[str, list[Site]] = {}
    for name, sites in call_names(find_graph_sites(graph)).items():
        found[prefix + name] = sites
        found |= {prefix + call_owner(name, index): [site] for index, site in enumerate(sites)}
    return found


def _describe(owner: nn.Module, state: OwnerState, calls: list[Site]) -> tuple[str, Site, int]:
    """What kind of call a block acts on, a site of it, and how many there are."""
    if state.in_graph:
        target = calls[0].node.target
        kind = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return f"{kind} ×{len(calls)}" if len(calls) > 1 else kind, calls[0], len(calls)
    assert state.shape is not None
    scope = trace_scope(owner, state.shape)
    return type(owner).__name__ + (" (opaque)" if scope.opaque else ""), scope.sites[0], 1


def _step_flops(site: Site, block: Block) -> tuple[int, int]:
    form = training_form(site, block)
    sizes = TOKENS, site.in_features, site.out_features, block.r, block.mini_r
    return cost.evaluate(cost.BASE_STEP, *sizes), cost.evaluate(cost.STEP[form], *sizes)


def _code(root: nn.Module) -> str:
    parts = [_graph_code(graph) for graph in whole_graphs(root.modules())]
    names: dict[Scope, list[str]] = {}
    for name, owner in owners(root).items():
        scope: Scope | None = getattr(type(owner), "scope", None)
        if scope is not None:
            names.setdefault(scope, []).append(name or "(root)")
    for scope, sites in names.items():
        count = f"{len(sites)} owner{'s' * (len(sites) != 1)}"
        title = f"{scope.base_class.__name__} {scope.in_features}→{scope.out_features}, {count}"
        listed = ", ".join(sites[:4]) + (", …" if len(sites) > 4 else "")
        note = f"\n# opaque: {scope.opaque}" if scope.opaque else ""
        parts.append(f"# {title}: {listed}{note}\n# before\n{scope.base_code}\n\n# after\n{scope.code}")
    return "\n\n\n".join(parts)


def _graph_code(graph: WholeGraph) -> str:
    before = fx.GraphModule(graph, copy_nodes(record_of(graph).base)).code
    sections = [f"# {title}\n{readable_code(code)}" for title, code in (("before", before), ("after", graph.code))]
    return "# whole graph\n" + "\n\n".join(sections)


def _render(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=1000, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

"""Insert the updates of the active blocks at every site of a scope.

balance and mini, whose update is a small product with the shard sum:

    y = F.linear(x, W, b)      ->   s = sum_shards(x, r)
                                    y = F.linear(x, W, b)
                                    z = add_update(y, s, D, n)

bat, whose update needs the weight; and bat with dropout, which acts on the input of the update alone:

    y = F.linear(x, W, b)      ->   y = bat_linear(x, W, b, [B], False)
    y = F.linear(x, W, b)      ->   z = add_bat(F.linear(x, W, b), dropout(x), W, B)

The functions are those of `misscompile.kernels`, one node each.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from misscompile import kernels
from misscompile.errors import UnsupportedModuleError
from misscompile.record.walk import join
from misscompile.record.words import Block, Scope, Site
from misscompile.variants import VARIANTS, Form

TAG = "misscompile"
"""Key in `node.meta`, and in its `"custom"`, which `torch.export` keeps, also on disk."""


def insert_updates(scope: Scope) -> int:
    """Let each site add the update of every one of its blocks, in their order; returns how many calls were rewritten."""
    sites = [site for site in scope.sites if site.blocks]
    calls = list(dict.fromkeys(site.node for site in sites))
    for node in calls:
        users, here = list(node.users), [site for site in sites if site.node is node]
        result = _rewrite_call(scope, here)
        blocks = [{**dataclasses.asdict(b), "owner": site.owner} for site in here for b in site.blocks]
        _tag(node, here[0], blocks=blocks, copies=[list(pair) for pair in scope.copies] if node is calls[0] else [])
        for user in users:
            user.replace_input_with(node, result)
        for later in sites:
            later.x = result if later.x is node else later.x
    return len(calls)


def update_form(site: Site, block: Block, weight_dtype: torch.dtype) -> Form:
    """How a call takes the update of a block that reads the weight, in training.

    Where the call is not whole (a convolution, a part of a fused call, a module that is one node), or with dropout, which
    gives the update another input, its product stays beside the base's. Elsewhere one product with `W + ΔW` is as exact as
    two if `W` has room for small updates: not in 16 bits, unless rounding them away was asked for.
    """
    if not site.is_whole or block.dropout:
        return "beside the base"
    return "two products" if weight_dtype.itemsize == 2 and not block.round_weight else "one product"


def _rewrite_call(scope: Scope, sites: list[Site]) -> fx.Node:
    """Rewrite one call and return what stands for its output now.

    A call of several sites, each with a part of its outputs, is taken apart and put together again:

        y = linear(x, W)   ->   z = cat([y[..., :e] + s @ D_q, y[..., e:2e], y[..., 2e:] + s @ D_v], -1)
    """
    node, after = sites[0].node, sites[0].node.next
    if sites[0].columns is None:
        return _Rewrite(scope, sites[0], node, after).run()
    parts, end = [], 0
    for site in sorted(sites, key=lambda site: site.columns or ()):
        assert site.columns is not None
        start, stop, features = site.columns
        rewrite = _Rewrite(scope, site, node, after)
        if start > end:
            parts.append(rewrite.columns(end, start))
        rewrite.y = rewrite.columns(start, stop)
        parts.append(rewrite.run())
        end = stop
    if end < features:
        parts.append(rewrite.columns(end, features))
    return rewrite.call(after, torch.cat, parts, -1)


def _tag(node: fx.Node, site: Site, **more: Any) -> fx.Node:
    """Say on a node which pass made it, for which call and site; on the call itself, which blocks act."""
    node.meta[TAG] = {"pass": "insert_updates", "call": site.node.name, "site": site.owner or site.node.name, **more}
    node.meta["custom"] = {**node.meta.get("custom", {}), TAG: node.meta[TAG]}
    return node


class _Rewrite:
    """One site being rewritten: the operands as they are in the graph, and the output so far."""

    def __init__(self, scope: Scope, site: Site, y: fx.Node, after: fx.Node) -> None:
        self.scope, self.site = scope, site
        self.x, self.y = site.x, y
        self.before, self.after = site.node, after
        self.block: Block | None = None

    def run(self) -> fx.Node:
        """Rewrite the site and return the node that stands for its output now."""
        site, positions = self.site, len(self.site.strides)
        if site.layout == "conv":
            self.x = self.call(self.before, kernels.features_last, self.x, site.strides)
            self.y = self.call(self.after, kernels.features_last, self.y, (1,) * positions)
        weighing = [block for block in site.blocks if VARIANTS[block.variant].reads_weight]
        replacing = [block for block in weighing if site.is_whole and not block.dropout]
        if replacing:
            self._replace_call(replacing)
        for block in [block for block in site.blocks if block not in replacing]:
            self.block = block
            if block in weighing:
                x, weight, parameter = self._input(block), self.weight, self._parameter(block)
                self.y = self.call(self.after, kernels.add_bat, self.y, x, weight, parameter)
            else:
                self._add_summed(block)
        if site.layout == "conv":
            self.y = self.call(self.after, kernels.features_first, self.y, site.node, positions)
        return self.y

    def call(self, anchor: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of `function` before `anchor`."""
        return self._create(anchor, "call_function", function, *args)

    def columns(self, start: int, stop: int) -> fx.Node:
        """The outputs `start` to `stop` of the call."""
        return self.call(self.after, operator.getitem, self.site.node, (..., slice(start, stop)))

    def _replace_call(self, blocks: list[Block]) -> None:
        """The node stays where it is and keeps its name, so that what was said of it holds."""
        site, node = self.site, self.site.node
        self.block = blocks[0]
        weight, parameters = self.weight, []
        for self.block in blocks:
            parameters.append(self._parameter(self.block))
        rounds = all(block.round_weight for block in blocks)
        node.op, node.target, node.kwargs = "call_function", kernels.bat_linear, {}
        node.args = (site.x, weight, site.added, parameters, rounds)

    def _add_summed(self, block: Block) -> None:
        """Add the update of a block to the output.

        The shards are summed in front of the base product: there `x` is still in the cache, and Inductor, which makes a
        kernel of what stands between two products, sums them where `x` is made.
        """
        in_features, out_features = self.site.in_features, self.site.out_features
        shape = VARIANTS[block.variant].block_shape(block.r, block.mini_r, in_features, out_features)
        for_product = () if shape[1] != out_features else (True,)
        summed = self.call(self.before, kernels.sum_shards, self._input(block), block.r, *for_product)
        terms = -(-in_features // block.r)
        self.y = self.call(self.after, kernels.add_update, self.y, summed, self._parameter(block), terms)

    def _input(self, block: Block) -> fx.Node:
        if not block.dropout:
            return self.x
        training = self._create(self.before, "get_attr", "training")
        return self.call(self.before, kernels.dropout, self.x, block.dropout, training)

    @functools.cached_property
    def weight(self) -> fx.Node:
        """The base weight as `(out, in)`."""
        site, weight = self.site, self.site.weight
        if site.path is None:
            assert self.block is not None
            raise UnsupportedModuleError(
                f"{self.scope.label} cannot take a {self.block.variant!r} block: {self.scope.opaque}, and "
                f"{self.block.variant} needs the weight itself. Use init_weights=True or 'mini', or exclude the module."
            )
        if weight is None:
            weight = self._create(self.before, "get_attr", site.path.parameter)
        if site.layout == "in_out":
            return self._create(self.before, "call_method", "t", weight)
        if site.layout == "conv":
            return self._create(self.before, "call_method", "flatten", weight, 1)
        if site.columns is not None:
            return self.call(self.before, operator.getitem, weight, slice(*site.columns[:2]))
        return weight

    def _parameter(self, block: Block) -> fx.Node:
        return self._create(self.before, "get_attr", join(self.site.owner, block.parameter))

    def _create(self, anchor: fx.Node, op: str, target: fx.node.Target, *args: Any) -> fx.Node:
        with self.scope.graph.inserting_before(anchor):
            node = self.scope.graph.create_node(op, target, args)
        return _tag(node, self.site, **({"adapter": self.block.adapter} if self.block else {}))

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
    """Rewrite `scope.graph` so that each site adds the update of every one of its blocks, in their order.

    Returns:
        The number of calls that were rewritten.

    Raises:
        UnsupportedModuleError: a block that reads the weight, on an opaque site, whose weight no graph can reach.
    """
    sites = [site for site in scope.sites if site.blocks]
    calls = list(dict.fromkeys(site.node for site in sites))
    for node in calls:
        users, here = list(node.users), [site for site in sites if site.node is node]
        result = _rewrite_call(scope, here)
        _tag(node, here[0], blocks=[{**dataclasses.asdict(b), "owner": site.owner} for site in here for b in site.blocks])
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
        self.scope, self.site, self.graph = scope, site, scope.graph
        self.x, self.y = site.x, y
        self.after = after
        self.block: Block | None = None
        self.base_weight: fx.Node | None = None

    def run(self) -> fx.Node:
        """Rewrite the site and return the node that stands for its output now."""
        positions, before = len(self.site.strides), self.site.node
        convolution = self.site.layout == "conv"
        if convolution:
            self.x = self.call(before, kernels.features_last, self.x, self.site.strides)
            self.y = self.call(self.after, kernels.features_last, self.y, (1,) * positions)
        weighing = [b for b in self.site.blocks if VARIANTS[b.variant].reads_weight]
        replacing = [b for b in weighing if self.site.is_whole and not b.dropout]
        if replacing:
            self._replace_call(replacing)
        for block in (block for block in self.site.blocks if block not in replacing):
            self.block = block
            if block in weighing:
                self._add_beside(block)
            else:
                self._add_summed(block)
        if convolution:
            self.y = self.call(self.after, kernels.features_first, self.y, positions)
        return self.y

    def call(self, anchor: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of `function` before `anchor`."""
        with self.graph.inserting_before(anchor):
            return self._mark(self.graph.call_function(function, args))

    def columns(self, start: int, stop: int) -> fx.Node:
        """The outputs `start` to `stop` of the call."""
        return self.call(self.after, operator.getitem, self.site.node, (..., slice(start, stop)))

    def _replace_call(self, blocks: list[Block]) -> None:
        """The node stays where it is and keeps its name, so that what was said of it holds."""
        site, node = self.site, self.site.node
        self.block = blocks[0]
        weight, parameters = self._weight(), [self._parameter(block) for block in blocks]
        rounds = all(block.round_weight for block in blocks)
        node.op, node.target, node.kwargs = "call_function", kernels.bat_linear, {}
        node.args = (site.x, weight, site.added, parameters, rounds)

    def _add_beside(self, block: Block) -> None:
        self.y = self.call(self.after, kernels.add_bat, self.y, self._input(block), self._weight(), self._parameter(block))

    def _add_summed(self, block: Block) -> None:
        """Add the update of a block to the output.

        The shards are summed in front of the base product: there `x` is still in the cache, and Inductor, which makes a
        kernel of what stands between two products, sums them where `x` is made.
        """
        site, before = self.site, self.site.node
        in_features, out_features = site.in_features, site.out_features
        shape = VARIANTS[block.variant].block_shape(block.r, block.mini_r, in_features, out_features)
        for_product = () if shape[1] != out_features else (True,)
        summed = self.call(before, kernels.sum_shards, self._input(block), block.r, *for_product)
        terms = -(-in_features // block.r)
        self.y = self.call(self.after, kernels.add_update, self.y, summed, self._parameter(block), terms)

    def _input(self, block: Block) -> fx.Node:
        if not block.dropout:
            return self.x
        with self.graph.inserting_before(self.site.node):
            self.graph.owning_module = None  # which would warn of an attribute that is no tensor
            training = self._mark(self.graph.get_attr("training"))
        return self.call(self.site.node, kernels.dropout, self.x, block.dropout, training)

    def _weight(self) -> fx.Node:
        """The base weight as `(out, in)`."""
        if self.base_weight is None:
            with self.graph.inserting_before(self.site.node):
                self.base_weight = self._oriented_weight()
        return self.base_weight

    def _oriented_weight(self) -> fx.Node:
        site, weight = self.site, self.site.weight
        if site.path is None:
            assert self.block is not None
            raise UnsupportedModuleError(
                f"{self.scope.label} cannot take a {self.block.variant!r} block: {self.scope.opaque}, and "
                f"{self.block.variant} needs the weight itself. Use init_weights=True or 'mini', or exclude the module."
            )
        if weight is None:
            weight = self._mark(self.graph.get_attr(site.path.parameter))
        if site.layout == "in_out":
            return self._mark(self.graph.call_method("t", (weight,)))
        if site.layout == "conv":
            return self._mark(self.graph.call_method("flatten", (weight, 1)))
        if site.columns is not None:
            return self._mark(self.graph.call_function(operator.getitem, (weight, slice(*site.columns[:2]))))
        return weight

    def _parameter(self, block: Block) -> fx.Node:
        with self.graph.inserting_before(self.site.node):
            return self._mark(self.graph.get_attr(join(self.site.owner, block.parameter)))

    def _mark(self, node: fx.Node) -> fx.Node:
        return _tag(node, self.site, **({"adapter": self.block.adapter} if self.block else {}))

"""Insert the updates of the active blocks at every site of a scope.

balance (mini alike, its product added to groups of the output):

    y = F.linear(x, W, b)      ->   s = share_sum(x.unflatten(-1, (n, r)).sum(-2), x)
                                    y = F.linear(x, W, b)
                                    z = add_product(y, s, D)

`share_sum` is left out of whole graphs, where `passes/share.py` sees equal sums, and behind dropout, where no two are equal.

bat, and bat with dropout, which acts on the input of the update alone:

    y = F.linear(x, W, b)      ->   y = bat_linear(x, W, b, [B])
    y = F.linear(x, W, b)      ->   z = add_bat(F.linear(x, W, b), dropout(x), W, B)

The operations are those of `misscompile.variants` and `misscompile.bat`, traced with the site's numbers and spliced in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from misscompile import bat, cost, sharing, variants
from misscompile.errors import UnsupportedModuleError
from misscompile.plan import Block, ModelScope, Scope, Site

_HALF_PRECISION = (torch.float16, torch.bfloat16)


def insert_updates(scope: Scope | ModelScope) -> None:
    """Rewrite `scope.graph` so that each site adds the update of every one of its blocks, in their order.

    Raises:
        UnsupportedModuleError: a bat block on an opaque site, whose weight no graph can reach.
    """
    sites = [site for site in scope.sites if site.blocks]
    for node in dict.fromkeys(site.node for site in sites):
        users = list(node.users)
        result = _rewrite_call(scope, [site for site in sites if site.node is node])
        for user in users:
            user.replace_input_with(node, result)
        for later in sites:
            later.x = result if later.x is node else later.x


def _rewrite_call(scope: Scope | ModelScope, sites: list[Site]) -> fx.Node:
    """Rewrite one call and return what stands for its output now.

    A call of several sites, each with a part of its outputs, is taken apart and put together again:

        y = linear(x, W)   ->   z = cat([y[..., :e] + s @ D_q, y[..., e:2e], y[..., 2e:] + s @ D_v], -1)
    """
    node, graph = sites[0].node, scope.graph
    if sites[0].columns is None:
        return _Rewrite(scope, sites[0], node, node.next).run()
    after, parts, end = node.next, [], 0

    def part(start: int, stop: int, site: Site) -> fx.Node:
        with graph.inserting_before(after):
            features: Any = (..., slice(start, stop))
            return tag_node(graph.call_function(operator.getitem, (node, features)), site)

    for site in sorted(sites, key=lambda site: site.columns or ()):
        assert site.columns is not None
        start, stop, features = site.columns
        if start > end:
            parts.append(part(end, start, site))
        parts.append(_Rewrite(scope, site, part(start, stop, site), after).run())
        end = stop
    if end < features:
        parts.append(part(end, features, site))
    with graph.inserting_before(after):
        return tag_node(graph.call_function(torch.cat, (parts, -1)), site)


def tag_node(node: fx.Node, site: Site, adapter: str | None = None) -> fx.Node:
    """Say on a node which pass made it for which site; `meta["custom"]` is what `torch.export` keeps, also on disk."""
    tag = {"pass": "insert_updates", "site": site.owner or site.node.name, "adapter": adapter}
    node.meta["misscompile"] = tag
    node.meta["custom"] = {**node.meta.get("custom", {}), "misscompile": tag}
    return node


def training_form(site: Site, block: Block) -> cost.Form:
    """Which form of `misscompile.cost` a block takes at a site in training, with many tokens.

    A convolution, a part of a fused call and a module that is one node keep their own product beside that of bat; with
    dropout the update has another input. Elsewhere one product with `W + ΔW` is as exact as two where W has room for
    small updates: not in 16 bits, unless rounding them away was asked for.
    """
    if block.variant != "bat":
        return block.variant
    exact = site.weight_dtype not in _HALF_PRECISION
    plain = site.layout in ("out_in", "in_out") and site.columns is None and site.weight is not None
    if not plain or block.dropout:
        return "bat beside the base"
    return "bat one product" if exact or block.round_weight else "bat two products"


class _Rewrite:
    """One site being rewritten: the operands as they are in the graph, and the output so far."""

    def __init__(self, scope: Scope | ModelScope, site: Site, y: fx.Node, after: fx.Node) -> None:
        self.scope, self.site, self.graph = scope, site, scope.graph
        self.x, self.y = site.x, y
        self.after = after
        self.base_weight: fx.Node | None = None
        self.training: fx.Node | None = None

    def run(self) -> fx.Node:
        """Rewrite the site and return the node that stands for its output now."""
        convolution, first = self.site.layout == "conv", self.site.blocks[0]
        positions = len(self.site.strides)
        if convolution:
            strides = self.site.strides
            self.x = self._splice(lambda x: variants.features_last(x, strides), (self.x,), first, self.site.node)
            self.y = self._splice(lambda y: variants.features_last(y, (1,) * positions), (self.y,), first, self.after)
        forms = {b: training_form(self.site, b) for b in self.site.blocks if b.variant == "bat"}
        replacing = {block: form for block, form in forms.items() if form != "bat beside the base"}
        if replacing:
            self._replace_call(replacing)
        for block in self.site.blocks:
            if block not in replacing:
                self._add_to_output(block)
        if convolution:
            self.y = self._splice(lambda y: variants.features_first(y, positions), (self.y,), first, self.after)
        return self.y

    def _replace_call(self, forms: Mapping[Block, cost.Form]) -> None:
        """The node stays where it is and keeps its name, so that what was said of it holds."""
        site, node = self.site, self.site.node
        bias = next((operand for operand in node.all_input_nodes if operand not in (site.x, site.weight)), None)
        weight, parameters = self._weight(next(iter(forms))), [self._parameter(block) for block in forms]
        few_tokens = min(cost.few_tokens(form, block.r) for block, form in forms.items())
        two_products = "bat two products" in forms.values()
        node.op, node.target = "call_function", bat.bat_linear
        node.args, node.kwargs = (site.x, weight, bias, parameters, two_products, few_tokens), {}

    def _add_to_output(self, block: Block) -> None:
        """Add the update of a block to the output.

        The shards are summed in front of the base product: there `x` is still in the cache, and Inductor, which makes a
        kernel of what stands between two products, sums them where `x` is made.
        """
        in_features, r = self.site.in_features, block.r
        x, parameter = self._dropped_input(block), self._parameter(block)
        if block.variant == "bat":
            operands = (self.y, x, parameter, self._weight(block))
            self.y = self._splice(lambda y, x, b, weight: bat.add_bat(y, x, weight, b), operands, block, self.after)
            return
        mini = block.variant == "mini"
        summed = self._splice(lambda x: variants.sum_shards(x, in_features, r, not mini), (x,), block, self.site.node)
        if isinstance(self.scope, Scope) and not block.dropout:
            with self.graph.inserting_before(self.site.node):
                summed = self._tag(self.graph.call_function(sharing.share_sum, (summed, x)), block)
        terms = -(-in_features // r)
        rule: Callable[..., Any] = variants.add_mini if mini else lambda y, s, d: variants.add_product(y, s, d, terms)
        self.y = self._splice(rule, (self.y, summed, parameter), block, self.after)

    def _dropped_input(self, block: Block) -> fx.Node:
        if not block.dropout:
            return self.x
        if self.training is None:
            with self.graph.inserting_before(self.site.node):
                self.training = self._tag(self.graph.get_attr("training"), block)
        rule = lambda x, training: variants.drop_input(x, block.dropout, training)  # noqa: E731
        return self._splice(rule, (self.x, self.training), block, self.site.node)

    def _weight(self, block: Block) -> fx.Node:
        """The base weight as `(out, in)`."""
        if self.base_weight is None:
            with self.graph.inserting_before(self.site.node):
                self.base_weight = self._oriented_weight(block)
        return self.base_weight

    def _oriented_weight(self, block: Block) -> fx.Node:
        site, weight = self.site, self.site.weight
        if site.layout == "opaque":
            assert isinstance(self.scope, Scope)
            raise UnsupportedModuleError(
                f"{self.scope.base_class.__name__} cannot take a 'bat' block: {self.scope.opaque}, and bat needs the "
                "weight itself. Use init_weights=True or 'mini', or exclude the module."
            )
        if weight is None:
            assert site.path is not None
            weight = self._tag(self.graph.get_attr(site.path.parameter), block)
        if site.layout == "in_out":
            return self._transpose(weight, block)
        if site.layout == "conv":
            return self._tag(self.graph.call_method("flatten", (weight, 1)), block)
        if site.columns is not None:
            return self._tag(self.graph.call_function(operator.getitem, (weight, slice(*site.columns[:2]))), block)
        return weight

    def _parameter(self, block: Block) -> fx.Node:
        with self.graph.inserting_before(self.site.node):
            return self._tag(self.graph.get_attr(self.site.attribute(block.parameter)), block)

    def _transpose(self, weight: fx.Node, block: Block) -> fx.Node:
        with self.graph.inserting_before(self.site.node):
            return self._tag(self.graph.call_method("t", (weight,)), block)

    def _splice(self, rule: Callable[..., Any], operands: tuple[fx.Node, ...], block: Block, anchor: fx.Node) -> fx.Node:
        """Trace `rule` and copy its nodes before `anchor`, its placeholders standing for `operands`."""
        traced = fx.Tracer().trace(rule)
        placeholders = [node for node in traced.nodes if node.op == "placeholder"]
        mapping = dict(zip(placeholders, operands, strict=True))
        with self.graph.inserting_before(anchor):
            result = self.graph.graph_copy(traced, mapping)
        for node in traced.nodes:
            if node.op not in ("placeholder", "output"):
                self._tag(mapping[node], block)
        assert isinstance(result, fx.Node)
        return result

    def _tag(self, node: fx.Node, block: Block) -> fx.Node:
        return tag_node(node, self.site, block.adapter)

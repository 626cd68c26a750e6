"""Sharing: one shard sum for every input and rank, and nothing merged that is not surely the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_support import graph_list
from misscompile.passes.find_calls import find_calls
from misscompile.passes.insert import insert_updates
from misscompile.passes.share import share_sums
from torch import Tensor, fx, nn

from misscompile import variants
from misscompile.graphs import ADAPT_GRAPH
from misscompile.plan import Block, ModelScope

WIDTH = 8
X = torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class ThreeReaders(nn.Module):
    """q, k and v read one input; out reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, out) for out in (8, 12, 4))
        self.out = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.q(x).sum(-1, keepdim=True) * self.k(x).mean(-1, keepdim=True))
        return self.out(gates * self.v(x))  # type: ignore[no-any-return]


def block(adapter: str = "a", variant: Any = "balance", r: int = 4, dropout: float = 0.0) -> Block:
    return Block(adapter, variant, r, 2, dropout)


def inserted(*blocks: Block) -> ModelScope:
    """The model with these blocks, of non-zero values, on each of its linears."""
    torch.manual_seed(0)
    model = fx.symbolic_trace(ThreeReaders().double())
    scope = ModelScope(model, model.graph)
    find_calls(scope)
    for site in scope.sites:
        site.blocks = blocks
        for each in blocks:
            shape = variants.block_shape(each.variant, each.r, each.mini_r, site.in_features, site.out_features)
            value = nn.Parameter(torch.randn(shape, dtype=torch.float64))
            model.get_submodule(site.owner).register_parameter(each.parameter, value)
    insert_updates(scope)
    return scope


def run(scope: ModelScope, training: bool = False) -> Tensor:
    scope.graph.lint()
    model = fx.GraphModule(scope.root, scope.graph)
    model.train(training)
    result: Tensor = model(X)
    return result


def count(scope: ModelScope, name: str) -> int:
    names = [n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "") for n in scope.graph.nodes]
    return names.count(name)


def sums(scope: ModelScope) -> list[fx.Node]:
    """The shard sums that the insertion made."""
    return [node for node in scope.graph.nodes if node.target == "sum" and "misscompile" in node.meta]


def inputs(scope: ModelScope) -> set[fx.Node]:
    return {node.all_input_nodes[0] for node in scope.graph.nodes if node.op == "call_module"}


def test_follows_the_insertion() -> None:
    assert (insert_updates, share_sums) == ADAPT_GRAPH


@pytest.mark.parametrize("variant", ["balance", "mini"])
def test_sites_of_one_input_share_one_sum(variant: Any) -> None:
    plain, shared = inserted(block(variant=variant)), inserted(block(variant=variant))
    share_sums(shared)
    assert len(sums(plain)) == 4
    assert len(sums(shared)) == 2  # of x, and of the input of out
    assert {node.all_input_nodes[0].all_input_nodes[0] for node in sums(shared)} == inputs(shared)
    assert torch.equal(run(shared), run(plain))
    reads = [n for n in shared.graph.nodes if n.op == "get_attr" and "miss_block" in str(n.target)]
    assert len(reads) == 4


def test_sites_of_another_rank_keep_their_own_sum() -> None:
    scope, plain = inserted(block("a", r=4), block("b", r=3)), inserted(block("a", r=4), block("b", r=3))
    share_sums(scope)
    assert len(sums(plain)) == 8
    assert len(sums(scope)) == 4  # two inputs, two ranks
    assert torch.equal(run(scope), run(plain))


def test_two_adapters_of_one_rank_share_a_sum() -> None:
    scope, plain = inserted(block("a"), block("b")), inserted(block("a"), block("b"))
    share_sums(scope)
    assert len(sums(plain)) == 8
    assert len(sums(scope)) == 2
    assert torch.equal(run(scope), run(plain))


def test_dropped_inputs_are_drawn_for_each_site() -> None:
    scope = inserted(block(dropout=0.5))
    drawn = count(scope, "dropout")
    share_sums(scope)
    assert count(scope, "dropout") == drawn == 4
    assert len(sums(scope)) == 4
    torch.manual_seed(0)
    first = run(scope, training=True)
    torch.manual_seed(1)
    assert not torch.equal(run(scope, training=True), first)
    assert torch.equal(run(scope), run(inserted(block(dropout=0.5))))


def test_bat_has_nothing_to_share() -> None:
    scope, plain = inserted(block(variant="bat")), inserted(block(variant="bat"))
    before = graph_list(scope.graph)
    share_sums(scope)
    products = [node for node in scope.graph.nodes if "bat" in getattr(node.target, "__name__", "")]
    assert len(products) == 4
    assert graph_list(scope.graph) == before
    assert torch.equal(run(scope), run(plain))


def test_nodes_of_the_model_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).sum(-1, keepdim=True) * torch.relu(x).sum(-1, keepdim=True) * F.relu(self.up(x))

    model = fx.symbolic_trace(Twice().double())
    scope = ModelScope(model, model.graph)
    find_calls(scope)
    before = graph_list(scope.graph)
    share_sums(scope)
    assert graph_list(scope.graph) == before
    assert count(scope, "relu") == 3


def test_gradients_of_a_shared_sum_add_up() -> None:
    plain, shared = inserted(block()), inserted(block())
    share_sums(shared)
    x = [X.clone().requires_grad_(True) for _ in range(2)]
    gradients = []
    for scope, leaf in zip((plain, shared), x, strict=True):
        model = fx.GraphModule(scope.root, scope.graph)
        model(leaf).pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "miss_block" in name})
    assert len(gradients[0]) == 4
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], rtol=0, atol=1e-12 * float(value.abs().max()))
    assert torch.allclose(x[0].grad, x[1].grad, rtol=0, atol=1e-12)  # type: ignore[arg-type]

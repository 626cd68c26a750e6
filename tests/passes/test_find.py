"""Finding: every call of the owner's own weight as a linear, in each layout and spelling, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import VARIANTS, adapted, max_error, reference_delta
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import misscompile as mc
from misscompile.passes.find import find_sites, linear_shape
from misscompile.passes.trace import make_opaque, trace_forward
from misscompile.plan import Scope


def find(owner: nn.Module, opaque: bool = False) -> Scope:
    scope = Scope(type(owner), 12, 8, torch.float32)
    if opaque:
        make_opaque(scope, owner, None, "told")
    else:
        trace_forward(scope, owner, None)
        assert scope.opaque is None
    before = str(scope.graph)
    find_sites(scope)
    assert str(scope.graph) == before  # read-only
    return scope


def test_linear() -> None:
    (site,) = find(nn.Linear(12, 8)).sites
    assert (site.node.target, site.x.target, site.layout) == (F.linear, "input", "out_in")
    assert site.weight is not None
    assert (site.weight.op, site.weight.target) == ("get_attr", "weight")


def test_conv1d() -> None:
    (site,) = find(Conv1D(8, 12)).sites
    assert (site.node.target, site.x.target, site.layout) == (torch.addmm, "view", "in_out")
    assert site.weight is not None
    assert site.weight.target == "weight"


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_the_product_of_a_parametrization_is_the_weight(norm: object) -> None:
    (site,) = find(norm(nn.Linear(12, 8))).sites  # type: ignore[operator]
    assert site.weight is not None
    assert (site.weight.op, site.weight.target, site.layout) == ("call_module", "parametrizations.weight", "out_in")


def test_an_opaque_call_is_a_site_without_a_weight() -> None:
    (site,) = find(nn.Linear(12, 8), opaque=True).sites
    assert (site.weight, site.layout, site.x.target) == (None, "opaque", "input")


class _Keywords(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(bias=self.bias, weight=self.weight, input=x)


class _AddmmKeywords(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(mat2=self.weight, input=self.bias, mat1=x)


@pytest.mark.parametrize(("kind", "layout"), [(_Keywords, "out_in"), (_AddmmKeywords, "in_out")])
def test_operands_passed_by_keyword(kind: type[nn.Linear], layout: str) -> None:
    (site,) = find(kind(12, 8)).sites
    assert site.weight is not None
    assert (site.x.target, site.weight.target, site.layout) == ("x", "weight", layout)


class _Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(x.flip(-1), self.weight)


def test_every_call_of_one_weight_is_a_site() -> None:
    scope = find(_Twice(12, 8))
    assert [site.x.target for site in scope.sites] == ["x", "flip"]
    assert [site.node for site in scope.sites] == [n for n in scope.graph.nodes if n.target is F.linear]


class _OtherWeight(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.other = nn.Parameter(torch.ones(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.other) + F.linear(x, self.weight)


def test_another_parameter_is_no_site() -> None:
    (site,) = find(_OtherWeight(12, 8)).sites
    assert site.weight is not None
    assert site.weight.target == "weight"


class _Given(nn.Linear):
    """Its weight is an argument: an adapter on `self.weight` would act on somebody else's product."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class _Child(nn.Linear):
    """A child module called `weight` is not the weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        del self.weight
        self.weight = nn.Flatten()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(x))  # type: ignore[operator]


class _Computed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs())


class _Weighted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, beta=2)


class _Swapped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.weight, x)


@pytest.mark.parametrize("kind", [_Given, _Child, _Computed, _Weighted, _Swapped])
def test_nothing_to_find(kind: type[nn.Linear]) -> None:
    assert find(kind(12, 8)).sites == []


class _Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())


class _Matmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("kind", [_Transposed, _Matmul])
@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_product_with_the_transposed_weight_is_a_site(kind: type[nn.Linear], init_weights: Any) -> None:
    (site,) = find(kind(12, 8)).sites
    assert site.layout == "in_out"
    model, x = adapted(nn.Sequential(kind(12, 8)), init_weights), torch.randn(3, 12)
    weight = model[0].weight.detach().double()
    updated = weight + reference_delta(init_weights, model[0].miss_block_default, weight)
    expected = F.linear(x.double(), updated, model[0].bias.double())
    assert max_error(model(x), expected) < 1e-5
    mc.merge(model)
    assert max_error(model[0].weight, updated) < 1e-6


def test_finding_again_starts_anew() -> None:
    scope = find(_Twice(12, 8))
    find_sites(scope)
    assert len(scope.sites) == 2


class _Packed(nn.Module):
    def __init__(self, **sizes: object) -> None:
        super().__init__()
        vars(self).update(sizes)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(12, 8), (12, 8)),
        (Conv1D(8, 12), (12, 8)),
        (_Packed(infeatures=12, outfeatures=8), (12, 8)),
        (_Packed(in_features=12), None),
        (_Packed(in_features="12", out_features=8), None),
        (nn.Bilinear(3, 4, 5), None),
        (nn.Embedding(12, 8), None),
        (nn.Conv1d(12, 8, 1), None),
        (nn.Identity(), None),
    ],
)
def test_linear_shape(module: nn.Module, shape: tuple[int, int] | None) -> None:
    assert linear_shape(module) == shape

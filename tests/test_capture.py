"""Capturing: which dimensions and modes the graph follows, what it says of the others, and the model as it was before."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import max_error
from torch import Tensor, nn
from zoo import TwoLinears, tiny_bert, tiny_llama, token_batch

import misscompile as mc
from misscompile.hosts.whole_graph import WholeGraph, record_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> Any:
    """Everything about a model that a capture might leave changed."""
    configs = [getattr(module.config, "use_cache", None) for module in model.modules() if hasattr(module, "config")]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    flags = {name: (tensor.requires_grad, tensor._version) for name, tensor in tensors}
    return {name: module.training for name, module in model.named_modules()}, flags, configs


def test_shares_the_values_and_keeps_the_names() -> None:
    model = TwoLinears()
    model.up.weight.requires_grad_(False)
    graph = mc.capture(model, (X,))
    assert isinstance(graph, WholeGraph)
    assert isinstance(graph, torch.fx.GraphModule)
    assert torch.equal(graph(X), model(X))
    for name, parameter in model.named_parameters():
        assert graph.get_parameter(name).data_ptr() == parameter.data_ptr()
        assert graph.get_parameter(name).requires_grad == parameter.requires_grad
    graph(X).sum().backward()
    assert graph.get_parameter("down.weight").grad is not None
    assert graph.get_parameter("up.weight").grad is None
    assert model.down.weight.grad is None


def test_batch_and_sequence_are_dynamic() -> None:
    model = tiny_llama()
    batch = {
        "input_ids": token_batch(2, 7),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "labels": token_batch(2, 7),
    }
    graph = mc.capture(model, kwargs=batch)
    for rows, length in ((2, 7), (5, 3), (3, 20)):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, -2:] = 0
        ids = token_batch(rows, length)
        expected = model(input_ids=ids, attention_mask=mask, labels=ids)
        actual = graph(input_ids=ids, attention_mask=mask, labels=ids)
        assert max_error(actual.logits, expected.logits) < 1e-5
        assert max_error(actual.loss, expected.loss) < 1e-5
        assert getattr(actual, "past_key_values", None) is None


def test_only_the_first_dimension_of_features_is_dynamic() -> None:
    graph = mc.capture(TwoLinears(), (X,))
    assert graph(torch.randn(9, 12)).shape == (9, 20)
    (node,) = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert [isinstance(size, torch.SymInt) for size in node.meta["val"].shape] == [True, False]


def test_tells_a_dimension_that_an_example_of_one_fixes() -> None:
    with pytest.warns(mc.MissWarning, match=r"dimension 0 of x is fixed at 1 \(give an example of 2 or more\)"):
        graph = mc.capture(TwoLinears(), (X[:1],))
    assert torch.equal(graph(X[:1]), graph(X[:1]))
    with pytest.raises(Exception, match=r"x\.size\(\)\[0\] == 1|Guard failed"):
        graph(X)


def test_tells_a_dimension_that_the_model_fixes() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 4))
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.table)  # type: ignore[no-any-return]

    model = Positions()
    with pytest.warns(mc.MissWarning, match=r"^capture: dimension 1 of x is fixed at 5 \(the model fixes it\)\.$"):
        graph = mc.capture(model, (torch.randn(3, 5, 4),))
    x = torch.randn(8, 5, 4)
    assert torch.equal(graph(x), model(x))


def test_takes_dynamic_shapes_as_given() -> None:
    width = torch.export.Dim("tokens", min=2, max=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mc.MissWarning)
        graph = mc.capture(nn.Linear(12, 4), (torch.randn(3, 5, 12),), dynamic_shapes=({1: width},))
    assert graph(torch.randn(3, 9, 12)).shape == (3, 9, 4)
    with pytest.raises(AssertionError, match="Guard failed"):
        graph(torch.randn(4, 9, 12))
    with pytest.raises(mc.CaptureError, match=r"dynamic_shapes\[0\]"):
        mc.capture(nn.Linear(12, 4), (X,), dynamic_shapes=({0: "rows"},))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    model, ids = tiny_llama(num_hidden_layers=1), token_batch()
    graph = mc.capture(model, kwargs={"input_ids": ids, "labels": ids})
    other = token_batch().roll(1, 0).flip(1)
    assert max_error(graph(input_ids=ids, labels=other).loss, model(input_ids=ids, labels=other).loss) < 1e-5
    assert abs(float(graph(input_ids=ids, labels=other).loss - graph(input_ids=ids, labels=ids).loss)) > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny_llama(num_hidden_layers=1, attention_dropout=0.1).train(training)
    model.model.layers[0].mlp.eval()
    model.model.embed_tokens.requires_grad_(False)
    before = state(model)
    assert True in before[2]
    mc.capture(model, kwargs={"input_ids": token_batch()})
    assert state(model) == before


class Failing(nn.Module):
    """Cannot be exported, with a frozen parameter and a config whose cache is on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4).requires_grad_(False)
        self.config = type("Config", (), {"use_cache": True})()

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("broken on purpose")


def test_leaves_running_statistics_alone() -> None:
    model = Dropping(norm=True).train()
    before = state(model)
    mc.capture(model, (X,))
    assert state(model) == before
    assert int(model.norm.num_batches_tracked) == 0


def test_leaves_the_model_as_it_was_after_an_error() -> None:
    model = Failing().train()
    model.linear.eval()
    before = state(model)
    with pytest.raises(mc.CaptureError, match="broken on purpose"):
        mc.capture(model, (X,))
    assert state(model) == before


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if y.sum() > 0:
            y = y * 2
        return y


class ByNumpy(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(scale_by_numpy(x))  # type: ignore[no-any-return]


def scale_by_numpy(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().max())


class ByItem(Branching):
    def forward(self, x: Tensor) -> Tensor:
        rows = int(x.sum().item())
        return self.linear(x)[:rows]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "line", "function", "reason"),
    [
        (Branching, "if y.sum() > 0:", "forward", "data-dependent"),
        (ByNumpy, "return x * float(x.detach().numpy().max())", "scale_by_numpy", "numpy"),
        (ByItem, "rows = int(x.sum().item())", "forward", "data-dependent"),
    ],
)
def test_names_the_line_that_cannot_be_followed(kind: type[nn.Module], line: str, function: str, reason: str) -> None:
    with open(__file__) as source:
        number = next(i for i, text in enumerate(source, 1) if text.strip() == line)
    with pytest.raises(mc.CaptureError) as error:
        mc.capture(kind(), (X,))
    message = str(error.value)
    assert message.startswith(
        f"torch.export cannot follow {kind.__name__} at {__file__}:{number}, in {function}: `{line}`: "
    )
    assert reason in message
    assert "misscompile.adapt(model, config) needs no whole graph" in message
    assert error.value.__cause__ is not None


def test_refuses_an_adapted_model() -> None:
    model = mc.adapt(TwoLinears(), {"r": 2, "target_modules": "all-linear"})
    with pytest.raises(mc.StateError, match=r"it has adapters already\. Capture the plain model, then adapt the graph"):
        mc.capture(model, (X,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TwoLinears(), [X]), "args: expected a tuple of example inputs, found list"),
        ((TwoLinears(), X), "args: expected a tuple of example inputs, found Tensor"),
        ((TwoLinears(), (X,), [("x", X)]), "kwargs: expected a dict of example inputs, found list"),
        ((TwoLinears(),), r"args, kwargs: they do not fit TwoLinears\.forward: missing a required argument: 'x'"),
        ((TwoLinears(), (X,), {"y": X}), r"args, kwargs: they do not fit TwoLinears\.forward: got an unexpected keyword"),
        (("model", (X,)), "model: expected a torch.nn.Module, found str"),
    ],
)
def test_refuses_arguments_of_the_wrong_type(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(mc.ArgumentError, match=message):
        mc.capture(*arguments)


def test_refuses_an_exported_program() -> None:
    program: Any = torch.export.export(TwoLinears(), (X,))
    with pytest.raises(mc.ArgumentError, match="found ExportedProgram"):
        mc.capture(program, (X,))


class Dropping(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(self.norm(self.linear(x))), 0.5, self.training)


@pytest.mark.parametrize("captured_in", [False, True])
def test_dropout_follows_the_mode(captured_in: bool) -> None:
    model = Dropping().train(captured_in)
    graph = mc.capture(model, (X,))
    assert graph.training is captured_in
    assert record_of(graph).mode is None
    adapted = mc.adapt(graph, {"r": 4, "target_modules": "all-linear"})
    for each in (graph, adapted, copy.deepcopy(adapted)):
        for mode in (True, False, True):
            each.train(mode)
            model.train(mode)
            torch.manual_seed(1)
            expected = model(X)
            torch.manual_seed(1)
            assert torch.equal(each(X), expected)
    assert (graph(X) == 0).float().mean() > 0.2


def test_attention_dropout_follows_the_mode() -> None:
    model = tiny_bert().eval()
    batch = {"input_ids": token_batch(), "labels": torch.tensor([0, 2])}
    graph = mc.capture(model, kwargs=batch)
    assert max_error(graph(**batch).logits, model(**batch).logits) < 1e-6
    graph.train()
    model.train()
    torch.manual_seed(1)
    expected = model(**batch).logits
    torch.manual_seed(1)
    assert max_error(graph(**batch).logits, expected) < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_what_is_frozen_in_one_mode_refuses_the_other(training: bool) -> None:
    model = Dropping(norm=True).train(training)
    graph = mc.capture(model, (X,))
    adapted = mc.adapt(graph, {"r": 4, "target_modules": "all-linear"})
    had, other = ("training", "evaluation") if training else ("evaluation", "training")
    for each in (graph, adapted, copy.deepcopy(adapted)):
        assert each.training is training
        each.train(training)
        with pytest.raises(mc.StateError, match=f"captured in {had} mode.* in {other} mode"):
            each.train(not training)
        assert each.training is training


def test_an_exported_program_with_frozen_dropout_refuses_the_other_mode() -> None:
    for training in (False, True):
        program = torch.export.export(Dropping().train(training), (X,), strict=False)
        adapted = mc.adapt(program, {"r": 4, "target_modules": "all-linear"})
        with pytest.raises(mc.StateError, match=r"Capture the model again in (training|evaluation) mode"):
            adapted.train(not training)
        adapted.train(training)
        assert adapted.training is training
    plain = mc.adapt(torch.export.export(TwoLinears(), (X,)), {"r": 4, "target_modules": "all-linear"})
    plain.train()
    plain.eval()  # nothing in it depends on a mode


class _TrainsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if self.training else y * float(y.sum())


def test_one_mode_is_enough() -> None:
    graph = mc.capture(_TrainsOnly(), (torch.ones(3, 8),))
    assert graph.training
    graph.train()
    with pytest.raises(mc.StateError, match="was captured in training mode"):
        graph.eval()
    with pytest.raises(mc.CaptureError, match=r"float\(y\.sum\(\)\)"):
        mc.capture(_TrainsOnly().eval(), (torch.ones(3, 8),))

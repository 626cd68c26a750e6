"""Capturing: which dimensions and modes the graph follows, what it says of the others, and the model as it was before."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import fields, gradients, max_error, run, says
from torch import Tensor, fx, nn
from zoo import TwoLinears, normal, tiny_bert, tiny_llama, token_batch

import misscompile as mc
from misscompile.hosts.whole_graph import WholeGraph, record_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
X = normal(3, 12)


class ByRule(nn.Module):
    """A linear, and what `rule(model, x)` makes of it."""

    def __init__(self, rule: Callable[[Any, Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.linear, self.rule = nn.Linear(12, 8), rule
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.table = nn.Parameter(torch.randn(5, 12))
        self.config = type("Config", (), {"use_cache": True})()

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


def dropping(model: Any, x: Tensor) -> Tensor:
    return F.dropout(torch.tanh(model.norm(model.linear(x))), 0.5, model.training)


def failing(model: Any, x: Tensor) -> Tensor:
    raise KeyError("broken on purpose")


def branching(model: Any, x: Tensor) -> Tensor:
    if model.linear(x).sum() > 0:
        return x * 2
    return x


def by_numpy(model: Any, x: Tensor) -> Tensor:
    return model.linear(x * float(x.detach().numpy().max()))  # type: ignore[no-any-return]


def by_item(model: Any, x: Tensor) -> Tensor:
    rows = int(x.sum().item())
    return model.linear(x)[:rows]  # type: ignore[no-any-return]


def trains_only(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.linear(x)
    return y if model.training else y * float(y.sum())


def same_in(mode: bool, seed: int, model: nn.Module, graph: nn.Module, *args: Any, **kwargs: Any) -> float:
    """The largest difference of two models in one mode and from one seed."""
    outputs = []
    for each in (model, graph):
        each.train(mode)
        torch.manual_seed(seed)
        outputs.append(run(each, *args, **kwargs))
    return max_error(*outputs)


# What is shared and dynamic


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
    assert list(gradients(graph, X)) == ["down.weight", "down.bias"]
    assert model.down.weight.grad is None


def test_batch_and_sequence_are_dynamic() -> None:
    model, ids = tiny_llama(), token_batch(2, 7)
    graph = mc.capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    for rows, length in ((2, 7), (5, 3), (3, 20)):
        ids, mask = token_batch(rows, length), torch.ones(rows, length, dtype=torch.long)
        mask[0, -2:] = 0
        expected, actual = (each(input_ids=ids, attention_mask=mask, labels=ids) for each in (model, graph))
        assert max_error(actual.logits, expected.logits) < 1e-5
        assert max_error(actual.loss, expected.loss) < 1e-5
        assert getattr(actual, "past_key_values", None) is None


def test_only_the_first_dimension_of_features_is_dynamic() -> None:
    graph = mc.capture(TwoLinears(), (X,))
    assert graph(torch.randn(9, 12)).shape == (9, 20)
    (node,) = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert [isinstance(size, torch.SymInt) for size in node.meta["val"].shape] == [True, False]


def test_tells_a_dimension_that_an_example_of_one_or_the_model_fixes() -> None:
    with pytest.warns(mc.MissWarning, match=r"dimension 0 of x is fixed at 1 \(give an example of 2 or more\)"):
        graph, model = mc.capture(two := TwoLinears(), (X[:1],)), two
    assert torch.equal(graph(X[:1]), model(X[:1]))
    with pytest.raises(Exception, match=r"x\.size\(\)\[0\] == 1|Guard failed"):
        graph(X)
    positions = ByRule(lambda model, x: model.linear(x + model.table))
    with pytest.warns(mc.MissWarning, match=r"^capture: dimension 1 of x is fixed at 5 \(the model fixes it\)\.$"):
        graph = mc.capture(positions, (torch.randn(3, 5, 12),))
    x = torch.randn(8, 5, 12)
    assert torch.equal(graph(x), positions(x))


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
    assert max_error(graph(input_ids=ids, labels=other).loss, graph(input_ids=ids, labels=ids).loss) > 1e-3


# What is left alone


def state(model: nn.Module) -> Any:
    """Everything about a model that a capture might leave changed."""
    configs = [getattr(module.config, "use_cache", None) for module in model.modules() if hasattr(module, "config")]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    flags = {name: (tensor.requires_grad, tensor._version) for name, tensor in tensors}
    return {name: module.training for name, module in model.named_modules()}, flags, configs


def mixed_llama() -> nn.Module:
    model = tiny_llama(num_hidden_layers=1, attention_dropout=0.1)
    model.model.embed_tokens.requires_grad_(False)
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "llama": (mixed_llama, "model.layers.0.mlp", {"input_ids": token_batch()}),
    "running statistics": (lambda: ByRule(dropping, norm=True), "norm", {"x": X}),
    "after an error": (lambda: ByRule(failing), "linear", {"x": X}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", LEFT)
def test_leaves_the_model_as_it_was(case: str, training: bool) -> None:
    make, other, kwargs = LEFT[case]
    model = make().train(training)
    model.get_submodule(other).train(case == "running statistics")
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    assert True in before[2]
    if case == "after an error":
        with pytest.raises(mc.CaptureError, match="broken on purpose"):
            mc.capture(model, kwargs=kwargs)
    else:
        mc.capture(model, kwargs=kwargs)
    assert state(model) == before
    assert all(not buffer.any() for name, buffer in model.named_buffers() if "num_batches" in name)


class SelfAssigning(nn.Module):
    """A forward that leaves values on its module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.last: Any = None
        self.seen: list[Any] = []
        self.cache: dict[str, Any] = {"keys": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.made = y = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        self.seen.append(y)
        self.cache["keys"].append(y)
        self.cache["value"] = y
        return y + self.mean


def test_leaves_no_value_of_the_trace_on_modules_that_assign_to_themselves() -> None:
    model = SelfAssigning()
    names = list(vars(model))
    graph = mc.capture(model, (X,))
    assert (model.last, model.seen, model.cache, list(vars(model))) == (None, [], {"keys": []}, names)
    assert not model.mean.any()
    assert max_error(graph(X), model(X)) < 1e-6


# What is refused


@pytest.mark.parametrize(
    ("rule", "line", "reason"),
    [
        (branching, "if model.linear(x).sum() > 0:", "data-dependent"),
        (by_numpy, "return model.linear(x * float(x.detach().numpy().max()))  # type: ignore[no-any-return]", "numpy"),
        (by_item, "rows = int(x.sum().item())", "data-dependent"),
    ],
)
def test_names_the_line_that_cannot_be_followed(rule: Any, line: str, reason: str) -> None:
    with open(__file__) as source:
        number = next(i for i, text in enumerate(source, 1) if text.strip() == line)
    with pytest.raises(mc.CaptureError) as error:
        mc.capture(ByRule(rule), (X,))
    message = str(error.value)
    assert message.startswith(f"torch.export cannot follow ByRule at {__file__}:{number}, in {rule.__name__}: `{line}`: ")
    assert reason in message
    assert "misscompile.adapt(model, config) needs no whole graph" in message
    assert error.value.__cause__ is not None


REFUSED: list[tuple[Callable[[], Any], type[mc.MissError], str]] = [
    (lambda: (TwoLinears(), [X]), mc.ArgumentError, "args: expected a tuple of example inputs, found list"),
    (lambda: (TwoLinears(), X), mc.ArgumentError, "args: expected a tuple of example inputs, found Tensor"),
    (lambda: (TwoLinears(), (X,), [("x", X)]), mc.ArgumentError, "kwargs: expected a dict of example inputs, found list"),
    (lambda: (TwoLinears(),), mc.ArgumentError, "they do not fit TwoLinears.forward: missing a required argument: 'x'"),
    (lambda: (TwoLinears(), (X,), {"y": X}), mc.ArgumentError, "fit TwoLinears.forward: got an unexpected keyword"),
    (lambda: ("model", (X,)), mc.ArgumentError, "model: expected a torch.nn.Module, found str"),
    (lambda: (torch.export.export(TwoLinears(), (X,)), (X,)), mc.ArgumentError, "found ExportedProgram"),
    (
        lambda: (mc.adapt(TwoLinears(), fields()), (X,)),
        mc.StateError,
        "it has adapters already. Capture the plain model, then adapt the graph",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refuses_other_models_and_inputs(arguments: Callable[[], Any], error: type[mc.MissError], message: str) -> None:
    with pytest.raises(error) as raised:
        mc.capture(*arguments())
    assert message in str(raised.value)


# Modes


@pytest.mark.parametrize("captured_in", [False, True])
def test_dropout_follows_the_mode(captured_in: bool) -> None:
    model = ByRule(dropping).train(captured_in)
    graph = mc.capture(model, (X,))
    assert graph.training is captured_in
    assert record_of(graph).mode is None
    adapted = mc.adapt(graph, fields())
    for each in (graph, adapted, copy.deepcopy(adapted)):
        assert [same_in(mode, 1, model, each, X) for mode in (True, False, True)] == [0, 0, 0]
    assert (graph.train()(X) == 0).float().mean() > 0.2


def test_attention_dropout_follows_the_mode() -> None:
    model, batch = tiny_bert(), {"input_ids": token_batch(), "labels": torch.tensor([0, 2])}
    graph = mc.capture(model, kwargs=batch)
    assert [same_in(mode, 1, model, graph, **batch) < 1e-6 for mode in (False, True)] == [True, True]
    assert max_error(run(graph, **batch), run(graph.eval(), **batch)) > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_what_is_frozen_in_one_mode_refuses_the_other(training: bool) -> None:
    graph = mc.capture(ByRule(dropping, norm=True).train(training), (X,))
    adapted = mc.adapt(graph, fields())
    program = torch.export.export(ByRule(dropping).train(training), (X,), strict=False)
    had, other = ("training", "evaluation") if training else ("evaluation", "training")
    for each in (graph, adapted, copy.deepcopy(adapted), mc.adapt(program, fields())):
        each.train(training)
        with pytest.raises(
            mc.StateError, match=f"captured in {had} mode.* in {other} mode.* the model again in {other} mode"
        ):
            each.train(not training)
        assert each.training is training
    plain = mc.adapt(torch.export.export(TwoLinears(), (X,)), fields())
    assert not plain.train().eval().training  # nothing in it depends on a mode


@pytest.mark.parametrize("name", ["ﬁ", "Ａ"])
def test_a_name_that_python_reads_as_another_is_told_by_capture_and_adapt(name: str) -> None:
    model: Any = nn.Sequential(OrderedDict({name: nn.Linear(12, 8)}))
    told = f"{name}...: Python reads this name as..., or adapt the model itself..."
    for graph in (model, torch.export.export(model, (X,)), fx.symbolic_trace(model)):
        with pytest.raises(mc.CaptureError) as caught:
            mc.capture(model, (X,)) if graph is model else mc.adapt(graph, fields())
        assert says(caught.value, told), caught.value
    assert torch.equal(mc.adapt(copy.deepcopy(model), fields())(X), model(X))


def test_one_mode_is_enough() -> None:
    graph = mc.capture(ByRule(trains_only), (X,))
    assert graph.training
    graph.train()
    with pytest.raises(mc.StateError, match="was captured in training mode"):
        graph.eval()
    with pytest.raises(mc.CaptureError, match=r"float\(y\.sum\(\)\)"):
        mc.capture(ByRule(trains_only).eval(), (X,))

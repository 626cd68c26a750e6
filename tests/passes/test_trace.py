"""Tracing: what becomes a graph, what stays one opaque node and why, and that nothing of it shows on the module."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from support import VARIANTS, adapted, base_weight, fill_blocks, max_error, reference_delta
from torch import Tensor, fx, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

import misscompile as mc
from misscompile.hosts.owner_class import REWRITE
from misscompile.passes.trace import call_opaque, opaque_scope, probe_opaque, trace_owner
from misscompile.record.words import Scope

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
FOREIGN = "its instance attribute `forward` was set by other code"


class Forwards:
    """What an `_Owner` may compute: a trace would freeze, lose or not follow some of each."""

    def branches(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.sum() > 0 else F.linear(-x, self.weight)

    def reads_training(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * (1.0 if self.training else 0.5)

    def passes_training(self: Any, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, self.weight), 0.0, self.training)

    def reads_attribute(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scale

    def reads_by_name(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * getattr(self, "sca" + "le")

    def reads_in_helper(self: Any, x: Tensor) -> Tensor:
        return self._rescale(F.linear(x, self.weight))  # type: ignore[no-any-return]

    def reads_dict(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.__dict__["scale"]

    def reads_child(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.child.factor

    def stack(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        for module in self.after:
            y = module(y) + y
        return y

    def last(self: Any, x: Tensor) -> Tensor:
        return self.after[-1](F.linear(x, self.weight))  # type: ignore[no-any-return]

    def not_its_weight(self: Any, x: Tensor) -> Tensor:
        return x @ self.weight.abs().T

    def variadic_keywords(self: Any, x: Tensor, **options: float) -> Tensor:
        return F.linear(x, self.weight) * options.get("factor", 1.0) if x.ndim else x

    def variadic_arguments(self: Any, x: Tensor, *factors: float) -> Tensor:
        return F.linear(x, self.weight) * (factors[0] if factors else 1.0) if x.sum() else x

    def optional(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight)
        return y if residual is None else y + residual

    def type_check(self: Any, x: Any) -> Tensor:
        return F.linear(x if isinstance(x, Tensor) else x * 2, self.weight)  # a proxy is no tensor

    def constant(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * torch.tensor(2.0)

    def noise(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + torch.randn(self.out_features)

    def gradient_mode(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if torch.is_grad_enabled() else y * 2

    def full_precision(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, self.weight, self.bias)

    def detached(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.linear(x, self.weight)
        return y + self.bias  # type: ignore[no-any-return]

    def counts(self: Any, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return F.linear(x, self.weight)

    def observes(self: Any, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.detach().abs().max())  # as quantisation-aware training has it
        return F.linear(x, self.weight)

    def remembers(self: Any, x: Tensor) -> Tensor:
        self.last_input = x
        return F.linear(x, self.weight)

    def collects(self: Any, x: Tensor) -> Tensor:
        self.seen.append(x)
        return F.linear(x, self.weight)

    def returns_tuple(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.sum() < 0:
            raise ValueError
        return F.linear(x, self.weight), self.bias

    def tuple_for_some(self: Any, x: Tensor) -> Any:
        y = F.linear(x, self.weight)
        return (y, y) if x.sum() < 0 else y

    def complex_outputs(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * complex(0, self.scale)

    def turned_round(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t()) * self.scale  # type: ignore[no-any-return]

    def sequences_alone(self: Any, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        return F.linear(x.view(batch * length, width), self.weight).view(batch, length, 8) * float(x.max())

    def scripted(self: Any, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        else:
            return F.linear(x, self.weight.to(x.dtype), self._rescale(self.bias))

    def grouped(self: Any, x: Tensor) -> Tensor:
        return (x * self.weight[0]).unflatten(-1, (int(x.shape[-1] / 3), 3))  # type: ignore[no-any-return]

    def two_inputs(self: Any, x: Tensor, index: Tensor) -> Tensor:
        return F.linear(x[index], self.weight)

    def looks_at_values(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * float(x.max())


class _Factor(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor


class _Owner(nn.Linear):
    scale = 3.0

    def __init__(self, value: int = 1) -> None:
        super().__init__(12, 8)
        self.scale = 2.0
        self.child = _Factor(value)
        self.after = nn.ModuleList((nn.Tanh(), nn.ReLU(), nn.Tanh())[:value])
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))
        self.last_input: Tensor | None = None
        self.seen: list[Tensor] = []

    def _rescale(self, y: Tensor) -> Tensor:
        return y * self.scale


@functools.cache
def kind_of(name: str) -> Any:
    return type(name, (_Owner,), {"forward": vars(Forwards)[name]})


def make(name: str, value: int = 1) -> Any:
    """An owner with one of the `Forwards`."""
    return kind_of(name)(value)


def trace(owner: nn.Module, foreign: Callable[..., Any] | None = None) -> Scope:
    scope = trace_owner(owner, type(owner), (12, 8), foreign)
    scope.graph.lint()
    assert (scope.label, scope.shape) == (type(owner).__name__, (12, 8))
    return scope


def adapt(owner: nn.Module, init_weights: Any = True) -> nn.Module:
    """`owner`, adapted; its blocks are zero."""
    mc.adapt(nn.Sequential(owner), mc.MissConfig(r=4, target_modules="0", init_weights=init_weights))
    return owner


def opaque(owner: nn.Module) -> str | None:
    """Why the forward of an adapted owner stays one node."""
    reason: str | None = getattr(type(owner), REWRITE).base.opaque
    return reason


# --- what is traced -------------------------------------------------------------------------------------------------


def test_linear() -> None:
    nodes = [(node.op, node.target) for node in trace(nn.Linear(12, 8)).graph.nodes]
    weight, bias = ("get_attr", "weight"), ("get_attr", "bias")
    assert nodes == [("placeholder", "input"), weight, bias, ("call_function", F.linear), ("output", "output")]
    assert bias not in [(n.op, n.target) for n in trace(nn.Linear(12, 8, bias=False)).graph.nodes]


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrized() -> nn.Module:
    owner = nn.Linear(12, 8)
    parametrize.register_parametrization(owner, "weight", _Doubled())
    return owner


class _Scaled(nn.Linear):
    """A subclass whose own code needs nothing but tensors, children and its shape."""

    def __init__(self) -> None:
        super().__init__(12, 8)
        self.gain = nn.Parameter(torch.rand(8))
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x.view(-1, self.in_features))) * self.gain
        return y


@pytest.mark.parametrize(
    ("build", "target", "children"),
    [
        (lambda: nn.Linear(12, 8), F.linear, []),
        (lambda: Conv1D(8, 12), torch.addmm, []),
        (_parametrized, F.linear, ["parametrizations.weight"]),
        (_Scaled, F.linear, ["act"]),
    ],
)
def test_a_trace_computes_what_its_owner_does_and_calls_a_child_as_one_node(
    build: Callable[[], nn.Module], target: Any, children: list[str]
) -> None:
    owner = build()
    nn.init.normal_(owner.bias)
    scope = trace(owner)
    assert scope.opaque is None
    assert target in [node.target for node in scope.graph.nodes]
    assert [node.target for node in scope.graph.nodes if node.op == "call_module"] == children
    assert torch.equal(fx.GraphModule(owner, scope.graph)(X), owner(X))


def test_a_branch_for_scripts_is_never_taken_and_does_not_keep_a_forward_from_being_traced() -> None:
    owner = make("scripted")
    scope = trace(owner)
    assert scope.opaque is None
    assert torch.equal(fx.GraphModule(owner, scope.graph)(X), owner(X))
    weight = owner.weight.detach().double()
    delta = reference_delta("bat", fill_blocks(adapt(owner, "bat")).miss_block_default, weight)
    expected = F.linear(X.double(), weight + delta, owner.bias.double())
    assert max_error(owner(X), expected) < 1e-6


def test_a_branch_behind_a_condition_that_is_read_both_ways_is_looked_at() -> None:
    class Either(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.bias is None:
                return F.linear(x, self.weight)
            else:
                return F.linear(x, self.weight) * self.out_scale  # type: ignore[operator]

    owner = Either(12, 8)
    assert trace(owner).opaque == "its forward reads self.out_scale, which a trace would freeze or lose"


def test_a_scope_has_the_shapes_of_its_owner_and_none_of_its_values() -> None:
    for owner in (nn.Linear(12, 8).double(), _parametrized()):
        held = trace(owner).root.get_parameter("weight")
        assert (held.shape, held.is_meta, held.requires_grad) == ((8, 12), True, False)
    assert trace(nn.Linear(12, 8).double()).root.get_parameter("bias").dtype == torch.float64


def test_children_and_super_calls_are_traced_and_the_update_lands_before_what_follows() -> None:
    owner = fill_blocks(adapt(_Scaled()))
    delta = reference_delta(True, owner.miss_block_default, base_weight(owner))
    expected = (
        torch.tanh(F.linear(X.double(), base_weight(owner).double() + delta, owner.bias.double())) * owner.gain.double()
    )
    assert max_error(owner(X), expected) < 1e-6


# --- what stays opaque, and the text of the reason ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("branches", "chooses by `F.linear(x, self.weight) if x.sum() > 0"),
        ("reads_training", "chooses by `1.0 if self.training else 0.5`"),
        ("passes_training", "reads self.training"),
        ("reads_attribute", "reads self.scale"),
        ("reads_by_name", "calls getattr"),
        ("reads_in_helper", "calls self._rescale"),
    ],
)
def test_a_forward_that_python_decides_is_opaque(name: str, reason: str) -> None:
    owner = make(name)
    scope = trace(owner)
    assert scope.opaque is not None
    assert reason in scope.opaque
    targets = [node.target for node in scope.graph.nodes]
    assert targets == ["x", "*args", "**kwargs", "miss_base_forward", call_opaque, "output"]
    before = [owner(X), owner(-X)]
    fill_blocks(adapt(owner))
    update = X.double() @ reference_delta(True, owner.miss_block_default, base_weight(owner)).T
    assert max_error(owner(X) - before[0], update) < 1e-5
    assert max_error(owner(-X) - before[1], -update) < 1e-5


@pytest.mark.parametrize("name", ["reads_attribute", "reads_by_name", "reads_in_helper", "reads_dict"])
def test_an_attribute_of_an_opaque_owner_still_counts_after_adapting(name: str) -> None:
    owner = adapt(make(name))
    assert torch.equal(owner(X), F.linear(X, base_weight(owner)) * 2.0)
    owner.scale = 7.0
    assert torch.equal(owner(X), F.linear(X, base_weight(owner)) * 7.0)


@pytest.mark.parametrize("norm", [spectral_norm, weight_norm])
def test_a_weight_that_a_hook_writes_is_opaque_and_merged_once_it_is_a_parameter_again(norm: Any) -> None:
    model = adapted(nn.Sequential(norm(nn.Linear(12, 8))).double().eval())
    x = X.double()
    y, before = model(x), list(model.state_dict())
    reason = r"its weight is computed by a hook before each call \(remove_weight_norm, .* makes it a parameter again\)"
    with pytest.raises(mc.MergeError, match=f"0: {reason}"):
        mc.merge(model)
    assert torch.equal(model(x), y)
    assert list(model.state_dict()) == before
    remove = remove_weight_norm if norm is weight_norm else remove_spectral_norm
    remove(model[0])
    assert max_error(model(x), y) < 1e-9
    mc.merge(model)
    assert max_error(model(x), y) < 1e-9
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]
    with pytest.raises(mc.UnsupportedModuleError, match=f"{reason}, and 'bat' needs the weight itself"):
        mc.adapt(nn.Sequential(norm(nn.Linear(12, 8))), mc.MissConfig(r=4, target_modules="0", init_weights="bat"))


def test_a_weight_that_is_not_called_as_a_linear_is_opaque_and_cannot_be_merged() -> None:
    owner = fill_blocks(adapt(make("not_its_weight")))
    reason = "its forward does not call its own weight as a linear"
    assert opaque(owner) == reason
    with pytest.raises(mc.MergeError, match=reason):
        mc.merge(owner)


def test_a_forward_set_on_the_instance_is_opaque_and_keeps_its_signature() -> None:
    def forward(x: Tensor, shift: float = 0.5, *, factor: float = 2.0) -> Tensor:
        return F.linear(x, owner.weight) * factor + shift

    owner = nn.Linear(12, 8)
    owner.forward = forward  # type: ignore[method-assign]
    scope = trace(owner, forward)
    assert scope.opaque == FOREIGN
    assert [n.target for n in scope.graph.nodes if n.op == "placeholder"] == ["x", "*args", "**kwargs"]
    before = owner(X)
    unchanged(owner, lambda m: m(X), lambda m: m(X, 1.5), lambda m: m(x=X, factor=3.0))
    assert max_error(fill_blocks(owner)(X), before) > 1e-3
    mc.unload(owner)
    assert owner.forward is forward


def test_a_method_bound_to_the_instance_is_foreign_unless_it_is_the_class_s_own() -> None:
    def doubled(self: nn.Linear, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) * 2

    for forward, reason in ((nn.Linear.forward, None), (doubled, FOREIGN)):
        owner = nn.Linear(12, 8)
        owner.forward = types.MethodType(forward, owner)  # type: ignore[method-assign]
        unchanged(owner, lambda m: m(X))
        assert opaque(owner) == reason


def test_a_wrapper_with_nothing_but_varargs_takes_one_input() -> None:
    owner = nn.Linear(12, 8)
    inner = owner.forward
    owner.forward = lambda *args: inner(*args)  # type: ignore[method-assign]
    scope = opaque_scope(owner, nn.Linear, (12, 8), owner.forward, "told")
    assert (scope.opaque, next(iter(scope.graph.nodes)).target) == ("told", "input")
    unchanged(owner, lambda m: m(X))


# --- forwards that a trace would silently change --------------------------------------------------------------------


def unchanged(owner: nn.Module, *calls: Callable[[nn.Module], Tensor]) -> None:
    """Adapting with zero blocks changes no bit of a call."""

    def results() -> list[Tensor]:
        found = []
        for call in calls:
            torch.manual_seed(5)
            found.append(call(owner))
        return found

    before = results()
    adapt(owner)
    for after, expected in zip(results(), before, strict=True):
        assert after.dtype == expected.dtype
        assert torch.equal(after, expected)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("variadic_keywords", [lambda m: m(X, factor=3.0)]),
        ("variadic_arguments", [lambda m: m(X, 3.0)]),
        ("optional", [lambda m: m(X), lambda m: m(X, torch.ones(8))]),
        ("type_check", [lambda m: m(X)]),
        ("constant", [lambda m: m(X)]),
        ("noise", [lambda m: m(X)]),
        ("gradient_mode", [lambda m: m(X), torch.no_grad()(lambda m: m(X))]),
        ("full_precision", [torch.autocast("cpu", torch.bfloat16)(lambda m: m(X))]),
    ],
)
def test_what_a_trace_would_freeze_is_decided_at_each_call(name: str, calls: list[Callable[[nn.Module], Tensor]]) -> None:
    owner = make(name)
    unchanged(owner, *calls)
    assert torch.equal(owner(X), owner(X)) == (name != "noise")


def test_a_block_without_gradients_stays_without() -> None:
    owner = adapt(make("detached"))
    owner.weight.requires_grad_(True)
    owner(X).sum().backward()
    assert owner.weight.grad is None


@pytest.mark.parametrize(("name", "values"), [("reads_child", (1, 5)), ("stack", (1, 3)), ("last", (1, 2))])
def test_owners_that_differ_inside_their_children_do_not_share_a_trace(name: str, values: tuple[int, int]) -> None:
    model = nn.Sequential(*(make(name, value) for value in values))
    before = [owner(X) for owner in model]
    mc.adapt(model, mc.MissConfig(r=4, target_modules="[01]"))
    for owner, expected in zip(model, before, strict=True):
        assert torch.equal(owner(X), expected)


# --- the module is not changed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(12, 8),
        lambda: Conv1D(8, 12),
        _Scaled,
        *(functools.partial(make, name) for name in ("branches", "reads_training", "reads_attribute", "noise")),
    ],
)
def test_tracing_and_probing_change_nothing(build: Callable[[], nn.Module]) -> None:
    owner = build()
    kind = type(owner)
    members = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(owner).items()}
    tensors = {name: value.clone() for name, value in owner.state_dict().items()}
    trace(owner)
    probe_opaque(owner, kind, (12, 8))
    assert type(owner) is kind
    assert vars(owner) == members
    assert all(torch.equal(value, tensors[name]) for name, value in owner.state_dict().items())


@pytest.mark.parametrize("name", ["counts", "observes", "remembers", "collects"])
def test_what_a_forward_writes_is_written_by_calls_and_by_nothing_else(name: str) -> None:
    owner = make(name)
    held = dict(owner._buffers)
    assert probe_opaque(owner, type(owner), (12, 8)) is None
    adapt(owner)
    assert all(owner._buffers[name] is buffer for name, buffer in held.items())
    assert (owner.calls, owner.largest, owner.last_input, owner.seen) == (0, 0, None, [])
    owner(X)
    assert owner.calls == (name == "counts")
    assert owner.largest == (X.abs().max() if name == "observes" else 0)
    assert owner.last_input is (X if name == "remembers" else None)
    assert [x is X for x in owner.seen] == [True] * (name == "collects")


class _Interrupted(Exception):
    """As a handler of signals raises it, at any point of the code."""


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, _Interrupted, KeyboardInterrupt])
def test_an_error_that_is_not_the_code_s_is_raised_and_not_kept_as_opaque(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    class Fresh(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    def fail(*_: Any) -> Any:
        raise error

    owner = Fresh(12, 8)
    with monkeypatch.context() as patch:
        patch.setattr(fx.Tracer, "trace", fail)
        with pytest.raises(error):
            adapt(owner)
    assert type(owner) is Fresh
    assert "miss_block_default" not in dict(owner.named_parameters())
    assert opaque(adapt(owner)) is None


# --- what is no linear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("reads_attribute", None),
        ("looks_at_values", None),
        ("returns_tuple", r"found a tuple: exclude it"),
        ("tuple_for_some", None),
        ("complex_outputs", r"found a complex tensor of shape \(2, 8\): exclude it"),
        ("turned_round", r"its forward fails on 12 features \(RuntimeError: mat1 and mat2 shapes"),
        ("sequences_alone", None),
        ("grouped", r"tensor whose last dimension is 8, found a tensor of shape \(2, 4, 3\): exclude it"),
        ("two_inputs", r"its forward is not a function of one input \(missing a required argument: 'index'\)"),
    ],
)
def test_probe(name: str, problem: str | None) -> None:
    owner = make(name)
    found = probe_opaque(owner, type(owner), (12, 8))
    assert found is None if problem is None else re.search(problem, str(found))


def test_a_router_that_returns_a_tuple_is_refused_by_name_and_skipped_by_all_linear() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y, y.topk(2).indices if self.training else y

    model = nn.Sequential(nn.Linear(12, 12), Router(12, 8))
    text = r"1 \(Router\).*last dimension is 8, found a tuple: exclude it"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        mc.adapt(model, mc.MissConfig(r=4, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
    with pytest.warns(mc.MissWarning, match=r"1 \(Router\) is not adapted: .*found a tuple"):
        mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    assert type(model[1]) is Router
    assert "refused: 1 (Router): an adapted module should return a tensor" in mc.dump(model)


def test_an_output_that_only_the_run_shows_to_be_no_linear_s() -> None:
    text = "an adapted tuple_for_some should .* last dimension is 8, found a tuple: exclude it from target_modules"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        adapt(make("tuple_for_some"))(-X.abs())


def test_what_an_opaque_call_may_return() -> None:
    y = torch.ones(2, 8)
    assert call_opaque(lambda x: x, 8, y, (), {}) is y
    for returned, width, found in ((y, 9, r"of shape \(2, 8\)"), (None, 8, "a NoneType"), (y.sum(), 8, r"of shape \(\)")):
        with pytest.raises(mc.UnsupportedModuleError, match=f"an adapted module should .* found .*{found}: exclude it"):
            call_opaque(lambda x, result=returned: result, width, X, (), {})


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_bat_on_an_opaque_module_is_refused_with_the_reason(init_weights: Any) -> None:
    model = nn.Sequential(make("reads_training"))
    if init_weights != "bat":
        adapted(model, init_weights, target_modules="0")
        return
    text = r"0 \(reads_training\): its forward chooses by .*self.training.*'bat' needs the weight itself.*True or 'mini' do"
    with pytest.raises(mc.UnsupportedModuleError, match=text):
        adapted(model, init_weights, target_modules="0")
    assert type(model[0]) is kind_of("reads_training")

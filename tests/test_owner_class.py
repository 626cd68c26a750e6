"""The class of an owner: one for equal owners, visible code, and copies, hooks and dtypes that it must live with."""

from __future__ import annotations

import abc
import copy
import gc
import inspect
import linecache
import pickle
import re
import traceback
import types
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from support import VARIANTS, adapted, base_weight, fill_blocks, max_error, reference_delta, snapshot
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears, normal

import misscompile as mc
from misscompile.hosts.owner_class import (
    REWRITE,
    _compile_forward,
    _make_class,
    _readable_code,
    _set_class,
    check_class,
    find_foreign_forward,
    owner_scope,
)

X = normal(3, 12)
UP = {"r": 4, "mini_r": 2, "target_modules": ["up"]}


# The class


def test_generated_forwards_share_their_globals_unless_names_collide() -> None:
    first, second = adapted(nn.Sequential(nn.Linear(8, 4)))[0], adapted(nn.Sequential(nn.Linear(8, 12)))[0]
    shared = type(first).forward.__globals__
    assert type(second).forward.__globals__ is shared
    assert "forward" not in shared

    def calling(function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The globals of a forward that calls a function of one name."""
        function.__qualname__ = function.__name__ = "test_owner_class_other"
        graph = fx.Graph()
        graph.output(graph.call_function(function, (graph.placeholder("x"),)))
        return _compile_forward(graph, "Linear").__globals__  # type: ignore[no-any-return]

    other, another = (lambda x: x), (lambda x: x + 1)
    assert calling(other) is shared
    (name,) = [key for key, value in shared.items() if value is other]
    own = calling(another)
    assert own is not shared
    assert own[name] is another
    assert shared[name] is other


def test_owners_of_equal_structure_share_a_class_within_and_across_models() -> None:
    def build() -> nn.Module:
        equal = [nn.Linear(12, 8) for _ in range(3)]
        return nn.Sequential(*equal, nn.Linear(12, 8, bias=False), nn.Linear(8, 12))

    first, second, other = adapted(build()), adapted(build()), adapted(build(), r=3)
    kinds = [type(owner) for owner in first]
    assert kinds[0] is kinds[1] is kinds[2]
    assert len(set(kinds)) == 3
    assert [type(owner) for owner in second] == kinds
    assert not set(kinds) & {type(owner) for owner in other}


@pytest.mark.parametrize(
    "changes", [{"r": 2}, {"init_weights": "mini"}, {"init_weights": "bat"}, {"miss_dropout": 0.1}, {"adapter": "b"}]
)
def test_what_the_code_depends_on_makes_another_class(changes: dict[str, Any]) -> None:
    def kind(adapter: str = "default", **changes: Any) -> type[nn.Module]:
        return type(mc.adapt(TwoLinears(), UP | changes, adapter).up)

    assert kind() is kind()
    assert kind(**changes) is kind(**changes)
    assert kind(**changes) is not kind()


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 8), lambda: Conv1D(8, 12)])
def test_name_module_and_bases_are_those_of_the_base_class(make: Callable[[], nn.Module]) -> None:
    owner = make()
    base = type(owner)
    adapted(nn.Sequential(owner))
    kind = type(owner)
    assert kind.__bases__ == (base,)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (base.__name__, base.__qualname__, base.__module__)
    assert "forward" not in vars(owner)


Kind = TypeVar("Kind")


class FromAbc(abc.ABC, nn.Linear):
    """As the linears of optimum-quanto: its first base lays instances out in another way than `nn.Module`."""


class Mixed(FromAbc):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class FromGeneric(Generic[Kind], nn.Linear):
    pass


@pytest.mark.parametrize("init_weights", VARIANTS)
@pytest.mark.parametrize("kind", [FromAbc, Mixed, FromGeneric])
def test_a_linear_whose_first_base_is_no_module_is_adapted_copied_and_unloaded(kind: Any, init_weights: Any) -> None:
    model = nn.Sequential(kind(12, 8).double())
    x, base = X.double(), model(X.double())
    fill_blocks(mc.adapt(model, UP | {"target_modules": ["0"], "init_weights": init_weights}), std=0.3)
    delta = reference_delta(init_weights, model[0].miss_block_default, base_weight(model[0]))
    expected = base + x @ delta.t() * (2 if kind is Mixed else 1)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(each[0], kind)
        assert max_error(each(x), expected) < 1e-12
        with mc.disable_adapter(each):
            assert torch.equal(each(x), base)
        assert torch.equal(mc.unload(each)(x), base)
        assert type(each[0]) is kind


class Named(nn.Linear):
    """Has names of its own that a class made from it might take too."""

    scope, graph, blocks, rewrite, base = "scope", "graph", "blocks", "rewrite", "base"

    def base_forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, input: Tensor) -> Tensor:
        return self.base_forward(input) + len(self.scope)


class Renamed(Named):
    """The same, with a forward that is traced."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + 5


@pytest.mark.parametrize("route", ["module", "captured"])
@pytest.mark.parametrize(
    ("kind", "init_weights"),
    [(kind, value) for kind in (Named, Renamed) for value in VARIANTS if (kind, value) != (Named, "bat")],
)
def test_a_linear_keeps_its_class_attributes_and_methods_of_any_name(kind: Any, init_weights: Any, route: str) -> None:
    model, x = nn.Sequential(kind(12, 8).double()), X.double()
    base, owner = model(x), model[0]
    config = UP | {"target_modules": ["0"], "init_weights": init_weights}
    changed = fill_blocks(mc.adapt(model if route == "module" else mc.capture(model, (x,)), config), std=0.3)
    delta = reference_delta(init_weights, changed.get_parameter("0.miss_block_default"), base_weight(owner))
    assert max_error(changed(x), base + x @ delta.t()) < 1e-12
    for name in ("scope", "graph", "blocks", "rewrite", "base"):
        assert getattr(owner, name) == getattr(type(owner), name) == name
    if route == "captured" or kind is Renamed:  # what is opaque is not merged
        assert max_error(mc.merge(changed)(x), base + x @ delta.t()) < 1e-12


def test_states_seen_before_are_given_the_same_class_again() -> None:
    model = mc.adapt(TwoLinears(), UP)
    assert type(model.down) is nn.Linear
    assert set(vars(model.down)) == set(vars(nn.Linear(8, 20)))
    on = type(model.up)
    with mc.disable_adapter(model):
        off = type(model.up)
        assert off.__bases__ == (nn.Linear,)
        assert off.forward is nn.Linear.forward
        assert getattr(off, REWRITE) is None
    assert type(model.up) is on
    assert on.forward is not nn.Linear.forward
    assert getattr(on, REWRITE).base is owner_scope(model.up)
    assert getattr(on, REWRITE).blocks[0].adapter == "default"
    with mc.disable_adapter(model):
        assert type(model.up) is off
    mc.merge(model, keep_adapters=True)
    assert type(model.up) is off
    mc.unmerge(model)
    assert type(model.up) is on
    mc.unload(model)
    assert type(model.up) is nn.Linear


# The code


def test_the_source_is_what_inspect_shows() -> None:
    model = adapted(TwoLinears())
    source = inspect.getsource(type(model.up).forward)
    assert "def forward(self, input : torch.Tensor) -> torch.Tensor:" in source
    assert "miss_block_default = self.miss_block_default" in source
    assert source.strip() in mc.dump(model, "code")
    assert list(inspect.signature(model.up.forward).parameters) == ["input"]
    assert torch.equal(model.up(input=X), model.up(X))
    linecache.checkcache()
    assert inspect.getsource(type(model.up).forward) == source
    assert type(model.up).forward.__code__.co_filename != type(model.down).forward.__code__.co_filename


def test_a_traceback_shows_the_generated_line() -> None:
    with pytest.raises(RuntimeError) as error:
        adapted(TwoLinears()).up(torch.ones(3, 11))
    text = "".join(traceback.format_exception(error.value))
    assert re.search('File "<misscompile Linear .*\n *linear = torch._C._nn.linear\\(input_1, weight, None\\);', text)


def test_code_of_a_plain_trace_is_the_base_s_and_drops_what_only_fx_reads() -> None:
    owner = nn.Linear(12, 8)
    graph = owner_scope(owner).graph
    before = str(graph)
    assert torch.equal(_compile_forward(graph, "Linear")(owner, X), owner(X))
    assert str(graph) == before
    graph = fx.Graph()
    node = graph.call_function(F.relu, (graph.placeholder("x"),))
    node.meta["is_wrapped"] = True
    graph.output(node)
    assert "_symbolic_trace.wrap" in graph.python_code("self").src
    assert _readable_code(graph).startswith("def forward(self, x):")


# What it shows, and copies


def test_extra_repr() -> None:
    model = adapted(TwoLinears())
    base = "in_features=12, out_features=8, bias=False"
    assert model.up.extra_repr() == f"{base}, miss=[default: balance r=4]"
    mc.adapt(model, UP | {"r": 2, "init_weights": "bat"}, "b")
    both = f"{base}, miss=[default: balance r=4, b: bat r=2]"
    assert model.up.extra_repr() == both
    with mc.disable_adapter(model):
        assert repr(model.up) == f"Linear({both} (disabled))"
    mc.merge(model, keep_adapters=True)
    assert repr(model.up) == f"Linear({both} (merged))"
    mc.unload(model)
    assert repr(model.up) == f"Linear({base})"
    quiet = type("Quiet", (nn.Linear,), {"extra_repr": lambda self: ""})
    assert repr(adapted(nn.Sequential(quiet(12, 8)))[0]) == "Quiet(miss=[default: balance r=4])"


def test_one_owner_copied_alone_is_adapted_too_and_nothing_keeps_it_alive() -> None:
    model = adapted(TwoLinears())
    y, gone = model.up(X), weakref.ref(model.up)
    for copied in (copy.deepcopy(model.up), pickle.loads(pickle.dumps(model.up))):
        assert type(copied) is type(model.up)
        assert torch.equal(copied(X), y)
    del model
    gc.collect()
    assert gone() is None


# Forwards that others put on the instance


def hooked(owner: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(owner, ModelHook())


@pytest.mark.parametrize("when", ["before", "after"])
def test_old_forward_of_an_accelerate_hook_is_bound_to_the_current_class(when: str) -> None:
    model = TwoLinears()
    if when == "before":
        hooked(model.up)
    adapted(model)
    if when == "after":
        hooked(model.up)

    def current(owner: nn.Module) -> bool:
        held = vars(owner)["_old_forward"]
        return held.__self__ is owner and held.__func__ is type(owner).forward

    assert current(model.up)
    assert find_foreign_forward(model.up) is None
    hook = vars(model.up)["forward"]
    with mc.disable_adapter(model):
        assert current(model.up)
        assert vars(model.up)["_old_forward"].__func__ is nn.Linear.forward
    assert current(model.up)
    assert current(copy.deepcopy(model).up)
    mc.unload(model)
    assert current(model.up)
    assert type(model.up) is nn.Linear
    assert vars(model.up)["forward"] is hook


@pytest.mark.parametrize("slot", ["forward", "_old_forward"])
def test_a_foreign_forward_becomes_the_base_and_comes_back(slot: str) -> None:
    """By itself, or below a hook of accelerate."""
    model = TwoLinears()
    foreign = lambda x: F.linear(x, model.up.weight) * 2  # noqa: E731
    model.up.forward = foreign
    if slot == "_old_forward":
        hooked(model.up)
    assert find_foreign_forward(model.up) is foreign
    base = model(X)
    mc.adapt(model, UP | {"target_modules": "all-linear"})
    assert torch.equal(model(X), base)
    fill_blocks(model)
    delta = reference_delta(True, model.up.miss_block_default, model.up.weight)
    assert max_error(model.up(X), foreign(X).double() + X.double() @ delta.t()) < 1e-5
    assert max_error(model(X), base) > 1e-3
    assert find_foreign_forward(model.up) is None
    with mc.disable_adapter(model):
        assert vars(model.up)[slot] is foreign
        assert not hasattr(model.up, "miss_base_forward")
        assert torch.equal(model(X), base)
    assert model.up.miss_base_forward is foreign
    mc.unload(model)
    assert vars(model.up)[slot] is foreign
    assert torch.equal(model(X), base)


def test_set_class_leaves_a_forward_alone_that_is_not_ours() -> None:
    owner = nn.Linear(12, 8)
    other = types.MethodType(lambda self, x: x, owner)
    owner.forward = other  # type: ignore[method-assign]
    _set_class(owner, _make_class(nn.Linear, None, (), ()), None, inserted=False)
    assert vars(owner)["forward"] is other
    assert REWRITE in vars(type(owner))


# Dtypes


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 8
        self.register_buffer("weight", torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def parametrized() -> nn.Module:
    owner = nn.Linear(12, 8, bias=False)
    parametrize.register_parametrization(owner, "weight", nn.Identity())
    return owner


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda model: model[0].to(torch.bfloat16),
    "half": lambda model: model.half(),
    "parent": lambda model: nn.Sequential(model).to(torch.bfloat16),
    "assign": lambda model: model.load_state_dict(
        {name: value if "miss" in name else value.bfloat16() for name, value in model.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 8, bias=False), Buffer, parametrized])
def test_bat_is_exact_on_a_weight_that_becomes_16_bit(make: Callable[[], nn.Module], change: str) -> None:
    """One product with the rounded `W + ΔW` would give zero: the update is below half a unit in the last place of 1."""
    model = nn.Sequential(make())
    with torch.no_grad():
        next(iter([*model.parameters(), *model.buffers()])).fill_(1)
    fill_blocks(mc.adapt(model, {"r": 4, "init_weights": "bat", "target_modules": "0"}), std=1e-5)
    kind = type(model[0])
    CHANGES[change](model)
    assert type(model[0]) is kind
    weight, x = model[0].weight.detach(), torch.tensor([1.0, -1.0] * 6)
    assert weight.dtype.itemsize == 2
    expected = x.double() @ reference_delta("bat", model[0].miss_block_default, weight).t()
    assert max_error(model(x.to(weight.dtype)), expected) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_changed_dtype_changes_nothing_else(init_weights: Any) -> None:
    model = adapted(TwoLinears(), init_weights)
    y, block, kind = model(X), model.up.miss_block_default, type(model.up)
    model.double()
    assert model.up.miss_block_default is block
    assert max_error(model(X.double()), y) < 1e-5
    with mc.disable_adapter(model):
        model.float()
    assert max_error(model(X), y) < 1e-6
    assert type(model.up) is kind


# Classes that others changed


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "unload": mc.unload,
    "set_adapter": lambda model: mc.set_adapter(model, "default"),
    "adapt": lambda model: mc.adapt(model, mc.MissConfig(r=2, target_modules=["down", "up"]), "b"),
    "delete_adapter": lambda model: mc.delete_adapter(model, "default"),
    "disable_adapter": lambda model: mc.disable_adapter(model).__enter__(),
    "merge": mc.merge,
    "merge and keep": lambda model: mc.merge(model, keep_adapters=True),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("which", ["up", "down"])
def test_an_owner_that_somebody_gave_another_class_is_refused_and_nothing_is_changed(which: str, verb: str) -> None:
    model = adapted(TwoLinears())
    before, owner = snapshot(model, X), model.get_submodule(which)
    ours = type(owner)
    owner.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(mc.StateError, match=rf"{which}: its class became Sharded after it was adapted; undo that first"):
        VERBS[verb](model)
    owner.__class__ = ours
    assert snapshot(model, X) == before
    mc.unload(model)
    assert type(owner) is nn.Linear


def test_a_parametrization_put_on_an_adapted_owner_works_and_is_named_when_in_the_way() -> None:
    model = adapted(TwoLinears())
    y = model(X)
    parametrize.register_parametrization(model.up, "weight", nn.Identity())
    assert torch.equal(model(X), y)
    for verb in (mc.unload, mc.merge):
        with pytest.raises(mc.StateError, match="up: its class became ParametrizedLinear after it was adapted"):
            verb(model)
    parametrize.remove_parametrizations(model.up, "weight")
    check_class(model.up, "up")
    ours, model.up.__class__ = type(model.up), nn.Linear
    check_class(model.up, "up")  # the base's own is as good
    model.up.__class__ = ours
    mc.unload(model)
    assert type(model.up) is nn.Linear

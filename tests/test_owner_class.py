"""Installing: one class for equal owners, visible code, and copies, hooks, checkpoints and dtypes that it must live with."""

from __future__ import annotations

import copy
import gc
import inspect
import linecache
import pickle
import traceback
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from support import VARIANTS, adapted, fill_blocks, max_error
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears

import misscompile as mc
from misscompile.bat import bat_linear
from misscompile.passes.install import (
    AdaptedOwner,
    check_class,
    find_foreign_forward,
    generate_forward,
    make_class,
    readable_code,
    set_class,
)
from misscompile.passes.trace import trace_forward
from misscompile.plan import Scope

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


# --- the class ------------------------------------------------------------------------------------------------------


def test_generated_forwards_share_their_globals_unless_names_collide() -> None:
    first, second = adapted(nn.Sequential(nn.Linear(8, 4)))[0], adapted(nn.Sequential(nn.Linear(8, 12)))[0]
    names = type(first).forward.__globals__
    assert type(second).forward.__globals__ is names
    assert "forward" not in names

    def other(x: Tensor) -> Tensor:
        return x

    scope = Scope(nn.Linear, 8, 4, torch.float32)
    scope.graph = fx.Graph()
    scope.graph.output(scope.graph.call_function(other, (scope.graph.placeholder("x"),)))
    generate_forward(scope)
    (name,) = set(scope.forward.__globals__) & {key for key, value in scope.forward.__globals__.items() if value is other}
    assert scope.forward.__globals__ is names

    def another(x: Tensor) -> Tensor:
        return x + 1

    another.__qualname__, another.__name__ = other.__qualname__, other.__name__
    scope.graph = fx.Graph()
    scope.graph.output(scope.graph.call_function(another, (scope.graph.placeholder("x"),)))
    generate_forward(scope)
    assert scope.forward.__globals__ is not names
    assert scope.forward.__globals__[name] is another
    assert names[name] is other


def test_owners_of_equal_structure_share_a_class_within_and_across_models() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8, bias=False), nn.Linear(8, 12), nn.Linear(12, 8)
        )

    first, second = adapted(build()), adapted(build())
    kinds = [type(owner) for owner in first]
    assert kinds[0] is kinds[1] is kinds[4]
    assert len(set(kinds)) == 3
    assert [type(owner) for owner in second] == kinds
    other = adapted(build(), r=3)
    assert not set(kinds) & {type(owner) for owner in other}


@pytest.mark.parametrize(
    "fields", [{"r": 2}, {"init_weights": "mini"}, {"init_weights": "bat"}, {"miss_dropout": 0.1}, {"adapter": "b"}]
)
def test_what_the_code_depends_on_makes_another_class(fields: dict[str, Any]) -> None:
    def kind(adapter: str = "default", **fields: Any) -> type[nn.Module]:
        model = TwoLinears()
        mc.adapt(model, mc.MissConfig(**({"r": 4, "mini_r": 2, "target_modules": ["up"]} | fields)), adapter)
        return type(model.up)

    assert kind() is kind()
    assert kind(**fields) is kind(**fields)
    assert kind(**fields) is not kind()


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 8), lambda: Conv1D(8, 12)])
def test_name_module_and_bases_are_those_of_the_base_class(make: Callable[[], nn.Module]) -> None:
    owner = make()
    base = type(owner)
    adapted(nn.Sequential(owner))
    kind = type(owner)
    assert kind is not base
    assert isinstance(owner, base)
    assert isinstance(owner, AdaptedOwner)
    assert kind.__mro__[1:3] == (AdaptedOwner, base)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (base.__name__, base.__qualname__, base.__module__)
    assert "forward" not in vars(owner)


def test_without_a_block_the_class_runs_the_base_s_own_forward() -> None:
    model = adapted(TwoLinears())
    with mc.disable_adapter(model):
        kind = type(model.up)
        assert issubclass(kind, AdaptedOwner)
        assert kind.forward is nn.Linear.forward
    assert kind.forward is not type(model.up).forward
    scope = Scope(nn.Linear, 12, 8, torch.float32)
    assert make_class(scope.base_class, scope, ()).forward is nn.Linear.forward
    assert make_class(scope.base_class, scope, ()).scope is scope


def test_states_seen_before_are_given_the_same_class_again() -> None:
    model = adapted(TwoLinears())
    on = type(model.up)
    with mc.disable_adapter(model):
        off = type(model.up)
    assert type(model.up) is on
    with mc.disable_adapter(model):
        assert type(model.up) is off
    mc.merge(model, keep_adapters=True)
    assert type(model.up) is off
    mc.unmerge(model)
    assert type(model.up) is on
    mc.unload(model)
    assert type(model.up) is nn.Linear


def test_nothing_to_do() -> None:
    model = TwoLinears()
    mc.adapt(model, mc.MissConfig(r=4, target_modules=["up"]))
    assert type(model.down) is nn.Linear
    assert set(vars(model.down)) == set(vars(nn.Linear(8, 20)))


def test_the_record_does_not_keep_a_model_alive() -> None:
    model = adapted(TwoLinears())
    model(X)
    gone = weakref.ref(model.up)
    del model
    gc.collect()
    assert gone() is None


# --- the code -------------------------------------------------------------------------------------------------------


def test_the_source_is_what_inspect_shows() -> None:
    model = adapted(TwoLinears())
    source = inspect.getsource(type(model.up).forward)
    assert "def forward(self, input : torch.Tensor) -> torch.Tensor:" in source
    assert "miss_block_default = self.miss_block_default" in source
    assert readable_code(source) == type(model.up).scope.code
    assert list(inspect.signature(model.up.forward).parameters) == ["input"]
    linecache.checkcache()
    assert inspect.getsource(type(model.up).forward) == source


def test_a_traceback_shows_the_generated_line() -> None:
    model = adapted(TwoLinears())
    try:
        model.up(torch.ones(3, 11))
    except RuntimeError:
        text = traceback.format_exc()
    assert 'File "<misscompile Linear ' in text
    assert "unflatten = torch.unflatten(input_1, -1, (3, 4))" in text


def test_each_generated_forward_is_a_file_of_its_own() -> None:
    model = adapted(TwoLinears())
    assert type(model.up).forward.__code__.co_filename != type(model.down).forward.__code__.co_filename


def test_generated_code_of_a_plain_trace_is_the_base_s() -> None:
    owner = nn.Linear(12, 8)
    scope = Scope(nn.Linear, 12, 8, torch.float32)
    trace_forward(scope, owner, None)
    before = str(scope.graph)
    generate_forward(scope)
    assert str(scope.graph) == before
    assert scope.forward is not None
    assert torch.equal(scope.forward(owner, X), owner(X))
    assert scope.code.startswith("def forward(self, input")


def test_readable_code_drops_what_only_fx_reads() -> None:
    source = "torch.fx._symbolic_trace.wrap('a_b')\n\ndef forward(self, x):\n    return x\n    "
    assert readable_code(source) == "def forward(self, x):\n    return x"


def test_keyword_calls_still_work() -> None:
    model = adapted(TwoLinears())
    assert torch.equal(model.up(input=X), model.up(X))


# --- repr -----------------------------------------------------------------------------------------------------------


def test_extra_repr() -> None:
    model = adapted(TwoLinears())
    base = "in_features=12, out_features=8, bias=False"
    assert model.up.extra_repr() == f"{base}, miss=[default: balance r=4]"
    mc.adapt(model, mc.MissConfig(r=2, init_weights="bat", target_modules=["up"]), "b")
    both = f"{base}, miss=[default: balance r=4, b: bat r=2]"
    assert model.up.extra_repr() == both
    with mc.disable_adapter(model):
        assert repr(model.up) == f"Linear({both} (disabled))"
    mc.merge(model, keep_adapters=True)
    assert repr(model.up) == f"Linear({both} (merged))"
    mc.unload(model)
    assert repr(model.up) == f"Linear({base})"


class _Quiet(nn.Linear):
    def extra_repr(self) -> str:
        return ""


def test_extra_repr_of_a_class_that_has_none() -> None:
    assert repr(adapted(nn.Sequential(_Quiet(12, 8)))[0]) == "_Quiet(miss=[default: balance r=4])"


def test_one_owner_copied_alone_is_adapted_too() -> None:
    model = adapted(TwoLinears())
    for copied in (copy.deepcopy(model.up), pickle.loads(pickle.dumps(model.up))):
        assert type(copied) is type(model.up)
        assert torch.equal(copied(X), model.up(X))


# --- forwards that others put on the instance -----------------------------------------------------------------------


def _hooked(owner: nn.Module) -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(owner, ModelHook())
    return owner


@pytest.mark.parametrize("when", ["before", "after"])
def test_old_forward_of_an_accelerate_hook_is_bound_to_the_current_class(when: str) -> None:
    model = TwoLinears()
    if when == "before":
        _hooked(model.up)
    adapted(model)
    if when == "after":
        _hooked(model.up)

    def current() -> bool:
        held = vars(model.up)["_old_forward"]
        return held.__self__ is model.up and held.__func__ is type(model.up).forward

    assert current()
    assert find_foreign_forward(model.up) is None
    hook = vars(model.up)["forward"]
    with mc.disable_adapter(model):
        assert current()
        assert vars(model.up)["_old_forward"].__func__ is nn.Linear.forward
    assert current()
    other = copy.deepcopy(model)
    assert vars(other.up)["_old_forward"].__self__ is other.up
    mc.unload(model)
    assert current()
    assert type(model.up) is nn.Linear
    assert vars(model.up)["forward"] is hook


def test_a_foreign_forward_becomes_the_base_and_comes_back() -> None:
    model = TwoLinears()
    model.up.forward = lambda x: F.linear(x, model.up.weight) * 2
    foreign, base = model.up.forward, model(X)
    mc.adapt(model, mc.MissConfig(r=4, target_modules="all-linear"))
    assert torch.equal(model(X), base)
    fill_blocks(model)
    assert max_error(model(X), base) > 1e-3
    assert find_foreign_forward(model.up) is None
    with mc.disable_adapter(model):
        assert model.up.forward is foreign
        assert not hasattr(model.up, "base_forward")
        assert torch.equal(model(X), base)
    assert model.up.base_forward is foreign
    mc.unload(model)
    assert model.up.forward is foreign
    assert torch.equal(model(X), base)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_foreign_forward_below_an_accelerate_hook(hooked: bool) -> None:
    model = TwoLinears()
    foreign = lambda x: F.linear(x, model.up.weight) * 2  # noqa: E731
    model.up.forward = foreign
    if hooked:
        _hooked(model.up)
    slot = "_old_forward" if hooked else "forward"
    assert find_foreign_forward(model.up) is foreign
    base = model(X)
    adapted(model)
    assert max_error(model(X), base) > 1e-3
    mc.unload(model)
    assert vars(model.up)[slot] is foreign
    assert torch.equal(model(X), base)


def test_set_class_leaves_a_forward_alone_that_is_not_ours() -> None:
    owner = nn.Linear(12, 8)
    scope = Scope(nn.Linear, 12, 8, torch.float32)
    other = types.MethodType(lambda self, x: x, owner)
    owner.forward = other  # type: ignore[method-assign]
    set_class(owner, make_class(scope.base_class, scope, ()), None, inserted=False)
    assert vars(owner)["forward"] is other
    assert isinstance(owner, AdaptedOwner)


# --- dtypes ---------------------------------------------------------------------------------------------------------


def products(owner: nn.Module) -> int:
    (call,) = (node for node in type(owner).scope.graph.nodes if node.target is bat_linear)
    two_products: bool = call.args[4]
    return 2 if two_products else 1


@pytest.mark.parametrize("change", ["to", "half", "parent", "assign"])
def test_the_form_of_bat_follows_the_dtype_of_the_weight(change: str) -> None:
    model = adapted(TwoLinears(), "bat")
    wide = type(model.up)
    assert products(model.up) == 1
    if change == "to":
        model.up.to(torch.bfloat16)
    elif change == "half":
        model.half()
    elif change == "parent":
        nn.Sequential(model).to(torch.bfloat16)
    else:
        model.load_state_dict({k: v.bfloat16() for k, v in TwoLinears().state_dict().items()}, assign=True)
    assert model.up.weight.dtype.itemsize == 2
    assert products(model.up) == 2
    assert type(model.up).scope.weight_dtype == model.up.weight.dtype
    model.float()
    assert type(model.up) is wide


@pytest.mark.parametrize("init_weights", VARIANTS)
def test_a_changed_dtype_changes_nothing_else(init_weights: Any) -> None:
    model = adapted(TwoLinears(), init_weights)
    y, block = model(X), model.up.miss_block_default
    model.double()
    assert model.up.miss_block_default is block
    assert max_error(model(X.double()), y) < 1e-5
    with mc.disable_adapter(model):
        model.float()
    assert max_error(model(X), y) < 1e-6


class _Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 12, 8
        self.register_buffer("weight", torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def _parametrized() -> nn.Module:
    owner = nn.Linear(12, 8)
    parametrize.register_parametrization(owner, "weight", nn.Identity())
    return owner


@pytest.mark.parametrize("make", [_Buffer, _parametrized])
def test_a_16_bit_weight_that_is_no_plain_parameter_takes_the_exact_form_too(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make().bfloat16())
    mc.adapt(model, mc.MissConfig(r=4, init_weights="bat", target_modules="0"))
    assert products(model[0]) == 2
    model.float()
    assert products(model[0]) == 1
    model.half()
    assert products(model[0]) == 2


# --- classes that others changed ------------------------------------------------------------------------------------


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
    y, before = model(X), {name: value.clone() for name, value in model.state_dict().items()}
    owner = model.get_submodule(which)
    ours = type(owner)
    theirs = type("Sharded", (ours,), {})
    owner.__class__ = theirs
    assert torch.equal(model(X), y)
    text = rf"{which}: its class became Sharded after it was adapted; undo that first"
    with pytest.raises(mc.StateError, match=text):
        VERBS[verb](model)
    owner.__class__ = ours
    assert torch.equal(model(X), y)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert mc.active_adapters(model) == ("default",)
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
    mc.unload(model)
    assert type(model.up) is nn.Linear


def test_check_class_accepts_our_classes_and_the_base() -> None:
    model = adapted(TwoLinears())
    check_class(model.up, "up")
    model.up.__class__ = nn.Linear
    check_class(model.up, "up")

"""Every verb on every route: what is adapted may be a module, a captured graph, an exported program or a traced graph.

The reference is always a plain copy of the model with `W + ΔW` from the formulas written over its weights, in fp64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import (
    VARIANTS,
    blocks_of,
    fields,
    fill_blocks,
    gradients,
    graph_list,
    matrix_of,
    max_error,
    picture,
    reference_delta,
    reference_gradient,
    same,
    shake,
    snapshot,
    state,
    with_deltas,
)
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.graph_module import _loader
from transformers.pytorch_utils import Conv1D
from zoo import TwoLinears, normal, tiny_llama, token_batch

import misscompile as mc

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
X = normal(3, 12, dtype=torch.float64)
LINEARS = ("up", "down")
EXACT = 1e-12


class Transposed(TwoLinears):
    """`TwoLinears` in the layout of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(8, 12), Conv1D(20, 8)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)


def loaded_program(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,)), buffer)
    return torch.export.load(buffer)


ROUTES: dict[str, tuple[type[nn.Module], Callable[[nn.Module], Any]]] = {
    "module": (TwoLinears, copy.deepcopy),
    "module in_out": (Transposed, copy.deepcopy),
    "captured": (TwoLinears, lambda model: mc.capture(model, (X,))),
    "captured in_out": (Transposed, lambda model: mc.capture(model, (X,))),
    "exported": (TwoLinears, lambda model: torch.export.export(model, (X,), strict=False)),
    "exported strictly": (TwoLinears, lambda model: torch.export.export(model, (X,), strict=True)),
    "loaded program": (TwoLinears, loaded_program),
    "traced": (TwoLinears, fx.symbolic_trace),
    "traced in_out": (Transposed, fx.symbolic_trace),
}
"""Name to the kind of model, and to what is made of it and given to `adapt`."""
ONE_OF_A_KIND = ("module", "module in_out", "captured", "exported", "traced", "traced in_out")
every_route = pytest.mark.parametrize("subject", ROUTES, indirect=True)
"""For what the others could do in another way than those of `ONE_OF_A_KIND`."""
PICKLED = [(route, how) for route in ONE_OF_A_KIND for how in ("pickle", "save")]
copies = pytest.mark.parametrize(
    ("subject", "how"), [*((route, "deepcopy") for route in ONE_OF_A_KIND), *PICKLED], indirect=["subject"]
)


@functools.cache
def base_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


@functools.cache
def graph_of(route: str) -> Any:
    kind, make = ROUTES[route]
    return make(base_of(kind))


class Subject:
    """One route: the plain model, what is given to `adapt`, and what the plain one looks like."""

    def __init__(self, route: str) -> None:
        self.is_module = route.startswith("module")
        self.in_out = route.endswith("in_out")
        self.base = base_of(ROUTES[route][0])
        self.given: Any = copy.deepcopy(self.base) if self.is_module else graph_of(route)
        self.plain: Any = self.given.module() if isinstance(self.given, torch.export.ExportedProgram) else self.given
        self.look = look(self.plain)

    def adapted(self, *variants: Any, **changes: Any) -> Any:
        """One adapter of each variant, named by number, of non-zero values; the last one is active."""
        model = self.given
        for number, variant in enumerate(variants):
            model = mc.adapt(model, fields(variant, **changes), f"a{number}")
        return fill_blocks(model, std=0.2)

    def reference(self, model: nn.Module, *active: tuple[int, Any]) -> Tensor:
        y: Tensor = with_deltas(self.base, model, **{f"a{number}": variant for number, variant in active})(X)
        return y


def look(model: nn.Module) -> Any:
    """What tells an adapted model from a plain one: classes and attributes, names, and the nodes of a graph."""
    if isinstance(model, fx.GraphModule):
        names = [name for name, _ in model.named_modules() if name], [name for name, _ in model.named_parameters()]
        return graph_list(model), names
    modules = [(name, type(module), list(vars(module))) for name, module in model.named_modules()]
    return modules, [name for name, _ in model.named_parameters()]


@pytest.fixture(params=ONE_OF_A_KIND)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A route; a graph or program that was given is the same at the end of every test."""
    found = Subject(request.param)
    before = snapshot(found.plain) if not found.is_module else None
    values = state(found.base)
    yield found
    assert same(state(found.base), values)
    if before is not None:
        assert snapshot(found.plain) == before


every_variant = pytest.mark.parametrize("variant", VARIANTS)


# Adding and choosing


@every_route
@every_variant
def test_adapt(subject: Subject, variant: Any) -> None:
    model = mc.adapt(subject.given, fields(variant))
    assert (model is subject.given) is subject.is_module
    assert isinstance(model, type(subject.base) if subject.is_module else fx.GraphModule)
    assert torch.equal(model(X), subject.base(X))
    assert {name for name, _ in mc.trainable_parameters(model)} == {f"{name}.miss_block_default" for name in LINEARS}

    fill_blocks(model, std=0.3)
    expected, blocks = with_deltas(subject.base, model, default=variant), blocks_of(model)
    assert max_error(expected(X), subject.base(X)) > 1e-2
    assert max_error(model(X), expected(X)) < EXACT
    found, wanted = gradients(model, X), gradients(expected, X)
    assert set(found) == set(blocks)
    for name in LINEARS:
        upstream = wanted[f"{name}.weight"].t() if subject.in_out else wanted[f"{name}.weight"]
        weight = matrix_of(subject.base.get_submodule(name))
        reference = reference_gradient(variant, blocks[f"{name}.miss_block_default"], weight, upstream)
        assert max_error(found[f"{name}.miss_block_default"], reference) < 1e-11 * max(1.0, float(reference.abs().max()))


def test_set_adapter(subject: Subject) -> None:
    """Any set in any order is the sum of the updates of the base weight."""
    model = subject.adapted(*VARIANTS)
    assert mc.active_adapters(model) == ("a2",)
    assert list(mc.adapters(model)) == ["a0", "a1", "a2"]
    assert mc.adapters(model)["a1"].init_weights == "mini"
    for count in (1, 2, 3):
        for chosen in itertools.permutations(enumerate(VARIANTS), count):
            names = tuple(f"a{number}" for number, _ in chosen)
            mc.set_adapter(model, names[0] if count == 1 else list(names))
            assert mc.active_adapters(model) == names
            assert max_error(model(X), subject.reference(model, *chosen)) < EXACT
            trained = {name for name, _ in mc.trainable_parameters(model)}
            assert trained == {f"{linear}.miss_block_{name}" for linear in LINEARS for name in names}
    mc.set_adapter(model, [])
    assert torch.equal(model(X), subject.base(X))
    assert mc.trainable_parameters(model) == []


def test_adapt_again(subject: Subject) -> None:
    """A second adapter leaves the first one's values alone; a graph gives a new graph over the same base values."""
    first = subject.adapted(True)
    before, code = state(first), mc.dump(first, "code")
    second = mc.adapt(first, fields("mini", target_modules=["down"]), "other")
    assert (second is first) is subject.is_module
    assert set(blocks_of(second)) == {"up.miss_block_a0", "down.miss_block_a0", "down.miss_block_other"}
    if not subject.is_module:
        assert (mc.dump(first, "code"), mc.active_adapters(first)) == (code, ("a0",))
        assert len({graph.get_parameter("up.weight").data_ptr() for graph in (first, second, subject.plain)}) == 1
        fill_blocks(second, seed=5)
    assert same({name: value for name, value in state(first).items() if name in before}, before)
    mc.set_adapter(second, ["a0", "other"])
    expected = with_deltas(subject.base, second, a0=True, other="mini")
    assert max_error(second(X), expected(X)) < EXACT
    with pytest.raises(mc.StateError, match=r"adapter_name='other' is in use \(down\).*delete_adapter\(model, 'other'\)"):
        mc.adapt(second, fields(target_modules=["down"]), "other")


def test_disable_adapter(subject: Subject, tmp_path: Path) -> None:
    model = subject.adapted(True)
    mc.save_adapter(model, tmp_path, "a0")
    active, code = model(X), mc.dump(model, "code")
    with mc.disable_adapter(model):
        assert torch.equal(model(X), subject.base(X))
        with mc.disable_adapter(model):
            assert torch.equal(model(X), subject.base(X))
        assert torch.equal(model(X), subject.base(X))
        for verb in (mc.merge, lambda model: mc.set_adapter(model, "a0"), lambda model: mc.adapt(model, fields(), "new")):
            with pytest.raises(mc.StateError, match="disable_adapter"):
                verb(model)
        with pytest.raises(mc.StateError, match=r"adapt(er)? was called inside"):
            mc.load_adapter(model, tmp_path, "new")
    assert torch.equal(model(X), active)
    assert mc.dump(model, "code") == code
    with pytest.raises(ValueError, match="mine"), mc.disable_adapter(model):
        raise ValueError("mine")
    assert torch.equal(model(X), active)


def test_delete_adapter_and_unload(subject: Subject) -> None:
    model = subject.adapted(True, "mini", "bat")
    mc.delete_adapter(model, "a0")
    assert set(blocks_of(model)) == {f"{linear}.miss_block_{name}" for linear in LINEARS for name in ("a1", "a2")}
    assert max_error(model(X), subject.reference(model, (2, "bat"))) < EXACT
    with pytest.raises(mc.UnknownAdapterError):
        mc.set_adapter(model, "a0")
    with pytest.warns(mc.MissWarning, match=r"no adapter is active now; set_adapter can activate \['a1'\]"):
        mc.delete_adapter(model, "a2")
    assert torch.equal(model(X), subject.base(X))
    assert mc.unload(model) is model
    assert look(model) == subject.look
    assert torch.equal(model(X), subject.base(X))
    with pytest.raises(mc.StateError, match="no adapter"):
        mc.unload(model)


def test_deleting_the_last_adapter_leaves_the_plain_model(subject: Subject) -> None:
    model = subject.adapted(True)
    mc.delete_adapter(model, "a0")
    assert look(model) == subject.look


@pytest.mark.parametrize("verb", ["delete", "merge"])
def test_adapters_on_different_modules_leave_each_other_alone(subject: Subject, verb: str) -> None:
    """A module whose last adapter goes is plain again, while the other adapter acts and trains elsewhere."""
    model = mc.adapt(subject.given, fields(target_modules=["up"]), "first")
    model = fill_blocks(mc.adapt(model, fields("mini", target_modules=["down"]), "second"), std=0.2)
    assert max_error(model(X), with_deltas(subject.base, model, second="mini")(X)) < EXACT
    mc.set_adapter(model, ["first", "second"])
    both = with_deltas(subject.base, model, first=True, second="mini")(X)
    assert max_error(model(X), both) < EXACT
    assert [name for name, _ in mc.trainable_parameters(model)] == ["up.miss_block_first", "down.miss_block_second"]
    if verb == "delete":
        mc.delete_adapter(model, "first")
        both = with_deltas(subject.base, model, second="mini")(X)
    else:
        mc.merge(model, ["first"])
    assert max_error(model(X), both) < EXACT
    assert mc.active_adapters(model) == ("second",)
    assert set(gradients(model, X)) == {"down.miss_block_second"}
    if subject.is_module:
        assert type(model.up) is type(subject.base.up)


# Merging


@every_route
@every_variant
def test_merge(subject: Subject, variant: Any) -> None:
    model = subject.adapted(variant)
    expected, parameters = with_deltas(subject.base, model, a0=variant), dict(model.named_parameters())
    assert mc.merge(model) is model
    assert max_error(model(X), expected(X)) < EXACT
    assert look(model) == subject.look
    for name, value in model.named_parameters():
        assert max_error(value, expected.get_parameter(name)) < 1e-14
        if subject.is_module:
            assert value is parameters[name]
    assert torch.equal(model.get_parameter("down.bias"), subject.base.get_parameter("down.bias"))
    again = mc.adapt(model, fields(variant), "again")
    assert max_error(again(X), expected(X)) < EXACT


@every_variant
@pytest.mark.parametrize("keep", [False, True])
def test_merge_of_some(subject: Subject, keep: bool, variant: Any) -> None:
    """The others stay where they are, and a second merge leaves the plain model."""
    model = subject.adapted(variant, True)
    mc.set_adapter(model, ["a0", "a1"])
    expected, before = model(X), state(model)
    mc.merge(model, ["a0"], keep_adapters=keep)
    assert max_error(model(X), expected) < EXACT
    assert list(mc.adapters(model)) == (["a0", "a1"] if keep else ["a1"])
    kept = {name: value for name, value in state(model).items() if name.endswith("a1")}
    assert same(kept, {name: before[name] for name in kept})
    assert len(kept) == 2
    if keep:
        mc.unmerge(model)
        assert same(state(model), before)
        assert torch.equal(model(X), expected)
    mc.merge(model)
    assert max_error(model(X), expected) < EXACT
    assert look(model) == subject.look


def test_merge_refuses_while_bat_stays_active_and_tells_what_it_drops(subject: Subject) -> None:
    model = subject.adapted(True, "bat")
    mc.set_adapter(model, ["a0", "a1"])
    before, y = snapshot(model), model(X)
    text = r"(up|down): the 'bat' adapter 'a1' that would stay active is a function of the base"
    with pytest.raises(mc.MergeError, match=text):
        mc.merge(model, ["a0"])
    assert snapshot(model) == before
    assert torch.equal(model(X), y)
    mc.set_adapter(model, "a0")
    with pytest.warns(mc.MissWarning, match=r"removed the inactive adapters \['a1'\] without folding them"):
        mc.merge(model)
    assert look(model) == subject.look


@pytest.mark.filterwarnings("error::misscompile.MissWarning")
@every_variant
def test_unmerge(subject: Subject, variant: Any) -> None:
    """Every bit comes back, and the blocks were never touched."""
    model = subject.adapted(variant)
    active, before, blocks = model(X), state(model), blocks_of(model)
    mc.merge(model, keep_adapters=True)
    merged, expected = model(X), with_deltas(subject.base, model, a0=variant)
    assert max_error(merged, expected(X)) < EXACT
    assert max_error(model.get_parameter("up.weight"), expected.get_parameter("up.weight")) < 1e-14
    with mc.disable_adapter(model):
        assert torch.equal(model(X), subject.base(X))
    assert torch.equal(model(X), merged)
    for verb in (mc.merge, lambda model: mc.adapt(model, fields(), "new"), lambda model: mc.set_adapter(model, "a0")):
        with pytest.raises(mc.StateError, match=r"call unmerge\(model\)"):
            verb(model)
    assert mc.unmerge(model) is model
    assert torch.equal(model(X), active)
    assert same(state(model), before)
    if subject.is_module:
        assert all(model.get_parameter(name) is block for name, block in blocks.items())
    with pytest.raises(mc.StateError, match="nothing is merged"):
        mc.unmerge(model)


def assign(model: nn.Module, values: dict[str, Tensor], how: str) -> None:
    """Give the model other values for its weights in one of the ways in which users do."""
    if how.startswith("load_state_dict"):
        model.load_state_dict(values, strict=False, assign=how.endswith("assign"))
    for name, value in values.items():
        owner, parameter = model.get_submodule(name.partition(".")[0]), model.get_parameter(name)
        if how == "a new Parameter":
            owner.weight = nn.Parameter(value)
        elif how == ".data =":
            parameter.data = value
        elif how == ".data in place":
            parameter.data.copy_(value)
        elif how == "in place":
            with torch.no_grad():
                parameter.copy_(value)


@pytest.mark.parametrize("same_values", [False, True])
@pytest.mark.parametrize(
    "how",
    ["in place", ".data in place", ".data =", "a new Parameter", "load_state_dict", "load_state_dict with assign"],
)
def test_unmerge_refuses_after_a_change_of_the_values_however_it_was_made(
    subject: Subject, how: str, same_values: bool
) -> None:
    model = subject.adapted(True)
    active = model(X)
    mc.merge(model, keep_adapters=True)
    merged = {"down.weight": model.get_parameter("down.weight").detach().clone()}
    changed = {name: -value.flip(0) for name, value in merged.items()}  # a sum of the values would not see it
    assign(model, merged if same_values else changed, how)
    if same_values:
        assert torch.equal(mc.unmerge(model)(X), active)
        return
    before = picture(model, X)
    with pytest.raises(mc.MergeError, match=r"down(\.weight)?\b.* changed after it was merged"):
        mc.unmerge(model)
    assert picture(model, X) == before
    assign(model, merged, how)
    assert torch.equal(mc.unmerge(model)(X), active)


@every_variant
@pytest.mark.parametrize("disabled", [False, True])
def test_what_a_merge_kept_moves_with_the_model(subject: Subject, variant: Any, disabled: bool) -> None:
    def rounded(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.bfloat16().double() for name, value in values.items()}

    model = subject.adapted(variant, bias="all")
    before = state(shake(model))
    mc.merge(model, keep_adapters=True)
    merged = state(model)
    with mc.disable_adapter(model) if disabled else contextlib.nullcontext():
        model.to(torch.bfloat16)
        model.double()
    assert same(state(model), rounded(merged))
    base = copy.deepcopy(subject.base)
    base.load_state_dict(rounded(state(base)))
    with mc.disable_adapter(model):
        assert torch.equal(model(X), base(X))
    mc.unmerge(model)
    assert same(state(model), rounded(before))


@every_variant
def test_inference_mode_leaves_no_trace(subject: Subject, variant: Any, tmp_path: Path) -> None:
    """A tensor that is made in it can neither be written nor trained outside."""
    with torch.inference_mode():
        model = mc.adapt(subject.given, fields(variant, bias="all"), "a0")
    active = shake(model)(X)
    assert set(gradients(model, X)) == {name for name, _ in mc.trainable_parameters(model)}
    with torch.inference_mode():
        mc.save_adapter(model, tmp_path, "a0")
        mc.merge(model, keep_adapters=True)
    copied = copy.deepcopy(model)
    with mc.disable_adapter(model):
        assert torch.equal(model(X), subject.base(X))
    mc.unmerge(model)
    assert torch.equal(model(X), active)
    with torch.inference_mode():
        mc.unmerge(copied)
        mc.merge(copied)
    assert max_error(copied(X), active) < EXACT
    assert set(gradients(copied.requires_grad_(), X)) == {name for name, _ in copied.named_parameters()}
    again = copy.deepcopy(subject.base) if subject.is_module else subject.given
    with torch.inference_mode():
        loaded = mc.load_adapter(again, tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(loaded(X), active)
    assert set(gradients(loaded, X)) == {name for name, _ in mc.trainable_parameters(loaded)}


@every_variant
def test_merge_refuses_what_was_trained_in_full_and_is_not_finite(subject: Subject, variant: Any) -> None:
    model = subject.adapted(variant, bias="all")
    model.get_parameter("down.miss_copy_a0:bias").data[3] = float("nan")
    before = picture(model, X)
    for keep in (False, True):
        with pytest.raises(mc.MergeError, match=r"down\.bias: what the adapter 'a0' trained in its place is not finite"):
            mc.merge(model, keep_adapters=keep)
    assert picture(model, X) == before


@every_variant
def test_a_block_that_is_not_finite_is_loaded_and_merge_names_it(subject: Subject, variant: Any, tmp_path: Path) -> None:
    model = subject.adapted(variant)
    model.get_parameter("down.miss_block_a0").data.view(-1)[3] = float("nan")
    mc.save_adapter(model, tmp_path, "a0")
    again = copy.deepcopy(subject.base) if subject.is_module else subject.given
    loaded = mc.load_adapter(again, tmp_path, "a0")
    found, wanted = (m.get_parameter("down.miss_block_a0") for m in (loaded, model))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    with pytest.raises(mc.MergeError, match=r"down.*miss_block_a0 holds values that are not finite"):
        mc.merge(loaded)


@every_variant
def test_a_base_that_is_not_finite_is_not_blamed_on_training(subject: Subject, variant: Any) -> None:
    """balance and mini add to it; the update of bat would spread it."""
    model = copied_if_graph(subject, subject.adapted(variant))
    model.get_parameter("down.weight").data[2, 3] = float("inf")
    y = model(X)
    if variant == "bat":
        with pytest.raises(mc.MergeError, match=r"down.*the base weight holds values that are not finite.*spread"):
            mc.merge(model)
        assert torch.equal(model(X).nan_to_num(), y.nan_to_num())
    else:
        merged = mc.merge(model).get_parameter("down.weight")
        assert (~merged.isfinite()).nonzero().tolist() == [[2, 3]]


def test_unload_of_a_merged_model_gives_the_base_back(subject: Subject) -> None:
    model = subject.adapted("mini")
    mc.merge(model, keep_adapters=True)
    mc.unload(model)
    assert torch.equal(model(X), subject.base(X))
    assert look(model) == subject.look


@pytest.mark.parametrize(
    ("bad", "options", "variant"),
    [
        (float("nan"), {}, True),
        (float("inf"), {"keep_adapters": True}, "mini"),
        (1e6, {"adapter_names": ["a0"]}, "bat"),
        (1e6, {"keep_adapters": True}, True),
    ],
)
def test_merge_refuses_values_that_are_not_finite(subject: Subject, variant: Any, options: Any, bad: float) -> None:
    model = subject.adapted(variant).half()
    model.get_parameter("down.miss_block_a0").data.view(-1)[-1] = bad
    before, y = snapshot(model), model(X.half())
    text = r"down(\.weight)?: the merged weight is not finite in torch\.float16 \(adapters \['a0'\]\)"
    with pytest.raises(mc.MergeError, match=text):
        mc.merge(model, **options)
    assert snapshot(model) == before
    assert torch.equal(model(X.half()).nan_to_num(), y.nan_to_num())
    with pytest.raises(mc.StateError, match="nothing is merged"):
        mc.unmerge(model)


# Copies


def round_trip(model: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@copies
@every_variant
def test_a_copy_is_a_model_of_its_own(subject: Subject, variant: Any, how: str) -> None:
    model = subject.adapted(True, variant)
    mc.set_adapter(model, ["a1", "a0"])
    active = model(X)
    copied = round_trip(model, how)
    assert torch.equal(copied(X), active)
    assert mc.active_adapters(copied) == ("a1", "a0")
    assert [type(module) for module in copied.modules()][1:] == [type(module) for module in model.modules()][1:]
    fill_blocks(copied, seed=9)
    assert max_error(copied(X), active) > 1e-3
    with mc.disable_adapter(copied):
        assert torch.equal(copied(X), subject.base(X))
        assert torch.equal(model(X), active)
    mc.set_adapter(copied, "a1")
    assert mc.active_adapters(model) == ("a1", "a0")
    mc.unload(copied)
    assert look(copied) == subject.look
    assert torch.equal(model(X), active)


@copies
@pytest.mark.parametrize("disabled", [False, True])
def test_a_copy_of_a_merged_model_can_be_unmerged(subject: Subject, disabled: bool, how: str) -> None:
    model = subject.adapted(True)
    active, before = model(X), state(model)
    mc.merge(model, keep_adapters=True)
    merged, values = model(X), state(model)
    if disabled:
        with mc.disable_adapter(model):
            copied = round_trip(model, how)
        with mc.disable_adapter(copied):
            assert torch.equal(copied(X), subject.base(X))
    else:
        copied = round_trip(model, how)
    assert torch.equal(copied(X), merged)
    mc.unmerge(copied)
    assert torch.equal(copied(X), active)
    assert same(state(copied), before)
    assert same(state(model), values)
    mc.unmerge(model)
    assert same(state(model), before)


@copies
def test_a_copy_made_while_disabled_is_not_disabled_for_ever(subject: Subject, how: str) -> None:
    """The context belongs to the original: nothing could ever leave it for the copy."""
    model = subject.adapted(True)
    active = model(X)
    with mc.disable_adapter(model):
        copied = round_trip(model, how)
    assert torch.equal(model(X), active)
    with mc.disable_adapter(copied):
        assert torch.equal(copied(X), subject.base(X))
    assert torch.equal(copied(X), active)
    mc.unload(copied)
    assert look(copied) == subject.look


# Files


@every_variant
def test_save_and_load(subject: Subject, variant: Any, tmp_path: Path) -> None:
    """An adapter loads onto its own route bit for bit, and onto the module."""
    model = subject.adapted(variant)
    output = model(X)
    mc.save_adapter(model, tmp_path, "a0")
    again = copy.deepcopy(subject.base) if subject.is_module else subject.given
    loaded = mc.load_adapter(again, tmp_path, is_trainable=True)
    assert torch.equal(loaded(X), output)
    assert {name for name, _ in mc.trainable_parameters(loaded)} == {f"{name}.miss_block_default" for name in LINEARS}
    assert max_error(mc.load_adapter(copy.deepcopy(subject.base), tmp_path)(X), output) < EXACT


def test_hotswap(subject: Subject, tmp_path: Path) -> None:
    model = subject.adapted(True)
    mc.save_adapter(model, tmp_path / "same", "a0")
    output, code = model(X), mc.dump(model, "code")
    fill_blocks(model, seed=7)
    assert max_error(model(X), output) > 1e-3
    mc.hotswap_adapter(model, tmp_path / "same", "a0")
    assert torch.equal(model(X), output)
    assert mc.dump(model, "code") == code
    mc.save_adapter(mc.adapt(copy.deepcopy(subject.base), fields(r=8)), tmp_path / "wide")
    with pytest.raises(mc.CheckpointError, match=r"miss_block' has shape \(8, \d+\), on the model it is \(4, \d+\)"):
        mc.hotswap_adapter(model, tmp_path / "wide", "a0")
    assert torch.equal(model(X), output)


@every_variant
def test_save_as_lora(subject: Subject, variant: Any, tmp_path: Path) -> None:
    model = subject.adapted(variant)
    mc.save_as_lora(model, tmp_path, "a0", **({"rank": 8} if variant == "bat" else {}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in LINEARS:
        down, up = (tensors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
        weight = matrix_of(subject.base.get_submodule(name))
        expected = reference_delta(variant, blocks_of(model)[f"{name}.miss_block_a0"], weight)
        assert max_error(up @ down, expected) < 1e-5 * float(expected.abs().max())


def test_dump(subject: Subject) -> None:
    model = subject.adapted(True, "mini")
    rows = [line for line in mc.dump(model).splitlines() if line.startswith(LINEARS)]
    assert [row.split()[0] for row in rows] == ["up", "up", "down", "down"]
    assert [name in row for row in rows for name in (" a0 ", " a1 ")] == [True, False, False, True] * 2
    assert ["(inactive)" in row for row in rows] == [True, False, True, False]
    assert [part in row for row in rows for part in ("12→8", "8→20")] == [True, False] * 2 + [False, True] * 2
    assert "miss_block_a1" in mc.dump(model, "code")
    with mc.disable_adapter(model):
        assert mc.dump(model).count("(disabled)") == 4
    mc.unload(model)
    with pytest.raises(mc.StateError, match="nothing to dump"):
        mc.dump(model)


# Checkpoints and dtypes


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_loads_strictly_and_leaves_the_blocks(subject: Subject, assign: bool) -> None:
    model = subject.adapted(True)
    values, blocks = {name: torch.randn_like(v) for name, v in state(subject.base).items()}, state(model)
    result = copied_if_graph(subject, model).load_state_dict(values, strict=subject.is_module, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    if subject.is_module:
        assert same(state(model), {name: values.get(name, value) for name, value in blocks.items()})


def copied_if_graph(subject: Subject, model: Any) -> Any:
    """A graph's base values are those of the given one."""
    return model if subject.is_module else copy.deepcopy(model)


def test_a_full_checkpoint_loads_its_blocks_too(subject: Subject) -> None:
    model = subject.adapted(True)
    fresh = mc.adapt(copy.deepcopy(subject.base) if subject.is_module else subject.given, fields(), "a0")
    assert torch.equal(fresh(X), subject.base(X))
    result = fresh.load_state_dict(model.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(fresh(X), model(X))
    other = mc.adapt(copy.deepcopy(subject.base), fields("mini", r=3), "a0")
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.miss_block_a0"):
        other.load_state_dict(model.state_dict())


def test_strict_still_finds_what_is_missing_or_too_much(subject: Subject) -> None:
    model, values = copied_if_graph(subject, subject.adapted(True)), state(subject.base)
    with pytest.raises(RuntimeError, match=r'Missing key.*"up\.weight"'):
        model.load_state_dict({name: value for name, value in values.items() if name != "up.weight"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"up\.miss_block_other"'):
        model.load_state_dict(values | {"up.miss_block_other": torch.ones(4, 8)})
    mc.unload(model)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"up\.miss_block_a0"'):
        model.load_state_dict(values | {"up.miss_block_a0": torch.ones(4, 8)})


@pytest.mark.parametrize("lacks", ["up.miss_block_a0", "down.miss_block_a0", "up.miss_block_a1"])
@pytest.mark.parametrize("save", [dict, lambda values: values])
def test_a_strict_load_of_an_adapted_checkpoint_tells_a_missing_block(subject: Subject, save: Any, lacks: str) -> None:
    """Also where the dict has come without the metadata that torch puts on it, as from a file of safetensors."""
    model = subject.adapted(True, "mini")
    values = copy.deepcopy(save(model.state_dict()))
    del values[lacks]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{lacks}"\.'):
        model.load_state_dict(values)
    result = model.load_state_dict(values, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([lacks], [])
    first = {name: value for name, value in values.items() if not name.endswith("a1")}
    assert set(model.load_state_dict(first, strict=False).missing_keys) >= {"up.miss_block_a1", "down.miss_block_a1"}


@every_variant
def test_the_dtype_may_change(subject: Subject, variant: Any) -> None:
    """Each call takes the form that its dtype needs when it runs, so that no code changes."""
    model = subject.adapted(variant)
    wide, code = model(X), mc.dump(model, "code")
    model.to(torch.bfloat16)
    assert model(X.bfloat16()).dtype == torch.bfloat16
    assert max_error(model(X.bfloat16()), wide) < 0.1
    with mc.disable_adapter(model):
        model.to(torch.float32)
    assert mc.dump(model, "code") == code
    assert max_error(model(X.float()), wide) < 0.1  # the values were rounded on the way


# Tensors that are trained in full


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"bias": "all"}, {"down.bias"}),
        ({"bias": "MiSS_only"}, {"down.bias"}),
        ({"target_modules": ["up"], "modules_to_save": ["down"]}, {"down.weight", "down.bias"}),
    ],
    ids=["bias all", "bias MiSS_only", "modules_to_save"],
)
def test_biases_and_modules_to_save(subject: Subject, changes: Any, copies: set[str], kept: bool, tmp_path: Path) -> None:
    if subject.in_out:  # a `Conv1D` always has a bias
        copies = copies | ({"up.bias"} if "bias" in changes else set())
    names = {name: "{}.miss_copy_default:{}".format(*name.split(".")) for name in copies}
    model = mc.adapt(subject.given, fields(**changes))
    assert {name for name, _ in mc.trainable_parameters(model)} == {*blocks_of(model), *names.values()}
    assert torch.equal(model(X), subject.base(X))
    shake(model)

    expected = with_deltas(subject.base, model, default=True)
    for name, copied in names.items():
        expected.get_parameter(name).data.copy_(model.get_parameter(copied))
        assert max_error(expected.get_parameter(name), subject.base.get_parameter(name)) > 1e-2
    output = model(X)
    assert max_error(output, expected(X)) < EXACT
    found, wanted = gradients(model, X), gradients(expected, X)
    assert all(max_error(found[copied], wanted[name]) < 1e-11 for name, copied in names.items())
    with mc.disable_adapter(model):
        assert torch.equal(model(X), subject.base(X))

    mc.save_adapter(model, tmp_path)
    again = copy.deepcopy(subject.base) if subject.is_module else subject.given
    assert torch.equal(mc.load_adapter(again, tmp_path, is_trainable=True)(X), output)
    assert max_error(mc.load_adapter(copy.deepcopy(subject.base), tmp_path)(X), output) < EXACT
    mc.merge(model, keep_adapters=kept)
    assert max_error(model(X), expected(X)) < EXACT
    assert all(torch.equal(model.get_parameter(name), expected.get_parameter(name)) for name in copies)
    if kept:
        with mc.disable_adapter(model):
            assert torch.equal(model(X), subject.base(X))
        mc.unmerge(model)
        assert torch.equal(model(X), output)
        mc.unload(model)
        assert torch.equal(model(X), subject.base(X))
    assert look(model) == subject.look


# Dropout, models around it, compilation


@every_variant
def test_dropout_of_the_adapter_follows_the_mode(subject: Subject, variant: Any) -> None:
    model = subject.adapted(variant, miss_dropout=0.5).eval()
    exact = subject.reference(model, (0, variant))
    assert max_error(model(X), exact) < EXACT
    model.train()
    first, second = (seeded_run(model, seed) for seed in (1, 2))
    assert max_error(first, second) > 1e-3
    assert max_error(first, exact) > 1e-3
    assert torch.equal(first, seeded_run(model, 1))
    assert set(gradients(model, X)) == set(blocks_of(model))
    model.eval()
    assert max_error(model(X), exact) < EXACT
    mc.merge(model)
    assert max_error(model(X), exact) < EXACT


def seeded_run(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    y: Tensor = model(X)
    return y


def test_inside_a_model_it_is_switched_with_it(subject: Subject) -> None:
    outer = nn.Sequential(subject.adapted(True), nn.Tanh())
    active, base = outer(X), torch.tanh(subject.base(X))
    with mc.disable_adapter(outer):
        assert torch.equal(outer(X), base)
    assert torch.equal(outer(X), active)
    mc.merge(outer)
    assert max_error(outer(X), active) < EXACT
    assert look(outer[0]) == subject.look


@pytest.mark.parametrize("subject", ["module", "captured", "traced"], indirect=True)
def test_inductor_compiles_it_whole(subject: Subject) -> None:
    model = subject.adapted(True, "mini").float()
    mc.set_adapter(model, ["a0", "a1"])
    x = X.float()
    output, expected = model(x), gradients(model, x)
    compiled = torch.compile(model, fullgraph=True)
    assert max_error(compiled(x), output) < 1e-5
    found = gradients(compiled, x)
    for name, value in expected.items():
        assert max_error(found[f"_orig_mod.{name}"], value) < 1e-5 * max(1.0, float(value.abs().max()))


@every_variant
def test_it_is_exported_again_adapted_and_merged(subject: Subject, variant: Any) -> None:
    model = subject.adapted(variant)
    expected = subject.reference(model, (0, variant))
    for _ in range(2):
        assert max_error(torch.export.export(model, (X,)).module()(X), expected) < EXACT
        if blocks_of(model):
            mc.merge(model)


def test_switching_between_seen_sets_recompiles_nothing_and_a_new_one_costs_one_graph() -> None:
    model = tiny_llama()
    for name, variant in zip("abc", VARIANTS, strict=True):
        mc.adapt(model, fields(variant, target_modules=["q_proj", "down_proj"]), name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    sets = (["a"], ["b"], ["a", "c"])
    with torch.no_grad():
        for expected, names in enumerate(sets, start=1):
            mc.set_adapter(model, names)
            compiled(token_batch())
            assert counter.frame_count == expected
        for names in (*sets, *reversed(sets)):
            mc.set_adapter(model, names)
            compiled(token_batch())
    assert counter.frame_count == len(sets)


@pytest.mark.parametrize("subject", ["captured", "exported", "traced"], indirect=True)
def test_going_back_to_a_seen_set_on_a_graph_recompiles_nothing_and_keeps_no_more_source(subject: Subject) -> None:
    model = subject.adapted(True, "bat")
    copied = copy.deepcopy(model)
    for each in (model, copied):
        counter = CompileCounter()
        compiled = torch.compile(each, backend=counter)
        sets: tuple[list[str], ...] = (["a0"], ["a1"], ["a0", "a1"], [])
        expected = []
        for names in sets:
            mc.set_adapter(each, names)
            expected.append(compiled(X))
        seen, sources = counter.frame_count, len(_loader.eval_cache)
        assert seen == len(sets)
        for number in (2, 0, 3, 1, 0):
            mc.set_adapter(each, sets[number])
            assert torch.equal(compiled(X), expected[number])
            assert max_error(each(X), expected[number]) == 0
            with mc.disable_adapter(each):
                assert torch.equal(compiled(X), subject.base(X))
        assert (counter.frame_count, len(_loader.eval_cache)) == (seen, sources)
    mc.delete_adapter(model, "a1")
    mc.set_adapter(model, "a0")
    assert max_error(model(X), subject.reference(model, (0, True))) < EXACT


def test_hotswap_recompiles_nothing(tmp_path: Path) -> None:
    rules = fields(target_modules=["q_proj", "down_proj"])
    other, model = (fill_blocks(mc.adapt(tiny_llama(), rules), std=0.3, seed=seed) for seed in (5, 6))
    mc.save_adapter(other, tmp_path)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        before = compiled(token_batch()).logits
        mc.hotswap_adapter(model, tmp_path)
        after = compiled(token_batch()).logits
        assert max_error(after, before) > 1e-2
        torch.testing.assert_close(after, other(token_batch()).logits)
    assert counter.frame_count == 1

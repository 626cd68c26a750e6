"""Bad input: each is a `MissError` that names what was wrong and what would do, with the model exactly as before."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from support import fill_blocks, stable_id
from torch import Tensor, nn
from zoo import tiny_bert

import misscompile as mc
from misscompile import pipeline
from misscompile.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    MergeError,
    MissError,
    MissWarning,
    NoMatchError,
    StateError,
    UnknownAdapterError,
    UnsupportedModuleError,
)

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 12)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(12, 8), "up_proj": nn.Linear(8, 12)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["up_proj"](torch.tanh(layer["q_proj"](x)))
        y: Tensor = self.head(self.norm(x))
        return y


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ALL = {"r": 2, "target_modules": "all-linear"}


def plain() -> nn.Module:
    return Net().eval()


def adapted() -> nn.Module:
    return fill_blocks(mc.adapt(plain(), {"r": 3, "target_modules": ["q_proj", "up_proj"]}, "first"), std=0.3)


BASES = pytest.mark.parametrize("base", [plain, adapted], ids=["plain", "adapted"])


def snapshot(model: nn.Module, *inputs: Any) -> Any:
    """Classes, attributes, parameters (the same objects), flags, records and outputs."""
    modules = [
        (name, id(module), type(module), list(vars(module)), module.training) for name, module in model.named_modules()
    ]
    parameters = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = not isinstance(parameter, nn.parameter.UninitializedParameter)
        value = parameter.detach().numpy().tobytes() if known else None
        parameters.append((name, id(parameter), type(parameter), parameter.requires_grad, value))
    states = [(name, copy.deepcopy(vars(state))) for name, state in records(model)]
    for _, state in states:  # tensors know no truth value
        state["base_values"] = {name: value.numpy().tobytes() for name, value in state["base_values"].items()}
    outputs = [model(*inputs).detach().numpy().tobytes()] if inputs else []
    return modules, parameters, states, list(model.state_dict()), outputs


def records(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, vars(module)["_miss"]) for name, module in model.named_modules() if "_miss" in vars(module))


def refuse(
    model: nn.Module, config: Any, kind: type[BaseException], *told: str, name: Any = "default", inputs: tuple[Any, ...] = ()
) -> str:
    """Adapt, expect this kind of error and these pieces of its message, and the model as it was."""
    before = snapshot(model, *inputs)
    with pytest.raises(kind) as caught:
        mc.adapt(model, config, name)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert [piece for piece in told if piece not in message] == [], message
    assert snapshot(model, *inputs) == before
    return message


def test_the_snapshot_sees_an_adapter() -> None:
    """What the tests below compare does change when something is adapted."""
    model = plain()
    before = snapshot(model, TOKENS)
    mc.adapt(model, ALL)
    after = snapshot(model, TOKENS)
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, True, True, True, False]
    fill_blocks(model)
    assert snapshot(model, TOKENS)[-1] != before[-1]
    mc.unload(model)
    assert snapshot(model, TOKENS)[0] == before[0]


# The kinds


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (ConfigError, ValueError),
        (NoMatchError, ValueError),
        (UnsupportedModuleError, TypeError),
        (ArgumentError, TypeError),
        (UnknownAdapterError, KeyError),
        (StateError, RuntimeError),
        (MergeError, RuntimeError),
        (CheckpointError, ValueError),
        (CheckpointNotFoundError, FileNotFoundError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_kind_is_a_miss_error_and_a_familiar_one(kind: type[MissError], base: type[Exception]) -> None:
    assert issubclass(kind, MissError)
    assert issubclass(kind, base)
    assert str(kind("what was found; what would do")) == "what was found; what would do"  # KeyError alone would quote it
    assert getattr(mc, kind.__name__) is kind


def test_bases_of_the_others() -> None:
    assert MissError.__bases__ == (Exception,)
    assert issubclass(CheckpointNotFoundError, CheckpointError)
    assert issubclass(MissWarning, UserWarning)


# Arguments of adapt


@pytest.mark.parametrize("model", [None, 3, "llama", nn.Linear, torch.ones(2), {}, [nn.Linear(3, 2)]], ids=stable_id)
def test_no_module(model: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        mc.adapt(model, ALL)
    assert str(caught.value) == f"model: expected a torch.nn.Module, found {type(model).__name__}."


def test_an_exported_program() -> None:
    program: Any = torch.export.export(nn.Sequential(nn.Linear(6, 4)), (torch.ones(2, 6),))
    with pytest.raises(ArgumentError, match=r"found ExportedProgram \(adapt and load_adapter make a module of it\)"):
        mc.set_adapter(program, "default")


@BASES
@pytest.mark.parametrize("config", [None, 3, "all-linear", [("r", 2)], object(), ["q_proj"]], ids=stable_id)
def test_no_config(base: Callable[[], nn.Module], config: Any) -> None:
    told = f"config: expected a misscompile.MissConfig, a peft.MissConfig or a dict, found {type(config).__name__}."
    refuse(base(), config, ArgumentError, told, inputs=(TOKENS,))


@pytest.mark.parametrize("config", [mc.MissConfig, peft.MissConfig], ids=["ours", "peft's"])
def test_a_config_class_in_place_of_a_config(config: Any) -> None:
    refuse(plain(), config, ArgumentError, "config: expected a misscompile.MissConfig", inputs=(TOKENS,))


def test_a_config_of_another_method() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fields that MiSS does not have
        refuse(
            plain(), peft.LoraConfig(target_modules=["q_proj"]), ConfigError, "MissConfig.peft_type='LORA': expected 'MISS'"
        )


@BASES
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"r": 0}, "MissConfig.r=0: expected an integer of 1 or more."),
        ({"mini_r": 0}, "MissConfig.mini_r=0: expected an integer of 1 or more that divides out_features."),
        (
            {"init_weights": "BAT"},
            "MissConfig.init_weights='BAT': expected True (balance), False (balance, random start), 'bat'",
        ),
        ({"target_modules": "("}, "MissConfig.target_modules='(' is not a regular expression"),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, "MissConfig.layers_to_transform=1 cannot be combined"),
    ],
    ids=str,
)
def test_a_bad_field(base: Callable[[], nn.Module], config: dict[str, Any], told: str) -> None:
    refuse(base(), ALL | config, ConfigError, told, inputs=(TOKENS,))


@BASES
@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        (None, ArgumentError, "adapter_name: expected a string, found NoneType."),
        (7, ArgumentError, "adapter_name: expected a string, found int."),
        (b"default", ArgumentError, "adapter_name: expected a string, found bytes."),
        (["default"], ArgumentError, "adapter_name: expected a string, found list."),
        (
            "",
            ConfigError,
            "adapter_name='': a name becomes part of a parameter name, so it holds letters, digits, _ and - only",
        ),
        (
            "a.b",
            ConfigError,
            "adapter_name='a.b': a name becomes part of a parameter name, so it holds letters, digits, _ and - only",
        ),
        (".", ConfigError, "'_' would do."),
        ("v1.0", ConfigError, "'v1_0' would do."),
    ],
    ids=stable_id,
)
def test_a_bad_name(base: Callable[[], nn.Module], name: Any, kind: type[MissError], told: str) -> None:
    refuse(base(), ALL, kind, told, name=name, inputs=(TOKENS,))


@pytest.mark.parametrize(
    "name", ["my-adapter", "a b", "ä", "class", "1", "weight", "'", 'a"b', "a\\b", "a\nb", '")#'], ids=stable_id
)
def test_an_odd_name_works_or_is_refused(name: str) -> None:
    model = plain()
    before = snapshot(model, TOKENS)
    try:
        mc.adapt(model, ALL, name)
    except ConfigError as error:
        refused = str(error)
    else:
        assert [n for n, _ in mc.trainable_parameters(model)] == [f"{n}.miss_block_{name}" for n, _ in records(model)]
        fill_blocks(model)
        assert (model(TOKENS) - mc.merge(copy.deepcopy(model))(TOKENS)).abs().max() < 1e-6
        assert snapshot(model, TOKENS)[-1] != before[-1]
        return
    assert f"adapter_name={name!r}" in refused
    assert snapshot(model, TOKENS) == before


def test_a_name_in_use() -> None:
    told = "adapter_name='first' is in use (layers.0.q_proj): choose another name, or remove that adapter first"
    refuse(adapted(), ALL, StateError, told, "delete_adapter(model, 'first')", name="first", inputs=(TOKENS,))


def test_a_name_in_use_on_other_modules() -> None:
    refuse(adapted(), {"r": 2, "target_modules": ["head"]}, StateError, "adapter_name='first' is in use", name="first")


# Nothing matches


@BASES
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_modules": ["qproj"]}, ["target_modules=['qproj'] matches no module of the model", "closest: 'q_proj'"]),
        ({"target_modules": r"q_proj"}, ["target_modules='q_proj'", "closest: 'q_proj'", "expression for the whole name"]),
        ({"target_modules": ["self_attn"]}, ["target_modules=['self_attn'] matches no module"]),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            ["'layers.0.q_proj' and 1 more, but exclude_modules=['q_proj']", "take all of it away"],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [2]},
            ["'layers.0.q_proj' and 1 more, but none is in layers_to_transform=[2]"],
        ),
    ],
    ids=str,
)
def test_nothing_matches(base: Callable[[], nn.Module], fields: dict[str, Any], told: list[str]) -> None:
    refuse(base(), {"r": 2} | fields, NoMatchError, *told, inputs=(TOKENS,))


def test_no_linear_at_all() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    refuse(model, ALL, NoMatchError, "target_modules='all-linear': the model has no linear module beside its output layer")


def test_no_default_names() -> None:
    told = ["target_modules=None: there is no default for model_type=None", "'all-linear'", "q_proj, up_proj, head."]
    refuse(plain(), {"r": 2}, ConfigError, *told, inputs=(TOKENS,))
    model: Any = plain()
    model.config = type("Config", (), {"model_type": "lama"})()
    refuse(model, {"r": 2}, ConfigError, "model_type='lama' (close: ['llama'", "q_proj, up_proj, head.", inputs=(TOKENS,))


def test_an_entry_without_a_match_is_told_and_the_rest_is_adapted() -> None:
    model = plain()
    with pytest.warns(MissWarning) as caught:
        mc.adapt(model, {"r": 2, "target_modules": ["q_proj", "w1"], "exclude_modules": ["hed"]})
    assert sorted(str(w.message) for w in caught) == [
        "exclude_modules entry 'hed' matches no module; closest: 'head', 'embed'",
        "target_modules entry 'w1' matches no module",
    ]
    assert [w.filename for w in caught] == [__file__] * 2
    assert [name for name, _ in records(model)] == ["layers.0.q_proj", "layers.1.q_proj"]


def test_a_warning_made_an_error_leaves_the_model() -> None:
    """Under `python -W error` what adapt tells is raised: then it has to be all or nothing as well."""
    for model in (plain(), adapted()):
        refuse(model, {"r": 2, "target_modules": ["head", "w1"]}, MissWarning, "'w1' matches no module", inputs=(TOKENS,))


# Shapes


@BASES
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"r": 3, "init_weights": "bat", "target_modules": ["q_proj"]},
            [
                "MissConfig.r=3 does not fit 2 of 2 chosen modules",
                "layers.0.q_proj (12→8)",
                "layers.1.q_proj (12→8)",
                "r of 1, 2, 4",
            ],
        ),
        (
            {"r": 4, "init_weights": "bat", "target_modules": "all-linear"},
            ["MissConfig.r=4 does not fit 1 of 5 chosen modules", "head (12→9)", "divides in and out", "r of 1, 3 would do"],
        ),
        (
            {"r": 2, "init_weights": "mini", "mini_r": 4, "target_modules": "all-linear"},
            [
                "MissConfig.mini_r=4 does not fit 1 of 5",
                "head (12→9)",
                "mini_r that divides out",
                "mini_r of 1, 3, 9 would do",
            ],
        ),
        (
            {"r": 2, "init_weights": "mini", "mini_r": 16, "target_modules": ["up_proj"]},
            ["MissConfig.mini_r=16 does not fit 2 of 2", "layers.0.up_proj (8→12)", "mini_r of 1, 2, 3, 4, 6, 12 would do"],
        ),
        (
            {"r": 9, "target_modules": ["q_proj", "up_proj"]},
            [
                "MissConfig.r=9 does not fit 2 of 4",
                "layers.0.up_proj (8→12)",
                "more than its 8 input features",
                "r of 1 to 8",
            ],
        ),
        (
            {"r": 64, "target_modules": ["head"]},
            ["MissConfig.r=64 does not fit 1 of 1", "head (12→9)", "r of 1 to 12 would do"],
        ),
        (
            {"r": 13, "init_weights": "mini", "mini_r": 3, "target_modules": ["head"]},
            ["MissConfig.r=13 does not fit 1 of 1", "r of 1 to 12 would do"],
        ),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit(base: Callable[[], nn.Module], fields: dict[str, Any], told: list[str]) -> None:
    refuse(base(), fields, ConfigError, *told, inputs=(TOKENS,))


@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_values_that_would_do_do(r: int) -> None:
    mc.adapt(plain(), {"r": r, "init_weights": "bat", "target_modules": ["q_proj"]})
    mc.adapt(plain(), {"r": 12, "init_weights": "mini", "mini_r": (1, 3, 9)[r // 2], "target_modules": ["head"]})


def test_many_modules_that_do_not_fit_are_counted() -> None:
    model = nn.Sequential(*(nn.Linear(6, 4) for _ in range(20)))
    message = refuse(model, {"r": 7, "target_modules": "all-linear"}, ConfigError, "20 of 20", "… and 15 more")
    assert message.count("\n") == 6


def test_a_root_that_is_the_linear_is_named() -> None:
    refuse(nn.Linear(6, 4), {"r": 7, "target_modules": "all-linear"}, ConfigError, "(root) (6→4)")
    model = mc.adapt(nn.Linear(6, 4), ALL)
    refuse(model, ALL, StateError, "adapter_name='default' is in use ((root))")


# Modules on which an adapter would have no effect


@BASES
@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["norm"], ["norm (LayerNorm): it is not a linear module"]),
        (["embed"], ["embed (Embedding): it is not a linear module"]),
        (["head", "norm"], ["norm (LayerNorm)"]),
        (r".*norm|head", ["norm (LayerNorm)"]),
        (["layers.0"], ["layers.0 (ModuleDict)", "the linears inside: layers.0.q_proj, layers.0.up_proj"]),
        (["layers"], ["layers (ModuleList)", "layers.1.up_proj"]),
    ],
    ids=str,
)
def test_a_named_module_that_is_no_linear(base: Callable[[], nn.Module], targets: Any, told: list[str]) -> None:
    remedy = "Name other modules, or add these to exclude_modules."
    refuse(base(), {"r": 2, "target_modules": targets}, UnsupportedModuleError, remedy, *told, inputs=(TOKENS,))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attn(x, x, x, need_weights=False)[0])
        return y


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x))
        return y


class ScaledTuple(nn.Linear):
    """Reads an attribute that a trace would freeze, and returns a tuple."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight, self.bias) * self.scale, x


class Router(nn.Linear):
    """Looks at values: it can neither be traced nor be tried on fake tensors."""

    def forward(self, x: Tensor) -> Any:
        scores = F.linear(x, self.weight, self.bias)
        chosen = [row.argmax().item() for row in scores]
        return scores, chosen


class Grouped(nn.Linear):
    """A linear with another signature: rows go to groups of given sizes."""

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([F.linear(part, self.weight, self.bias) for part in x.split(sizes.tolist())])


class Narrow(nn.Linear):
    """Returns fewer features than it says, how many is an attribute."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.keep = 2

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)[..., : self.keep]


class Custom(nn.Module):
    """A parent that reads a child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tied(self.mix(x))
        return y

    def mix(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.t()


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.LazyLinear(7), nn.Linear(7, 4))


def chain(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Linear(4, 6))


BYPASSED = "reads its weight directly, so that its own forward does not always run"

REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str, list[str]]] = {
    # model, the module, what is told of it, and the linears that can be adapted
    "MultiheadAttention": (Attention, "attn.out_proj", f"MultiheadAttention {BYPASSED}", ["head"]),
    "encoder linear1": (Encoder, "encoder.linear1", f"TransformerEncoderLayer {BYPASSED}", ["head"]),
    "encoder linear2": (Encoder, "encoder.linear2", f"TransformerEncoderLayer {BYPASSED}", ["head"]),
    "encoder attention": (Encoder, "encoder.self_attn.out_proj", BYPASSED, ["head"]),
    "custom parent": (Custom, "proj", f"Custom {BYPASSED}", ["tied"]),
    "lazy": (lazy, "1", "its shape is not known yet; run the model once on real input first", ["0", "2"]),
    "tuple": (lambda: chain(ScaledTuple(6, 4)), "0", "found a tuple", ["1"]),
    "grouped": (lambda: chain(Grouped(6, 4)), "0", "its forward is not a function of one input", ["1"]),
    "narrow": (lambda: chain(Narrow(6, 4)), "0", "last dimension is 4, found a tensor of shape (2, 2)", ["1"]),
}


def kind_of(model: nn.Module, name: str) -> str:
    return f"{name} ({type(model.get_submodule(name)).__name__})"


@pytest.mark.parametrize("case", list(REFUSED))
@pytest.mark.parametrize("how", ["name", "last segment", "expression", "beside another"])
def test_a_module_named_explicitly_is_refused_by_name(case: str, how: str) -> None:
    make, name, reason, others = REFUSED[case]
    model = make()
    targets: Any = {
        "name": [name],
        "last segment": [name.rpartition(".")[2]],
        "expression": name.replace(".", r"\."),
        "beside another": [others[0], name],
    }[how]
    remedy = "Name other modules, or add these to exclude_modules."
    refuse(model, {"r": 2, "target_modules": targets}, UnsupportedModuleError, kind_of(model, name), reason, remedy)


@pytest.mark.parametrize("case", list(REFUSED))
def test_under_all_linear_it_is_skipped_told_and_listed(case: str) -> None:
    make, name, reason, others = REFUSED[case]
    model = make()
    refused = model.get_submodule(name)
    before = type(refused), list(vars(refused))
    with pytest.warns(MissWarning) as caught:
        mc.adapt(model, ALL)
    assert any(reason in str(w.message) for w in caught)
    assert any(kind_of(model, name) in str(w.message) or "more are not adapted" in str(w.message) for w in caught)
    assert [w.filename for w in caught] == [__file__] * len(caught)
    lines = [line for line in mc.dump(model).splitlines() if line.lstrip().startswith(f"refused: {kind_of(model, name)}")]
    assert len(lines) == 1
    assert reason in lines[0]
    assert [n for n, _ in records(model)] == others
    assert (type(refused), list(vars(refused))) == before


@pytest.mark.parametrize("make", [Attention, Encoder])
@pytest.mark.parametrize("training", [True, False])
def test_what_was_adapted_beside_it_acts_in_every_mode(make: Callable[[], nn.Module], training: bool) -> None:
    model = make().train(training).requires_grad_(False)  # torch itself takes another kernel where something requires grad
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        before = model(x)
        with pytest.warns(MissWarning):
            mc.adapt(model, ALL)
        assert torch.equal(model(x), before)
        assert (fill_blocks(model, std=0.5)(x) - before).abs().max() > 0.1
        merged = mc.merge(copy.deepcopy(model))(x)
        torch.testing.assert_close(model(x), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [Attention, Encoder, Custom, lazy], ids=lambda make: make.__name__)
def test_excluding_it_is_a_way_out(make: Callable[[], nn.Module]) -> None:
    names = [name for model, name, _, _ in REFUSED.values() if model is make]
    mc.adapt(make(), ALL | {"exclude_modules": names})  # without a warning


def test_only_modules_that_are_refused() -> None:
    model = nn.MultiheadAttention(6, 2)
    told = [
        "target_modules='all-linear': no linear of this model can be adapted",
        "out_proj (NonDynamicallyQuantizableLinear)",
    ]
    refuse(model, ALL, NoMatchError, *told, BYPASSED)


def test_a_lazy_linear_after_its_first_run() -> None:
    model = lazy()
    model(torch.ones(2, 6))
    mc.adapt(model, ALL)
    assert [name for name, _ in records(model)] == ["0", "1", "2"]


def test_a_router_that_cannot_be_tried_is_refused_by_name_at_the_latest_when_it_runs() -> None:
    model = nn.ModuleDict({"router": Router(6, 4)})

    def adapt_and_run() -> None:
        mc.adapt(model, {"r": 2, "target_modules": ["router"]})
        model["router"](torch.ones(2, 6))

    with pytest.raises(UnsupportedModuleError, match="Router"):
        adapt_and_run()


class TracedTuple(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight, self.bias), x


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias) + shift


def test_unusual_linears_that_can_be_traced_are_adapted_for_real() -> None:
    x, shift = torch.randn(3, 6), torch.randn(4)
    for kind, inputs in ((TracedTuple, (x,)), (TwoInputs, (x, shift))):
        model: Any = nn.ModuleDict({"layer": kind(6, 4)})
        before = model["layer"](*inputs)
        fill_blocks(mc.adapt(model, {"r": 2, "target_modules": ["layer"]}), std=0.5)
        block = model["layer"].miss_block_default
        update = x.unflatten(-1, (3, 2)).sum(-2) @ block
        after = model["layer"](*inputs)
        if kind is TracedTuple:
            assert torch.equal(after[1], x)
            before, after = before[0], after[0]
        torch.testing.assert_close(after, before + update, rtol=0, atol=1e-6)


class ClassScaled(nn.Linear):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.scale


def test_an_attribute_that_a_forward_reads_off_its_class_is_not_frozen_either() -> None:
    model: Any = nn.Sequential(ClassScaled(6, 4))
    x = torch.randn(3, 6)
    mc.adapt(model, {"r": 2, "target_modules": ["0"]})
    model[0].scale = 3.0
    torch.testing.assert_close(model(x), 3 * F.linear(x, model[0].weight, model[0].bias), rtol=0, atol=1e-6)


def test_bat_on_a_forward_that_stays_opaque() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) * self.scale

    model = nn.Sequential(Scaled())
    told = ["0 (Scaled)", "self.scale", "'bat' needs the weight itself (init_weights=True or 'mini' do not)"]
    x = torch.ones(2, 6)
    refuse(model, {"r": 2, "init_weights": "bat", "target_modules": ["0"]}, UnsupportedModuleError, *told, inputs=(x,))
    mc.adapt(model, {"r": 2, "init_weights": "mini", "mini_r": 2, "target_modules": ["0"]})


def test_an_attribute_of_the_name_of_the_block_that_a_class_makes_up() -> None:
    class Answering(nn.Linear):
        def __getattr__(self, name: str) -> Any:
            return 1.0 if name.startswith("miss_block") else super().__getattr__(name)

    model = nn.Sequential(Answering(6, 4))
    told = "0 (Answering): it already has an attribute 'miss_block_default'"
    refuse(model, {"r": 2, "target_modules": ["0"]}, UnsupportedModuleError, told, inputs=(torch.ones(2, 6),))


def test_an_attribute_of_the_name_of_the_block() -> None:
    model = plain()
    model.get_submodule("head").register_buffer("miss_block_default", torch.ones(1))
    told = "head (Linear): it already has an attribute 'miss_block_default'"
    refuse(model, {"r": 2, "target_modules": ["head"]}, UnsupportedModuleError, told, inputs=(TOKENS,))


# transformers


def tiny_mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=16,
        hidden_size=8,
        state_size=4,
        num_hidden_layers=1,
        time_step_rank=2,
        intermediate_size=16,
        use_cache=False,
    )
    torch.manual_seed(0)
    return MambaForCausalLM(config).eval()


def tiny_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


DT = "backbone.layers.0.mixer.dt_proj"


def test_mamba_s_time_step_projection_is_refused_by_name() -> None:
    told = [f"{DT} (Linear): MambaMixer {BYPASSED}"]
    refuse(tiny_mamba(), {"r": 2, "target_modules": ["in_proj", "dt_proj"]}, UnsupportedModuleError, *told)


def test_mamba_under_all_linear() -> None:
    model = tiny_mamba()
    with pytest.warns(MissWarning) as caught:
        mc.adapt(model, ALL)
    assert any("mixer." in str(w.message) and "not adapted: MambaMixer" in str(w.message) for w in caught)
    assert f"refused: {DT} (Linear)" in mc.dump(model)
    names = [name for name, _ in records(model)]
    assert "backbone.layers.0.mixer.in_proj" in names
    assert DT not in names
    with torch.no_grad():
        before = model(TOKENS).logits
        after = fill_blocks(model, std=0.5)(TOKENS).logits
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, mc.merge(copy.deepcopy(model))(TOKENS).logits, rtol=0, atol=1e-5)


def test_fused_experts_are_told_under_all_linear() -> None:
    model = tiny_mixtral()
    with pytest.warns(MissWarning) as caught:
        mc.adapt(model, ALL)
    told = "model.layers.0.mlp.experts (MixtralExperts)"
    reason = "its gate_up_proj (2×24×8) is a stack of fused weights, not a linear"
    assert [str(w.message) for w in caught] == [f"{told} is not adapted: {reason}"]
    assert f"refused: {told}: {reason}" in mc.dump(model)
    assert [name for name, _ in records(model)] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


@pytest.mark.parametrize("name", ["experts", "gate"])
def test_fused_experts_and_routers_named_explicitly_are_refused(name: str) -> None:
    model = tiny_mixtral()
    told = kind_of(model, f"model.layers.0.mlp.{name}")
    refuse(model, {"r": 2, "target_modules": ["q_proj", name]}, UnsupportedModuleError, told)


def test_names_of_another_mixtral_are_told() -> None:
    with pytest.warns(MissWarning, match="target_modules entry 'w1' matches no module"):
        mc.adapt(tiny_mixtral(), {"r": 2, "target_modules": ["q_proj", "w1"]})


def test_all_linear_leaves_the_head_of_a_classifier_out() -> None:
    model = tiny_bert()
    mc.adapt(model, ALL | {"task_type": "SEQ_CLS"})
    assert [(name, state.copies["default"]) for name, state in records(model) if not state.blocks] == [
        ("classifier", ("weight", "bias"))
    ]
    refuse(tiny_bert(), {"r": 2, "target_modules": ["classifer"]}, NoMatchError, "closest: 'classifier'")


# A wrong state


def test_adapting_a_merged_model() -> None:
    model = mc.merge(adapted(), keep_adapters=True)
    told = "layers.0.q_proj holds the merged adapter 'first': call unmerge(model) before adapting again."
    refuse(model, ALL, StateError, told, name="second", inputs=(TOKENS,))
    refuse(model, {"r": 2, "target_modules": ["head"]}, StateError, told, name="second", inputs=(TOKENS,))
    mc.adapt(mc.unmerge(model), ALL, "second")


def test_a_model_merged_for_good_is_plain_and_can_be_adapted_again() -> None:
    model = mc.merge(adapted())
    mc.adapt(model, ALL, "first")


def test_adapting_inside_disable_adapter() -> None:
    model = adapted()
    with mc.disable_adapter(model):
        told = "adapt was called inside disable_adapter(model): leave the context first."
        refuse(model, ALL, StateError, told, name="second", inputs=(TOKENS,))
        with mc.disable_adapter(model):
            refuse(model, ALL, StateError, told, name="second")
        refuse(model, ALL, StateError, told, name="second")
    mc.adapt(model, ALL, "second")


VERBS: dict[str, Callable[[Any], Any]] = {
    "adapt": lambda model: mc.adapt(model, ALL),
    "load_adapter": lambda model: mc.load_adapter(model, "nowhere"),
    "save_adapter": lambda model: mc.save_adapter(model, "nowhere"),
    "merge": mc.merge,
    "unmerge": mc.unmerge,
    "unload": mc.unload,
    "set_adapter": lambda model: mc.set_adapter(model, "first"),
    "delete_adapter": lambda model: mc.delete_adapter(model, "first"),
    "disable_adapter": lambda model: mc.disable_adapter(model).__enter__(),
    "dump": mc.dump,
    "adapters": mc.adapters,
    "active_adapters": mc.active_adapters,
    "trainable_parameters": mc.trainable_parameters,
    "print_trainable_parameters": mc.print_trainable_parameters,
}


@pytest.mark.parametrize("model", [None, "model", nn.Linear, torch.ones(2)], ids=stable_id)
@pytest.mark.parametrize("verb", list(VERBS))
def test_no_verb_takes_something_else_than_a_module(verb: str, model: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"model: expected a torch\.nn\.Module, found {type(model).__name__}\."):
        VERBS[verb](model)


@pytest.mark.parametrize(
    ("verb", "kind", "told"),
    [
        ("merge", StateError, "the model has no adapter: there is nothing to merge."),
        ("unmerge", StateError, "nothing is merged: unmerge undoes merge(model, keep_adapters=True)."),
        ("unload", StateError, "the model has no adapter: call adapt or load_adapter first."),
        ("disable_adapter", StateError, "the model has no adapter: call adapt or load_adapter first."),
        ("dump", StateError, "the model has no adapter: there is nothing to dump."),
        (
            "save_adapter",
            UnknownAdapterError,
            "the model has no adapter 'default': it has none; call adapt or load_adapter first.",
        ),
        (
            "set_adapter",
            UnknownAdapterError,
            "the model has no adapter 'first': it has none; call adapt or load_adapter first.",
        ),
        (
            "delete_adapter",
            UnknownAdapterError,
            "the model has no adapter 'first': it has none; call adapt or load_adapter first.",
        ),
    ],
)
def test_a_model_without_adapters(verb: str, kind: type[MissError], told: str) -> None:
    model = plain()
    before = snapshot(model, TOKENS)
    with pytest.raises(kind) as caught:
        VERBS[verb](model)
    assert str(caught.value) == told
    assert snapshot(model, TOKENS) == before


@pytest.mark.parametrize("verb", ["merge", "unmerge", "unload", "set_adapter", "delete_adapter"])
def test_verbs_that_mean_nothing_inside_disable_adapter(verb: str) -> None:
    model = adapted()
    with mc.disable_adapter(model):
        before = snapshot(model, TOKENS)
        with pytest.raises(StateError, match=rf"{verb} was called inside disable_adapter\(model\): leave the context first"):
            VERBS[verb](model)
        assert snapshot(model, TOKENS) == before


@pytest.mark.parametrize("verb", ["merge", "set_adapter", "delete_adapter"])
def test_verbs_that_mean_nothing_on_a_merged_model(verb: str) -> None:
    model = mc.merge(adapted(), keep_adapters=True)
    before = snapshot(model, TOKENS)
    with pytest.raises(
        StateError, match=r"layers\.0\.q_proj holds the merged adapter 'first'.* call unmerge\(model\) first"
    ):
        VERBS[verb](model)
    assert snapshot(model, TOKENS) == before


def test_unmerge_without_merge_and_twice() -> None:
    model = adapted()
    for _ in range(2):
        before = snapshot(model, TOKENS)
        with pytest.raises(StateError, match="nothing is merged"):
            mc.unmerge(model)
        assert snapshot(model, TOKENS) == before
        mc.unmerge(mc.merge(model, keep_adapters=True))


@pytest.mark.parametrize(
    ("names", "kind", "told"),
    [
        (["second"], UnknownAdapterError, "the model has no adapter 'second': it has 'first'."),
        (["first", "second"], UnknownAdapterError, "the model has no adapter 'second': it has 'first'."),
        ("first", ArgumentError, "adapter_names: expected a list of names, found str."),
        ({"first"}, ArgumentError, "adapter_names: expected a list of names, found set."),
        (3, ArgumentError, "adapter_names: expected a list of names, found int."),
        ([1], ArgumentError, "adapter_name: expected a string, found int."),
        ([], StateError, "no adapter is active: name the adapters to merge."),
    ],
    ids=stable_id,
)
@pytest.mark.parametrize("keep", [True, False])
def test_merging_names_that_are_not_there(names: Any, kind: type[MissError], told: str, keep: bool) -> None:
    model = adapted()
    before = snapshot(model, TOKENS)
    with pytest.raises(kind) as caught:
        mc.merge(model, names, keep_adapters=keep)
    assert str(caught.value) == told
    assert snapshot(model, TOKENS) == before


def test_an_adapter_named_twice_is_merged_once() -> None:
    model = adapted()
    expected = model(TOKENS)
    merged = mc.merge(model, ["first", "first"])(TOKENS)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("verb", "names", "kind", "told"),
    [
        (mc.set_adapter, "second", UnknownAdapterError, "the model has no adapter 'second': it has 'first'."),
        (mc.set_adapter, ["first", "second"], UnknownAdapterError, "the model has no adapter 'second': it has 'first'."),
        (mc.set_adapter, None, ArgumentError, "adapter_name: expected a name or a list of names, found NoneType."),
        (mc.set_adapter, [3], ArgumentError, "adapter_name: expected a string, found int."),
        (mc.delete_adapter, "second", UnknownAdapterError, "the model has no adapter 'second': it has 'first'."),
        (mc.delete_adapter, None, ArgumentError, "adapter_name: expected a string, found NoneType."),
        (mc.delete_adapter, ["first"], ArgumentError, "adapter_name: expected a string, found list."),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_choosing_names_that_are_not_there(verb: Any, names: Any, kind: type[MissError], told: str) -> None:
    model = adapted()
    before = snapshot(model, TOKENS)
    with pytest.raises(kind) as caught:
        verb(model, names)
    assert str(caught.value) == told
    assert snapshot(model, TOKENS) == before


@pytest.mark.parametrize("format", ["yaml", None, 3, ["text"]], ids=stable_id)
def test_an_unknown_format_of_dump(format: Any) -> None:
    with pytest.raises(ArgumentError, match="format="):
        mc.dump(adapted(), format=format)


# An error in the middle


class OutOfLuckError(Exception):
    pass


STEPS: dict[str, tuple[Any, str]] = {
    "register_parameter": (nn.Module, "register_parameter"),
    "specialize": (pipeline, "specialize"),
    "set_class": (pipeline, "set_class"),
    "zeros": (torch, "zeros"),
}


@BASES
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OutOfLuckError("no luck"), KeyboardInterrupt("stop")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("step", list(STEPS))
def test_an_error_at_any_owner_leaves_the_model(
    base: Callable[[], nn.Module], step: str, error: BaseException, done: bool
) -> None:
    """Each call of the step raises once, before or after it did its work, until adapt gets through."""
    owner, attribute = STEPS[step]
    real = getattr(owner, attribute)
    model = base()
    before = snapshot(model, TOKENS)
    for k in itertools.count(1):
        calls = 0

        def fail_at_k(*args: Any, k: int = k, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == k and not done:
                raise error
            result = real(*args, **kwargs)
            if calls == k:
                raise error
            return result

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(owner, attribute, fail_at_k, raising=False)
            try:
                mc.adapt(model, ALL, "second")
            except (OutOfLuckError, KeyboardInterrupt) as raised:
                caught = raised
            else:
                break
        assert caught is error
        assert snapshot(model, TOKENS) == before
    assert k > 5  # one of each of the five owners, at least
    assert [name for name, _ in mc.trainable_parameters(model)] == [
        f"{name}.miss_block_second" for name, _ in records(model)
    ]
    assert len(list(records(model))) == 5


def test_an_error_while_set_adapter_chooses_what_trains_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mc.adapt(adapted(), ALL, "second")
    before = snapshot(model, TOKENS)
    real, calls = nn.Parameter.requires_grad_, itertools.count(1)

    def fail_at_fifth(parameter: nn.Parameter, flag: bool) -> Tensor:
        if next(calls) == 5:
            raise OutOfLuckError
        return real(parameter, flag)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "requires_grad_", fail_at_fifth, raising=False)
        with pytest.raises(OutOfLuckError):
            mc.set_adapter(model, "first")
    assert snapshot(model, TOKENS) == before
    assert mc.active_adapters(model) == ("second",)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CLASS_CHANGED: dict[str, tuple[bool, Callable[[nn.Module], Any]]] = {
    "adapt": (False, lambda model: mc.adapt(model, ALL, "second")),
    "set_adapter": (False, lambda model: mc.set_adapter(model, "first")),
    "delete_adapter": (False, lambda model: mc.delete_adapter(model, "first")),
    "unload": (False, mc.unload),
    "unload after merge": (True, mc.unload),
    "disable_adapter": (False, lambda model: mc.disable_adapter(model).__enter__()),
    "disable_adapter after merge": (True, lambda model: mc.disable_adapter(model).__enter__()),
}


@pytest.mark.parametrize("case", list(CLASS_CHANGED))
def test_a_module_whose_class_was_changed_later_is_named_and_nothing_is_changed(case: str) -> None:
    """Half of the owners are before the one that is refused: they must not stay half way."""
    merged, verb = CLASS_CHANGED[case]
    model = adapted()
    if merged:
        mc.merge(model, keep_adapters=True)
    changed = "layers.1.q_proj"
    parametrize.register_parametrization(model.get_submodule(changed), "weight", Twice())
    before = snapshot(model, TOKENS)
    with pytest.raises(StateError, match=rf"{changed}: its class became \w+ after it was adapted; undo that first"):
        verb(model)
    assert snapshot(model, TOKENS) == before

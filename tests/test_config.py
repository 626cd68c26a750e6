"""`MissConfig`: fields, defaults, validation and JSON, against `peft.MissConfig`."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import says, stable_id
from torch import nn

import misscompile as mc
from misscompile import MissConfig
from misscompile.rules.config import NOT_IN_PEFT, coerce_config  # internal: what adapt makes of a config

pytestmark = pytest.mark.filterwarnings("error::misscompile.MissWarning")

LIST = ["q_proj"]


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values` as JSON holds them, the order of names without meaning."""
    values = json.loads(json.dumps(values, default=sorted))
    return {
        key: sorted(value) if key.endswith("_modules") and isinstance(value, list) else value
        for key, value in values.items()
    }


# Defaults and fields

NAMES = "a non-empty list of module names, a regular expression"
NO_NAMES: list[Any] = [[], (), set(), "", [""], ["a", 1], [None], 3, b"q", {"q": 1}]
FIELDS: dict[str, tuple[Any, list[Any], str, list[Any]]] = {
    # the default, other values that will do, what an error says is expected, and values that will not do
    "r": (
        64,
        [1, 7, 4096],
        "an integer of 1 or more",
        [0, -1, 1.0, 8.5, "8", None, True, False, [8], math.nan, torch.tensor(8)],
    ),
    "miss_dropout": (
        0.0,
        [0, 0.5, math.nextafter(1.0, 0.0)],
        "a probability in [0, 1)",
        [1, 1.0, -0.1, 1.5, math.nan, math.inf, "0.1", None, True, False, [0.1]],
    ),
    "mini_r": (1, [3], "an integer of 1 or more that divides out_features", [0, -2, 2.0, "4", None, True, False, (1,)]),
    "target_modules": (
        None,
        [["q_proj"], {"q_proj", "v"}, ("a.b",), r".*\.(q|v)_proj", "all-linear", "All-Linear"],
        f"{NAMES}, 'all-linear' or None",
        [*NO_NAMES, True],
    ),
    "exclude_modules": (
        None,
        [["q_proj"], {"q_proj"}, ("a.b",), r".*head", "all-linear"],
        f"{NAMES} or None",
        [*NO_NAMES, False],
    ),
    "init_weights": (
        True,
        [False, "bat", "mini"],
        "True (balance), False (balance, random start), 'bat' or 'mini', spelled exactly so",
        ["BAT", "Bat", "MINI", "balance", "miss", "true", "", " bat", None, 1, 0, 1.0, ["bat"], b"bat"],
    ),
    "layers_to_transform": (
        None,
        [0, 3, [0], [1, 5], (2,)],
        "a layer index of 0 or more, a non-empty list of them, or None",
        [-1, [], [-1], [0, -1], "0", ["0"], 1.0, [1.0], True, [True], {"0": 1}, range(0)],
    ),
    "layers_pattern": (None, [], "a name, a non-empty list of names, or None", ["", [], [""], 3, ["h", 1], b"h", True]),
    "bias": (
        "none",
        ["all", "MiSS_only"],
        "'none', 'all' or 'MiSS_only'",
        ["None", "ALL", "miss_only", "lora_only", "", None, True, ["all"], {}],
    ),
    "modules_to_save": (
        None,
        [["head"]],
        "a non-empty list of module names, or None",
        ["head", [], [""], [1], 3, True, {"head": 1}],
    ),
    "rank_pattern": (
        None,
        [{"q_proj": 8}, {r".*\.q": 1, "k": 2}],
        "a non-empty dict from names or regular expressions to integers of 1 or more, or None",
        [{}, {"q": 0}, {"q": 1.0}, {"q": "8"}, {"q": True}, {"": 8}, {1: 8}, [("q", 8)], 8, "q"],
    ),
    "task_type": (
        None,
        ["CAUSAL_LM", peft.TaskType.SEQ_CLS],
        "a task name such as 'CAUSAL_LM' or 'SEQ_CLS', or None",
        [1, True, ["CAUSAL_LM"], b"SEQ_CLS"],
    ),
    "inference_mode": (False, [True], "True or False", [None, 0, 1, "true", "", [True]]),
    "base_model_name_or_path": (None, ["org/name"], "a string or None", [1, True, ["a"], Path("a")]),
    "revision": (None, ["main"], "a string or None", [1, True, ["main"]]),
    "peft_type": (
        "MISS",
        [peft.PeftType.MISS],
        "'MISS' (a config of another PEFT method does not describe MiSS blocks)",
        ["LORA", "miss", "", None, 1, peft.PeftType.LORA, ["MISS"]],
    ),
    "auto_mapping": (None, [{"base_model_class": "Net"}], "a dict or None", ["x", 1, [("a", 1)], True]),
    "peft_version": (None, ["0.21.2"], "a string or None", [1, 0.21, True, (0, 21, 2)]),
}


def test_fields_and_defaults_are_those_of_peft() -> None:
    ours, theirs = MissConfig(), peft.MissConfig()
    assert ours.to_dict() == {field: default for field, (default, *_) in FIELDS.items() if field not in NOT_IN_PEFT}
    assert sorted(FIELDS.keys() - set(NOT_IN_PEFT)) == sorted(field.name for field in dataclasses.fields(theirs))
    for field in FIELDS.keys() - {
        "peft_version",
        *NOT_IN_PEFT,
    }:  # PEFT writes its own version there, which this library is not
        written = {json.dumps(value) for value in (getattr(ours, field), getattr(theirs, field), FIELDS[field][0])}
        assert len(written) == 1, field  # True is not 1, 64 is not 64.0


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, row in FIELDS.items() for v in (row[0], *row[1])], ids=stable_id)
def test_good_value_is_kept(field: str, value: Any) -> None:
    assert getattr(MissConfig(**{field: value}), field) == value


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, row in FIELDS.items() for v in row[3]], ids=stable_id)
def test_bad_value_is_an_error_that_names_field_value_and_remedy(field: str, value: Any) -> None:
    with pytest.raises(mc.ConfigError) as caught:
        MissConfig(**{field: value})
    assert str(caught.value) == f"MissConfig.{field}={value!r}: expected {FIELDS[field][2]}."


def test_arguments_are_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        MissConfig(8)  # type: ignore[misc]


@pytest.mark.parametrize(("value", "variant"), [(True, "balance"), (False, "balance"), ("mini", "mini"), ("bat", "bat")])
def test_variant(value: Any, variant: str) -> None:
    assert MissConfig(init_weights=value).variant == variant


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("all-linear", True), ("ALL-Linear", True), ("all-linear.*", False), (["all-linear"], False), (None, False)],
)
def test_selects_all_linear(targets: Any, expected: bool) -> None:
    assert MissConfig(target_modules=targets).selects_all_linear is expected


@pytest.mark.parametrize("pattern", ["layers", ["layers"], ["h", "layers"], r"(?:h|layers)"], ids=stable_id)
@pytest.mark.parametrize("layers", [0, [1, 2]], ids=stable_id)
def test_layers_pattern_goes_with_layers_to_transform(pattern: Any, layers: Any) -> None:
    config = MissConfig(target_modules=LIST, layers_to_transform=layers, layers_pattern=pattern)
    assert (config.layers_to_transform, config.layers_pattern) == (layers, pattern)


@pytest.mark.parametrize("pattern", ["[", "(a", "*q", "a{2,1}", "(?P<x>a)(?P<x>b)", "\\"], ids=stable_id)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_broken_expression(field: str, pattern: str) -> None:
    values = {"target_modules": LIST, "layers_to_transform": 0} if field == "layers_pattern" else {}
    with pytest.raises(mc.ConfigError) as caught:
        MissConfig(**{**values, field: pattern})
    assert str(caught.value).startswith(f"MissConfig.{field}={pattern!r} is not a regular expression (")
    assert "pass a list for plain names" in str(caught.value)


@pytest.mark.parametrize("targets", ["all-linear", r".*q_proj"])
@pytest.mark.parametrize(
    ("field", "value"), [("layers_to_transform", 0), ("layers_to_transform", [1]), ("layers_pattern", "h")]
)
def test_layers_do_not_go_with_a_string_of_targets(targets: str, field: str, value: Any) -> None:
    with pytest.raises(mc.ConfigError) as caught:
        MissConfig(target_modules=targets, **{field: value})
    assert str(caught.value) == (
        f"MissConfig.{field}={value!r} cannot be combined with the string target_modules={targets!r}: put the layers into "
        "the expression, or pass a list of names."
    )


def test_layers_pattern_alone_has_no_effect_and_is_an_error() -> None:
    with pytest.raises(
        mc.ConfigError, match=r"MissConfig\.layers_pattern='h' has no effect without layers_to_transform: set"
    ):
        MissConfig(target_modules=LIST, layers_pattern="h")


def test_a_value_changed_after_construction_is_checked_when_it_is_used() -> None:
    config = MissConfig(r=2, target_modules=["0"])
    config.mini_r = 0
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(mc.ConfigError, match=r"MissConfig\.mini_r=0: expected"):
        mc.adapt(model, config)
    assert type(model[0]) is nn.Linear


# To and from plain values

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

names = st.lists(st.sampled_from(["q_proj", "mlp.up", "layers.0.q", "ü"]), min_size=1, max_size=3, unique=True)
name_rules = st.one_of(names, names.map(set), names.map(tuple), st.sampled_from([r".*\.q", "all-linear", "A(b|c)"]))
configs = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(1, 512),
        "miss_dropout": st.floats(0, 1, exclude_max=True),
        "mini_r": st.integers(1, 64),
        "target_modules": st.none() | name_rules,
        "exclude_modules": st.none() | name_rules,
        "init_weights": st.sampled_from([True, False, "bat", "mini"]),
        "bias": st.sampled_from(["none", "all", "MiSS_only"]),
        "modules_to_save": st.none() | names,
        "task_type": st.sampled_from([None, "CAUSAL_LM", peft.TaskType.SEQ_CLS]),
        "inference_mode": st.booleans(),
        "base_model_name_or_path": st.none() | st.text(max_size=5),
        "revision": st.none() | st.text(max_size=5),
        "auto_mapping": st.sampled_from([None, {}, {"parent_library": "x"}]),
    },
)


@quick
@given(configs)
def test_round_trips(values: dict[str, Any]) -> None:
    config = MissConfig(**values)
    written = config.to_dict()
    assert plain(written) == plain(MissConfig().to_dict() | values)
    assert json.loads(json.dumps(written)) == written  # plain JSON values only, no enum, set or tuple
    assert MissConfig.from_dict(written).to_dict() == written
    assert MissConfig.from_json(config.to_json()).to_dict() == written
    assert MissConfig.from_dict(values) == config


@quick
@given(configs)
def test_to_and_from_peft(values: dict[str, Any]) -> None:
    ours = MissConfig(**values)
    theirs = peft.MissConfig(**ours.to_dict())
    expected = plain(ours.to_dict()) | {"peft_version": peft.__version__}
    assert plain(theirs.to_dict()) == expected
    back = coerce_config(theirs)
    assert type(back) is MissConfig
    assert type(back.peft_type) is str
    assert plain(back.to_dict()) == expected


@quick
@given(names, st.lists(st.integers(0, 40), min_size=1), st.none() | names | st.just("layers"))
def test_layers_round_trip(targets: list[str], layers: list[int], pattern: Any) -> None:
    config = MissConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
    assert MissConfig.from_json(config.to_json()) == config
    theirs = peft.MissConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
    assert coerce_config(theirs).layers_to_transform == layers
    assert coerce_config(theirs).layers_pattern == pattern


def test_sets_are_written_in_order() -> None:
    assert MissConfig(target_modules={"v", "q", "k"}).to_dict()["target_modules"] == ["k", "q", "v"]
    assert MissConfig(target_modules=["v", "q"]).to_dict()["target_modules"] == ["v", "q"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *((text, "not JSON (...") for text in ("", "{", "{'r': 1}", "nan")),
        ("[]", "expected a JSON object, found list."),
        ("3", "expected a JSON object, found int."),
        ("null", "expected a JSON object, found NoneType."),
        ('"r"', "expected a JSON object, found str."),
    ],
)
def test_from_json_of_something_else(text: str, told: str) -> None:
    with pytest.raises(mc.ConfigError) as caught:
        MissConfig.from_json(text)
    assert says(caught.value, f"MissConfig.from_json: {told}")


@pytest.mark.parametrize("values", [None, "r=1", 3, [("r", 1)]], ids=stable_id)
def test_from_dict_of_something_else(values: Any) -> None:
    with pytest.raises(mc.ArgumentError, match=f"takes a mapping of fields, found {type(values).__name__}"):
        MissConfig.from_dict(values)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (["target_module"], "'target_module' (did you mean 'target_modules'?)"),
        (["min_r"], "'min_r' (did you mean 'mini_r'?)"),
        (["dropout"], "'dropout' (did you mean 'miss_dropout'?)"),
        (["lora_alpha"], "'lora_alpha'"),
        (["rr", "zzz"], "'rr'..., 'zzz'"),
    ],
    ids=str,
)
def test_unknown_fields_are_told_at_once_with_a_suggestion(fields: list[str], told: str) -> None:
    with pytest.warns(mc.MissWarning) as caught:
        config = MissConfig.from_dict({"r": 5} | dict.fromkeys(fields, 1))
    (warning,) = caught
    assert says(warning.message, f"MissConfig has no field {told}: ignored.")
    assert warning.filename == __file__
    assert config == MissConfig(r=5)


class FakePeft:
    """A PEFT config by its looks: peft itself need not be there."""

    peft_type = "MISS"

    def to_dict(self) -> dict[str, Any]:
        return {"peft_type": "MISS", "r": 3, "target_modules": {"b", "a"}}


@pytest.mark.parametrize(
    "config",
    [
        MissConfig(r=3, target_modules={"b", "a"}),
        {"r": 3, "target_modules": {"b", "a"}},
        peft.MissConfig(r=3, target_modules=["b", "a"]),
        FakePeft(),
    ],
    ids=lambda config: type(config).__module__ + "." + type(config).__name__,
)
def test_coerce_config(config: Any) -> None:
    found = coerce_config(config)
    assert type(found) is MissConfig
    assert (found.r, set(found.target_modules or ())) == (3, {"a", "b"})
    assert found is not config


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["a"], "layers_to_transform": [0], "layers_pattern": ["h"], "modules_to_save": ["c"]},
        {"target_modules": {"a"}, "exclude_modules": ["b"], "auto_mapping": {"k": {"l": "m"}}},
    ],
    ids=["lists", "set and dict"],
)
@pytest.mark.parametrize("kind", [dict, MissConfig, peft.MissConfig], ids=lambda kind: kind.__module__ + "." + kind.__name__)
def test_the_copy_is_private(values: dict[str, Any], kind: Any) -> None:
    given_values = copy.deepcopy(values)
    config = kind(**given_values)
    kept = coerce_config(config)
    before = copy.deepcopy(kept.to_dict())
    for value in (config if kind is dict else vars(config)).values():
        if isinstance(value, list):
            value.append("changed later")
        elif isinstance(value, set):
            value.add("changed later")
        elif isinstance(value, dict):
            value["changed"] = value.setdefault("k", {})["l"] = "later"
    assert kept.to_dict() == before


OTHER_METHODS: list[peft.PeftConfig] = [
    *(kind(target_modules=LIST) for kind in (peft.LoraConfig, peft.OFTConfig, peft.BOFTConfig, peft.VeraConfig)),
    peft.LoraConfig(target_modules=LIST, bias="lora_only"),
    peft.IA3Config(target_modules=LIST, feedforward_modules=[]),
    peft.PromptTuningConfig(task_type="CAUSAL_LM"),
]


@pytest.mark.parametrize("config", OTHER_METHODS, ids=lambda config: type(config).__name__)
def test_config_of_another_method_names_the_method(config: Any) -> None:
    told = rf"^MissConfig\.peft_type={config.peft_type.value!r}: expected 'MISS'"
    with warnings.catch_warnings(action="ignore"), pytest.raises(mc.ConfigError, match=told):
        mc.adapt(nn.Sequential(nn.Linear(6, 4)), config)


PROGRAM = """
import sys, tempfile
import torch
import misscompile
net = lambda: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
model = misscompile.adapt(net(), {"r": 2, "target_modules": "all-linear", "init_weights": False})
model(torch.ones(2, 6)).sum().backward()
with tempfile.TemporaryDirectory() as folder:
    misscompile.save_adapter(model, folder)
    misscompile.load_adapter(net(), folder)
misscompile.dump(model)
misscompile.merge(model)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"peft", "transformers", "accelerate"}))
"""


def test_the_library_imports_neither_peft_nor_transformers(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")

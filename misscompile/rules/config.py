"""`MissConfig`: the fields, defaults and JSON of `peft.MissConfig`, ranks by name, and what needs no model to be checked."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from misscompile.errors import ArgumentError, ConfigError, MissWarning

Names = list[str] | set[str] | tuple[str, ...]

ALL_LINEAR = "all-linear"
PEFT_TYPE = "MISS"
NOT_IN_PEFT = ("rank_pattern",)
"""The fields that `peft.MissConfig` does not have."""


@dataclasses.dataclass(kw_only=True)
class MissConfig:
    """What to adapt and how: the fields of MiSS in PEFT, and `rank_pattern`.

    Args:
        r: rank, `1 <= r <= in_features` of every adapted linear.
        miss_dropout: probability in `[0, 1)` with which elements of the input are dropped before the shard sum,
            in training only.
        mini_r: width `m` of the block in the variant `"mini"`; divides `out_features`. No effect in other variants.
        target_modules: list of names (a module is chosen when its name equals an entry or ends with `"." + entry`),
            a regular expression matched against the whole name, `"all-linear"`, or None to look the names up by
            `model.config.model_type`.
        exclude_modules: names (by suffix) or a regular expression; excludes win over targets.
        init_weights: `True` balance, `False` balance with a Kaiming-uniform start, `"bat"`, `"mini"`.
        layers_to_transform: layer index or indices to keep; for lists of target names only.
        layers_pattern: name or names before the layer index; the first numbered segment of the name by default.
        bias: `"none"`, `"all"` or `"MiSS_only"`.
        modules_to_save: names of whole modules that are trained in full and saved with the adapter.
        rank_pattern: ranks in the place of `r`, as `peft.LoraConfig` has them. A key is a name (by suffix) or a regular
            expression for it; of several that match, the longest wins. PEFT's MiSS cannot read an adapter that has it.
        task_type, inference_mode, base_model_name_or_path, revision, peft_type, auto_mapping, peft_version:
            carried for PEFT's file format.

    Raises:
        ConfigError: a value that no model could accept; the message names the field.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    init_weights: bool | Literal["bat", "mini"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: Literal["none", "all", "MiSS_only"] = "none"
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_type: str = PEFT_TYPE
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        self.validate()

    @property
    def variant(self) -> str:
        """The algebra that `init_weights` stands for, as a key of `misscompile.variants.VARIANTS`."""
        return self.init_weights if isinstance(self.init_weights, str) else "balance"

    @property
    def selects_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def validate(self) -> None:
        """Check every field; a `ConfigError` names the field, the value found and the values that would do."""
        for field, (accepts, expected) in _RULES.items():
            value = getattr(self, field)
            if not accepts(value):
                raise ConfigError(f"MissConfig.{field}={value!r}: expected {expected}.")
        if isinstance(self.target_modules, str) and not self.selects_all_linear:
            _check_regex("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            _check_regex("exclude_modules", self.exclude_modules)
        for pattern in self.rank_pattern or ():
            _check_regex("rank_pattern", pattern)
        for pattern in as_list(self.layers_pattern):
            _check_regex("layers_pattern", pattern, inside=rf"\.(?:{pattern})\.")
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(self, field) is not None and isinstance(self.target_modules, str):
                raise ConfigError(
                    f"MissConfig.{field}={getattr(self, field)!r} cannot be combined with the string "
                    f"target_modules={self.target_modules!r}: put the layers into the expression, or pass a list of names."
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError(
                f"MissConfig.layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: "
                "set layers_to_transform as well, or drop layers_pattern."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, sets as sorted lists; those that PEFT does not know only where they are set."""
        values = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in NOT_IN_PEFT or value}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], strict: bool = False) -> MissConfig:
        """A config from a mapping such as `peft.MissConfig.to_dict()` or a parsed `adapter_config.json`.

        Args:
            values: fields by name.
            strict: refuse fields that MiSS does not have, instead of leaving them out with a warning that names them.

        Raises:
            ArgumentError: `values` is not a mapping.
            ConfigError: a value is not valid, or a field is unknown and `strict` is set.
        """
        if not isinstance(values, Mapping):
            raise ArgumentError(f"MissConfig.from_dict takes a mapping of fields, found {type(values).__name__}.")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = {key: difflib.get_close_matches(str(key), known, n=1) for key in values if key not in known}
        if unknown:
            names = [f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key) for key, close in unknown.items()]
            told = f"MissConfig has no field {', '.join(names)}"
            if strict:
                raise ConfigError(f"{told}.")
            warnings.warn(f"{told}: ignored.", MissWarning, stacklevel=2)
        return cls(**{key: copy.deepcopy(_plain_enum(value)) for key, value in values.items() if key in known})

    @classmethod
    def from_json(cls, text: str) -> MissConfig:
        """The inverse of `to_json`; a `ConfigError` where the text is no JSON object, or a value is not valid."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"MissConfig.from_json: not JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"MissConfig.from_json: expected a JSON object, found {type(values).__name__}.")
        return cls.from_dict(values)


def coerce_config(config: object) -> MissConfig:
    """A validated private copy of `config`: a `MissConfig`, a mapping, or a `peft.MissConfig` (peft is not imported)."""
    if isinstance(config, MissConfig):
        return MissConfig.from_dict(config.to_dict())
    if isinstance(config, Mapping):
        return MissConfig.from_dict(config, strict=True)
    to_dict = None if isinstance(config, type) else getattr(config, "to_dict", None)
    if hasattr(config, "peft_type") and callable(to_dict):
        return MissConfig.from_dict(to_dict())
    raise ArgumentError(
        f"config: expected a misscompile.MissConfig, a peft.MissConfig or a dict, found {type(config).__name__}."
    )


def as_list(value: Any) -> list[Any]:
    """What a field that takes one value, several or None holds."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, set, tuple)) else [value]


def _is_int(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_probability(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < 1.0


def _is_layers(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_int(index, 0) for index in value)
    return value is None or _is_int(value, 0)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: object) -> bool:
    """None, or several names."""
    names = value if isinstance(value, (list, set, tuple)) else ()
    return value is None or (bool(names) and all(isinstance(name, str) and name for name in names))


def _is_rule(value: object) -> bool:
    """None, several names, or one string."""
    return _is_names(value) or (isinstance(value, str) and bool(value))


def _is_ranks(value: object) -> bool:
    """None, or ranks by name."""
    ranks = value if isinstance(value, dict) else {}
    return value is None or (bool(ranks) and all(isinstance(k, str) and k and _is_int(v) for k, v in ranks.items()))


def _is_one_of(value: object, *words: str) -> bool:
    return isinstance(value, str) and value in words


_NAMES_OR_REGEX = "a non-empty list of module names, a regular expression"
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda v: v == PEFT_TYPE, "'MISS' (a config of another PEFT method does not describe MiSS blocks)"),
    "r": (_is_int, "an integer of 1 or more"),
    "miss_dropout": (_is_probability, "a probability in [0, 1)"),
    "mini_r": (_is_int, "an integer of 1 or more that divides out_features"),
    "target_modules": (_is_rule, f"{_NAMES_OR_REGEX}, 'all-linear' or None"),
    "exclude_modules": (_is_rule, f"{_NAMES_OR_REGEX} or None"),
    "init_weights": (
        lambda v: isinstance(v, bool) or _is_one_of(v, "bat", "mini"),
        "True (balance), False (balance, random start), 'bat' or 'mini', spelled exactly so",
    ),
    "layers_to_transform": (_is_layers, "a layer index of 0 or more, a non-empty list of them, or None"),
    "layers_pattern": (_is_rule, "a name, a non-empty list of names, or None"),
    "bias": (lambda v: _is_one_of(v, "none", "all", "MiSS_only"), "'none', 'all' or 'MiSS_only'"),
    "modules_to_save": (_is_names, "a non-empty list of module names, or None"),
    "rank_pattern": (_is_ranks, "a non-empty dict from names or regular expressions to integers of 1 or more, or None"),
    "task_type": (_is_text, "a task name such as 'CAUSAL_LM' or 'SEQ_CLS', or None"),
    "inference_mode": (lambda v: isinstance(v, bool), "True or False"),
    "base_model_name_or_path": (_is_text, "a string or None"),
    "revision": (_is_text, "a string or None"),
    "auto_mapping": (lambda v: v is None or isinstance(v, dict), "a dict or None"),
    "peft_version": (_is_text, "a string or None"),
}


def _check_regex(field: str, pattern: str, inside: str | None = None) -> None:
    try:
        re.compile(inside or pattern)
    except re.error as error:
        raise ConfigError(
            f"MissConfig.{field}={pattern!r} is not a regular expression ({error}): a string is matched as one against "
            "the whole module name; pass a list for plain names."
        ) from error


def _plain_enum(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _plain(value: Any) -> Any:
    value = _plain_enum(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)

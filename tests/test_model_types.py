"""`target_modules=None`: every row of the table on a model of that type, and every row of PEFT's."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TABLE
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import misscompile as mc
from misscompile.rules.model_types import TARGETS_BY_MODEL_TYPE  # internal: the table

REMOTE_CODE = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}
"""Types whose code is on the Hub alone; the rows are PEFT's."""

NO_AUTO_MODEL = {"siglip_text_model": "SiglipTextModel"}
LAYER_FIELDS = ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_blocks"]
LAYER_FIELDS += ["num_decoder_layers"]
WHOLE = {"gemma3n_text"}  # its layer lists are of the default length
FOUR_LAYERS = {"qwen3_next", "qwen3_5", "qwen3_5_text"}  # the fourth is the first with attention


def _shrink(config: Any, layers: int) -> Any:
    for field in LAYER_FIELDS:
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, layers)
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            _shrink(getattr(config, name), layers)
    return config


def _model(model_type: str, **fields: Any) -> nn.Module:
    """A model of a few layers on the meta device, of the default widths."""
    config = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])(**fields)
    if model_type not in WHOLE:
        _shrink(config, 4 if model_type in FOUR_LAYERS else 2)
    with torch.device("meta"):
        if model_type in NO_AUTO_MODEL:
            return getattr(transformers, NO_AUTO_MODEL[model_type])(config)  # type: ignore[no-any-return]
        return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return]


def _matched(row: tuple[str, ...] | str, model: nn.Module) -> dict[str, list[str]]:
    """The modules that each name of a row, or an expression, stands for."""
    names = [name for name, _ in model.named_modules()]
    if isinstance(row, str):
        return {row: [name for name in names if re.fullmatch(row, name)]}
    return {entry: [name for name in names if name == entry or name.endswith(f".{entry}")] for entry in row}


def _adapted(model: nn.Module) -> set[str]:
    mc.adapt(model, mc.MissConfig(r=1))
    return {name.removesuffix(".miss_block_default") for name, _ in mc.trainable_parameters(model)}


def _adapt_by_type(model: nn.Module) -> set[str]:
    """The names of the modules adapted without target_modules; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", mc.MissWarning)
        return _adapted(model)


@pytest.mark.parametrize("model_type", sorted(PEFT_TABLE))
def test_rows_of_peft_are_pefts(model_type: str) -> None:
    row = TARGETS_BY_MODEL_TYPE[model_type]
    assert (row if isinstance(row, str) else list(row)) == PEFT_TABLE[model_type]


def test_the_types_without_a_class_are_the_listed_ones() -> None:
    assert {name for name in TARGETS_BY_MODEL_TYPE if name not in CONFIG_MAPPING_NAMES} == REMOTE_CODE
    assert REMOTE_CODE - {"rwkv7"} <= PEFT_TABLE.keys()


@pytest.mark.parametrize("model_type", sorted(TARGETS_BY_MODEL_TYPE.keys() - REMOTE_CODE - {"blip-2"}))
def test_a_row_names_modules_of_its_model_and_adapts_them(model_type: str) -> None:
    model = _model(model_type)
    assert model.config.model_type == model_type
    matched = _matched(TARGETS_BY_MODEL_TYPE[model_type], model)
    for entry, names in matched.items():
        assert len(names) >= (1 if model_type in ("albert", "nemotron_h") else 2), f"{model_type}: {entry!r} is in {names}"
    assert _adapt_by_type(model) == {name for names in matched.values() for name in names}


@pytest.mark.parametrize(("text_type", "entries"), [("opt", {"q_proj", "v_proj"}), ("t5", {"q", "v"})])
def test_blip_2_names_the_projections_of_both_its_text_models(text_type: str, entries: set[str]) -> None:
    text = getattr(transformers, CONFIG_MAPPING_NAMES[text_type])()
    model = _model("blip-2", text_config=text.to_dict())
    matched = _matched(TARGETS_BY_MODEL_TYPE["blip-2"], model)
    assert {entry for entry, names in matched.items() if names} == entries
    with pytest.warns(mc.MissWarning, match="matches no module"):
        assert _adapted(model) == {name for names in matched.values() for name in names}


@pytest.mark.parametrize(
    ("model_type", "fields", "entries"),
    [
        ("deepseek_v2", {"q_lora_rank": None}, {"q_proj", "kv_b_proj"}),
        ("deepseek_v2", {"q_lora_rank": 16}, {"q_b_proj", "kv_b_proj"}),
        ("qwen3_next", {}, {"q_proj", "v_proj", "in_proj_qkvz"}),  # two kinds of layers
        ("qwen3_5", {}, {"q_proj", "v_proj", "in_proj_qkv"}),
    ],
)
def test_what_is_adapted_depends_on_the_layers(model_type: str, fields: dict[str, Any], entries: set[str]) -> None:
    assert {name.rsplit(".", 1)[-1] for name in _adapt_by_type(_model(model_type, **fields))} == entries


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "mistral3"])
def test_of_a_model_with_a_vision_tower_the_text_model_is_adapted(model_type: str) -> None:
    assert all(name.startswith("language_model.") for name in _adapt_by_type(_model(model_type)))

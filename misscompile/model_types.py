"""`target_modules=None`: which linears each `model.config.model_type` is adapted on, as LoRA's table in PEFT has them."""

from __future__ import annotations

_Q_V = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")

TARGETS_BY_MODEL_TYPE: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("bart", "gpt_neo", "gptj", "opt", "stablelm"), _Q_V),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3"), _Q_V),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), _QUERY_VALUE),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(
        ("bloom", "chatglm", "falcon", "gpt_neox", "RefinedWeb", "RefinedWebModel"),
        ("query_key_value",),
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", *_Q_V),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": (*_Q_V, "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""Model type to target names (by suffix) or a regular expression."""

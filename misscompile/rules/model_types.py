"""`target_modules=None`: which linears each `model.config.model_type` is adapted on.

The rows of PEFT's table for LoRA, as they are there, and in the same spirit (the query and value projections of the
attention, or what holds them) the families that it lacks, by the names of transformers 5.
"""

from __future__ import annotations

_FUSED = "query_key_value"
_OF_THE_TEXT_MODEL = r".*language_model\..*\.(q_proj|v_proj)"
_LATENT = r".*\.(q_proj|q_b_proj|kv_b_proj)"  # the small DeepSeek V2 has no low-rank query
_GATED_DELTA = r".*\.(q_proj|v_proj|in_proj_qkvz?)"  # few layers are attention, the others linear attention

_TYPES_BY_TARGETS: dict[tuple[str, ...] | str, str] = {
    # decoders, encoder-decoders, vision and speech models, all with the projections named alike
    ("q_proj", "v_proj"): """
        llama llama4 llama4_text mistral ministral3 mixtral smollm3 starcoder2 stablelm granite granitemoe helium
        qwen2 qwen2_moe qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3 qwen3_moe
        gemma gemma2 gemma3_text gemma3n_text gemma4_text phimoe gpt_neo gpt_oss gptj opt exaone4
        olmo olmo2 olmo3 olmoe cohere cohere2 glm glm4 glm4_moe
        bart mbart pegasus m2m_100 marian blenderbot whisper wav2vec2 hubert
        vit deit dinov2 dinov2_with_registers
        clip clip_text_model clip_vision_model siglip siglip_text_model siglip_vision_model siglip2
    """,
    ("query", "value"): """
        bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl camembert electra ernie albert layoutlm
    """,
    ("q_lin", "v_lin"): "distilbert",
    ("q", "v"): "t5 mt5 umt5 longt5 mpnet",
    ("query_proj", "value_proj"): "deberta-v2",
    (_FUSED,): "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen phi3 phi4_multimodal",
    ("Wqkv",): "modernbert mpt",
    ("in_proj",): "deberta mamba mamba2 falcon_mamba",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
    _OF_THE_TEXT_MODEL: "gemma3 gemma4 mistral3",
    _LATENT: "deepseek_v2 deepseek_v3",
    _GATED_DELTA: "qwen3_next qwen3_5 qwen3_5_text",
}

TARGETS_BY_MODEL_TYPE: dict[str, tuple[str, ...] | str] = {
    model_type: targets for targets, model_types in _TYPES_BY_TARGETS.items() for model_type in model_types.split()
}
"""Model type to target names (by suffix) or a regular expression."""

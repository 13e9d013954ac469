"""Every causal language model that transformers has, made small, with values that are not its defaults."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
LENGTH = 16

#: Field to a small value, by whatever name a type declares it.
SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "lru_width", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_inner", "feed_forward_size"), 48),
    **dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dim_ff", "expert_ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input", "laurel_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "indexer_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    "time_step_rank": 4,
    # counts
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "index_n_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "first_k_dense_replace"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk"), 3),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "zero_expert_num"), 1),
    # lengths
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "n_ctx"), 72),
    **dict.fromkeys(("sliding_window", "attention_window", "block_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "index_topk"), 8),
    "conv_kernel": 3,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    # numbers that a model computes with
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), 3e-4),
    **dict.fromkeys(("routed_scaling_factor", "logit_scale", "logits_scaling"), 1.7),
    **dict.fromkeys(("residual_multiplier", "embedding_multiplier", "attention_multiplier"), 0.6),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), 11.0),
    **dict.fromkeys(("attention_bias", "use_qk_norm", "mlp_bias", "scale_embedding"), True),
    "norm_topk_prob": False,
}

_BOTH = ["sliding_attention", "full_attention"]
_BYTES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
}
_LATENT = {"num_key_value_heads": 4}
_MAMBA = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_hidden_layers": 4,
}

#: What a type wants otherwise; None: not set.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        _LATENT,
    ),
    **dict.fromkeys(("minicpm3", "youtu", "longcat_flash", "hy_v4"), _LATENT),
    "blt": {
        "patcher_config": _BYTES | {"num_hidden_layers": 2},
        "encoder_config": _BYTES | {"num_hidden_layers": 1, "hidden_size_global": 64},
        "decoder_config": _BYTES | {"num_hidden_layers": 2, "hidden_size_global": 64},
        "global_config": _BYTES | {"hidden_size": 64},
        "encoder_hash_byte_group_vocab": 40,
        "encoder_hash_byte_group_size": [2, 3],
    },
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 500.0} for kind in _BOTH},
        "layer_types": _BOTH,
        "num_hidden_layers": 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 500.0, "clip_qkv": 4.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "index_head_dim": 16,
        "head_dim": 16,
        "layer_types": ["indexed_attention"] * 3,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "git": {"vision_config": _IMAGE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "phi4_multimodal": {
        "vision_config": _IMAGE | {"crop_size": 32, "image_token_id": 3},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "audio_token_id": 4,
        },
        "head_dim": None,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 9],
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 5,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "zamba": _MAMBA,
    "zamba2": _MAMBA,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

#: Types that Photon refuses, and why.
SKIPPED = dict.fromkeys(
    (
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_assistant",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "got_ocr2",
        "llama4",
        "mllama",
        "moss_transcribe_diarize",
        "musicgen",
        "musicgen_melody",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
    ),
    "joins a text model with one of images or sound; the text part has a type of its own",
)


def fields(model_type: str) -> dict[str, Any]:
    """Return the fields of a small configuration."""
    kind = CONFIG_MAPPING[model_type]
    declared = {field.name for field in dataclasses.fields(kind)}
    chosen = {name: value for name, value in SIZES.items() if name in declared} | OWN.get(model_type, {})
    return {name: value for name, value in chosen.items() if value is not None}


def save(model_type: str, folder: Path, **changes: Any) -> None:
    """Let transformers save a model of which no tensor is as the class initialises it."""
    kind = CONFIG_MAPPING[model_type]
    own = fields(model_type) | changes
    default = kind(**own)
    if hasattr(default, "is_decoder"):
        own["is_decoder"] = True
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(token := getattr(default, name, None), int) and token >= own["vocab_size"]:
            own[name] = 2
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(**own))
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn_like(tensor))
    model.save_pretrained(folder)

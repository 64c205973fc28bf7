"""Tiny random models of every MoE type transformers knows, from configs alone: no downloads."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from tiny_images import TEXT_PARTS, TEXT_TYPES, whole_settings
from transformers import CONFIG_MAPPING

from foreroute.data.adapters.model_class import auto_class, writing_part

VOCAB_SIZE = 128
NUM_EXPERTS = 8
WEIGHT_SPREAD = 0.08

SUPPORTED = [
    "afmoe",
    "aria",
    "aria_text",
    "axk1",
    "axk2",
    "cohere2_moe",
    "deepseek_ocr2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
    "exaone_moe",
    "flex_olmo",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling_mm_model",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "laguna",
    "lfm2_moe",
    "llama4",
    "llama4_text",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl",
    "minimax_m3_vl_text",
    "mistral4",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_vl_moe",
    "qwen4_exp",
    "qwen4_exp_text",
    "solar_open",
    "step3p7",
    "zaya",
]
"""Every type that writes text and whose experts go, or can be made to go, through transformers'
experts interface."""

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 16,
    "num_dense_layers": 1,
    "expert_ffn_hidden_size": 32,
}
"""Given to every config that has a field of that name."""

LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
}
GEMMA4_TEXT = {
    "enable_moe_block": True,
    "top_k_experts": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
}
QWEN4_EXP_TEXT = LINEAR_ATTENTION | {
    "hc_lowrank": 8,
    "layer_types": ["qwen_sparse_attention", "linear_attention", "qwen_sparse_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "mamba_expand": 2,
    },
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 2,
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_latent_size": 32,
        "use_mamba_kernels": False,
    },
    "qwen3_next": LINEAR_ATTENTION,
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "qwen4_exp_text": QWEN4_EXP_TEXT,
    "gemma4_text": GEMMA4_TEXT,
    "ernie4_5_moe": {
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "ernie4_5_vl_moe_text": {
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [32, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
            "partial_rotary_factor": 1.0,
        },
    },
    "glm5_next_text": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "qk_rope_head_dim": 0,
        "index_topk": 8,
        "index_kpool": 2,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "llama4_text": {"num_experts_per_tok": 1},
    "step3p5": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "minimax": {"block_size": 16},
    "phimoe": {"lm_head_bias": True},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "kimi_linear": {
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2},
    },
}
"""What single types need besides, or instead."""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config of that type with 8 experts, 3 layers and 64 hidden units."""
    return _tiny(CONFIG_MAPPING[model_type], overrides)


def _tiny(config_class: Any, overrides: dict[str, Any]) -> Any:
    fields = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        fields |= {f.name for f in dataclasses.fields(config_class)}
    aliases = getattr(config_class, "attribute_map", {})
    fields |= set(aliases)
    if TEXT_PARTS & fields:
        (key,) = TEXT_PARTS & fields
        own = TEXT_TYPES.get(config_class.model_type)
        text = _tiny(CONFIG_MAPPING[own] if own else config_class.sub_configs[key], overrides)
        return config_class(**whole_settings(config_class.model_type, fields, text.to_dict()))
    overridden = {aliases.get(name, name) for name in overrides}
    settings = {
        name: value
        for name, value in SMALL.items()
        if name in fields and aliases.get(name, name) not in overridden
    }
    if "kv_lora_rank" in settings:  # latent attention has one key-value head per head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return config_class(**(settings | SPECIAL.get(config_class.model_type, {}) | overrides))


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """A model of that type in eval mode; every parameter is random, none zero.

    Args:
        model_type: As in `config.model_type`.
        seed: Of the weights.
        dtype: Of the weights.
        **overrides: Fields of the (text) config.
    """
    torch.manual_seed(seed)
    config = writing_part(tiny_config(model_type, **overrides))
    model = auto_class(config).from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, WEIGHT_SPREAD, generator=generator)
            elif "bias" not in name:  # norms and scales: near one, but not one
                parameter.add_(torch.rand(parameter.shape, generator=generator) * WEIGHT_SPREAD)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer.uniform_(-0.05, 0.05, generator=generator)
            if name.endswith("tid2eid"):  # hash routing: token -> distinct experts
                rows = torch.rand(len(buffer), NUM_EXPERTS, generator=generator)
                buffer.copy_(rows.argsort(-1)[:, : buffer.shape[1]])
    return model.eval().requires_grad_(False)

"""What tiny models that take images need besides their text: how their parts are made small."""

from __future__ import annotations

from typing import Any

TEXT_PARTS = {"text_config", "thinker_config"}
"""What the config of a whole calls its text model."""
TEXT_TYPES = {"minimax_m3_vl": "minimax_m3_vl_text", "mistral3": "mistral4"}
"""The text model's type, where the whole's config does not say it."""
IMAGE_TOKEN = 120
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "projection_intermediate_size": 32,
    "position_embedding_size": 64,
}
SMALL_AUDIO: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "downsample_hidden_size": 8,
    "output_dim": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "text_hidden_size": 64,
}
TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "image_token_index": IMAGE_TOKEN,
    "video_token_id": 121,
    "video_token_index": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
    "image_start_token_id": 122,
    "image_end_token_id": 123,
    "video_start_token_id": 124,
    "video_end_token_id": 125,
    "audio_token_id": 126,
    "audio_start_token_id": 127,
    "boi_token_id": 122,
    "eoi_token_id": 123,
    "boi_token_index": 122,
    "eoi_token_index": 123,
}
WHOLE: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 122, "vision_end_token_id": 123},
}
VISION: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {
        "sam_config": SMALL_VISION
        | {
            "output_channels": 8,
            "global_attn_indexes": [0],
            "window_size": 2,
            "downsample_channels": [16, 32],
        },
        "encoder_config": dict(SMALL_VISION),
    },
    "inkling_mm_model": {"text_hidden_size": 64},
}
"""What single types need besides."""


def whole_settings(model_type: str, fields: set[str], text: dict[str, Any]) -> dict[str, Any]:
    """The settings of a whole, from those of its text model."""
    parts = {
        "text_config": text,
        "thinker_config": text,
        "vision_config": SMALL_VISION | VISION.get(model_type, {}),
        "audio_config": dict(SMALL_AUDIO),
    }
    every = TOKENS | parts
    own = WHOLE.get(model_type, {})
    return {name: value for name, value in every.items() if name in fields} | own

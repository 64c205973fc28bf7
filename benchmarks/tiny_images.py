"""What tiny models that take images need besides their text: how their parts are made small."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

TEXT_PARTS = {"text_config", "thinker_config"}
"""What the config of a whole calls its text model."""
TEXT_TYPES = {
    "internvl": "qwen3_moe",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "mistral3": "mistral4",
}
"""The text model's type, where the whole takes any."""
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
    "aria": {"projector_patch_to_query_dict": {"16": 4}},
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
    "llama4": {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "intermediate_size": 128,
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


def takes_images(model: Any) -> bool:
    """Whether a model reads images."""
    return hasattr(model.base_model, "get_image_features")


def image_prompt(model: Any) -> tuple[Tensor, dict[str, Any]]:
    """A prompt of text, a made-up image and text, and what goes with it.

    The image is random numbers in the layout that transformers' processor gives for this model.

    Args:
        model: A tiny one that reads images.

    Returns:
        Tokens [1, T], and the other arguments of `generate` but the attention mask.
    """
    generator = torch.Generator().manual_seed(7)
    image = _image(model, generator)
    with torch.no_grad():
        found = _features(model, image)
    features = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
    is_image = torch.zeros(1, 7 + features.flatten(0, -2).shape[0], dtype=torch.long)
    is_image[:, 4:-3] = 1
    text = torch.randint(3, 100, is_image.shape, generator=generator)
    tokens = torch.where(is_image.bool(), IMAGE_TOKEN, text)
    named = inspect.signature(model.forward).parameters
    types = {name: is_image for name in ("mm_token_type_ids",) if name in named}
    return tokens, image | types


def _features(model: Any, image: dict[str, Any]) -> Any:
    asked = inspect.signature(model.base_model.get_image_features).parameters
    chosen = "vision_feature_select_strategy"
    others = {chosen: "default"} if chosen in asked else {}
    output = model.base_model.get_image_features(**image, **others, return_dict=True)
    return output.last_hidden_state if output.pooler_output is None else output.pooler_output


def _image(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """The pixels of one image of 16 x 16 and what says how they lie, by what the model asks for."""
    config = model.config.vision_config
    asked = inspect.signature(model.base_model.get_image_features).parameters
    patch, side = 4, 4  # pixels of a patch, patches of an image
    if "image_grid_thw" in asked:
        width = 3 * getattr(type(config), "temporal_patch_size", 1) * patch * patch
        pixels = torch.rand(side * side, width, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
    if "image_position_ids" in asked:
        at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
        pixels = torch.rand(1, side * side, 3 * patch * patch, generator=generator)
        return {"pixel_values": pixels, "image_position_ids": at.unsqueeze(0)}
    if hasattr(type(config), "temporal_patch_size"):  # patches apart, channels last
        size = side, config.temporal_patch_size, patch, patch, 3
        return {"pixel_values": torch.rand(size, generator=generator)}
    whole = torch.rand(1, 3, patch * side, patch * side, generator=generator)
    if "image_sizes" in asked:
        return {"pixel_values": whole, "image_sizes": torch.tensor([[patch * side] * 2])}
    return {"pixel_values": whole}

"""How many cache slots a layer gets: as asked for, or what fits beside everything else."""

from __future__ import annotations

from typing import Any

RESERVE_BYTES = int(1.5 * 2**30)
"""Device memory left for CUDA itself, activations and fragmentation."""
PREFILL_GROUP = 16
"""Experts of a prompt's layer that are copied and multiplied together; fewer if they are large."""
PREFILL_BYTES = 256 << 20
"""Largest group as it is copied, unless one expert is larger; two are held."""
DECODING_BYTES = 1 << 30
"""Device memory for decoding a group that is stored in fewer bits; within what is reserved."""
DECODING_BYTES_PER_WEIGHT = 16
"""Codes, indices and float32 numbers at once."""


def parse_slots(text: str | int, *, num_experts: int, top_k: int) -> int:
    """Turn `8` or `25%` into slots per layer.

    Args:
        text: A number of slots, or a share of the experts with a percent sign.
        num_experts: E.
        top_k: K; fewer slots could not hold one token's experts.

    Raises:
        ValueError: If it is not a number, or the slots do not lie in top_k..num_experts.
    """
    word = str(text).strip()
    try:
        slots = round(float(word[:-1]) / 100 * num_experts) if word.endswith("%") else int(word)
    except ValueError:
        raise ValueError(
            f"expert_slots must be a number or a percentage such as 25%, not {text!r}."
        ) from None
    if slots > num_experts:
        raise ValueError(
            f"expert_slots {text} is {slots} slots, more than the {num_experts} experts of a layer."
        )
    if slots < top_k:
        raise ValueError(
            f"expert_slots {text} is {slots} of {num_experts} experts, fewer than the {top_k} that "
            f"one token needs; give at least {top_k}."
        )
    return slots


def prefill_group(expert_bytes: int, num_experts: int, decoded_weights: int = 0) -> int:
    """Experts of a prompt's layer that are copied, and multiplied, together.

    Args:
        expert_bytes: Of one expert, as it is copied.
        num_experts: E.
        decoded_weights: Weights of an expert that are decoded first; 0 if they are used as stored.
    """
    that_fit = PREFILL_BYTES // expert_bytes
    if decoded_weights:
        that_fit = min(that_fit, DECODING_BYTES // (DECODING_BYTES_PER_WEIGHT * decoded_weights))
    return max(1, min(PREFILL_GROUP, num_experts, that_fit))


def auto_slots(
    free_bytes: int,
    *,
    expert_bytes: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    reserve_bytes: int = RESERVE_BYTES,
) -> int:
    """Slots per layer that fit: what `--expert-slots auto` means.

    Args:
        free_bytes: Device memory that is free once everything but the experts is loaded.
        expert_bytes: One expert as copied.
        num_layers: L, MoE layers.
        num_experts: E.
        top_k: K, the fewest slots.
        reserve_bytes: To leave free; prefill's buffers come on top.

    Raises:
        ValueError: If not even `top_k` slots fit; says how much is missing.
    """
    buffers = 2 * prefill_group(expert_bytes, num_experts) * expert_bytes
    room = free_bytes - reserve_bytes - buffers
    slots = min(num_experts, room // (num_layers * expert_bytes)) if room > 0 else 0
    if slots < top_k:
        needed = top_k * num_layers * expert_bytes + buffers + reserve_bytes
        raise ValueError(
            f"{free_bytes / 2**30:.1f} GiB are free on the device; {top_k} slots in each of "
            f"{num_layers} layers need {needed / 2**30:.1f} GiB, working space included."
        )
    return int(slots)


def cache_values(text_config: Any, num_layers: int) -> int:
    """Keys and values that transformers keeps for one token of context, in all layers together.

    Layers are taken to attend to everything; those with linear attention keep none. Attention with
    compressed keys and values (MLA) keeps them compressed.

    Args:
        text_config: The model's configuration, its text part.
        num_layers: Decoder layers, where the configuration does not list them.
    """
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * num_layers
    num_layers = sum(kind != "linear_attention" for kind in kinds)
    rank = getattr(text_config, "kv_lora_rank", None)
    if rank:
        return num_layers * int(rank + getattr(text_config, "qk_rope_head_dim", 0))
    heads = int(getattr(text_config, "num_attention_heads", 1))
    kv_heads = int(getattr(text_config, "num_key_value_heads", None) or heads)
    width = int(getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
    return 2 * num_layers * kv_heads * width

"""What no rule of discovery covers, model by model or shape by shape, each with its reason."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

WITHOUT_INTERFACE = {
    "dbrx": "its experts are slices of one flat matrix, in a loop of their own",
    "doge": "its experts are rows of embedding tables, picked by product keys",
    "jetmoe": "its attention is a mixture too, and its experts multiply in a loop of their own",
    "llama4_text": "several experts read each token, and each reads it weighed in another way",
    "longcat_flash": "its identity experts have no weights and share the ids of those that have",
}
"""Models without @use_experts_implementation: transformers does not let anyone take their experts
over, so they are refused with this reason. All others are found by structure."""

PER_TOKEN_TABLE = "tid2eid"
"""Hash routing (deepseek_v4's first layers): a buffer of this name gives the ids from the token
alone, so they are known before the layer runs and no estimator can do better."""

UNCAPTURED = {
    "qwen_sparse_attention": "its sparse attention counts tokens on the host",
    "chunked_attention": "its chunked attention needs a mask that the step does not make",
}
"""Layer types that a captured step cannot hold, though transformers says that their models can be
captured whole."""


def why_not_captured(model: Any) -> str:
    """What is known to keep a decode step of a model out of one CUDA graph; empty if nothing is."""
    if not model._can_compile_fullgraph:  # transformers' own mark
        return "transformers says its forward pass cannot be captured whole"
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return next((UNCAPTURED[kind] for kind in types if kind in UNCAPTURED), "")


def is_hash_routed(part: nn.Module | None) -> bool:
    """Whether a router, or the one in a block, takes ids from a table by token, not from logits."""
    buffers = part.named_buffers() if part is not None else ()
    return any(name.rpartition(".")[2] == PER_TOKEN_TABLE for name, _ in buffers)


def back_projection(block: nn.Module, latent_size: int, hidden_size: int) -> nn.Module | None:
    """The linear map from a latent width back to the hidden size, where experts work in one.

    nemotron_h compresses what the experts read and expands what they put out, in two linear maps
    of the block; whoever speaks of the experts' output means what is added to the residual.

    Args:
        block: Parent of the experts module.
        latent_size: What the experts read and put out.
        hidden_size: D.

    Returns:
        The map, or None if the experts work at the hidden size (or none of that shape is there).
    """
    if latent_size == hidden_size:
        return None
    for child in block.children():
        weight: Any = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (hidden_size, latent_size):
            return child
    return None

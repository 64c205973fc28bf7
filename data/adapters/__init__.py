"""Between foreroute and transformers: load a model, find its MoE layers, take over its experts."""

from foreroute.data.adapters.discovery import MoELayer, MoEModel, discover, find_moe_layers
from foreroute.data.adapters.loading import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from foreroute.data.adapters.probe import first_tensor, router_logits_of
from foreroute.data.adapters.seam import (
    ExpertsView,
    combine,
    grouped_function,
    is_adapted,
    routed_through,
    stock_experts_function,
    unweighted_outputs,
)

__all__ = [
    "ExpertsView",
    "MoELayer",
    "MoEModel",
    "combine",
    "discover",
    "find_moe_layers",
    "first_tensor",
    "grouped_function",
    "is_adapted",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
    "routed_through",
    "router_logits_of",
    "stock_experts_function",
    "unweighted_outputs",
]

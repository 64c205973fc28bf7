"""Decode attention through transformers' registry; what the kernel cannot do stays as it was."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foreroute.runtime.device.fusions.deferred import Deferred, Known, settled
from foreroute.runtime.device.kernels.attention import can_attend, decode_attention

ATTENTION_NAME = "foreroute_decode"
CONFIG_FIELD = "_attn_implementation_internal"


def _configs(model: Any) -> list[Any]:
    """The configurations of a model's modules that name an attention function, each once."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config for config in found.values() if getattr(config, CONFIG_FIELD, None) is not None]


def attention_kinds(model: Any) -> set[str]:
    """The names of the attention functions of a model's configurations."""
    return {getattr(config, CONFIG_FIELD) for config in _configs(model)}


def fuse_attention(model: Any, undo: ExitStack, counts: Counter[str] | None = None) -> int:
    """Compute attention of single tokens under boolean masks by one kernel.

    Args:
        model: Transformers model; each of its attention configurations is switched.
        undo: Gets the callbacks that switch back.
        counts: See `Source`; if None, nothing that follows is deferred.

    Returns:
        How many configurations were switched.
    """
    switched = 0
    for config in _configs(model):
        original = getattr(config, CONFIG_FIELD)
        if original == ATTENTION_NAME:
            continue
        name = f"{ATTENTION_NAME}_{original}"
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attend, original=original, counts=counts))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
        setattr(config, CONFIG_FIELD, name)
        undo.callback(setattr, config, CONFIG_FIELD, original)
        switched += 1
    return switched


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    original: str,
    counts: Counter[str] | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it; `s_aux` are its attention sinks."""
    query, key, value = settled(query), settled(key), settled(value)
    if position_bias is None and can_attend(query, key, value, attention_mask):
        assert attention_mask is not None
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = decode_attention(
            query, key, value, attention_mask, scaling=scaling, softcap=softcap, sinks=s_aux
        )
        if counts is None:
            return output, None
        state = Known(output.view(len(output), -1), counts)
        return Deferred(state, output.shape, output.dtype, output.device), None
    named = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
    settings |= {name: given for name, given in named.items() if given is not None}
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
    if original == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = additive(attention_mask, query.dtype)
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, scaling=scaling, **settings
    )
    return result


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to scores: 0 where seen, the least number elsewhere."""
    unseen = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, unseen)

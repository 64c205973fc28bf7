"""Runs a layer's own attention early, on an approximation of what it will read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from foreroute.data.adapters.discovery import MoELayer, MoEModel
from foreroute.data.adapters.probe import PROBE_TOKENS, Call, first_tensor, is_same_memory
from foreroute.data.adapters.seam import routed_through

TOLERANCE = 2e-2  # of the largest residual: two ways to round in bfloat16
CACHE_NAME = "past_key_values"
HIDDEN_NAME = "hidden_states"
WRITTEN_AGAIN = "is_written_again"
"""A cache layer that says so of itself overwrites in the true run what an early one wrote."""
GROWING_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Cache layers that make new tensors for a new token; others may write into those they have."""
KIND_ATTRIBUTES = ("sliding_window", "is_sliding", "attention_type", "layer_type")


def decoder_layer(moe: MoEModel, layer: MoELayer) -> nn.Module:
    """The decoder layer that an MoE layer lies in; its first argument is the residual stream."""
    parts = layer.name.split(".")
    end = next(i for i, part in enumerate(parts) if part.isdigit())
    module: nn.Module = moe.model.get_submodule(".".join(parts[: end + 1]))
    return module


@dataclass(frozen=True, kw_only=True)
class EarlyAttention:
    """The attention of a decoder layer that adds `attention(input_norm(x))` to the residual x."""

    input_norm: nn.Module
    attention: nn.Module
    settings_from: nn.Module | None = None
    """Attention of an earlier layer that is called with the same mask and positions before the
    experts of the MoE layer in front are computed; None if there is none."""

    def step(self, residual: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The residual after attention, were the layer to read this residual, while decoding.

        Args:
            residual: Approximate residual stream of one new token per sequence, [B, 1, D].
            settings: What an attention module is called with besides; a cache in them holds the
                past, and is left as it is.

        Returns:
            `residual` plus what attention adds, [B, 1, D].
        """
        cache = settings.get(CACHE_NAME)
        if cache is not None:
            layer_idx: Any = self.attention.layer_idx
            settings = {**settings, CACHE_NAME: _shadow(cache, layer_idx)}
        approximate = self.input_norm.forward(residual)
        return residual + _hidden_of(self.attention.forward(approximate, **settings))

    def run(self, residual: Tensor, true_input: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The residual after attention, were the layer to read this residual.

        Every token attends to the true past and to its own approximation, as it would while the
        model generates: only the last token's state is not known yet.

        Args:
            residual: Approximate residual stream that enters the layer, [B, S, D].
            true_input: What the attention reads in the true pass, after its norm, [B, S, D].
            settings: The other arguments of the true call; a cache in them is left as it is, and
                may hold the past of one more token (S is 1 then) or nothing.

        Returns:
            `residual` plus what attention adds, [B, S, D].

        Raises:
            ValueError: If the mask is none that can be extended.
        """
        cache = settings.get(CACHE_NAME)
        if cache is not None and cache.get_seq_length(self.attention.layer_idx) > 0:
            return self.step(residual, settings)
        approximate = self.input_norm.forward(residual)
        # The true tokens first, then their approximations, which see the true ones before them.
        length = residual.shape[1]
        settings = {name: _twice(value, length) for name, value in settings.items()}
        settings["attention_mask"] = _mask_of_both(settings.get("attention_mask"), true_input)
        settings[CACHE_NAME] = None
        both = torch.cat([true_input, approximate], dim=1)
        return residual + _hidden_of(self.attention.forward(both, **settings))[:, length:]


def find_early_attention(
    moe: MoEModel,
    *,
    what: str = "readout cannot be recorded from",
    remedy: str = "Leave readout out of --record.",
) -> dict[int, EarlyAttention]:
    """The attention of every MoE layer but the first, found and checked by one tiny forward pass.

    The experts are left out of it: their weights need not be there.

    Args:
        moe: The model.
        what: Begins the message of a refusal; the model's name follows.
        remedy: Ends it.

    Returns:
        By decoder layer index.

    Raises:
        ValueError: If a layer is not `x + attention(norm(x))`, then its MoE; says which.
    """
    watchers = [_Watcher(moe, layer) for layer in moe.layers[1:]]
    with contextlib.ExitStack() as stack:
        for watcher in watchers:
            stack.enter_context(watcher)
        settings_of = _probed_settings(moe)
    found = {}
    for before, layer, watcher in zip(moe.layers, moe.layers[1:], watchers, strict=False):
        site = watcher.site()
        if site is None:
            raise ValueError(
                f"{what} {moe.geometry.model_name} ({moe.geometry.model_type}): decoder layer "
                f"{layer.layer_idx} is not x + attention(norm(x)) before its experts. {remedy}"
            )
        donor = _donor(site.attention, settings_of, before.layer_idx, moe.model.config)
        found[layer.layer_idx] = dataclasses.replace(site, settings_from=donor)
    return found


def _probed_settings(moe: MoEModel) -> dict[nn.Module, dict[str, Any]]:
    """One tiny forward pass without experts: what every module of a decoder layer is called with.

    Only of modules that know their layer, without what they read.
    """
    seen: dict[nn.Module, dict[str, Any]] = {}

    def see(module: nn.Module, arguments: Any, settings: Any) -> None:
        seen[module] = {name: value for name, value in settings.items() if name != HIDDEN_NAME}

    def left_out(_: nn.Module, hidden: Tensor, *__: Tensor) -> Tensor:
        return torch.zeros_like(hidden)

    tokens = torch.arange(3, 3 + PROBE_TOKENS, device=moe.model.device).unsqueeze(0)
    handlers = {layer.experts: left_out for layer in moe.layers}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in moe.model.modules():
            if hasattr(module, "layer_idx"):
                handle = module.register_forward_pre_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(routed_through(moe.model, handlers))
        moe.model.base_model(input_ids=tokens, use_cache=False)
    return seen


def _donor(
    attention: Any, settings_of: Mapping[nn.Module, dict[str, Any]], last_idx: int, config: Any
) -> nn.Module | None:
    """The last attention, up to a decoder layer, whose settings are those of a later one."""
    kind = _kind(attention, config)
    earlier: list[Any] = [
        module
        for module in settings_of
        if isinstance(module.layer_idx, int)
        and module.layer_idx <= last_idx
        and _kind(module, config) == kind
    ]
    donor = max(earlier, key=lambda module: module.layer_idx, default=None)
    if donor is None or not _is_same(settings_of[donor], settings_of[attention]):
        return None
    return donor  # type: ignore[no-any-return]


def _kind(attention: Any, config: Any) -> tuple[Any, ...]:
    """What decides which mask and positions a model hands to an attention module."""
    types = getattr(config.get_text_config(), "layer_types", None)
    own_type = types[attention.layer_idx] if types else None
    return type(attention), own_type, *(getattr(attention, n, None) for n in KIND_ATTRIBUTES)


def _is_same(left: Any, right: Any) -> bool:
    """Whether two settings, or two tensors in them, are equal."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_is_same(left[n], right[n]) for n in left)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_is_same, left, right))
    return left is right or bool(left == right)


class _Watcher(contextlib.ExitStack):
    """While open, sees what one decoder layer reads, its children do, and its router's norm reads.

    Keeps the tensors, so that no memory is used twice, and copies of those that a model may change.
    """

    def __init__(self, moe: MoEModel, layer: MoELayer) -> None:
        super().__init__()
        self._calls: list[Call] = []
        self._read: dict[str, tuple[Tensor, Tensor]] = {}  # the tensor itself, and a copy
        decoder = decoder_layer(moe, layer)
        for child in decoder.children():
            self.callback(child.register_forward_hook(self._see_call, with_kwargs=True).remove)
        for name, module in {"layer": decoder, "experts": layer.residual_source}.items():
            hook = functools.partial(self._see_input, name)
            self.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _see_call(self, module: nn.Module, arguments: Any, settings: Any, output: Any) -> None:
        self._calls.append(Call(module, arguments, settings, output))

    def _see_input(self, name: str, _: nn.Module, arguments: Any, settings: Any) -> None:
        tensor = first_tensor(arguments, settings)
        self._read[name] = tensor, tensor.clone()

    def site(self) -> EarlyAttention | None:
        """Norm and attention of the layer, if running them again gives its true residual."""
        (own, layer_input), (_, residual) = self._read["layer"], self._read["experts"]
        norm = next((call for call in self._calls if _reads(call, own)), None)
        if norm is None or not isinstance(norm.output, Tensor):
            return None
        attention = next((call for call in self._calls if _reads(call, norm.output)), None)
        if attention is None or not hasattr(attention.module, "layer_idx"):
            return None
        site = EarlyAttention(input_norm=norm.module, attention=attention.module)
        true_input, settings = split_input(attention.arguments, attention.settings)
        try:
            again = site.run(layer_input, true_input, settings).flatten(0, -2)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None
        residual = residual.flatten(0, -2)
        is_equal = torch.allclose(again, residual, atol=TOLERANCE * float(residual.abs().max()))
        return site if is_equal else None


def split_input(
    arguments: tuple[Any, ...], settings: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What an attention module reads, and its other arguments by name."""
    rest = {name: value for name, value in settings.items() if name != HIDDEN_NAME}
    hidden: Tensor = arguments[0] if arguments else settings[HIDDEN_NAME]
    return hidden, rest


def _reads(call: Call, tensor: Tensor) -> bool:
    tensors = [v for v in (*call.arguments, *call.settings.values()) if isinstance(v, Tensor)]
    return bool(tensors) and is_same_memory(tensors[0], tensor)


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _shadow(cache: Any, layer_idx: int) -> Any:
    """A cache in which one layer can take a token without the given cache changing."""
    layers = list(cache.layers)
    if layer_idx < len(layers):
        if getattr(layers[layer_idx], WRITTEN_AGAIN, False):
            return cache
        own = layers[layer_idx]
        layers[layer_idx] = copy.copy(own) if type(own) in GROWING_LAYERS else copy.deepcopy(own)
    shadow = copy.copy(cache)
    shadow.layers = layers
    return shadow


def _twice(value: Any, length: int) -> Any:
    """What describes positions, for the same positions twice; all else as it is."""
    if isinstance(value, tuple):
        return tuple(_twice(part, length) for part in value)
    if isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] == length:
        return torch.cat([value, value], dim=1)
    return value


def _mask_of_both(mask: Any, hidden: Tensor) -> Tensor:
    """Mask over true tokens and approximations, to be added to the scores, [B or 1, 1, 2S, 2S]."""
    length = hidden.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=hidden.device)
    if mask is None:
        mask = torch.ones_like(own).tril().view(1, 1, length, length)
    if not isinstance(mask, Tensor) or mask.shape[-2:] != own.shape:
        raise ValueError(f"attention masks of kind {type(mask).__name__} are not understood")
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    own = own.expand_as(mask)
    true_rows = torch.cat([mask, torch.zeros_like(mask)], dim=-1)
    rows = torch.cat([mask & ~own, own], dim=-1)
    is_seen = torch.cat([true_rows, rows], dim=-2)
    added = torch.zeros(is_seen.shape, dtype=hidden.dtype, device=hidden.device)
    return added.masked_fill(~is_seen, torch.finfo(hidden.dtype).min)

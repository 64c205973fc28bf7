"""Runs one MoE block of a model that has no weights, on random ones, to see how it routes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters.probe import Call, Observed, is_same_memory, watched

WEIGHT_SPREAD = 0.05


def replay(model: Any, block: nn.Module, seen: Observed, calls: list[Call]) -> Observed:
    """Repeat a block's call on the CPU with random weights and inputs, experts left out.

    Args:
        model: On the meta device.
        block: Parent of the experts module.
        seen: What the probe saw there.
        calls: All calls of the probe.

    Returns:
        The same as `seen`, with numbers in it.
    """
    numbers = _Numbers()
    call = next(call for call in calls if call.module is block)
    # The copy keeps the model's own config, through which its experts are redirected.
    configs = [m.config for m in block.modules() if hasattr(m, "config")]
    stand_in = copy.deepcopy(block, {id(config): config for config in configs})
    pairs = zip(block.modules(), stand_in.modules(), strict=True)
    experts = next(copied for own, copied in pairs if own is seen.experts)
    numbers.fill(stand_in, but_not=experts)
    parts = [stand_in]
    norm_call = next((c for c in calls if c.module is seen.norm), None)
    if norm_call is not None and norm_call.module not in set(block.modules()):
        parts.append(numbers.fill(copy.deepcopy(norm_call.module)))
    with torch.no_grad(), watched(model, parts, [experts]) as watcher:
        known: list[tuple[Tensor, Tensor]] = []
        if norm_call is not None and len(parts) > 1:
            normed = parts[1](*numbers.like(norm_call.arguments, known))
            known.append((norm_call.output, normed))
        stand_in(*numbers.like(call.arguments, known), **numbers.like(call.settings, known))
    return watcher.seen[experts]


class _Numbers:
    """Random numbers in the place of tensors without any."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def fill(self, part: nn.Module, but_not: nn.Module | None = None) -> nn.Module:
        """Give the parameters and buffers of a meta module memory and numbers, float32."""
        for module in part.modules():
            if module is but_not:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(self._random(parameter), requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, self._random(buffer))
        return part

    def like(self, value: Any, known: list[tuple[Tensor, Tensor]]) -> Any:
        """The same arguments with numbers: those of `known` where it is their memory."""
        if isinstance(value, Tensor):
            for original, numbers in known:
                if is_same_memory(value, original):
                    return numbers.view(value.shape)
            return self._random(value, spread=1.0)
        if isinstance(value, tuple):
            return tuple(self.like(part, known) for part in value)
        if isinstance(value, dict):
            return {name: self.like(part, known) for name, part in value.items()}
        return value

    def _random(self, tensor: Tensor, spread: float = WEIGHT_SPREAD) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        numbers = torch.randn(tensor.shape, generator=self._generator) * spread
        return numbers + 1.0 if tensor.dim() == 1 and spread < 1 else numbers

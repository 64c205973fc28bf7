"""States in eight bits: one scale per token, the largest feature of a token at 127."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
SMALLEST_SCALE = 1e-30


def to_int8(states: Tensor) -> tuple[Tensor, Tensor]:
    """Round states to eight bits.

    Args:
        states: [T, D], float.

    Returns:
        [T, D] int8, and the scale of each token, [T] float32.
    """
    states = states.float()
    scales = (states.abs().amax(dim=-1) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (states / scales.unsqueeze(-1)).round().to(torch.int8), scales


def from_int8(rounded: Tensor, scales: Tensor) -> Tensor:
    """The states that were rounded, [T, D] float32, to half a scale."""
    return rounded * scales.unsqueeze(-1)

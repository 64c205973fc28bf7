"""What the layers of an engine share where the GPU decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.fetch import BLOCK_WORDS, WORD
from foreroute.runtime.device.predictor import DevicePredictor
from foreroute.runtime.driver import RunState
from foreroute.runtime.policies.eviction import ScoreRule


@dataclass(kw_only=True)
class DeviceRun(RunState):
    """Settings, shared tensors and counters of one engine."""

    rule: ScoreRule
    """How experts are scored for eviction."""
    form: ExpertForm
    predictor: DevicePredictor | None
    ahead: torch.cuda.Stream
    """Predictions and prefetches run here, beside the compute."""
    head_words: Tensor
    """Where an expert's head ends, [1] int32 on the device; see `fetch`."""
    trust: Tensor
    """See `ResidencyTables`."""
    prompt_weight: float
    """What one use by a prompt counts for eviction, in uses by a decode step."""

    def set_head(self, share: float, row_bytes: int) -> None:
        """Make heads this share of an expert, in whole blocks of the fetch kernel.

        Args:
            share: 0..1.
            row_bytes: Of an expert.
        """
        words = row_bytes // WORD.itemsize
        blocks = max(1, round(share * words / BLOCK_WORDS))
        self.head_words.fill_(min(words, blocks * BLOCK_WORDS))

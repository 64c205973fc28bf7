"""What the layers of an engine share where the GPU decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.fetch import BLOCK_WORDS, WORD
from foreroute.runtime.device.kernels.tables import MOST_EARLY
from foreroute.runtime.device.predictor import DevicePredictor
from foreroute.runtime.driver import RunState
from foreroute.runtime.policies.eviction import ScoreRule
from foreroute.runtime.store.staging import Staging

MOST_WHOLE = MOST_EARLY - 1
"""Experts copied early for one layer, besides the head of one more."""


@dataclass(kw_only=True)
class DeviceRun(RunState):
    """Settings, shared tensors and counters of one engine."""

    rule: ScoreRule
    """How experts are scored for eviction."""
    form: ExpertForm
    predictor: DevicePredictor | None
    ahead: torch.cuda.Stream
    """Predictions and prefetches run here, beside the compute."""
    behind: torch.cuda.Stream
    """What nobody waits for is copied here, until the forward pass is over."""
    head_words: Tensor
    """Where an expert's head ends, [1] int32 on the device; see `fetch`."""
    num_whole: Tensor
    """Experts copied early before that head, [1] int32 on the device; see `plan_head`."""
    trust: Tensor
    """See `ResidencyTables`."""
    lead: Tensor | None
    """See `ResidencyTables`; None unless the rule is adaptive."""
    prompt_weight: float
    """What one use by a prompt counts for eviction, in uses by a decode step."""
    staging: Staging | None = None
    """Where the host hands out experts that are not page-locked; None where all are."""
    is_copying_behind: bool = False
    """Whether something is copied behind the layers that nothing has waited for."""

    def fork_behind(self) -> torch.cuda.Stream:
        """The stream to copy on behind what has been launched so far."""
        self.behind.wait_stream(torch.cuda.current_stream())
        self.is_copying_behind = True
        return self.behind

    def join_behind(self) -> None:
        """Let what is copied behind the layers, if anything is, be there for what comes next.

        A graph that is captured cannot wait for a stream on which it has launched nothing.
        """
        if self.is_copying_behind:
            torch.cuda.current_stream().wait_stream(self.behind)
            self.is_copying_behind = False

    def set_room(self, experts: float, row_bytes: int) -> None:
        """Say how much can be copied early: whole experts, and a head in whole blocks of `fetch`.

        Args:
            experts: As many as there is time for, 0 or more; at most `MOST_WHOLE` and a head.
            row_bytes: Of an expert.
        """
        words = row_bytes // WORD.itemsize
        whole = min(MOST_WHOLE, int(experts))
        blocks = round(min(experts - whole, 1.0) * words / BLOCK_WORDS)
        if not whole:
            blocks = max(1, blocks)
        self.num_whole.fill_(whole)
        self.head_words.fill_(min(words, blocks * BLOCK_WORDS))

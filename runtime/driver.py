"""What an engine asks of whoever decides which experts are where: the host, or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from foreroute.runtime.config import EngineConfig
from foreroute.runtime.stats import PhaseStats, RuntimeStats

MOST_STEP_TOKENS = 8
"""Tokens of each sequence that a decode step may have; more after a past are read as a prompt."""


@dataclass(kw_only=True)
class RunState:
    """What an engine, its driver and its layers share about the forward pass at hand."""

    config: EngineConfig
    stats: RuntimeStats = field(default_factory=RuntimeStats)
    is_prefill: bool = True
    """Whether the forward pass at hand reads a prompt (else it is one decode step)."""
    num_tokens: int = 1
    """Tokens of each sequence in the forward pass at hand."""
    is_looking_ahead: bool = True
    """Whether decode steps of one token predict; on a GPU, whether the one being captured does."""

    @property
    def phase(self) -> PhaseStats:
        """Counters of the phase that is running."""
        return self.stats.prefill if self.is_prefill else self.stats.decode

    @property
    def looks_ahead(self) -> bool:
        """Whether the forward pass at hand predicts: a decode step of several tokens never does."""
        return self.is_looking_ahead and not self.is_prefill and self.num_tokens == 1

    def begin_forward(self, tokens: Tensor, has_past: Callable[[], bool]) -> None:
        """Count a forward pass: a decode step, or prefill.

        One token per sequence is a decode step, and so are up to `MOST_STEP_TOKENS` after a past,
        which is how assisted decoding verifies what was drafted.

        Args:
            tokens: Ids [B, T], or embeddings [B, T, D].
            has_past: Whether the pass goes on after tokens that are in a cache; asked only where
                that decides, for the answer may have to come off the device.
        """
        self.num_tokens = tokens.shape[1]
        is_short = self.num_tokens <= MOST_STEP_TOKENS
        self.is_prefill = self.num_tokens > 1 and not (is_short and has_past())
        self.phase.forwards += 1


class DrivenLayer(Protocol):
    """The function in the place of one MoE layer's experts."""

    layer_idx: int
    """Decoder layer index."""
    num_calls: int
    """Forward passes that went through it."""

    def __call__(
        self, experts: nn.Module, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Compute the experts [T, K] of the router's choice for [T, D]; returns [T, D]."""
        ...


class Driver(Protocol):
    """Keeps the right experts of every layer in its slots while one engine runs."""

    @property
    def run(self) -> RunState:
        """What it shares with its layers."""
        ...

    @property
    def layers(self) -> Sequence[DrivenLayer]:
        """One for each MoE layer, in order."""
        ...

    def attach(self, undo: ExitStack) -> None:
        """Watch what the layers read of the model besides their own inputs.

        Args:
            undo: Gets what takes the hooks off again.
        """
        ...

    def begin_forward(self, tokens: Tensor, has_past: Callable[[], bool]) -> None:
        """A forward pass begins; see `RunState.begin_forward`."""
        ...

    def end_forward(self) -> None:
        """The forward pass is over, and no other has begun."""
        ...

    def forget(self) -> None:
        """Empty every slot and drop what was captured: nothing of it need be right any more."""
        ...

    def decoding(self, settings: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """What else transformers' `generate` is called with, to decode in this driver's way.

        Args:
            settings: What `generate` was asked for: its arguments, else its config's fields.
            streamer: Gets the tokens.
        """
        ...

    def stats(self) -> RuntimeStats:
        """Counters and times since the start or the last `reset_stats`; live, not a copy."""
        ...

    def reset_stats(self) -> None:
        """Start counting anew; resident experts stay."""
        ...

    def fill_slots(self) -> None:
        """Make as many experts resident as fit, lowest ids first, not counted in the statistics."""
        ...

    def warm(self, rows: Sequence[Sequence[Sequence[int]]]) -> None:
        """Fill the slots with what a recording used most, not counted in the statistics.

        Args:
            rows: By layer and token, the experts used, [L][T][K].
        """
        ...

    def check_integrity(self) -> None:
        """Check every layer's slots: tables consistent, and each slot equal to its host row.

        Raises:
            RuntimeError: If not.
        """
        ...

    def close(self) -> None:
        """Let go of what only this driver needs."""
        ...

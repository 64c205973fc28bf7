"""What the runtime did: integer counters, times per token, and the ratios that follow from them."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@dataclass
class PhaseStats:
    """Counters of one phase (prefill or decode), over all MoE layers.

    A lookup is one distinct expert that one layer runs in one forward pass: under speculative
    execution, what the rule has left of the router's choice or put in its place.
    """

    forwards: int = 0
    """Forward passes; in decode each gives one token per sequence, or several where drafts of them
    were right."""
    lookups: int = 0
    hits: int = 0
    """Lookups served from a resident slot."""
    late: int = 0
    """Lookups whose prefetch was asked for but had not landed (late prefetches)."""
    misses: int = 0
    """Lookups fetched on demand."""
    fetched_bytes: int = 0
    """Copied after the true routing was known."""
    prefetches: int = 0
    """Experts copied before it was known."""
    prefetched_bytes: int = 0
    wasted_bytes: int = 0
    """Prefetched, then evicted without ever being used."""

    @property
    def hit_rate(self) -> float:
        """Hits over lookups."""
        return _share(self.hits, self.lookups)

    @property
    def bytes(self) -> int:
        """All bytes copied to slots."""
        return self.fetched_bytes + self.prefetched_bytes


def _sum(parts: list[PhaseStats]) -> PhaseStats:
    names = [f.name for f in dataclasses.fields(PhaseStats)]
    return PhaseStats(**{name: sum(getattr(part, name) for part in parts) for name in names})


@dataclass
class RuntimeStats:
    """Everything one engine counted since its start or the last reset."""

    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)
    steps_ahead: int = 0
    """Decode steps that looked ahead; others ran on demand, because that had not paid."""
    agreed_experts: int = 0
    """How many of them ran."""
    speculated_experts: int = 0
    """Experts that the router chose where a speculative rule decided; in the place of those that
    did not agree others ran, or none."""
    is_speculation_off: bool = False
    """Speculation switched itself off because agreement fell under its floor."""
    ttft_ms: list[float] = field(default_factory=list)
    """Time to first token of each `generate` call."""
    token_ms: list[float] = field(default_factory=list)
    """Time of each later token, first excluded."""

    @classmethod
    def merged(cls, parts: list[RuntimeStats]) -> RuntimeStats:
        """Counters added and times joined, of several runs of one configuration."""
        return cls(
            prefill=_sum([part.prefill for part in parts]),
            decode=_sum([part.decode for part in parts]),
            steps_ahead=sum(part.steps_ahead for part in parts),
            agreed_experts=sum(part.agreed_experts for part in parts),
            speculated_experts=sum(part.speculated_experts for part in parts),
            is_speculation_off=any(part.is_speculation_off for part in parts),
            ttft_ms=[ms for part in parts for ms in part.ttft_ms],
            token_ms=[ms for part in parts for ms in part.token_ms],
        )

    @property
    def tpot_ms(self) -> float:
        """Median time per output token, first excluded; nan if nothing was generated."""
        return statistics.median(self.token_ms) if self.token_ms else float("nan")

    @property
    def hit_rate(self) -> float:
        """Share of decode lookups served from a resident slot."""
        return self.decode.hit_rate

    @property
    def bytes_per_token(self) -> float:
        """Bytes copied to slots per decode step."""
        return _share(self.decode.bytes, self.decode.forwards)

    @property
    def wasted_bytes_per_token(self) -> float:
        """Prefetched bytes never used, per decode step."""
        return _share(self.decode.wasted_bytes, self.decode.forwards)

    @property
    def late_per_token(self) -> float:
        """Late prefetches per decode step."""
        return _share(self.decode.late, self.decode.forwards)

    @property
    def share_ahead(self) -> float:
        """Share of decode steps that looked ahead."""
        return _share(self.steps_ahead, self.decode.forwards)

    @property
    def agreement(self) -> float:
        """Share of the router's experts that ran where a rule decided; 1 where none did."""
        if not self.speculated_experts:
            return 1.0
        return self.agreed_experts / self.speculated_experts

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready counters with the ratios beside them."""
        names = (
            "tpot_ms",
            "hit_rate",
            "bytes_per_token",
            "wasted_bytes_per_token",
            "late_per_token",
            "share_ahead",
            "agreement",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}

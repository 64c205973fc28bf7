"""What a replay counted, and the ratios people read."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from foreroute.runtime.simulator import timeline
from foreroute.runtime.simulator.timeline import Floats


@dataclass
class ReplayCounts:
    """Sums over the decode steps of one replay."""

    tokens: int = 0
    lookups: int = 0
    """Experts asked for."""
    hits: int = 0
    """Lookups of experts that were there in full when the router asked."""
    late: int = 0
    """Lookups of experts that were there in part."""
    time_ms: float = 0.0
    stall_ms: float = 0.0
    """Time spent waiting for the link."""
    fetched: float = 0.0
    """Experts (and parts of one) copied on demand."""
    prefetched: float = 0.0
    """Experts (and parts of one) copied early."""
    wasted: float = 0.0
    """Prefetched experts, parts counted as parts, that were evicted or dropped before use."""
    agreed: int = 0
    """Experts of the router's choice that ran where a rule on a miss decided."""
    chosen: int = 0
    """Experts that it chose there."""
    step_ms: list[float] = field(default_factory=list)
    """Time of each decode step."""

    @classmethod
    def of(cls, counts: Floats, step_ms: list[float]) -> ReplayCounts:
        """From what the inner loops counted, [NUM_COUNTS], and each step's time."""
        return cls(
            tokens=len(step_ms),
            lookups=int(counts[timeline.LOOKUPS]),
            hits=int(counts[timeline.HITS]),
            late=int(counts[timeline.LATE]),
            time_ms=sum(step_ms),
            stall_ms=float(counts[timeline.STALL_MS]),
            fetched=float(counts[timeline.FETCHED]),
            prefetched=float(counts[timeline.PREFETCHED]),
            wasted=float(counts[timeline.WASTED]),
            agreed=int(counts[timeline.AGREED]),
            chosen=int(counts[timeline.CHOSEN]),
            step_ms=step_ms,
        )


@dataclass(frozen=True, kw_only=True)
class SimulationRow:
    """One way to run, and what it would cost."""

    eviction: str
    prefetch: str
    horizon: int
    """Layers ahead; 0 without prefetch."""
    slots: float
    """Mean slots per layer."""
    slots_share: float
    """Slots as a share of the experts, 0..1."""
    hit_rate: float
    tpot_ms: float
    tpot_ms_median: float
    bytes_per_token: float
    wasted_bytes_per_token: float
    stall_ms: float
    """Per token."""
    late_per_token: float
    on_miss: str = "fetch"
    """The rule about experts that are not resident."""
    agreement: float = 1.0
    """Share of the router's experts that ran, 0..1."""
    is_bound: bool = False
    """Whether no engine can reach it."""

    @classmethod
    def of(
        cls,
        counts: ReplayCounts,
        *,
        eviction: str,
        prefetch: str,
        horizon: int,
        slots: float,
        num_experts: int,
        expert_bytes: int,
        on_miss: str = "fetch",
        is_bound: bool = False,
    ) -> SimulationRow:
        """Turn sums into ratios."""
        tokens = max(1, counts.tokens)
        copied = counts.fetched + counts.prefetched
        return cls(
            eviction=eviction,
            prefetch=prefetch,
            horizon=horizon,
            slots=slots,
            slots_share=slots / num_experts,
            hit_rate=counts.hits / max(1, counts.lookups),
            tpot_ms=counts.time_ms / tokens,
            tpot_ms_median=statistics.median(counts.step_ms),
            bytes_per_token=copied * expert_bytes / tokens,
            wasted_bytes_per_token=counts.wasted * expert_bytes / tokens,
            stall_ms=counts.stall_ms / tokens,
            late_per_token=counts.late / tokens,
            on_miss=on_miss,
            agreement=counts.agreed / counts.chosen if counts.chosen else 1.0,
            is_bound=is_bound,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dict(vars(self))

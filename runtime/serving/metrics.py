"""What a server tells Prometheus: times, hits, bytes and the queue, counted answer by answer."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from foreroute.runtime.stats import RuntimeStats

FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class ServerMetrics:
    """One server's figures, in a registry of their own."""

    def __init__(self, num_waiting: Callable[[], int]) -> None:
        """All zero.

        Args:
            num_waiting: Tells how many answers wait, whenever it is asked.
        """
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "foreroute_requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=registry,
        )
        self._ttft = Histogram(
            "foreroute_ttft_seconds",
            "Time to first token, from when the engine begins.",
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "foreroute_tpot_seconds",
            "Time per later token.",
            buckets=TOKEN_S,
            registry=registry,
        )
        names = {
            "lookups": "Distinct experts that decode steps needed, over all layers.",
            "hits": "Those that were resident.",
            "copied_bytes": "Bytes of experts copied to slots.",
            "wasted_bytes": "Of those, prefetched and never used.",
        }
        self._counters = {
            name: Counter(f"foreroute_{name}", about, registry=registry)
            for name, about in names.items()
        }
        self._hit_rate = Gauge("foreroute_hit_rate", "Of the last answer.", registry=registry)
        waiting = Gauge("foreroute_queue_waiting", "Answers that wait.", registry=registry)
        waiting.set_function(num_waiting)

    def count(self, stats: RuntimeStats) -> None:
        """Add what one answer took.

        Args:
            stats: Counted since the last answer's end.
        """
        for ms in stats.ttft_ms:
            self._ttft.observe(ms / 1e3)
        for ms in stats.token_ms:
            self._tpot.observe(ms / 1e3)
        copied = stats.prefill.bytes + stats.decode.bytes
        found = (stats.decode.lookups, stats.decode.hits, copied, stats.decode.wasted_bytes)
        for counter, amount in zip(self._counters.values(), found, strict=True):
            counter.inc(amount)
        if stats.decode.lookups:
            self._hit_rate.set(stats.hit_rate)

    def text(self) -> str:
        """In Prometheus' text form."""
        return generate_latest(self._registry).decode()

"""Times a generation from the outside: one time stamp whenever `generate` hands out a token."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from foreroute.runtime.stats import RuntimeStats


class TimingStreamer:
    """A streamer that notes when tokens come and hands them on to the user's own.

    `generate` calls `put` with the prompt, then with each new token once it is on the host, [B];
    assisted decoding with several at a time, [1, T].
    """

    def __init__(self, stats: RuntimeStats, inner: Any = None) -> None:
        """Time into these statistics.

        Args:
            stats: Gets the time to first token and the time of each later one.
            inner: The user's streamer, or None.
        """
        self._stats = stats
        self._inner = inner
        self._last = time.perf_counter()
        self._num_puts = 0

    def put(self, value: Tensor) -> None:
        """Note the time (the prompt comes first and has none), then hand on."""
        now = time.perf_counter()
        passed_ms = 1e3 * (now - self._last)
        num_tokens = value.shape[1] if value.dim() == 2 else 1
        if self._num_puts == 1:
            self._stats.ttft_ms.append(passed_ms)
            self._stats.token_ms += [0.0] * (num_tokens - 1)  # they came with the first
        elif self._num_puts > 1:
            self._stats.token_ms += [passed_ms / num_tokens] * num_tokens
        if self._num_puts > 0:
            self._last = now
        self._num_puts += 1
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        """Hand on."""
        if self._inner is not None:
            self._inner.end()

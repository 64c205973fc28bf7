"""What looking ahead saves and takes where the host decides, by the host's clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from foreroute.runtime.host.transfers import Transfers
from foreroute.runtime.policies.give_up import Balance, Ledger

TRIAL_STEPS = 16
COPIES = 3
"""Timed, of which the fastest counts."""


class Early(NamedTuple):
    """A prefetch that was asked for."""

    asked_at: float
    """Seconds."""
    num_copies: int
    """Experts that were asked for together."""


class HostLedger(Ledger):
    """Adds up times as layers predict, prefetch, and find what they prefetched."""

    def __init__(self, copy_ms: float = 0.0) -> None:
        """Start at nothing.

        Args:
            copy_ms: One expert over the link.
        """
        self._copy_ms = copy_ms
        self._saved_ms = self._spent_ms = 0.0
        self._closed: Balance | None = None

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time within as taken by looking ahead."""
        start = perf_counter()
        yield
        self._spent_ms += 1e3 * (perf_counter() - start)

    def asked(self, num_copies: int) -> Early:
        """Note that experts are asked for early, now."""
        return Early(perf_counter(), num_copies)

    def count_needed(self, early: Early) -> None:
        """Count an early expert that is needed: what its copy had time for until now is saved."""
        self._saved_ms += self._share_ms(early)

    def count_delay(self, early: Early) -> None:
        """Count an early expert that is not needed: needed copies wait behind the rest of it."""
        self._spent_ms += self._copy_ms - self._share_ms(early)

    def _share_ms(self, early: Early) -> float:
        """The part of one expert's copy that can be done by now, in ms of the link."""
        passed_ms = 1e3 * (perf_counter() - early.asked_at)
        return min(self._copy_ms, passed_ms / early.num_copies)

    def open(self) -> None:
        """Start at nothing."""
        self._saved_ms = self._spent_ms = 0.0

    def close(self, num_steps: int) -> None:
        """Keep the sums."""
        self._closed = Balance(self._saved_ms, self._spent_ms)

    def balance(self) -> Balance | None:
        """The last trial's sums."""
        closed, self._closed = self._closed, None
        return closed


def time_copy(transfers: Transfers, row: Tensor, slot: Tensor) -> float:
    """Milliseconds until one expert has come over the link.

    Args:
        transfers: The link.
        row: An expert, [row_bytes] uint8, on the host.
        slot: An empty slot, [row_bytes] uint8.
    """
    times = []
    for _ in range(COPIES):
        start = perf_counter()
        transfers.copy([(row, slot)]).wait()
        if slot.is_cuda:
            torch.cuda.synchronize(slot.device)
        times.append(1e3 * (perf_counter() - start))
    return min(times)

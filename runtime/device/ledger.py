"""What looking ahead saves on the device, from counters that are copied without waiting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foreroute.runtime.policies.give_up import Balance, Ledger

TRIAL_STEPS = 64


class DeviceLedger(Ledger):
    """Reads the layers' counters at a trial's begin and end."""

    def __init__(
        self, counters: Tensor, saved_ms: Callable[[list[int]], float], spent_ms: float
    ) -> None:
        """Count from here.

        Args:
            counters: Of all layers, [L, C] int32, on the device.
            saved_ms: Time saved in a trial, from the counters' change summed over layers.
            spent_ms: What looking ahead takes in a step.
        """
        self._counters, self._saved_ms, self._spent_ms = counters, saved_ms, spent_ms
        self._num_steps = 0
        self._snapshots: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def open(self) -> None:
        """Copy the counters to the host."""
        self._snapshots = [self._snapshot()]

    def close(self, num_steps: int) -> None:
        """Copy them again."""
        self._num_steps = num_steps
        self._snapshots.append(self._snapshot())

    def _snapshot(self) -> tuple[Tensor, torch.cuda.Event | None]:
        on_gpu = self._counters.is_cuda
        host = torch.empty(self._counters.shape, dtype=torch.int32, pin_memory=on_gpu)
        host.copy_(self._counters, non_blocking=on_gpu)
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        return host, event

    def balance(self) -> Balance | None:
        """The last trial's sums, as soon as its counters are here."""
        if len(self._snapshots) < 2:
            return None
        (before, _), (after, event) = self._snapshots
        if event is not None and not event.query():
            return None
        self._snapshots = []
        saved_ms = self._saved_ms((after - before).sum(0).tolist())
        return Balance(saved_ms, self._spent_ms * self._num_steps)

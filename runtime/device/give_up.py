"""Turns prefetch off while it saves less time than predicting costs; never waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TRIAL_STEPS, REST_STEPS = 64, 448
LOOK_AHEAD, ON_DEMAND = 0, 1
"""Variants of the decode step."""


class GiveUp:
    """Chooses for every decode step whether it looks ahead.

    Every 512 steps the first 64 look ahead whatever came before; their counters decide on the rest.
    """

    def __init__(
        self, counters: Tensor, saved_ms: Callable[[list[int]], float], cost_ms: float
    ) -> None:
        """Begin with a trial.

        Args:
            counters: Of all layers, [L, C] int32, on the device.
            saved_ms: Time saved in so many steps, from the counters' change summed over layers.
            cost_ms: What looking ahead costs per step.
        """
        self._counters, self._saved_ms, self._cost_ms = counters, saved_ms, cost_ms
        self._step = 0
        self._snapshots: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self.is_worth_it = True

    def next_variant(self) -> int:
        """Called once before every decode step: `LOOK_AHEAD` or `ON_DEMAND`."""
        at = self._step % (TRIAL_STEPS + REST_STEPS)
        self._step += 1
        if at == 0:
            self._snapshots = [self._snapshot()]
        elif at == TRIAL_STEPS:
            self._snapshots.append(self._snapshot())
        self._decide()
        return LOOK_AHEAD if at < TRIAL_STEPS or self.is_worth_it else ON_DEMAND

    def _snapshot(self) -> tuple[Tensor, torch.cuda.Event | None]:
        on_gpu = self._counters.is_cuda
        host = torch.empty(self._counters.shape, dtype=torch.int32, pin_memory=on_gpu)
        host.copy_(self._counters, non_blocking=on_gpu)
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        return host, event

    def _decide(self) -> None:
        """Judge the last trial as soon as its counters are here."""
        if len(self._snapshots) < 2:
            return
        (before, _), (after, event) = self._snapshots
        if event is None or event.query():
            saved = self._saved_ms((after - before).sum(0).tolist()) / TRIAL_STEPS
            self.is_worth_it = saved > self._cost_ms
            self._snapshots = []

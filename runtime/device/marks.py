"""Moments on the device's stream, with the layers' counters, read later without waiting."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A moment on the device, with the counters of that moment."""

    @property
    def counters(self) -> list[int]:
        """Summed over layers; of a moment that is past."""

    def is_past(self) -> bool:
        """Whether the device has come that far."""

    def ms_since(self, earlier: Mark) -> float:
        """Milliseconds between two moments that are past."""


class DeviceMark:
    """Marks the current stream, without waiting."""

    def __init__(self, counters: Tensor) -> None:
        """Copy the counters to the host as soon as the device comes here.

        Args:
            counters: Of all layers, [L, C] int32, on the device.
        """
        self._host = torch.empty(counters.shape, dtype=torch.int32, pin_memory=True)
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()
        self._host.copy_(counters, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    @property
    def counters(self) -> list[int]:
        """Summed over layers."""
        totals: list[int] = self._host.sum(0).tolist()
        return totals

    def is_past(self) -> bool:
        """See `Mark`."""
        return bool(self._copied.query())

    def ms_since(self, earlier: Mark) -> float:
        """See `Mark`."""
        assert isinstance(earlier, DeviceMark)
        return float(earlier._event.elapsed_time(self._event))

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


class DeviceMarks:
    """Marks the current stream, without waiting and without allocating."""

    def __init__(self, counters: Tensor, count: int) -> None:
        """Make room for the marks.

        Args:
            counters: Of all layers, [L, C] int32, on the device.
            count: How many there are.
        """
        self._counters = counters
        # Page-locking memory takes longer than a short decode step: not when a mark is set
        host = torch.empty(count, *counters.shape, dtype=torch.int32, pin_memory=True)
        self._marks = [DeviceMark(own) for own in host]

    def __call__(self, place: int) -> DeviceMark:
        """Mark this moment.

        Args:
            place: Which of the marks is set, 0..count - 1; its last moment is forgotten.
        """
        mark = self._marks[place]
        mark.set(self._counters)
        return mark


class DeviceMark:
    """A moment of a stream."""

    def __init__(self, host: Tensor) -> None:
        """Not set yet.

        Args:
            host: Gets the counters, [L, C] int32, page-locked.
        """
        self._host = host
        self._event = torch.cuda.Event(enable_timing=True)
        self._copied = torch.cuda.Event()

    def set(self, counters: Tensor) -> None:
        """Have the counters copied to the host when the device comes here."""
        self._event.record()
        self._host.copy_(counters, non_blocking=True)
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

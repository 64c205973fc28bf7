"""Copies experts from host rows into slots: on a stream of its own on CUDA, at once on a CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from foreroute.runtime.store.pinning import CopyRow, copy_whole


class Ticket(ABC):
    """Stands for copies that were asked for together."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the copies have landed, without waiting."""

    @abstractmethod
    def wait(self) -> None:
        """Order all compute enqueued from now on behind the copies; does not block the host."""


class Transfers(ABC):
    """Moves experts from host memory into slots."""

    can_hide = True
    """Whether copies go on while something else computes."""

    @abstractmethod
    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Ticket:
        """Ask for copies, in this order.

        Whatever compute was enqueued before may still read the slots: the copies go behind it.

        Args:
            pairs: (host row, slot), each [row_bytes] uint8.

        Returns:
            A ticket for all of them.
        """

    @staticmethod
    def for_device(device: torch.device, copy_row: CopyRow = copy_whole) -> Transfers:
        """The kind of transfers that a device needs, by that way to copy a row."""
        return StreamTransfers(device, copy_row) if device.type == "cuda" else ImmediateTransfers()


class _Done(Ticket):
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return


class ImmediateTransfers(Transfers):
    """Memory copies on the CPU; each is complete when `copy` returns."""

    can_hide = False

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Ticket:
        """Copy now."""
        for host_row, slot in pairs:
            slot.copy_(host_row)
        return _Done()


class _EventTicket(Ticket):
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def is_done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class StreamTransfers(Transfers):
    """Copies on one CUDA stream, in the order asked for; from pinned memory asynchronous ones."""

    def __init__(self, device: torch.device, copy_row: CopyRow = copy_whole) -> None:
        """Make the stream.

        Args:
            device: Where copies go to.
            copy_row: How a row is copied.
        """
        self._device, self._copy_row = device, copy_row
        self._stream = torch.cuda.Stream(device=device, priority=-1)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Ticket:
        """Enqueue the copies behind all compute enqueued so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for host_row, slot in pairs:
                self._copy_row(slot, host_row)
            event = torch.cuda.Event()
            event.record(self._stream)
        return _EventTicket(event)

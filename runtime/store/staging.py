"""Hands rows that are not page-locked to the GPU, through a small area that is.

Each lane of the area holds one piece of a row and belongs to one program of a kernel, which asks
for the next piece in a word of its own (`asked`) and waits for the same word in `answered`. Threads
of the host look for words that differ, copy the piece, and answer. Nobody waits for another lane,
so that it does not matter which programs run at once. docs/lossless.md says what was considered.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LANES = 16
PIECE_BYTES = 256 << 10
LINE_WORDS = 8
"""Words of a cache line: each lane's words have one of their own."""
PIECE_BITS, EXPERT_BITS, LAYER_BITS, TURN_BITS = 14, 12, 10, 27
"""What a word says, from its lowest bits on; turns make it differ from the one before."""
MOST_THREADS = 4
CORES_PER_THREAD = 4
FEW_LOOKS, MANY_LOOKS = 16, 1 << 20
"""Looks at all lanes before a thread rests: when nothing was asked for, and after something was."""
REST_SECONDS = 5e-4


@dataclass
class _Service:
    """What the threads of the host need; they hold nothing else."""

    asked: Tensor
    answered: Tensor
    buffers: Tensor
    rows: list[Tensor]
    addresses: Tensor
    """By layer, of its first row and the bytes of a row, [L, 2] int64."""
    is_open: bool = True
    threads: list[threading.Thread] = field(default_factory=list)

    def serve(self, first: int, end: int) -> None:
        """Answer some lanes until the service is closed; holds no lock of the interpreter."""
        from foreroute.runtime.store.staging_loop import answer

        asked, answered = self.asked.data_ptr(), self.answered.data_ptr()
        buffers, piece = self.buffers.data_ptr(), self.buffers.shape[1]
        layers, looks = self.addresses.numpy(), FEW_LOOKS
        while self.is_open:
            num_served = answer(asked, answered, buffers, piece, layers, first, end, looks)
            looks = MANY_LOOKS if num_served else FEW_LOOKS
            if not num_served:
                time.sleep(REST_SECONDS)

    def close(self) -> None:
        """End the threads."""
        self.is_open = False
        for thread in self.threads:
            if thread is not threading.current_thread():  # it may be the one that collects garbage
                thread.join()


class Staging:
    """The page-locked area, its words, and the threads that fill it."""

    def __init__(
        self, rows: Sequence[Tensor], device: torch.device, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """Take memory and begin to serve.

        Args:
            rows: By layer, [E, row_bytes] uint8, on the host.
            device: Where programs ask.
            piece_bytes: Room of a lane, in whole blocks of `fetch`.

        Raises:
            ValueError: If there are more layers, experts or bytes of one than a word can name.
        """
        pieces = max(-(-layer.shape[1] // piece_bytes) for layer in rows)
        limits = (len(rows), LAYER_BITS), (max(map(len, rows)), EXPERT_BITS), (pieces, PIECE_BITS)
        if any(count > 1 << bits for count, bits in limits):
            raise ValueError(
                f"A staging area cannot serve {len(rows)} layers of {limits[1][0]} experts of "
                f"{rows[0].shape[1]} bytes; pin all experts."
            )
        is_pinned = device.type == "cuda"
        self.buffers = torch.zeros(LANES, piece_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.asked, self.answered = (
            torch.zeros(LANES, LINE_WORDS, dtype=torch.int64, pin_memory=is_pinned)
            for _ in range(2)
        )
        self.failed = torch.zeros(1, dtype=torch.int32, pin_memory=is_pinned)
        """Not 0 once a program has waited in vain."""
        self.turns = torch.zeros(LANES, dtype=torch.int32, device=device)
        """Pieces each lane has asked for, [LANES] int32."""
        self._device = device
        addresses = torch.tensor([[layer.data_ptr(), layer.shape[1]] for layer in rows])
        service = _Service(self.asked, self.answered, self.buffers, list(rows), addresses)
        cores = len(os.sched_getaffinity(0))
        count = max(1, min(MOST_THREADS, cores // CORES_PER_THREAD))
        for i in range(count):
            lanes = i * LANES // count, (i + 1) * LANES // count
            thread = threading.Thread(
                target=service.serve, args=lanes, name=f"staging-{i}", daemon=True
            )
            service.threads.append(thread)
            thread.start()
        self._end = weakref.finalize(self, service.close)

    def require_served(self) -> None:
        """Fail if a program was not answered: what it then computed is wrong.

        Raises:
            RuntimeError: If there was one.
        """
        if int(self.failed) != 0:
            raise RuntimeError(
                "The host did not hand out an expert in time: the tokens since are not to be used. "
                "Make a new engine."
            )

    def close(self) -> None:
        """End the threads, once the device asks for nothing more."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._end()

"""Several processes of one command, started by torchrun: which one this is, and how they agree."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")
LONGEST_WAIT = datetime.timedelta(days=30)
"""For another process: one that died ends all of them by torchrun, not by a timeout."""
USER_ERROR_EXIT_CODE = 2


class Ranks:
    """One process among several: which of them it is, and how they talk."""

    def __init__(self, rank: int = 0, num_ranks: int = 1, local_rank: int = 0) -> None:
        """Say which process this is.

        Args:
            rank: 0.. of this process.
            num_ranks: Processes in all.
            local_rank: 0.. among those of this machine.
        """
        self.rank, self.num_ranks, self.local_rank = rank, num_ranks, local_rank

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.num_ranks == 1

    def device(self, chosen: torch.device) -> torch.device:
        """This process's device: of several GPUs of a machine, each process has its own."""
        if self.is_alone or chosen.type != "cuda" or chosen.index is not None:
            return chosen
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank; all of them call it."""
        if self.is_alone:
            return [value]
        box: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(box, value)
        return box

    def first(self, function: Callable[[], Value]) -> Value:
        """Have rank 0 call something, and give what it returned to all.

        Raises:
            Exception: Whatever rank 0's call raised, on rank 0.
            SystemExit: On the others then.
        """
        if self.is_alone:
            return function()
        box: list[Any] = [None, True]
        raised: BaseException | None = None
        if self.is_first:
            try:
                box[0] = function()
            except BaseException as error:
                raised, box[1] = error, False
        dist.broadcast_object_list(box)
        if raised is not None:
            raise raised
        if not box[1]:
            sys.exit(USER_ERROR_EXIT_CODE)  # the first has said why
        value: Value = box[0]
        return value

    def wait(self) -> None:
        """Wait until every process has come here."""
        if not self.is_alone:
            dist.barrier()


ALONE = Ranks()


def are_ranks_started() -> bool:
    """Whether torchrun started several processes, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun has started; alone without it."""
    if not are_ranks_started() or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    has_begun = dist.is_initialized()
    if not has_begun:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if not has_begun:
            dist.destroy_process_group()

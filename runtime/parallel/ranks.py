"""The processes that run one model together, by torch.distributed; one alone is the usual case."""

from __future__ import annotations

import atexit
import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreroute.data.adapters.seam import ExpertsFunction

TIMEOUT = datetime.timedelta(minutes=2)
"""How long a process waits for the others; one that dies is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int = 0
    """0..size-1."""
    size: int = 1
    """Processes, each with a slice of every expert."""

    @classmethod
    def join(cls, device: torch.device | None = None) -> Ranks:
        """Join the processes that torchrun started beside this one; alone without torchrun.

        Args:
            device: Where this process computes: NCCL on a GPU, gloo on a CPU; both if None.

        Raises:
            ValueError: If torchrun runs on several hosts.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return ALONE
        if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
            raise ValueError("One model runs on one host's GPUs: start torchrun with --nnodes 1.")
        if not dist.is_initialized():
            is_gpu = device is not None and device.type == "cuda"
            dist.init_process_group(
                "nccl" if is_gpu else "gloo", timeout=TIMEOUT, device_id=device if is_gpu else None
            )
            atexit.register(_leave)
        return cls(dist.get_rank(), size)

    @staticmethod
    def are_started() -> bool:
        """Whether torchrun started several processes, this one among them."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    @staticmethod
    def local_device(asked: str) -> str:
        """The GPU of this process where torchrun started several and the user names none.

        Args:
            asked: What the user said: auto, cpu, cuda or cuda:1.
        """
        local = os.environ.get("LOCAL_RANK")
        wants_gpu = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
        return f"cuda:{local}" if local is not None and wants_gpu else asked

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def adding(self, experts: ExpertsFunction) -> ExpertsFunction:
        """The function whose output is the sum of all processes' outputs.

        Args:
            experts: Computes this process' slices of a layer's experts.
        """
        if self.size == 1:
            return experts

        def summed(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return self.add(experts(module, hidden, ids, weights))

        return summed

    def add(self, output: Tensor) -> Tensor:
        """The sum of all processes' outputs, the same bits in each; in place where it can be.

        Sums are taken in float32, so that they round once.

        Args:
            output: Any shape, contiguous, float.
        """
        total = output.float()
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise ConnectionError(
                "Another process of this model has ended, so this one ends too."
            ) from error
        return total.to(output.dtype)

    def share_random_state(self, device: torch.device) -> None:
        """Give every process the first one's random numbers, so that all sample the same tokens.

        Args:
            device: Where tokens are sampled.
        """
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device).to(device)
            dist.broadcast(state, 0)
            torch.cuda.set_rng_state(state.cpu(), device)
        else:
            state = torch.get_rng_state()
            dist.broadcast(state, 0)
            torch.set_rng_state(state)


ALONE = Ranks()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

"""The processes that run one model together, by torch.distributed; one alone is the usual case."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreroute.data.adapters.seam import ExpertsFunction
from foreroute.estimators.ranks import Ranks, are_ranks_started

TIMEOUT = datetime.timedelta(minutes=2)
"""How long a process waits for the others; one that dies is noticed at once."""


class SliceRanks(Ranks):
    """This process among those that share one model, each with a slice of every expert."""

    @classmethod
    def join(cls, device: torch.device | None = None) -> SliceRanks:
        """Join the processes that torchrun started beside this one; alone without torchrun.

        Args:
            device: Where this process computes: NCCL on a GPU, gloo on a CPU; both if None.

        Raises:
            ValueError: If torchrun runs on several hosts.
        """
        if not are_ranks_started():
            return UNSLICED
        if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
            raise ValueError("One model runs on one host's GPUs: start torchrun with --nnodes 1.")
        if not dist.is_initialized():
            is_gpu = device is not None and device.type == "cuda"
            dist.init_process_group(
                "nccl" if is_gpu else "gloo", timeout=TIMEOUT, device_id=device if is_gpu else None
            )
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size(), dist.get_rank())

    @staticmethod
    def local_device(asked: str) -> str:
        """The GPU of this process where torchrun started several and the user names none.

        Args:
            asked: What the user said: auto, cpu, cuda or cuda:1.
        """
        local = os.environ.get("LOCAL_RANK")
        wants_gpu = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
        return f"cuda:{local}" if local is not None and wants_gpu else asked

    def adding(self, experts: ExpertsFunction) -> ExpertsFunction:
        """The function whose output is the sum of all processes' outputs.

        Args:
            experts: Computes this process' slices of a layer's experts.
        """
        if self.is_alone:
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
        with noticing_the_dead():
            dist.all_reduce(total)
        return total.to(output.dtype)

    def share_random_state(self, device: torch.device) -> None:
        """Give every process the first one's random numbers, so that all sample the same tokens.

        Args:
            device: Where tokens are sampled.
        """
        is_gpu = device.type == "cuda"
        state = torch.cuda.get_rng_state(device).to(device) if is_gpu else torch.get_rng_state()
        with noticing_the_dead():
            dist.broadcast(state, 0)
        if is_gpu:
            torch.cuda.set_rng_state(state.cpu(), device)
        else:
            torch.set_rng_state(state)


UNSLICED = SliceRanks()


@contextlib.contextmanager
def noticing_the_dead() -> Iterator[None]:
    """Say in one line that another process has ended, where torch says it in many.

    Raises:
        ConnectionError: If it has.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "Another process of this model has ended, so this one ends too."
        ) from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

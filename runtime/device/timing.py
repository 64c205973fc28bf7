"""How long the device takes for something, measured on the spot."""

from __future__ import annotations

from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object]) -> float:
    """Time from before what `run` launches to after it, on the current stream; waits for it.

    The host's time to launch is in it, where the device has nothing else to do.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def ms_of_one_more(time_of: Callable[[int], float], most: int) -> float:
    """Time that one thing more takes in a launch of several: what every launch takes is not in it.

    Args:
        time_of: Milliseconds of one launch of so many.
        most: How many can be tried, 1 or more; of one alone the whole time is given.
    """
    one = time_of(1)
    if most == 1:
        return one
    several = time_of(most)
    return (several - one) / (most - 1) if several > one else several / most

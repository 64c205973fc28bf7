"""How long a call takes: on a GPU by its own clock, alone or beside another one; and lines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
REPEATS = 15
SECONDS_EACH = 0.4
"""Most time for one figure."""
CALLS_AT_ONCE = 8
"""On a GPU, calls that are timed together: what the host takes to ask for one is hidden."""
BESIDE_REPEATS = 5


@dataclass(frozen=True)
class Line:
    """Time as a fixed part and a rate."""

    fixed_ms: float
    gbps: float
    """GB/s."""

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Line:
        """The line of least squares.

        Args:
            points: (bytes, ms), of at least two different sizes.

        Raises:
            ValueError: If time does not grow with size.
        """
        sizes, times = zip(*points, strict=True)
        slope, fixed_ms = statistics.linear_regression(sizes, times)  # ms a byte, ms
        if slope <= 0:
            raise ValueError(f"Times of copies do not grow with their sizes: {points}.")
        return cls(fixed_ms=max(0.0, fixed_ms), gbps=1 / slope / 1e6)


def gbps(num_bytes: float, ms: float) -> float:
    """Bytes per time, GB/s."""
    return round(num_bytes / max(ms, 1e-6) / 1e6, 3)


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph, after one to warm up; itself on a CPU."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_ms(call: Call, device: torch.device) -> float:
    """Median time of a call, in ms, after one to warm up."""
    once = _ms_on_gpu if device.type == "cuda" else _ms_on_cpu
    once(call)
    times: list[float] = []
    until = time.perf_counter() + SECONDS_EACH
    while len(times) < 3 or (len(times) < REPEATS and time.perf_counter() < until):
        times.append(once(call))
    return statistics.median(times)


def median_ms_beside(call: Call, other: Call, device: torch.device) -> float:
    """Median time of a call while another one runs on a stream of its own; alone on a CPU.

    Args:
        call: What is timed.
        other: Repeated from before the call until after it.
        device: Where both run.
    """
    if device.type != "cuda":
        return median_ms(call, device)
    return statistics.median(_ms_beside(call, other) for _ in range(BESIDE_REPEATS))


def _ms_on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _ms_on_gpu(call: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS_AT_ONCE):
        call()
    stop.record()
    stop.synchronize()
    ms: float = start.elapsed_time(stop)
    return ms / CALLS_AT_ONCE


def _ms_beside(call: Call, other: Call) -> float:
    """Time once, with as many repetitions of the other as it takes to outlast the call."""
    side, num_others = torch.cuda.Stream(), 2
    while True:
        start, stop, over = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            other()
            has_begun = side.record_event()
            for _ in range(num_others):
                other()
            over.record(side)
        torch.cuda.current_stream().wait_event(has_begun)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        ms: float = start.elapsed_time(stop)
        if ms <= start.elapsed_time(over):
            return ms
        num_others *= 2

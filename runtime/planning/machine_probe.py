"""Measures this machine for `foreroute profile`: link, gather, compute, launches, host memory."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from foreroute.data.adapters import resolve_device
from foreroute.runtime.planning.machine import MachineProfile, Rates

KIB, MIB = 2**10, 2**20
COPY_SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
GATHER_COUNTS = (1, 2, 4, 8)
GATHER_BLOCKS = 32
HIDDEN, ATTENTION, INNER, EXPERTS, TOP_K = 2048, 4096, 768, 128, 8
"""Shape of one layer of Qwen3-30B-A3B, the reference model."""
KV_WIDTH = 512
REPEATS = 15
SECONDS_EACH = 0.6
"""Most time for one figure."""
SMALL_CALLS = 300
CALLS_AT_ONCE = 8
"""On a GPU, calls that are timed together: what the host takes to ask for one is hidden."""


def measure_machine(device: str = "auto", name: str = "") -> MachineProfile:
    """Measure link, compute and host memory; under a minute.

    Args:
        device: `auto`, `cpu` or `cuda`. On a CPU the link is a copy from memory to memory.
        name: How to call the profile; the device's name if empty.

    Raises:
        ValueError: If there is no such device.
    """
    target = resolve_device(device)
    is_gpu = target.type == "cuda"
    what = torch.cuda.get_device_name(target) if is_gpu else _cpu_name()
    layer = _Layer(target)
    kind = "pinned host memory to the GPU" if is_gpu else "memory to memory on the CPU, no link"
    return MachineProfile(
        name=name or what.lower().replace(" ", "-"),
        source=f"measured by foreroute profile ({kind})",
        device=what,
        link=_copy_rates(target),
        gather=_gather_rates(target, layer.expert_bytes) if is_gpu else (),
        layer_ms=layer.measure_ms(),
        launch_ms=_launch_ms(target),
        sync_ms=_sync_ms(target) if is_gpu else 0.0,
        host_gbps=_memory_gbps(torch.device("cpu")),
        device_gbps=_memory_gbps(target),
        pin_s_per_gib=_pin_seconds() if is_gpu else 0.0,
        reference=f"one layer shaped like Qwen3-30B-A3B, top-{TOP_K}, bf16",
        expert_bytes=layer.expert_bytes,
        layer_bytes=layer.num_bytes,
    )


class _Layer:
    """The matrix products of one decode step of one layer; small kernels between are left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        widths = [(ATTENTION + 2 * KV_WIDTH, HIDDEN), (HIDDEN, ATTENTION), (EXPERTS, HIDDEN)]
        one_expert = [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
        shapes = widths + one_expert * TOP_K
        self._weights = [torch.randn(*s, device=device).to(torch.bfloat16) for s in shapes]
        self._inputs = {
            width: torch.randn(1, width, device=device).to(torch.bfloat16)
            for width in (HIDDEN, ATTENTION, INNER)
        }
        self.expert_bytes = sum(rows * columns * 2 for rows, columns in one_expert)
        self.num_bytes = sum(weight.nbytes for weight in self._weights)

    def _run(self) -> None:
        for weight in self._weights:
            torch.nn.functional.linear(self._inputs[weight.shape[1]], weight)

    def measure_ms(self) -> float:
        """Time of one layer; on a GPU as a replayed CUDA graph."""
        if self._device.type != "cuda":
            return _median_ms(self._run, self._device)
        self._run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return _median_ms(graph.replay, self._device)


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, in ms, after one to warm up; on a GPU by its own clock."""
    once = _ms_on_gpu if device.type == "cuda" else _ms_on_cpu
    once(call)
    times: list[float] = []
    until = time.perf_counter() + SECONDS_EACH
    while len(times) < 3 or (len(times) < REPEATS and time.perf_counter() < until):
        times.append(once(call))
    return statistics.median(times)


def _ms_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _ms_on_gpu(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS_AT_ONCE):
        call()
    stop.record()
    stop.synchronize()
    ms: float = start.elapsed_time(stop)
    return ms / CALLS_AT_ONCE


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy_rates(device: torch.device) -> Rates:
    """Rate of copies from (pinned) host memory, by size."""
    is_gpu = device.type == "cuda"
    host = torch.zeros(max(COPY_SIZES), dtype=torch.uint8, pin_memory=is_gpu)
    slots = torch.zeros(max(COPY_SIZES), dtype=torch.uint8, device=device)
    rates = []
    for size in COPY_SIZES:
        count = max(1, 16 * MIB // size)
        parts = [(i * size, (i + 1) * size) for i in range(min(count, len(host) // size))]

        def copy(parts: list[tuple[int, int]] = parts) -> None:
            for start, stop in parts:
                slots[start:stop].copy_(host[start:stop], non_blocking=is_gpu)

        rates.append((size, _gbps(size * len(parts), _median_ms(copy, device))))
    return tuple(rates)


def _gather_rates(device: torch.device, expert_bytes: int) -> Rates:
    """Rate of the kernel that reads experts from (pinned) host memory, by experts at once.

    Args:
        device: Where the kernel runs.
        expert_bytes: One expert, a multiple of 8.
    """
    from foreroute.runtime.device.kernels.fetch import fetch

    most = max(GATHER_COUNTS)
    is_gpu = device.type == "cuda"
    rows = torch.zeros(most, expert_bytes, dtype=torch.uint8, pin_memory=is_gpu)
    slots = torch.zeros(most, expert_bytes, dtype=torch.uint8, device=device)
    rates = []
    for count in GATHER_COUNTS:
        copies: Tensor = torch.arange(count, dtype=torch.int32, device=device).repeat(3, 1)

        def gather(copies: Tensor = copies) -> None:
            fetch(rows, slots, copies, num_blocks=GATHER_BLOCKS)

        rates.append(
            (count * expert_bytes, _gbps(count * expert_bytes, _median_ms(gather, device)))
        )
    return tuple(rates)


def _launch_ms(device: torch.device) -> float:
    """One small operation, asked for by the host and not waited for."""
    tiny = torch.zeros(8, device=device)
    tiny.add_(1)
    _wait(device)
    start = time.perf_counter()
    for _ in range(SMALL_CALLS):
        tiny.add_(1)
    passed = time.perf_counter() - start
    _wait(device)
    return passed / SMALL_CALLS * 1e3


def _sync_ms(device: torch.device) -> float:
    """Bring one number from the device to the host."""
    tiny = torch.zeros(1, device=device)
    tiny.item()
    start = time.perf_counter()
    for _ in range(SMALL_CALLS):
        tiny.item()
    return (time.perf_counter() - start) / SMALL_CALLS * 1e3


def _memory_gbps(device: torch.device) -> float:
    """Bytes read and written per second by a copy within one memory, GB/s."""
    size = 256 * MIB
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _gbps(2 * size, _median_ms(lambda: target.copy_(source), device))


def _pin_seconds() -> float:
    """Seconds to pin one GiB."""
    start = time.perf_counter()
    torch.zeros(256 * MIB, dtype=torch.uint8, pin_memory=True)
    return (time.perf_counter() - start) * 4


def _gbps(num_bytes: int, ms: float) -> float:
    return round(num_bytes / max(ms, 1e-6) / 1e6, 3)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

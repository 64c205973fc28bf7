"""Measures this machine for `foreroute profile`: link, kernels, launches, host memory."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

from foreroute.data.adapters import resolve_device
from foreroute.runtime.planning.layer_shape import REFERENCE, PlainLayer
from foreroute.runtime.planning.machine import MachineProfile, Rates
from foreroute.runtime.planning.timings import gbps, median_ms

KIB, MIB = 2**10, 2**20
COPY_SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
SMALL_CALLS = 300


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
    if is_gpu:
        times = _kernel_times(target)
    else:
        times = {"layer_ms": median_ms(PlainLayer(REFERENCE, target).run, target)}
    kind = "pinned host memory to the GPU" if is_gpu else "memory to memory on the CPU, no link"
    return MachineProfile(
        name=name or what.lower().replace(" ", "-"),
        source=f"measured by foreroute profile ({kind})",
        device=what,
        link=_copy_rates(target),
        launch_ms=_launch_ms(target),
        sync_ms=_sync_ms(target) if is_gpu else 0.0,
        host_gbps=_memory_gbps(torch.device("cpu")),
        device_gbps=_memory_gbps(target),
        pin_s_per_gib=_pin_seconds() if is_gpu else 0.0,
        reference=f"one layer shaped like Qwen3-30B-A3B, top-{REFERENCE.top_k}, bf16",
        expert_bytes=REFERENCE.expert_bytes,
        layer_bytes=REFERENCE.layer_bytes,
        **times,
    )


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

        rates.append((size, gbps(size * len(parts), median_ms(copy, device))))
    return tuple(rates)


def _kernel_times(device: torch.device) -> dict[str, Any]:
    """What the engine's own kernels take; needs Triton, so only where there is a GPU."""
    from foreroute.runtime.planning.engine_kernels import EngineKernels
    from foreroute.runtime.planning.kernel_probe import measure_kernels

    with torch.inference_mode():
        return vars(measure_kernels(EngineKernels(REFERENCE, device)))


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
    return gbps(2 * size, median_ms(lambda: target.copy_(source), device))


def _pin_seconds() -> float:
    """Seconds to pin one GiB."""
    start = time.perf_counter()
    torch.zeros(256 * MIB, dtype=torch.uint8, pin_memory=True)
    return (time.perf_counter() - start) * 4


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

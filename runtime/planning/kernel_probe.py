"""Measures what the simulator needs of a GPU: fetches, copies beside compute, predictions."""

from __future__ import annotations

from dataclasses import dataclass

from foreroute.runtime.planning.engine_kernels import EngineKernels, Round
from foreroute.runtime.planning.machine import Rates
from foreroute.runtime.planning.timings import (
    Line,
    captured,
    gbps,
    median_ms,
    median_ms_beside,
)

PARTS = (4, 2, 1)
"""One expert of a whole one's bytes over each: a fetch's fixed cost and rate are a line in size."""
COUNTS = (1, 2, 4, 8)
"""Experts fetched at once."""


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """Fields of `MachineProfile`, measured with the engine's kernels in CUDA graphs."""

    layer_ms: float
    gather: Rates
    fetch_ms: float
    overlap_ms: float
    predict_ms: float
    begin_ms: float
    ahead_ms: float
    prefetch_gbps: float
    kernel_us: dict[str, float]


def measure_kernels(kernels: EngineKernels) -> KernelTimes:
    """Time rounds of kernels, alone and beside each other; some seconds."""
    layer_ms = _ms_each(kernels, kernels.layers(looks_ahead=False))
    ahead_ms = _ms_each(kernels, kernels.layers(looks_ahead=True)) - layer_ms
    predicting_ms = _ms_each(kernels, kernels.predictions())
    planning_ms = _ms_each(kernels, kernels.head_plans())
    nothing_ms = _ms_each(kernels, kernels.demands(0))
    fetches = _fetches(kernels, nothing_ms)
    serving_ms = [_ms_each(kernels, kernels.services(absent)) for absent in (0, 1)]
    in_turn_ms = dict(fetches)[kernels.shape.expert_bytes]
    alone_ms = _ms_each(kernels, kernels.prefetches(1))
    beside, slowed_ms = _beside_layers(kernels)
    early = Line.through(beside)
    return KernelTimes(
        layer_ms=layer_ms,
        gather=tuple((size, gbps(size, ms)) for size, ms in fetches),
        fetch_ms=Line.through(fetches[: len(PARTS)]).fixed_ms,
        overlap_ms=max(0.0, in_turn_ms - (serving_ms[1] - serving_ms[0])),
        predict_ms=predicting_ms + early.fixed_ms,
        begin_ms=early.fixed_ms,
        ahead_ms=max(0.0, ahead_ms),
        prefetch_gbps=early.gbps,
        kernel_us={
            "plan, fetch nothing": 1e3 * nothing_ms,
            "plan, products of resident experts": 1e3 * serving_ms[0],
            "plan, products, one expert missing": 1e3 * serving_ms[1],
            "predict: logits, ranks": 1e3 * predicting_ms,
            "plan a head": 1e3 * planning_ms,
            "prefetch an expert, alone": 1e3 * alone_ms,
            "prefetch an expert beside layers": 1e3 * beside[-1][1],
            "a layer beside prefetches": 1e3 * slowed_ms,
        },
    )


def _ms_each(kernels: EngineKernels, round_: Round) -> float:
    """Time of one of a round's calls."""
    return median_ms(captured(round_.run, kernels.device), kernels.device) / round_.count


def _fetches(kernels: EngineKernels, nothing_ms: float) -> list[tuple[int, float]]:
    """Bytes fetched at once, and what that adds to a step that misses nothing, ms."""
    size = kernels.shape.expert_bytes
    what = [(1, parts) for parts in PARTS] + [(count, 1) for count in COUNTS[1:]]
    return [
        (count * size // parts, _ms_each(kernels, kernels.demands(count, parts)) - nothing_ms)
        for count, parts in what
        if count <= kernels.shape.top_k
    ]


def _beside_layers(kernels: EngineKernels) -> tuple[list[tuple[int, float]], float]:
    """Bytes and ms of prefetches while layers compute, and ms of a layer while they are copied."""
    device, layers = kernels.device, kernels.layers(looks_ahead=False)
    compute = captured(layers.run, device)
    times = []
    for parts in PARTS:
        heads = kernels.prefetches(parts)
        copies = captured(heads.run, device)
        ms = median_ms_beside(copies, compute, device) / heads.count
        times.append((kernels.shape.expert_bytes // parts, ms))
    return times, median_ms_beside(compute, copies, device) / layers.count

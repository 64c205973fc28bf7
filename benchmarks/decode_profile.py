"""What a decode step does, by the profiler: a Chrome trace, launches, and waits for the host."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from decode_steps import DecodeSteps
from replayed_routing import Replay

STEP_NAME = "decode step"
WAITS = ("Synchronize", "EventQuery")
FIRST_STEP = 40
PRINTED_KERNELS = 14


def profile_steps(
    steps: DecodeSteps, replay: Replay, path: Path, num_tokens: int
) -> dict[str, Any]:
    """Trace a few decode steps, nothing waiting between them.

    Args:
        steps: Warm.
        replay: Its routing.
        path: Chrome trace to write (.json or .json.gz).
        num_tokens: Steps.

    Returns:
        Per token: kernels in all and the greatest of them, host launches outside the graph, and
        the runtime calls that wait for the device or copy between start and end of a step.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if steps.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    steps.restart()
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=activities) as profiler:
        for idx in range(FIRST_STEP, FIRST_STEP + num_tokens):
            replay.set_step(idx)
            with torch.profiler.record_function(STEP_NAME):
                steps.step()
        if steps.device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return summary(list(profiler.events()), num_tokens)


def summary(events: list[Any], num_tokens: int) -> dict[str, Any]:
    """Count a profile's events per token.

    Args:
        events: Of the profiler, with `name`, `device_type` and `time_range`.
        num_tokens: Steps in the profile.
    """
    on_host = [e for e in events if e.device_type.name == "CPU"]
    spans = [e.time_range for e in on_host if e.name == STEP_NAME]
    calls: Counter[str] = Counter(
        e.name
        for e in on_host
        if e.name.startswith(("cuda", "cu"))
        and any(s.start <= e.time_range.start <= s.end for s in spans)
    )
    kernels: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for e in events:
        if e.device_type.name == "CUDA" and e.name != STEP_NAME:
            kernels[e.name] += 1
            microseconds[e.name] += e.time_range.elapsed_us()
    graph_launches = sum(n for name, n in calls.items() if "GraphLaunch" in name)
    launches = sum(n for name, n in calls.items() if "LaunchKernel" in name)
    copies = sum(n for name, n in calls.items() if "Memcpy" in name)
    waits = sum(n for name, n in calls.items() if any(wait in name for wait in WAITS))
    return {
        "tokens": num_tokens,
        "device_events_per_token": round(kernels.total() / num_tokens, 1),
        "graph_launches_per_token": graph_launches / num_tokens,
        "kernel_launches_outside_graph_per_token": round(launches / num_tokens, 2),
        "memcpy_calls_per_token": round(copies / num_tokens, 2),
        "waits_for_the_device": waits,
        "calls_within_steps": dict(calls),
        "greatest": [
            {
                "kernel": name[:80],
                "us_per_token": round(total / num_tokens, 1),
                "count_per_token": round(kernels[name] / num_tokens, 1),
            }
            for name, total in microseconds.most_common(14)
        ],
    }


def print_summary(label: str, found: dict[str, Any]) -> None:
    """A few lines of it."""
    print(
        f"profile {label}: {found['device_events_per_token']} device events a token, "
        f"{found['graph_launches_per_token']:g} graph launches, "
        f"{found['kernel_launches_outside_graph_per_token']} launches outside the graph, "
        f"{found['memcpy_calls_per_token']} copies, waits within steps: "
        f"{found['waits_for_the_device']}"
    )
    for row in found["greatest"][:PRINTED_KERNELS]:
        print(f"  {row['us_per_token']:9.1f} us {row['count_per_token']:7.1f} x {row['kernel']}")

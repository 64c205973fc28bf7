"""The machine as numbers: how fast experts come over the link, how long a layer computes."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from foreroute.estimators.artifacts import Count, read_versioned, write_json

PROFILES = "profiles"
FORMAT_VERSION = 1
GOOD_SHARE = 0.9  # of the link's best rate: pieces as small as that costs little
Rates = tuple[tuple[Count, float], ...]
"""(bytes of one copy, GB/s), ascending by bytes."""


@dataclass(frozen=True, kw_only=True)
class MachineProfile:
    """What the simulator, the planner and the prefetch rules know of a machine."""

    name: str
    """How it is called."""
    source: str
    """`measured ...`, or `from data sheets ...`; printed wherever the profile is used."""
    device: str
    """The accelerator."""
    link: Rates
    """Copies from pinned host memory to the device; on a CPU, memory to memory."""
    gather: Rates = ()
    """A kernel that reads host memory itself; empty where there is none."""
    fetch_ms: float = 0.0
    """The part of a fetch's time that does not grow with its size."""
    overlap_ms: float = 0.0
    """The part of a layer's compute that goes on while the layer's own demand is fetched."""
    layer_ms: float
    """Compute of one layer with all its experts there, of the reference model, decode, batch 1."""
    token_ms: float = 0.0
    """Compute of a token outside its layers."""
    predict_ms: float = 0.0
    """From a layer's routing known to the first byte of a prefetch, where nothing is demanded."""
    begin_ms: float = 0.0
    """From a demand's last byte to the first of a prefetch."""
    ahead_ms: float = 0.0
    """What predicting and copying beside it costs a layer's compute."""
    prefetch_gbps: float = 0.0
    """Rate of copies beside compute, GB/s; 0: as fast as others."""
    launch_ms: float = 0.0
    """One kernel launch from the host."""
    sync_ms: float = 0.0
    """One wait of the host for the device."""
    host_gbps: float
    """Bandwidth of host memory, GB/s."""
    device_gbps: float
    """Bandwidth of device memory, GB/s."""
    pin_s_per_gib: float = 0.0
    """Seconds to pin one GiB of host memory."""
    reference: str = "Qwen3-30B-A3B"
    """The model that `layer_ms` and `expert_bytes` belong to."""
    expert_bytes: Count
    """One expert of the reference model."""
    layer_bytes: Count
    """Weights that one layer of the reference model reads for one token."""
    all_reduce_us: Rates = ()
    """(GPUs of a host, microseconds to add one token's outputs of a layer over them)."""
    links_gbps: Rates = ()
    """(GPUs of a host, GB/s that come over all their links at once)."""
    kernel_us: dict[str, float] = field(default_factory=dict)
    """Times of single kernels, to look at."""

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ValueError: If one is out of its range.
        """
        for name in ("layer_ms", "host_gbps", "device_gbps", "expert_bytes", "layer_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of profile {self.name} must be positive.")
        for name in (
            *(
                "fetch_ms",
                "overlap_ms",
                "token_ms",
                "predict_ms",
                "begin_ms",
                "ahead_ms",
                "prefetch_gbps",
            ),
            *("launch_ms", "sync_ms", "pin_s_per_gib"),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} of profile {self.name} must not be negative.")
        if not self.link:
            raise ValueError(f"Profile {self.name} has no link rates.")
        for rates in (self.link, self.gather, self.all_reduce_us, self.links_gbps):
            sizes = [size for size, _ in rates]
            if sizes != sorted(set(sizes)) or any(s < 1 or r <= 0 for s, r in rates):
                raise ValueError(
                    f"Profile {self.name} needs rates as (bytes, GB/s), positive and ascending by "
                    f"bytes (or GPUs), not {rates}."
                )

    @property
    def is_measured(self) -> bool:
        """Whether someone measured it, on that machine."""
        return self.source.startswith("measured")

    def copy_ms(self, num_bytes: float) -> float:
        """Time for experts of so many bytes to come over the link, asked for at once."""
        return _time_ms(self.gather or self.link, num_bytes)

    def early_copy_ms(self, num_bytes: float) -> float:
        """Time for so many bytes to come beside compute."""
        if not self.prefetch_gbps:
            return self.copy_ms(num_bytes)
        return num_bytes / self.prefetch_gbps / 1e6

    @property
    def piece_bytes(self) -> int:
        """The smallest copy at nearly the link's best rate: what prefetches are cut in."""
        best = max(rate for _, rate in self.link)
        return next(size for size, rate in self.link if rate >= GOOD_SHARE * best)

    @property
    def best_gbps(self) -> float:
        """The rate of long copies, GB/s."""
        return (self.gather or self.link)[-1][1]

    @property
    def layer_fixed_ms(self) -> float:
        """The part of `layer_ms` that is not reading weights: launches, small kernels."""
        return max(0.0, self.layer_ms - self.layer_bytes / self.device_gbps / 1e6)

    def layer_ms_for(self, layer_bytes: float) -> float:
        """Compute of a layer that reads so many bytes of weights; an estimate."""
        return self.layer_fixed_ms + layer_bytes / self.device_gbps / 1e6

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.name} ({self.device}; {self.source}): link {self.best_gbps:g} GB/s, "
            f"{self.layer_ms:.3f} ms a layer of {self.reference}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, which `load_profile` rebuilds."""
        return dataclasses.asdict(self) | {"format_version": FORMAT_VERSION}


def _time_ms(rates: Rates, num_bytes: float) -> float:
    """Interpolate times between measured sizes; outside, go on as the nearest sizes do."""
    if num_bytes <= 0:
        return 0.0
    sizes = [size for size, _ in rates]
    times = [size / rate / 1e6 for size, rate in rates]
    at = bisect_right(sizes, num_bytes)
    if at == 0:
        if len(sizes) == 1:
            return times[0] * num_bytes / sizes[0]
        slope = max(0.0, (times[1] - times[0]) / (sizes[1] - sizes[0]))
        at_best_rate = num_bytes / max(rate for _, rate in rates) / 1e6
        return max(times[0] - slope * (sizes[0] - num_bytes), at_best_rate)
    if at == len(sizes):
        return times[-1] + (num_bytes - sizes[-1]) / rates[-1][1] / 1e6
    share = (num_bytes - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
    return times[at - 1] + share * (times[at] - times[at - 1])


def known_profiles() -> tuple[str, ...]:
    """Names of the built-in profiles."""
    folder = resources.files("foreroute.runtime.planning") / PROFILES
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if "json" in f.name))


def find_profile(name: str | Path) -> MachineProfile:
    """A built-in profile by name, or one that `foreroute profile` wrote, by path.

    Raises:
        ValueError: If there is neither, or the file is damaged; lists the built-in names.
    """
    word = str(name)
    if word in known_profiles():
        return load_profile(
            Path(str(resources.files("foreroute.runtime.planning"))) / PROFILES / f"{word}.json"
        )
    if Path(word).is_file():
        return load_profile(Path(word))
    raise ValueError(
        f"There is no profile {word!r}: give a file that `foreroute profile` wrote, or one of "
        f"{', '.join(known_profiles())}."
    )


def load_profile(path: Path) -> MachineProfile:
    """Read a profile.

    Raises:
        ValueError: If the file is damaged or of another version; names it.
    """
    return read_versioned(
        path, FORMAT_VERSION, MachineProfile, "Measure again with foreroute profile."
    )


def save_profile(path: Path, profile: MachineProfile) -> None:
    """Write a profile so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, profile.to_dict())

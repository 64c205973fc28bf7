"""What several GPUs of a host cost each other: sums over all, and links that share the host."""

from __future__ import annotations

from dataclasses import dataclass

from foreroute.runtime.planning.machine import MachineProfile, Rates, find_profile

MEASURED = "h100-engine"
"""Its figures stand in for a machine on which nobody measured several GPUs."""


@dataclass(frozen=True, kw_only=True)
class GpuGroup:
    """GPUs that run one model together, each with a slice of every expert."""

    all_reduce_ms: float = 0.0
    """Time to add one token's outputs of a layer over all of them."""
    link_share: float = 1.0
    """What each link gives while all copy, relative to one alone."""
    notes: tuple[str, ...] = ()
    """What this rests on, a sentence each."""

    @classmethod
    def of(cls, count: int, profile: MachineProfile) -> GpuGroup:
        """So many GPUs of a machine, by its profile or else by what was measured elsewhere.

        Args:
            count: GPUs.
            profile: The machine.

        Raises:
            ValueError: If there is not even one.
        """
        if count < 1:
            raise ValueError(f"gpus must be at least 1, not {count}.")
        if count == 1:
            return cls()
        has_own = bool(profile.all_reduce_us and profile.links_gbps)
        known = profile if has_own else find_profile(MEASURED)
        num_known, microseconds = _nearest(known.all_reduce_us, count)
        num_links, together = _nearest(known.links_gbps, count)
        one = known.links_gbps[0][1]
        share = min(1.0, together / max(count, num_links) / one)  # more links give no more
        where = f"{known.device}, profile {known.name}" + ("" if has_own else ", not this machine")
        return cls(
            all_reduce_ms=microseconds / 1e3,
            link_share=share,
            notes=(
                f"{count} GPUs: each has a slice of every expert, and everything else whole; all "
                "sizes but the host's are one GPU's.",
                f"Adding a layer's outputs takes {microseconds:g} us, measured on {num_known} GPUs "
                f"({where}).",
                f"{count} links give {share:.0%} of their own rate each while all copy: "
                f"{together:g} GB/s together were measured on {num_links} ({where}).",
            ),
        )


def _nearest(figures: Rates, count: int) -> tuple[int, float]:
    """The figure of the fewest GPUs that are no fewer, or of the most there are."""
    return next((known for known in figures if known[0] >= count), figures[-1])

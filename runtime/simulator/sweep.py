"""Many scenarios in a row: every policy with every prefetch at every number of slots."""

from __future__ import annotations

from dataclasses import dataclass

from foreroute.runtime.simulator.result import SimulationRow
from foreroute.runtime.simulator.simulate import Scenario, bounds, simulate


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to try."""

    slots: tuple[str, ...]
    """Per layer, numbers or shares."""
    eviction: tuple[str, ...]
    """Policies, as `find_policy` takes them."""
    prefetch: tuple[str, ...]
    """Kinds of prefetch, as `find_prefetch_rule` takes them."""
    on_miss: tuple[str, ...] = ("fetch",)
    """Rules about experts that are not resident, as `find_rule` takes them."""
    horizon: int = 1
    """Layers ahead; what can look further is tried at 1, 2, 4, ... of them."""

    def run(self, scenario: Scenario) -> list[SimulationRow]:
        """Simulate all of it, then the bounds of each number of slots.

        Args:
            scenario: What runs where.

        Raises:
            ValueError: If a name is unknown, or predictions are missing.
        """
        rows = []
        for slots in self.slots:
            for eviction in self.eviction:
                for prefetch in self.prefetch:
                    if eviction == "belady" and prefetch != "none":
                        continue
                    for ahead in self._horizons(prefetch):
                        tried = {"eviction": eviction, "prefetch": prefetch, "slots": slots}
                        for rule in self.on_miss:
                            rows.append(simulate(scenario, **tried, horizon=ahead, on_miss=rule))
            rows += [row for row in bounds(scenario, slots) if row.eviction not in self.eviction]
        return rows

    def _horizons(self, prefetch: str) -> list[int]:
        """Horizons to try: 1, 2, 4, ... and the most; one only where it means nothing."""
        if prefetch in ("none", "head"):
            return [1]
        powers = {2**power for power in range(8) if 2**power < self.horizon}
        return sorted({*powers, self.horizon})

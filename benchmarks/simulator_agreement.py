"""Sets the simulator beside a GPU: the same steps of the same route, measured and simulated.

    python benchmarks/simulator_agreement.py --routes qwen3-30b-a3b.route.csv

Reads what `decode_gpu.py` measured. Compute per layer is its all-resident figure over the layers;
everything else comes from the profile.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foreroute.estimators.console import run_command
from foreroute.runtime.config import parse_slots
from foreroute.runtime.machine import MachineProfile, find_profile
from foreroute.runtime.policies import find_policy, find_prefetch_rule
from foreroute.runtime.simulator import (
    LinkTimes,
    ReadOptions,
    Route,
    SimulatedPredictor,
    read_route,
)
from foreroute.runtime.simulator.replay import Replay

RESULTS = Path(__file__).parent / "results"
AGREES_WITHIN = 0.1


@dataclass(frozen=True)
class Pair:
    """One cell, both ways."""

    arm: str
    slots: int
    """Per cent of the experts resident."""
    measured_ms: float
    """Median TPOT on the GPU."""
    simulated_ms: float
    """Median TPOT of the same steps."""

    @property
    def ratio(self) -> float:
        """Simulated over measured."""
        return self.simulated_ms / self.measured_ms


def main(
    routes: Path,
    results: Path = RESULTS / "decode_gpu.json",
    profile: str = "h100-engine",
    shape: str = "qwen3-30b-a3b",
    warm_up_tokens: int = 8,
    out: Path = RESULTS / "simulator_agreement.json",
) -> None:
    """Print measured and simulated TPOT of every cell.

    Args:
        routes: The route that was replayed on the GPU.
        results: What was measured.
        profile: The machine it was measured on.
        shape: The model; its experts must be the profile's reference model's.
        warm_up_tokens: Steps replayed before the measured ones, where the rows do not say.
        out: Where the rows go.
    """
    rows = [row for row in _read(results)["rows"] if row["shape"] == shape and row["batch"] == 1]
    resident = next(row["tpot_ms_median"] for row in rows if row["arm"] == "resident")
    route = decode_steps_of(read_route(routes, ReadOptions()))
    machine = find_profile(profile)
    print(f"{machine.describe()}\nall resident: {resident:.2f} ms a token, measured\n")
    print("| arm | slots | measured, ms | simulated, ms | ratio |\n|---|---|---|---|---|")
    heads = any(row["arm"].endswith("-every") for row in rows)
    pairs = []
    for row in rows:
        if not row["arm"].startswith(("on-demand", "prefetch-")):
            continue
        simulated = simulated_ms(row, route, machine, resident, warm_up_tokens, heads)
        pairs.append(Pair(row["arm"], row["slots"], row["tpot_ms_median"], simulated))
        pair = pairs[-1]
        figures = f"{pair.measured_ms:.2f} | {pair.simulated_ms:.2f} | {pair.ratio:.3f}"
        print(f"| {pair.arm} | {pair.slots} % | {figures} |")
    worst = max(pairs, key=lambda pair: abs(pair.ratio - 1))
    verdict = "within" if abs(worst.ratio - 1) <= AGREES_WITHIN else "NOT within"
    print(f"\n{verdict} 10 %: worst {worst.arm} at {worst.slots} %, {worst.ratio:.3f}")
    _write(out, machine, pairs)


def decode_steps_of(route: Route) -> Route:
    """The route without its prompt, as the GPU's benchmark replays it."""
    ids = route.expert_ids[route.is_decode]
    return Route(
        name=route.name,
        expert_ids=ids,
        is_decode=np.ones(len(ids), dtype=bool),
        num_experts=route.num_experts,
    )


def simulated_ms(
    row: dict[str, Any],
    route: Route,
    machine: MachineProfile,
    resident_ms: float,
    warm_up_tokens: int,
    has_heads: bool,
) -> float:
    """Median TPOT of the steps that one cell measured.

    Args:
        row: The cell.
        route: Its steps, replayed from the first on.
        machine: Times of link and predictions.
        resident_ms: A token's compute.
        warm_up_tokens: Steps before the measured ones.
        has_heads: Whether prefetch arms without `-every` follow the one-head rule.
    """
    kind, recall = "none", 1.0
    if row["arm"].startswith("prefetch-"):
        word = row["arm"].removeprefix("prefetch-").removesuffix("-every")
        recall = 1.0 if word == "perfect" else float(word)
        kind = "head" if has_heads and not row["arm"].endswith("-every") else "all"
    said = SimulatedPredictor(recall=recall).predict(route, 1)
    times = LinkTimes.of(machine, top_k=route.top_k, layer_ms=resident_ms / route.num_layers)
    slots = parse_slots(f"{row['slots']}%", num_experts=route.num_experts, top_k=route.top_k)
    per_layer = [slots] * route.num_layers
    replay = Replay(route, times, find_policy("lrfu"), per_layer, find_prefetch_rule(kind), said)
    first = row.get("warm_up_tokens", warm_up_tokens)
    return statistics.median(replay.run().step_ms[first : first + row["tokens"]])


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, machine: MachineProfile, pairs: list[Pair]) -> None:
    rows = [vars(pair) | {"ratio": pair.ratio} for pair in pairs]
    content = {"profile": machine.to_dict(), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_command("benchmarks/simulator_agreement.py", main)

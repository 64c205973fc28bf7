"""Sets the simulator beside a GPU: the same steps of the same routes, measured and simulated.

    foreroute profile --out here.json    # on the GPU of decode_gpu.py
    python benchmarks/simulator_agreement.py --routes qwen3-30b-a3b.route.csv --profile here.json

Reads what `decode_gpu.py` measured, single sequences. Compute per layer is each shape's figure with
all experts resident over its layers, what predicting costs likewise; an expert's size follows from
the bytes of a cell on demand; everything else comes from the profile. Slots begin empty, and steps
are replayed as the GPU ran them: the first one, the warm-up, then the measured ones.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from random_shapes import settings_of
from replayed_routing import fit_routes, read_steps
from torch import Tensor

from foreroute.data.routes import Route
from foreroute.estimators.console import run_command
from foreroute.runtime.planning.machine import MachineProfile, find_profile
from foreroute.runtime.policies import find_policy, find_prefetch_rule
from foreroute.runtime.policies.slots import parse_slots
from foreroute.runtime.simulator import LinkTimes, Predictions, SimulatedPredictor
from foreroute.runtime.simulator.replay import Replay

RESULTS = Path(__file__).parent / "results"
AGREES_WITHIN = 0.1


@dataclass(frozen=True)
class Pair:
    """One cell, both ways; times in ms."""

    shape: str
    arm: str
    slots: int
    """Per cent of the experts resident."""
    tokens: int
    measured_hit_rate: float
    simulated_hit_rate: float
    measured_ms: float
    """Mean TPOT on the GPU."""
    simulated_ms: float
    """Mean TPOT of the same steps."""
    measured_median_ms: float
    simulated_median_ms: float

    @property
    def ratio(self) -> float:
        """Simulated over measured, of the means."""
        return self.simulated_ms / self.measured_ms


@dataclass(frozen=True)
class Shape:
    """One model's routing and sizes."""

    route: Route
    expert_bytes: int
    resident_ms: float
    """A token's compute, all experts resident, measured."""
    predicting_ms: float
    """What predicting at every layer adds to that, measured."""


def main(
    routes: Path,
    results: Path = RESULTS / "decode_gpu.json",
    profile: str = "h100-engine",
    first_steps: int = 1,
    out: Path = RESULTS / "simulator_agreement.json",
) -> None:
    """Print measured and simulated TPOT of every cell.

    Args:
        routes: The route that was replayed on the GPU.
        results: What was measured.
        profile: The machine it was measured on; nothing is fitted in a file of foreroute profile.
        first_steps: Times that the first step counts for eviction before the warm-up; what the
            engine runs while it captures and tunes itself does not.
        out: Where the rows go.
    """
    rows = [row for row in _read(results)["rows"] if row["batch"] == 1]
    recorded, machine = read_steps(routes), find_profile(profile)
    print(f"{machine.describe()}\n\nms, mean of the same tokens (medians in brackets)\n")
    print("| shape | arm | slots | hits | simulated | TPOT | simulated | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    pairs = []
    for label in dict.fromkeys(row["shape"] for row in rows):
        cells = [row for row in rows if row["shape"] == label]
        shape = shape_of(label, cells, recorded)
        for row in cells:
            if row["arm"].startswith(("on-demand", "prefetch-")):
                pairs.append(compare(row, shape, machine, first_steps))
                _print(pairs[-1])
    worst = max(pairs, key=lambda pair: abs(pair.ratio - 1))
    verdict = "within" if abs(worst.ratio - 1) <= AGREES_WITHIN else "NOT within"
    name = f"{worst.shape} {worst.arm} at {worst.slots} %"
    print(f"\n{verdict} 10 %: worst {name}, {worst.ratio:.3f}")
    _write(out, machine, pairs)


def shape_of(label: str, cells: list[dict[str, Any]], recorded: Tensor) -> Shape:
    """What the cells of one shape ran.

    Args:
        label: As rows call it: a name of `random_shapes`, and whether it has fewer layers.
        cells: Its rows, one of them all resident, one on demand.
        recorded: Routes, [steps, layers, k].
    """
    settings = settings_of(label.partition(" (")[0])
    layers, top_k = settings["num_hidden_layers"], settings["num_experts_per_tok"]
    experts = settings.get("num_experts") or settings["num_local_experts"]
    geometry = SimpleNamespace(num_layers=layers, num_experts=experts, top_k=top_k)
    ids = fit_routes(recorded, SimpleNamespace(geometry=geometry), batch=1)[:, :, 0]  # type: ignore[arg-type]
    demand = next(row for row in cells if row["arm"] == "on-demand")
    mean_of = {row["arm"]: row["tpot_ms_mean"] for row in cells if row["slots"] == 100}
    misses = (1 - demand["hit_rate"]) * layers * top_k
    return Shape(
        route=_decode_route(label, ids.numpy().astype(np.int16), experts),
        expert_bytes=round(demand["bytes_per_token"] / misses),
        resident_ms=mean_of["resident"],
        predicting_ms=max(0.0, mean_of["resident-predicting"] - mean_of["resident"]),
    )


def compare(row: dict[str, Any], shape: Shape, machine: MachineProfile, repeats: int) -> Pair:
    """Simulate one cell.

    Args:
        row: The cell.
        shape: What it ran.
        machine: Times of link and predictions.
        repeats: Times that the first step runs before the warm-up.
    """
    kind, recall = "none", 1.0
    if row["arm"].startswith("prefetch-"):
        word = row["arm"].removeprefix("prefetch-").removesuffix("-all")
        recall = 1.0 if word == "perfect" else float(word)
        kind = "all" if row["arm"].endswith("-all") else "head"
    route = shape.route
    said = SimulatedPredictor(recall=recall).predict(route, 1)
    measured = row["warm_up_tokens"] + row["tokens"]
    ran = np.concatenate([np.zeros(repeats, int), np.arange(measured) % len(route.expert_ids)])
    times = LinkTimes.of(
        machine,
        top_k=route.top_k,
        expert_bytes=shape.expert_bytes,
        layer_ms=shape.resident_ms / route.num_layers,
    )
    replay = Replay(
        _decode_route(route.name, route.expert_ids[ran], route.num_experts),
        replace(times, ahead_ms=shape.predicting_ms / route.num_layers),
        find_policy("lrfu"),
        [_slots(row, route)] * route.num_layers,
        find_prefetch_rule(kind),
        Predictions(expert_ids=said.expert_ids[:, ran], confidence=said.confidence[:, ran]),
    )
    counts = replay.run(uncounted=repeats + row["warm_up_tokens"])
    return Pair(
        shape=row["shape"],
        arm=row["arm"],
        slots=row["slots"],
        tokens=row["tokens"],
        measured_hit_rate=row["hit_rate"],
        simulated_hit_rate=counts.hits / counts.lookups,
        measured_ms=row["tpot_ms_mean"],
        simulated_ms=statistics.fmean(counts.step_ms),
        measured_median_ms=row["tpot_ms_median"],
        simulated_median_ms=statistics.median(counts.step_ms),
    )


def _slots(row: dict[str, Any], route: Route) -> int:
    return parse_slots(f"{row['slots']}%", num_experts=route.num_experts, top_k=route.top_k)


def _decode_route(name: str, ids: np.ndarray[Any, np.dtype[np.int16]], num_experts: int) -> Route:
    is_decode = np.ones(len(ids), dtype=bool)
    return Route(name=name, expert_ids=ids, is_decode=is_decode, num_experts=num_experts)


def _print(pair: Pair) -> None:
    hits = f"{pair.measured_hit_rate:.3f} | {pair.simulated_hit_rate:.3f}"
    measured = f"{pair.measured_ms:.2f} ({pair.measured_median_ms:.2f})"
    simulated = f"{pair.simulated_ms:.2f} ({pair.simulated_median_ms:.2f})"
    name = f"{pair.shape} | {pair.arm} | {pair.slots} %"
    print(f"| {name} | {hits} | {measured} | {simulated} | {pair.ratio:.3f} |")


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

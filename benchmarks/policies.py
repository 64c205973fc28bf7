"""Makes docs/policies.md: what every policy and prefetch costs on recorded routing.

    python benchmarks/policies.py --routes ../shared/traces/qwen3-30b-a3b.route.csv \
        --traces traces/held-out --bundle bundles/demo

Everything is simulated; the last table sets the simulator beside what a GPU measured.
"""

from __future__ import annotations

import dataclasses
import time
from json import loads
from pathlib import Path
from typing import Any

from replayed_routing import read_steps
from simulator_agreement import shape_of

from foreroute.data.routes import Route, read_route
from foreroute.estimators.artifacts import write_json
from foreroute.estimators.console import run_command
from foreroute.runtime.planning.machine import MachineProfile, find_profile
from foreroute.runtime.policies import find_policy, find_prefetch_rule
from foreroute.runtime.simulator import (
    LinkTimes,
    Scenario,
    SimulatedPredictor,
    SimulationRow,
    bounds,
    simulate,
)
from foreroute.runtime.simulator.cli import foretold_by_bundle
from foreroute.runtime.simulator.replay import Replay

ROOT = Path(__file__).parents[1]
AGREEMENT = ROOT / "benchmarks" / "results" / "simulator_agreement.json"
DECODE_GPU = ROOT / "benchmarks" / "results" / "decode_gpu.json"
POLICIES = ("lru", "lfu", "lrfu", "static", "default")
SLOTS = ("5%", "10%", "25%", "40%", "60%", "80%")
HORIZONS = (1, 2, 4)
MEASURED = {
    ("lru", "none", "10%"): 29.7,
    ("lru", "none", "25%"): 14.8,
    ("lru", "none", "40%"): 8.5,
    ("lru", "near-miss", "10%"): 29.8,
    ("lru", "near-miss", "25%"): 14.2,
    ("lru", "near-miss", "40%"): 8.6,
    ("lru", "uniform", "10%"): 32.4,
    ("lru", "uniform", "25%"): 18.7,
    ("lru", "uniform", "40%"): 12.4,
    ("lru", "perfect", "10%"): 25.4,
    ("lru", "perfect", "25%"): 12.7,
    ("lru", "perfect", "40%"): 8.3,
}
"""TPOT in ms on one NVIDIA H100 PCIe 5, before this simulator was written."""
Rows = list[SimulationRow]


def main(
    routes: Path,
    traces: Path | None = None,
    bundle: Path | None = None,
    doc: Path = ROOT / "docs" / "policies.md",
    json: Path = ROOT / "benchmarks" / "results" / "policies.json",
) -> None:
    """Simulate everything and write the page and its numbers.

    Args:
        routes: The recorded route.
        traces: Held-out traces of the bundled model.
        bundle: Estimators trained on others.
        doc: The page to write.
        json: The rows to write.
    """
    machine = find_profile("h100-pcie5")
    route = read_route(routes)
    scenario = _scenario(route, machine)
    near = SimulatedPredictor().predict(route, max(HORIZONS))
    scenario = dataclasses.replace(scenario, predictions=near)
    parts: dict[str, Rows] = {
        "evict": _evict(scenario, POLICIES),
        "cold": _evict(dataclasses.replace(scenario, warms_up=False), ("lru", "lrfu"), False),
        "by-misses": _evict(
            dataclasses.replace(scenario, layer_slots="by-misses"), ("default",), False
        ),
        "prefetch": _prefetch(scenario),
        "device": _prefetch(_on_engine(scenario)),
    }
    shapes = _shapes(routes)
    predictors = _other_predictors(scenario)
    agreement = _agreement(scenario)
    speeds = _speeds(scenario)
    sections = [_head(route, machine), _evict_section(parts), _prefetch_section(parts)]
    sections += [_predictors_section(predictors), _device_section(parts["device"], shapes)]
    if traces is not None and bundle is not None:
        parts |= _bundled(traces, bundle, machine)
        sections.append(_bundled_section(parts))
    sections += [_agreement_section(agreement), _speed_section(speeds), _rule_section()]
    doc.parent.mkdir(parents=True, exist_ok=True)
    doc.write_text("\n".join(sections))
    json.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        name: [row.to_dict() for row in rows] for name, rows in parts.items()
    }
    write_json(
        json,
        content
        | {
            "predictors": predictors,
            "shapes": shapes,
            "agreement": agreement,
            "layer_steps_per_second": speeds,
        },
    )
    print(doc)


def _scenario(route: Route, machine: MachineProfile) -> Scenario:
    times = LinkTimes.of(machine, top_k=route.top_k)
    return Scenario(route=route, times=times, expert_bytes=machine.expert_bytes)


def _on_engine(scenario: Scenario) -> Scenario:
    """The same under this project's engine."""
    times = LinkTimes.of(find_profile("h100-engine"), top_k=scenario.route.top_k)
    return dataclasses.replace(scenario, times=times)


def _evict(scenario: Scenario, policies: tuple[str, ...], with_bounds: bool = True) -> Rows:
    rows = []
    for slots in SLOTS:
        rows += [simulate(scenario, eviction=policy, slots=slots) for policy in policies]
        rows += bounds(scenario, slots) if with_bounds else []
    return rows


def _prefetch(scenario: Scenario) -> Rows:
    ways = [
        ("none", 1),
        *(("all", ahead) for ahead in HORIZONS),
        ("head", 1),
        *(("pieces", ahead) for ahead in HORIZONS),
    ]
    return [
        simulate(scenario, eviction="default", prefetch=way, horizon=ahead, slots=slots)
        for slots in SLOTS
        for way, ahead in ways
    ]


def _other_predictors(scenario: Scenario) -> list[dict[str, Any]]:
    """Prefetch in pieces 4 layers ahead under better and worse predictors, x on demand."""
    kinds = {
        "perfect": {"recall": 1.0, "falloff": 1.0},
        "recall .89, knows well which are wrong (a + b = 0.5)": {"concentration": 0.5},
        "recall .89, hardly knows (a + b = 20)": {"concentration": 20.0},
        "recall .89, uniform errors": {"errors": "uniform"},
        "recall .6": {"recall": 0.6},
        "recall .3, uniform errors": {"recall": 0.3, "errors": "uniform"},
    }
    base = {slots: simulate(scenario, eviction="default", slots=slots).tpot_ms for slots in SLOTS}
    rows = []
    for name, settings in kinds.items():
        said = SimulatedPredictor(**settings).predict(scenario.route, 4)  # type: ignore[arg-type]
        used = dataclasses.replace(scenario, predictions=said)
        for slots in SLOTS:
            row = simulate(used, eviction="default", prefetch="pieces", horizon=4, slots=slots)
            ratio = row.tpot_ms / base[slots]
            rows.append({"predictor": name, "slots": slots, "x_on_demand": ratio})
    return rows


def _shapes(routes: Path) -> list[dict[str, Any]]:
    """The GPU's rule where experts are fewer and larger, x on demand, from cold slots."""
    cells = [row for row in loads(DECODE_GPU.read_text())["rows"] if row["batch"] == 1]
    recorded, machine = read_steps(routes), find_profile("h100-engine")
    rows = []
    for label in dict.fromkeys(row["shape"] for row in cells):
        shape = shape_of(label, [row for row in cells if row["shape"] == label], recorded)
        route = shape.route
        times = LinkTimes.of(
            machine,
            top_k=route.top_k,
            expert_bytes=shape.expert_bytes,
            layer_ms=shape.resident_ms / route.num_layers,
        )
        times = dataclasses.replace(times, ahead_ms=shape.predicting_ms / route.num_layers)
        for recall in (0.89, 0.7):
            said = SimulatedPredictor(recall=recall).predict(route, 1)
            scenario = Scenario(
                route=route, times=times, expert_bytes=shape.expert_bytes, predictions=said
            )
            for slots in ("25%", "40%", "60%", "75%"):
                demand = simulate(scenario, eviction="lrfu", slots=slots)
                head = simulate(scenario, eviction="lrfu", prefetch="head", slots=slots)
                rows.append(
                    {
                        "shape": label,
                        "head_share": times.head_share,
                        "recall": recall,
                        "slots": slots,
                        "x_on_demand": head.tpot_ms / demand.tpot_ms,
                    }
                )
    return rows


def _bundled(traces: Path, bundle: Path, machine: MachineProfile) -> dict[str, Rows]:
    """The bundled model's routing, as if its layers and experts had the reference model's size."""
    route = read_route(traces)
    told = foretold_by_bundle(route, traces, bundle, 2)
    scenario = dataclasses.replace(_scenario(told.route, machine), predictions=told.predictions)
    slots = ("15%", "25%", "40%", "60%")
    evict, ahead = [], []
    for share in slots:
        for policy in (*POLICIES, "predicted"):
            evict.append(simulate(scenario, eviction=policy, slots=share))
        evict += bounds(scenario, share)
        ways = (("none", 1), ("all", 1), ("head", 1), ("pieces", 1), ("pieces", 2))
        for way, horizon in ways:
            row = simulate(
                scenario, eviction="predicted", prefetch=way, horizon=horizon, slots=share
            )
            ahead.append(row)
    return {"bundled-evict": evict, "bundled-prefetch": ahead}


def _agreement(scenario: Scenario) -> list[dict[str, Any]]:
    predictors = {
        "near-miss": SimulatedPredictor(),
        "uniform": SimulatedPredictor(errors="uniform"),
        "perfect": SimulatedPredictor(recall=1.0),
    }
    rows = []
    for (policy, errors, slots), measured in MEASURED.items():
        way, used = "none", scenario
        if errors in predictors:
            way = "all"
            said = predictors[errors].predict(scenario.route, 1)
            used = dataclasses.replace(scenario, predictions=said)
        row = simulate(used, eviction=policy, prefetch=way, slots=slots)
        rows.append(
            {"errors": errors, "slots": slots, "measured_ms": measured, "tpot_ms": row.tpot_ms}
        )
    return rows


def _speeds(scenario: Scenario) -> dict[str, int]:
    """Layer-steps per second of processor time on one core, best of three."""
    route, said = scenario.route, scenario.predictions
    assert said is not None
    found = {}
    for share, slots in (("10%", 13), ("25%", 32), ("60%", 77)):
        common = (route, scenario.times, find_policy("default"), [slots] * route.num_layers)
        for kind, ahead in (("none", 1), ("all", 1), ("head", 1), ("pieces", 4)):
            name = f"{kind}{f' {ahead}' if ahead > 1 else ''}, {share}"
            best = 0.0
            for _ in range(4):  # the first one may compile
                start = time.process_time()
                Replay(*common, find_prefetch_rule(kind, ahead), said).run()
                passed = time.process_time() - start
                best = max(best, route.num_decode_steps * route.num_layers / passed)
            found[name] = round(best, -3)
    return {name: int(value) for name, value in found.items()}


def _grid(rows: Rows, value: str, form: str, shares: list[str], name: Any) -> list[str]:
    """A Markdown table: one line per way to run, one column per number of slots."""
    ways = list(dict.fromkeys(name(row) for row in rows))
    at = {(name(row), f"{round(row.slots_share * 100)}%"): row for row in rows}
    columns = list(dict.fromkeys(share for _, share in at))
    lines = ["| | " + " | ".join(shares) + " |", "|---|" + "---|" * len(shares)]
    for way in ways:
        cells = [format(getattr(at[way, column], value), form) for column in columns]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


def _policy(row: SimulationRow) -> str:
    return f"*{row.eviction}* (bound)" if row.is_bound else row.eviction


def _way(row: SimulationRow) -> str:
    return row.prefetch + (f", {row.horizon} ahead" if row.horizon else "")


def _head(route: Route, machine: MachineProfile) -> str:
    return f"""# What to evict, what to fetch early

Made by `benchmarks/policies.py`; numbers in `benchmarks/results/policies.json`. All times are
**simulated** on a timeline of compute and link; the last tables say how that compares with a GPU.

Route: {route.describe()}.
Machine: {machine.describe()}. Experts of {machine.expert_bytes / 1e6:.2f} MB.

The bundled model's traces and bundle:

```
collect-traces --tokens 24000 --out train
train-estimator --traces train --epochs 4 --out run
export-estimator --run run --out bundle
collect-traces --split held-out --tokens 6144 --generated-share 0.75 --out gen
python benchmarks/policies.py --routes ../shared/traces/qwen3-30b-a3b.route.csv \\
    --traces gen --bundle bundle
```

Slots are shares of a layer's experts. The prompt's routing fills the slots before decoding, for
every policy alike, unless a table says cold.
"""


def _evict_section(parts: dict[str, Rows]) -> str:
    shares = list(SLOTS)
    lines = ["## Eviction, everything on demand", "", "Hit rate:", ""]
    lines += _grid(parts["evict"], "hit_rate", ".3f", shares, _policy)
    lines += ["", "TPOT, ms:", ""]
    lines += _grid(parts["evict"], "tpot_ms", ".2f", shares, _policy)
    lines += ["", "Hit rate from cold slots:", ""]
    lines += _grid(parts["cold"], "hit_rate", ".3f", shares, _policy)
    lines += ["", "Hit rate with slots shared between layers by their misses in the prompt:", ""]
    lines += _grid(parts["by-misses"], "hit_rate", ".3f", shares, _policy)
    gain = {share: _gain(parts["evict"], share) for share in ("10%", "25%")}
    lines += [
        "",
        f"`default` over `lru`: {gain['10%']:+.1f} points at 10 % and {gain['25%']:+.1f} at 25 % "
        "(asked for: 5 and 1.5).",
        "`default` is decayed frequency with a half-life of 20 steps, where a use by the prompt "
        "counts a quarter of one by a decode step. Half-lives of 14 to 50 steps, two half-lives at "
        "once and counting gate weights instead of uses were tried and lie within 0.2 points.",
        "",
    ]
    return "\n".join(lines)


def _predictors_section(rows: list[dict[str, Any]]) -> str:
    lines = [
        "In pieces, 4 ahead, under other predictors, all calibrated; multiples of on demand:",
        "",
        "| | " + " | ".join(SLOTS) + " |",
        "|---|" + "---|" * len(SLOTS),
    ]
    for name in dict.fromkeys(row["predictor"] for row in rows):
        cells = [f"{row['x_on_demand']:.3f}" for row in rows if row["predictor"] == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _gain(rows: Rows, share: str) -> float:
    rate = {r.eviction: r.hit_rate for r in rows if f"{round(r.slots_share * 100)}%" == share}
    return (rate["default"] - rate["lru"]) * 100


def _prefetch_section(parts: dict[str, Rows]) -> str:
    rows, shares = parts["prefetch"], list(SLOTS)
    lines = [
        "## Prefetch, `default` policy",
        "",
        "Predictor: simulated, recall .89 one layer ahead (.84, .79, .74 at 2, 3, 4), near-miss",
        "errors, calibrated confidence with beta noise (a + b = 2). TPOT, ms:",
        "",
    ]
    lines += _grid(rows, "tpot_ms", ".2f", shares, _way)
    base = {r.slots: r.tpot_ms for r in rows if r.prefetch == "none"}
    ratios = [dataclasses.replace(r, tpot_ms=r.tpot_ms / base[r.slots]) for r in rows]
    lines += ["", "The same, as a multiple of on demand:", ""]
    lines += _grid(ratios, "tpot_ms", ".3f", shares, _way)
    lines += ["", "Of the bytes copied per token, MB wasted:", ""]
    wasted = [
        dataclasses.replace(r, wasted_bytes_per_token=r.wasted_bytes_per_token / 1e6) for r in rows
    ]
    lines += _grid(wasted, "wasted_bytes_per_token", ".1f", shares, _way)
    ours = [r for r in ratios if r.prefetch == "pieces"]
    quarter = min(r.tpot_ms for r in ours if round(r.slots_share * 100) == 25)
    worst = max(r.tpot_ms for r in ours)
    lines += [
        "",
        f"In pieces at 25 %: {quarter:.3f} x on demand (asked for: at most 0.88); the worst of all "
        f"slots and horizons: {worst:.3f} x (asked for: at most 1.01).",
        "",
    ]
    return "\n".join(lines)


def _bundled_section(parts: dict[str, Rows]) -> str:
    shares = [f"{r.slots_share:.0%}" for r in parts["bundled-evict"] if r.eviction == "lru"]
    lines = [
        "## The bundled model, its bundle's own predictions",
        "",
        "Held-out traces, mostly the model's own continuations; experts and layers as large as the",
        "reference model's. Probabilities are learnt on the first quarter of the tokens, which is",
        "left out. Two layers ahead is the training-free next router. Hit rate on demand:",
        "",
    ]
    lines += _grid(parts["bundled-evict"], "hit_rate", ".4f", shares, _policy)
    lines += [
        "",
        "`predicted` adds to `default` what the router nearly chose: such experts are likelier for",
        "the next token. That adds little, but never costs. TPOT in ms under `predicted`:",
        "",
    ]
    lines += _grid(parts["bundled-prefetch"], "tpot_ms", ".2f", shares, _way)
    return "\n".join([*lines, ""])


def _agreement_section(rows: list[dict[str, Any]]) -> str:
    cells = _cells()
    off = max(abs(cell["ratio"] - 1) for cell in cells)
    lines = [
        "## Beside a GPU",
        "",
        "`benchmarks/simulator_agreement.py` replays the very steps that the GPU measured (random",
        "weights, replayed routing; for other shapes folded to their experts), under the engine's",
        "LRFU from cold slots: mean TPOT of the same tokens, and the medians of both in the JSON.",
        "Nothing is fitted: compute, and what predicting adds to it, are the measured TPOT with",
        "all experts resident; everything else is what `foreroute profile` measured on the same",
        "machine (profile `h100-engine`). `-all` prefetches every guess whole, other prefetch",
        "cells one head; in Mixtral's the engine leaves heads out, and the simulator does not.",
        "",
        "| shape | arm | slots | hits, measured | simulated | ms, measured | simulated | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {cell['shape']} | {cell['arm']} | {cell['slots']} % | "
            f"{cell['measured_hit_rate']:.3f} | {cell['simulated_hit_rate']:.3f} | "
            f"{cell['measured_ms']:.2f} | {cell['simulated_ms']:.2f} | {cell['ratio']:.3f} |"
            for cell in cells
        ),
        "",
        f"All within {off:.1%} (asked for: 10 %).",
        "Measured before, with a hand-written layer loop, LRU; link and compute in the profile",
        "`h100-pcie5` come from that machine, nothing is fitted:",
        "",
        "| prefetch | slots | measured, ms | simulated, ms | off by |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        off = row["tpot_ms"] / row["measured_ms"] - 1
        way = "on demand" if row["errors"] == "none" else f"all, {row['errors']}"
        lines.append(
            f"| {way} | {row['slots']} | {row['measured_ms']} | {row['tpot_ms']:.1f} | {off:+.0%} |"
        )
    return "\n".join([*lines, ""])


def _cells() -> list[dict[str, Any]]:
    """What `simulator_agreement.py` wrote."""
    cells: list[dict[str, Any]] = loads(AGREEMENT.read_text())["rows"]
    return cells


def _device_section(rows: Rows, shapes: list[dict[str, Any]]) -> str:
    base = {r.slots: r.tpot_ms for r in rows if r.prefetch == "none"}
    ratios = [dataclasses.replace(r, tpot_ms=r.tpot_ms / base[r.slots]) for r in rows]
    lines = [
        "## The rule that runs on the GPU",
        "",
        "`head`: while a layer computes, the GPU fetches the beginning of one expert, the next",
        "layer's likeliest absent one; the rest follows if it is needed. As much is fetched as",
        "one layer's compute hides. It is begun if its probability times trust is at least one",
        "half, and if that times its share of an expert exceeds the fear for the expert it",
        "evicts: true experts that no guess names (top-k less the sum of all p), over the",
        "residents that no guess names. Multiples of on demand under this project's engine",
        "(profile `h100-engine`):",
        "",
        *_grid(ratios, "tpot_ms", ".3f", list(SLOTS), _way),
        "",
        "Where experts are fewer and larger a head is a small part of one, and its victim a",
        "whole. The same for the shapes that the GPU measured, routes folded to their experts,",
        "cold slots:",
        "",
        "| shape | a head is | recall | 25% | 40% | 60% | 75% |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, recall in dict.fromkeys((row["shape"], row["recall"]) for row in shapes):
        mine = [row for row in shapes if (row["shape"], row["recall"]) == (label, recall)]
        figures = " | ".join(f"{row['x_on_demand']:.3f}" for row in mine)
        lines.append(f"| {label} | {mine[0]['head_share']:.0%} | {recall} | {figures} |")
    worst = max(row["x_on_demand"] for row in shapes)
    lines += [
        "",
        f"The worst is {worst:.3f}. On the GPU, heads below a tenth of an expert are left out.",
        "",
    ]
    return "\n".join(lines)


def _speed_section(speeds: dict[str, int]) -> str:
    lines = [
        "## How fast the simulator is",
        "",
        "Layer-steps per second of one core's time, recorded route, preparing included, best of",
        "four, while other programs ran (asked for: 200,000).",
        "",
        "| prefetch, slots | layer-steps/s |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value:,} |" for name, value in speeds.items()]
    missed = [name for name, value in speeds.items() if value < 200_000]
    lines += ["", f"Below what was asked for: {'; '.join(missed) or 'none'}."]
    return "\n".join([*lines, ""])


def _rule_section() -> str:
    return """## The rule of prefetch in pieces

* Predictions from 1 to H layers before a layer are ranked by probability; a later look at the same
  expert replaces an earlier one.
* Experts come in pieces (the smallest copy at nearly the link's best rate), and only while the link
  would idle: between the last copy on demand and the next layer's routing. Experts of this token
  always go first. A piece that would overhang is sent only if p(needed) x link time hidden exceeds
  p(next layer needs the link) x link time overhanging.
* To begin, p x stall saved by the pieces that fit must exceed the cost of the victim: p(the evicted
  expert is needed) x its copy, for this token and, if the guess is wrong, about one more.
* Both probabilities are corrected by what happened: guesses at *absent* experts come true less
  often than all guesses, so confidence is scaled by right / expected over the last 200 prefetches,
  and fear for victims likewise.
* If a layer is reached before its expert is there, only the rest is fetched on demand.

## In the engine

`EngineConfig` (and `foreroute generate`) take `eviction`, `prefetch` (`pieces` or `every`),
`warm_start` (the prompt's routing, or a recording) and `layer_slots` (`equal`, or `by-misses` in
that recording); `expert_slots="auto"` asks the planner. Every choice gives the same bits. Where the
host decides, `auto` fetches whole experts by the rule above, with `profile`'s times;
where the GPU decides it is `head`. Either gives up by itself: every 512 decode steps the first 16
(on a GPU that decides, 64) look ahead, and the others only if the stall saved in those exceeds what
predicting and prefetching took, both measured. On a CPU copies hide behind nothing, and no step
looks ahead. `RuntimeStats.steps_ahead` counts the steps that did. `all`, and speculative
execution, never give up. `predicted` and `static` are decided on the host alone.

## Limits

* One recorded route of 128 tokens, batch 1. Predictions on it are simulated.
* Evictions by prompts are free: prefill streams all experts past the device anyway.
* Compute of every layer is the same; `h100-pcie5` knows no contention between copies and compute.
  A real link gives pieces back later than asked.
* On a GPU `foreroute profile` times the engine's own kernels in CUDA graphs: what a fetch costs
  whatever its size, copies beside a layer's compute, what of a layer's products goes on beside its
  own demand, predicting and planning. That copies slow compute is printed (`a layer beside
  prefetches`), but not simulated. A CPU's profile has none of it, and predictions then look free.
* The GPU's rule begins as many whole experts as fit a layer's time and the head of one more; the
  simulator's `head` is that head alone.
* Slots shared by misses need a longer recording than a prompt of 28 tokens.
"""


if __name__ == "__main__":
    run_command("benchmarks/policies.py", main)

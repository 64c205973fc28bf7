"""Makes docs/eviction.md's tables: hits of each eviction rule on recorded and made-up routes.

    collect-traces --split held-out --tokens 4096 --out code
    collect-traces --split held-out --tokens 6144 --generated-share 0.75 --out code-continued
    python benchmarks/eviction.py --routes "qwen3-30b-a3b.route.csv code code-continued"

Made-up routes are the first recorded one with its experts renamed or its tokens shuffled, and draws
from a list of recently used experts. Everything is simulated, on demand, one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes import Route, read_route
from foreroute.estimators.artifacts import write_json
from foreroute.estimators.console import run_command
from foreroute.runtime.planning.machine import find_profile
from foreroute.runtime.policies import EvictionPolicy, find_policy
from foreroute.runtime.policies.eviction import decay_of
from foreroute.runtime.simulator import LinkTimes
from foreroute.runtime.simulator.replay import Replay

ROOT = Path(__file__).parents[1]
SHARES = (10, 25, 40)
"""Percent of a layer's experts that are resident."""
HALF_LIVES = (5, 10, 40)
"""Tried beside the default's 20 steps, which is not repeated."""
BOUND = 0.2
"""Points of hits that adapting may cost, under the better of LRU and the default."""
PIECE_TOKENS = 512
Cell = dict[str, Any]


def main(
    routes: str = "", json: Path = ROOT / "benchmarks" / "results" / "eviction.json", seed: int = 0
) -> None:
    """Replay every route under every rule; print a table, write its rows.

    Args:
        routes: Files or folders of recorded routing, separated by spaces; the first one is changed
            for the made-up routes.
        json: The rows to write.
        seed: Of the made-up routes.
    """
    recorded = [read_route(path) for path in routes.split()]
    made_up = [recent(0.8, seed)]
    if recorded:
        made_up = [*(switched(recorded[0], every, seed) for every in (32, 64, 128)), *made_up]
        made_up.append(shuffled(recorded[0], seed))
    cells = [
        cell
        for group, is_recorded in ((recorded, True), (made_up, False))
        for route in group
        for cell in cells_of(route, is_recorded)
    ]
    pieces = [
        cell for route in recorded for part in pieces_of(route) for cell in cells_of(part, True)
    ]
    json.parent.mkdir(parents=True, exist_ok=True)
    write_json(json, {"cells": cells, "pieces": pieces})
    print("\n".join([*table(cells), *about_pieces(pieces)]))
    print(json)


def cells_of(route: Route, is_recorded: bool) -> Iterator[Cell]:
    """Hits of each rule at each number of slots, in percent of lookups.

    Args:
        route: Replayed from the start; its prompts fill the slots.
        is_recorded: Whether a model made it.
    """
    least = -(-100 * route.top_k // route.num_experts)
    for share in dict.fromkeys(max(share, least) for share in SHARES):
        slots = max(route.top_k, round(share / 100 * route.num_experts))
        hits = {name: hit_percent(route, policy, slots) for name, policy in rules().items()}
        against = max(hits["lru"], hits["default"])
        yield {
            "route": route.name.rpartition("/")[2],
            "is_recorded": is_recorded,
            "slots": slots,
            "share": share,
            "hits": {name: round(value, 3) for name, value in hits.items()},
            "over_better": round(hits["adaptive"] - against, 3),
        }


def pieces_of(route: Route) -> Iterator[Route]:
    """Every so many tokens of a longer route as one of their own, where some are decode steps."""
    for start in range(0, len(route.expert_ids), PIECE_TOKENS):
        part = slice(start, start + PIECE_TOKENS)
        if len(route.expert_ids) > PIECE_TOKENS and route.is_decode[part].any():
            yield dataclasses.replace(
                route,
                name=f"{route.name} from token {start}",
                expert_ids=route.expert_ids[part],
                is_decode=route.is_decode[part],
                likely_ids=None,
                likely_probability=None,
            )


def rules() -> dict[str, EvictionPolicy]:
    """The policies compared, by name; of half-lives the default with another one."""
    default = find_policy("default")
    tried = {
        f"{steps} steps": dataclasses.replace(default, decay=decay_of(steps))
        for steps in HALF_LIVES
    }
    named = {name: find_policy(name) for name in ("lru", "default", "adaptive", "belady")}
    return {"lru": named.pop("lru"), **tried, **named}


def hit_percent(route: Route, policy: EvictionPolicy, slots: int) -> float:
    """Share of lookups in decode steps that hit, in percent."""
    times = LinkTimes.of(find_profile("h100-pcie5"), top_k=route.top_k)
    counts = Replay(route, times, policy, [slots] * route.num_layers).run()
    return 100 * counts.hits / counts.lookups


def switched(route: Route, every: int, seed: int) -> Route:
    """Decode steps with every layer's experts renamed at random every so many steps."""
    dice = np.random.default_rng(seed)
    ids = np.concatenate([route.expert_ids[route.is_decode]] * 4)
    for start in range(0, len(ids), every):
        for layer in range(route.num_layers):
            names = dice.permutation(route.num_experts).astype(np.int16)
            span = ids[start : start + every, layer]
            ids[start : start + every, layer] = np.where(span >= 0, names[span], span)
    return _made_up(f"renamed every {every} steps", ids, route.num_experts)


def shuffled(route: Route, seed: int) -> Route:
    """Decode steps in random order: only how often an expert is used says something."""
    ids = np.concatenate([route.expert_ids[route.is_decode]] * 4)
    order = np.random.default_rng(seed).permutation(len(ids))
    return _made_up("shuffled", ids[order], route.num_experts)


def recent(share: float, seed: int, layers: int = 12, experts: int = 128, top_k: int = 6) -> Route:
    """Experts drawn by how recently they were used, a share of them; the others at random."""
    dice = np.random.default_rng(seed)
    ids = np.empty((512, layers, top_k), dtype=np.int16)
    for layer in range(layers):
        by_use = dice.permutation(experts).tolist()
        for step in range(len(ids)):
            row: list[int] = []
            while len(row) < top_k:
                is_recent = dice.random() < share
                place = min(int(dice.exponential(15)), experts - 1)
                expert = by_use[place] if is_recent else int(dice.integers(experts))
                row += [] if expert in row else [expert]
            by_use = row + [expert for expert in by_use if expert not in row]
            ids[step, layer] = row
    return _made_up("drawn by recency", ids, experts)


def _made_up(name: str, ids: NDArray[np.int16], num_experts: int) -> Route:
    is_decode = np.ones(len(ids), dtype=np.bool_)
    return Route(name=name, expert_ids=ids, is_decode=is_decode, num_experts=num_experts)


def table(cells: list[Cell]) -> list[str]:
    """Markdown, one line per route and number of slots, and what adapting cost at worst."""
    names = list(cells[0]["hits"])
    head = ["route", "slots", *names, "adaptive over the better"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cell in cells:
        route = cell["route"] if cell["is_recorded"] else f"*{cell['route']}*"
        hits = [f"{cell['hits'][name]:.2f}" for name in names]
        row = [route, f"{cell['share']} %", *hits, f"{cell['over_better']:+.2f}"]
        lines.append("| " + " | ".join(row) + " |")
    for is_recorded, word in ((True, "recorded"), (False, "made-up")):
        mine = [cell["over_better"] for cell in cells if cell["is_recorded"] == is_recorded]
        if mine:
            lines += ["", f"The worst of the {word} routes: {min(mine):+.2f} points."]
    return lines


def about_pieces(cells: list[Cell]) -> list[str]:
    """One line about short recordings."""
    costs = [cell["over_better"] for cell in cells]
    if not costs:
        return []
    under = sum(cost < -BOUND for cost in costs)
    return [
        "",
        f"Pieces of {PIECE_TOKENS} tokens of the longer recorded routes, each on its own, "
        f"{len(costs)} cells: {under} lie more than {BOUND} points under the better, the worst "
        f"{min(costs):+.2f}; their mean is {sum(costs) / len(costs):+.3f}.",
    ]


if __name__ == "__main__":
    run_command("benchmarks/eviction.py", main)

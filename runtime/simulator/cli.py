"""What `foreroute simulate` needs of other rooms: traces, and a bundle's predictions on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foreroute.data.routes import ReadOptions, Route, read_route
from foreroute.runtime.simulator.calibration import Calibration, margins_of
from foreroute.runtime.simulator.predictions import Predictions, SimulatedPredictor

if TYPE_CHECKING:
    from rich.table import Table

    from foreroute.data.traces import Traces
    from foreroute.estimators import EstimatorStack
    from foreroute.runtime.planning.machine import MachineProfile
    from foreroute.runtime.simulator.result import SimulationRow

CALIBRATION_SHARE = 0.25
"""Of the tokens, the first: probabilities are learnt on them, and only the others are replayed."""
PREDICTED_PER_EXPERT = 2
"""Predictions kept per expert that a token uses."""


def predictions_of(traces_path: Path, bundle_path: Path, horizon: int) -> tuple[Predictions, int]:
    """What a bundle says on traces, with probabilities learnt from the first tokens.

    Its own horizon uses its estimators; others use the training-free next router.

    Args:
        traces_path: Folder of collect-traces.
        bundle_path: Folder of export-estimator.
        horizon: H, layers ahead.

    Returns:
        The predictions, and how many tokens at the start they were calibrated on.

    Raises:
        ValueError: If the two do not belong together.
    """
    from foreroute.data.opening import open_traces
    from foreroute.estimators import EstimatorStack
    from foreroute.export.bundle import load_bundle

    traces, bundle = open_traces(traces_path), load_bundle(bundle_path)
    geometry = traces.geometry
    bundle.require_fits(geometry)
    seen = int(traces.num_tokens * CALIBRATION_SHARE)
    shape = (horizon, traces.num_tokens, geometry.num_layers, PREDICTED_PER_EXPERT * geometry.top_k)
    ids = np.full(shape, -1, dtype=np.int16)
    confidence = np.zeros(shape, dtype=np.float32)
    for ahead in range(1, horizon + 1):
        stack = bundle.stack
        if ahead != stack.spec.horizon:
            if traces.anchors is None:
                raise ValueError(
                    f"{traces_path} holds no routers, which a prediction {ahead} layers ahead "
                    f"needs; simulate {stack.spec.horizon} ahead."
                )
            stack = EstimatorStack.training_free(geometry, traces.anchors, horizon=ahead)
        for source, target in zip(stack.source_layers, stack.target_layers, strict=True):
            named = _predict(traces, stack, source, target, seen, shape[-1])
            ids[ahead - 1, :, geometry.position(target)] = named[0]
            confidence[ahead - 1, :, geometry.position(target)] = named[1]
    return Predictions(expert_ids=ids, confidence=confidence), seen


def _predict(
    traces: Traces, stack: EstimatorStack, source: int, target: int, seen: int, count: int
) -> tuple[Any, Any]:
    """The likeliest experts of one target layer and their probabilities, [T, count] each."""
    import torch

    from foreroute.data.routes.traces import gathered

    logits = []
    names = ("residual", "router_input", "expert_ids", "gate_weights")
    for shard in range(len(traces.manifest.shards)):
        state = traces.read(source, shard, names)
        state = {name: t if name == "expert_ids" else t.float() for name, t in state.items()}
        with torch.no_grad():
            logits.append(stack.predict(source, **state).numpy())
    top_k = traces.geometry.top_k
    margins = margins_of(np.concatenate(logits), top_k)  # [T, E]
    ids = np.argsort(-margins, axis=-1)[:, :count]
    best = np.take_along_axis(margins, ids, -1)
    true = gathered(traces, target, "expert_ids").numpy()
    is_used = (ids[:, :, None] == true[:, None, :]).any(-1)
    return ids.astype(np.int16), Calibration.fit(best[:seen], is_used[:seen])(best)


def without_first(route: Route, predictions: Predictions, seen: int) -> tuple[Route, Predictions]:
    """Leave the tokens out that probabilities were learnt on."""
    import dataclasses

    likely_ids, likely = route.likely_ids, route.likely_probability
    rest = dataclasses.replace(
        route,
        expert_ids=route.expert_ids[seen:],
        is_decode=route.is_decode[seen:],
        likely_ids=None if likely_ids is None else likely_ids[seen:],
        likely_probability=None if likely is None else likely[seen:],
    )
    cut = Predictions(
        expert_ids=predictions.expert_ids[:, seen:], confidence=predictions.confidence[:, seen:]
    )
    return rest, cut


def simulate_all(
    route: Route,
    predictions: Predictions | None,
    profile: MachineProfile,
    settings: dict[str, Any],
    lists: dict[str, list[str]],
    horizon: int,
) -> list[SimulationRow]:
    """Every policy with every prefetch at every number of slots, then the bounds.

    Args:
        route: What was routed.
        predictions: For prefetch.
        profile: The machine.
        settings: `expert_bytes`, `layer_ms` and further fields of `Scenario`.
        lists: `slots`, `eviction` and `prefetch` to try.
        horizon: H; prefetch in pieces is tried at 1, 2, 4, ... H.
    """
    from foreroute.runtime.simulator.link import LinkTimes
    from foreroute.runtime.simulator.simulate import Scenario, bounds, simulate

    size = settings.pop("expert_bytes") or profile.expert_bytes
    times = LinkTimes.of(
        profile, top_k=route.top_k, expert_bytes=size, layer_ms=settings.pop("layer_ms")
    )
    scenario = Scenario(
        route=route, times=times, expert_bytes=size, predictions=predictions, **settings
    )
    rows = []
    for slots in lists["slots"]:
        for eviction in lists["eviction"]:
            for prefetch in lists["prefetch"]:
                if eviction == "belady" and prefetch != "none":
                    continue
                for ahead in horizons(prefetch, horizon):
                    rows.append(
                        simulate(
                            scenario,
                            eviction=eviction,
                            prefetch=prefetch,
                            horizon=ahead,
                            slots=slots,
                        )
                    )
        rows += [row for row in bounds(scenario, slots) if row.eviction not in lists["eviction"]]
    return rows


def horizons(prefetch: str, most: int) -> list[int]:
    """Horizons to try: 1, 2, 4, ... and the most; one only where it means nothing."""
    if prefetch in ("none", "head"):
        return [1]
    return sorted({*(2**power for power in range(8) if 2**power < most), most})


def simulated(
    route: Route, horizon: int, *, recall: float, errors: str, concentration: float, seed: int
) -> Predictions:
    """Predictions of a simulated predictor."""
    predictor = SimulatedPredictor(
        recall=recall,
        errors=errors,  # type: ignore[arg-type]
        concentration=concentration,
        seed=seed,
    )
    return predictor.predict(route, horizon)


def table(rows: list[SimulationRow], title: str) -> Table:
    """Rows for people, MB and ms per token; the bounds in italics."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    shown.add_column("eviction", no_wrap=True)
    shown.add_column("prefetch", no_wrap=True)
    for column in ("slots", "hits", "TPOT ms", "MB", "wasted", "stall"):
        shown.add_column(column, justify="right", no_wrap=True)
    before = rows[0].slots if rows else 0
    for row in rows:
        if row.slots != before:
            shown.add_section()
            before = row.slots
        ahead = f" {row.horizon}" if row.horizon else ""
        shown.add_row(
            row.eviction,
            f"{row.prefetch}{ahead}",
            f"{row.slots_share:.0%}",
            f"{row.hit_rate:.3f}",
            f"{row.tpot_ms:.2f}",
            f"{row.bytes_per_token / 1e6:.1f}",
            f"{row.wasted_bytes_per_token / 1e6:.1f}",
            f"{row.stall_ms:.2f}",
            style="italic" if row.is_bound else "",
        )
    return shown


def run_simulate(**given: Any) -> None:
    """The command `foreroute simulate`; takes its flags.

    Raises:
        FileNotFoundError: If there is no recording.
        ValueError: If something cannot be read or does not fit.
    """
    from rich.console import Console

    from foreroute.estimators.byte_sizes import parse_bytes
    from foreroute.runtime.planning.machine import find_profile

    profile = find_profile(given["profile"])
    options = ReadOptions(num_experts=given["num_experts"], prompt_tokens=given["prompt_tokens"])
    route = read_route(Path(given["routes"]), options)
    lists = {name: _words(given[name], name) for name in ("slots", "eviction", "prefetch")}
    predictions, who = None, "none"
    if set(lists["prefetch"]) != {"none"}:
        route, predictions, who = _predictions(route, given)
    size = given["expert_bytes"]
    settings = {
        "expert_bytes": parse_bytes(size) if size else None,
        "layer_ms": given["layer_ms"],
        "layer_slots": _one_of(given["layer_slots"], "layer_slots", ("equal", "by-misses")),
        "warms_up": given["warm_start"] != "none",
        "warm_route": _warm_route(given["warm_start"], route, options),
    }
    rows = simulate_all(route, predictions, profile, settings, lists, given["horizon"])
    console = Console()
    console.print(table(rows, route.describe()))
    console.print(f"Machine: {profile.describe()}", soft_wrap=True)
    console.print(
        f"Predictor: {who}. Slots are filled from: {given['warm_start']}.", soft_wrap=True
    )
    if given["json"] is not None:
        _write(Path(given["json"]), rows, route, profile, who, given)
        console.print(str(given["json"]), soft_wrap=True)


def _predictions(route: Route, given: dict[str, Any]) -> tuple[Route, Predictions, str]:
    """The route to replay, what is predicted on it, and by whom."""
    ahead = given["horizon"]
    if ahead >= route.num_layers:
        raise ValueError(
            f"A horizon of {ahead} needs more than the route's {route.num_layers} layers."
        )
    if given["bundle"] is not None:
        if not Path(given["routes"]).is_dir():
            raise ValueError("A bundle predicts from recorded states: --routes must be traces.")
        said, seen = predictions_of(Path(given["routes"]), Path(given["bundle"]), ahead)
        route, said = without_first(route, said, seen)
        who = f"{given['bundle']}, calibrated on the first {seen} tokens, which are left out"
    else:
        said = simulated(
            route,
            ahead,
            recall=given["recall"],
            errors=given["errors"],
            concentration=given["concentration"],
            seed=given["seed"],
        )
        who = f"simulated, {given['errors']} errors, calibrated"
    recalls = ", ".join(f"{value:.3f}" for value in said.recall(route))
    return route, said, f"{who}; recall {recalls} from 1 to {ahead} layers ahead"


def _warm_route(warm: str, route: Route, options: ReadOptions) -> Route | None:
    if warm in ("prompt", "none"):
        return None
    other = read_route(Path(warm), options)
    if (other.num_layers, other.num_experts) != (route.num_layers, route.num_experts):
        raise ValueError(f"{other.describe()} does not fit {route.describe()}.")
    return other


def _words(text: str, name: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"--{name} is empty.")
    return words


def _one_of(word: str, name: str, known: tuple[str, ...]) -> str:
    if word not in known:
        raise ValueError(f"Unknown {name} {word!r}; known: {', '.join(known)}.")
    return word


def _write(
    path: Path,
    rows: list[SimulationRow],
    route: Route,
    profile: MachineProfile,
    who: str,
    given: dict[str, Any],
) -> None:
    from foreroute.estimators.artifacts import package_versions, write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "routes": route.describe(),
        "profile": profile.to_dict(),
        "predictor": who,
        "settings": {name: str(value) for name, value in given.items()},
        "versions": package_versions(),
        "rows": [row.to_dict() for row in rows],
    }
    write_json(path, content)

"""The command `foreroute simulate`, but for its flags: it reads traces and bundles for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from foreroute.data.routes import ReadOptions, Route, Scores, read_route
from foreroute.estimators.artifacts import package_versions, require_file_place, write_json
from foreroute.estimators.byte_sizes import parse_bytes
from foreroute.estimators.console import plain_console
from foreroute.runtime.config import LayerSlots
from foreroute.runtime.planning.machine import MachineProfile, find_profile
from foreroute.runtime.policies.prefetching import ATTENTION_SHARE, READOUT_SHARE
from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.predictions import Errors, Predictions, SimulatedPredictor

if TYPE_CHECKING:
    from rich.table import Table

    from foreroute.estimators import EstimatorStack
    from foreroute.runtime.simulator.result import SimulationRow

CALIBRATION_SHARE = 0.25
"""Share of the tokens, the first, that probabilities are learnt on; the others are replayed."""
NAMED_PER_EXPERT = 2
"""Predictions kept per expert that a token uses."""


@dataclass(frozen=True, kw_only=True)
class SimulateRequest:
    """What a user asks for; fields, and what they are by default, as `foreroute simulate` says."""

    routes: Path
    profile: str
    slots: str
    eviction: str
    prefetch: str
    on_miss: str
    horizon: int
    bundle: Path | None
    recall: float
    errors: str
    concentration: float
    warm_start: str
    layer_slots: str
    expert_bytes: str | None
    model: str | None
    expert_dtype: str
    layer_ms: float | None
    num_experts: int | None
    prompt_tokens: int
    seed: int
    json: Path | None

    def __post_init__(self) -> None:
        """Check every choice.

        Raises:
            ValueError: If one is unknown or empty.
        """
        for name, known in (("layer_slots", get_args(LayerSlots)), ("errors", get_args(Errors))):
            if getattr(self, name) not in known:
                word = getattr(self, name)
                raise ValueError(f"Unknown {name} {word!r}; known: {', '.join(known)}.")
        for name in ("slots", "eviction", "prefetch", "on_miss"):
            if not self.words(name):
                raise ValueError(f"--{name} is empty.")

    def words(self, name: str) -> tuple[str, ...]:
        """A field that is a comma list, in parts."""
        return tuple(word.strip() for word in getattr(self, name).split(",") if word.strip())

    @property
    def read_options(self) -> ReadOptions:
        """What recordings do not say themselves."""
        return ReadOptions(num_experts=self.num_experts, prompt_tokens=self.prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What is predicted on a route, and by whom."""

    route: Route
    """Without the tokens that probabilities were learnt on."""
    predictions: Predictions | None = None
    delay_share: float = 0.0
    """Share of a layer's time from its routing until a prediction can be made."""
    who: str = "none"


def run_simulate(request: SimulateRequest) -> None:
    """Simulate and print.

    Raises:
        FileNotFoundError: If there is no recording.
        ValueError: If something cannot be read or does not fit.
    """
    from foreroute.runtime.simulator.simulate import Scenario
    from foreroute.runtime.simulator.sweep import Sweep

    require_file_place(request.json)
    profile, route = find_profile(request.profile), read_route(request.routes, request.read_options)
    sweep = Sweep(
        slots=request.words("slots"),
        eviction=request.words("eviction"),
        prefetch=request.words("prefetch"),
        on_miss=request.words("on_miss"),
        horizon=request.horizon,
    )
    needs_predictions = set(sweep.prefetch) != {"none"}
    told = _foretold(route, request) if needs_predictions else Foretold(route=route)
    size = _expert_bytes(request, profile)
    times = LinkTimes.of(
        profile, top_k=told.route.top_k, expert_bytes=size, layer_ms=request.layer_ms
    )
    scenario = Scenario(
        route=told.route,
        times=times.delayed(told.delay_share),
        expert_bytes=size,
        predictions=told.predictions,
        scores=None if set(sweep.on_miss) == {"fetch"} else _scores(request),
        layer_slots=request.layer_slots,  # type: ignore[arg-type]
        warms_up=request.warm_start != "none",
        warm_route=_warm_route(told.route, request),
    )
    rows = sweep.run(scenario)
    console = plain_console()
    console.print(table(rows, told.route.describe()))
    console.print(f"Machine: {profile.describe()}", soft_wrap=True)
    filled_from = f"Slots are filled from: {request.warm_start}."
    console.print(f"Predictor: {told.who}. {filled_from}", soft_wrap=True)
    if request.json is not None:
        _write(request.json, rows, told, profile, request)
        console.print(str(request.json), soft_wrap=True)


def _expert_bytes(request: SimulateRequest, profile: MachineProfile) -> int:
    """One expert as copied: as said, as the model stores it, or the profile's."""
    if request.expert_bytes is not None and request.model is not None:
        raise ValueError("Give --expert-bytes or --model, not both: each says an expert's size.")
    if request.expert_bytes is not None:
        return parse_bytes(request.expert_bytes)
    if request.model is None:
        if request.expert_dtype != "auto":
            raise ValueError("--expert-dtype needs --model, whose experts' shape says their size.")
        return profile.expert_bytes
    from foreroute.runtime.planning.model_size import measure_model

    return measure_model(request.model).bytes_as(request.expert_dtype)


def _scores(request: SimulateRequest) -> Scores | None:
    """How the routers ranked all experts; None where that was not recorded, or is not known."""
    from foreroute.data.routes.traces import is_traces, read_scores

    return read_scores(request.routes) if is_traces(request.routes) else None


def _foretold(route: Route, request: SimulateRequest) -> Foretold:
    """What the bundle says, or a simulated predictor."""
    ahead = request.horizon
    if ahead >= route.num_layers:
        raise ValueError(
            f"A horizon of {ahead} needs more than the route's {route.num_layers} layers."
        )
    if request.bundle is not None:
        if not request.routes.is_dir():
            raise ValueError("A bundle predicts from recorded states: --routes must be traces.")
        told = foretold_by_bundle(route, request.routes, request.bundle, ahead)
    else:
        predictor = SimulatedPredictor(
            recall=request.recall,
            errors=request.errors,  # type: ignore[arg-type]
            concentration=request.concentration,
            seed=request.seed,
        )
        told = Foretold(
            route=route,
            predictions=predictor.predict(route, ahead),
            who=f"simulated, {request.errors} errors, calibrated",
        )
    assert told.predictions is not None  # made in both cases
    recalls = ", ".join(f"{value:.3f}" for value in told.predictions.recall(told.route))
    who = f"{told.who}; recall {recalls} from 1 to {ahead} layers ahead"
    return dataclasses.replace(told, who=who)


def foretold_by_bundle(
    route: Route, traces_path: Path, bundle_path: Path, horizon: int
) -> Foretold:
    """What a bundle says on traces, with probabilities learnt from the first tokens.

    Its own horizon uses its estimators; others use the training-free next router. What is said of a
    layer from its own input counts as said one layer before, so much later; the first layer, which
    that serves too, is left to demand.

    Args:
        route: The routing in the traces.
        traces_path: Folder of collect-traces.
        bundle_path: Folder of export-estimator.
        horizon: H, layers ahead.

    Raises:
        ValueError: If the two do not belong together, or what estimators read was not recorded.
    """
    from foreroute.data.opening import open_traces
    from foreroute.estimators import EstimatorStack
    from foreroute.export.bundle import load_bundle
    from foreroute.train.predicted import predicted

    traces, bundle = open_traces(traces_path), load_bundle(bundle_path)
    geometry, own = traces.geometry, bundle.stack
    bundle.require_fits(geometry)
    num_calibrate = int(traces.num_tokens * CALIBRATION_SHARE)
    count = min(NAMED_PER_EXPERT * geometry.top_k, geometry.num_experts)
    shape = (horizon, traces.num_tokens, geometry.num_layers, count)
    ids = np.full(shape, -1, dtype=np.int16)
    confidence = np.zeros(shape, dtype=np.float32)
    for ahead in range(1, horizon + 1):
        stack = own
        if ahead != max(1, own.spec.horizon):
            if traces.anchors is None:
                raise ValueError(
                    f"{traces_path} holds no routers, which a prediction {ahead} layers ahead "
                    f"needs; simulate {own.spec.horizon} ahead."
                )
            stack = EstimatorStack.training_free(geometry, traces.anchors, horizon=ahead)
        for source, target in zip(stack.source_layers, stack.target_layers, strict=True):
            named, chances = predicted(
                traces, stack, source, num_calibrate=num_calibrate, count=count
            )
            ids[ahead - 1, :, geometry.position(target)] = named
            confidence[ahead - 1, :, geometry.position(target)] = chances
    learnt = f"calibrated on the first {num_calibrate} tokens, which are left out"
    return Foretold(
        route=_without_first(route, num_calibrate),
        predictions=Predictions(
            expert_ids=ids[:, num_calibrate:], confidence=confidence[:, num_calibrate:]
        ),
        delay_share=_delay_share(own),
        who=f"{bundle_path}, {learnt}",
    )


def _delay_share(stack: EstimatorStack) -> float:
    """How much later than a layer's routing its state can be read, as a share of its time."""
    if "layer_input" in stack.input_fields:
        return 1 - ATTENTION_SHARE
    return READOUT_SHARE if "readout" in stack.input_fields else 0.0


def _without_first(route: Route, count: int) -> Route:
    """Leave tokens at the start out."""
    likely_ids, likely = route.likely_ids, route.likely_probability
    return dataclasses.replace(
        route,
        expert_ids=route.expert_ids[count:],
        is_decode=route.is_decode[count:],
        likely_ids=None if likely_ids is None else likely_ids[count:],
        likely_probability=None if likely is None else likely[count:],
    )


def _warm_route(route: Route, request: SimulateRequest) -> Route | None:
    if request.warm_start in ("prompt", "none"):
        return None
    other = read_route(request.warm_start, request.read_options)
    if (other.num_layers, other.num_experts) != (route.num_layers, route.num_experts):
        raise ValueError(f"{other.describe()} does not fit {route.describe()}.")
    return other


def table(rows: list[SimulationRow], title: str) -> Table:
    """Rows for people, MB and ms per token; the bounds in italics."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    shown.add_column("eviction", no_wrap=True)
    shown.add_column("prefetch", no_wrap=True)
    has_rules = any(row.on_miss != "fetch" for row in rows)
    if has_rules:
        shown.add_column("on a miss", overflow="fold", min_width=12)
        shown.add_column("agree", justify="right", no_wrap=True)
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
            *((row.on_miss, f"{row.agreement:.3f}") if has_rules else ()),
            f"{row.slots_share:.0%}",
            f"{row.hit_rate:.3f}",
            f"{row.tpot_ms:.2f}",
            f"{row.bytes_per_token / 1e6:.1f}",
            f"{row.wasted_bytes_per_token / 1e6:.1f}",
            f"{row.stall_ms:.2f}",
            style="italic" if row.is_bound else "",
        )
    return shown


def _write(
    path: Path,
    rows: list[SimulationRow],
    told: Foretold,
    profile: MachineProfile,
    request: SimulateRequest,
) -> None:
    content = {
        "routes": told.route.describe(),
        "profile": profile.to_dict(),
        "predictor": told.who,
        "settings": {name: str(value) for name, value in vars(request).items()},
        "versions": package_versions(),
        "rows": [row.to_dict() for row in rows],
    }
    write_json(path, content)

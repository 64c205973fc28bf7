"""What predictions are worth: the time per token that they save, replayed on machines' profiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes import Ids, Route
from foreroute.runtime.planning.machine import MachineProfile
from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.predictions import Predictions
from foreroute.runtime.simulator.result import SimulationRow
from foreroute.runtime.simulator.simulate import Scenario, simulate

PROFILES = ("h100-engine", "a100-pcie4", "rtx4090-pcie4")
"""Machines that worth is told on: measured by this project, and two from data sheets."""
SLOTS = ("10%", "25%", "40%")
"""Shares of a layer's experts that are resident."""
PROMPT_SHARE = 0.125
"""Share of the tokens, the first, that fill the slots and are not timed."""
CONTENTION = 0.31
"""Share of a prediction's time that its layer's compute takes longer for it: 1.7 of 5.5 us were
measured (docs/estimators.md); the rest goes on beside the layer."""


@dataclass(frozen=True, kw_only=True)
class Worth:
    """One way to prefetch on one machine, beside on demand at equal slots."""

    profile: str
    """The machine."""
    slots: str
    """Share of the experts resident."""
    rule: str
    """What is fetched early: `head`, `pieces`; or `eviction` where predictions only protect."""
    horizon: int
    """Layers ahead."""
    on_demand_ms: float
    """TPOT without predictions."""
    tpot_ms: float
    """TPOT with them."""
    wasted_bytes: float
    """Per token, prefetched and not used."""
    stall_ms: float
    """Per token, waiting for the link."""
    on_demand_stall_ms: float
    """The same without predictions."""

    @property
    def saved(self) -> float:
        """Share of on-demand TPOT saved; below 0 where predictions cost time."""
        return 1 - self.tpot_ms / self.on_demand_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, numbers rounded."""
        found = dataclasses.asdict(self) | {"saved": self.saved}
        return {n: round(v, 5) if isinstance(v, float) else v for n, v in found.items()}


OnDemand = dict[tuple[str, str], SimulationRow]
"""By profile and slots, one route replayed on demand."""


def route_to_replay(name: str, expert_ids: Ids, num_experts: int) -> Route:
    """Recorded routing as decode steps, after a first part that fills the slots.

    Args:
        name: For messages.
        expert_ids: [T, L, K].
        num_experts: E.
    """
    is_decode = np.arange(len(expert_ids)) >= int(PROMPT_SHARE * len(expert_ids))
    ids = expert_ids.astype(np.int16)
    return Route(name=name, expert_ids=ids, is_decode=is_decode, num_experts=num_experts)


def worth_of(
    route: Route,
    predictions: Predictions,
    profile: MachineProfile,
    *,
    slots: Sequence[str] = SLOTS,
    extra_us: float = 0.0,
    on_demand: OnDemand | None = None,
) -> list[Worth]:
    """Replay on demand and with predictions.

    One layer ahead by both rules, further ahead in pieces, which look at all distances.

    Args:
        route: What the routers did.
        predictions: Of 1..H layers ahead.
        profile: Machine and reference model, whose experts' size and layers' time are taken.
        slots: Shares of the experts to try.
        extra_us: What a prediction takes longer than the profile's own, microseconds a layer.
        on_demand: Remembers what was replayed on demand for this route.
    """
    known = {} if on_demand is None else on_demand
    horizon = predictions.horizon
    slots = slots_that_fit(route, slots)
    rules = ("head", "pieces") if horizon == 1 else ("pieces",)
    times = slower_by(LinkTimes.of(profile, top_k=route.top_k), extra_us)
    scenario = Scenario(
        route=route, times=times, expert_bytes=profile.expert_bytes, predictions=predictions
    )
    return [
        _beside_on_demand(scenario, profile.name, share, rule, horizon, known)
        for share in slots
        for rule in rules
    ]


def worth_of_protecting(
    route: Route,
    next_token: Predictions,
    profile: MachineProfile,
    *,
    slots: Sequence[str] = SLOTS,
    on_demand: OnDemand | None = None,
) -> list[Worth]:
    """Replay on demand, with experts that the next token will likely use protected from eviction.

    Args:
        route: What the routers did.
        next_token: Entry 0 is what was said of each token's own routing one token before.
        profile: The machine.
        slots: Shares of the experts to try.
        on_demand: As in `worth_of`.
    """
    known = {} if on_demand is None else on_demand
    ids, said = next_token.expert_ids[0], next_token.confidence[0]
    ahead = dataclasses.replace(
        route,
        likely_ids=np.concatenate([ids[1:], np.full_like(ids[:1], -1)]),
        likely_probability=np.concatenate([said[1:], np.zeros_like(said[:1])]),
    )
    slots = slots_that_fit(route, slots)
    times = LinkTimes.of(profile, top_k=route.top_k)
    scenario = Scenario(route=ahead, times=times, expert_bytes=profile.expert_bytes)
    return [_beside_on_demand(scenario, profile.name, s, "none", 1, known) for s in slots]


def slots_that_fit(route: Route, slots: Sequence[str]) -> list[str]:
    """Shares of the experts, each at least what one token needs: its top-k where it is less."""
    least = 100 * route.top_k / route.num_experts
    fitting = (s if float(s.rstrip("%")) >= least else str(route.top_k) for s in slots)
    return list(dict.fromkeys(fitting))


def slower_by(times: LinkTimes, extra_us: float) -> LinkTimes:
    """The same times where a prediction takes longer, in microseconds a layer."""
    extra_ms = extra_us / 1e3
    return dataclasses.replace(
        times,
        predict_ms=max(0.0, times.predict_ms + extra_ms),
        ahead_ms=max(0.0, times.ahead_ms + CONTENTION * extra_ms),
    )


def _beside_on_demand(
    scenario: Scenario, profile: str, slots: str, rule: str, horizon: int, known: OnDemand
) -> Worth:
    if (profile, slots) not in known:
        known[profile, slots] = simulate(scenario, eviction="default", slots=slots)
    without, eviction = known[profile, slots], "predicted" if rule == "none" else "default"
    found = simulate(scenario, eviction=eviction, prefetch=rule, horizon=horizon, slots=slots)
    return Worth(
        profile=profile,
        slots=slots,
        rule="eviction" if rule == "none" else rule,
        horizon=horizon,
        on_demand_ms=without.tpot_ms,
        tpot_ms=found.tpot_ms,
        wasted_bytes=found.wasted_bytes_per_token,
        stall_ms=found.stall_ms,
        on_demand_stall_ms=without.stall_ms,
    )


def predictions_over_layers(
    said: Sequence[tuple[NDArray[np.int64], NDArray[np.float32], Sequence[int]]], num_layers: int
) -> Predictions:
    """Predictions of some layers, set among all layers.

    Args:
        said: By distance, from 1 layer on: ids [T, P, M], their probabilities [T, P, M], and the
            place of each predicted layer among the MoE layers.
        num_layers: L.
    """
    count = min(ids.shape[2] for ids, _, _ in said)
    shape = (len(said), len(said[0][0]), num_layers, count)
    ids = np.full(shape, -1, dtype=np.int16)
    confidence = np.zeros(shape, dtype=np.float32)
    for distance, (found, chances, places) in enumerate(said):
        ids[distance][:, list(places)] = found[..., :count]
        confidence[distance][:, list(places)] = chances[..., :count]
    return Predictions(expert_ids=ids, confidence=confidence)

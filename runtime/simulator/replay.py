"""Replays recorded routing on a timeline of compute and link, under given policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes import Route
from foreroute.runtime.policies import EvictionPolicy, PrefetchRule
from foreroute.runtime.policies.duel import duelling_layers
from foreroute.runtime.policies.prefetching import PRIOR_DEMAND, PRIOR_PREFETCHES
from foreroute.runtime.simulator import timeline
from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.misses import RuledSteps
from foreroute.runtime.simulator.predictions import Predictions
from foreroute.runtime.simulator.result import ReplayCounts
from foreroute.runtime.simulator.timeline import (
    EMPTY,
    NOTHING_UNUSED,
    Cache,
    Floats,
    Integers,
    Looks,
    Wishes,
)

KINDS = {
    "frequency": timeline.FREQUENCY,
    "recency": timeline.RECENCY,
    "adaptive": timeline.ADAPTIVE,
    "static": timeline.STATIC,
    "future": timeline.FUTURE,
}
PRIOR_VICTIMS = 2.0
Step = Callable[[int], float]


class Replay:
    """Runs a route; experts are numbered through all layers (layer x E + expert)."""

    def __init__(
        self,
        route: Route,
        times: LinkTimes,
        policy: EvictionPolicy,
        slots: Sequence[int],
        rule: PrefetchRule | None = None,
        predictions: Predictions | None = None,
        ruled: RuledSteps | None = None,
    ) -> None:
        """Start with empty slots.

        Args:
            route: What the tokens used.
            times: Of machine and model.
            policy: What is evicted.
            slots: Per layer.
            rule: What is fetched early; nothing if None.
            predictions: Of all horizons up to the rule's.
            ruled: Replays the steps under a rule on a miss; without prefetch.
        """
        self.route, self.policy = route, policy
        self._machine = times.machine()
        self._rows = number(route.expert_ids, route.num_experts)
        self._next_use = _next_uses(self._rows) if policy.needs_future else self._rows.astype(float)
        self.cache = _empty_cache(route, policy, slots)
        if policy.needs_future:
            self._foresee()
        self._step = self._step_of(rule, predictions)
        if ruled is not None:
            self._step = lambda t: ruled.run(
                self.cache, self._machine, self._rows[t], self._next_use[t], t
            )

    def _foresee(self) -> None:
        """Give every expert the worth of its first use."""
        for row, worth in zip(self._rows[::-1], -np.arange(len(self._rows))[::-1], strict=True):
            self.cache.worth[row[row >= 0]] = worth

    def _step_of(self, rule: PrefetchRule | None, predictions: Predictions | None) -> Step:
        """The function that replays one decode step."""
        cache, machine, rows, next_use = self.cache, self._machine, self._rows, self._next_use
        if rule is None or rule.kind == "none" or predictions is None:
            return lambda t: timeline.run_on_demand(cache, machine, rows[t], next_use[t])
        luck = np.array([PRIOR_PREFETCHES] * 2 + [PRIOR_VICTIMS] * 2)
        ahead, keeps = rule.horizon, 1 - 1 / rule.trust_tokens
        guesses = number(predictions.expert_ids[ahead - 1], self.route.num_experts)
        if rule.kind == "all":
            guesses = np.ascontiguousarray(guesses[..., : self.route.top_k])
            return lambda t: timeline.run_all(
                cache, machine, rows[t], next_use[t], guesses[t], ahead
            )
        if rule.kind == "head":
            said, least = predictions.confidence[0].astype(np.float64), rule.least_confidence
            return lambda t: timeline.run_head(
                cache, machine, rows[t], next_use[t], guesses[t], said[t], luck, least, keeps
            )
        looks = _looks(predictions, rule, self.route)
        wishes = _no_wishes(len(self.cache.worth))
        demands = np.full(self.route.num_layers, PRIOR_DEMAND)
        return lambda t: timeline.run_pieces(
            cache, machine, rows[t], next_use[t], t, looks, wishes, luck, demands, keeps
        )

    def warm_from(self, route: Route) -> None:
        """Count another route's uses, all of its tokens, and fill the slots with the best."""
        if not self.policy.needs_future:
            self._warm(number(route.expert_ids, route.num_experts))

    def _warm(self, rows: Integers) -> None:
        for layer in range(self.route.num_layers):
            timeline.warm(self.cache, layer, rows[:, layer])

    def run(self, *, warms_up: bool = True, uncounted: int = 0) -> ReplayCounts:
        """Replay everything.

        Args:
            warms_up: Whether prompts fill the slots; if not, they are passed over.
            uncounted: First decode steps that change the slots but are not reported.
        """
        step_ms: list[float] = []
        before = self.cache.counts.copy()
        for start, stop, is_decode in self.route.spans():
            if is_decode:
                for token in range(start, stop):
                    step_ms.append(self._step(token) + self._machine.token_ms)
                    self._expect_next(token)
                    if len(step_ms) == uncounted:
                        before = self.cache.counts.copy()
            elif self.policy.needs_future:
                self._pass_over(start, stop)
            elif warms_up:
                self._warm(self._rows[start:stop])
        return ReplayCounts.of(self.cache.counts - before, step_ms[uncounted:])

    def _pass_over(self, start: int, stop: int) -> None:
        """Demand a prompt's experts, untimed and uncounted."""
        for token in range(start, stop):
            for layer in range(self.route.num_layers):
                where = token, layer
                timeline.demand(self.cache, layer, self._rows[where], self._next_use[where])

    def _expect_next(self, token: int) -> None:
        """Credit what the router nearly chose."""
        ids, likely = self.route.likely_ids, self.route.likely_probability
        if not self.policy.likely_bonus or ids is None or likely is None:
            return
        numbered = number(ids[token][None], self.route.num_experts)[0]
        for layer in range(self.route.num_layers):
            chances = likely[token, layer].astype(np.float64)
            timeline.expect(self.cache, layer, numbered[layer], chances)


def number(ids: NDArray[np.int16], num_experts: int) -> Integers:
    """Ids [T, L, M] numbered through the layers, -1 for none."""
    given = ids.astype(np.int64)
    offset = (np.arange(given.shape[1]) * num_experts)[None, :, None]
    numbered: Integers = np.where(given >= 0, given + offset, EMPTY)
    return numbered


def _empty_cache(route: Route, policy: EvictionPolicy, slots: Sequence[int]) -> Cache:
    experts = route.num_layers * route.num_experts
    rivals = experts if policy.worth == "adaptive" else 0
    return Cache(
        kind=KINDS[policy.worth],
        decay=policy.decay,
        prompt_weight=policy.prompt_weight,
        likely_bonus=policy.likely_bonus,
        first=np.concatenate([[0], np.cumsum(slots)]).astype(np.int64),
        expert_in=np.full(sum(slots), EMPTY),
        slot_of=np.full(experts, EMPTY),
        worth=np.zeros(experts),
        unit=np.ones(route.num_layers),
        step=np.zeros(route.num_layers, dtype=np.int64),
        unused=np.full(experts, NOTHING_UNUSED),
        counts=np.zeros(timeline.NUM_COUNTS),
        used_at=np.zeros(rivals),
        shadows=np.zeros((2, rivals), dtype=np.bool_),
        duels=np.array(duelling_layers(route.num_layers)),
        lead=np.zeros(1, dtype=np.int64),
        is_recent=np.zeros(route.num_layers, dtype=np.bool_),
    )


def _next_uses(rows: Integers) -> Floats:
    """Minus the step at which each expert is used next, minus infinity for never, [T, L, K]."""
    uses = np.full(rows.shape, -np.inf)
    upcoming = np.full(int(rows.max()) + 1, -np.inf)
    for step in range(len(rows) - 1, -1, -1):
        there = rows[step] >= 0
        uses[step][there] = upcoming[rows[step][there]]
        upcoming[rows[step][there]] = -float(step)
    return uses


def _looks(predictions: Predictions, rule: PrefetchRule, route: Route) -> Looks:
    ahead = slice(0, rule.horizon)
    numbered = [number(ids, route.num_experts) for ids in predictions.expert_ids[ahead]]
    mass = predictions.confidence[0].sum(-1) / route.top_k  # [T, L]
    return Looks(
        expert_ids=np.stack(numbered),
        confidence=np.ascontiguousarray(predictions.confidence[ahead]),
        least=float(np.float32(rule.least_confidence)),
        missed_mass=np.clip(1 - mass, 0.0, 1.0).astype(np.float64),
        said=np.zeros(route.num_layers * route.num_experts),
    )


def _no_wishes(most: int) -> Wishes:
    """Room for so many."""

    def integers() -> Integers:
        return np.full(most, EMPTY)

    return Wishes(
        at=integers(),
        expert=integers(),
        target=integers(),
        probability=np.zeros(most),
        left=integers(),
        is_started=np.zeros(most, dtype=np.bool_),
        victim=integers(),
        fear=np.zeros(most),
        queue=integers(),
    )

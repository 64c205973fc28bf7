"""Replays decode steps on a timeline of compute and link, without prefetch or with all of it."""

from __future__ import annotations

from collections.abc import Sequence

from foreroute.runtime.policies import EvictionPolicy, LayerState
from foreroute.runtime.simulator.belady import BeladyState
from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.predictions import Predictions
from foreroute.runtime.simulator.result import ReplayCounts
from foreroute.runtime.simulator.route import Route

Rows = list[list[tuple[int, ...]]]


class Replay:
    """Runs a route under one policy with every expert fetched on demand.

    Experts are numbered through all layers (layer x E + expert), so that layers share tables.
    """

    def __init__(
        self, route: Route, times: LinkTimes, policy: EvictionPolicy, slots: Sequence[int]
    ) -> None:
        """Start with empty slots.

        Args:
            route: What the tokens used.
            times: Of machine and model.
            policy: What is evicted.
            slots: Per layer.
        """
        self.route, self.times, self.policy = route, times, policy
        self.counts = ReplayCounts()
        self.rows = _numbered_through(route)
        self.here = [False] * (route.num_layers * route.num_experts)
        self._worth = [0.0] * len(self.here)
        self.unused: dict[int, float] = {}
        """Prefetched and not used yet: how much of each was copied, in experts."""
        self.layers = [self._state(layer, count) for layer, count in enumerate(slots)]
        self._likely = _likely_rows(route) if policy.likely_bonus else None

    def _state(self, layer: int, num_slots: int) -> LayerState:
        experts = self.route.num_experts
        shared = {"first": layer * experts, "here": self.here, "worth": self._worth}
        if self.policy.needs_future:
            future = [token[layer] for token in self.rows]
            return BeladyState(self.policy, experts, num_slots, future, **shared)
        return LayerState(self.policy, experts, num_slots, **shared)  # type: ignore[arg-type]

    def warm_from(self, route: Route) -> None:
        """Count another route's uses, all of its tokens, and fill the slots with the best."""
        rows = _numbered_through(route)
        for layer, state in enumerate(self.layers):
            state.warm([token[layer] for token in rows])

    def run(self, *, warms_up: bool = True) -> ReplayCounts:
        """Replay everything.

        Args:
            warms_up: Whether prompts fill the slots; if not, they are passed over.
        """
        for start, stop, is_decode in self.route.spans():
            if is_decode:
                for step in range(start, stop):
                    self.counts.time_ms += self.run_token(step) + self.times.token_ms
                    if self._likely is not None:
                        for state, likely in zip(self.layers, self._likely[step], strict=True):
                            state.expect(*likely)
                self.counts.tokens += stop - start
            elif warms_up or self.policy.needs_future:
                for layer, state in enumerate(self.layers):
                    state.warm([token[layer] for token in self.rows[start:stop]])
        return self.counts

    def run_token(self, step: int) -> float:
        """Replay one decode step; returns its time in ms."""
        counts, demand_ms, layer_ms = self.counts, self.times.demand_ms, self.times.layer_ms
        stall = 0.0
        missed = lookups = 0
        for state, ids in zip(self.layers, self.rows[step], strict=True):
            lookups += len(ids)
            missing = len(state.demand(ids))
            if missing:
                missed += missing
                stall += demand_ms[missing]
        counts.lookups += lookups
        counts.hits += lookups - missed
        counts.fetched += missed
        counts.stall_ms += stall
        return stall + layer_ms * len(self.layers)

    def demand(self, state: LayerState, ids: tuple[int, ...]) -> int:
        """As the state's own, with prefetches told apart; returns how many were absent."""
        here, unused = self.here, self.unused
        missing = [expert for expert in ids if not here[expert]]
        for expert in missing:
            victim = state.admit(expert, ids)
            if unused and victim in unused:
                self.counts.wasted += unused.pop(victim)
        if unused:
            for expert in ids:
                unused.pop(expert, None)
        state.use(ids)
        return len(missing)


class EagerReplay(Replay):
    """The top-k likeliest are fetched whole, and their layer waits until all have arrived."""

    def __init__(
        self,
        route: Route,
        times: LinkTimes,
        policy: EvictionPolicy,
        slots: Sequence[int],
        predictions: Predictions,
        horizon: int,
    ) -> None:
        """Start with empty slots; predictions of exactly one horizon are used."""
        super().__init__(route, times, policy, slots)
        self._horizon = horizon
        guesses = predictions.expert_ids[horizon - 1][..., : route.top_k]
        self._guesses = _number(guesses, route.num_experts)

    def run_token(self, step: int) -> float:
        """Replay one decode step; returns its time in ms."""
        counts, times = self.counts, self.times
        clock = free = 0.0
        arrival = [0.0] * len(self.layers)
        for layer, (state, ids) in enumerate(zip(self.layers, self.rows[step], strict=True)):
            known = clock
            clock = max(clock, arrival[layer])
            missing = self.demand(state, ids)
            if missing:
                clock = free = max(clock, free) + times.demand_ms[missing]
            counts.stall_ms += clock - known
            counts.lookups += len(ids)
            counts.hits += len(ids) - missing
            counts.fetched += missing
            ahead = layer + self._horizon
            if ahead < len(self.layers):
                asked = self._prefetch(self.layers[ahead], self._guesses[step][ahead])
                if asked:
                    free = max(free, clock + times.predict_ms) + times.copy_ms(asked)
                    arrival[ahead] = free
            clock += times.layer_ms
        return clock

    def _prefetch(self, state: LayerState, guesses: tuple[int, ...]) -> int:
        absent = [expert for expert in guesses if not self.here[expert]]
        asked = 0
        for expert in absent:
            if state.victim_slot(guesses) < 0:
                break
            victim = state.admit(expert, guesses)
            if victim in self.unused:
                self.counts.wasted += self.unused.pop(victim)
            self.unused[expert] = 1.0
            asked += 1
        self.counts.prefetched += asked
        return asked


def _number(ids: object, num_experts: int) -> Rows:
    """Ids [T, L, M] as plain Python, numbered through the layers, -1 left out."""
    import numpy as np

    given = np.asarray(ids, dtype=np.int64)
    offset = (np.arange(given.shape[1]) * num_experts)[None, :, None]
    numbered = np.where(given >= 0, given + offset, -1)
    if given.min() >= 0:
        return [list(map(tuple, token)) for token in numbered.tolist()]
    return [[tuple(e for e in ids if e >= 0) for ids in token] for token in numbered.tolist()]


def _numbered_through(route: Route) -> Rows:
    return _number(route.expert_ids, route.num_experts)


def _likely_rows(route: Route) -> list[list[tuple[tuple[int, ...], tuple[float, ...]]]] | None:
    """Per token and layer: experts likely for the next token, and how likely."""
    if route.likely_ids is None or route.likely_probability is None:
        return None
    ids = _number(route.likely_ids, route.num_experts)
    probabilities = route.likely_probability.tolist()
    return [
        [(i, tuple(p[: len(i)])) for i, p in zip(layer_ids, layer_p, strict=True)]
        for layer_ids, layer_p in zip(ids, probabilities, strict=True)
    ]

"""Replays decode steps with budgeted prefetch: in pieces, only while the link would idle."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from foreroute.runtime.policies import EvictionPolicy, LayerState, PrefetchRule
from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.predictions import Predictions
from foreroute.runtime.simulator.replay import Replay
from foreroute.runtime.simulator.route import Route

NEWS = 0.1  # a look from nearer that says nearly the same is no news
CHUNK_TOKENS = 256
PRIOR_PREFETCHES = 20.0
_ORDER = attrgetter("order")
PRIOR_VICTIMS = 2.0
DEMAND_MEMORY = 0.95  # per token: how fast a layer's habit of demanding is forgotten


class Wish:
    """One prediction that is absent: waiting, on its way, or there."""

    __slots__ = (
        "expert",
        "is_started",
        "left",
        "order",
        "probability",
        "target",
        "victim",
        "victim_probability",
    )

    def __init__(self, expert: int, target: int, probability: float, left: int) -> None:
        self.expert, self.target = expert, target
        self.probability, self.left = probability, left
        self.order = -probability
        self.is_started = False
        self.victim, self.victim_probability = -1, 0.0


class BudgetedReplay(Replay):
    """Fetches a prediction early when the rule says that it pays; demand always goes first."""

    def __init__(
        self,
        route: Route,
        times: LinkTimes,
        policy: EvictionPolicy,
        slots: Sequence[int],
        predictions: Predictions,
        rule: PrefetchRule,
    ) -> None:
        """Start with empty slots; predictions of all horizons up to the rule's are used."""
        super().__init__(route, times, policy, slots)
        self._rule = rule
        self._wishes = _candidates(predictions, rule, route)
        self._named, self._missed_mass = _nearest(predictions, route)
        self._right, self._expected = PRIOR_PREFETCHES, PRIOR_PREFETCHES
        self._missed, self._feared = PRIOR_VICTIMS, PRIOR_VICTIMS
        self._keeps = 1 - 1 / rule.trust_tokens
        self._demands = [0.5] * len(self.layers)
        self._queue: list[Wish] = []
        self._queued: dict[int, Wish] = {}
        self._due: list[list[Wish]] = []

    @property
    def trust(self) -> float:
        """How often guesses at absent experts come true, over how often they say."""
        return min(1.0, self._right / self._expected)

    @property
    def regret(self) -> float:
        """How often experts evicted for a prefetch were then needed, over how often feared."""
        return self._missed / self._feared

    def run_token(self, step: int) -> float:
        """Replay one decode step; returns its time in ms."""
        counts, times, demands, rows = self.counts, self.times, self._demands, self.rows[step]
        layer_ms = times.layer_ms
        clock = free = 0.0
        self._queue, self._queued = [], {}
        due = self._due = [[] for _ in self.layers]
        candidates = self._wishes[step]
        for layer, state in enumerate(self.layers):
            ids = rows[layer]
            rest, late = self._arrive(due[layer], state, ids) if due[layer] else (0.0, 0)
            missing = self.demand(state, ids)
            counts.lookups += len(ids)
            counts.hits += len(ids) - missing - late
            if missing or late:
                known = clock
                clock = free = max(clock, free) + times.copy_ms(missing + rest)
                counts.stall_ms += clock - known
                counts.fetched += missing + rest
                counts.late += late
                demands[layer] += (1 - DEMAND_MEMORY) * (1 - demands[layer])
            else:
                demands[layer] *= DEMAND_MEMORY
            self._look_at(candidates[layer])
            until = clock + layer_ms
            if self._queue:
                free = self._fill_link(step, layer, max(free, clock + times.predict_ms), until)
            clock = until
        return clock

    def _arrive(
        self, due: list[Wish], state: LayerState, ids: tuple[int, ...]
    ) -> tuple[float, int]:
        """Settle what was wished for this layer; returns what is left to copy, for how many."""
        rest, late, pieces = 0.0, 0, self.times.pieces
        for wish in due:
            if wish.is_started:
                is_right = wish.expert in ids
                self._expected = self._expected * self._keeps + wish.probability
                self._right = self._right * self._keeps + is_right
                if wish.victim >= 0:
                    self._feared = self._feared * self._keeps + wish.victim_probability
                    self._missed = self._missed * self._keeps + (wish.victim in ids)
                if wish.left and is_right:
                    rest += wish.left / pieces
                    late += 1
                elif wish.left:
                    state.release(wish.expert)
                    self.counts.wasted += self.unused.pop(wish.expert, 0.0)
            wish.left = 0  # nothing of it is sent any more
        return rest, late

    def _look_at(self, candidates: tuple[tuple[int, int, float], ...]) -> None:
        """Wish for predictions that are absent; a later look at one replaces an earlier."""
        here, queued = self.here, self._queued
        for expert, target, probability in candidates:
            if here[expert]:
                continue
            wish = queued.get(expert)
            if wish is None:
                wish = queued[expert] = Wish(expert, target, probability, self.times.pieces)
                self._queue.append(wish)
                self._due[target].append(wish)
            else:
                wish.probability, wish.order = probability, -probability

    def _fill_link(self, step: int, layer: int, at: float, until: float) -> float:
        """Send pieces, the likeliest experts' first, until the next layer's routing is known.

        Returns:
            When the link is free.
        """
        times, pieces, piece_ms = self.times, self.times.pieces, self.times.piece_ms
        sent = False
        queue = self._queue = [wish for wish in self._queue if wish.left]
        queue.sort(key=_ORDER)
        for wish in queue:
            room = int((until - at) / piece_ms + 1e-9)
            if room < 1 and not self._may_overhang(wish, layer, until - at):
                break
            count = min(wish.left, max(room, 1))
            if not wish.is_started:
                spare = int((wish.target - layer - 1) * times.layer_ms / piece_ms)
                if not self._begin(wish, step, layer, min(wish.left, count + spare)):
                    continue
            wish.left -= count
            at += count * piece_ms
            sent = True
            self.counts.prefetched += count / pieces
            self.unused[wish.expert] += count / pieces
            if at >= until:
                break
        return at if sent else 0.0

    def _may_overhang(self, wish: Wish, layer: int, hidden_ms: float) -> bool:
        if hidden_ms <= 0:
            return False
        overhang_ms = self.times.piece_ms - hidden_ms
        demand = self._demands[layer + 1]
        probability = wish.probability * self.trust
        return self._rule.may_overhang(probability, hidden_ms, overhang_ms, demand)

    def _begin(self, wish: Wish, step: int, layer: int, fits: int) -> bool:
        """Take a slot for an expert if the rule says it pays."""
        state, times = self.layers[wish.target], self.times
        named = self._named[step][wish.target]
        slot = state.victim_slot(named)
        if slot < 0:
            return False
        victim = state.expert_in[slot]
        if victim in self._queued:
            return False
        if victim >= 0:
            probability = wish.probability * self.trust
            frequency = state.frequency(victim)
            feared = frequency * self._missed_mass[step][wish.target]
            # a wrong guess keeps the victim away for about one token more
            cost = self.regret * (feared + (1 - probability) * frequency)
            saved_ms = fits * times.piece_ms
            if not self._rule.is_worth(probability, saved_ms, min(1.0, cost), times.demand_ms[1]):
                return False
            wish.victim, wish.victim_probability = victim, feared
        state.admit(wish.expert, named)
        if victim in self.unused:
            self.counts.wasted += self.unused.pop(victim)
        self.unused[wish.expert] = 0.0
        wish.is_started = True
        return True


def _candidates(
    predictions: Predictions, rule: PrefetchRule, route: Route
) -> list[list[tuple[tuple[int, int, float], ...]]]:
    """By token and source layer what is news: (expert, target layer, confidence), [T][L]."""
    tokens, layers, _ = route.expert_ids.shape
    found: list[list[list[tuple[int, int, float]]]] = [
        [[] for _ in range(layers)] for _ in range(tokens)
    ]
    for start in range(0, tokens, CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        said = np.full((len(route.expert_ids[part]), layers, route.num_experts), -1.0)
        for ahead in range(min(rule.horizon, predictions.horizon), 0, -1):
            ids = predictions.expert_ids[ahead - 1, part]
            confidence = predictions.confidence[ahead - 1, part]
            wanted = (ids >= 0) & (confidence > rule.least_confidence)
            wanted[:, :ahead] = False
            token, target, guess = np.nonzero(wanted)
            expert = ids[token, target, guess]
            now = confidence[token, target, guess]
            is_news = np.abs(now - said[token, target, expert]) > NEWS
            token, target, expert, now = (x[is_news] for x in (token, target, expert, now))
            said[token, target, expert] = now
            numbered = (target * route.num_experts + expert).tolist()
            columns = (token + start).tolist(), (target - ahead).tolist()
            entries = zip(numbered, target.tolist(), now.tolist(), strict=True)
            for at, source, entry in zip(*columns, entries, strict=True):
                found[at][source].append(entry)
    return [[tuple(layer) for layer in token_entries] for token_entries in found]


def _nearest(
    predictions: Predictions, route: Route
) -> tuple[list[list[frozenset[int]]], list[list[float]]]:
    """What the nearest look names for each layer, and the share of true experts it leaves out."""
    ids = predictions.expert_ids[0].astype(np.int64)
    offset = (np.arange(route.num_layers) * route.num_experts)[None, :, None]
    numbered = np.where(ids >= 0, ids + offset, -1).tolist()
    named = [[frozenset(layer) for layer in token] for token in numbered]
    mass = predictions.confidence[0].sum(-1) / route.top_k  # [T, L]
    return named, np.clip(1 - mass, 0.0, 1.0).tolist()

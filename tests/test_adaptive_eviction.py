"""Eviction that adapts: what the shadows hold, who leads, and what following the lead costs."""

import random

import numpy as np
import pytest

from foreroute.runtime.policies import Duel, LayerState, find_policy
from foreroute.runtime.policies.duel import (
    DUEL_LAYERS,
    LEAST_LEAD,
    MOST_LEAD,
    Shadow,
    duelling_layers,
)

EXPERTS, SLOTS = 24, 9


def by_recency(steps: int, seed: int = 0) -> list[list[int]]:
    """One expert a step, likelier the shorter ago it was used."""
    dice, order, route = random.Random(seed), list(range(EXPERTS)), []
    for _ in range(steps):
        expert = order.pop(min(int(dice.expovariate(0.15)), EXPERTS - 1))
        order.insert(0, expert)
        route.append([expert])
    return route


def by_liking(steps: int, seed: int = 0) -> list[list[int]]:
    """One expert a step, by a liking that never changes."""
    dice = random.Random(seed)
    return [[min(int(dice.expovariate(0.15)), EXPERTS - 1)] for _ in range(steps)]


def misses(policy: str, route: list[list[int]]) -> int:
    state = LayerState(find_policy(policy), EXPERTS, SLOTS)
    return sum(len(state.demand(ids)) for ids in route)


def test_each_shadow_holds_what_its_rule_alone_would_hold() -> None:
    lru, default = (LayerState(find_policy(n), EXPERTS, SLOTS) for n in ("lru", "default"))
    duel = Duel()
    adaptive = LayerState(find_policy("adaptive"), EXPERTS, SLOTS, duel)
    shadows = adaptive._shadows
    assert shadows is not None
    lead = 0
    for ids in by_recency(200) + by_liking(400):
        missed = [len(state.demand(ids)) for state in (adaptive, lru, default)]
        assert [shadow.experts for shadow in shadows] == [
            {e for e in range(EXPERTS) if state.here[e]} for state in (default, lru)
        ]
        lead += missed[2] - missed[1]
        assert duel.lead == max(-MOST_LEAD, min(MOST_LEAD, lead))
        adaptive.check_integrity()


def test_of_equal_worth_a_shadow_evicts_the_lowest_expert() -> None:
    shadow = Shadow(2)
    assert shadow.demand([4, 3], [0.0] * 6) == 0
    assert shadow.demand([5], [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]) == 0
    assert shadow.experts == {4, 5}
    assert shadow.demand([5, 4], [0.0] * 6) == 2


def test_adapting_follows_whichever_rule_hits_more() -> None:
    for route in (by_recency(3000), by_liking(3000)):
        better = min(misses("lru", route), misses("default", route))
        worse = max(misses("lru", route), misses("default", route))
        assert worse - better > 3 * LEAST_LEAD
        assert (
            misses("adaptive", route) <= better + LEAST_LEAD + SLOTS
        )  # until it led; then the slots


def test_a_long_lead_of_one_rule_is_soon_made_up_for() -> None:
    duel = Duel()
    for _ in range(10_000):
        duel.count(0, 1)
    assert not duel.is_for_recency
    for _ in range(MOST_LEAD + LEAST_LEAD):
        assert not duel.is_for_recency
        duel.count(1, 0)
    assert duel.is_for_recency


@pytest.mark.parametrize("num_layers", [1, 2, 23, 24, 25, 48, 94])
def test_shadows_are_spread_evenly_over_the_layers(num_layers: int) -> None:
    chosen = np.flatnonzero(duelling_layers(num_layers))
    assert len(chosen) == min(num_layers, DUEL_LAYERS)
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1

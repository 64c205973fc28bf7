"""The rules of the cache: what goes first, what fits, who gets slots."""

import random
from collections import OrderedDict

import pytest
import torch

from foreroute.runtime.policies import (
    LayerState,
    PrefetchChooser,
    PrefetchRule,
    find_policy,
    find_prefetch_rule,
    known_policies,
    miss_curve,
    share_slots,
)

EXPERTS, SLOTS, TOP_K = 24, 9, 4


def random_route(steps: int = 300, seed: int = 0) -> list[tuple[int, ...]]:
    """Experts per token, some much liked, with phases."""
    dice = random.Random(seed)
    route = []
    for step in range(steps):
        shift = step // 60 * 5
        ids: dict[int, None] = {}
        while len(ids) < TOP_K:
            ids[(min(int(dice.expovariate(0.2)), EXPERTS - 1) + shift) % EXPERTS] = None
        route.append(tuple(ids))
    return route


def misses(policy: str, route: list[tuple[int, ...]], slots: int = SLOTS) -> int:
    state = LayerState(find_policy(policy), EXPERTS, slots)
    return sum(len(state.demand(ids)) for ids in route)


def test_lru_misses_what_an_ordered_dict_misses() -> None:
    cache: OrderedDict[int, None] = OrderedDict()
    state = LayerState(find_policy("lru"), EXPERTS, SLOTS)
    for ids in random_route():
        absent = [e for e in ids if e not in cache]
        for expert in absent:
            if len(cache) == SLOTS:
                del cache[next(e for e in cache if e not in ids)]
            cache[expert] = None
        for expert in ids:
            cache.move_to_end(expert)
        assert state.demand(ids) == absent
        assert {e for e in range(EXPERTS) if state.here[e]} == set(cache)


@pytest.mark.parametrize("policy", ["lfu", "lrfu", "lrfu:3"])
def test_host_and_kernel_rule_make_the_same_decisions(policy: str) -> None:
    plan = pytest.importorskip("foreroute.runtime.device.kernels.plan")
    tables_of = pytest.importorskip("foreroute.runtime.device.kernels.tables").ResidencyTables
    rule = find_policy(policy)
    state = LayerState(rule, EXPERTS, SLOTS)
    tables = tables_of.empty(EXPERTS, SLOTS, "cpu")
    copies = torch.zeros(3, TOP_K, dtype=torch.int32)
    for ids in random_route(200):
        plan.plan_reference(torch.tensor(ids), tables, rule.device_rule(), copies)
        copied = [int(e) for e in copies[0] if e >= 0]
        assert state.demand(ids) == copied
        assert state.expert_in == tables.expert_in.tolist()


@pytest.mark.parametrize("policy", [name for name in known_policies() if name != "belady"])
def test_tables_stay_consistent_and_needed_experts_are_there(policy: str) -> None:
    dice = random.Random(1)
    state = LayerState(find_policy(policy), EXPERTS, SLOTS)
    state.warm(random_route(20, seed=2))
    for ids in random_route(200, seed=3):
        kept = tuple(dice.sample(range(EXPERTS), 3))
        extra = dice.randrange(EXPERTS)
        if not state.here[extra] and state.victim_slot(kept) >= 0:
            before = [e for e in kept if state.here[e]]
            state.admit(extra, kept)
            assert all(state.here[e] for e in before)
            if dice.random() < 0.3:
                state.release(extra)
        state.demand(ids)
        state.expect(kept, (0.5, 0.2, 0.1))
        assert all(state.here[expert] for expert in ids)
        state.check_integrity()


def test_a_full_layer_of_kept_experts_gives_no_slot() -> None:
    state = LayerState(find_policy("lru"), EXPERTS, 2)
    state.demand((0, 1))
    assert state.victim_slot((0, 1)) == -1
    with pytest.raises(RuntimeError, match="All 2 slots"):
        state.admit(5, (0, 1))


def test_decayed_frequency_survives_a_thousand_half_lives() -> None:
    state = LayerState(find_policy("lrfu:0.5"), EXPERTS, SLOTS)
    for ids in random_route(3000):
        state.demand(ids)
    state.check_integrity()
    assert 0 < max(state.worth) < float("inf")


def test_warm_start_fills_slots_with_what_the_prompt_used_most() -> None:
    state = LayerState(find_policy("default"), EXPERTS, 2)
    state.warm([(1, 2), (1, 3), (1, 3)])
    assert sorted(state.expert_in) == [1, 3]


def test_likely_experts_outlive_others() -> None:
    state = LayerState(find_policy("predicted"), EXPERTS, 3)
    state.demand((0, 1, 2))
    state.expect((1,), (0.9,))
    state.demand((7, 8))
    assert state.here[1]


def test_static_keeps_the_hot_set() -> None:
    state = LayerState(find_policy("static"), EXPERTS, 3)
    state.warm([(0, 1)] * 5)
    for expert in range(5, 12):
        state.demand((expert,))
    assert state.here[0]
    assert state.here[1]


def test_decayed_frequency_beats_lru_on_phases_of_liking() -> None:
    route = random_route(600)
    assert misses("lrfu", route) < misses("lru", route)


@pytest.mark.parametrize("name", ["lrru", "lru:3", "lrfu:x", "lrfu:-1", ""])
def test_unknown_policies_are_refused_with_what_is_known(name: str) -> None:
    with pytest.raises(ValueError, match=r"known: default|positive half-life"):
        find_policy(name)


def test_unknown_prefetch_is_refused_with_what_is_known() -> None:
    with pytest.raises(ValueError, match="none, all, head, whole, pieces"):
        find_prefetch_rule("some")


def test_prefetch_pays_when_what_it_saves_exceeds_what_it_costs() -> None:
    assert PrefetchRule.is_worth(0.5, 0.2, 0.1, 0.2)  # 0.1 ms saved > 0.02 ms
    assert not PrefetchRule.is_worth(0.5, 0.02, 0.1, 0.2)  # 0.01 ms saved < 0.02 ms
    assert PrefetchRule.may_overhang(0.9, 0.1, 0.1, 0.5)
    assert not PrefetchRule.may_overhang(0.9, 0.1, 0.2, 0.5)


def test_layers_that_miss_more_get_more_slots() -> None:
    flat = [(0, 1, 2, 3)] * 50
    curves = [
        miss_curve(route, find_policy("lru"), num_experts=EXPERTS, top_k=TOP_K)
        for route in (flat, random_route(50))
    ]
    slots = share_slots(curves, 20, fewest=TOP_K)
    assert sum(slots) == 20
    assert slots[0] == TOP_K
    assert share_slots(curves, 20, fewest=TOP_K, boldness=0) == [10, 10]


def test_slots_that_do_not_suffice_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        share_slots([[5.0, 4.0]], 1, fewest=2)


def chooser_of(layer_ms: float = 0.25, copy_ms: float = 0.1) -> PrefetchChooser:
    return PrefetchChooser(find_prefetch_rule("whole"), layer_ms=layer_ms, copy_ms=copy_ms)


def test_a_budget_spends_the_window_on_the_likeliest_absent_experts() -> None:
    state = LayerState(find_policy("lru"), EXPERTS, 6)
    state.demand((3,))
    guesses = [(3, 0.9), (4, 0.6), (5, 0.95), (6, 0.9), (7, 0.05), (8, 0.5)]
    # 0.25 ms holds two copies and half of a third, which is worth its overhang at even odds
    chosen = list(chooser_of().choose(0, state, guesses, kept=()))
    assert chosen == [5, 6, 4]
    assert list(chooser_of(layer_ms=0.2).choose(0, state, guesses, kept=())) == [5, 6]
    twice_as_far = chooser_of(layer_ms=0.2).choose(0, state, guesses, kept=(), ahead=2)
    assert list(twice_as_far) == [5, 6, 4, 8]


def test_a_budget_evicts_nobody_who_is_as_likely() -> None:
    state = LayerState(find_policy("lrfu"), EXPERTS, 2)
    for _ in range(50):
        state.demand((0, 1))
    assert list(chooser_of().choose(0, state, [(5, 0.8)], kept=())) == []
    assert list(chooser_of().choose(0, state, [(5, 0.8)], kept=(0, 1))) == []


def test_a_budget_gives_up_on_predictions_that_do_not_come_true() -> None:
    state = LayerState(find_policy("lru"), EXPERTS, 6)
    budget = chooser_of()
    for _ in range(1000):
        list(budget.choose(0, state, [(5, 0.9)], kept=()))
        budget.settle(0, {1, 2}, has_missed=True)
    assert list(budget.choose(0, state, [(5, 0.9)], kept=())) == []
    assert budget.trust < 0.15
    budget.forget()
    assert list(budget.choose(0, state, [(5, 0.9)], kept=())) == [5]

"""Slots never disagree with the tables, and pinned experts stay."""

import random

import pytest
import torch
from torch import nn

from foreroute.runtime.host.slot_cache import EMPTY, SlotCache
from foreroute.runtime.policies import find_policy
from foreroute.runtime.store.host_store import ALIGNMENT_BYTES, HostExpertStore, RowLayout
from foreroute.runtime.store.row_writer import move_weights

NUM_EXPERTS = 12


class TwoMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(NUM_EXPERTS, 6, 5, generator=generator))
        self.down_proj = nn.Parameter(
            torch.randn(NUM_EXPERTS, 5, 3, generator=generator).to(torch.bfloat16)
        )


def make_cache(num_slots: int, policy: str = "default") -> SlotCache:
    layout, device = RowLayout.of(TwoMatrices()), torch.device("cpu")
    return SlotCache(NUM_EXPERTS, num_slots, layout, device, find_policy(policy))


def test_store_keeps_every_weight_and_takes_it_from_the_module() -> None:
    module = TwoMatrices()
    gate_up, down = module.gate_up_proj.clone(), module.down_proj.clone()
    store = HostExpertStore([module], is_pinned=False)
    move_weights([module], store)
    views = store.layouts[0].views(store.rows[0])
    assert torch.equal(views["gate_up_proj"], gate_up)
    assert torch.equal(views["down_proj"], down)
    assert not list(module.parameters())


def test_store_holds_no_more_than_the_weights_and_their_alignment() -> None:
    module = TwoMatrices()
    weight_bytes = sum(p.nbytes for p in module.parameters())
    store = HostExpertStore([module], is_pinned=False)
    move_weights([module], store)
    assert weight_bytes <= store.num_bytes <= weight_bytes + 2 * NUM_EXPERTS * ALIGNMENT_BYTES


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_keep_the_tables_consistent(seed: int) -> None:
    generator = random.Random(seed)
    cache = make_cache(num_slots=5)
    for _ in range(500):
        expert = generator.randrange(NUM_EXPERTS)
        action = generator.random()
        if action < 0.02:
            cache.clear()
        elif cache.slot_of(expert) != EMPTY:
            cache.use([expert])
        else:
            cache.admit(expert, is_prefetch=action < 0.5)
        cache.check_integrity()
        slots = [cache.slot_of(e) for e in cache.resident]
        assert len(set(slots)) == len(slots) <= 5


def test_least_recently_used_goes_first() -> None:
    cache = make_cache(num_slots=3, policy="lru")
    for expert in (4, 7, 1):
        cache.admit(expert)
        cache.use([expert])
    cache.use([4])
    cache.admit(9)
    assert sorted(cache.resident) == [1, 4, 9]


def test_the_policy_decides_who_goes() -> None:
    cache = make_cache(num_slots=2, policy="lfu")
    for expert in (4, 7):
        cache.admit(expert)
    for used in (4, 4, 7):
        cache.use([used])
    cache.admit(9)
    assert sorted(cache.resident) == [4, 9]


def test_a_recording_fills_the_slots_with_what_it_used_most() -> None:
    cache = make_cache(num_slots=2)
    cache.admit(5)
    assert sorted(cache.warm([(1, 2), (1, 3), (1, 3)])) == [1, 3]
    cache.check_integrity()
    assert cache.slot_of(5) == EMPTY


@pytest.mark.parametrize("seed", range(5))
def test_eviction_never_removes_a_pinned_expert(seed: int) -> None:
    generator = random.Random(seed)
    cache = make_cache(num_slots=6)
    pinned = generator.sample(range(NUM_EXPERTS), 4)
    for expert in pinned:
        cache.admit(expert)
    cache.pin(pinned)
    for _ in range(100):
        expert = generator.randrange(NUM_EXPERTS)
        if cache.slot_of(expert) == EMPTY:
            cache.admit(expert)
        assert all(cache.slot_of(e) != EMPTY for e in pinned)


def test_a_cache_full_of_pinned_experts_admits_nobody() -> None:
    cache = make_cache(num_slots=2)
    for expert in (0, 1):
        cache.admit(expert)
    cache.pin([0, 1])
    with pytest.raises(RuntimeError, match="pinned"):
        cache.admit(2)


def test_a_prefetch_that_goes_unused_counts_as_wasted_once() -> None:
    cache = make_cache(num_slots=1)
    cache.admit(0, is_prefetch=True)
    assert cache.admit(1, is_prefetch=True)[1] is True
    cache.use([1])
    assert cache.admit(2)[1] is False


def test_integrity_check_finds_a_table_that_was_tampered_with() -> None:
    cache = make_cache(num_slots=2)
    cache.admit(3)
    cache._slot_of[5] = cache.slot_of(3)
    with pytest.raises(RuntimeError, match="inconsistent"):
        cache.check_integrity()

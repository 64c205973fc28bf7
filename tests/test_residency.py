"""What a layer awaits, counts and holds is what its slots really got."""

import pytest
import torch
from torch import Tensor, nn

from foreroute.runtime import EngineConfig
from foreroute.runtime.host.residency import HostResidency
from foreroute.runtime.host.run_state import HostRun
from foreroute.runtime.host.slot_cache import EMPTY, SlotCache
from foreroute.runtime.host.transfers import Ticket, Transfers
from foreroute.runtime.on_miss.agreement import AgreementGuard
from foreroute.runtime.policies import find_policy
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.row_writer import move_weights

NUM_EXPERTS = 6


class Landing(Ticket):
    """Copies that land when someone waits for them."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def is_done(self) -> bool:
        return not self.pairs

    def wait(self) -> None:
        for host_row, slot in self.pairs:
            slot.copy_(host_row)
        self.pairs = []


class SlowTransfers(Transfers):
    """A link on which nothing arrives until it is awaited."""

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Ticket:
        return Landing(pairs)


def make_residency(num_slots: int) -> HostResidency:
    experts = nn.Module()
    experts.register_parameter("weight", nn.Parameter(torch.randn(NUM_EXPERTS, 4, 3)))
    store = HostExpertStore([experts], is_pinned=False)
    move_weights([experts], store)
    policy = find_policy("lru")
    run = HostRun(
        config=EngineConfig(),
        transfers=SlowTransfers(),
        predictor=None,
        guard=AgreementGuard(0.0),
        policy=policy,
        is_prefill=False,
    )
    cache = SlotCache(NUM_EXPERTS, num_slots, store.layouts[0], torch.device("cpu"), policy)
    return HostResidency(store.rows[0], cache, run)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_prefetch_displaced_in_the_same_step_is_not_awaited(num_slots: int) -> None:
    residency = make_residency(num_slots)
    residency.prefetch(range(5), kept=[])  # more than slots, none of them kept
    cache, counted = residency.cache, residency._run.stats.decode
    cache.check_integrity()
    assert set(cache.arriving) == set(cache.resident)
    assert len(cache.resident) == num_slots
    assert counted.prefetches == 5
    assert counted.wasted_bytes == (5 - num_slots) * residency.expert_bytes


def test_of_two_prefetches_into_one_slot_the_last_is_what_lies_there() -> None:
    residency = make_residency(num_slots=1)
    residency.prefetch([2, 4], kept=[])
    (ticket,) = residency.fetch([4])
    ticket.wait()
    residency.check_integrity()
    assert residency.cache.resident == [4]


def test_an_expert_displaced_on_its_way_is_a_miss_and_not_late() -> None:
    residency = make_residency(num_slots=1)
    residency.prefetch([2, 4], kept=[])
    (ticket,) = residency.fetch([2])
    ticket.wait()
    residency.check_integrity()
    counted = residency._run.stats.decode
    assert (counted.hits, counted.late, counted.misses) == (0, 0, 1)


def test_a_prefetch_takes_no_slot_of_an_expert_that_is_kept() -> None:
    residency = make_residency(num_slots=2)
    for ticket in residency.fetch([0, 1]):
        ticket.wait()
    residency.prefetch([3], kept=[0, 3])
    assert sorted(residency.cache.resident) == [0, 3]
    assert residency.cache.slot_of(1) == EMPTY


def test_an_expert_asked_for_in_time_and_not_done_in_time_is_late() -> None:
    residency = make_residency(num_slots=2)
    residency.prefetch([3], kept=[3])
    assert not residency.cache.is_here[3]
    (ticket,) = residency.fetch([3])
    ticket.wait()
    assert residency._run.stats.decode.late == 1
    assert residency.cache.is_here[3]
    residency.check_integrity()


def test_what_nobody_waits_for_comes_behind_only_if_it_is_likelier_than_what_goes() -> None:
    residency = make_residency(num_slots=2)
    for ids in ([0, 1], [0, 1], [0]):
        for ticket in residency.fetch(ids):
            ticket.wait()
    residency.fetch_behind([4], kept=[0], only_likely=True)  # never used before
    assert residency.cache.slot_of(4) == EMPTY
    residency.cache.use([0], credited=[4, 5])
    residency.fetch_behind([5, 4], kept=[0], only_likely=True)  # 4 is the router's first, 5 later
    assert sorted(residency.cache.resident) in ([0, 4], [0, 5])
    assert not all(residency.cache.is_here[e] for e in residency.cache.resident)
    residency.fetch_behind([2, 3], kept=[], only_likely=False)
    assert sorted(residency.cache.resident) == [2, 3]
    assert residency._run.stats.decode.fetched_bytes == 5 * residency.expert_bytes

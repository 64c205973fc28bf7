"""Experts that the system does not page-lock come through a staging area, bit for bit."""

import gc
import mmap
import threading
import time
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.plan import plan
from foreroute.runtime.device.kernels.staging import stage, stage_reference
from foreroute.runtime.device.kernels.tables import ResidencyTables
from foreroute.runtime.policies import find_policy
from foreroute.runtime.store import pinning, staging, staging_loop
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.offload import load_offloaded
from foreroute.runtime.store.pinning import PAGE, PinningRefused, Pins, copy_in_parts, runs
from foreroute.runtime.store.staging import Staging

CPU = torch.device("cpu")
EXPERTS, SLOTS, PIECE = 12, 6, 8192


def random_rows(count, row_bytes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, row_bytes), generator=generator).byte()


@pytest.fixture
def area():
    """A staging area of three layers whose rows are two and a half pieces long."""
    rows = [random_rows(EXPERTS, 2 * PIECE + 4096, seed) for seed in range(3)]
    made = Staging(rows, CPU, PIECE)
    yield made, rows
    made.close()


def planned(rows, tables, ids):
    """What a layer misses of these experts: the demand, and the places."""
    ids = torch.tensor([ids])
    copies = torch.empty(3, ids.numel(), dtype=torch.int32)
    places = torch.empty(2, ids.numel(), dtype=torch.int32)
    plan(ids, tables, find_policy("lru").device_rule(), copies, places=places)
    slots = torch.zeros(SLOTS, rows.shape[1], dtype=torch.uint8)
    words = torch.zeros(1, dtype=torch.int32)
    return Demand(rows, slots, copies, words, tables.arrived, tables.progress, 64), places


def clone_of(demand):
    values = dict(vars(demand)) | {"slots": demand.slots.clone(), "copies": demand.copies.clone()}
    return Demand(**values)


@pytest.mark.parametrize("pinned", [[], [1, 4, 7], list(range(EXPERTS))])
@pytest.mark.parametrize("ids", [[3, 1, 7, 9], [5, 5, 4, 0]])
def test_the_host_hands_out_what_is_not_pinned_and_only_that(area, pinned, ids):
    made, rows = area
    is_pinned = torch.zeros(EXPERTS, dtype=torch.int32)
    is_pinned[pinned] = 1
    first = min(pinned, default=EXPERTS)
    for layer in (2, 0):
        tables = ResidencyTables.empty(EXPERTS, SLOTS, CPU)
        demand, places = planned(rows[layer], tables, ids)
        expected, expected_places = stage_reference(clone_of(demand), places, is_pinned, first)
        before = int(made.turns.sum())
        left, places_left = stage(demand, places, is_pinned, made, layer, first)
        assert torch.equal(left.slots, expected.slots)
        assert torch.equal(left.copies[0], expected.copies[0])
        is_copied = left.copies[0] >= 0
        assert torch.equal(left.copies[1:, is_copied], demand.copies[1:, is_copied])
        for expert, given in torch.stack([demand.copies[0], left.copies[0]])[:, is_copied].T:
            assert torch.equal(left.rows[given], rows[layer][expert])
        assert left.rows.data_ptr() == (rows[layer][first:] if pinned else made.buffers).data_ptr()
        assert torch.equal(places_left, expected_places)
        staged = {e for e in ids if e not in pinned}
        assert int(made.turns.sum()) - before == 3 * len(staged)  # pieces
    made.require_served()


def test_a_host_that_does_not_answer_is_said(area):
    made, rows = area
    made._end()  # the threads are gone
    tables = ResidencyTables.empty(EXPERTS, SLOTS, CPU)
    demand, places = planned(rows[0], tables, [3])
    nobody = torch.zeros(EXPERTS, dtype=torch.int32)
    stage(demand, places, nobody, made, 0, most_tries=3)
    with pytest.raises(RuntimeError, match="did not hand out an expert in time"):
        made.require_served()


def test_the_threads_end_with_the_area_whether_it_is_closed_or_dropped():
    def serving():
        return [t for t in threading.enumerate() if t.name.startswith("staging")]

    before = len(serving())
    made = Staging([random_rows(2, 64)], CPU)
    assert len(serving()) > before
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None
    assert len(serving()) == before
    made = Staging([random_rows(2, 64)], CPU)
    made.close()
    made.close()
    assert len(serving()) == before


def test_serving_needs_no_lock_of_the_interpreter(area):
    """A thread that holds the lock for long does not keep a lane waiting."""
    made, rows = area
    word = 1 << 36 | 2 << 26 | 5 << 14 | 1
    made.asked[3, 0] = word - (1 << 36)  # wakes the thread: it looks around for a while from now on
    while int(made.answered[3, 0]) != word - (1 << 36):
        time.sleep(0.001)
    answered = made.answered.numpy()
    made.asked.numpy()[3, 0] = word
    for _ in range(10**7):  # no other thread of Python runs within the first of these looks
        if answered[3, 0] == word:
            break
    assert answered[3, 0] == word
    piece = rows[2][5, PIECE : 2 * PIECE]
    assert torch.equal(made.buffers[3], piece)


def test_what_a_word_cannot_name_is_refused():
    with pytest.raises(ValueError, match="cannot serve 1 layers of 5000 experts of 8 bytes"):
        Staging([torch.zeros(5000, 8, dtype=torch.uint8)], CPU)


def test_constants_of_the_loop_are_those_of_the_area():
    for name in ("PIECE_BITS", "EXPERT_BITS", "LAYER_BITS"):
        assert getattr(staging, name) == getattr(staging_loop, name)
    assert staging.LINE_WORDS * 8 == staging_loop.LINE_BYTES


class Locks:
    """Stands for CUDA: locks whole pages, none twice, and no more than a limit."""

    def __init__(self, limit):
        self.limit, self.spans = limit, {}

    def __call__(self, memory, address, num_bytes):
        assert address % PAGE == 0
        end = address + num_bytes
        assert all(end <= a or b <= address for a, b in self.spans.items())
        if sum(b - a for a, b in self.spans.items()) + num_bytes > self.limit:
            raise PinningRefused("out of memory")
        self.spans[address] = end
        return weakref.finalize(memory, self.spans.pop, address, None)


def mapped(layers, experts, row_bytes):
    memories = [mmap.mmap(-1, experts * row_bytes) for _ in range(layers)]
    rows = [torch.frombuffer(m, dtype=torch.uint8).view(experts, row_bytes) for m in memories]
    return Pins(memories, rows)


ROW_BYTES = 3 * PAGE + 64


def test_all_is_pinned_where_that_is_allowed(monkeypatch):
    locks = Locks(1 << 40)
    monkeypatch.setattr(pinning, "lock", locks)
    pins = mapped(2, 8, ROW_BYTES)
    pins.pin_all(None)
    assert len(locks.spans) == 2
    assert pins.budget is None
    assert all(mask.all() for mask in pins.are_pinned)
    assert pins.copy_row is pinning.copy_whole


@pytest.mark.parametrize("most_bytes", [None, 8 * ROW_BYTES])
def test_what_is_used_most_is_pinned_within_the_limit(monkeypatch, caplog, most_bytes):
    """A refusal, or --pinned-memory for half of the experts; then routing decides."""
    locks = Locks(12 * ROW_BYTES if most_bytes is None else 1 << 40)
    monkeypatch.setattr(pinning, "lock", locks)
    pins = mapped(2, 8, ROW_BYTES)
    pins.pin_all(most_bytes)
    assert not locks.spans  # nothing is locked before routing is known
    if most_bytes is None:
        assert "refused more (out of memory): the host hands" in caplog.text
    uses = [torch.tensor([0.0, 5, 0, 4, 3, 0, 2, 1]), torch.zeros(8)]
    pins.settle(uses)
    count = 3 if most_bytes is None else 4
    assert pins.are_pinned[0].nonzero().flatten().tolist() == [1, 3, 4, 6][:count]
    assert pins.are_pinned[1].nonzero().flatten().tolist() == list(range(count))  # in order
    for mask, rows in zip(pins.are_pinned, pins.rows, strict=True):
        for row in rows[mask]:
            assert len(row) == ROW_BYTES
        for expert in mask.nonzero().flatten().tolist():
            begin = rows[expert].data_ptr()
            assert any(a <= begin and begin + ROW_BYTES <= b for a, b in locks.spans.items())
    before = dict(locks.spans)
    pins.settle(uses)
    assert locks.spans == before


def test_a_second_refusal_leaves_the_rest_to_the_host(monkeypatch, caplog):
    locks = Locks(3 * ROW_BYTES)
    monkeypatch.setattr(pinning, "lock", locks)
    pins = mapped(2, 8, ROW_BYTES)
    pins.pin_all(8 * ROW_BYTES)
    pins.settle([torch.tensor([1.0, 0] * 4), torch.ones(8)])
    assert "refused to pin more experts" in caplog.text
    assert pins.are_pinned[0].sum() < 4
    assert not pins.are_pinned[1].any()


def test_runs_of_a_mask():
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert runs(mask) == [(0, 2), (3, 4), (6, 8)]
    assert runs(torch.zeros(4, dtype=torch.bool)) == []


@pytest.mark.parametrize("row_bytes", [64, PAGE, ROW_BYTES, 5 * PAGE - 64])
def test_a_row_is_copied_in_parts_that_share_no_page_with_neighbours(row_bytes):
    pins = mapped(1, 4, row_bytes)
    rows = pins.rows[0]
    rows.copy_(random_rows(4, row_bytes))
    slots = torch.zeros_like(rows)
    for slot, row in zip(slots, rows, strict=True):
        copy_in_parts(slot, row)
    assert torch.equal(slots, rows)


def test_a_store_and_its_parts_share_the_limit(monkeypatch):
    monkeypatch.setattr(pinning, "lock", Locks(1 << 40))
    modules = []
    for _ in range(4):
        module = torch.nn.Module()
        module.up_proj = torch.nn.Parameter(torch.zeros(8, 16, 512))
        module.num_experts = 8
        modules.append(module)
    row_bytes = 16 * 512 * 4
    limit = 4 * 8 * row_bytes // 2
    store = HostExpertStore(modules, is_pinned=True, most_pinned_bytes=limit)
    layers, others = store.parted(3)
    layers.pins.settle([torch.zeros(8)] * 3)
    assert [int(mask.sum()) for mask in layers.pins.are_pinned] == [4, 4, 4]
    assert [int(mask.sum()) for mask in others.pins.are_pinned] == [0]
    whole = HostExpertStore(modules, is_pinned=True, most_pinned_bytes=1 << 40)
    assert whole.pins.budget is None
    assert HostExpertStore(modules, is_pinned=False).pins.budget is None


def test_a_limit_that_is_no_size_is_refused():
    with pytest.raises(ValueError, match="'lots' is no size; write 24GiB"):
        load_offloaded("bundled", device="cpu", pinned_memory="lots")

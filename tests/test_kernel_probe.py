"""The kernels that `foreroute profile` times do what they are timed for; interpreted on a CPU."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from foreroute.runtime.device.kernels.tables import HEADS, HITS, MISSES
from foreroute.runtime.planning import engine_kernels, kernel_probe, timings
from foreroute.runtime.planning.attention_kernels import AttentionKernels
from foreroute.runtime.planning.engine_kernels import EngineKernels
from foreroute.runtime.planning.layer_shape import REFERENCE, LayerShape
from foreroute.runtime.planning.timings import Line

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = LayerShape(
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    inner=16,
    experts=8,
    top_k=2,
    slots=4,
    context=16,
)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> EngineKernels:
    monkeypatch.setattr(engine_kernels, "LAYERS", 2)
    return EngineKernels(TINY, DEVICE)


def test_the_reference_is_qwen3s_layer() -> None:
    assert REFERENCE.expert_bytes == 3 * 2048 * 768 * 2
    attention = 2048 * (4096 + 512 + 512) + 4096 * 2048
    assert REFERENCE.layer_bytes == 2 * (attention + 128 * 2048) + 8 * REFERENCE.expert_bytes


def test_a_line_has_its_fixed_part_and_its_rate() -> None:
    # 0.01 ms and 50 GB/s: 1 MB takes 0.02 ms
    line = Line.through([(1000000, 0.03), (2000000, 0.05), (4000000, 0.09)])
    assert line.fixed_ms == pytest.approx(0.01)
    assert line.gbps == pytest.approx(50)
    noisy = Line.through([(1000000, 0.02), (2000000, 0.05), (4000000, 0.10)])
    assert noisy.fixed_ms == 0  # never negative
    with pytest.raises(ValueError, match="do not grow"):
        Line.through([(1000000, 0.05), (2000000, 0.04)])


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_demands_find_so_many_absent_however_often_they_run(
    kernels: EngineKernels, absent: int
) -> None:
    round_ = kernels.demands(absent)
    kernels.tables.counters.zero_()
    for _ in range(3):
        round_.run()
    asked = 3 * round_.count
    first_use = TINY.top_k - absent if absent else 0  # those that stay come once
    assert kernels.tables.counters[MISSES] == asked * absent + first_use
    assert kernels.tables.counters[HITS] == asked * (TINY.top_k - absent) - first_use
    kernels.tables.check_integrity()


def test_demands_fetch_whole_experts_or_parts_of_that_size(kernels: EngineKernels) -> None:
    for parts in (1, 4):
        round_ = kernels.demands(1, parts)
        kernels._slots.zero_()
        round_.run()
        size = TINY.expert_bytes // parts
        rows, slots = (t.view(-1, size).cpu() for t in (kernels._rows, kernels._slots))
        held = kernels.tables.expert_in.tolist()
        assert all(torch.equal(slots[s], rows[e]) for s, e in enumerate(held))
        assert not slots[TINY.slots :].any()


def test_every_planned_head_finds_its_expert_absent(kernels: EngineKernels) -> None:
    for round_ in (kernels.head_plans(), kernels.prefetches(2)):
        before = int(kernels.next_tables.counters[HEADS])
        for _ in range(2):
            round_.run()
        assert kernels.next_tables.counters[HEADS] == before + 2 * round_.count


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_layers_miss_nothing_and_prefetch_nothing(
    kernels: EngineKernels, looks_ahead: bool
) -> None:
    round_ = kernels.layers(looks_ahead=looks_ahead)
    for tables in (kernels.tables, kernels.next_tables):
        tables.counters.zero_()
    round_.run()
    assert kernels.tables.counters[HITS] == round_.count * TINY.top_k
    assert kernels.tables.counters.sum() == round_.count * TINY.top_k
    assert kernels.next_tables.counters.sum() == 0


class Clock:
    """Made-up times: kernels by kind, fetches by what they copy."""

    US: ClassVar = {"plan": 2.0, "predict_logits": 5.0, "rank_experts": 3.0, "plan_head": 4.0}
    FETCH_US, NS_PER_BYTE, BESIDE = 7.0, 0.5, 2.0
    PRODUCTS_US, HIDDEN_US = 10.0, 6.0

    def __init__(self) -> None:
        self.us = 0.0

    def timed(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            self.us += self.US[name]
            return kernel(*args, **settings)

        return run

    def fetch(
        self, rows: Any, slots: Any, copies: Any, *, num_blocks: int, head_words: Any
    ) -> None:
        size = sum(
            int(head_words) * 8 if part == 1 else rows.shape[1]
            for expert, part in zip(copies[0].tolist(), copies[2].tolist(), strict=True)
            if expert >= 0
        )
        self.us += (self.FETCH_US + size * self.NS_PER_BYTE / 1e3) if size else 0.0

    def products(self, *args: Any) -> None:
        """Of a layer whose demand is fetched meanwhile; hides `HIDDEN_US` of it."""
        before, demand = self.us, args[-1]
        self.fetch(demand.rows, demand.slots, demand.copies, num_blocks=1, head_words=0)
        self.us += self.PRODUCTS_US - (self.HIDDEN_US if self.us > before else 0.0)

    def ms(self, call: Callable[[], object], *_: object) -> float:
        self.us = 0.0
        call()
        return self.us / 1e3

    def ms_beside(self, call: Callable[[], object], *_: object) -> float:
        return self.BESIDE * self.ms(call)


def test_each_figure_is_what_it_says(
    kernels: EngineKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for name in Clock.US:
        monkeypatch.setattr(engine_kernels, name, clock.timed(name, getattr(engine_kernels, name)))
    monkeypatch.setattr(engine_kernels, "fetch", clock.fetch)
    monkeypatch.setattr(engine_kernels, "expert_products", clock.products)
    monkeypatch.setattr(AttentionKernels, "attend", lambda _, state: state)
    monkeypatch.setattr(kernel_probe, "captured", _called_once)  # those that stay come, uncounted
    monkeypatch.setattr(kernel_probe, "median_ms", clock.ms)
    monkeypatch.setattr(kernel_probe, "median_ms_beside", clock.ms_beside)
    times = kernel_probe.measure_kernels(kernels)
    size = TINY.expert_bytes
    assert times.fetch_ms == pytest.approx(7e-3)
    assert [size // 4, size // 2, size, 2 * size] == [s for s, _ in times.gather]
    expected = [(s, s / (7e-3 + s * 0.5e-6) / 1e6) for s, _ in times.gather]
    assert [rate for _, rate in times.gather] == pytest.approx([r for _, r in expected], abs=1e-3)
    assert times.layer_ms == pytest.approx(12e-3)  # of its plan and its products
    assert times.overlap_ms == pytest.approx(6e-3)
    assert times.ahead_ms == pytest.approx(12e-3)
    assert times.begin_ms == pytest.approx(2 * (4 + 7) * 1e-3)
    assert times.predict_ms == pytest.approx(times.begin_ms + 8e-3)
    assert times.prefetch_gbps == pytest.approx(1 / 0.5 / 2)
    assert times.kernel_us["plan a head"] == pytest.approx(4)
    assert times.kernel_us["a layer beside prefetches"] == pytest.approx(2 * 12)


def _called_once(call: Callable[[], object], _: torch.device) -> Callable[[], object]:
    call()
    return call


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_runs_beside_outlasts_what_is_timed() -> None:
    short, long = (torch.randn(size, size, device=DEVICE) for size in (256, 4096))
    times = [
        timings.median_ms_beside(lambda: a @ a, lambda: b @ b, DEVICE)  # noqa: B023
        for a, b in ((short, long), (long, short))
    ]
    assert all(ms > 0 for ms in times)

"""The Triton kernels agree with their plain references; on a CPU interpreted (conftest.py)."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from foreroute.runtime.device.kernels import demand as demand_module
from foreroute.runtime.device.kernels import fetch as fetch_module
from foreroute.runtime.device.kernels import plan as plan_module
from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.fetch import BLOCK_WORDS, fetch, fetch_reference
from foreroute.runtime.device.kernels.head import plan_head, plan_head_reference
from foreroute.runtime.device.kernels.lossless import unpack
from foreroute.runtime.device.kernels.plan import plan, plan_reference
from foreroute.runtime.device.kernels.products import expert_products, expert_products_reference
from foreroute.runtime.device.kernels.tables import (
    HEAD,
    REGRETS,
    TAIL,
    TAILS,
    WASTED,
    WASTED_HEADS,
    WHOLE,
    ResidencyTables,
)
from foreroute.runtime.policies import find_policy
from foreroute.runtime.policies.duel import LEAST_LEAD
from foreroute.runtime.policies.eviction import ScoreRule
from foreroute.runtime.store.encodings import (
    EXPERT_DTYPES,
    EncodedParameter,
    EncodedWeights,
    Encoding,
    Fp8Blocks,
    Lossless,
    Mxfp4,
)
from foreroute.runtime.store.host_store import ParameterSpec, RowLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LRU, LFU, LRFU, ADAPTIVE = (
    find_policy(name).device_rule() for name in ("lru", "lfu", "lrfu:5", "adaptive")
)
NUM_SEQUENCES = 1002 if torch.cuda.is_available() else 40


def on_device(tables: ResidencyTables) -> ResidencyTables:
    there = {name: t for name, t in vars(tables).items() if t is not None}
    return ResidencyTables(**{name: tensor.clone().to(DEVICE) for name, tensor in there.items()})


def assert_equal_tables(got: ResidencyTables, expected: ResidencyTables, **close: float) -> None:
    for name, tensor in vars(expected).items():
        if tensor is not None:
            torch.testing.assert_close(vars(got)[name].cpu(), tensor, **close)


def no_copies(count: int) -> torch.Tensor:
    return torch.full((3, count), -1, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("rule", [LRU, LFU, LRFU, ADAPTIVE], ids=["lru", "lfu", "lrfu", "adaptive"])
def test_plans_agree_with_the_reference_over_random_residency_sequences(rule: ScoreRule) -> None:
    for seed in range(NUM_SEQUENCES // 3):
        generator = torch.Generator().manual_seed(seed)
        num_experts, num_slots = 13, (4, 9, 13)[seed % 3]  # few sizes: each is compiled
        close = torch.tensor([LEAST_LEAD - 1], dtype=torch.int32)  # either rule may soon lead
        expected = ResidencyTables.empty(
            num_experts,
            num_slots,
            "cpu",
            lead=close if rule.is_adaptive else None,
            has_shadows=rule.is_adaptive and seed % 4 > 0,
        )
        got = on_device(expected)
        for _ in range(6):
            ids = torch.randperm(num_experts, generator=generator)[:4]
            if seed % 2:  # several tokens: repeats
                ids = torch.cat([ids, ids.flip(0)])
            is_prefetch = bool(torch.rand((), generator=generator) < 0.4)
            if is_prefetch:
                ids = torch.where(torch.rand(len(ids), generator=generator) < 0.2, -1, ids)
            outputs = [torch.full((5, len(ids)), -7, dtype=torch.int32) for _ in range(2)]
            outputs[1] = outputs[1].to(DEVICE)
            split = [(rows[:3], None if is_prefetch else rows[3:]) for rows in outputs]
            for tables, do, (copies, places) in zip(
                (expected, got), (plan_reference, plan), split, strict=True
            ):
                where = {"places": places, "is_prefetch": is_prefetch}
                do(ids.to(copies.device), tables, rule, copies, **where)
            assert torch.equal(outputs[1].cpu(), outputs[0])
            assert_equal_tables(got, expected, rtol=1e-6, atol=0)
            got.check_integrity()


def test_recency_by_hand() -> None:
    tables = ResidencyTables.empty(6, 2, DEVICE)
    copies = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    for ids in ([0, 1], [1, -1], [2, -1]):
        plan(torch.tensor(ids, device=DEVICE), tables, LRU, copies)
    assert tables.expert_in.tolist() == [2, 1]  # 0 was used longest ago
    assert copies[0].tolist() == [2, -1]
    assert int(copies[1, 0]) == 0
    assert tables.counters[:4].tolist() == [1, 3, 0, 0]


def test_experts_of_the_call_are_never_victims() -> None:
    tables = ResidencyTables.empty(8, 4, DEVICE)
    copies = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    plan(torch.tensor([0, 1, 2, 3], device=DEVICE), tables, LRU, copies)
    plan(torch.tensor([7, 0, 6, 1], device=DEVICE), tables, LRU, copies)
    assert sorted(tables.expert_in.tolist()) == [0, 1, 6, 7]


def test_a_prefetch_that_would_evict_its_own_experts_leaves_them_out() -> None:
    tables = ResidencyTables.empty(8, 2, DEVICE)
    copies = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    plan(torch.tensor([5, 4, 3, 2], device=DEVICE), tables, LRU, copies, is_prefetch=True)
    assert copies[0].tolist() == [5, 4, -1, -1]
    assert tables.expert_in.tolist() == [5, 4]


def test_fetch_copies_the_planned_rows_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 255, (6, 3 * 64), dtype=torch.uint8, generator=generator)
    slots = torch.randint(0, 255, (4, 3 * 64), dtype=torch.uint8, generator=generator)
    copies = torch.tensor([[4, -1, 0], [1, 3, 2], [WHOLE, WHOLE, WHOLE]], dtype=torch.int32)
    expected = slots.clone()
    fetch_reference(rows, expected, copies)
    got = slots.to(DEVICE)
    fetch(rows.to(DEVICE), got, copies.to(DEVICE), num_blocks=2)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("part", [HEAD, TAIL])
def test_a_head_and_its_tail_make_a_whole(part: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(
        0, 255, (3, 5 * 8 * BLOCK_WORDS - 64), dtype=torch.uint8, generator=generator
    )
    middle = torch.tensor([2 * BLOCK_WORDS], dtype=torch.int32)
    copies = torch.tensor([[2], [1], [part]], dtype=torch.int32)
    expected = torch.zeros(2, rows.shape[1], dtype=torch.uint8)
    fetch_reference(rows, expected, copies, middle)
    got = torch.zeros_like(expected, device=DEVICE)
    fetch(rows.to(DEVICE), got, copies.to(DEVICE), num_blocks=2, head_words=middle.to(DEVICE))
    assert torch.equal(got.cpu(), expected)
    copies[2] = TAIL if part == HEAD else HEAD
    fetch(rows.to(DEVICE), got, copies.to(DEVICE), num_blocks=3, head_words=middle.to(DEVICE))
    assert torch.equal(got[1].cpu(), rows[2])


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_heads_agree_with_the_reference_over_random_residency_sequences(num_tokens: int) -> None:
    settled = 0
    for seed in range(NUM_SEQUENCES // 4):
        generator = torch.Generator().manual_seed(seed)
        num_experts, num_slots, top_k = 13, (6, 9, 13)[seed % 3], 3
        expected = ResidencyTables.empty(num_experts, num_slots, "cpu")
        got = on_device(expected)
        for _ in range(8):
            noise = torch.rand(2, num_tokens, num_experts, generator=generator)
            ids, guess = noise.topk(top_k, dim=-1).indices
            guess = torch.where(noise[0, :, :top_k] < 0.6, ids, guess)
            chances = torch.rand(num_tokens, top_k, generator=generator).sort(-1).values.flip(-1)
            both = [torch.full((3, 2), -7, dtype=torch.int32, device=d) for d in ("cpu", DEVICE)]
            share = {"num_words": 10, "num_needed": ids.numel()}
            whole = torch.tensor([seed % 2], dtype=torch.int32)
            words = torch.tensor([int(noise[0, 0, 0] * 10)], dtype=torch.int32)
            room = {"head_words": words, "num_whole": whole}
            plan_head_reference(guess, chances, expected, both[0], **room, **share)
            on_gpu = guess.to(DEVICE), chances.to(DEVICE)
            room = {name: tensor.to(DEVICE) for name, tensor in room.items()}
            plan_head(*on_gpu, got, both[1], **room, **share)
            assert torch.equal(both[1].cpu(), both[0])
            size = (5, ids.numel())
            both = [torch.full(size, -7, dtype=torch.int32, device=d) for d in ("cpu", DEVICE)]
            plan_reference(ids, expected, LRFU, both[0][:3], places=both[0][3:])
            plan(ids.to(DEVICE), got, LRFU, both[1][:3], places=both[1][3:])
            assert torch.equal(both[1].cpu(), both[0])
            assert_equal_tables(got, expected, rtol=1e-5, atol=1e-6)
            got.check_integrity()
        settled += int(expected.counters[TAILS]) * int(expected.counters[WASTED_HEADS])
    assert settled > 0  # some were right and some were wrong


@pytest.mark.parametrize(("demanded", "regrets"), [((2, 0), 1), ((2, 1), 0), ((3, 0), 1)])
def test_a_miss_of_what_a_head_drove_out_is_regretted(
    demanded: tuple[int, int], regrets: int
) -> None:
    tables = ResidencyTables.empty(5, 2, DEVICE)
    for ids in ([0, 1], [1, 1]):  # 0 is worth less
        plan(torch.tensor(ids, device=DEVICE), tables, LFU, no_copies(2))
    copies = torch.empty(3, 1, dtype=torch.int32, device=DEVICE)
    words = torch.ones(1, dtype=torch.int32, device=DEVICE)
    guess, chances = torch.tensor([2], device=DEVICE), torch.ones(1, device=DEVICE)
    plan_head(guess, chances, tables, copies, num_needed=1, head_words=words, num_words=1)
    for _ in range(2):  # the second time nothing is begun
        plan(torch.tensor(demanded, device=DEVICE), tables, LFU, no_copies(2))
        assert tables.counters[REGRETS] == regrets


def test_what_only_a_guess_had_made_resident_is_not_regretted() -> None:
    tables = ResidencyTables.empty(5, 2, DEVICE)
    plan(torch.tensor([0], device=DEVICE), tables, LFU, no_copies(1))
    copies = torch.empty(3, 2, dtype=torch.int32, device=DEVICE)
    room = {"num_whole": torch.ones(1, dtype=torch.int32, device=DEVICE)}
    room |= {"head_words": torch.zeros_like(room["num_whole"])}
    sure = torch.ones(1, device=DEVICE)
    for guessed, demanded in ((2, 0), (3, 2)):  # 2 comes early, then 3 in its place
        guess = torch.tensor([guessed], device=DEVICE)
        plan_head(guess, sure, tables, copies, num_needed=1, num_words=1, **room)
        assert copies[0, 0] == guessed
        plan(torch.tensor([demanded], device=DEVICE), tables, LFU, no_copies(1))
    assert tables.counters[[WASTED, REGRETS]].tolist() == [2, 0]  # 3 as well


def test_heads_that_come_to_nothing_lose_trust_until_none_is_begun() -> None:
    tables = ResidencyTables.empty(40, 8, DEVICE)
    copies = torch.empty(3, 1, dtype=torch.int32, device=DEVICE)
    begun, whole = [], torch.ones(1, dtype=torch.int32, device=DEVICE)
    for step in range(60):
        wrong = torch.tensor([20 + step % 10], device=DEVICE)
        sure = torch.tensor([0.9], device=DEVICE)
        plan_head(wrong, sure, tables, copies, num_needed=1, head_words=whole, num_words=1)
        begun.append(int(copies[0, 0]) >= 0)
        plan(torch.tensor([step % 4], device=DEVICE), tables, LFU, copies.clone())
    assert begun[0]
    assert not any(begun[-10:])


@pytest.mark.parametrize(
    ("head_words", "num_needed", "is_begun"), [(1, 2, False), (9, 2, True), (9, 3, False)]
)
def test_a_short_head_evicts_nothing_that_may_be_needed(
    head_words: int, num_needed: int, is_begun: bool
) -> None:
    tables = ResidencyTables.empty(4, 2, DEVICE)
    plan(torch.tensor([0, 1], device=DEVICE), tables, LFU, no_copies(2))
    copies = torch.empty(3, 1, dtype=torch.int32, device=DEVICE)
    words = torch.tensor([head_words], dtype=torch.int32, device=DEVICE)
    guess, chances = torch.tensor([2, 0], device=DEVICE), torch.tensor([0.9, 0.6], device=DEVICE)
    # of two needed, half a one is missing from the guess: feared to be the only other resident
    sizes = {"num_needed": num_needed, "num_words": 10}
    plan_head(guess, chances, tables, copies, head_words=words, **sizes)
    assert (int(copies[0, 0]) == 2) == is_begun


FORMS = {
    "qwen": ExpertForm(activation="silu"),
    "gemma": ExpertForm(activation="gelu-tanh"),
    "gpt-oss": ExpertForm(
        activation="clamped-swish", is_interleaved=True, is_transposed=True, alpha=1.7, limit=0.7
    ),
    "llama4": ExpertForm(activation="silu", is_transposed=True),
    "nemotron": ExpertForm(activation="relu-squared", has_gate=False),
}


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_products_agree_with_the_reference(name: str, dtype: torch.dtype, num_tokens: int) -> None:
    form, generator = FORMS[name], torch.Generator().manual_seed(1)
    slots, depth, width, top_k = 4, 40, 24, 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = (2 if form.has_gate else 1) * width
    first = (slots, depth, rows) if form.is_transposed else (slots, rows, depth)
    second = (slots, width, depth) if form.is_transposed else (slots, depth, width)
    prefix = "gate_up_proj" if form.has_gate else "up_proj"
    weights = {prefix: random(*first), "down_proj": random(*second)}
    if name == "gpt-oss":
        weights |= {f"{prefix}_bias": random(slots, rows), "down_proj_bias": random(slots, depth)}
    slot_of = torch.tensor([2, -1, 0, 3, -1, 1], dtype=torch.int32)
    ids = torch.tensor([[0, 3], [5, 2], [3, 5]])[:num_tokens].flatten()
    places = torch.stack([slot_of[ids], torch.arange(len(ids), dtype=torch.int32)])
    hidden, gates = random(num_tokens, depth), torch.rand(num_tokens, top_k, generator=generator)
    expected = expert_products_reference(hidden, places, gates, weights, form)
    output = torch.full((num_tokens, depth), float("nan"), dtype=dtype, device=DEVICE)
    expert_products(
        hidden.to(DEVICE),
        places.to(DEVICE),
        gates.to(DEVICE),
        {key: weight.to(DEVICE) for key, weight in weights.items()},
        form,
        output,
    )
    # float32 sums in another order; bfloat16 output is rounded once more, at 3 digits
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    error = (output.cpu().float() - expected).norm() / expected.norm()
    assert error < tolerance


ENCODINGS = {
    **EXPERT_DTYPES,
    "mxfp4": Mxfp4,
    "fp8-blocks": lambda rows, columns: Fp8Blocks(rows, columns, stacked=2, block=16),
}


def encoded(encoding: Encoding, num_slots: int, generator: torch.Generator) -> dict[str, Any]:
    """Parts of random matrices, by suffix, [S, ..]."""
    if not encoding.is_native:
        matrices = torch.randn(num_slots, encoding.rows, encoding.columns, generator=generator)
        if isinstance(encoding, Lossless):  # rows with none, with a few and with many exceptions
            matrices[:, ::40, ::13] *= 4096
            matrices[:, 3, ::10] *= 4096
            matrices = matrices.bfloat16()
        stored = [encoding.encode(matrix) for matrix in matrices]
        return {suffix: torch.stack([parts[suffix] for parts in stored]) for suffix in stored[0]}
    parts: dict[str, Any] = {}
    for suffix, (shape, dtype) in encoding.parts().items():
        size = (num_slots, *shape)
        if dtype == torch.float32:  # a factor
            parts[suffix] = torch.rand(size, generator=generator) / 100
        elif suffix == "_scales":  # an exponent
            parts[suffix] = torch.randint(120, 132, size, dtype=dtype, generator=generator)
        else:
            bits = torch.randint(0, 127, size, dtype=torch.uint8, generator=generator)
            parts[suffix] = (bits | (bits & 1) << 7).view(dtype)  # both signs, no NaN
    return parts


@pytest.mark.parametrize("kind", ["mxfp4", "lossless"])
def test_a_slot_that_no_token_asks_for_may_hold_anything(kind: str) -> None:
    form, generator = FORMS["qwen"], torch.Generator().manual_seed(4)
    depth, width, num_slots, top_k = 64, 32, 4, 3  # no power of two: lanes are left over
    weights: dict[str, Any] = {}
    for key, rows, columns in (("gate_up_proj", 2 * width, depth), ("down_proj", depth, width)):
        encoding = ENCODINGS[kind](rows, columns)
        parts = encoded(encoding, num_slots, generator)
        for part in parts.values():
            part[0].view(torch.uint8).fill_(255)
        parameter = EncodedParameter(encoding, (rows, columns), torch.float32, False)
        weights[key] = EncodedWeights(parameter, {k: part.to(DEVICE) for k, part in parts.items()})
    places = torch.tensor([[1, 2, 3], [0, 1, 2]], dtype=torch.int32, device=DEVICE)
    hidden = torch.randn(1, depth, generator=generator).to(DEVICE)
    gates, output = torch.rand(1, top_k, generator=generator).to(DEVICE), torch.empty_like(hidden)
    expert_products(hidden, places, gates, weights, form, output)
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float32) for n in ("qwen", "gpt-oss", "nemotron")), ("gpt-oss", torch.bfloat16)],
)
@pytest.mark.parametrize("kind", ENCODINGS)
def test_products_decode_experts_stored_in_fewer_bits(
    kind: str, name: str, dtype: torch.dtype
) -> None:
    form, generator = FORMS[name], torch.Generator().manual_seed(3)
    num_slots, top_k = 3, 2
    depth, width = {"int4": (120, 40), "lossless": (142, 52)}.get(kind, (64, 32))
    inner = (2 if form.has_gate else 1) * width
    weights: dict[str, Any] = {}
    for key, rows, columns in ((form.first, inner, depth), ("down_proj", depth, width)):
        encoding = ENCODINGS[kind](rows, columns)
        shape = (columns, rows) if form.is_transposed else (rows, columns)
        parameter = EncodedParameter(encoding, shape, dtype, form.is_transposed)
        parts = encoded(encoding, num_slots, generator)
        weights[key] = EncodedWeights(parameter, {k: part.to(DEVICE) for k, part in parts.items()})
    if name == "gpt-oss":
        sizes = {f"{form.first}_bias": inner, "down_proj_bias": depth}
        for key, size in sizes.items():
            weights[key] = torch.randn(num_slots, size, generator=generator).to(DEVICE, dtype)
    places = torch.tensor([[2, 0, 1, 2], [0, 1, 2, 3]], dtype=torch.int32, device=DEVICE)
    hidden = torch.randn(2, depth, generator=generator).to(DEVICE, dtype)
    gates = torch.rand(2, top_k, generator=generator).to(DEVICE)
    output = torch.full_like(hidden, float("nan"))
    expert_products(hidden, places, gates, weights, form, output)
    expected = expert_products_reference(hidden, places, gates, weights, form)
    error = (output.float() - expected).norm() / expected.norm()
    # float32 sums in another order; Triton's interpreter cuts bfloat16 off instead of rounding
    assert error < (1e-5 if dtype == torch.float32 else 2.5e-2)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("name", FORMS)
def test_products_copy_what_is_missing_and_give_the_bits_of_all_resident(
    name: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fetch_module, demand_module):
        monkeypatch.setattr(module, "BLOCK_WORDS", 64)
    for module in (plan_module, demand_module):
        monkeypatch.setattr(module, "DEMAND_PROGRAMS", 3)
    form, generator = FORMS[name], torch.Generator().manual_seed(2)
    num_experts, num_slots, depth, width, top_k = 7, 5, 40, 16, 2
    inner = (2 if form.has_gate else 1) * width
    sizes = {form.first: (inner, depth), f"{form.first}_bias": (inner,)}
    sizes |= {"down_proj": (depth, width), "down_proj_bias": (depth,)}
    if form.is_transposed:
        sizes = {key: size[::-1] for key, size in sizes.items()}
    if name != "gpt-oss":
        sizes = {key: size for key, size in sizes.items() if len(size) == 2}
    layout = RowLayout(
        specs := _in_a_row(sizes), max(s.offset_bytes + s.num_bytes for s in specs.values())
    )
    values = torch.randn(num_experts, layout.row_bytes // 2, generator=generator)
    rows = (values / 8).bfloat16().view(torch.uint8).to(DEVICE)
    tables = ResidencyTables.empty(num_experts, num_slots, DEVICE)
    slots = torch.full((num_slots, layout.row_bytes), 255, dtype=torch.uint8, device=DEVICE)
    middle = torch.tensor([64], dtype=torch.int32, device=DEVICE)
    everywhere = torch.arange(num_experts, dtype=torch.int32)
    num_misses = 0
    for step in range(6):
        ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
        if step == 5:  # what a head began is completed
            copies = torch.empty(3, 1, dtype=torch.int32, device=DEVICE)
            absent = next(e for e in range(num_experts) if int(tables.slot_of[e]) < 0)
            ids[0, 0] = absent if absent not in ids[0].tolist() else ids[0, 0]
            guess = torch.tensor([absent], device=DEVICE), torch.ones(1, device=DEVICE)
            words = layout.row_bytes // 8
            plan_head(*guess, tables, copies, num_needed=1, head_words=middle, num_words=words)
            fetch(rows, slots, copies, num_blocks=2, head_words=middle)
            assert int(tables.pending[0]) == absent
        hidden = torch.randn(num_tokens, depth, generator=generator).bfloat16().to(DEVICE)
        gates = torch.rand(num_tokens, top_k, generator=generator).to(DEVICE)
        copies = torch.empty(3, ids.numel(), dtype=torch.int32, device=DEVICE)
        places = torch.empty(2, ids.numel(), dtype=torch.int32, device=DEVICE)
        plan(ids.to(DEVICE), tables, LRU, copies, places=places)
        num_misses += int((copies[0] >= 0).sum())
        progress, first = tables.progress, specs.get(f"{form.first}_bias", specs[form.first])
        demand = Demand(
            rows,
            slots,
            copies,
            middle,
            tables.arrived,
            progress,
            first.offset_bytes + first.num_bytes,
        )
        outputs = [torch.full_like(hidden, float("nan")) for _ in range(2)]
        expert_products(hidden, places, gates, layout.views(slots), form, outputs[0], demand)
        all_there = torch.stack([ids.flatten().int(), everywhere[: ids.numel()]]).to(DEVICE)
        expert_products(hidden, all_there, gates, layout.views(rows), form, outputs[1])
        assert torch.equal(*outputs)
        assert int(progress[0]) == int(progress[1])
        for expert in set(ids.flatten().tolist()):
            assert torch.equal(slots[tables.slot_of[expert]], rows[expert])
    assert num_misses > 3
    assert int(tables.counters[TAILS]) == 1


def _in_a_row(sizes: dict[str, tuple[int, ...]]) -> dict[str, ParameterSpec]:
    """Parameters in bfloat16, one after the other."""
    specs, offset = {}, 0
    for key, size in sizes.items():
        specs[key] = ParameterSpec(size, torch.bfloat16, offset)
        offset += specs[key].num_bytes
    return specs


@pytest.mark.parametrize("columns", [40, 67, 512])
def test_what_a_gpu_unpacks_is_every_bit_that_was_packed(columns: int) -> None:
    generator = torch.Generator().manual_seed(5)
    matrices = (torch.randn(2, 24, columns, generator=generator) * 0.02).bfloat16()
    matrices[:, ::8, :20:3] *= 4096  # two lines beside the rows' own
    matrices[:, 1, :3] = torch.tensor([-0.0, float("inf"), float("nan")])
    encoding = Lossless(24, columns)
    parts = {suffix: part.to(DEVICE) for suffix, part in encoding.encode(matrices).items()}
    unpacked = unpack(parts[""], parts["_lines"], 24, columns).cpu()
    assert torch.equal(unpacked.view(torch.int16), matrices.view(torch.int16))

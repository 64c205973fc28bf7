"""Prefetch on the device: as much of the likeliest experts as there is time for.

While a layer computes, the link has time for a few small experts, or for a part of a large one. So
the likeliest absent experts of the next layer are copied whole, as many as fit, and of one more its
head: if the router asks for that, the tail follows with the layer's other misses; if not, little
time was lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreroute.runtime.device.kernels.tables import (
    AT_HEADS,
    AT_PREFETCHES,
    AT_WASTED,
    EMPTY,
    HEAD,
    HEAD_RULE,
    HEADS,
    NO_EXPERT,
    ONLY_HEAD,
    PREFETCHES,
    WASTED,
    WHOLE,
    ResidencyTables,
)


@triton.jit
def _head_kernel(
    expert_ids,
    confidence,
    slot_of,
    expert_in,
    score,
    is_unused_prefetch,
    counters,
    pending,
    pending_confidence,
    driven_out,
    trust,
    head_words,
    copies,
    num_slots,
    num_words,
    num_needed,
    least,
    num_whole,
    NUM_IDS: tl.constexpr,
    IDS: tl.constexpr,
    SLOTS: tl.constexpr,
    GUESSES: tl.constexpr,
):
    at, slots = tl.arange(0, IDS), tl.arange(0, SLOTS)
    is_id, is_slot = at < NUM_IDS, slots < num_slots
    ids = tl.load(expert_ids + at, mask=is_id, other=0).to(tl.int32)
    said = tl.load(confidence + at, mask=is_id, other=0.0)
    is_absent = is_id & (tl.load(slot_of + ids, mask=is_id, other=0) < 0)
    chance = tl.where(is_absent, said, -1.0)
    held = tl.load(expert_in + slots, mask=is_slot, other=-2)
    worth = tl.load(score + held, mask=held >= 0, other=-1.0)
    taken = tl.where(is_slot, 0, 1)  # slots that may not be evicted
    for i in tl.static_range(NUM_IDS):
        taken = tl.where(held == tl.load(expert_ids + i).to(tl.int32), 1, taken)
    share = tl.minimum(1.0, tl.load(trust) / tl.load(trust + 1))
    unnamed = num_needed - tl.sum(said, 0)
    others = tl.sum(((taken == 0) & (held >= 0)).to(tl.int32), 0)
    fear = unnamed / tl.maximum(others, 1)
    whole_left = 0
    if GUESSES > 1:
        whole_left = tl.load(num_whole)
    expected, num_prefetches = 0.0, 0
    for guess in tl.static_range(GUESSES):
        best = tl.argmax(chance, 0)
        likely = tl.max(chance, 0)
        expert = tl.sum(tl.where(at == best, ids, 0), 0)
        slot = tl.argmin(tl.where(taken == 0, worth, float("inf")), 0)
        evicted = tl.sum(tl.where(slots == slot, held, 0), 0)
        words = tl.where(whole_left > 0, num_words, tl.load(head_words))
        saved = likely * share * words.to(tl.float32) / num_words
        has_room = (tl.min(taken, 0) == 0) & ((evicted < 0) | (saved > fear))
        if (whole_left >= 0) & (words > 0) & (likely * share >= least) & has_room:
            if evicted >= 0:
                tl.store(slot_of + evicted, NO_EXPERT)
            wasted = tl.load(is_unused_prefetch + slot)
            tl.store(counters + AT_WASTED, tl.load(counters + AT_WASTED) + wasted)
            tl.store(slot_of + expert, slot)
            tl.store(expert_in + slot, expert)
            tl.store(driven_out + guess, tl.where(wasted > 0, NO_EXPERT, evicted))
            tl.store(copies + guess, expert)
            tl.store(copies + GUESSES + guess, slot)
            expected += likely
            if whole_left > 0:
                tl.store(is_unused_prefetch + slot, 1)
                tl.store(copies + 2 * GUESSES + guess, 0)
                num_prefetches += 1
            else:
                tl.store(is_unused_prefetch + slot, 0)
                tl.store(pending, expert)
                tl.store(pending + 1, slot)
                tl.store(counters + AT_HEADS, tl.load(counters + AT_HEADS) + 1)
                tl.store(copies + 2 * GUESSES + guess, ONLY_HEAD)
            chance = tl.where(ids == expert, -1.0, chance)
            taken = tl.where(slots == slot, 1, taken)
            whole_left -= 1
        else:
            tl.store(copies + guess, NO_EXPERT)
            whole_left = -1
    tl.store(pending_confidence, expected)
    if GUESSES > 1:
        tl.store(counters + AT_PREFETCHES, tl.load(counters + AT_PREFETCHES) + num_prefetches)


def plan_head(
    expert_ids: Tensor,
    confidence: Tensor,
    tables: ResidencyTables,
    copies: Tensor,
    *,
    num_needed: int,
    head_words: Tensor,
    num_words: int,
    num_whole: Tensor | None = None,
) -> None:
    """Choose what is copied early, if anything is likely enough; one launch.

    The likeliest absent experts are copied whole, as many as there is time for, and of the next one
    its head. The more earlier ones came to nothing, the less a confidence counts
    (`ResidencyTables.trust`). A copy must save more than it risks. It saves its share of a whole
    one, if its expert is needed. It risks a whole one, if its victim is needed. How likely that is:
    the layer will use some experts that no guess names, and each resident that no guess names may
    be one of them. Experts that a guess names are never victims. The layer's next demand (`plan`)
    settles the head.

    Args:
        expert_ids: Predicted, [..] with N elements, any integer dtype.
        confidence: How likely each is among the true ones, of the same shape, float32.
        tables: Of the layer they belong to, with nothing pending; changed in place.
        copies: Written, [3, G] int32, as `fetch` takes it, for G guesses at most.
        num_needed: Experts that the layer will use, over all tokens.
        head_words: Length of a head, [1] int32 on the device.
        num_words: Length of an expert in the same unit.
        num_whole: Experts that there is time for, [1] int32 on the device; none if None.
    """
    num_ids, num_slots = expert_ids.numel(), len(tables.expert_in)
    _head_kernel[(1,)](
        expert_ids,
        confidence,
        tables.slot_of,
        tables.expert_in,
        tables.score,
        tables.is_unused_prefetch,
        tables.counters,
        tables.pending,
        tables.pending_confidence,
        tables.driven_out,
        tables.trust,
        head_words,
        copies,
        num_slots,
        num_words,
        num_needed,
        HEAD_RULE.least_confidence,
        head_words if num_whole is None else num_whole,
        NUM_IDS=num_ids,
        IDS=triton.next_power_of_2(num_ids),
        SLOTS=triton.next_power_of_2(num_slots),
        GUESSES=1 if num_whole is None else copies.shape[1],
        num_warps=1,
    )


def plan_head_reference(
    expert_ids: Tensor,
    confidence: Tensor,
    tables: ResidencyTables,
    copies: Tensor,
    *,
    num_needed: int,
    head_words: Tensor,
    num_words: int,
    num_whole: Tensor | None = None,
) -> None:
    """What `plan_head` does, in plain Python."""
    copies[0], wholes = EMPTY, 0 if num_whole is None else int(num_whole)
    tables.pending_confidence.zero_()
    ids, chances = expert_ids.flatten().tolist(), confidence.flatten().tolist()
    guesses = list(zip(ids, chances, strict=True))
    absent = [(p, -i, e) for i, (e, p) in enumerate(guesses) if tables.slot_of[e] == EMPTY]
    held = tables.expert_in.tolist()
    free = [slot for slot, expert in enumerate(held) if expert not in set(ids)]
    fear = (num_needed - sum(chances)) / max(sum(held[s] != EMPTY for s in free), 1)
    worth = {s: -1.0 if held[s] == EMPTY else float(tables.score[held[s]]) for s in free}
    trust = min(1.0, float(tables.trust[0] / tables.trust[1]))
    for place in range(copies.shape[1]):
        is_whole = place < wholes
        words = num_words if is_whole else int(head_words)
        if not absent or not free or not words or place > wholes:
            return
        likely, _, expert = max(absent)
        slot = min(free, key=lambda s: (worth[s], s))
        saves = held[slot] == EMPTY or likely * trust * words / num_words > fear
        if likely * trust < HEAD_RULE.least_confidence or not saves:
            return
        if held[slot] != EMPTY:
            tables.slot_of[held[slot]] = EMPTY
            if not tables.is_unused_prefetch[slot]:
                tables.driven_out[place] = held[slot]
        tables.counters[WASTED] += tables.is_unused_prefetch[slot]
        tables.is_unused_prefetch[slot] = int(is_whole)
        tables.slot_of[expert], tables.expert_in[slot] = slot, expert
        tables.pending_confidence += likely
        tables.counters[PREFETCHES if is_whole else HEADS] += 1
        copies[:, place] = torch.tensor([expert, slot, WHOLE if is_whole else HEAD])
        if not is_whole:
            tables.pending.copy_(torch.tensor([expert, slot]))
        free.remove(slot)
        absent = [guess for guess in absent if guess[2] != expert]

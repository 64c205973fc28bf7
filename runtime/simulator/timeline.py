"""The replay's inner loops, over arrays: slots under a policy, and decode steps on a timeline.

The rules are those of `policies.LayerState` and `policies.PrefetchRule`; tests hold them together.
Experts are numbered through all layers (layer x E + expert).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreroute.runtime.policies.duel import LEAST_LEAD, MOST_LEAD
from foreroute.runtime.policies.layer_state import RESCALE_ABOVE, RESCALE_BY, TIE
from foreroute.runtime.policies.prefetching import DEMAND_MEMORY
from foreroute.runtime.simulator.compiled import compiled

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

FREQUENCY, RECENCY, ADAPTIVE, STATIC, FUTURE = range(5)
LOOKUPS, HITS, LATE, STALL_MS, FETCHED, PREFETCHED, WASTED, AGREED, CHOSEN = range(9)
NUM_COUNTS = 9
RIGHT, EXPECTED, MISSED, FEARED = range(4)
EMPTY = -1
NOTHING_UNUSED = -1.0
NEWS = 0.1  # a look from nearer that says nearly the same is no news


class Cache(NamedTuple):
    """Slots of all layers under one policy; arrays are changed in place."""

    kind: int
    """`FREQUENCY`, `RECENCY`, `ADAPTIVE`, `STATIC` or `FUTURE`."""
    decay: float
    prompt_weight: float
    likely_bonus: float
    first: Integers
    """[L + 1], a layer's first slot."""
    expert_in: Integers
    """[slots], or `EMPTY`."""
    slot_of: Integers
    """[L x E], or `EMPTY`."""
    worth: Floats
    """[L x E], in units that grow by 1 / decay a step."""
    unit: Floats
    """[L]."""
    step: Integers
    """[L]."""
    unused: Floats
    """[L x E], prefetched and not used yet: how much was copied, in experts; or -1."""
    counts: Floats
    """[NUM_COUNTS]."""
    used_at: Floats
    """[L x E], under `ADAPTIVE` the step of the last use; else empty, as are the next two."""
    shadows: Flags
    """[2, L x E], what `worth` and `used_at` would have made resident, had they always ruled."""
    duels: Flags
    """[L], layers whose shadows are kept."""
    lead: Integers
    """[1], hits by which the shadows of `used_at` lead."""
    is_recent: Flags
    """[L], whether `used_at` led when the layer was last used: then it says who is evicted."""


class Machine(NamedTuple):
    """Times in ms; see `LinkTimes`."""

    layer_ms: float
    token_ms: float
    predict_ms: float
    fetch_ms: float
    begin_ms: float
    ahead_ms: float
    head_share: float
    demand_ms: Floats
    early_ms: Floats
    pieces: int
    piece_ms: float


class Looks(NamedTuple):
    """What prefetch in pieces sees of the predictions."""

    expert_ids: Integers
    """[H, T, L, M], by target layer, numbered; -1 for nothing."""
    confidence: NDArray[np.float32]
    """[H, T, L, M]."""
    least: float
    """Confidence from which a prediction is looked at."""
    missed_mass: Floats
    """[T, L], the share of true experts that the nearest look leaves out."""
    said: Floats
    """[L x E], what earlier looks of this token said of an expert, or -1."""


class Wishes(NamedTuple):
    """One token's predictions that are absent: waiting, on their way, or there."""

    at: Integers
    """[L x E], the expert's wish, or -1."""
    expert: Integers
    target: Integers
    probability: Floats
    left: Integers
    """Pieces to copy."""
    is_started: Flags
    victim: Integers
    fear: Floats
    """How likely the victim is needed."""
    queue: Integers
    """Wishes with pieces left, likeliest first."""


# slots


@compiled
def _is_among(expert: int, ids: Integers) -> bool:
    for other in ids:  # noqa: SIM110 (numba compiles no generator here)
        if other == expert:
            return True
    return False


@compiled
def _ranking(cache: Cache, layer: int) -> Floats:
    """What a layer's evicted expert has least of, [L x E]."""
    return cache.used_at if cache.is_recent[layer] else cache.worth


@compiled
def find_victim(cache: Cache, layer: int, kept: Integers) -> int:
    """The first empty slot, else the first of the least worth; -1 if all are kept."""
    best, least, ranking = -1, np.inf, _ranking(cache, layer)
    for slot in range(cache.first[layer], cache.first[layer + 1]):
        expert = cache.expert_in[slot]
        if expert == EMPTY:
            return slot
        worth = ranking[expert]
        if (best < 0 or worth < least) and not _is_among(expert, kept):
            best, least = slot, worth
    return best


@compiled
def admit(cache: Cache, slot: int, expert: int) -> None:
    """Put an expert into a slot; counts an unused prefetch that has to go."""
    victim = cache.expert_in[slot]
    if victim != EMPTY:
        cache.slot_of[victim] = EMPTY
        if cache.unused[victim] >= 0:
            cache.counts[WASTED] += cache.unused[victim]
            cache.unused[victim] = NOTHING_UNUSED
    cache.expert_in[slot] = expert
    cache.slot_of[expert] = slot


@compiled
def release(cache: Cache, expert: int) -> None:
    """Empty the slot of a prefetch that came to nothing."""
    cache.expert_in[cache.slot_of[expert]] = EMPTY
    cache.slot_of[expert] = EMPTY
    if cache.unused[expert] >= 0:
        cache.counts[WASTED] += cache.unused[expert]
        cache.unused[expert] = NOTHING_UNUSED


@compiled
def _grow(cache: Cache, layer: int) -> None:
    cache.step[layer] += 1
    cache.unit[layer] *= 1.0 / cache.decay


@compiled
def _rescale(cache: Cache, layer: int) -> None:
    if cache.unit[layer] > RESCALE_ABOVE:
        size = len(cache.worth) // len(cache.unit)
        cache.unit[layer] *= RESCALE_BY
        cache.worth[layer * size : (layer + 1) * size] *= RESCALE_BY


@compiled
def demand(cache: Cache, layer: int, ids: Integers, next_use: Floats) -> int:
    """Make a token's experts resident and count their use; returns how many were absent."""
    missing = _bring(cache, layer, ids)
    _use(cache, layer, ids, next_use)
    return missing


@compiled
def demand_ruled(
    cache: Cache, layer: int, run: Integers, chosen: Integers, next_use: Floats
) -> int:
    """`demand` of what a rule on a miss lets run; the router's choice is credited, and counted."""
    counts = cache.counts
    missing = _bring(cache, layer, run)
    _use(cache, layer, chosen, next_use)
    lookups = (run >= 0).sum()
    counts[LOOKUPS] += lookups
    counts[HITS] += lookups - missing
    counts[FETCHED] += missing
    for expert in chosen:
        counts[CHOSEN] += expert >= 0
        counts[AGREED] += expert >= 0 and _is_among(expert, run)
    return missing


@compiled
def _bring(cache: Cache, layer: int, ids: Integers) -> int:
    """Make experts resident; returns how many were absent."""
    missing = 0
    for expert in ids:
        if expert >= 0 and cache.slot_of[expert] == EMPTY:
            admit(cache, find_victim(cache, layer, ids), expert)
            missing += 1
    for expert in ids:
        if expert >= 0:
            cache.unused[expert] = NOTHING_UNUSED
    return missing


@compiled
def _duel(cache: Cache, layer: int, ids: Integers) -> None:
    """Compare the hits of the shadows."""
    recent = _shadow_hits(cache, layer, ids, cache.shadows[1], cache.used_at)
    frequent = _shadow_hits(cache, layer, ids, cache.shadows[0], cache.worth)
    cache.lead[0] = min(MOST_LEAD, max(-MOST_LEAD, cache.lead[0] + recent - frequent))


@compiled
def _shadow_hits(cache: Cache, layer: int, ids: Integers, shadow: Flags, worth: Floats) -> int:
    """Demand a token's experts of a shadow; of equal worth the lowest expert goes first."""
    hits, size = 0, len(cache.worth) // len(cache.unit)
    for expert in ids:
        if expert >= 0:
            hits += shadow[expert]
            shadow[expert] = True
    mine = range(layer * size, (layer + 1) * size)
    for _ in range(shadow[mine.start : mine.stop].sum() - _num_slots(cache, layer)):
        victim, least = EMPTY, np.inf
        for expert in mine:
            if shadow[expert] and worth[expert] < least and not _is_among(expert, ids):
                victim, least = expert, worth[expert]
        if victim != EMPTY:
            shadow[victim] = False
    return hits


@compiled
def _num_slots(cache: Cache, layer: int) -> int:
    return int(cache.first[layer + 1] - cache.first[layer])


@compiled
def _use(cache: Cache, layer: int, ids: Integers, next_use: Floats) -> None:
    if cache.kind == ADAPTIVE and cache.duels[layer]:
        _duel(cache, layer, ids)
    _grow(cache, layer)
    place = 0
    for i in range(len(ids)):
        expert = ids[i]
        if expert < 0:
            continue
        if cache.kind == RECENCY:
            cache.worth[expert] = cache.step[layer] + place * TIE
        elif cache.kind == FREQUENCY:
            cache.worth[expert] += cache.unit[layer]
        elif cache.kind == ADAPTIVE:
            cache.worth[expert] += cache.unit[layer]
            cache.used_at[expert] = cache.step[layer]
        elif cache.kind == FUTURE:
            cache.worth[expert] = next_use[i]
        place += 1
    _rescale(cache, layer)
    _follow(cache, layer)


@compiled
def _follow(cache: Cache, layer: int) -> None:
    cache.is_recent[layer] = cache.kind == ADAPTIVE and cache.lead[0] >= LEAST_LEAD


@compiled
def warm(cache: Cache, layer: int, rows: Integers) -> None:
    """Count a prompt's uses, [T, K], then fill the slots with the experts of most worth."""
    for ids in rows:
        _grow(cache, layer)
        place = 0
        for expert in ids:
            if expert < 0:
                continue
            if cache.kind == RECENCY:
                cache.worth[expert] = cache.step[layer] + place * TIE
            else:
                cache.worth[expert] += cache.unit[layer] * cache.prompt_weight
            if cache.kind == ADAPTIVE:
                cache.used_at[expert] = cache.step[layer]
            place += 1
        _rescale(cache, layer)
    _follow(cache, layer)
    _fill(cache, layer)


@compiled
def _fill(cache: Cache, layer: int) -> None:
    size = len(cache.worth) // len(cache.unit)
    mine = slice(layer * size, (layer + 1) * size)
    cache.slot_of[mine] = EMPTY
    worth, num_slots = _ranking(cache, layer), _num_slots(cache, layer)
    order = np.argsort(-worth[mine], kind="mergesort") + layer * size
    for place in range(num_slots):
        slot = cache.first[layer] + place
        is_used = place < size and worth[order[place]] > 0
        cache.expert_in[slot] = order[place] if is_used else EMPTY
        if is_used:
            cache.slot_of[order[place]] = slot
    if cache.kind == ADAPTIVE:
        _fill_shadow(cache.shadows[0, mine], cache.worth[mine], num_slots)
        _fill_shadow(cache.shadows[1, mine], cache.used_at[mine], num_slots)


@compiled
def _fill_shadow(shadow: Flags, worth: Floats, num_slots: int) -> None:
    """Make those of most worth resident in a layer's shadow, none that was never used, [E] each."""
    best = np.argsort(-worth, kind="mergesort")[:num_slots]
    shadow[:] = False
    shadow[best] = worth[best] > 0


@compiled
def expect(cache: Cache, layer: int, ids: Integers, probabilities: Floats) -> None:
    """Credit experts that the next token is likely to use, [N] each."""
    place = 0
    for expert in ids:
        if expert >= 0:
            cache.worth[expert] += cache.likely_bonus * cache.unit[layer] * probabilities[place]
            place += 1


@compiled
def frequency(cache: Cache, layer: int, expert: int) -> float:
    """Estimated uses of an expert per step, 0..1."""
    if cache.kind == RECENCY:
        return float(1.0 / (2.0 + cache.step[layer] - cache.worth[expert]))
    forgets = max(1 - cache.decay, 1 / (1 + cache.step[layer]))
    return float(min(1.0, cache.worth[expert] / cache.unit[layer] * forgets))


# times


@compiled
def copy_ms(times: Floats, experts: float, fixed_ms: float) -> float:
    """To copy a number of experts, parts of one included, by the times of whole ones.

    The fixed part of a copy's time is not shared out to parts of the first expert.
    """
    most = len(times) - 1
    whole = int(experts)
    if whole >= most:
        return float(times[most] * experts / most)
    part = experts - whole
    if part == 0:
        return float(times[whole])
    if whole == 0:
        return max(0.0, float(fixed_ms + part * (times[1] - fixed_ms)))
    return float(times[whole] + part * (times[whole + 1] - times[whole]))


@compiled
def is_worth(
    probability: float, saved_ms: float, victim_probability: float, cost_ms: float
) -> bool:
    """`PrefetchRule.is_worth`."""
    return probability * saved_ms > victim_probability * cost_ms


@compiled
def may_overhang(
    probability: float, hidden_ms: float, overhang_ms: float, demand_probability: float
) -> bool:
    """`PrefetchRule.may_overhang`."""
    return probability * hidden_ms > demand_probability * overhang_ms


# decode steps; each returns its time in ms


@compiled
def run_on_demand(cache: Cache, machine: Machine, rows: Integers, next_use: Floats) -> float:
    """One decode step with nothing fetched early.

    Args:
        cache: Slots.
        machine: Times.
        rows: [L, K], the token's experts.
        next_use: [L, K], minus the step of the next use; read under `FUTURE` alone.
    """
    counts = cache.counts
    stall, layers = 0.0, len(rows)
    for layer in range(layers):
        ids = rows[layer]
        lookups = (ids >= 0).sum()
        missing = demand(cache, layer, ids, next_use[layer])
        counts[LOOKUPS] += lookups
        counts[HITS] += lookups - missing
        counts[FETCHED] += missing
        stall += machine.demand_ms[missing]
    counts[STALL_MS] += stall
    return stall + machine.layer_ms * layers


@compiled
def run_all(
    cache: Cache, machine: Machine, rows: Integers, next_use: Floats, guesses: Integers, ahead: int
) -> float:
    """One decode step with every guess fetched whole, and its layer waiting for it.

    Args:
        cache: Slots.
        machine: Times.
        rows: [L, K], the token's experts.
        next_use: [L, K].
        guesses: [L, M], by target layer.
        ahead: Layers ahead, H.
    """
    counts, layers = cache.counts, len(rows)
    clock = free = 0.0
    arrival = np.zeros(layers)
    for layer in range(layers):
        ids = rows[layer]
        known = clock
        clock = max(clock, arrival[layer])
        missing = demand(cache, layer, ids, next_use[layer])
        if missing:
            clock = free = max(clock, free) + machine.demand_ms[missing]
        lookups = (ids >= 0).sum()
        counts[STALL_MS] += clock - known
        counts[LOOKUPS] += lookups
        counts[HITS] += lookups - missing
        counts[FETCHED] += missing
        target = layer + ahead
        if target < layers:
            asked = _prefetch_all(cache, target, guesses[target])
            if asked:
                start = max(free, early_start(machine, known, clock))
                free = start + copy_ms(machine.early_ms, asked, 0.0)
                arrival[target] = free
            clock += machine.ahead_ms
        clock += machine.layer_ms
    return clock


@compiled
def _prefetch_all(cache: Cache, layer: int, guesses: Integers) -> int:
    asked = 0
    for expert in guesses:
        if expert < 0 or cache.slot_of[expert] != EMPTY:
            continue
        slot = find_victim(cache, layer, guesses)
        if slot < 0:
            break
        admit(cache, slot, expert)
        cache.unused[expert] = 1.0
        asked += 1
    cache.counts[PREFETCHED] += asked
    return asked


@compiled
def run_head(
    cache: Cache,
    machine: Machine,
    rows: Integers,
    next_use: Floats,
    guesses: Integers,
    probabilities: Floats,
    luck: Floats,
    least: float,
    keeps: float,
) -> float:
    """One decode step by the GPU's rule: the head of one expert of the next layer.

    Args:
        cache: Slots.
        machine: Times.
        rows: [L, K], the token's experts.
        next_use: [L, K].
        guesses: [L, M], one layer ahead, by target layer.
        probabilities: [L, M], that they are needed.
        luck: [4], how often guesses came true (`RIGHT`) and said they would (`EXPECTED`).
        least: Probability from which a head is fetched.
        keeps: Memory of `luck`, per head.
    """
    counts, layers = cache.counts, len(rows)
    clock = 0.0
    pending, said, head = EMPTY, 0.0, machine.head_share
    for layer in range(layers):
        ids = rows[layer]
        rest = 0.0
        if pending != EMPTY:
            is_right = _is_among(pending, ids)
            luck[EXPECTED] = luck[EXPECTED] * keeps + said
            luck[RIGHT] = luck[RIGHT] * keeps + is_right
            if is_right:
                rest = 1 - head
            else:
                release(cache, pending)
        known = clock
        lookups = (ids >= 0).sum()
        missing = demand(cache, layer, ids, next_use[layer])
        clock += copy_ms(machine.demand_ms, missing + rest, machine.fetch_ms)
        counts[STALL_MS] += clock - known
        counts[LOOKUPS] += lookups
        counts[HITS] += lookups - missing - (rest > 0)
        counts[LATE] += rest > 0
        counts[FETCHED] += missing + rest
        pending = EMPTY
        if layer + 1 < layers:
            trust = min(1.0, luck[RIGHT] / luck[EXPECTED])
            names, chances = guesses[layer + 1], probabilities[layer + 1]
            pending, said = _choose_head(
                cache, layer + 1, names, chances, len(ids), trust, head, least
            )
            start = early_start(machine, known, clock)
            clock += machine.layer_ms + machine.ahead_ms
            if pending != EMPTY:
                counts[PREFETCHED] += head
                cache.unused[pending] = head
                clock = max(clock, start + head * machine.pieces * machine.piece_ms)
        else:
            clock += machine.layer_ms
    return clock


@compiled
def early_start(machine: Machine, routed: float, fetched: float) -> float:
    """When a prefetch begins, after a layer's routing and after its demand is there."""
    return max(routed + machine.predict_ms, fetched + machine.begin_ms)


@compiled
def _choose_head(
    cache: Cache,
    layer: int,
    guesses: Integers,
    probabilities: Floats,
    top_k: int,
    trust: float,
    head: float,
    least: float,
) -> tuple[int, float]:
    """Admit the likeliest absent guess, if likely enough and worth its victim; how likely it is.

    Experts that no guess names are needed all the same, and any that is resident may be one.
    """
    best, most, unnamed = EMPTY, least / trust, float(top_k)
    for i in range(len(guesses)):
        expert = guesses[i]
        if expert < 0:
            continue
        unnamed -= probabilities[i]
        if cache.slot_of[expert] == EMPTY and probabilities[i] >= most:
            if best == EMPTY or probabilities[i] > most:
                best = expert
            most = probabilities[i]
    if best == EMPTY:
        return EMPTY, 0.0
    slot = find_victim(cache, layer, guesses)
    if slot < 0:
        return EMPTY, 0.0
    if cache.expert_in[slot] != EMPTY:
        others = 0
        for held in cache.expert_in[cache.first[layer] : cache.first[layer + 1]]:
            others += held != EMPTY and not _is_among(held, guesses)
        if not is_worth(most * trust, head, unnamed / others, 1.0):
            return EMPTY, 0.0
    admit(cache, slot, best)
    return best, most


@compiled
def run_pieces(
    cache: Cache,
    machine: Machine,
    rows: Integers,
    next_use: Floats,
    token: int,
    looks: Looks,
    wishes: Wishes,
    luck: Floats,
    demands: Floats,
    keeps: float,
) -> float:
    """One decode step with prefetch in pieces: only while the link would idle.

    Args:
        cache: Slots.
        machine: Times.
        rows: [L, K], the token's experts.
        next_use: [L, K].
        token: Its place in `looks`.
        looks: Predictions.
        wishes: Room for those of one token; empty before and after.
        luck: [4]: of guesses at absent experts, how often they came true (`RIGHT`) and said they
            would (`EXPECTED`); of victims, how often they were needed (`MISSED`, `FEARED`).
        demands: [L], how often a layer demands the link.
        keeps: Memory of `luck`, per prefetch.
    """
    counts, layers = cache.counts, len(rows)
    clock = free = 0.0
    num_wishes = num_queued = 0
    looks.said[:] = -1.0
    for layer in range(layers):
        ids = rows[layer]
        routed = clock
        rest, late = _arrive(cache, machine, wishes, num_wishes, layer, ids, luck, keeps)
        missing = demand(cache, layer, ids, next_use[layer])
        lookups = (ids >= 0).sum()
        counts[LOOKUPS] += lookups
        counts[HITS] += lookups - missing - late
        if missing or late:
            clock = free = max(clock, free) + copy_ms(
                machine.demand_ms, missing + rest, machine.fetch_ms
            )
            counts[STALL_MS] += clock - routed
            counts[FETCHED] += missing + rest
            counts[LATE] += late
            demands[layer] += (1 - DEMAND_MEMORY) * (1 - demands[layer])
        else:
            demands[layer] *= DEMAND_MEMORY
        num_wishes, num_queued = _look(
            cache, machine, looks, wishes, token, layer, num_wishes, num_queued
        )
        until = clock + machine.layer_ms + (machine.ahead_ms if layer + 1 < layers else 0.0)
        if num_queued:
            at = max(free, early_start(machine, routed, clock))
            num_queued, free = _fill_link(
                cache, machine, looks, wishes, num_queued, token, layer, at, until, luck, demands
            )
        clock = until
    for wish in range(num_wishes):
        wishes.at[wishes.expert[wish]] = -1
    return clock


@compiled
def _arrive(
    cache: Cache,
    machine: Machine,
    wishes: Wishes,
    num_wishes: int,
    layer: int,
    ids: Integers,
    luck: Floats,
    keeps: float,
) -> tuple[float, int]:
    """Settle what was wished for this layer: what is left to copy, for how many."""
    rest, late = 0.0, 0
    for wish in range(num_wishes):
        if wishes.target[wish] != layer:
            continue
        if wishes.is_started[wish]:
            is_right = _is_among(wishes.expert[wish], ids)
            luck[EXPECTED] = luck[EXPECTED] * keeps + wishes.probability[wish]
            luck[RIGHT] = luck[RIGHT] * keeps + is_right
            victim = wishes.victim[wish]
            if victim != EMPTY:
                luck[FEARED] = luck[FEARED] * keeps + wishes.fear[wish]
                luck[MISSED] = luck[MISSED] * keeps + _is_among(victim, ids)
            if wishes.left[wish] and is_right:
                rest += wishes.left[wish] / machine.pieces
                late += 1
            elif wishes.left[wish]:
                release(cache, wishes.expert[wish])
        wishes.left[wish] = 0  # nothing of it is sent any more
    return rest, late


@compiled
def _look(
    cache: Cache,
    machine: Machine,
    looks: Looks,
    wishes: Wishes,
    token: int,
    source: int,
    num_wishes: int,
    num_queued: int,
) -> tuple[int, int]:
    """Wish for predictions that are absent; a later look at one replaces an earlier."""
    horizon, _, layers, _ = looks.expert_ids.shape
    for ahead in range(min(horizon, layers - 1 - source), 0, -1):
        where = ahead - 1, token, source + ahead
        ids, chances = looks.expert_ids[where], looks.confidence[where]
        for i in range(len(ids)):
            expert, now = ids[i], float(chances[i])
            if expert < 0 or now <= looks.least or abs(now - looks.said[expert]) <= NEWS:
                continue
            looks.said[expert] = now
            if cache.slot_of[expert] != EMPTY:
                continue
            wish = wishes.at[expert]
            if wish < 0:
                wish = num_wishes
                wishes.at[expert] = wish
                wishes.expert[wish] = expert
                wishes.target[wish] = source + ahead
                wishes.left[wish] = machine.pieces
                wishes.is_started[wish] = False
                wishes.victim[wish] = EMPTY
                wishes.queue[num_queued] = wish
                num_wishes += 1
                num_queued += 1
            wishes.probability[wish] = now
    return num_wishes, num_queued


@compiled
def _sort_queue(wishes: Wishes, num_queued: int) -> int:
    """Drop finished wishes and put the likeliest first, others in their order; returns how many."""
    queue, count = wishes.queue, 0
    for i in range(num_queued):
        wish = queue[i]
        if not wishes.left[wish]:
            continue
        at = count
        while at > 0 and wishes.probability[queue[at - 1]] < wishes.probability[wish]:
            queue[at] = queue[at - 1]
            at -= 1
        queue[at] = wish
        count += 1
    return count


@compiled
def _fill_link(
    cache: Cache,
    machine: Machine,
    looks: Looks,
    wishes: Wishes,
    num_queued: int,
    token: int,
    layer: int,
    at: float,
    until: float,
    luck: Floats,
    demands: Floats,
) -> tuple[int, float]:
    """Send pieces, the likeliest experts' first, until the next layer's routing is known.

    Returns:
        Wishes in the queue, and when the link is free.
    """
    num_queued = _sort_queue(wishes, num_queued)
    trust = min(1.0, luck[RIGHT] / luck[EXPECTED])
    has_sent = False
    for i in range(num_queued):
        wish = wishes.queue[i]
        room = int((until - at) / machine.piece_ms + 1e-9)
        hidden = until - at
        if room < 1:
            chance, overhang = wishes.probability[wish] * trust, machine.piece_ms - hidden
            if hidden <= 0 or not may_overhang(chance, hidden, overhang, demands[layer + 1]):
                break
        count = min(wishes.left[wish], max(room, 1))
        if not wishes.is_started[wish]:
            layers_left = wishes.target[wish] - layer - 1
            spare = int(layers_left * machine.layer_ms / machine.piece_ms)
            fits = min(wishes.left[wish], count + spare)
            if not _begin(cache, machine, looks, wishes, wish, token, fits, luck):
                continue
        wishes.left[wish] -= count
        at += count * machine.piece_ms
        has_sent = True
        cache.counts[PREFETCHED] += count / machine.pieces
        cache.unused[wishes.expert[wish]] += count / machine.pieces
        if at >= until:
            break
    return num_queued, at if has_sent else 0.0


@compiled
def _begin(
    cache: Cache,
    machine: Machine,
    looks: Looks,
    wishes: Wishes,
    wish: int,
    token: int,
    fits: int,
    luck: Floats,
) -> bool:
    """Take a slot for an expert if the rule says it pays."""
    layer, expert = wishes.target[wish], wishes.expert[wish]
    slot = find_victim(cache, layer, looks.expert_ids[0, token, layer])
    if slot < 0:
        return False
    victim = cache.expert_in[slot]
    if victim != EMPTY:
        if wishes.at[victim] >= 0:
            return False
        probability = wishes.probability[wish] * min(1.0, luck[RIGHT] / luck[EXPECTED])
        habit = frequency(cache, layer, victim)
        feared = habit * looks.missed_mass[token, layer]
        # a wrong guess keeps the victim away for about one token more
        cost = luck[MISSED] / luck[FEARED] * (feared + (1 - probability) * habit)
        saved_ms = fits * machine.piece_ms
        if not is_worth(probability, saved_ms, min(1.0, cost), machine.demand_ms[1]):
            return False
        wishes.victim[wish], wishes.fear[wish] = victim, feared
    admit(cache, slot, expert)
    cache.unused[expert] = 0.0
    wishes.is_started[wish] = True
    return True

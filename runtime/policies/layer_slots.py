"""Shares cache slots between layers: all alike, or more for layers that miss more."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from foreroute.runtime.policies.eviction import EvictionPolicy
from foreroute.runtime.policies.layer_state import LayerState

CURVE_POINTS = 12
BOLDNESS = 0.5
"""How far slots follow the misses of a recording: prompts are short, and mislead."""


def equal_slots(num_layers: int, slots_per_layer: int) -> list[int]:
    """The same for every layer."""
    return [slots_per_layer] * num_layers


def miss_curve(
    route: Sequence[Sequence[int]], policy: EvictionPolicy, *, num_experts: int, top_k: int
) -> list[float]:
    """How often one layer misses with each number of slots.

    Args:
        route: Per token the experts it used in this layer.
        policy: How it evicts.
        num_experts: E.
        top_k: K, the fewest slots.

    Returns:
        Misses with top_k, top_k + 1, ... num_experts slots; simulated at some, between them
        interpolated.
    """
    step = max(1, (num_experts - top_k) // CURVE_POINTS)
    sizes = sorted({*range(top_k, num_experts, step), num_experts})
    misses = []
    for num_slots in sizes:
        state = LayerState(policy, num_experts, num_slots)
        misses.append(sum(len(state.demand(ids)) for ids in route))
    return [_between(sizes, misses, slots) for slots in range(top_k, num_experts + 1)]


def share_slots(
    curves: Sequence[Sequence[float]], total: int, *, fewest: int, boldness: float = 1.0
) -> list[int]:
    """Give each slot to the layer whose misses it lowers most.

    Args:
        curves: Per layer the misses with fewest, fewest + 1, ... slots.
        total: Slots of all layers together.
        fewest: Slots that every layer gets.
        boldness: 1 follows the curves, 0 gives all layers the same; between, part of the way
            (short recordings mislead).

    Returns:
        Slots per layer, `total` together.

    Raises:
        ValueError: If the slots do not suffice, or are more than the curves know.
    """
    layers = len(curves)
    most = [fewest + len(curve) - 1 for curve in curves]
    if not layers * fewest <= total <= sum(most):
        raise ValueError(
            f"{total} slots cannot be shared by {layers} layers of {fewest} to {max(most)} slots."
        )
    gains: list[tuple[float, int]] = []
    for layer, curve in enumerate(curves):
        gains += [(gain, layer) for gain in _falling_gains(curve)]
    gains.sort(key=lambda entry: -entry[0])
    followed = [fewest] * layers
    for _, layer in gains[: total - layers * fewest]:
        followed[layer] += 1
    return _mixed(followed, total / layers, boldness, total, [fewest] * layers, most)


def slots_by_misses(
    past: Sequence[Sequence[Sequence[int]]],
    policy: EvictionPolicy,
    *,
    slots_per_layer: int,
    num_experts: int,
    top_k: int,
) -> list[int]:
    """More slots for layers that missed more in a recording.

    Args:
        past: [T][L], the experts of each token and layer.
        policy: How it evicts.
        slots_per_layer: What every layer would get if all got the same.
        num_experts: E.
        top_k: K, the fewest slots.

    Returns:
        Slots per layer, as many together.
    """
    num_layers = len(past[0])
    curves = [
        miss_curve([token[layer] for token in past], policy, num_experts=num_experts, top_k=top_k)
        for layer in range(num_layers)
    ]
    return share_slots(curves, slots_per_layer * num_layers, fewest=top_k, boldness=BOLDNESS)


def _falling_gains(curve: Sequence[float]) -> list[float]:
    """Misses saved by each further slot, spread so that no later one saves more."""
    gains: list[float] = []
    at = 0
    while at < len(curve) - 1:
        slopes = [(curve[at] - curve[to]) / (to - at) for to in range(at + 1, len(curve))]
        best = max(range(len(slopes)), key=lambda i: (slopes[i], i))
        gains += [slopes[best]] * (best + 1)
        at += best + 1
    return gains


def _mixed(
    followed: Sequence[int],
    equal: float,
    boldness: float,
    total: int,
    fewest: Sequence[int],
    most: Sequence[int],
) -> list[int]:
    """Between equal and followed, rounded so that the total stays."""
    wished = [
        min(max(equal + boldness * (slots - equal), low), high)
        for slots, low, high in zip(followed, fewest, most, strict=True)
    ]
    slots = [int(wish) for wish in wished]
    while sum(slots) != total:
        sign = 1 if sum(slots) < total else -1
        room = [
            layer
            for layer in range(len(slots))
            if (slots[layer] < most[layer] if sign > 0 else slots[layer] > fewest[layer])
        ]
        layer = max(room, key=lambda at: sign * (wished[at] - slots[at]))
        slots[layer] += sign
    return slots


def _between(sizes: Sequence[int], misses: Sequence[float], slots: int) -> float:
    at = bisect_right(sizes, slots) - 1
    if at == len(sizes) - 1:
        return float(misses[at])
    share = (slots - sizes[at]) / (sizes[at + 1] - sizes[at])
    return misses[at] + share * (misses[at + 1] - misses[at])

"""Rules on a miss, replayed: `on_miss.decide` over arrays, on the routing that was recorded.

What a rule changes in the routing of later layers and tokens is not replayed: a recording has none
of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreroute.data.routes import Scores
from foreroute.runtime.on_miss import MissRule
from foreroute.runtime.on_miss.budget import Allowance
from foreroute.runtime.simulator import timeline
from foreroute.runtime.simulator.compiled import compiled
from foreroute.runtime.simulator.timeline import Cache, Flags, Floats, Integers, Machine

LEFT_OUT = -1
Ranks = NDArray[np.float32]


@compiled
def run_ids(
    chosen: Integers,
    ranking: Ranks,
    scores: Ranks,
    here: Flags,
    bonus: float,
    share: float,
    mass: float,
    allowance: int,
    is_leaving: bool,
    is_replacing: bool,
) -> Integers:
    """What runs in the place of one token's choice in one layer.

    Args:
        chosen: The router's experts, [K].
        ranking: What experts are chosen by, [E].
        scores: What gate weights are in proportion to, [E].
        here: Which experts are resident, [E].
        bonus: Share of the range of the ranking that residents get on top; 0 for none.
        share: Of the token's weights, below which an expert may go; 0 for no such limit.
        mass: Of the token's weights, that may go together; 0 for no such limit.
        allowance: Experts that are fetched before any may go; 0 where there is no budget.
        is_leaving: Whether absent experts may go at all.
        is_replacing: Whether residents take their place.

    Returns:
        [K], `LEFT_OUT` where nothing runs.
    """
    size, count = len(chosen), len(ranking)
    is_chosen = np.zeros(count, dtype=np.bool_)
    for expert in chosen:
        is_chosen[expert] = True
    wanted = chosen.copy()
    if bonus > 0:
        spread = ranking.max() - ranking.min()
        raised = np.full(count, -np.inf)
        for expert in range(count):
            if is_chosen[expert] or here[expert]:
                raised[expert] = ranking[expert] + bonus * spread * here[expert]
        num_new = 0
        for place in range(size):
            pick = np.argmax(raised)
            raised[pick] = -np.inf
            num_new += not is_chosen[pick]
            wanted[place] = pick
        if num_new == 0:
            wanted[:] = chosen
    run = wanted.copy()
    if not is_leaving:
        return run
    shares = np.empty(size)
    for place in range(size):
        shares[place] = scores[wanted[place]]
    shares /= shares.sum()
    rank = np.zeros(size, dtype=np.int64)  # heaviest first; of equal ones the earlier place
    for place in range(size):
        for other in range(size):
            is_tie = shares[other] == shares[place] and other < place
            rank[place] += shares[other] > shares[place] or is_tie
    left = np.zeros(size, dtype=np.bool_)
    num_absent, together = 0, 0.0
    for place in range(size):
        at = np.argmax(rank == place)
        if not here[wanted[at]]:
            is_light = share <= 0 or shares[at] < share
            left[at] = num_absent >= allowance and is_light
            num_absent += 1
    first = np.argmax(rank == 0)
    if share > 0 or mass > 0:
        left[first] = False  # the heaviest is waited for
    elif not is_replacing and num_absent == size:
        left[first] = False  # a token of which none is there waits for one
    if mass > 0:
        for place in range(size - 1, -1, -1):
            at = np.argmax(rank == place)
            if left[at]:
                together += shares[at]
                left[at] = together <= mass
    free = np.full(count, -np.inf)
    for expert in range(count):
        if here[expert]:
            free[expert] = ranking[expert]
    for expert in wanted:
        free[expert] = -np.inf
    for place in range(size):
        at = np.argmax(rank == place)
        if left[at] and is_replacing:
            best = np.argmax(free)
            if free[best] > -np.inf:
                run[at] = best
                free[best] = -np.inf
        elif left[at]:
            run[at] = LEFT_OUT
    return run


@dataclass(kw_only=True)
class RuledSteps:
    """Replays decode steps on demand under a rule."""

    rule: MissRule
    scores: Scores
    allowance: Allowance | None
    """What a token may copy; only under a rule with a budget."""

    def __post_init__(self) -> None:
        """Refuse what is not replayed.

        Raises:
            ValueError: If the rule runs predictions, or copies what nobody waits for.
        """
        rule = self.rule
        if rule.predicted or rule.waits_for_none or rule.is_later:
            raise ValueError(
                f"on_miss={rule.text} is not simulated: predicted experts, and copies that nobody "
                "waits for, are an engine's alone."
            )

    def run(
        self, cache: Cache, machine: Machine, rows: Integers, next_use: Floats, token: int
    ) -> float:
        """One decode step with nothing fetched early; its time in ms.

        Args:
            cache: Slots.
            machine: Times.
            rows: The token's experts, numbered through the layers, [L, K].
            next_use: [L, K]; read by policies that know the future.
            token: Its place in the recording.
        """
        stall, size = 0.0, self.scores.ranking.shape[-1]
        if self.allowance is not None:
            self.allowance.begin_step()
        for layer in range(len(rows)):
            run = self._run_ids(cache, rows[layer] - layer * size, token, layer)
            run = np.where(run >= 0, run + layer * size, LEFT_OUT)
            missing = timeline.demand_ruled(cache, layer, run, rows[layer], next_use[layer])
            if self.allowance is not None:
                self.allowance.spent += missing
            stall += float(machine.demand_ms[missing])
        cache.counts[timeline.STALL_MS] += stall
        return stall + machine.layer_ms * len(rows)

    def _run_ids(self, cache: Cache, chosen: Integers, token: int, layer: int) -> Integers:
        rule, size = self.rule, self.scores.ranking.shape[-1]
        found: Integers = run_ids(
            chosen,
            self.scores.ranking[token, layer],
            self.scores.scores[token, layer],
            cache.slot_of[layer * size : (layer + 1) * size] >= 0,
            rule.bonus,
            (rule.share or 0.0) / len(chosen),
            rule.mass or 0.0,
            0 if self.allowance is None else self.allowance.at(layer, 1),
            rule.is_leaving,
            rule.is_replacing,
        )
        return found

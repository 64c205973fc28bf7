"""One scenario in, one row out; and the bounds that no scenario passes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from foreroute.data.routes import Route, Scores
from foreroute.runtime.config import LayerSlots
from foreroute.runtime.on_miss import find_rule
from foreroute.runtime.on_miss.budget import Allowance
from foreroute.runtime.policies import (
    EvictionPolicy,
    PrefetchRule,
    equal_slots,
    find_policy,
    find_prefetch_rule,
    slots_by_misses,
)
from foreroute.runtime.policies.slots import parse_slots
from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.misses import RuledSteps
from foreroute.runtime.simulator.predictions import Predictions
from foreroute.runtime.simulator.replay import Replay
from foreroute.runtime.simulator.result import SimulationRow


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is run how on which machine."""

    route: Route
    times: LinkTimes
    expert_bytes: int
    predictions: Predictions | None = None
    """Needed by every prefetch but `none`."""
    warms_up: bool = True
    """Whether prompts fill the slots."""
    warm_route: Route | None = None
    """Counted before, to fill the slots."""
    scores: Scores | None = None
    """How the routers ranked all experts; needed by every rule on a miss but `fetch`."""
    layer_slots: LayerSlots = "equal"
    """`by-misses`: layers that missed more in the warm route, or in the prompt, get more."""

    def slots_of(self, slots: str, policy: EvictionPolicy) -> list[int]:
        """Slots per layer.

        Args:
            slots: A number per layer, or a share such as 25%.
            policy: What misses are counted under.

        Raises:
            ValueError: If they do not fit the route.
        """
        route = self.route
        each = parse_slots(slots, num_experts=route.num_experts, top_k=route.top_k)
        if self.layer_slots == "equal":
            return equal_slots(route.num_layers, each)
        seen = self.warm_route
        past = seen.rows() if seen else _prompt_rows(route)
        return slots_by_misses(
            past,
            policy,
            slots_per_layer=each,
            num_experts=route.num_experts,
            top_k=route.top_k,
        )


def simulate(
    scenario: Scenario,
    *,
    eviction: str,
    prefetch: str = "none",
    horizon: int = 1,
    slots: str = "25%",
    on_miss: str = "fetch",
) -> SimulationRow:
    """Replay a scenario.

    Args:
        scenario: What runs where.
        eviction: As `find_policy` takes it.
        prefetch: `none`, `all`, `head` or `pieces`.
        horizon: Layers ahead.
        slots: Per layer, a number or a share.
        on_miss: As `find_rule` takes it.

    Raises:
        ValueError: If a name is unknown, or predictions or scores are missing.
    """
    rule = find_policy(eviction)
    ahead = find_prefetch_rule(prefetch, horizon)
    per_layer = scenario.slots_of(slots, rule)
    ruled = _ruled_steps(scenario, ahead, on_miss)
    if ruled is not None and rule.needs_future:
        raise ValueError(
            f"Policy {eviction} is a bound of exact runs; use --on-miss fetch with it."
        )
    replay = _replay(scenario, rule, ahead, per_layer, ruled)
    if scenario.warm_route is not None:
        replay.warm_from(scenario.warm_route)
    counts = replay.run(warms_up=scenario.warms_up)
    return SimulationRow.of(
        counts,
        eviction=rule.name,
        prefetch=ahead.kind,
        horizon=0 if ahead.kind == "none" else horizon,
        slots=sum(per_layer) / len(per_layer),
        num_experts=scenario.route.num_experts,
        expert_bytes=scenario.expert_bytes,
        on_miss=on_miss,
        is_bound=rule.needs_future,
    )


def bounds(scenario: Scenario, slots: str) -> list[SimulationRow]:
    """What no engine passes: Belady's evictions on demand, and a link that takes no time."""
    belady = simulate(scenario, eviction="belady", slots=slots)
    free = dataclasses.replace(
        scenario.times, demand_ms=tuple(0.0 for _ in scenario.times.demand_ms), piece_ms=0.0
    )
    infinite = simulate(dataclasses.replace(scenario, times=free), eviction="default", slots=slots)
    return [belady, dataclasses.replace(infinite, eviction="infinite-link", is_bound=True)]


def _replay(
    scenario: Scenario,
    policy: EvictionPolicy,
    rule: PrefetchRule,
    slots: list[int],
    ruled: RuledSteps | None,
) -> Replay:
    common = (scenario.route, scenario.times, policy, slots)
    if rule.kind == "none":
        return Replay(*common, ruled=ruled)
    if policy.needs_future:
        raise ValueError(f"Policy {policy.name} is a bound on demand; use --prefetch none with it.")
    predictions = scenario.predictions
    if predictions is None or predictions.horizon < rule.horizon:
        have = predictions.horizon if predictions else 0
        raise ValueError(
            f"prefetch {rule.kind} at horizon {rule.horizon} needs predictions so far ahead; "
            f"there are {have} layers of them."
        )
    return Replay(*common, rule, predictions)


def _ruled_steps(scenario: Scenario, ahead: PrefetchRule, on_miss: str) -> RuledSteps | None:
    """What replays steps under a rule on a miss; None under the exact one."""
    rule, size = find_rule(on_miss), scenario.expert_bytes
    if rule.is_exact:
        return None
    if ahead.kind != "none":
        raise ValueError(f"on_miss={on_miss} is simulated on demand: use --prefetch none with it.")
    if scenario.scores is None:
        raise ValueError(
            f"on_miss={on_miss} reads how routers ranked all experts: --routes must be traces of a "
            "model whose gate rule is known."
        )
    allowance = None
    if rule.has_budget:
        per_token = rule.budget_experts(size, scenario.times.demand_ms[1])
        allowance = Allowance(per_token, scenario.route.num_layers)
    return RuledSteps(rule=rule, scores=scenario.scores, allowance=allowance)


def _prompt_rows(route: Route) -> list[list[tuple[int, ...]]]:
    rows = [
        row for row, is_decode in zip(route.rows(), route.is_decode, strict=True) if not is_decode
    ]
    if not rows:
        raise ValueError(
            "Sharing slots by misses needs a prompt in the route, or another route to warm from."
        )
    return rows

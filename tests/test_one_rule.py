"""One rule stands in Python, in Triton and in numba; here each two of them decide alike."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("numba", reason="needs numba")

from foreroute.data.routes import Route, Scores
from foreroute.estimators.selection import router_scores
from foreroute.estimators.types import GateFamily
from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.behind import plan_behind_reference
from foreroute.runtime.device.kernels.head import plan_head_reference
from foreroute.runtime.device.kernels.miss import BEHIND, NUM_JUDGED
from foreroute.runtime.device.kernels.plan import plan_reference
from foreroute.runtime.device.kernels.tables import (
    HITS,
    MISSES,
    TAILS,
    WASTED_HEADS,
    ResidencyTables,
)
from foreroute.runtime.device.residency import DeviceResidency
from foreroute.runtime.host.ledger import HostLedger
from foreroute.runtime.host.residency import HostResidency
from foreroute.runtime.host.slot_cache import EMPTY, SlotCache
from foreroute.runtime.host.transfers import ImmediateTransfers
from foreroute.runtime.on_miss import find_rule
from foreroute.runtime.on_miss.budget import Allowance
from foreroute.runtime.on_miss.choice import Gates, RouterChoice
from foreroute.runtime.on_miss.decide import decide
from foreroute.runtime.policies import Duel, LayerState, find_policy, find_prefetch_rule
from foreroute.runtime.policies.duel import LEAST_LEAD
from foreroute.runtime.simulator import timeline
from foreroute.runtime.simulator.link import LinkTimes
from foreroute.runtime.simulator.misses import RuledSteps
from foreroute.runtime.simulator.predictions import SimulatedPredictor
from foreroute.runtime.simulator.replay import Replay
from foreroute.runtime.stats import PhaseStats
from foreroute.runtime.store.host_store import HostExpertStore

EXPERTS, SLOTS, TOP_K, LAYERS, TOKENS = 16, 6, 3, 3, 120
HEAD_SHARE = 0.5


def random_route(*, is_prompt: bool = False) -> Route:
    """Tokens that like the first experts best, and drift."""
    dice, rows = random.Random(0), []
    for token in range(TOKENS):
        layers = []
        for layer in range(LAYERS):
            ids: dict[int, None] = {}
            while len(ids) < TOP_K:
                near = min(int(dice.expovariate(0.25)), EXPERTS - 1)
                ids[(near + token // 40 + 5 * layer) % EXPERTS] = None
            layers.append(list(ids))
        rows.append(layers)
    return Route(
        name="random",
        expert_ids=np.array(rows, dtype=np.int16),
        is_decode=np.array([not is_prompt] * (TOKENS - 1) + [True]),
        num_experts=EXPERTS,
    )


@pytest.mark.parametrize("policy", ["lfu", "lrfu:20", "default"])
def test_simulator_and_kernel_choose_the_same_heads(policy: str) -> None:
    route, prefetch = random_route(), find_prefetch_rule("head")
    predictions = SimulatedPredictor(recall=0.7, seed=1).predict(route, 1)
    times = LinkTimes(
        layer_ms=1.0,
        token_ms=0.0,
        predict_ms=0.0,
        demand_ms=(0.0, 1.0 / HEAD_SHARE, 4.0, 6.0),
        pieces=8,
        piece_ms=0.25,
    )
    assert times.head_share == HEAD_SHARE
    rule = find_policy(policy)
    replay = Replay(route, times, rule, [SLOTS] * LAYERS, prefetch, predictions)
    replay.run()
    trust = torch.full((2,), 20.0)
    tables = [ResidencyTables.empty(EXPERTS, SLOTS, "cpu", trust=trust) for _ in range(LAYERS)]
    ids, said = map(torch.from_numpy, (predictions.expert_ids[0], predictions.confidence[0]))
    copies, head = torch.zeros(3, TOP_K, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.int32)
    for token in range(TOKENS):
        for layer in range(LAYERS):
            used = torch.from_numpy(route.expert_ids[token, layer])
            plan_reference(used, tables[layer], rule.device_rule(), copies)
            if layer + 1 < LAYERS:
                plan_head_reference(
                    ids[token, layer + 1],
                    said[token, layer + 1],
                    tables[layer + 1],
                    head,
                    num_needed=TOP_K,
                    head_words=torch.tensor([50]),
                    num_words=100,
                )
    held = torch.cat([table.expert_in for table in tables]).long()
    numbered = held + torch.arange(LAYERS).repeat_interleave(SLOTS) * EXPERTS
    assert replay.cache.expert_in.tolist() == numbered.tolist()
    counters = torch.stack([table.counters for table in tables]).sum(0).tolist()
    counts = replay.cache.counts
    assert counts[timeline.HITS] == counters[HITS]
    assert counts[timeline.LATE] == counters[TAILS] > 20
    fetched = counters[MISSES] + HEAD_SHARE * counters[TAILS]
    assert counts[timeline.FETCHED] == fetched
    assert counts[timeline.WASTED] == HEAD_SHARE * counters[WASTED_HEADS] > 0


def tiny_experts() -> nn.Module:
    experts = nn.Module()
    experts.register_parameter("gate_up_proj", nn.Parameter(torch.zeros(EXPERTS, 4, 2)))
    return experts


def device_residency(policy: str, lead: torch.Tensor | None = None) -> DeviceResidency:
    """One layer's tables as a GPU's driver has them, on the CPU."""
    store = HostExpertStore([tiny_experts()], is_pinned=False)
    rule = find_policy(policy)
    run: Any = SimpleNamespace(
        rule=rule.device_rule(),
        form=ExpertForm(activation="silu"),
        trust=None,
        prompt_weight=rule.prompt_weight,
        lead=lead,
        staging=None,
    )
    layer: Any = SimpleNamespace(layer_idx=0, top_k=TOP_K)
    counters = torch.zeros(7, dtype=torch.int32)
    return DeviceResidency(
        layer, store.rows[0], store.layouts[0], SLOTS, run, counters, has_shadows=True
    )


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu:20", "default", "adaptive"])
def test_a_prompt_counts_the_same_on_the_host_on_the_device_and_in_the_simulator(
    policy: str,
) -> None:
    route, rule = random_route(is_prompt=True), find_policy(policy)
    prompt = route.expert_ids[:-1, 0]  # [T, K] of the first layer
    host = LayerState(rule, EXPERTS, SLOTS)
    host.count_prompt(prompt.tolist())
    lead = torch.zeros(1, dtype=torch.int32) if policy == "adaptive" else None
    device = device_residency(policy, lead)
    device.count_prompt(torch.from_numpy(prompt))
    times = LinkTimes(
        layer_ms=1.0, token_ms=0.0, predict_ms=0.0, demand_ms=(0.0,) * 4, pieces=1, piece_ms=0.0
    )
    replay = Replay(route, times, rule, [SLOTS] * LAYERS)
    replay.warm_from(
        Route(
            **{
                **vars(route),
                "expert_ids": route.expert_ids[:-1],
                "is_decode": np.ones(TOKENS - 1, dtype=bool),
            }
        )
    )
    unit = 1.0 if rule.worth == "recency" else host.unit
    expected = torch.tensor(host.worth) / unit
    torch.testing.assert_close(device.tables.score, expected)
    simulated = torch.from_numpy(replay.cache.worth[:EXPERTS]) / unit
    torch.testing.assert_close(simulated.float(), expected)
    if rule.worth in ("recency", "adaptive"):  # the next use is later than all of the prompt's
        assert int(device.tables.step) == host.step == len(prompt)
    if rule.worth == "adaptive":
        assert device.tables.rivals is not None
        assert device.tables.rivals[1].tolist() == host.used_at
        assert replay.cache.used_at[:EXPERTS].tolist() == host.used_at
        assert_shadows_agree(host, device, replay.cache.shadows[:, :EXPERTS])


@pytest.mark.parametrize("policy", ["lfu", "lrfu:20", "adaptive"])
@pytest.mark.parametrize("only_likely", [False, True])
def test_host_and_kernel_fetch_the_same_behind_a_layer(policy: str, only_likely: bool) -> None:
    dice, chosen_ids = random.Random(1), random_route().expert_ids[:, 0]
    lead = torch.zeros(1, dtype=torch.int32) if policy == "adaptive" else None
    device = device_residency(policy, lead)
    run: Any = SimpleNamespace(
        phase=PhaseStats(), is_prefill=False, transfers=ImmediateTransfers(), ledger=HostLedger()
    )
    cpu, rule = torch.device("cpu"), find_policy(policy)
    layout = HostExpertStore([tiny_experts()], is_pinned=False).layouts[0]
    host = HostResidency(device.rows, SlotCache(EXPERTS, SLOTS, layout, cpu, rule), run)
    judged, num_behind = torch.zeros(NUM_JUDGED, dtype=torch.int32), 0
    copies = torch.zeros(3, TOP_K, dtype=torch.int32)
    for token in chosen_ids:
        chosen, here = token.tolist(), host.cache.state.here
        others = [e for e in range(EXPERTS) if here[e] and e not in chosen]
        ran = [e if here[e] or not others else dice.choice(others) for e in chosen]
        needed = list(dict.fromkeys(ran))
        host.fetch(needed, chosen)
        absent = [e for e in chosen if host.cache.slot_of(e) == EMPTY]
        host.fetch_behind(absent, kept=[*chosen, *ran], only_likely=only_likely)
        ids, run_ids = torch.tensor([chosen]), torch.tensor([ran])
        plan_reference(run_ids, device.tables, device.rule, copies, credited=ids)
        plan_behind_reference(ids, run_ids, device.tables, judged, copies, only_likely=only_likely)
        assert device.tables.slot_of.tolist() == [host.cache.slot_of(e) for e in range(EXPERTS)]
        num_behind += len(absent)
    assert 0 < int(judged[BEHIND]) <= num_behind
    assert (int(judged[BEHIND]) < num_behind) == only_likely
    misses = run.phase.misses + int(judged[BEHIND])
    assert run.phase.fetched_bytes == misses * host.expert_bytes


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "skip:0.9",
        "substitute:0.9",
        "threshold:0.3",
        "substitute:1.2+threshold:0.4",
        "bonus:0.2",
        "bonus:0.1+substitute:0.7",
        "budget:2",
        "substitute+budget:2",
    ],
)
def test_simulator_and_host_decide_alike_on_misses(text: str, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(TOKENS, 1, EXPERTS, generator=generator)
    gates = Gates(
        family=GateFamily.SIGMOID if has_bias else GateFamily.SOFTMAX,
        selection_bias=torch.linspace(-0.3, 0.3, EXPERTS) if has_bias else None,
    )
    ranking, ids = gates.ranking(logits), gates.ranking(logits).topk(TOP_K).indices
    scores = router_scores(logits, gates.family)
    route = Route(
        name="random",
        expert_ids=ids.numpy().astype(np.int16),
        is_decode=np.ones(TOKENS, dtype=bool),
        num_experts=EXPERTS,
    )
    times = LinkTimes(
        layer_ms=1.0, token_ms=0.0, predict_ms=0.0, demand_ms=(0.0,) * 4, pieces=1, piece_ms=0.0
    )
    rule, policy = find_rule(text), find_policy("lrfu:20")
    allowance = Allowance(rule.budget_experts(1, 1.0), 1) if rule.has_budget else None
    seen = Scores(ranking=ranking.numpy(), scores=scores.numpy())
    ruled = RuledSteps(rule=rule, scores=seen, allowance=allowance)
    replay = Replay(route, times, policy, [SLOTS], ruled=ruled)
    replay.run()
    state, agreed, fetched = LayerState(policy, EXPERTS, SLOTS), 0, 0
    for t in range(TOKENS):
        choice = RouterChoice(
            expert_ids=ids[t],
            gate_weights=gates.weights(logits[t], ids[t]),
            gates=gates,
            router_logits=logits[t],
        )
        allowed = int(rule.budget_experts(1, 1.0))
        ruling = decide(rule, choice, torch.tensor(state.here), allowed)
        run = ruling.expert_ids[ruling.is_run].tolist()
        missing = [expert for expert in run if not state.here[expert]]
        for expert in missing:
            state.admit(expert, run)
        state.use(ids[t, 0].tolist())
        fetched += len(missing)
        agreed += len(set(run) & set(ids[t, 0].tolist()))
    counts = replay.cache.counts
    assert replay.cache.expert_in.tolist() == state.expert_in
    assert counts[timeline.FETCHED] == fetched > 0
    assert counts[timeline.AGREED] == agreed
    assert counts[timeline.CHOSEN] == TOKENS * TOP_K > agreed


def route_of_two_kinds() -> Route:
    """A prompt, then tokens that use again what was used last, then tokens that like some best."""
    dice, tokens = random.Random(0), 400
    orders = [list(range(EXPERTS)) for _ in range(LAYERS)]
    rows = []
    for token in range(tokens):
        layers = []
        for order in orders:
            ids: dict[int, None] = {}
            while len(ids) < TOP_K:
                ids[order[min(int(dice.expovariate(0.3)), EXPERTS - 1)]] = None
            if token < tokens // 2:
                order.sort(key=lambda expert, ids=ids: expert not in ids)  # type: ignore[misc]
            layers.append(list(ids))
        rows.append(layers)
    return Route(
        name="two kinds",
        expert_ids=np.array(rows, dtype=np.int16),
        is_decode=np.arange(tokens) >= 20,
        num_experts=EXPERTS,
    )


def assert_shadows_agree(host: LayerState, device: DeviceResidency, simulated: Any) -> None:
    shadows, there = host._shadows, device.tables.shadows
    assert shadows is not None
    assert there is not None
    expected = [sorted(shadow.experts) for shadow in shadows]
    assert [row.nonzero().flatten().tolist() for row in there] == expected
    assert [np.flatnonzero(row).tolist() for row in simulated] == expected


def test_host_device_and_simulator_adapt_alike() -> None:
    route, policy, duel = route_of_two_kinds(), find_policy("adaptive"), Duel()
    times = LinkTimes(
        layer_ms=1.0, token_ms=0.0, predict_ms=0.0, demand_ms=(0.0,) * 4, pieces=1, piece_ms=0.0
    )
    replay = Replay(route, times, policy, [SLOTS] * LAYERS)
    replay.run()
    host = [LayerState(policy, EXPERTS, SLOTS, duel) for _ in range(LAYERS)]
    lead = torch.zeros(1, dtype=torch.int32)
    device = [device_residency("adaptive", lead) for _ in range(LAYERS)]
    prompt = route.expert_ids[~route.is_decode].tolist()
    for layer, (state, residency) in enumerate(zip(host, device, strict=True)):
        state.warm([token[layer] for token in prompt])
        residency.warm([token[layer] for token in prompt], policy)
    leads, copies = [], torch.zeros(3, TOP_K, dtype=torch.int32)
    for token in route.expert_ids[route.is_decode].tolist():
        for state, residency, ids in zip(host, device, token, strict=True):
            plan_reference(torch.tensor(ids), residency.tables, residency.rule, copies)
            assert state.demand(ids) == [e for e in copies[0].tolist() if e >= 0]
        leads.append(duel.lead)
        assert int(lead) == duel.lead
    for layer, (state, residency) in enumerate(zip(host, device, strict=True)):
        assert residency.tables.expert_in.tolist() == state.expert_in
        own = slice(layer * EXPERTS, (layer + 1) * EXPERTS)
        assert_shadows_agree(state, residency, replay.cache.shadows[:, own])
    held = [layer * EXPERTS + expert for layer, s in enumerate(host) for expert in s.expert_in]
    assert replay.cache.expert_in.tolist() == held
    assert replay.cache.lead[0] == duel.lead
    assert max(leads) > LEAST_LEAD > 0 > min(leads)  # each rule led

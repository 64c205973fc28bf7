"""Rules on a miss inside the device's launches are those of the host; interpreted on a CPU."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from interpreted import InOrder, run_on_cpu, run_streams_in_order
from tiny_models import tiny_model

from foreroute.data.adapters.seam import routed_through
from foreroute.estimators.types import GateFamily
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.device import decode_graph
from foreroute.runtime.device.decode_graph import DecodeStep
from foreroute.runtime.device.driver import layer_rules, targets_of
from foreroute.runtime.device.kernels import demand as demand_module
from foreroute.runtime.device.kernels import linear as linear_module
from foreroute.runtime.device.kernels import plan as plan_module
from foreroute.runtime.device.kernels import route as route_module
from foreroute.runtime.device.kernels.behind import plan_behind, plan_behind_reference
from foreroute.runtime.device.kernels.miss import (
    AGREED,
    BEHIND,
    CHOSEN,
    IS_CLOSED,
    NUM_JUDGED,
    SPENT,
    LayerRule,
    RuledChoice,
)
from foreroute.runtime.device.kernels.plan import plan, plan_reference
from foreroute.runtime.device.kernels.tables import (
    MISSES,
    NUM_COUNTERS,
    PREFETCHES,
    ResidencyTables,
)
from foreroute.runtime.device.layer import DeviceLayer
from foreroute.runtime.device.predictor import DevicePredictor, Guess
from foreroute.runtime.device.residency import DeviceResidency
from foreroute.runtime.look_ahead import LookAhead
from foreroute.runtime.on_miss import find_rule
from foreroute.runtime.on_miss.agreement import WINDOW_LAYER_STEPS
from foreroute.runtime.on_miss.budget import Allowance
from foreroute.runtime.on_miss.choice import Gates, RouterChoice
from foreroute.runtime.on_miss.decide import decide
from foreroute.runtime.on_miss.predicted import predicted_choice
from foreroute.runtime.policies import find_policy
from foreroute.runtime.store.offload import offload

EXPERTS, TOP_K, SLOTS, STEPS = 13, 3, 8, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LRFU = find_policy("lrfu").device_rule()
RULES = (
    "skip:1.2",
    "threshold:0.4",
    "substitute:0.9",
    "substitute+threshold:0.4",
    "bonus:0.2",
    "bonus:0.15+substitute:0.7",
    "budget:1MB",
    "substitute+budget:1MB",
    "skip",
    "skip:1.2+later",
    "substitute:0.9+later",
    "predicted",
    "predicted:predicted-weights",
    "predicted:predicted-weights+substitute:0.9",
    "predicted+skip",
)


def layer_rule(text: str, gates: Gates, **changes: Any) -> LayerRule:
    judged = torch.zeros(NUM_JUDGED, dtype=torch.int32, device=DEVICE)
    settings: dict[str, Any] = {"floor": 0.0, "allowed": 1.3, "is_first": True, "judged": judged}
    return LayerRule(rule=find_rule(text), gates=gates, **(settings | changes))


def random_choice(gates: Gates, tokens: int, dtype: torch.dtype, seed: int) -> RouterChoice:
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(tokens, EXPERTS, generator=generator)).to(DEVICE, dtype)
    ids = gates.ranking(logits).topk(TOP_K).indices
    weights = gates.weights(logits, ids).to(dtype)
    return RouterChoice(expert_ids=ids, gate_weights=weights, gates=gates, router_logits=logits)


def random_guess(choice: RouterChoice, weights: Any, seed: int) -> tuple[RouterChoice, Tensor]:
    """A choice of predicted experts, and their ranking, one longer than the router's choice."""
    generator = torch.Generator().manual_seed(100 + seed)
    logits = choice.logits + torch.randn(choice.logits.shape, generator=generator).to(DEVICE)
    ranked = choice.gates.ranking(logits).topk(TOP_K + 1).indices
    return predicted_choice(choice, ranked, logits, weights), ranked


CASES = [
    *((text, GateFamily.SOFTMAX_RENORM, 1, False) for text in RULES),
    *(("bonus:0.15+substitute:0.7", family, 2, False) for family in GateFamily if family.scores),
    *((text, GateFamily.SIGMOID_RENORM, 2, True) for text in ("bonus:0.2", "substitute:0.9")),
    ("threshold:0.4", GateFamily.SOFTMAX, 2, False),
    ("threshold:0.4", GateFamily.OTHER, 1, False),
    ("substitute+budget:1MB", GateFamily.SOFTMAX, 2, False),
    ("skip", GateFamily.SOFTMAX, 2, False),
    ("substitute:0.9+later", GateFamily.SOFTMAX, 2, False),
    ("predicted+skip", GateFamily.SIGMOID_RENORM, 2, True),
    ("predicted+substitute:0.9", GateFamily.SIGMOID, 2, True),
]


@pytest.mark.parametrize(("text", "family", "tokens", "has_bias"), CASES)
def test_the_kernel_decides_as_the_reference(
    text: str, family: GateFamily, tokens: int, has_bias: bool
) -> None:
    bias = torch.linspace(-0.2, 0.2, EXPERTS, device=DEVICE) if has_bias else None
    gates = Gates(family=family, scale=1.5, selection_bias=bias)
    if family is GateFamily.OTHER:  # made as if softmax's; the rule must not ask
        made = random_choice(Gates(family=GateFamily.SOFTMAX), tokens, torch.float32, 0)
    own, allowance = layer_rule(text, gates), Allowance(per_token=1.3, num_layers=1)
    both = [ResidencyTables.empty(EXPERTS, SLOTS, DEVICE) for _ in range(2)]
    agreed, num_left, judged = 0, 0, torch.zeros_like(own.judged)
    for step in range(STEPS):
        if family is not GateFamily.OTHER:
            made = random_choice(gates, tokens, torch.float32, step)
        choice = RouterChoice(**{**vars(made), "gates": gates})
        is_here = both[1].slot_of >= 0
        allowance.begin_step()
        asked, ranked = choice, None
        if own.rule.predicted:
            asked, ranked = random_guess(choice, own.rule.predicted, step)
        expected = decide(own.rule, asked, is_here, allowance.at(0, tokens))
        given = (asked.logits, choice.expert_ids, choice.gate_weights)
        ruled = RuledChoice.of(*given, ranked)
        copies = torch.zeros(2, 3, tokens * TOP_K, dtype=torch.int32, device=DEVICE)
        places = torch.zeros(2, 2, tokens * TOP_K, dtype=torch.int32, device=DEVICE)
        plan(ruled.expert_ids, both[0], LRFU, copies[0], places=places[0], ruling=(own, ruled))
        plan_reference(
            expected.expert_ids,
            both[1],
            LRFU,
            copies[1],
            places=places[1],
            credited=choice.expert_ids,
        )
        assert torch.equal(ruled.expert_ids, expected.expert_ids)
        torch.testing.assert_close(ruled.gate_weights, expected.gate_weights)
        assert torch.equal(places[0], places[1])
        if own.rule.fetches_behind:
            left = (choice.expert_ids, expected.expert_ids)
            likely = not own.rule.waits_for_none
            plan_behind(*left, both[0], own.judged, copies[0], only_likely=likely)
            plan_behind_reference(*left, both[1], judged, copies[1], only_likely=likely)
            assert torch.equal(*(made_now[:, made_now[0] >= 0] for made_now in copies))
        for name in ("slot_of", "expert_in", "counters", "score"):
            torch.testing.assert_close(getattr(both[0], name), getattr(both[1], name))
        for true, ids, is_run in zip(
            choice.expert_ids, expected.expert_ids, expected.is_run, strict=True
        ):
            agreed += len(set(true.tolist()) & set(ids[is_run].tolist()))
        absent = set(expected.expert_ids[~is_here[expected.expert_ids]].tolist())
        assert int(own.judged[SPENT]) == len(absent)
        num_left += int((expected.expert_ids != choice.expert_ids).sum())
    assert num_left > 0
    assert int(own.judged[BEHIND]) == int(judged[BEHIND])
    assert bool(judged[BEHIND]) == own.rule.fetches_behind
    assert own.judged[[AGREED, CHOSEN]].tolist() == [agreed, STEPS * tokens * TOP_K]


def test_weights_in_half_precision_are_rounded_once() -> None:
    gates = Gates(family=GateFamily.SOFTMAX_RENORM)
    own = layer_rule("substitute:0.9", gates)
    tables = ResidencyTables.empty(EXPERTS, SLOTS, DEVICE)
    tables.slot_of[:6] = torch.arange(6, device=DEVICE)
    tables.expert_in[:6] = torch.arange(6, device=DEVICE)
    choice = random_choice(gates, 1, torch.float16, 4)
    expected = decide(own.rule, choice, tables.slot_of >= 0)
    assert not torch.equal(expected.expert_ids, choice.expert_ids)
    ruled = RuledChoice.of(choice.logits, choice.expert_ids, choice.gate_weights)
    copies = torch.zeros(3, TOP_K, dtype=torch.int32, device=DEVICE)
    plan(ruled.expert_ids, tables, LRFU, copies, places=copies[:2].clone(), ruling=(own, ruled))
    assert torch.equal(ruled.expert_ids, expected.expert_ids)
    torch.testing.assert_close(ruled.gate_weights, expected.gate_weights, atol=1e-3, rtol=1e-3)


def test_the_device_goes_back_to_the_routers_choice_under_the_floor() -> None:
    gates = Gates(family=GateFamily.SOFTMAX)
    own = layer_rule("substitute:9", gates, floor=1.0)
    own.judged[4] = WINDOW_LAYER_STEPS - 1  # the window's last step comes
    tables = ResidencyTables.empty(EXPERTS, SLOTS, DEVICE)
    tables.slot_of[:6] = torch.arange(6, device=DEVICE)
    tables.expert_in[:6] = torch.arange(6, device=DEVICE)
    copies = torch.zeros(3, TOP_K, dtype=torch.int32, device=DEVICE)
    changed = []
    for step in range(3):
        choice = random_choice(gates, 1, torch.float32, step)
        ruled = RuledChoice.of(choice.logits, choice.expert_ids, choice.gate_weights)
        plan(ruled.expert_ids, tables, LRFU, copies, places=copies[:2].clone(), ruling=(own, ruled))
        changed.append(not torch.equal(ruled.expert_ids, choice.expert_ids))
    assert changed == [True, False, False]
    assert int(own.judged[IS_CLOSED]) == 1
    assert int(own.judged[CHOSEN]) == TOP_K


class RuledExperts:
    """A tiny model whose experts run by the device's kernels under a rule, from few slots."""

    def __init__(self, model: Any, config: EngineConfig, slots: int) -> None:
        self.offloaded = offload(model, device=torch.device("cpu"), model_name="tiny")
        store, moe = self.offloaded.store, self.offloaded.moe
        eviction = find_policy(config.eviction).device_rule()
        run = self.run = run_on_cpu(self.offloaded, config, eviction)
        counters = torch.zeros(len(moe.layers), NUM_COUNTERS, dtype=torch.int32)
        self.judged = torch.zeros(NUM_JUDGED, dtype=torch.int32)
        ahead = LookAhead.for_engine(self.offloaded, config, None)
        self.targets = targets_of(self.offloaded, ahead)
        if ahead is not None:
            run.predictor = DevicePredictor(ahead, torch.float32)
        rules = layer_rules(self.offloaded, config, self.judged, self.targets.values())
        self.layers = [
            DeviceLayer(
                DeviceResidency(layer, rows, layout, slots, run, own, rule),
                None,  # type: ignore[arg-type]
                run,
            )
            for layer, rows, layout, own, rule in zip(
                moe.layers, store.rows, store.layouts, counters, rules, strict=True
            )
        ]
        by_idx = {layer.layer_idx: layer for layer in self.layers}
        for source, target in self.targets.items():
            by_idx[source].target = by_idx[target]
        self.counters = counters

    @staticmethod
    def fill(residency: DeviceResidency) -> None:
        """The lowest experts in the slots, as `fill_slots` has them; nothing counted."""
        tables, count = residency.tables, len(residency.slots)
        tables.reset()
        tables.slot_of[:count] = tables.expert_in[:] = torch.arange(count, dtype=torch.int32)
        residency.slots.copy_(residency.rows[:count])

    def step(self, tokens: Tensor) -> tuple[Tensor, DecodeStep]:
        """Logits of decode steps from an empty cache, [steps, V]."""
        moe = self.offloaded.moe
        handlers = {m.experts: own for m, own in zip(moe.layers, self.layers, strict=True)}
        with routed_through(moe.model, handlers), ExitStack() as undo:
            for layer, own in zip(moe.layers, self.layers, strict=True):
                own.watch_router(layer, undo)
                own.states.watch(layer, undo)
            step = DecodeStep(moe.model, 1, 8, [layer.router for layer in moe.layers])
            for own in self.layers:  # what that read is forgotten
                self.fill(own.residency)
            self.judged.zero_()
            step.begin(torch.ones(1, 1, dtype=torch.long))
            step.positions.zero_()
            step._write_at.zero_()
            return torch.stack([step.replay(token.view(1))[0].clone() for token in tokens]), step


def two_layers_under(
    monkeypatch: pytest.MonkeyPatch, rule: str, prefetch: Any, num_slots: int
) -> RuledExperts:
    """Two layers of a tiny model under a rule, quick under the interpreter."""
    run_streams_in_order(monkeypatch)
    for module in (demand_module, plan_module):
        monkeypatch.setattr(module, "DEMAND_PROGRAMS", 2)
    model = tiny_model("qwen3_moe", num_hidden_layers=2).eval()
    settings = {"expert_slots": str(num_slots), "prefetch": prefetch, "agreement_floor": 0.0}
    return RuledExperts(model, EngineConfig(on_miss=rule, **settings), num_slots)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py runs whole engines there")
@pytest.mark.parametrize("rule", ["skip", "substitute:1.5+later", "predicted+skip"])
def test_a_batch_with_fewer_slots_than_it_needs_leaves_them_right(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = two_layers_under(monkeypatch, rule, "all" if "predicted" in rule else "none", 4)
    layer, geometry = device.layers[1], device.offloaded.moe.geometry
    generator, num_tokens = torch.Generator().manual_seed(0), 5
    for _ in range(2):
        states = torch.randn(num_tokens, geometry.hidden_size, generator=generator)
        logits = torch.randn(2, num_tokens, geometry.num_experts, generator=generator)
        weights, ids = logits[0].softmax(-1).topk(geometry.top_k)
        layer.router_logits = logits[0]
        if "predicted" in rule:
            ranked = logits[1].topk(geometry.top_k)
            layer._expected = Guess(ranked.indices, ranked.values, logits[1])
        output = layer.decode(states, ids, weights)
        assert output.shape == states.shape
        layer.residency.check_integrity()
    assert 0 < device.judged[AGREED] < device.judged[CHOSEN] == 2 * num_tokens * geometry.top_k


class Captured(InOrder):
    """A stream of a graph that is captured: it can wait for no stream that is not part of it."""

    def __init__(self, *, is_part: bool = False) -> None:
        super().__init__()
        self.is_part, self.num_waits = is_part, 0

    def wait_stream(self, other: Any) -> None:
        assert other.is_part
        self.is_part = True
        self.num_waits += 1


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py captures steps there")
@pytest.mark.parametrize("rule", ["skip", "predicted+skip", "predicted+substitute:0.9+later"])
def test_a_captured_step_waits_for_copies_behind_its_layers_if_it_makes_any(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = two_layers_under(monkeypatch, rule, "all", 6)
    layer, run, geometry = device.layers[1], device.run, device.offloaded.moe.geometry
    for num_tokens in (1, 2):  # where drafts are verified, nothing is predicted
        graph = Captured(is_part=True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda graph=graph: graph)
        run.num_tokens, run.behind = num_tokens, Captured()  # type: ignore[assignment]
        states = torch.randn(num_tokens, geometry.hidden_size)
        layer.router_logits = torch.randn(num_tokens, geometry.num_experts)
        weights, ids = layer.router_logits.softmax(-1).topk(geometry.top_k)
        if run.looks_ahead:
            layer._expected = Guess(ids.flip(-1), weights, layer.router_logits)
        layer.decode(states, ids, weights)
        run.join_behind()
        copies = run.config.rule.predicted is None or num_tokens == 1
        assert run.behind.is_part == bool(graph.num_waits) == copies
        run.join_behind()
        assert graph.num_waits == copies


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py runs whole engines there")
@pytest.mark.parametrize(
    ("rule", "prefetch", "is_fused"),
    [
        ("bonus:0.05+substitute:1.5", "none", True),
        ("substitute+budget:{budget}", "none", False),
        ("skip", "none", True),
        ("substitute:1.5+later", "none", False),
        ("predicted:predicted-weights", "auto", True),
    ],
)
def test_a_decode_step_under_a_rule_is_the_host_engines(
    rule: str, prefetch: Any, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_streams_in_order(monkeypatch)
    monkeypatch.setattr(DecodeStep, "defers", is_fused)
    monkeypatch.setattr(decode_graph, "LENGTH_STEP", 8)
    monkeypatch.setattr(route_module, "ROWS", 16)  # few programs: they are interpreted
    monkeypatch.setattr(linear_module, "TILE", 2**17)
    for module in (demand_module, plan_module):
        monkeypatch.setattr(module, "DEMAND_PROGRAMS", 2)
    model = tiny_model("qwen3_moe", num_hidden_layers=2 if is_fused else 3).eval()
    plain, tokens = copy.deepcopy(model), torch.tensor([7, 9, 4])
    slots = model.config.num_experts_per_tok + 2
    host = offload(plain, device=torch.device("cpu"), model_name="tiny")
    rule = rule.format(budget=host.expert_bytes)
    config = EngineConfig(
        expert_slots=str(slots),
        on_miss=rule,
        prefetch=prefetch,
        agreement_floor=0.0,
        exact_layers="" if is_fused else "0",
    )
    with Engine(host, config) as engine:
        engine.fill_slots()
        cache, expected = None, []
        for token in tokens:
            output = engine(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits[0, -1])
        stats = engine.stats()
    device = RuledExperts(model, config, slots)
    got, step = device.step(tokens)
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-5, rtol=2e-5)
    waiting = len(device.targets)  # for what comes ahead: their routers do not
    assert step.fused["plans in routers"] == is_fused * (len(device.layers) - waiting)
    assert device.judged[[AGREED, CHOSEN]].tolist() == [
        stats.agreed_experts,
        stats.speculated_experts,
    ]
    assert 0 < stats.agreement < 1
    totals, behind = device.counters.sum(0), int(device.judged[BEHIND])
    assert totals[[MISSES, PREFETCHES]].tolist() == [stats.decode.misses, stats.decode.prefetches]
    assert (totals[MISSES] + behind) * host.expert_bytes == stats.decode.fetched_bytes
    assert bool(behind) == config.rule.fetches_behind
    for layer in device.layers:
        layer.residency.check_integrity()

"""Rules on a miss keep what they promise, token by token, in every gate family."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foreroute.estimators.types import GateFamily
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.on_miss import MissRule, find_rule
from foreroute.runtime.on_miss.agreement import WINDOW_LAYER_STEPS, AgreementGuard
from foreroute.runtime.on_miss.budget import Allowance
from foreroute.runtime.on_miss.choice import Gates, RouterChoice, shares_of
from foreroute.runtime.on_miss.decide import decide
from foreroute.runtime.on_miss.gates import gates_of
from foreroute.runtime.on_miss.predicted import predicted_choice
from foreroute.runtime.store.offload import OffloadedModel, offload

TOKENS, EXPERTS, TOP_K = 40, 16, 4
FAMILIES = [family for family in GateFamily if family is not GateFamily.OTHER]
RULES = (
    "skip",
    "skip:0.75",
    "substitute",
    "substitute:0.9",
    "substitute+threshold:0.3",
    "substitute:0.9+threshold:0.3",
    "threshold:0.3",
    "bonus:0.2",
    "bonus:0.1+substitute:0.5",
    "budget:1MB",
    "substitute+budget:1MB",
)


def random_choice(family: GateFamily, *, has_bias: bool = False) -> RouterChoice:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(TOKENS, EXPERTS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator) / 4 if has_bias else None
    gates = Gates(family=family, scale=1.5, selection_bias=bias)
    ids = gates.ranking(logits).topk(TOP_K).indices
    return RouterChoice(
        expert_ids=ids, gate_weights=gates.weights(logits, ids), gates=gates, router_logits=logits
    )


def some_here(seed: int = 0) -> Tensor:
    return torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", RULES)
def test_with_every_expert_resident_nothing_changes(text: str, family: GateFamily) -> None:
    choice = random_choice(family, has_bias=family.value.startswith("sigmoid"))
    ruling = decide(find_rule(text), choice, torch.ones(EXPERTS, dtype=torch.bool))
    assert torch.equal(ruling.expert_ids, choice.expert_ids)
    assert torch.equal(ruling.gate_weights, choice.gate_weights)
    assert ruling.is_run.all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", RULES)
def test_weights_are_those_the_family_gives_to_what_runs(text: str, family: GateFamily) -> None:
    choice, here = random_choice(family), some_here()
    ruling = decide(find_rule(text), choice, here, allowance=1)
    run = ruling.is_run
    expected = choice.gates.weights(choice.logits, ruling.expert_ids) * run
    if family.is_renormalised:
        expected = 1.5 * expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(ruling.gate_weights, expected)
    assert (ruling.gate_weights[~run] == 0).all()
    assert run.any(-1).all()  # something runs for every token
    for ids, is_one in zip(ruling.expert_ids, run, strict=True):
        assert len(ids[is_one].unique()) == int(is_one.sum())  # no expert twice


def test_weights_by_hand() -> None:
    """Logits ln 4, ln 3, ln 2, 0: shares .4, .3, .2, .1; top-2 of it; expert 1 is absent."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()
    here = torch.tensor([True, False, False, True])

    def weights(family: str, rule: str) -> list[float]:
        gates = Gates(family=GateFamily(family))
        ids = torch.tensor([[0, 1]])
        choice = RouterChoice(
            expert_ids=ids,
            gate_weights=gates.weights(logits, ids),
            gates=gates,
            router_logits=logits,
        )
        return decide(find_rule(rule), choice, here).gate_weights[0].tolist()

    assert weights("softmax-topk", "skip") == pytest.approx([0.4, 0.0])
    assert weights("softmax-topk-renorm", "skip") == pytest.approx([1.0, 0.0])
    assert weights("softmax-topk", "substitute:1") == pytest.approx([0.4, 0.1])
    assert weights("softmax-topk-renorm", "substitute:1") == pytest.approx([0.8, 0.2])
    assert weights("sigmoid-topk", "substitute:1") == pytest.approx([0.8, 0.5])
    assert weights("softmax-topk", "threshold:0.4") == pytest.approx([0.4, 0.3])  # 3/7 is more
    assert weights("softmax-topk", "threshold:0.5") == pytest.approx([0.4, 0.0])
    assert weights("softmax-topk", "bonus:0.9") == pytest.approx([0.4, 0.1])
    assert weights("softmax-topk", "bonus:0.7") == pytest.approx([0.4, 0.3])  # .7 ln 4 < ln 3


def test_substitutes_are_the_best_residents_and_the_heaviest_is_never_replaced() -> None:
    choice, here = random_choice(GateFamily.SOFTMAX_RENORM), some_here()
    ruling = decide(find_rule("substitute:100"), choice, here)
    shares = shares_of(choice.gate_weights)
    for t in range(TOKENS):
        true, got = choice.expert_ids[t].tolist(), ruling.expert_ids[t].tolist()
        order = sorted(range(TOP_K), key=lambda i: -float(shares[t, i]))
        absent = [i for i in order if not here[true[i]] and i != order[0]]
        free = [e for e in choice.logits[t].argsort(descending=True).tolist() if here[e]]
        free = [e for e in free if e not in true]
        for i, e in zip(absent, free, strict=False):
            assert got[i] == e
        for i in set(range(TOP_K)) - set(absent[: len(free)]):
            assert got[i] == true[i]


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("prefix", ["", "substitute+"])
def test_a_threshold_bounds_what_a_token_misses(prefix: str, mass: float) -> None:
    choice, here = random_choice(GateFamily.SOFTMAX), some_here()
    ruling = decide(find_rule(f"{prefix}threshold:{mass}"), choice, here)
    is_left = (ruling.expert_ids != choice.expert_ids) | ~ruling.is_run
    shares = shares_of(choice.gate_weights)
    assert ((shares * is_left).sum(-1) <= mass).all()
    assert is_left.any()
    fetched = ~here[choice.expert_ids] & ~is_left & (shares < shares.amax(-1, keepdim=True))
    lightest = shares.masked_fill(~fetched, 2.0).amin(-1)
    if not prefix:  # where residents run out, substitution fetches
        assert ((shares * is_left).sum(-1) + lightest > mass).all()  # one more would be too much


@pytest.mark.parametrize("allowance", [0, 1, 2])
def test_a_budget_fetches_the_heaviest_first_and_no_more(allowance: int) -> None:
    choice, here = random_choice(GateFamily.SOFTMAX), some_here()
    ruling = decide(find_rule("budget:1MB"), choice, here, allowance)
    absent = ~here[choice.expert_ids]
    fetched, left = absent & ruling.is_run, absent & ~ruling.is_run
    has_none = absent.all(-1)
    assert (fetched.sum(-1) <= allowance + has_none.int() * (allowance == 0)).all()
    weights = choice.gate_weights
    assert (
        weights.masked_fill(~left, -1.0).amax(-1) <= weights.masked_fill(~fetched, 9.0).amin(-1)
    ).all()


def test_what_a_layer_leaves_of_a_budget_the_next_ones_may_spend() -> None:
    allowance = Allowance(per_token=2.0, num_layers=4)
    assert [allowance.at(place, 1) for place in range(4)] == [0, 1, 1, 2]
    allowance.spent = 1
    assert [allowance.at(place, 1) for place in range(4)] == [0, 0, 0, 1]
    allowance.begin_step()
    assert allowance.at(3, 1) == 2


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_bonus_prefers_residents_by_part_of_the_range(has_bias: bool) -> None:
    choice, here = random_choice(GateFamily.SIGMOID, has_bias=has_bias), some_here()
    ruling = decide(find_rule("bonus:0.2"), choice, here)
    ranking = choice.gates.ranking(choice.logits)
    spread = ranking.amax(-1, keepdim=True) - ranking.amin(-1, keepdim=True)
    expected = (ranking + 0.2 * spread * here).topk(TOP_K).indices
    assert torch.equal(ruling.expert_ids.sort().values, expected.sort().values)
    assert not torch.equal(expected.sort().values, choice.expert_ids.sort().values)


@pytest.mark.parametrize("weights", ["true-weights", "predicted-weights"])
def test_predicted_experts_are_weighed_by_true_or_predicted_logits(weights: Any) -> None:
    choice = random_choice(GateFamily.SOFTMAX_RENORM)
    said = choice.logits.roll(1, dims=1)
    ranked = said.topk(TOP_K + 2).indices
    got = predicted_choice(choice, ranked, said, weights)
    logits = choice.logits if weights == "true-weights" else said
    assert torch.equal(got.expert_ids, ranked[:, :TOP_K])
    assert torch.equal(got.gate_weights, choice.gates.weights(logits, ranked[:, :TOP_K]))


def test_a_rule_that_ranks_nothing_needs_no_known_gate_family() -> None:
    rules = {text: find_rule(text).needs_scores for text in RULES}
    assert {t for t, needs in rules.items() if not needs} == {
        "skip",
        "skip:0.75",
        "threshold:0.3",
        "budget:1MB",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("substitute+skip", "contradict"),
        ("predicted+bonus", "contradict"),
        ("fetch+later", "stands alone"),
        ("bonus+later", "later needs"),
        ("threshold", "threshold must be a number above 0 and at most 1"),
        ("threshold:2", "at most 1"),
        ("substitute:x", "not x"),
        ("budget:many", "bytes or ms"),
        ("budget:0ms", "above 0"),
        ("substitute:0.5+budget:1MB", "either a share"),
        ("predicted:other", "true-weights or predicted-weights"),
        ("skip+skip", "twice"),
        ("later:3+skip", "takes no"),
        ("", "known parts: fetch"),
    ],
)
def test_what_makes_no_rule_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        find_rule(text)
    assert "\n" not in str(error.value)


def test_texts_mean_what_they_say() -> None:
    assert find_rule("fetch").is_exact
    assert find_rule("skip").waits_for_none
    assert find_rule("substitute").share == 0.5
    assert find_rule("substitute+threshold:0.15").share is None
    assert find_rule("budget:1.5ms").budget_experts(10, copy_ms=0.5) == 3
    assert find_rule("budget:20MB").budget_experts(4_000_000, copy_ms=0.5) == 5
    assert find_rule("bonus:0.1+substitute:0.4+later") == MissRule(
        text="bonus:0.1+substitute:0.4+later",
        bonus=0.1,
        is_leaving=True,
        share=0.4,
        is_replacing=True,
        is_later=True,
    )


def test_the_guard_judges_whole_windows_and_says_once_that_it_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = AgreementGuard(0.5)
    for _ in range(WINDOW_LAYER_STEPS):
        guard.observe(2, 4)
    assert guard.is_open
    with caplog.at_level(logging.WARNING):
        for _ in range(2 * WINDOW_LAYER_STEPS):
            guard.observe(1, 4)
    assert not guard.is_open
    assert len(caplog.messages) == 1


@pytest.fixture(scope="module")
def offloaded(tiny_moe: Any) -> OffloadedModel:
    return offload(copy.deepcopy(tiny_moe.model), device=torch.device("cpu"), model_name="tiny")


def decode(offloaded: OffloadedModel, **settings: Any) -> tuple[Tensor, Any]:
    """Logits of 12 forced tokens after a prompt of 6, and the engine's counters."""
    tokens = torch.randint(3, 250, (1, 18), generator=torch.Generator().manual_seed(1))
    config = EngineConfig(expert_slots="3", agreement_floor=0.0, **settings)
    with Engine(offloaded, config) as engine:
        output, logits = engine(tokens[:, :6], use_cache=True), []
        for at in range(6, 18):
            step = tokens[:, at : at + 1]
            output = engine(step, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
        engine.check_integrity()
        return torch.cat(logits), engine.stats()


def test_layers_that_are_named_stay_exact(offloaded: OffloadedModel) -> None:
    exact, demand = decode(offloaded)
    every, stats = decode(offloaded, on_miss="substitute:2", exact_layers="0-3")
    assert torch.equal(every, exact)
    assert stats.speculated_experts == 0
    part, stats = decode(offloaded, on_miss="substitute:2", exact_layers="0,3")
    assert not torch.equal(part, exact)
    assert stats.speculated_experts == 2 * 2 * 12  # layers, top-k, steps
    assert stats.decode.bytes < demand.decode.bytes
    with pytest.raises(ValueError, match="Layer 9 is not an MoE layer"):
        decode(offloaded, on_miss="skip", exact_layers="9")


def test_an_engine_copies_no_more_than_its_budget(offloaded: OffloadedModel) -> None:
    size = offloaded.expert_bytes
    for experts in (1, 2, 4):
        rule = f"substitute+budget:{experts * size}"
        _, stats = decode(offloaded, on_miss=rule)
        assert 0 < stats.decode.bytes <= 12 * experts * size


def test_what_is_left_may_come_behind_the_layer(offloaded: OffloadedModel) -> None:
    _, without = decode(offloaded, on_miss="substitute:2")
    _, later = decode(offloaded, on_miss="substitute:2+later")
    size = offloaded.expert_bytes
    assert without.decode.misses == without.decode.bytes // size
    assert later.decode.misses < later.decode.bytes // size


def test_a_model_with_unknown_gates_can_skip_and_not_substitute(tiny_moe: Any) -> None:
    geometry = replace(tiny_moe.moe.geometry, gate_family=GateFamily.OTHER)
    moe = replace(tiny_moe.moe, geometry=geometry)
    assert len(gates_of(moe, find_rule("skip:0.5"))) == 4
    for text in ("substitute", "bonus", "predicted"):
        with pytest.raises(ValueError, match="Use on_miss=fetch or skip"):
            gates_of(moe, find_rule(text))

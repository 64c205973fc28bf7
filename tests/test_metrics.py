"""Recall and its relatives, against numbers worked by hand."""

import doctest

import pytest
import torch

from foreroute.estimators import (
    RecallMeter,
    RecallMetrics,
    default_budgets,
    exact_set,
    gate_mass_recall,
    metrics,
    recall_at_k,
)

TRUE_IDS = torch.tensor([[1, 2], [0, 3]])
GATE_WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
# Ranked: token 0 -> 1, 3, 2, 0; token 1 -> 3, 0, 1, 2.
SCORES = torch.tensor([[0.0, 4.0, 1.0, 3.0], [2.0, 1.0, 0.0, 5.0]])


def test_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted >= 5
    assert result.failed == 0


def test_recall_counts_hits_among_the_true_experts() -> None:
    predicted = torch.tensor([[1, 3], [3, 0]])
    assert recall_at_k(predicted, TRUE_IDS).tolist() == [0.5, 1.0]
    assert gate_mass_recall(predicted, TRUE_IDS, GATE_WEIGHTS).tolist() == [0.75, 1.0]
    assert exact_set(predicted, TRUE_IDS).tolist() == [False, True]


def test_mismatched_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="1 and 2 tokens"):
        recall_at_k(TRUE_IDS[:1], TRUE_IDS)
    with pytest.raises(ValueError, match=r"\[2, 2\], got \[1, 2\]"):
        gate_mass_recall(TRUE_IDS, TRUE_IDS, GATE_WEIGHTS[:1])


def test_meter_gives_hand_worked_values_for_every_budget() -> None:
    meter = RecallMeter(num_pairs=1, top_k=2, budgets=(3,))
    meter.update(SCORES[None], TRUE_IDS[None], GATE_WEIGHTS[None])
    result = meter.compute()
    assert result.recall_at_budgets == {2: [0.75], 3: [1.0]}
    assert result.recall_at_k == [0.75]
    assert result.gate_mass_recall == [0.875]
    assert result.exact_set == [0.5]


def test_meter_agrees_with_the_functions_on_random_scores() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 50, 16)
    true_ids = torch.stack([torch.randperm(16)[:4] for _ in range(150)]).view(3, 50, 4)
    weights = torch.rand(3, 50, 4)
    meter = RecallMeter(num_pairs=3, top_k=4, budgets=(4, 6))
    meter.update(scores, true_ids, weights)
    result = meter.compute()
    for pair in range(3):
        first, more = scores[pair].topk(4).indices, scores[pair].topk(6).indices
        mass = gate_mass_recall(first, true_ids[pair], weights[pair])
        exact = exact_set(first, true_ids[pair]).float()
        assert result.recall_at_k[pair] == pytest.approx(
            recall_at_k(first, true_ids[pair]).mean().item(), abs=1e-6
        )
        assert result.recall_at_budgets[6][pair] == pytest.approx(
            recall_at_k(more, true_ids[pair]).mean().item(), abs=1e-6
        )
        assert result.gate_mass_recall[pair] == pytest.approx(mass.mean().item(), abs=1e-6)
        assert result.exact_set[pair] == pytest.approx(exact.mean().item(), abs=1e-6)


def test_merged_meters_equal_one_meter_over_everything() -> None:
    whole, *parts = (RecallMeter(num_pairs=1, top_k=2, budgets=(3,)) for _ in range(3))
    whole.update(SCORES[None], TRUE_IDS[None], GATE_WEIGHTS[None])
    for row, part in enumerate(parts):
        rows = slice(row, row + 1)
        part.update(SCORES[None, rows], TRUE_IDS[None, rows], GATE_WEIGHTS[None, rows])
    parts[0].merge(parts[1])
    assert parts[0].compute() == whole.compute()


def test_sequences_are_told_apart_across_batches() -> None:
    torch.manual_seed(0)
    scores, weights = torch.randn(2, 30, 8), torch.rand(2, 30, 2)
    true_ids = torch.rand(2, 30, 8).topk(2).indices
    starts = torch.zeros(30, dtype=torch.bool)
    starts[[0, 7, 20]] = True
    whole, parts = RecallMeter(2, 2, (3,)), RecallMeter(2, 2, (3,))
    whole.update(scores, true_ids, weights, starts)
    for a, b in ((0, 4), (4, 20), (20, 30)):
        parts.update(scores[:, a:b], true_ids[:, a:b], weights[:, a:b], starts[a:b])
    assert (parts.num_sequences, parts.num_tokens) == (3, 30)
    assert parts.intervals() == whole.intervals()
    apart = RecallMeter(2, 2, (3,))
    apart.update(scores, true_ids, weights)
    assert apart.compute() == whole.compute()


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    # Sequences of 20 tokens that are all hit or all missed: tokens alone would promise too much.
    torch.manual_seed(0)
    held, starts = 0, (torch.arange(400) % 20 == 0)
    for _ in range(100):
        is_hit = (torch.rand(20) < 0.6).repeat_interleave(20)
        true_ids = torch.where(is_hit, 1, 0).view(1, 400, 1)
        meter = RecallMeter(1, 1)
        scores = torch.tensor([0.0, 1.0]).expand(1, 400, 2)
        meter.update(scores, true_ids, torch.ones(1, 400, 1), starts)
        low, high = meter.intervals().recall_at_k
        held += low <= 0.6 <= high
    assert 85 <= held <= 100


def test_an_interval_of_one_sequence_is_refused() -> None:
    meter = RecallMeter(num_pairs=1, top_k=2)
    meter.update(SCORES[None], TRUE_IDS[None], GATE_WEIGHTS[None])
    with pytest.raises(ValueError, match="at least 2 sequences, not 1"):
        meter.intervals()


def test_a_meter_that_saw_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="No tokens"):
        RecallMeter(num_pairs=1, top_k=2).compute()


def test_chance_is_what_random_scores_reach() -> None:
    torch.manual_seed(0)
    chance = RecallMetrics.of_chance(num_pairs=1, top_k=2, num_experts=8, budgets=(2, 4))
    meter = RecallMeter(num_pairs=1, top_k=2, budgets=(4,))
    true_ids = torch.rand(1, 20_000, 8).topk(2).indices
    meter.update(torch.rand(1, 20_000, 8), true_ids, torch.rand(1, 20_000, 2))
    measured = meter.compute()
    # Standard error of a mean of 20,000 tokens is below 0.003 for each of these.
    assert measured.recall_at_k == pytest.approx(chance.recall_at_k, abs=0.01)
    assert measured.recall_at_budgets[4] == pytest.approx(chance.recall_at_budgets[4], abs=0.01)
    assert measured.exact_set == pytest.approx(chance.exact_set, abs=0.01)


def test_metrics_dict_holds_means_and_layers() -> None:
    values = RecallMetrics(
        recall_at_budgets={2: [0.5, 1.0], 4: [1.0, 1.0]},
        gate_mass_recall=[0.5, 0.7],
        exact_set=[0.0, 1.0],
    ).to_dict()
    assert values["recall_at_k"] == 0.75
    assert values["recall_at_budgets"] == {"2": 0.75, "4": 1.0}
    assert values["per_layer"]["recall_at_k"] == [0.5, 1.0]


def test_default_budgets_are_unique_and_at_most_all_experts() -> None:
    assert default_budgets(8, 128) == (8, 12, 16, 24)
    assert default_budgets(1, 4) == (1, 2, 3)
    assert default_budgets(4, 6) == (4, 6)


def test_ties_are_broken_alike_at_every_budget() -> None:
    scores = torch.zeros(1, 4, 8)
    scores[0, :, 5] = 1
    true_ids, weights = torch.tensor([[[5, 0]] * 4]), torch.ones(1, 4, 2)
    for budgets in ((), (3, 4, 6)):
        meter = RecallMeter(1, 2, budgets)
        meter.update(scores, true_ids, weights)
        assert meter.compute().recall_at_k == [1.0]

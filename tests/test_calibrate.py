"""Fitted probabilities: what they keep, and that they are better than none."""

import pytest
import torch

from foreroute.data.collect import collect_traces
from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorStack
from foreroute.estimators.calibration import (
    decision_margins,
    expected_calibration_error,
    membership,
    near_decision,
    uncalibrated,
)
from foreroute.estimators.expected_cost import FetchCosts, expected_cost
from foreroute.train.calibrate import METHODS, MarginHistogram
from foreroute.train.measure import count_margins, judge, predictor_of
from foreroute.train.shards import PairedShards
from foreroute.train.split import split_held_out

TOP_K, NUM_EXPERTS = 4, 16


def routed(num_tokens: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted logits [2, T, E], and experts [2, T, K] chosen by logits that differ by noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, num_tokens, NUM_EXPERTS, generator=generator)
    other = torch.randn(2, num_tokens, NUM_EXPERTS, generator=generator)
    return 3 * logits, (logits + noise * other).topk(TOP_K).indices


def fitted(method: str, noise: float = 0.5):
    histogram = MarginHistogram(TOP_K)
    for seed in range(3):
        histogram.update(*routed(2000, noise, seed))
    return histogram.fit(method)


@pytest.mark.parametrize("method", METHODS)
def test_fitted_probabilities_hold_on_tokens_they_never_saw(method) -> None:
    logits, true_ids = routed(4000, 0.5, seed=9)
    chance = fitted(method)(logits)
    after, before = (
        expected_calibration_error(*near_decision(p, true_ids, logits, TOP_K))
        for p in (chance, uncalibrated(logits, TOP_K))
    )
    assert (after < 0.02).all()
    assert (after < before / 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_of_a_token_sum_to_top_k_on_average(method) -> None:
    logits, _ = routed(4000, 0.5, seed=9)
    assert fitted(method)(logits).sum(-1).mean().item() == pytest.approx(TOP_K, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_larger_margin_never_means_a_lower_probability(method) -> None:
    margins = torch.linspace(-20, 20, 999).expand(2, 1, -1)
    assert (fitted(method).at_margins(margins).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_and_a_blind_predictor_are_told_apart(method) -> None:
    perfect, blind = fitted(method, noise=0.0), fitted(method, noise=1e6)
    margins = torch.tensor([-2.0, 2.0]).expand(2, 1, 2)
    assert (perfect.at_margins(margins) - torch.tensor([0.0, 1.0])).abs().max() < 0.02
    assert (blind.at_margins(margins) - TOP_K / NUM_EXPERTS).abs().max() < 0.05


def test_isotonic_follows_what_no_temperature_can() -> None:
    # Right when it is rather sure, half right when it is very sure: the sigmoid's shape is wrong.
    logits, true_ids = routed(6000, 0.0, seed=0)
    swap = decision_margins(logits, TOP_K) > 2
    chosen = membership(true_ids, NUM_EXPERTS)
    lost = swap & (torch.rand(swap.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    order = (chosen & ~lost).float() + 1e-3 * torch.rand(swap.shape)
    histogram = MarginHistogram(TOP_K)
    histogram.update(logits, order.topk(TOP_K).indices)
    errors = [
        expected_calibration_error(
            *near_decision(histogram.fit(method)(logits), order.topk(TOP_K).indices, logits, TOP_K)
        ).mean()
        for method in ("isotonic", "temperature")
    ]
    assert errors[0] < errors[1]


def test_nothing_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="No tokens"):
        MarginHistogram(TOP_K).fit("isotonic")


def test_parts_of_the_held_out_sequences_never_meet() -> None:
    for count in range(3, 40):
        parts = split_held_out(range(100, 100 + count))
        named = [*parts.calibrate, *parts.choose, *parts.report]
        assert min(map(len, (parts.calibrate, parts.choose, parts.report))) >= 1
        assert named == sorted(set(named))
        assert set(named) <= set(range(100, 100 + count))
        assert len(named) >= count - 1
    with pytest.raises(ValueError, match="2 held-out sequences are too few"):
        split_held_out(range(2))


@pytest.fixture(scope="module")
def bundled_traces(tmp_path_factory) -> Traces:
    """32 sequences of 64 tokens that the bundled model routed."""
    out = tmp_path_factory.mktemp("traces") / "bundled"
    collect_traces(
        model="bundled",
        dataset="python-stdlib",
        tokens=32 * 64,
        out=out,
        sequence_length=64,
        batch_size=16,
    )
    return Traces.open(out)


def test_calibration_of_the_bundled_model_holds_on_other_sequences(bundled_traces) -> None:
    geometry = bundled_traces.geometry
    stack = EstimatorStack.training_free(geometry, bundled_traces.anchors)
    predictor = predictor_of(stack)
    fit, held_out = (
        PairedShards(bundled_traces, stack.spec, part) for part in (range(15), range(16, 32))
    )
    margins = count_margins({"free": predictor}, fit, geometry)["free"]
    methods = {method: margins.fit(method) for method in METHODS}
    methods["none"] = lambda scores: uncalibrated(scores, geometry.top_k)
    judged = judge({"free": (predictor, methods)}, held_out, geometry, FetchCosts())
    none = judged["free", "none"]
    for method in METHODS:
        fitted_one = judged["free", method]
        rows = zip(fitted_one.calibration_error, none.calibration_error, strict=True)
        assert all(after < before / 3 for after, before in rows)


def test_cost_counts_misses_and_waste_at_the_rule_s_threshold() -> None:
    chance = torch.tensor([[0.9, 0.4, 0.1], [0.6, 0.3, 0.0]])
    is_true = torch.tensor([[True, True, False], [False, True, False]])
    assert expected_cost(chance, is_true, FetchCosts()).tolist() == [1.0, 2.0]
    cheap = FetchCosts(saved=1.0, delay=0.25)  # a prefetch pays above 0.2
    assert cheap.least_probability == pytest.approx(0.2)
    assert expected_cost(chance, is_true, cheap).tolist() == [0.0, 0.25]
    assert expected_cost(torch.zeros(3), is_true[0], cheap).item() == 2.0
    with pytest.raises(ValueError, match="above 0"):
        FetchCosts(delay=0.0)


def test_the_sharper_of_two_predictors_with_the_same_recall_costs_less() -> None:
    # Both name one true and one false expert of two; only one knows which of them is doubtful.
    is_true = torch.tensor([True, False, True, False])
    knows, guesses = torch.tensor([0.95, 0.05, 0.0, 0.0]), torch.tensor([0.6, 0.6, 0.0, 0.0])
    costs = FetchCosts()
    assert expected_cost(knows, is_true, costs) < expected_cost(guesses, is_true, costs)

"""Calibration: what error means, and what every table must do."""

import doctest

import pytest
import torch

from foreroute.estimators import calibration
from foreroute.estimators.calibration import (
    Calibration,
    decision_margins,
    expected_calibration_error,
    near_decision,
    reliability,
)


@pytest.fixture
def table() -> Calibration:
    torch.manual_seed(0)
    values = torch.rand(3, 9).sort(dim=1).values
    return Calibration(torch.tensor([-2.0, -1.0, -4.0]), torch.tensor([2.0, 4.0, 1.0]), values, 2)


def test_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(calibration)
    assert result.attempted >= 2
    assert result.failed == 0


def test_the_margin_is_positive_for_exactly_the_predicted_experts() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50, 16)
    chosen = torch.zeros(3, 50, 16).scatter(-1, logits.topk(4).indices, 1.0)
    assert torch.equal(decision_margins(logits, 4) > 0, chosen.bool())
    assert torch.equal(
        decision_margins(logits[..., :4], 4).min(-1).values <= 0, torch.ones(3, 50) > 0
    )


def test_outcomes_drawn_with_the_probabilities_have_hardly_any_error() -> None:
    torch.manual_seed(0)
    probabilities = torch.rand(2, 40_000)
    is_true = torch.rand(2, 40_000) < probabilities
    # The standard error of a bin of 2,667 is below 0.01.
    assert (expected_calibration_error(probabilities, is_true) < 0.02).all()
    overconfident = (4 * (probabilities - 0.5)).sigmoid() ** 2
    assert (expected_calibration_error(overconfident, is_true) > 0.1).all()


def test_reliability_bins_hold_equal_numbers_in_ascending_order() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.2, 0.8]])
    expected, observed = reliability(probabilities, probabilities > 0.15, num_bins=2)
    assert expected.tolist() == [pytest.approx([0.15, 0.85])]
    assert observed.tolist() == [[0.5, 1.0]]
    assert reliability(probabilities, probabilities > 0.5, num_bins=9)[0].shape == (1, 4)


def test_error_is_counted_over_the_candidates_of_each_token() -> None:
    logits = torch.tensor([[[5.0, 4.0, 3.0, 2.0]]])
    near, is_true = near_decision(logits.sigmoid(), torch.tensor([[[3]]]), logits, top_k=1)
    assert near.tolist() == [logits[0, 0, :2].sigmoid().tolist()]
    assert is_true.tolist() == [[False, False]]


def test_nothing_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[1, 0\] and \[1, 0\]"):
        expected_calibration_error(torch.zeros(1, 0), torch.zeros(1, 0) > 0)
    with pytest.raises(ValueError, match=r"one shape \[P, N\]"):
        expected_calibration_error(torch.zeros(1, 2), torch.zeros(1, 3) > 0)


def test_a_table_is_linear_between_knots_and_constant_outside(table) -> None:
    values = table.probability
    margins = torch.tensor([-9.0, -2.0, -1.75, -1.5, 2.0, 9.0]).view(1, 1, -1)
    given = table.at_margins(margins, slice(0, 1)).flatten()
    middle = (values[0, 0] + values[0, 1]) / 2
    wanted = [values[0, 0], values[0, 0], middle, values[0, 1], values[0, 8], values[0, 8]]
    assert given.tolist() == pytest.approx([float(value) for value in wanted])


def test_a_higher_logit_never_means_a_lower_probability(table) -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(3, 40, 8)
    order = logits.argsort(dim=-1)
    assert (table(logits).gather(-1, order).diff(dim=-1) >= 0).all()


def test_one_pair_gives_what_all_pairs_give(table) -> None:
    logits = torch.randn(3, 5, 8)
    for pair in range(3):
        alone = slice(pair, pair + 1)
        assert torch.equal(table(logits[alone], alone), table(logits)[alone])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": torch.tensor([[0.5, 0.4]])}, "never fall"),
        ({"probability": torch.tensor([[0.5, 1.4]])}, r"0\.\.1"),
        ({"probability": torch.tensor([[0.5]])}, "B of 2 or more"),
        ({"first_margin": torch.zeros(2)}, r"Expected shapes \[P\]"),
    ],
)
def test_tables_that_make_no_sense_are_refused(change, message) -> None:
    good = {
        "first_margin": torch.zeros(1),
        "knots_per_margin": torch.ones(1),
        "probability": torch.tensor([[0.1, 0.4]]),
    }
    Calibration(**good, top_k=1)
    with pytest.raises(ValueError, match=message):
        Calibration(**(good | change), top_k=1)


def test_no_value_is_read_on_the_host(table) -> None:
    # Tensors without values: anything that synced with the host would raise.
    chance = table.to("meta")(torch.empty(3, 5, 8, device="meta"))
    assert chance.shape == (3, 5, 8)

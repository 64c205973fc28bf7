"""Calibrated probabilities: how likely each expert is among the top K, from predictions."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from foreroute.estimators.inputs import ALL_PAIRS

NEAR_DECISION = 2
"""Calibration error counts the experts predicted among the top `NEAR_DECISION * K` of a token."""
NUM_BINS = 15
"""Bins of calibration error and of reliability diagrams, of equal numbers of predictions."""


def decision_margins(scores: Tensor, top_k: int) -> Tensor:
    """How far each expert's score lies above the middle of the K-th and the next one's.

    Args:
        scores: What experts are ranked by, [..., E], float: predicted router logits, or
            `EstimatorStack.ranking` of them for models with a selection bias.
        top_k: K.

    Returns:
        [..., E], float32; positive for the K experts that are predicted.

    Example:
        >>> decision_margins(torch.tensor([3.0, 0.0, 1.0]), top_k=1)
        tensor([ 1., -2., -1.])
    """
    scores = scores.float()
    best = scores.topk(min(top_k + 1, scores.shape[-1]), dim=-1).values
    return scores - best[..., -2:].mean(dim=-1, keepdim=True)


def uncalibrated(scores: Tensor, top_k: int) -> Tensor:
    """Probabilities as if scores were log-odds already: the sigmoid of the decision margin.

    Args:
        scores: What experts are ranked by, [..., E], float.
        top_k: K.
    """
    return decision_margins(scores, top_k).sigmoid()


def near_decision(
    probabilities: Tensor, true_ids: Tensor, scores: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The predictions that calibration error is counted over.

    They are chosen by the rank of the scores, so that every calibration is judged on the same.

    Args:
        probabilities: Of each expert, [P, T, E], float.
        true_ids: Experts the router chose, [P, T, K], integer.
        scores: What experts are ranked by, [P, T, E], float.
        top_k: K.

    Returns:
        Probabilities [P, T * M], float32, and whether the expert was chosen [P, T * M], bool,
        of the top M = min(`NEAR_DECISION` K, E) predicted experts of each token.
    """
    near = scores.topk(min(NEAR_DECISION * top_k, scores.shape[-1]), dim=-1).indices  # [P, T, M]
    is_true = membership(true_ids, scores.shape[-1]).gather(-1, near)
    return probabilities.gather(-1, near).float().flatten(1), is_true.flatten(1)


def membership(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Whether each expert is among those given, [..., E], bool.

    Args:
        expert_ids: [..., K], integer.
        num_experts: E.
    """
    empty = torch.zeros(
        *expert_ids.shape[:-1], num_experts, dtype=torch.bool, device=expert_ids.device
    )
    return empty.scatter(-1, expert_ids.long(), True)


def reliability(
    probabilities: Tensor, is_true: Tensor, num_bins: int = NUM_BINS
) -> tuple[Tensor, Tensor]:
    """Mean probability against the share that came true, in bins of (nearly) equal mass.

    Args:
        probabilities: [P, N], float.
        is_true: What happened, [P, N], bool.
        num_bins: B; fewer if there are fewer predictions.

    Returns:
        Mean probability and share that came true, both [P, B], float32, ascending.

    Raises:
        ValueError: If there is no prediction, or the shapes differ.
    """
    probabilities, outcomes, bounds = _in_bins(probabilities, is_true, num_bins)
    means = [
        (probabilities[:, start:stop].mean(dim=1), outcomes[:, start:stop].mean(dim=1))
        for start, stop in pairwise(bounds)
    ]
    expected, observed = zip(*means, strict=True)
    return torch.stack(expected, dim=1), torch.stack(observed, dim=1)


def expected_calibration_error(
    probabilities: Tensor, is_true: Tensor, num_bins: int = NUM_BINS
) -> Tensor:
    """Mean distance of probability and outcome over bins of (nearly) equal mass.

    Take predictions from `near_decision`: over all experts, those far from any chance of being
    chosen would make every predictor look calibrated.

    Args:
        probabilities: [P, N], float.
        is_true: What happened, [P, N], bool.
        num_bins: Bins, of equal numbers of predictions.

    Returns:
        [P], float32, 0 is perfect.

    Raises:
        ValueError: If there is no prediction, or the shapes differ.

    Example:
        >>> expected_calibration_error(
        ...     torch.tensor([[0.5, 0.5, 1.0, 1.0]]),
        ...     torch.tensor([[True, False, True, False]]),
        ...     num_bins=2,
        ... )
        tensor([0.2500])
    """
    expected, observed = reliability(probabilities, is_true, num_bins)
    bounds = torch.tensor(_bounds(probabilities.shape[1], num_bins), device=expected.device)
    share = bounds.diff() / probabilities.shape[1]  # [B]
    return ((expected - observed).abs() * share).sum(dim=1)


def _in_bins(
    probabilities: Tensor, is_true: Tensor, num_bins: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Both sorted by probability, [P, N], and where bins begin and end."""
    if probabilities.shape != is_true.shape or probabilities.numel() == 0:
        raise ValueError(
            f"Expected probabilities and outcomes of one shape [P, N] with N above 0, got "
            f"{list(probabilities.shape)} and {list(is_true.shape)}."
        )
    ordered, order = probabilities.float().sort(dim=1, stable=True)
    outcomes = is_true.gather(1, order).float()
    return ordered, outcomes, _bounds(probabilities.shape[1], num_bins)


def _bounds(count: int, num_bins: int) -> list[int]:
    bins = min(num_bins, count)
    return [i * count // bins for i in range(bins + 1)]


class Calibration(nn.Module):
    """Turns ranking scores into probabilities of being among the top K, for P layer pairs.

    Per pair a table over the decision margin (`decision_margins`) with evenly spaced knots, linear
    in between and constant outside: fixed shapes, no host sync, so that a CUDA graph can hold it.
    """

    first_margin: Tensor
    knots_per_margin: Tensor
    probability: Tensor

    def __init__(
        self, first_margin: Tensor, knots_per_margin: Tensor, probability: Tensor, top_k: int
    ) -> None:
        """Keep the tables.

        Args:
            first_margin: Margin of the first knot, [P].
            knots_per_margin: Knots per unit of margin, [P].
            probability: At each knot, never falling, [P, B].
            top_k: K.

        Raises:
            ValueError: If the shapes disagree, or a table falls or leaves 0..1.
        """
        super().__init__()
        shapes = [list(t.shape) for t in (first_margin, knots_per_margin, probability)]
        num_pairs, num_knots = probability.shape if probability.dim() == 2 else (-1, -1)
        if shapes[:2] != [[num_pairs]] * 2 or num_knots < 2:
            raise ValueError(
                f"Expected shapes [P], [P] and [P, B] with B of 2 or more, got {shapes}."
            )
        if (probability.diff(dim=1) < 0).any() or probability.min() < 0 or probability.max() > 1:
            raise ValueError("Expected probabilities in 0..1 that never fall from knot to knot.")
        self.top_k = top_k
        self.register_buffer("first_margin", first_margin.float())
        self.register_buffer("knots_per_margin", knots_per_margin.float())
        self.register_buffer("probability", probability.float().contiguous())

    def forward(self, scores: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """Probability of each expert, never falling with its score within a token.

        Args:
            scores: What experts are ranked by (`EstimatorStack.ranking`), [P, T, E], float.
            pairs: Which pairs the first dimension stands for.

        Returns:
            [P, T, E], float32, 0..1.
        """
        return self.at_margins(decision_margins(scores, self.top_k), pairs)

    def at_margins(self, margins: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """The same from decision margins, [P, T, M] for any M."""
        table = self.probability[pairs]  # [P, B]
        first = self.first_margin[pairs].view(-1, 1, 1)
        place = (margins - first) * self.knots_per_margin[pairs].view(-1, 1, 1)
        place = place.clamp(0, table.shape[1] - 1)
        left = place.floor().clamp(max=table.shape[1] - 2)
        flat = left.long().flatten(1)  # [P, T * M]
        below, above = table.gather(1, flat), table.gather(1, flat + 1)
        return torch.lerp(below, above, (place - left).flatten(1)).view_as(margins)

    def to_tensors(self) -> dict[str, Tensor]:
        """What the constructor takes, besides K."""
        return dict(self.state_dict())

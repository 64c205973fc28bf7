"""One weight a layer: how much a prior is worth beside a predictor's own scores."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.estimators.calibration import membership

WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Tried, in standard deviations of the predictor's scores per unit of the prior."""


def fit_prior_weights(scores: Tensor, prior: Tensor, true_ids: Tensor) -> Tensor:
    """The weight of each pair under which recall at budget K is best.

    Args:
        scores: What experts are ranked by, [P, T, E], float; of tokens to choose by.
        prior: Added to them, times the weight, [P, T, E], float.
        true_ids: Experts the routers chose, [P, T, K], integer.

    Returns:
        [P], float32; 0 where the prior does not help.
    """
    top_k = true_ids.shape[-1]
    is_true = membership(true_ids, scores.shape[-1])
    unit = scores.std(dim=-1).mean(dim=-1)  # [P]
    recalls = []
    for weight in WEIGHTS:
        both = torch.addcmul(scores, prior, (weight * unit).view(-1, 1, 1))
        best = both.topk(top_k, dim=-1).indices
        recalls.append(is_true.gather(-1, best).float().mean(dim=(1, 2)))
    chosen = torch.stack(recalls).argmax(dim=0)  # [P]; the smallest of equals
    return torch.tensor(WEIGHTS, device=scores.device)[chosen] * unit

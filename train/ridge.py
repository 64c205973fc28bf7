"""Ridge regression in closed form: the correction of the next router, all pairs at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from foreroute.estimators import EstimatorStack
from foreroute.estimators.forms.low_rank import LowRank
from foreroute.train.prepared import PreparedBatch

PENALTY = 3e-3
"""Per token and unit of mean square feature."""
CHUNK_TOKENS = 8192


class NormalEquations:
    """Sums that least squares needs, over batches of tokens, for P pairs at once.

    Products are float32 and their sums float64, where the solving is done too.
    """

    def __init__(
        self, num_pairs: int, num_features: int, num_targets: int, device: torch.device
    ) -> None:
        """Start at nothing.

        Args:
            num_pairs: P.
            num_features: D.
            num_targets: E.
            device: Where the batches come from; the sums take 8 P D (D + E) bytes there.
        """

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(num_pairs, rows, columns, dtype=torch.float64, device=device)

        self.squares = zeros(num_features, num_features)  # upper triangle; blocks below stay zero
        self.products = zeros(num_features, num_targets)
        self.feature_sum = zeros(1, num_features)
        self.target_sum = zeros(1, num_targets)
        self.num_tokens = 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Count tokens.

        Args:
            features: [P, T, D], float32.
            targets: [P, T, E], float32.
        """
        half = features.shape[2] // 2
        for start, stop in ((0, half), (half, None)):  # symmetric: no lower left block
            rows = features[..., start:stop].mT
            self.squares[:, start:stop, start:] += rows @ features[..., start:]
        self.products += features.mT @ targets
        self.feature_sum += features.sum(dim=1, keepdim=True)
        self.target_sum += targets.sum(dim=1, keepdim=True)
        self.num_tokens += features.shape[1]

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariance of the features [P, D, D], and with the targets [P, D, E], float64."""
        mean = self.feature_sum / self.num_tokens
        whole = self.squares.triu() + self.squares.triu(1).mT
        squares = whole / self.num_tokens - mean.mT @ mean
        products = self.products / self.num_tokens - mean.mT @ (self.target_sum / self.num_tokens)
        return squares, products

    def solve(self, penalty: float = PENALTY) -> tuple[Tensor, Tensor]:
        """The ridge solution of full rank.

        Args:
            penalty: Per token and unit of mean square feature.

        Returns:
            Weight [P, D, E] and bias [P, 1, E], float64.

        Raises:
            ValueError: If no token was counted, or they determine no solution.
        """
        if self.num_tokens == 0:
            raise ValueError("Ridge regression has no tokens to learn from; collect more.")
        squares, products = self.centred()
        diagonal = self.squares.diagonal(dim1=1, dim2=2).mean(dim=1) / self.num_tokens  # [P]
        squares.diagonal(dim1=1, dim2=2).add_(penalty * diagonal.unsqueeze(1))
        factor, failed = torch.linalg.cholesky_ex(squares)
        if bool(failed.any()):
            raise ValueError(
                "Ridge regression has no solution on these states: are they all zero, or damaged? "
                "Collect the traces again."
            )
        weight = torch.cholesky_solve(products, factor)
        return weight, (self.target_sum - self.feature_sum @ weight) / self.num_tokens

    def solve_low_rank(self, rank: int, penalty: float = PENALTY) -> tuple[Tensor, Tensor, Tensor]:
        """The solution of rank r that is nearest to the full one on the tokens counted.

        Args:
            rank: r, at most E.
            penalty: As in `solve`.

        Returns:
            Down [P, D, r] whose codes have a mean square of about 1, up [P, r, E] and bias
            [P, 1, E], float32.
        """
        weight, bias = self.solve(penalty)
        spread = weight.mT @ self.centred()[0] @ weight  # of what is predicted, [P, E, E]
        strengths, directions = torch.linalg.eigh(spread)
        up = directions[..., -rank:].mT  # [P, r, E]
        scale = strengths[..., -rank:].clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        down = weight @ up.mT / scale.unsqueeze(1)
        return down.float(), (up * scale.unsqueeze(2)).float(), bias.float()


def has_ridge_start(stack: EstimatorStack) -> bool:
    """Whether ridge regression can set the stack's form."""
    return isinstance(stack.form, LowRank)


@torch.no_grad()
def set_to_ridge(stack: EstimatorStack, batches: Iterable[PreparedBatch]) -> None:
    """Set a low-rank form, in place, to what ridge regression gives.

    It learns what the true logits are over the anchor's.

    Args:
        stack: On the device that shall compute.
        batches: Tokens to learn from, on any device.

    Raises:
        ValueError: If there are no tokens, or the form has no low-rank correction.
    """
    if not isinstance(stack.form, LowRank):
        raise ValueError(f"Form {stack.spec.form} has no ridge solution; choose --init zero.")
    form, geometry = stack.form, stack.geometry
    num_pairs, device = len(stack.target_layers), form.down.device
    sums = NormalEquations(num_pairs, geometry.hidden_size, geometry.num_experts, device)
    for batch in batches:
        for part in batch.split(CHUNK_TOKENS):
            here = part.to(device)
            sums.add(here.features.float(), here.target_logits.float() - here.anchor_logits)
    for name, solved in zip(
        ("down", "up", "bias"), sums.solve_low_rank(form.up.shape[1]), strict=True
    ):
        form.get_parameter(name).copy_(solved)

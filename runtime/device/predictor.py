"""Predictions on the GPU: estimators folded into one matrix per layer, ranked by a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foreroute.estimators.calibration import Calibration
from foreroute.estimators.stack import EstimatorStack
from foreroute.estimators.types import InputKind
from foreroute.runtime.device.kernels.predict import predict_logits, rank_experts
from foreroute.runtime.look_ahead import LookAhead

FOLDABLE_INPUTS: tuple[InputKind, ...] = (
    "router-input",
    "residual",
    "quasi-hidden",
    "attention-readout",
)
TOLERANCE = 1e-3
WIDEST_MARGIN, KNOTS_PER_MARGIN = 8, 4


@dataclass(frozen=True, kw_only=True)
class FoldedPair:
    """One pair's estimator as a single affine map of the state before the norm."""

    weight: Tensor
    """[E, D], the norm's weight folded in."""
    bias: Tensor
    """[E], float32."""
    field: str
    """Which field of `SourceState` it reads: `router_input`, `residual` or `readout`."""
    eps: float | None
    """Epsilon of the norm; None where the state is not normed."""
    default_vectors: Tensor | None
    """[E, D]; None unless the input is quasi-hidden."""


class Guess(NamedTuple):
    """What is expected of a coming layer; on the device."""

    expert_ids: Tensor
    """[T, M] int64, most likely first."""
    chances: Tensor
    """How likely each is needed, [T, M] float32."""
    router_logits: Tensor
    """[T, E], as predicted."""


@torch.no_grad()
def fold(stack: EstimatorStack, source_layer: int, dtype: torch.dtype) -> FoldedPair | None:
    """Bring a pair's estimator down to one matrix.

    Args:
        stack: Estimators.
        source_layer: Decoder layer index the pair reads.
        dtype: Of the matrix.

    Returns:
        None if the estimator is not affine, or reads or ranks in another way.
    """
    at = stack.source_layers.index(source_layer)
    pair, part = slice(at, at + 1), stack.parts[stack.part_of_pairs[at]]
    own, is_before_norm = part.input, part.input.kind != "router-input"
    if own.kind not in FOLDABLE_INPUTS or own.selection_bias is not None:
        return None
    if is_before_norm and own.norm_kind not in ("rms", "none"):
        return None
    depth, device = stack.geometry.hidden_size, own.device

    def logits_of(features: Tensor) -> Tensor:
        logits: Tensor = part.logits_of_features(features.unsqueeze(0), pair)
        return logits.squeeze(0)

    bias = logits_of(torch.zeros(1, depth, device=device)).squeeze(0)  # [E]
    weight = (logits_of(torch.eye(depth, device=device)) - bias).T  # [E, D]
    sample = torch.randn(8, depth, generator=torch.Generator().manual_seed(0)).to(device)
    expected = logits_of(sample)
    error = (sample @ weight.T + bias - expected).norm() / expected.norm()
    if error > TOLERANCE:
        return None
    has_norm = is_before_norm and own.norm_kind == "rms"
    if has_norm:
        bias = bias + weight @ own.norm_bias[at]
        weight = weight * own.norm_weight[at]
    vectors = own.default_vectors if own.kind == "quasi-hidden" else None
    return FoldedPair(
        weight=weight.to(dtype).contiguous(),
        bias=bias.contiguous(),
        field=own.needed[0],
        eps=own.norm_eps if has_norm else None,
        default_vectors=None if vectors is None else vectors[at].to(dtype).contiguous(),
    )


class DevicePredictor:
    """Ranks a coming layer's experts and says how likely each is; no host sync."""

    def __init__(self, ahead: LookAhead, dtype: torch.dtype) -> None:
        """Fold what can be folded; the rest runs as it is.

        Args:
            ahead: Estimators, on the engine's device, and what they need.
            dtype: Of folded matrices.
        """
        self.ahead = ahead
        stack = ahead.stack
        self._folded = {layer: fold(stack, layer, dtype) for layer in stack.source_layers}
        calibration = stack.calibration
        self._tables = {
            layer: _table(calibration, pair, stack)
            for pair, layer in enumerate(stack.source_layers)
        }

    @property
    def num_folded(self) -> int:
        """Layer pairs predicted by the kernel."""
        return sum(folded is not None for folded in self._folded.values())

    def predict(
        self,
        source_layer: int,
        *,
        residual: Tensor | None,
        router_input: Tensor,
        expert_ids: Tensor,
        gate_weights: Tensor,
    ) -> Guess:
        """Rank the target layer's experts.

        Args:
            source_layer: Decoder layer index the tensors come from.
            residual: [T, D].
            router_input: [T, D].
            expert_ids: The layer's own routing, [T, K].
            gate_weights: [T, K].
        """
        stack, readouts = self.ahead.stack, self.ahead.readouts
        readout = None
        if readouts is not None and residual is not None:
            readout = readouts.read(
                source_layer, residual=residual, expert_ids=expert_ids, gate_weights=gate_weights
            )
        folded = self._folded[source_layer]
        if folded is None:
            logits = stack.predict(
                source_layer,
                residual=residual,
                router_input=router_input,
                expert_ids=expert_ids,
                gate_weights=gate_weights,
                readout=readout,
            )
            scores = stack.ranking(logits, source_layer).float().contiguous()
        else:
            states = {"residual": residual, "router_input": router_input, "readout": readout}
            state = states[folded.field]
            assert state is not None
            logits = scores = predict_logits(
                state.contiguous(),
                folded.weight,
                folded.bias,
                eps=folded.eps,
                default_vectors=folded.default_vectors,
                expert_ids=expert_ids.contiguous(),
                gate_weights=gate_weights.contiguous(),
            )
        table, top_k = self._tables[source_layer], stack.geometry.top_k
        ranked = rank_experts(scores, *table, top_k=top_k, budget=self.ahead.budget)
        return Guess(*ranked, logits)


def _table(
    calibration: Calibration | None, pair: int, stack: EstimatorStack
) -> tuple[Tensor, Tensor, Tensor]:
    """First margin [1], knots per margin [1] and probabilities [B] of one pair.

    Without a calibration logits are taken for log-odds.
    """
    if calibration is not None:
        one = slice(pair, pair + 1)
        first, density = calibration.first_margin[one], calibration.knots_per_margin[one]
        return first.contiguous(), density.contiguous(), calibration.probability[pair].contiguous()
    device = stack.input.device if len(stack.parts) == 1 else stack.parts[0].input.device
    knots = 2 * WIDEST_MARGIN * KNOTS_PER_MARGIN + 1
    margins = torch.linspace(-WIDEST_MARGIN, WIDEST_MARGIN, knots, device=device)
    return (
        margins[:1].contiguous(),
        torch.full((1,), KNOTS_PER_MARGIN, device=device).float(),
        (margins.sigmoid()),
    )

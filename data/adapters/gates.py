"""How gate weights follow from router logits: the rules known, and which one a model keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foreroute.data.adapters.probe import Observed
from foreroute.estimators.selection import gate_weights
from foreroute.estimators.types import GateFamily

RELATIVE_TOLERANCE = 1e-3  # and two roundings in the dtype of logits or weights
SCALE_TOLERANCE = 3e-4


def find_gate_rule(layers: Sequence[Observed]) -> tuple[GateFamily, float]:
    """The rule that best gives the gate weights the probe saw in all layers, found by trying each.

    Returns:
        The family and its scale; `other` and 1 if none fits.
    """
    true = torch.cat([seen.gate_weights.float() for seen in layers])  # [L * T, K]
    unknown = GateFamily.OTHER, 1.0
    if all(map(_is_weighed_before, layers)):
        return unknown
    dtypes = {seen.gate_weights.dtype for seen in layers}
    dtypes |= {seen.router_logits.dtype for seen in layers if seen.router_logits is not None}
    tolerance = RELATIVE_TOLERANCE + 2 * max(torch.finfo(dtype).eps for dtype in dtypes)
    best: tuple[float, GateFamily, float] = (tolerance, GateFamily.OTHER, 1.0)
    for family in GateFamily:
        if family is GateFamily.OTHER:
            continue
        parts = [
            gate_weights(seen.router_logits, seen.expert_ids.long(), family)
            for seen in layers
            if seen.router_logits is not None
        ]
        if len(parts) < len(layers):
            return GateFamily.OTHER, 1.0
        weights = torch.cat(parts)
        scale = _rounded(float(true.sum() / weights.sum()))
        error = float((weights * scale / true - 1).abs().max())
        if error < best[0]:
            best = (error, family, scale)
    return best[1:]


def _is_weighed_before(seen: Observed) -> bool:
    """Whether one expert reads each token, times its score, so that its output needs no weight."""
    weights, read, routed = seen.gate_weights, seen.experts_input, seen.router_input
    is_scaled = read.shape == routed.shape and not torch.equal(read, routed)
    return weights.shape[-1] == 1 and is_scaled and bool((weights == 1).all())


def _rounded(scale: float) -> float:
    """The scale without the rounding of the tensors it was measured on."""
    for digits in range(5):
        rounded = round(scale, digits)
        if rounded and abs(scale / rounded - 1) < SCALE_TOLERANCE:
            return rounded
    return scale

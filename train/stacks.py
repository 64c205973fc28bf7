"""Makes fresh estimators for the model that was recorded."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec, EstimatorStack


def build_stack(
    traces: Traces, spec: EstimatorSpec, default_vectors: Tensor, device: torch.device
) -> EstimatorStack:
    """A fresh stack of a spec for the model that was recorded.

    Args:
        traces: Give the geometry, the anchors, and a readout's own default vectors.
        spec: What to predict, from what, in which form.
        default_vectors: Of all L MoE layers, [L, E, D], for quasi-hidden input.
        device: Where it shall live.
    """
    is_readout = spec.input_kind == "attention-readout"
    vectors = traces.readout_vectors() if is_readout else default_vectors
    return EstimatorStack.build(traces.geometry, spec, traces.anchors, vectors).to(device)

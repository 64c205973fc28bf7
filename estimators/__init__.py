"""What predicts what: the shape of routing, estimator forms, metrics. Needs torch (and safetensors)."""

from foreroute.estimators.types import (
    EstimatorSpec,
    ExpertKey,
    LayerAnchors,
    MoEGeometry,
    RoutingRecord,
)

__all__ = ["EstimatorSpec", "ExpertKey", "LayerAnchors", "MoEGeometry", "RoutingRecord"]

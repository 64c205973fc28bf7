"""What `foreroute.estimators` offers by name, apart from it, so that it can be loaded later."""

from foreroute.estimators.forms import FORMS, TRAINING_FREE_FORM, EstimatorForm, find_form
from foreroute.estimators.inputs import SOURCE_FIELDS, SourceInput, SourceState
from foreroute.estimators.metrics import (
    RecallMeter,
    RecallMetrics,
    default_budgets,
    exact_set,
    gate_mass_recall,
    recall_at_k,
)
from foreroute.estimators.pairs import parse_layers, predictable_layers, source_position
from foreroute.estimators.selection import gate_weights, router_scores, selection_scores
from foreroute.estimators.stack import EstimatorStack
from foreroute.estimators.types import (
    EstimatorSpec,
    InputKind,
    LayerAnchors,
    MoEGeometry,
    RoutingRecord,
)

__all__ = [
    "FORMS",
    "SOURCE_FIELDS",
    "TRAINING_FREE_FORM",
    "EstimatorForm",
    "EstimatorSpec",
    "EstimatorStack",
    "InputKind",
    "LayerAnchors",
    "MoEGeometry",
    "RecallMeter",
    "RecallMetrics",
    "RoutingRecord",
    "SourceInput",
    "SourceState",
    "default_budgets",
    "exact_set",
    "find_form",
    "gate_mass_recall",
    "gate_weights",
    "parse_layers",
    "predictable_layers",
    "recall_at_k",
    "router_scores",
    "selection_scores",
    "source_position",
]

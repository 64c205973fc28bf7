"""Estimator forms by name. Adding one is one file here and one line in `FORMS`."""

from __future__ import annotations

from foreroute.estimators.artifacts import shown
from foreroute.estimators.forms.base import EstimatorForm
from foreroute.estimators.forms.linear import Linear
from foreroute.estimators.forms.low_rank import LowRank
from foreroute.estimators.forms.mlp import MLP
from foreroute.estimators.forms.mlp_free import MLPFree
from foreroute.estimators.forms.next_router import NextRouter
from foreroute.estimators.forms.ridge import Ridge
from foreroute.estimators.forms.shared_mlp import SharedMLP

TRAINING_FREE_FORM = "next-router"

FORMS: dict[str, type[EstimatorForm]] = {
    TRAINING_FREE_FORM: NextRouter,
    "low-rank": LowRank,
    "ridge": Ridge,
    "linear": Linear,
    "mlp": MLP,
    "mlp-free": MLPFree,
    "shared-mlp": SharedMLP,
}
FREE_FORMS = tuple(name for name, form in FORMS.items() if not form.is_anchored)
"""Forms without an anchor: what can be trained where routers cannot be copied."""


def find_form(name: str) -> type[EstimatorForm]:
    """The form of that name.

    Raises:
        ValueError: If there is none; the message lists the known names.
    """
    if name not in FORMS:
        raise ValueError(f"Unknown estimator form {shown(name)}; known forms: {', '.join(FORMS)}.")
    return FORMS[name]


__all__ = ["FORMS", "FREE_FORMS", "TRAINING_FREE_FORM", "EstimatorForm", "find_form"]

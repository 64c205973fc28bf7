"""`predicted`: the experts predicted from an earlier layer run in place of the router's."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from foreroute.runtime.on_miss.choice import RouterChoice
from foreroute.runtime.on_miss.rule import Weights


def predicted_choice(
    choice: RouterChoice, ranked: Tensor, router_logits: Tensor, weights: Weights
) -> RouterChoice:
    """A choice of the predicted experts.

    Args:
        choice: The router's.
        ranked: Predicted experts, most likely first, [T, at least K].
        router_logits: As predicted, [T, E].
        weights: By which logits they are weighed.

    Returns:
        The choice, with those logits.
    """
    ids = ranked[:, : choice.expert_ids.shape[-1]]
    logits = choice.logits if weights == "true-weights" else router_logits
    given = choice.gates.weights(logits, ids).to(choice.gate_weights.dtype)
    return dataclasses.replace(choice, expert_ids=ids, gate_weights=given, router_logits=logits)

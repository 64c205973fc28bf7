"""What a rule needs to know of a model: how its routers weigh experts, which layers stay exact."""

from __future__ import annotations

import torch

from foreroute.data.adapters import MoEModel
from foreroute.estimators.pairs import parse_layers
from foreroute.estimators.selection import router_scores
from foreroute.estimators.types import MoEGeometry
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.on_miss.choice import Gates
from foreroute.runtime.on_miss.rule import MissRule


def gates_of(moe: MoEModel, rule: MissRule) -> list[Gates]:
    """How each layer's router ranks and weighs experts, [L].

    Args:
        moe: The model.
        rule: What will be done with it.

    Raises:
        ValueError: If the rule weighs experts that a router did not choose, and this model's
            routers do so in a way that is not known.
    """
    geometry, anchors = moe.geometry, moe.found_anchors
    if rule.needs_scores:  # refuse unknown ones before anything runs
        router_scores(torch.zeros(1, 1), geometry.gate_family)
    if (rule.bonus or rule.is_replacing) and anchors is None:
        raise ValueError(
            f"on_miss={rule.text} ranks experts as the routers do, which is not known here: "
            f"{moe.anchors_problem}. Use on_miss=fetch or skip."
        )
    biases = None if anchors is None else anchors.selection_bias
    return [
        Gates(
            family=geometry.gate_family,
            scale=geometry.gate_scale,
            selection_bias=None if biases is None else biases[place].to(moe.model.device),
        )
        for place in range(geometry.num_layers)
    ]


def exact_layers_of(config: EngineConfig, geometry: MoEGeometry) -> frozenset[int]:
    """Decoder layer indices that fetch whatever the rule.

    Args:
        config: Names them.
        geometry: The model's routing.

    Raises:
        ValueError: If a name is no MoE layer.
    """
    if not config.exact_layers:
        return frozenset()
    return frozenset(parse_layers(config.exact_layers, geometry, 0, "exact_layers"))

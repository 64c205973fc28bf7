"""Which layer predicts which: pairs of source and target layer, a horizon apart."""

from __future__ import annotations

from foreroute.estimators.types import MoEGeometry


def predictable_layers(geometry: MoEGeometry, horizon: int) -> tuple[int, ...]:
    """Decoder layer indices that have a source layer `horizon` MoE layers before them.

    Raises:
        ValueError: If there is none.
    """
    if horizon >= geometry.num_layers:
        raise ValueError(
            f"Horizon {horizon} needs at least {horizon + 1} MoE layers; "
            f"{geometry.describe()} has {geometry.num_layers}. Choose a smaller --horizon."
        )
    return geometry.layer_indices[horizon:]


def source_position(geometry: MoEGeometry, target_layer: int, horizon: int) -> int:
    """Position (0..L-1) of the MoE layer that a target layer is predicted from.

    Args:
        geometry: The model's routing.
        target_layer: Decoder layer index of the predicted layer.
        horizon: Distance in MoE layers.

    Raises:
        ValueError: If the target is not an MoE layer, or has no source.
    """
    position = geometry.position(target_layer) - horizon
    if position < 0:
        raise ValueError(
            f"Layer {target_layer} cannot be predicted: it has no MoE layer {horizon} before it to "
            f"predict from. Layers that can be: {list(predictable_layers(geometry, horizon))}."
        )
    return position

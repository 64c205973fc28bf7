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


def parse_layers(
    text: str, geometry: MoEGeometry, horizon: int, flag: str = "--layers"
) -> tuple[int, ...]:
    """Turn what a user typed for `--layers` into target layers, ascending.

    Args:
        text: `all`, or decoder layer indices: `3`, `3,4`, `3-7`, `1,3-7`. A range takes the MoE
            layers in it.
        geometry: The model's routing.
        horizon: Distance from source to target layer, in MoE layers.
        flag: How the user calls it, for messages.

    Raises:
        ValueError: If it cannot be read, or a layer has no experts or no source layer.
    """
    if text.strip() == "all":
        return predictable_layers(geometry, horizon)
    wanted: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            start, stop = int(first), int(last or first)
        except ValueError:
            raise ValueError(
                f"{flag} {text!r} is not understood; write all, 3, 3,4 or 3-7."
            ) from None
        if stop < start:
            raise ValueError(f"{flag} {part.strip()!r} runs backwards; write {stop}-{start}.")
        geometry.position(start)
        geometry.position(stop)
        wanted |= {layer for layer in geometry.layer_indices if start <= layer <= stop}
    for layer in wanted:
        source_position(geometry, layer, horizon)
    return tuple(sorted(wanted))

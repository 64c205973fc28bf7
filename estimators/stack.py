"""Estimators of all layer pairs in one module: stacked parameters, one call or one pair."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from foreroute.estimators.calibration import Calibration
from foreroute.estimators.forms import FORMS, TRAINING_FREE_FORM, find_form
from foreroute.estimators.inputs import ALL_PAIRS, SourceInput, SourceState
from foreroute.estimators.pairs import predictable_layers, source_position
from foreroute.estimators.selection import selection_scores
from foreroute.estimators.types import (
    EstimatorSpec,
    InputKind,
    LayerAnchors,
    MoEGeometry,
    NormKind,
)


class EstimatorStack(nn.Module):
    """Predicts the routing of P target layers, each from its source layer; float32 inside."""

    def __init__(
        self,
        geometry: MoEGeometry,
        spec: EstimatorSpec,
        anchors: LayerAnchors | None,
        default_vectors: Tensor | None = None,
        is_trained: Sequence[bool] | None = None,
    ) -> None:
        """Keep the parts; `build` makes them.

        Args:
            geometry: The model's routing.
            spec: Form, input kind, horizon and target layers (P of them).
            anchors: The P target layers' ones in the spec's order (`build` takes all layers'); None
                for a model whose routers have no known form, which leaves forms without an anchor.
            default_vectors: Of the P source layers, [P, E, D]; only quasi-hidden input needs them.
            is_trained: Per pair, whether the form is used; where not, the training-free logits of
                the same input are returned (hybrid). All of them if None.

        Raises:
            ValueError: If the form is unknown, a target layer has no source, or tensors do not fit.
        """
        super().__init__()
        self.geometry, self.spec, self.target_layers = geometry, spec, spec.target_layers
        sources = (source_position(geometry, t, spec.horizon) for t in spec.target_layers)
        self.source_layers = tuple(geometry.layer_indices[position] for position in sources)
        self._pair_of = {source: pair for pair, source in enumerate(self.source_layers)}
        num_pairs = len(self.target_layers)
        self.is_trained = tuple(is_trained if is_trained is not None else [True] * num_pairs)
        form = find_form(spec.form)
        if anchors is None and (form.is_anchored or not all(self.is_trained)):
            free = [name for name, known in FORMS.items() if not known.is_anchored]
            raise ValueError(
                f"Form {spec.form} starts from the routers' own norm and weights, which are not "
                f"known for {geometry.describe()}; choose --form {' or '.join(free)}."
            )
        self.input = SourceInput(spec.input_kind, anchors, default_vectors)
        self._require_shapes()
        self.form = form(
            spec,
            num_pairs=num_pairs,
            hidden_size=geometry.hidden_size,
            num_experts=geometry.num_experts,
        )
        self.calibration: Calibration | None = None

    @classmethod
    def build(
        cls,
        geometry: MoEGeometry,
        spec: EstimatorSpec,
        anchors: LayerAnchors | None,
        default_vectors: Tensor | None = None,
    ) -> EstimatorStack:
        """A fresh stack from the tensors of all MoE layers.

        Args:
            geometry: The model's routing.
            spec: What to predict.
            anchors: Of all L MoE layers; see the class.
            default_vectors: Of all L MoE layers, [L, E, D], float; see the class.
        """
        targets = [geometry.position(layer_idx) for layer_idx in spec.target_layers]
        sources = [source_position(geometry, t, spec.horizon) for t in spec.target_layers]
        of_targets = None if anchors is None else anchors.of(targets)
        of_sources = None if default_vectors is None else default_vectors[sources]
        return cls(geometry, spec, of_targets, of_sources)

    @classmethod
    def training_free(
        cls,
        geometry: MoEGeometry,
        anchors: LayerAnchors,
        *,
        horizon: int = 1,
        input_kind: InputKind = "residual",
        default_vectors: Tensor | None = None,
    ) -> EstimatorStack:
        """The next router for every layer that has a source, from the model's own tensors alone.

        Args:
            geometry: The model's routing.
            anchors: Of all L MoE layers.
            horizon: Distance from source to target layer, in MoE layers.
            input_kind: What the routers are applied to.
            default_vectors: Of all L MoE layers, [L, E, D], float; only quasi-hidden needs them.
        """
        spec = EstimatorSpec(
            form=TRAINING_FREE_FORM,
            input_kind=input_kind,
            horizon=horizon,
            target_layers=predictable_layers(geometry, horizon),
        )
        return cls.build(geometry, spec, anchors, default_vectors)

    @classmethod
    def from_tensors(
        cls,
        geometry: MoEGeometry,
        spec: EstimatorSpec,
        tensors: Mapping[str, Tensor],
        *,
        norm_kind: NormKind,
        norm_eps: float,
        is_trained: Sequence[bool] | None = None,
    ) -> EstimatorStack:
        """Rebuild from `to_tensors`' output.

        Raises:
            ValueError: If tensors are missing, left over, or of another shape.
        """
        given = {name.removeprefix("input."): t for name, t in tensors.items() if "input." in name}
        vectors = given.pop("default_vectors", None)
        try:
            anchors = (
                LayerAnchors(**given, norm_kind=norm_kind, norm_eps=norm_eps) if given else None
            )
            with torch.device("meta"):  # no memory and no random numbers for what is replaced
                stack = cls(geometry, spec, anchors, vectors, is_trained)
            stack.load_state_dict(dict(tensors), assign=True)
        except (TypeError, RuntimeError, IndexError, OverflowError) as error:
            raise ValueError(f"Estimator tensors do not fit {spec}: {error}") from error
        return stack

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything `from_tensors` needs besides the geometry, the spec and the norm's kind.

        The calibration is not among it; it has its own `to_tensors`.
        """
        tensors = self.state_dict()
        return {name: t for name, t in tensors.items() if not name.startswith("calibration.")}

    def forward(self, source: SourceState) -> Tensor:
        """Predict all pairs at once.

        Args:
            source: What the source layers saw, stacked over the P pairs.

        Returns:
            Predicted router logits of the target layers, [P, T, E], float32.
        """
        return self._logits(source, ALL_PAIRS)

    def predict(
        self,
        source_layer: int,
        *,
        residual: Tensor | None = None,
        router_input: Tensor | None = None,
        expert_ids: Tensor | None = None,
        gate_weights: Tensor | None = None,
        readout: Tensor | None = None,
        layer_input: Tensor | None = None,
    ) -> Tensor:
        """Predict one pair while the model runs: no host sync, parameters used as views.

        Args:
            source_layer: Decoder layer index the tensors come from; one of `source_layers`.
            residual: [T, D], float. Needed by `residual` and `quasi-hidden` input.
            router_input: [T, D], float. Needed by `router-input`.
            expert_ids: [T, K], integer. Needed by `quasi-hidden`.
            gate_weights: [T, K], float. Needed by `quasi-hidden`.
            readout: [T, D], float. Needed by `attention-readout`.
            layer_input: [T, D], float. Needed by `pre-attention`.

        Returns:
            Predicted router logits of `target_of(source_layer)`, [T, E], float32.

        Raises:
            ValueError: If nothing is predicted from that layer, or a needed tensor is missing.
        """
        pair = self._pair_of.get(source_layer)
        if pair is None:
            raise ValueError(
                f"No estimator reads layer {source_layer}; sources are {list(self.source_layers)}."
            )
        fields = (residual, router_input, expert_ids, gate_weights, readout, layer_input)
        source = SourceState(*(None if field is None else field.unsqueeze(0) for field in fields))
        return self._logits(source, slice(pair, pair + 1)).squeeze(0)

    def ranking(self, logits: Tensor, source_layer: int | None = None) -> Tensor:
        """Scores whose order is the order in which the target routers would choose.

        Those are the logits themselves, but for models with a selection bias.

        Args:
            logits: As `forward` gives them, [P, T, E], or as `predict` does, [T, E].
            source_layer: What `predict` was asked for; None for all pairs.

        Returns:
            Of the same shape; the logits themselves where their order is the routers'.
        """
        bias = self.input.selection_bias  # [P, E]
        if bias is None:
            return logits
        bias = bias.unsqueeze(1) if source_layer is None else bias[self._pair_of[source_layer]]
        return selection_scores(logits, self.geometry.gate_family, bias)

    def probabilities(self, logits: Tensor, source_layer: int | None = None) -> Tensor:
        """How likely each expert is among the target layers' top K.

        Args:
            logits: As `forward` gives them, [P, T, E], or as `predict` does, [T, E].
            source_layer: What `predict` was asked for; None for all pairs.

        Returns:
            Of the same shape, float32, 0..1, in the order of `ranking`.

        Raises:
            ValueError: If there is no calibration; only exported estimators have one.
        """
        if self.calibration is None:
            raise ValueError("These estimators are not calibrated; export-estimator does that.")
        scores = self.ranking(logits, source_layer)
        if source_layer is None:
            return self.calibration(scores)  # type: ignore[no-any-return]
        pair = self._pair_of[source_layer]
        return self.calibration(scores.unsqueeze(0), slice(pair, pair + 1)).squeeze(0)  # type: ignore[no-any-return]

    def with_trained(self, is_trained: Sequence[bool]) -> EstimatorStack:
        """The same estimators (tensors are shared) with the form used for other pairs."""
        other = copy.copy(self)
        other._modules = self._modules.copy()  # its calibration may become another
        other.is_trained = tuple(is_trained)
        return other

    @property
    def parts(self) -> tuple[EstimatorStack, ...]:
        """The stacks that hold its tensors: itself alone, unless it is a hybrid."""
        return (self,)

    @property
    def part_of_pairs(self) -> tuple[int, ...]:
        """Which of its parts predicts each pair, [P]."""
        return (0,) * len(self.target_layers)

    def input_of(self, source_layer: int) -> tuple[SourceInput, int]:
        """What one pair reads: the input of its part, and the pair's place there.

        Args:
            source_layer: One of `source_layers`.
        """
        pair = self._pair_of[source_layer]
        return self.parts[self.part_of_pairs[pair]].input, pair

    @property
    def input_fields(self) -> tuple[str, ...]:
        """Fields of `SourceState` that it reads."""
        return self.input.needed

    def target_of(self, source_layer: int) -> int | None:
        """Decoder layer index predicted from a layer; None if nothing is."""
        pair = self._pair_of.get(source_layer)
        return None if pair is None else self.target_layers[pair]

    def _logits(self, source: SourceState, pairs: slice) -> Tensor:
        return self.logits_of_features(self.input.features(source, pairs), pairs)

    def logits_of_features(self, features: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """Predict from what the forms read.

        Args:
            features: As `SourceInput.features` gives them, [P, T, D], float32.
            pairs: Which pairs the first dimension stands for.

        Returns:
            [P, T, E], float32.
        """
        used = self.is_trained[pairs]
        anchor_logits = self.anchor_logits(features, pairs)
        if not any(used):
            return anchor_logits
        logits: Tensor = self.form(features, anchor_logits, pairs)
        if all(used):
            return logits
        mask = torch.tensor(used, device=logits.device).view(-1, 1, 1)
        return torch.where(mask, logits, anchor_logits)

    def anchor_logits(self, features: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """What the form is anchored on; nothing is computed if no pair needs it.

        Args:
            features: [P, T, D], float32.
            pairs: Which pairs the first dimension stands for.

        Returns:
            The target routers' logits for the features, [P, T, E], float32; empty, [P, T, 0], if
            the form has no anchor and is used for all of these pairs.
        """
        if self.form.is_anchored or not all(self.is_trained[pairs]):
            return self.input.anchor_logits(features, pairs)
        return features[..., :0]

    def _require_shapes(self) -> None:
        pairs, experts = len(self.target_layers), self.geometry.num_experts
        hidden = self.geometry.hidden_size
        expected = {
            "router_weight": (pairs, experts, hidden),
            "router_bias": (pairs, experts),
            "selection_bias": (pairs, experts),
            "norm_weight": (pairs, hidden),
            "norm_bias": (pairs, hidden),
            "default_vectors": (pairs, experts, hidden),
        }
        for name, tensor in self.input.named_buffers():
            if tensor.shape != expected[name]:
                raise ValueError(
                    f"Expected {name} of shape {list(expected[name])}, got {list(tensor.shape)}."
                )
        if len(self.is_trained) != pairs or pairs == 0:
            raise ValueError(
                f"Expected at least one target layer and as many is_trained flags, "
                f"got {pairs} layers and {len(self.is_trained)} flags."
            )

"""What every room agrees on: a model's routing shape, one layer's routing, an estimator's kind.

Symbols, used in every shape comment: T tokens, D hidden size, E experts per layer, K top-k, L MoE
layers, P (source, target) layer pairs, M budget, H horizon in MoE layers, S cache slots per layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor

from foreroute.estimators.artifacts import Count
from foreroute.estimators.fingerprint import is_same_checkpoint

NormKind = Literal["rms", "layer", "none"]
MOST_EXPERTS = 32767
"""Per layer: ids are stored as int16."""
MOST_FEATURES = 1 << 20
"""Larger hidden sizes than any model has are damage, not models."""
MOST_LAYERS = 1 << 14
"""The same of decoder layers."""
InputKind = Literal[
    "router-input", "residual", "quasi-hidden", "attention-readout", "pre-attention"
]


ScoreKind = Literal["softmax", "sigmoid", "sqrtsoftplus"]


class GateFamily(StrEnum):
    """How a model's gate weights follow from its router logits."""

    SOFTMAX = "softmax-topk"
    SOFTMAX_RENORM = "softmax-topk-renorm"
    SIGMOID = "sigmoid-topk"
    SIGMOID_RENORM = "sigmoid-topk-renorm"
    SQRTSOFTPLUS_RENORM = "sqrtsoftplus-topk-renorm"
    OTHER = "other"
    """In a way that is not known here."""

    @property
    def scores(self) -> ScoreKind | None:
        """What logits become before experts are chosen; None if that is not known."""
        kinds: dict[str, ScoreKind] = {kind: kind for kind in get_args(ScoreKind)}
        return kinds.get(self.value.partition("-")[0])

    @property
    def is_renormalised(self) -> bool:
        """Whether the gate weights of a token are divided by their sum."""
        return self.value.endswith("-renorm")


@dataclass(frozen=True, kw_only=True)
class MoEGeometry:
    """The shape of a model's routing; equality is the check that traces, bundle and model fit."""

    model_type: str
    """`config.model_type` of the (text) model."""
    layer_indices: tuple[int, ...]
    """Decoder layer index of each MoE layer, ascending, length L."""
    num_experts: int
    """E, experts per MoE layer."""
    top_k: int
    """K, experts each token is routed to."""
    hidden_size: int
    """D, width of the router's input."""
    router_fingerprint: str
    """Names the checkpoint, whatever dtype it is loaded in: `fingerprint_of` its routers."""
    gate_family: GateFamily = field(default=GateFamily.OTHER, compare=False)
    """How gate weights follow from router logits, as verified on the model."""
    gate_scale: float = field(default=1.0, compare=False)
    """Factor on all gate weights."""
    model_name: str = field(default="", compare=False)
    """What the user called the model (folder, Hub id or `bundled`); for messages only."""

    def __post_init__(self) -> None:
        """Read the gate family, which may be text, and check that the numbers fit each other.

        Raises:
            ValueError: If they do not describe a model.
        """
        object.__setattr__(self, "gate_family", GateFamily(self.gate_family))
        layers = self.layer_indices
        if not layers or layers[0] < 0 or any(b <= a for a, b in pairwise(layers)):
            raise ValueError(f"expected ascending layer_indices, got {list(layers)[:9]}")
        if not 1 <= self.top_k <= self.num_experts <= MOST_EXPERTS:
            raise ValueError(
                f"expected top_k of 1 to num_experts, and that to be at most {MOST_EXPERTS}, got "
                f"{self.top_k} of {self.num_experts}"
            )
        if not 1 <= self.hidden_size <= MOST_FEATURES or layers[-1] > MOST_LAYERS:
            raise ValueError(
                f"expected hidden_size of 1 to {MOST_FEATURES} and layers up to {MOST_LAYERS}, got "
                f"{self.hidden_size} and {layers[-1]}"
            )

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.layer_indices)

    def position(self, layer_idx: int) -> int:
        """Position (0..L-1) of a decoder layer among the MoE layers.

        Raises:
            ValueError: If that decoder layer has no experts.
        """
        if layer_idx not in self.layer_indices:
            raise ValueError(
                f"Layer {layer_idx} is not an MoE layer of {self.model_name or self.model_type}; "
                f"its MoE layers are {list(self.layer_indices)}."
            )
        return self.layer_indices.index(layer_idx)

    def describe(self) -> str:
        """One line for messages: name, layers, experts, top-k, fingerprint."""
        return (
            f"{self.model_name or self.model_type} ({self.num_layers} MoE layers, "
            f"{self.num_experts} experts, top-{self.top_k}, hidden {self.hidden_size}, "
            f"routers {self.router_fingerprint[:8]})"
        )

    def require_match(self, other: MoEGeometry, *, what: str, remedy: str) -> None:
        """Refuse an artifact that was made for another model.

        Args:
            other: Geometry of the model at hand.
            what: What this geometry belongs to, as a message's subject (`Bundle`, `Traces`).
            remedy: What the user can do, one sentence.

        Raises:
            ValueError: If the two differ; the message describes both.
        """
        rounded = dataclasses.replace(self, router_fingerprint=other.router_fingerprint)
        near = is_same_checkpoint(self.router_fingerprint, other.router_fingerprint)
        if rounded != other or not near:
            raise ValueError(
                f"{what} made for {self.describe()}; this model is {other.describe()}. {remedy}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, which `read_json` rebuilds."""
        return dataclasses.asdict(self) | {"layer_indices": list(self.layer_indices)}


@dataclass(frozen=True, kw_only=True)
class LayerAnchors:
    """The frozen tensors that training-free prediction needs, stacked over the MoE layers.

    `norm(x, position) @ router_weight[position].T + router_bias[position]` are the router logits
    that layer would give for residual `x`.
    """

    router_weight: Tensor
    """[L, E, D], any float dtype."""
    router_bias: Tensor
    """[L, E]; zeros where the routers have none."""
    norm_weight: Tensor
    """[L, D], the factor actually multiplied (models that store weight - 1 are resolved)."""
    norm_bias: Tensor
    """[L, D]; zeros where the norms have none."""
    norm_kind: NormKind
    """`rms`, `layer` (LayerNorm), or `none` (the router reads the raw residual)."""
    norm_eps: float
    """Added to the variance."""
    selection_bias: Tensor | None = None
    """[L, E], added to the routers' scores (not to their logits) when experts are chosen, and to
    nothing else; None if the model has none. `selection_scores` ranks with it."""

    def of(self, positions: Sequence[int]) -> LayerAnchors:
        """Those of some of the layers.

        Args:
            positions: 0..L-1 of each wanted layer, in the order wanted.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        chosen: dict[str, Any] = {name: t[list(positions)] for name, t in tensors.items()}
        return dataclasses.replace(self, **chosen)


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """What one MoE layer saw and decided for T tokens, in token order; all on one device."""

    residual: Tensor
    """Residual stream after attention, before the norm that feeds the router, [T, D], float."""
    router_input: Tensor
    """That, after the norm, [T, D], float."""
    router_logits: Tensor
    """The router's output before softmax, [T, E], float."""
    expert_ids: Tensor
    """The experts the model used, [T, K], integer, in the router's own order."""
    gate_weights: Tensor
    """What each expert's output was multiplied with, [T, K], float."""
    layer_input: Tensor | None = None
    """Residual stream that enters the decoder layer, before its attention, [T, D], float."""
    readout: Tensor | None = None
    """The next MoE layer's `residual`, made early by its own attention on this layer's residual
    plus the expected output of its experts, [T, D], float."""

    def __len__(self) -> int:
        """T, the number of tokens."""
        return self.expert_ids.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of its fields that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __getitem__(self, rows: slice | Tensor) -> RoutingRecord:
        """The same for some of the tokens (a slice, an index tensor or a boolean mask)."""
        return RoutingRecord(**{name: tensor[rows] for name, tensor in self.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class EstimatorSpec:
    """What an estimator predicts, from what, and in which form."""

    form: str
    """Name of a form in `foreroute.estimators.forms`."""
    input_kind: InputKind = "quasi-hidden"
    """State at the source layer that the estimator reads."""
    horizon: Count = 1
    """Distance from source to target layer, in MoE layers; 0 with `pre-attention` input, or where
    the next token is predicted."""
    tokens_ahead: Count = 0
    """Tokens from the one that is read to the one that is predicted, 0 or 1."""
    rank: Count = 64
    """Rank of the correction (`low-rank` and `ridge` only)."""
    width: Count = 256
    """Hidden units of a layer (`mlp`, `mlp-free` and `shared-mlp` only)."""
    depth: Count = 1
    """Hidden layers (`shared-mlp` only)."""
    target_layers: tuple[int, ...] = ()
    """Decoder layer index of each predicted layer, ascending, length P."""

    def __post_init__(self) -> None:
        """Check the numbers a user can set."""
        for name in ("rank", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.tokens_ahead not in (0, 1):
            raise ValueError(f"tokens_ahead must be 0 or 1, not {self.tokens_ahead}.")
        least = 0 if self.input_kind == "pre-attention" or self.tokens_ahead else 1
        if self.horizon < least:
            raise ValueError(
                f"horizon must be at least {least} with {self.input_kind} input, not "
                f"{self.horizon}; only pre-attention input predicts its own layer (horizon 0)."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, which `read_json` rebuilds."""
        return dataclasses.asdict(self) | {"target_layers": list(self.target_layers)}

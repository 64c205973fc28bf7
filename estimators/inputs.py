"""What an estimator reads at its source layer, and the training-free logits that follow from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreroute.estimators.types import InputKind, LayerAnchors, NormKind

ALL_PAIRS = slice(None)
ANCHOR_BUFFERS = ("router_weight", "router_bias", "selection_bias", "norm_weight", "norm_bias")

SOURCE_FIELDS: dict[InputKind, tuple[str, ...]] = {
    "router-input": ("router_input",),
    "residual": ("residual",),
    "quasi-hidden": ("residual", "expert_ids", "gate_weights"),
    "attention-readout": ("readout",),
    "pre-attention": ("layer_input",),
}
"""The fields of `SourceState` that each input kind reads at the source layer."""


class SourceState(NamedTuple):
    """What the source layers of P pairs saw and decided; fields no one reads may be None."""

    residual: Tensor | None = None
    """Residual stream before the norm that feeds the router, [P, T, D], float."""
    router_input: Tensor | None = None
    """That, after the norm, [P, T, D], float."""
    expert_ids: Tensor | None = None
    """The experts chosen at the source layers, [P, T, K], integer."""
    gate_weights: Tensor | None = None
    """What each expert's output was multiplied with, [P, T, K], float."""
    readout: Tensor | None = None
    """The target layers' residual as their own attention gives it when run early, on the source
    layers' quasi-hidden residual, [P, T, D], float."""
    layer_input: Tensor | None = None
    """Residual stream that enters the source layers, before their attention, [P, T, D], float."""


def apply_norm(
    residual: Tensor, weight: Tensor, bias: Tensor, *, kind: NormKind, eps: float
) -> Tensor:
    """The norm in front of a router, in float32.

    Args:
        residual: Residual stream, [P, T, D], any float dtype.
        weight: Factor per feature, [P, D].
        bias: Term per feature, [P, D].
        kind: `rms`, `layer`, or `none` (returns the residual).
        eps: Added to the variance.

    Returns:
        [P, T, D], float32.
    """
    residual = residual.float()
    if kind == "none":
        return residual
    if kind == "layer":
        residual = residual - residual.mean(dim=-1, keepdim=True)
    scale = torch.rsqrt(residual.square().mean(dim=-1, keepdim=True) + eps)
    return torch.addcmul(bias.unsqueeze(1), residual * scale, weight.unsqueeze(1))


def expected_output(expert_ids: Tensor, gate_weights: Tensor, default_vectors: Tensor) -> Tensor:
    """What a layer's experts will add to the residual, judged by their default vectors.

    Args:
        expert_ids: The experts the source layers chose, [P, T, K], integer.
        gate_weights: What each expert's output is multiplied with, [P, T, K].
        default_vectors: Mean unweighted output of each expert, [P, E, D], float32.

    Returns:
        Sum over the K experts of gate weight times default vector, [P, T, D], float32.
    """
    num_pairs, num_tokens, top_k = expert_ids.shape
    num_experts = default_vectors.shape[1]
    rows = expert_ids.long()
    if num_pairs > 1:  # one lookup for all pairs, in the experts of all pairs laid end to end
        first = torch.arange(num_pairs, device=rows.device) * num_experts
        rows = rows + first.view(-1, 1, 1)
    summed = functional.embedding_bag(
        rows.reshape(-1, top_k),
        default_vectors.reshape(num_pairs * num_experts, -1),
        per_sample_weights=gate_weights.float().reshape(-1, top_k),
        mode="sum",
    )
    return summed.view(num_pairs, num_tokens, -1)


class SourceInput(nn.Module):
    """Turns what P source layers saw into features, and features into training-free logits.

    Holds frozen float32 copies of what that needs, stacked over the pairs. Every method takes
    `pairs`, the pairs that the first dimension of its tensors stands for.
    """

    router_weight: Tensor
    router_bias: Tensor
    selection_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    default_vectors: Tensor | None

    def __init__(
        self, kind: InputKind, anchors: LayerAnchors | None, default_vectors: Tensor | None = None
    ) -> None:
        """Keep what turns states into features.

        Args:
            kind: What is read at the source layer.
            anchors: The P target layers' ones; None for a model whose routers have no known form,
                which leaves router input and forms without an anchor.
            default_vectors: The P source layers' ones, [P, E, D], float. Quasi-hidden input needs
                them; attention readout keeps them for whoever computes the readout.

        Raises:
            ValueError: If quasi-hidden input has no default vectors, or another input than the
                router's no norm.
        """
        super().__init__()
        if anchors is None and kind != "router-input":
            raise ValueError(
                f"{kind} input needs the norm in front of the routers, which is not known for this "
                "model; choose --input router-input."
            )
        self.kind, self.needed = kind, SOURCE_FIELDS[kind]
        self.norm_kind: NormKind = "none" if anchors is None else anchors.norm_kind
        self.norm_eps = 0.0 if anchors is None else anchors.norm_eps
        for name in ANCHOR_BUFFERS:
            tensor: Tensor | None = getattr(anchors, name, None)
            self.register_buffer(name, None if tensor is None else tensor.float())
        if kind == "quasi-hidden" and default_vectors is None:
            raise ValueError("quasi-hidden input needs default vectors; choose residual instead.")
        vectors = default_vectors if kind in ("quasi-hidden", "attention-readout") else None
        self.register_buffer("default_vectors", None if vectors is None else vectors.float())

    @property
    def device(self) -> torch.device:
        """Where its tensors live; the CPU if it has none."""
        return next((buffer.device for buffer in self.buffers()), torch.device("cpu"))

    def features(self, source: SourceState, pairs: slice = ALL_PAIRS) -> Tensor:
        """What a form reads, [P, T, D], float32.

        Raises:
            ValueError: If a tensor the input kind needs is missing.
        """
        given = {name: getattr(source, name) for name in self.needed}
        missing = [name for name, tensor in given.items() if tensor is None]
        if missing:
            raise ValueError(f"{self.kind} input needs {', '.join(missing)}.")
        state: Tensor = given[self.needed[0]].float()
        if self.kind == "router-input":
            return state
        if self.kind == "quasi-hidden":
            assert self.default_vectors is not None
            vectors = self.default_vectors[pairs]
            state = state + expected_output(given["expert_ids"], given["gate_weights"], vectors)
        weight, bias = self.norm_weight[pairs], self.norm_bias[pairs]
        return apply_norm(state, weight, bias, kind=self.norm_kind, eps=self.norm_eps)

    def anchor_logits(self, features: Tensor, pairs: slice = ALL_PAIRS) -> Tensor:
        """What the target layers' own routers give for the features, [P, T, E], float32."""
        weight = self.router_weight[pairs].transpose(1, 2)  # [P, D, E]
        return torch.baddbmm(self.router_bias[pairs].unsqueeze(1), features, weight)

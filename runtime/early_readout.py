"""Runs the next MoE layers' attention early while decoding, for estimators that read the result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoEModel
from foreroute.data.adapters.early_attention import (
    EarlyAttention,
    find_early_attention,
    split_input,
)
from foreroute.estimators.inputs import expected_output
from foreroute.estimators.stack import EstimatorStack

logger = logging.getLogger(__name__)

REFUSAL = "The attention-readout estimators cannot run with"
REMEDY = "Export runs of another --input."


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """What the readout from one source layer needs."""

    site: EarlyAttention
    """That of the MoE layer after the source layer."""
    vectors: Tensor
    """The source layer's default vectors, [E, D], float32."""


def add_expected_output(
    residual: Tensor, expert_ids: Tensor, gate_weights: Tensor, default_vectors: Tensor
) -> Tensor:
    """The quasi-hidden residual, computed as it is when it is recorded.

    Args:
        residual: [T, D].
        expert_ids: [T, K].
        gate_weights: [T, K].
        default_vectors: [E, D].

    Returns:
        [T, D], in the residual's dtype.
    """
    added = expected_output(expert_ids[None], gate_weights[None], default_vectors[None])[0]
    return (residual + added).to(residual.dtype)


class EarlyReadouts:
    """Gives `SourceState.readout` as it was recorded, from what a source layer saw and decided.

    Mask, positions and cache are those that an earlier layer of the same kind was called with in
    the same forward pass; nothing is read from a target layer whose kind has none so early.
    """

    def __init__(self, moe: MoEModel, stack: EstimatorStack) -> None:
        """Find what the stack's pairs need; one tiny forward pass.

        Args:
            moe: The model; its experts' weights need not be there.
            stack: Estimators, on the model's device; some of them read a readout.

        Raises:
            ValueError: If the model's attention cannot be run early; one line says why.
        """
        self.add_expected_output = add_expected_output
        """Makes a quasi-hidden residual; an engine may put a kernel in its place."""
        self._moe = moe
        self._pairs: dict[int, _Pair] = {}
        self._settings: dict[nn.Module, dict[str, Any]] = {}
        self._done: dict[nn.Module, torch.cuda.Event] = {}
        sites = find_early_attention(moe, what=REFUSAL, remedy=REMEDY)
        unread = []
        layers = stack.geometry.layer_indices
        for source, target in zip(stack.source_layers, stack.target_layers, strict=True):
            site = sites[layers[layers.index(source) + 1]]
            own_input, pair = stack.input_of(source)
            if "readout" not in own_input.needed:
                continue
            if site.settings_from is None:
                unread.append(target)
                continue
            assert own_input.default_vectors is not None  # a readout is recorded with them
            vectors = own_input.default_vectors[pair]
            self._pairs[source] = _Pair(site=site, vectors=vectors)
        self.unread_targets = tuple(unread)
        """Layers that are not predicted: no layer before them shows mask and positions."""
        if unread:
            self._say_what_is_unread()

    def _say_what_is_unread(self) -> None:
        geometry = self._moe.geometry
        name = f"{geometry.model_name} ({geometry.model_type})"
        reason = "no earlier layer is called with the mask and positions of layers"
        reason = f"{reason} {list(self.unread_targets)}"
        if not self._pairs:
            raise ValueError(f"{REFUSAL} {name}: {reason}. {REMEDY}")
        logger.info("Not predicted with %s: %s.", name, reason)

    def attach(self, undo: ExitStack, is_decoding: Callable[[], bool]) -> None:
        """Watch what attention modules are called with, and run them after their early runs.

        A cache may be written by both, at the same position, and the early run may be on another
        stream.

        Args:
            undo: Gets the callbacks that take the hooks off.
            is_decoding: Whether the forward pass at hand is a decode step; others are not watched.
        """

        def see(module: nn.Module, arguments: Any, settings: Any) -> None:
            if is_decoding():
                self._settings[module] = split_input(arguments, settings)[1]

        def wait(module: nn.Module, _: Any) -> None:
            done = self._done.pop(module, None)
            if done is not None:
                torch.cuda.current_stream().wait_event(done)

        def forget(*_: Any) -> None:
            self._settings.clear()
            self._done.clear()

        for pair in self._pairs.values():
            undo.callback(pair.site.attention.register_forward_pre_hook(wait).remove)
        for donor in {pair.site.settings_from for pair in self._pairs.values()}:
            assert donor is not None  # only pairs that have one are kept
            undo.callback(donor.register_forward_pre_hook(see, with_kwargs=True).remove)
        ended = self._moe.model.register_forward_hook(forget, always_call=True)
        undo.callback(ended.remove)

    def read(
        self, source_layer: int, *, residual: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor | None:
        """Run the next MoE layer's attention on the source layer's quasi-hidden residual.

        No host sync; runs on the current stream, and the true run waits for it.

        Args:
            source_layer: Decoder layer index the tensors come from.
            residual: Residual stream in front of its experts, [T, D], one token per sequence.
            expert_ids: [T, K].
            gate_weights: [T, K].

        Returns:
            The next MoE layer's residual as it will be before its experts, [T, D]; None if no
            estimator reads it.
        """
        pair = self._pairs.get(source_layer)
        if pair is None:
            return None
        assert pair.site.settings_from is not None  # only pairs that have one are kept
        settings = self._settings[pair.site.settings_from]
        quasi_hidden = self.add_expected_output(
            residual.contiguous(), expert_ids.contiguous(), gate_weights.contiguous(), pair.vectors
        )  # [T, D]
        readout = pair.site.step(quasi_hidden.unsqueeze(1), settings).squeeze(1)
        if readout.is_cuda:
            done = self._done[pair.site.attention] = torch.cuda.Event()
            done.record()
        return readout

"""What the routers really did with the tokens that predictions are scored on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import read_tensors, write_tensors
from foreroute.train.split import rows_of

TENSORS = ("expert_ids", "gate_weights", "starts")


@dataclass(frozen=True, kw_only=True)
class TrueRouting:
    """Routing of T tokens in order, all MoE layers."""

    expert_ids: Tensor
    """[T, L, K], integer."""
    gate_weights: Tensor
    """[T, L, K], float32."""
    starts: Tensor
    """Whether each token is the first of its sequence, [T], bool."""
    layer_indices: tuple[int, ...]
    """Decoder layer index of each MoE layer, length L."""
    num_experts: int
    """E."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.expert_ids.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[2]

    def positions(self, layers: tuple[int, ...]) -> list[int]:
        """Place of each of some layers among the MoE layers.

        Raises:
            ValueError: If one has no experts.
        """
        unknown = [layer for layer in layers if layer not in self.layer_indices]
        if unknown:
            raise ValueError(
                f"Predictions name layers {unknown}; the MoE layers here are "
                f"{list(self.layer_indices)}."
            )
        return [self.layer_indices.index(layer) for layer in layers]

    def first(self, num_tokens: int) -> TrueRouting:
        """That of the first tokens."""
        return TrueRouting(
            **{name: getattr(self, name)[:num_tokens] for name in TENSORS},
            layer_indices=self.layer_indices,
            num_experts=self.num_experts,
        )

    @classmethod
    def of_traces(cls, traces: Traces, sequences: range) -> TrueRouting:
        """The routing that was recorded of some sequences."""
        parts: dict[str, list[Tensor]] = {name: [] for name in TENSORS}
        first_sequence = 0
        for shard_idx, shard in enumerate(traces.manifest.shards):
            offsets = traces.tokens(shard_idx).sequence_offsets
            rows = rows_of(sequences, first_sequence, offsets)
            first_sequence += shard.num_sequences
            for name in ("expert_ids", "gate_weights"):
                layers = [
                    traces.read(layer, shard_idx, (name,))[name][rows]
                    for layer in traces.geometry.layer_indices
                ]
                parts[name].append(torch.stack(layers, dim=1))
            starts = torch.zeros(shard.num_tokens, dtype=torch.bool)
            starts[offsets[:-1]] = True
            parts["starts"].append(starts[rows])
        tensors = {name: torch.cat(found) for name, found in parts.items()}
        return cls(
            expert_ids=tensors["expert_ids"],
            gate_weights=tensors["gate_weights"],
            starts=tensors["starts"],
            layer_indices=traces.geometry.layer_indices,
            num_experts=traces.geometry.num_experts,
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        tensors["expert_ids"] = self.expert_ids.short()
        tensors["layer_indices"] = torch.tensor(self.layer_indices)
        tensors["num_experts"] = torch.tensor(self.num_experts)
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> TrueRouting:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged.
        """
        tensors = read_tensors(path, (*TENSORS, "layer_indices", "num_experts"))
        return cls(
            expert_ids=tensors["expert_ids"].long(),
            gate_weights=tensors["gate_weights"].float(),
            starts=tensors["starts"],
            layer_indices=tuple(tensors["layer_indices"].tolist()),
            num_experts=int(tensors["num_experts"]),
        )

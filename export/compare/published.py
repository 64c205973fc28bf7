"""A trace set to publish: hidden states in 8 bits, true routing and a split, as Parquet files.

`datasets.load_dataset(folder)` reads it as it is: the card names the files of each split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.data.int8_rows import to_int8
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import read_json, write_json, write_tensors
from foreroute.estimators.byte_sizes import format_bytes
from foreroute.estimators.output import new_folder
from foreroute.estimators.types import MoEGeometry
from foreroute.export.compare.trace_card import trace_card
from foreroute.export.compare.truth import TrueRouting

CARD_NAME, GEOMETRY_NAME, MODEL_NAME = "README.md", "geometry.json", "model.safetensors"
MOST_BYTES = 48 << 20
CALIBRATION_SHARE = 0.25
"""Share of the sequences, the first, that probabilities are fitted on; the others are scored."""
STATES = ("residual", "readout")
"""States that are published, where they were recorded."""
ROUTING = {
    "expert_ids": torch.int16,
    "gate_weights": torch.float16,
    "router_logits": torch.float16,
}
"""What is published of the routers, and how precisely."""


@dataclass(frozen=True, kw_only=True)
class TraceSet:
    """What a trace set holds, before it is written."""

    geometry: MoEGeometry
    """The recorded model's routing."""
    dataset: str
    """Whose held-out documents they are."""
    norm: str
    """The norm in front of the routers, in words."""
    columns: dict[str, Tensor]
    """By column, [T, ...]: one row a token, layers in the geometry's order."""
    model: dict[str, Tensor]
    """Routers, norms and default vectors."""

    @property
    def states(self) -> list[str]:
        """Columns of states."""
        return [name for name in STATES if name in self.columns]

    @classmethod
    def gather(cls, traces: Traces, tokens_per_sequence: int) -> TraceSet:
        """Take the first tokens of every sequence.

        Args:
            traces: Recorded of held-out text, whole sequences.
            tokens_per_sequence: Of each, at most.
        """
        parts = list(_shards(traces, tokens_per_sequence))
        sequence = torch.cat([part["sequence"] for part in parts])
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        manifest = traces.manifest
        model = {"default_vectors": traces.default_vectors()[0].bfloat16()}
        if traces.anchors is not None:
            found = vars(traces.anchors)
            model |= {n: t.bfloat16() for n, t in found.items() if isinstance(t, Tensor)}
        return cls(
            geometry=traces.geometry,
            dataset=manifest.dataset,
            norm=f"{manifest.norm_kind}, eps {manifest.norm_eps:g}",
            columns=columns | {"sequence": sequence},
            model=model,
        )

    def write(self, out: Path, *, name: str, max_bytes: int = MOST_BYTES) -> int:
        """Write the folder that is published.

        Args:
            out: Made new.
            name: Of the set, for its card.
            max_bytes: Most that it may take.

        Returns:
            Bytes written.

        Raises:
            ValueError: If it takes more, or there are fewer than two sequences.
        """
        sequence = self.columns["sequence"]
        first_test = int(int(sequence[-1] + 1) * CALIBRATION_SHARE + 0.999)
        if not 0 < first_test <= int(sequence[-1]):
            raise ValueError("A trace set needs at least two sequences, to calibrate and to test.")
        with new_folder(out, "trace set", overwrite=False) as folder:
            write_json(folder / GEOMETRY_NAME, self.geometry.to_dict())
            write_tensors(folder / MODEL_NAME, self.model)
            self._write_parquet(folder / "calibrate.parquet", sequence < first_test)
            self._write_parquet(folder / "test.parquet", sequence >= first_test)
            card = trace_card(self.geometry, name, self.dataset, self.norm, self.states)
            (folder / CARD_NAME).write_text(card)
            written = sum(path.stat().st_size for path in folder.iterdir())
            if written > max_bytes:
                raise ValueError(
                    f"The trace set takes {format_bytes(written)}, more than "
                    f"{format_bytes(max_bytes)}; take fewer tokens of each sequence."
                )
        return written

    def _write_parquet(self, path: Path, rows: Tensor) -> None:
        from datasets import Array2D, Dataset, Features, List, Value

        kinds = {torch.int16: "int16", torch.float16: "float16", torch.int8: "int8"}
        kinds |= {torch.int32: "int32", torch.float32: "float32"}
        features: dict[str, Any] = {}
        for name, tensor in self.columns.items():
            kind = kinds[tensor.dtype]
            shaped = {1: Value(kind), 2: List(Value(kind)), 3: None}[tensor.dim()]
            features[name] = shaped or Array2D(tuple(tensor.shape[1:]), kind)
        found = {name: tensor[rows].numpy() for name, tensor in self.columns.items()}
        Dataset.from_dict(found, features=Features(features)).to_parquet(path)


def read_published(folder: Path, part: str = "test") -> TrueRouting:
    """The true routing of one split of a published set, read by `datasets`.

    Args:
        folder: That `TraceSet.write` wrote.
        part: `calibrate` or `test`.
    """
    from datasets import load_dataset

    geometry = read_json(folder / GEOMETRY_NAME, MoEGeometry)
    rows = load_dataset(str(folder), split=part)
    columns = ["sequence", "expert_ids", "gate_weights"]
    found = rows.select_columns(columns).with_format("numpy")[:]
    sequence = torch.as_tensor(found["sequence"])
    starts = torch.ones(len(sequence), dtype=torch.bool)
    starts[1:] = sequence[1:] != sequence[:-1]
    return TrueRouting(
        expert_ids=torch.as_tensor(found["expert_ids"]).long(),
        gate_weights=torch.as_tensor(found["gate_weights"]).float(),
        starts=starts,
        layer_indices=geometry.layer_indices,
        num_experts=geometry.num_experts,
    )


def _shards(traces: Traces, tokens_per_sequence: int) -> Iterator[dict[str, Tensor]]:
    first_sequence = 0
    for shard_idx, shard in enumerate(traces.manifest.shards):
        tokens = traces.tokens(shard_idx)
        lengths = tokens.sequence_offsets.diff()
        place = torch.arange(shard.num_tokens) - tokens.sequence_offsets[:-1].repeat_interleave(
            lengths
        )
        rows = (place < tokens_per_sequence).nonzero().squeeze(1)
        sequence = torch.arange(shard.num_sequences).repeat_interleave(lengths) + first_sequence
        first_sequence += shard.num_sequences
        yield {
            "sequence": sequence[rows].int(),
            "position": tokens.positions[rows].int(),
            "token_id": tokens.token_ids[rows].int(),
            **{n: _layers(traces, shard_idx, n)[rows].to(d) for n, d in ROUTING.items()},
            **_states(traces, shard_idx, rows),
        }


def _layers(traces: Traces, shard_idx: int, name: str) -> Tensor:
    """One field of all layers, [tokens, L, ...]; zeros where the last layer has none."""
    *others, last = traces.geometry.layer_indices
    layers = [traces.read(layer, shard_idx, (name,))[name] for layer in others]
    if name == "readout":
        layers.append(torch.zeros_like(layers[0]))
    else:
        layers.append(traces.read(last, shard_idx, (name,))[name])
    return torch.stack(layers, dim=1)


def _states(traces: Traces, shard_idx: int, rows: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in STATES:
        if name == "residual" or name in traces.manifest.record:
            rounded, scales = to_int8(_layers(traces, shard_idx, name)[rows])
            found |= {name: rounded, f"{name}_scale": scales}
    return found

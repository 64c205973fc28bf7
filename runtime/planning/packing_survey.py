"""Packs some experts of each layer of a checkpoint into 12 bits, to count what comes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from foreroute.data.adapters.weightless import parameter_shapes
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.encodings import (
    Encoder,
    Lossless,
    TooManyExceptions,
    encoder_named,
    without,
)
from foreroute.runtime.store.encodings.lossless import count_exceptions
from foreroute.runtime.store.expert_reader import ExpertReader
from foreroute.runtime.store.host_store import RowLayout
from foreroute.runtime.store.loading import targets_of
from foreroute.runtime.store.row_writer import RowWriter

SAMPLE_BYTES = 1 << 30
"""Experts of this size together are read; all are, where there are no more."""


@dataclass
class PackingSurvey:
    """Packs some experts of each layer, and counts."""

    checkpoint: Checkpoint
    reader: ExpertReader
    stays: list[str] = field(default_factory=list)
    """Parameters with too many exceptions somewhere."""
    num_read: int = 0
    exceptions: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)
    """Counted in those that were read and packed, by parameter."""

    @property
    def encoder(self) -> Encoder:
        """12 bits, but for what stays."""
        encoder = encoder_named("lossless")
        assert encoder is not None  # it has a name
        return without(encoder, *self.stays)

    def count(self) -> None:
        """Read the experts and pack them."""
        modules = self.checkpoint.experts
        share = min(1.0, SAMPLE_BYTES / self.checkpoint.expert_bytes)
        for number, (path, module) in enumerate(modules.items()):
            count = _num_experts(module)
            chosen = max(1, int(count * share))
            ids = [(number + i * count // chosen) % count for i in range(chosen)]
            self._read(path, module, ids)

    @property
    def num_experts(self) -> int:
        """All experts of the model."""
        return sum(map(_num_experts, self.checkpoint.experts.values()))

    @property
    def stored_bytes(self) -> int:
        """All experts, as they would be stored."""
        return sum(
            RowLayout.of(module, self.encoder).row_bytes * _num_experts(module)
            for module in self.checkpoint.experts.values()
        )

    def without_what_stays(self, counts: Counter[str]) -> int:
        """The sum of counts by parameter, of those that are packed."""
        return sum(counts[name] for name in counts if name not in self.stays)

    def _read(self, path: str, module: nn.Module, ids: list[int]) -> None:
        """Pack experts of one layer; once more without each parameter that does not fit."""
        places = {expert_id: i for i, expert_id in enumerate(ids)}
        targets = targets_of(path, module, None)
        while True:
            layout = RowLayout.of(module, self.encoder)
            rows = torch.zeros(len(ids), layout.row_bytes, dtype=torch.uint8)
            writer = RowWriter(layout, rows)
            try:
                for part in self.reader.parts(targets, places):
                    name = targets[part.target][0]
                    writer.put(name, places[part.expert_id], part.row, part.rows)
            except TooManyExceptions as error:
                self.stays.append(error.parameter)
                continue
            break
        self.num_read += len(ids)
        for name, num_weights in coded_weights(layout).items():
            self.weights[name] += len(ids) * num_weights
            self.exceptions[name] += count_exceptions(layout.views(rows)[f"{name}_lines"])


def _num_experts(module: nn.Module) -> int:
    return next(iter(parameter_shapes(module).values())).shape[0]


def coded_weights(layout: RowLayout) -> dict[str, int]:
    """Weights of one expert that lie in 12 bits, by parameter."""
    encodings = {name: parameter.encoding for name, parameter in layout.encoded.items()}
    return {
        name: encoding.rows * encoding.columns
        for name, encoding in encodings.items()
        if isinstance(encoding, Lossless)
    }

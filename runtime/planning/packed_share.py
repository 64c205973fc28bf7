"""Says how much of a model 12 bits hold without loss: counted in its weights, where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from foreroute.data.adapters.weightless import ParameterShape, parameter_shapes
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
"""Of experts that are read; all are, where there are no more."""
NOT_HERE = "not known: a config does not say it, and the weights are not here"


def packed_share(checkpoint: Checkpoint) -> str:
    """One line: the share of the experts' bytes that remains, exceptions, and who counted.

    Args:
        checkpoint: The model; no weights are downloaded.

    Raises:
        ValueError: If a file of weights that is here cannot be read.
    """
    if checkpoint.prepared is not None:
        return _as_prepared(checkpoint)
    if checkpoint.quantization is not None:
        return f"no: they come in {checkpoint.quantization.get('quant_method')} already"
    here = replace(checkpoint, hub=checkpoint.hub | {"local_files_only": True})
    try:
        tensors, dtype = here.files, str(here.dtype).removeprefix("torch.")
    except ValueError:
        if any(Path(here.source).glob("*.safetensors*")):  # they are here, and damaged
            raise
        return NOT_HERE
    if dtype != "bfloat16":
        return f"no: they are for bfloat16, and the experts are in {dtype}"
    return _Survey(here, ExpertReader(here.outline, tensors, _shapes(here))).line()


def _as_prepared(checkpoint: Checkpoint) -> str:
    prepared = checkpoint.prepared
    assert prepared is not None  # the caller looked
    if prepared.expert_dtype != "lossless":
        return f"no: they are prepared as {prepared.expert_dtype}"
    num_experts = sum(shard["experts"] for shard in prepared.shards)
    weights = sum(
        shard["experts"] * sum(_coded(RowLayout.of(module, checkpoint.encoder)).values())
        for shard, module in zip(prepared.shards, checkpoint.experts.values(), strict=True)
    )
    stored = sum(shard["experts"] * shard["row_bytes"] for shard in prepared.shards)
    return (
        _line(
            stored, prepared.plain_bytes, sum(prepared.exceptions.values()), weights, prepared.stays
        )
        + f" (exact: all {num_experts:,} experts, when they were packed)"
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, ParameterShape]:
    places = checkpoint.experts.items()
    return {
        path: shape for place in places for path, (_, shape) in targets_of(*place, None).items()
    }


@dataclass
class _Survey:
    """Packs some experts of each layer, and counts."""

    checkpoint: Checkpoint
    reader: ExpertReader
    stays: list[str] = field(default_factory=list)
    """Parameters with too many exceptions somewhere."""
    num_read: int = 0
    exceptions: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)
    """Of those that were read and packed, by parameter."""

    @property
    def encoder(self) -> Encoder:
        """12 bits, but for what stays."""
        encoder = encoder_named("lossless")
        assert encoder is not None  # it has a name
        for name in self.stays:
            encoder = without(encoder, name)
        return encoder

    def line(self) -> str:
        """What was counted, in a line."""
        modules = self.checkpoint.experts
        share = min(1.0, SAMPLE_BYTES / self.checkpoint.expert_bytes)
        for number, (path, module) in enumerate(modules.items()):
            count = _num_experts(module)
            chosen = max(1, int(count * share))
            ids = [(number + i * count // chosen) % count for i in range(chosen)]
            self._read(path, module, ids)
        every = sum(map(_num_experts, modules.values()))
        stored = sum(
            RowLayout.of(module, self.encoder).row_bytes * _num_experts(module)
            for module in modules.values()
        )
        how = "exact: all" if self.num_read == every else f"sampled: {self.num_read:,} of"
        plain = self.checkpoint.expert_bytes
        exceptions, weights = (
            sum(counts[name] for name in counts if name not in self.stays)
            for counts in (self.exceptions, self.weights)
        )
        found = _line(stored, plain, exceptions, weights, self.stays)
        return f"{found} ({how} {every:,} experts)"

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
        for name, num_weights in _coded(layout).items():
            self.weights[name] += len(ids) * num_weights
            self.exceptions[name] += count_exceptions(layout.views(rows)[f"{name}_lines"])


def _num_experts(module: nn.Module) -> int:
    return next(iter(parameter_shapes(module).values())).shape[0]


def _coded(layout: RowLayout) -> dict[str, int]:
    """Weights of one expert that lie in 12 bits, by parameter."""
    encodings = {name: parameter.encoding for name, parameter in layout.encoded.items()}
    return {
        name: encoding.rows * encoding.columns
        for name, encoding in encodings.items()
        if isinstance(encoding, Lossless)
    }


def _line(stored: int, plain: int, exceptions: int, weights: int, stays: Iterable[str]) -> str:
    if not weights:
        return "no: their matrices are too small for it to pay, or have too many exceptions"
    size = f"{stored / plain:.3f} of {plain / 2**30:.2f} GiB"
    kept = "".join(f", {name} as it was" for name in stays)
    return f"{size}{kept}; {exceptions / weights:.1e} of the weights are exceptions"

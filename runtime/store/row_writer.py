"""Writes experts' weights into their host rows, encoding what is stored in another way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foreroute.runtime.store.encodings import EncodedParameter, TooManyExceptions
from foreroute.runtime.store.host_store import HostExpertStore, RowLayout

BATCH_BYTES = 64 << 20
"""Experts that are encoded together, as the model has them; at least one."""


@dataclass
class _Batch:
    """Experts of one parameter that wait to be encoded."""

    weights: Tensor
    """[n, *shape] on the host, pinned if a GPU encodes."""
    rows_of: dict[int, int] = field(default_factory=dict)
    """Rows of each expert that are here; experts in the order of `weights`."""


class RowWriter:
    """Writes one layer's weights into rows, a batch of experts at a time.

    A GPU encodes a batch faster than it can be read; a CPU does it with all its cores.
    """

    def __init__(self, layout: RowLayout, rows: Tensor, device: torch.device | None = None) -> None:
        """Write into these rows.

        Args:
            layout: How an expert lies in a row.
            rows: [E, row_bytes] uint8.
            device: The GPU that encodes; None for the CPU.
        """
        self._layout, self._rows, self._device = layout, rows, device
        self._views = layout.views(rows)
        self._batches: dict[str, _Batch] = {}
        self._num_left = dict.fromkeys(layout.encoded, len(rows))

    def put(self, name: str, expert_id: int, row: int, part: Tensor) -> None:
        """Write part of one expert's parameter.

        Args:
            name: Of the parameter, or of a part of it that a low-bit checkpoint holds.
            expert_id: Which expert.
            row: First row that the part covers.
            part: Some rows of the parameter, any float dtype.

        Raises:
            TooManyExceptions: If the parameter must be stored as it is; names it.
        """
        parameter = self._layout.encoded.get(name)
        if parameter is None or parameter.encoding.is_native:
            self._views[name][expert_id][row : row + len(part)].copy_(part)
            return
        batch = self._batches.get(name)
        if batch is None:
            batch = self._batches[name] = _Batch(self._room(parameter, self._at_once(parameter)))
        num_held = len(batch.rows_of)
        place = num_held
        if expert_id in batch.rows_of:  # the rest of a matrix that comes in several tensors
            place = list(batch.rows_of).index(expert_id)
        elif num_held == len(batch.weights):  # of parts that come one after the other: for all
            wider = self._room(parameter, 2 * num_held)
            wider[:num_held] = batch.weights
            batch.weights = wider
        batch.weights[place][row : row + len(part)].copy_(part)
        batch.rows_of[expert_id] = batch.rows_of.get(expert_id, 0) + len(part)
        num_held = len(batch.rows_of)
        is_due = num_held >= min(self._at_once(parameter), self._num_left[name])
        if is_due and all(count == parameter.shape[0] for count in batch.rows_of.values()):
            self._encode(name, parameter)

    def _at_once(self, parameter: EncodedParameter) -> int:
        one = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta").nbytes
        return max(1, min(BATCH_BYTES // one, len(self._rows)))

    def _room(self, parameter: EncodedParameter, count: int) -> Tensor:
        size, is_pinned = (count, *parameter.shape), self._device is not None
        return torch.empty(size, dtype=parameter.dtype, pin_memory=is_pinned)

    def _encode(self, name: str, parameter: EncodedParameter) -> None:
        """Encode a batch and write it; its room is used again."""
        batch = self._batches[name]
        experts = list(batch.rows_of)
        try:
            self._encode_batch(name, parameter, experts, batch.weights[: len(experts)])
        except TooManyExceptions as error:
            error.parameter = name
            raise
        batch.rows_of.clear()
        self._num_left[name] -= len(experts)
        if not self._num_left[name]:
            del self._batches[name]

    def _encode_batch(
        self, name: str, parameter: EncodedParameter, experts: list[int], weights: Tensor
    ) -> None:
        """Encode experts, and write what is stored to their rows."""
        if self._device is None:
            parameter.encode_into(weights, self._room_in_rows(name, parameter, experts))
            return
        begin, end = self._layout.span(name)
        weights = weights.to(self._device, non_blocking=True)
        encoded = torch.zeros(len(experts), end - begin, dtype=torch.uint8, device=self._device)
        for suffix, part in parameter.encode(weights).items():
            spec = self._layout.parameters[name + suffix]
            at = spec.offset_bytes - begin
            raw = part.contiguous().view(len(experts), -1).view(torch.uint8)
            encoded[:, at : at + spec.num_bytes] = raw
        for expert_id, row in zip(experts, encoded, strict=True):
            self._rows[expert_id, begin:end].copy_(row, non_blocking=self._rows.is_pinned())
        torch.cuda.current_stream(self._device).synchronize()  # the room is used again

    def _room_in_rows(
        self, name: str, parameter: EncodedParameter, experts: list[int]
    ) -> dict[str, list[Tensor]]:
        """Where a parameter's parts lie in the experts' rows, by suffix."""
        suffixes = parameter.encoding.parts()
        return {s: [self._views[name + s][expert_id] for expert_id in experts] for s in suffixes}


def move_weights(all_experts: list[nn.Module], store: HostExpertStore) -> None:
    """Move weights from a model's modules, on the CPU, into its store, one layer at a time.

    Args:
        all_experts: The experts modules; their parameters are removed.
        store: Allocated for them.

    Raises:
        TooManyExceptions: If a parameter must be stored as it is; the modules have theirs again.
    """
    for number, (experts, layout, rows) in enumerate(
        zip(all_experts, store.layouts, store.rows, strict=True)
    ):
        writer = RowWriter(layout, rows)
        try:
            for name in list(experts._parameters):
                for expert_id, weight in enumerate(experts.get_parameter(name).detach()):
                    writer.put(name, expert_id, 0, weight)
        except TooManyExceptions:
            put_back(all_experts[:number], store)
            raise
        experts._parameters.clear()


def put_back(all_experts: list[nn.Module], store: HostExpertStore) -> None:
    """Give modules their weights again, as the store decodes to.

    Args:
        all_experts: The experts modules of the store's first layers, without parameters.
        store: Filled.
    """
    for experts, layout, rows in zip(all_experts, store.layouts, store.rows, strict=False):
        for name, weight in layout.weights(rows).items():
            whole = nn.Parameter(weight[:].clone(), requires_grad=False)
            experts.register_parameter(name, whole)

"""Reads prompts on a GPU layer by layer: experts stream through two buffers beside the slots.

The decode working set stays where it is; experts that lie in slots already are not copied again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters import (
    ExpertsView,
    combine,
    grouped_function,
    unweighted_outputs,
)
from foreroute.runtime.device.kernels.fetch import fetch
from foreroute.runtime.device.kernels.plan import plan
from foreroute.runtime.device.kernels.tables import EMPTY
from foreroute.runtime.device.residency import DeviceResidency
from foreroute.runtime.store.host_store import RowLayout
from foreroute.runtime.store.pinning import CopyRow, copy_whole

COPY_BLOCKS = 32


@dataclass
class _Buffer:
    """Room for one group of experts."""

    rows: Tensor
    weights: dict[str, Any]
    is_free: torch.cuda.Event
    """Compute is done with what was here."""
    is_filled: torch.cuda.Event
    """The copies have landed."""


class StreamedPrefill:
    """Two buffers and a copy stream, shared by all layers of an engine."""

    def __init__(
        self,
        layout: RowLayout,
        group_size: int,
        device: torch.device,
        copy_row: CopyRow = copy_whole,
    ) -> None:
        """Allocate the buffers.

        Args:
            layout: How an expert lies in a row; the same for every layer.
            group_size: Experts per buffer.
            device: The GPU.
            copy_row: How a row comes from the host.
        """
        self._copy_row = copy_row
        self.group_size = group_size
        self.prompt_bytes = 0
        """Bytes copied from the host so far."""
        self._copies = torch.cuda.Stream(device=device, priority=-1)
        self._buffers = []
        for _ in range(2):
            rows = torch.empty(group_size, layout.row_bytes, dtype=torch.uint8, device=device)
            events = torch.cuda.Event(), torch.cuda.Event()
            self._buffers.append(_Buffer(rows, layout.weights(rows), *events))

    def run(
        self,
        layer: DeviceResidency,
        experts: nn.Module,
        hidden: Tensor,
        expert_ids: Tensor,
        gate_weights: Tensor,
    ) -> Tensor:
        """Compute one layer's experts for a prompt; one device-to-host sync.

        Args:
            layer: Its slots, tables and host rows.
            experts: The experts module, without weights.
            hidden: Router input, [T, D].
            expert_ids: [T, K].
            gate_weights: [T, K].

        Returns:
            [T, D].
        """
        flat_ids, top_k = expert_ids.reshape(-1), expert_ids.shape[-1]
        num_experts = len(layer.rows)
        counts = torch.bincount(flat_ids, minlength=num_experts)  # [E]
        counts_list, slot_of = torch.stack([counts, layer.tables.slot_of.long()]).tolist()
        needed = [e for e in range(num_experts) if counts_list[e]]
        resident = [e for e in needed if slot_of[e] != EMPTY]
        absent = [e for e in needed if slot_of[e] == EMPTY]
        layer.count_prompt(expert_ids)
        outputs = hidden.new_empty(flat_ids.numel(), hidden.shape[-1])  # [T * K, D]

        grouped = grouped_function(experts)

        def compute(some: list[int], places: list[int], weights: dict[str, Any]) -> None:
            place_of = torch.full((num_experts,), EMPTY)
            place_of[some] = torch.tensor(places)
            place_of_pair = place_of.to(hidden.device)[flat_ids]
            pairs = (place_of_pair != EMPTY).nonzero().squeeze(1)
            view, rows = ExpertsView(experts, weights).decoded(place_of_pair[pairs])
            outputs[pairs] = unweighted_outputs(
                grouped,
                view,
                hidden[pairs // top_k],
                rows,
            )

        are_tensors = all(isinstance(weight, Tensor) for weight in layer.weights.values())
        at_once = len(resident) if are_tensors else self.group_size  # others are decoded first
        for start in range(0, len(resident), max(1, at_once)):
            some = resident[start : start + at_once]
            compute(some, [slot_of[e] for e in some], layer.weights)
        num_free = len(layer.slots) - sum(slot != EMPTY for slot in slot_of)
        wanted = sorted(absent, key=lambda e: -counts_list[e])[:num_free]
        for group, buffer in self._stream(layer, absent):
            compute(group, list(range(len(group))), buffer.weights)
            self._keep(layer, group, [e for e in group if e in set(wanted)], buffer)
            buffer.is_free.record()
        return combine(outputs, gate_weights)

    def _stream(
        self, layer: DeviceResidency, experts: list[int]
    ) -> Iterator[tuple[list[int], _Buffer]]:
        """Groups of experts in a buffer each; the next group is on its way meanwhile."""
        size = self.group_size
        groups = [experts[start : start + size] for start in range(0, len(experts), size)]
        for i, group in enumerate(groups):
            if i == 0:
                self._copy(layer, group, self._buffers[0])
            if i + 1 < len(groups):
                self._copy(layer, groups[i + 1], self._buffers[(i + 1) % 2])
            buffer = self._buffers[i % 2]
            torch.cuda.current_stream().wait_event(buffer.is_filled)
            yield group, buffer

    def _copy(self, layer: DeviceResidency, experts: list[int], buffer: _Buffer) -> None:
        self._copies.wait_event(buffer.is_free)
        with torch.cuda.stream(self._copies):
            for place, expert in enumerate(experts):
                self._copy_row(buffer.rows[place], layer.rows[expert])
            buffer.is_filled.record()
        self.prompt_bytes += len(experts) * layer.rows.shape[1]

    def _keep(
        self, layer: DeviceResidency, experts: list[int], kept: list[int], buffer: _Buffer
    ) -> None:
        """Copy a group's frequent experts into free slots, from device to device."""
        if not kept:
            return
        device = buffer.rows.device
        ids = torch.tensor(kept, device=device)
        copies = torch.empty(3, len(kept), dtype=torch.int32, device=device)
        counters = layer.tables.counters.clone()  # these copies cost the link nothing
        plan(ids, layer.tables, layer.rule, copies, is_prefetch=True)
        layer.tables.counters.copy_(counters)
        layer.tables.is_unused_prefetch.zero_()
        places = torch.tensor([experts.index(e) for e in kept], dtype=torch.int32, device=device)
        copies[0] = torch.where(copies[0] >= 0, places, copies[0])
        fetch(buffer.rows, layer.slots, copies, num_blocks=COPY_BLOCKS)

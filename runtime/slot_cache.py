"""Which experts of one layer lie in which of its cache slots, and who goes when room is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from foreroute.runtime.host_store import RowLayout
from foreroute.runtime.transfers import Ticket

EMPTY = -1


class SlotCache:
    """S slots on the device for the experts of one MoE layer; least recently used goes first."""

    def __init__(
        self, num_experts: int, num_slots: int, layout: RowLayout, device: torch.device
    ) -> None:
        """Allocate the slots, all empty.

        Args:
            num_experts: E.
            num_slots: S, at most E.
            layout: How one expert lies in a slot.
            device: Where the slots are.
        """
        self.num_slots = num_slots
        self.slots = torch.zeros(num_slots, layout.row_bytes, dtype=torch.uint8, device=device)
        """[S, row_bytes]."""
        self.weights = layout.weights(self.slots)
        """Parameters by name, [S, ...], sharing memory with the slots."""
        self.arriving: dict[int, Ticket] = {}
        """Copies on their way, by expert."""
        self._slot_of = [EMPTY] * num_experts
        self._expert_in = [EMPTY] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_use: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._pinned: set[int] = set()
        self._unused_prefetches: set[int] = set()

    @property
    def resident(self) -> list[int]:
        """Experts in slots (or arriving there), least recently used first."""
        return list(self._by_use)

    def slot_of(self, expert_id: int) -> int:
        """The slot an expert is in, or `EMPTY`; does not count as a use."""
        return self._slot_of[expert_id]

    def use(self, expert_ids: Iterable[int]) -> None:
        """Mark resident experts as used now, in this order."""
        for expert_id in expert_ids:
            self._by_use.move_to_end(expert_id)
            self._unused_prefetches.discard(expert_id)

    def pin(self, expert_ids: Iterable[int]) -> None:
        """Forbid the eviction of these experts until `unpin`."""
        self._pinned.update(expert_ids)

    def unpin(self) -> None:
        """Allow the eviction of every expert again."""
        self._pinned.clear()

    @property
    def num_evictable(self) -> int:
        """Slots that `admit` could fill now."""
        return len(self._free) + sum(e not in self._pinned for e in self._by_use)

    def admit(self, expert_id: int, *, is_prefetch: bool = False) -> tuple[int, bool]:
        """Give an absent expert a slot; the caller fills it.

        Args:
            expert_id: The expert, not resident.
            is_prefetch: Whether it comes before it is known to be needed.

        Returns:
            The slot, and whether an expert that was prefetched and never used had to go for it.

        Raises:
            RuntimeError: If every slot holds a pinned expert.
        """
        assert self._slot_of[expert_id] == EMPTY
        wasted = False
        if self._free:
            slot = self._free.pop()
        else:
            victim = next((e for e in self._by_use if e not in self._pinned), None)
            if victim is None:
                raise RuntimeError(f"All {self.num_slots} slots hold pinned experts.")
            slot = self._slot_of[victim]
            wasted = victim in self._unused_prefetches
            self._forget(victim)
        self._slot_of[expert_id] = slot
        self._expert_in[slot] = expert_id
        self._by_use[expert_id] = None
        if is_prefetch:
            self._unused_prefetches.add(expert_id)
        return slot, wasted

    def clear(self) -> None:
        """Empty all slots (copies on their way still land, in slots nobody reads)."""
        for expert_id in self.resident:
            self._free.append(self._slot_of[expert_id])
            self._forget(expert_id)
        self._pinned.clear()

    def _forget(self, expert_id: int) -> None:
        self._expert_in[self._slot_of[expert_id]] = EMPTY
        self._slot_of[expert_id] = EMPTY
        del self._by_use[expert_id]
        self._unused_prefetches.discard(expert_id)
        self.arriving.pop(expert_id, None)

    def slot_ids(self, expert_ids: list[list[int]], device: torch.device) -> Tensor:
        """Replace expert ids by the slots they are in.

        Args:
            expert_ids: [T][K], all resident.
            device: Where the result goes.

        Returns:
            [T, K] int64.
        """
        return torch.tensor([[self._slot_of[e] for e in row] for row in expert_ids], device=device)

    def check_integrity(self) -> None:
        """Check the tables against each other.

        Raises:
            RuntimeError: If they disagree.
        """
        placed = {e: s for e, s in enumerate(self._slot_of) if s != EMPTY}
        back = {e: s for s, e in enumerate(self._expert_in) if e != EMPTY}
        problems = {
            "slot table and slot contents disagree": placed != back,
            "two experts share a slot": len(set(placed.values())) != len(placed),
            "use order and slot table disagree": set(self._by_use) != set(placed),
            "free slots are not the empty ones": sorted(self._free)
            != [s for s, e in enumerate(self._expert_in) if e == EMPTY],
            "a copy is on its way for an absent expert": not set(self.arriving) <= set(placed),
        }
        for problem, is_so in problems.items():
            if is_so:
                raise RuntimeError(f"Slot cache is inconsistent: {problem}.")

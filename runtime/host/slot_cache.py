"""Which experts of one layer lie in which of its cache slots, and who goes when room is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from foreroute.runtime.host.transfers import Ticket
from foreroute.runtime.policies import Duel, EvictionPolicy, LayerState, find_policy
from foreroute.runtime.store.host_store import RowLayout

EMPTY = -1


class SlotCache:
    """S slots on the device for the experts of one MoE layer, under an eviction policy."""

    def __init__(
        self,
        num_experts: int,
        num_slots: int,
        layout: RowLayout,
        device: torch.device,
        policy: EvictionPolicy | None = None,
        duel: Duel | None = None,
        *,
        has_shadows: bool = True,
    ) -> None:
        """Allocate the slots, all empty.

        Args:
            num_experts: E.
            num_slots: S, at most E.
            layout: How one expert lies in a slot.
            device: Where the slots are.
            policy: Who goes when room is needed; the default policy if None.
            duel: See `LayerState`; so is the next.
            has_shadows: Whether this layer's hits count in it.
        """
        self.num_slots = num_slots
        self.slots = torch.zeros(num_slots, layout.row_bytes, dtype=torch.uint8, device=device)
        """[S, row_bytes]."""
        self.weights = layout.weights(self.slots)
        """Parameters by name, [S, ...], sharing memory with the slots."""
        self._policy = policy or find_policy("default")
        self._duel, self._has_shadows = duel, has_shadows
        self._num_experts = num_experts
        self.forget()

    def forget(self) -> None:
        """Start anew: all slots empty, nothing known of any expert."""
        self.arriving: dict[int, Ticket] = {}
        """Copies on their way, by expert."""
        self._slot_of = [EMPTY] * self._num_experts
        self.state = LayerState(
            self._policy,
            self._num_experts,
            self.num_slots,
            self._duel,
            has_shadows=self._has_shadows,
        )
        """What each expert is worth, and which are resident."""
        self._pinned: set[int] = set()
        self._unused_prefetches: set[int] = set()

    @property
    def resident(self) -> list[int]:
        """Experts in slots (or arriving there), least worth first."""
        held = [expert for expert in self.state.expert_in if expert != EMPTY]
        return sorted(held, key=lambda expert: self.state.worth[expert])

    def slot_of(self, expert_id: int) -> int:
        """The slot an expert is in, or `EMPTY`; does not count as a use."""
        return self._slot_of[expert_id]

    @property
    def is_here(self) -> list[bool]:
        """By expert, whether it is in its slot, and no copy of it still on its way."""
        coming = {expert for expert, ticket in self.arriving.items() if not ticket.is_done()}
        return [here and e not in coming for e, here in enumerate(self.state.here)]

    def use(
        self,
        expert_ids: Sequence[int],
        *,
        credited: Sequence[int] | None = None,
        is_step: bool = True,
    ) -> None:
        """Mark resident experts as used now.

        Args:
            expert_ids: Distinct experts.
            credited: Those whose score rises, resident or not, where they are others.
            is_step: Whether this is a decode step, which scores count; a prompt's uses are counted
                by `count_prompt`.
        """
        self._unused_prefetches.difference_update(expert_ids)
        if is_step:
            self.state.use(expert_ids if credited is None else credited)

    def count_prompt(self, rows: Sequence[Sequence[int]]) -> None:
        """Count a prompt's uses, per token the experts it used."""
        self.state.count_prompt(rows)

    def warm(self, rows: Sequence[Sequence[int]]) -> dict[int, int]:
        """Count a recording's uses and make its experts of most worth resident.

        Returns:
            Those experts and their slots; the caller copies them there.
        """
        self.state.warm(rows)
        self._slot_of = [EMPTY] * len(self._slot_of)
        self.arriving.clear()
        self._unused_prefetches.clear()
        slots = {e: slot for slot, e in enumerate(self.state.expert_in) if e != EMPTY}
        for expert, slot in slots.items():
            self._slot_of[expert] = slot
        return slots

    def pin(self, expert_ids: Iterable[int]) -> None:
        """Forbid the eviction of these experts until `unpin`."""
        self._pinned.update(expert_ids)

    def unpin(self) -> None:
        """Allow the eviction of every expert again."""
        self._pinned.clear()

    @property
    def num_evictable(self) -> int:
        """Slots that `admit` could fill now."""
        return sum(expert not in self._pinned for expert in self.state.expert_in)

    def next_victim(self) -> int:
        """The expert that `admit` would evict now, or `EMPTY` if a slot is free."""
        return self.state.expert_in[self.state.victim_slot(self._pinned)]

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
        slot = self.state.victim_slot(self._pinned)
        if slot < 0:
            raise RuntimeError(f"All {self.num_slots} slots hold pinned experts.")
        victim = self.state.admit(expert_id, self._pinned)
        wasted = victim in self._unused_prefetches
        if victim != EMPTY:
            self._forget(victim)
        self._slot_of[expert_id] = slot
        if is_prefetch:
            self._unused_prefetches.add(expert_id)
        return slot, wasted

    def clear(self) -> None:
        """Empty all slots (copies on their way still land, in slots nobody reads)."""
        for expert_id in self.resident:
            self._forget(expert_id)
        self.state.clear()
        self._pinned.clear()

    def _forget(self, expert_id: int) -> None:
        self._slot_of[expert_id] = EMPTY
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
        self.state.check_integrity()
        placed = {e: s for e, s in enumerate(self._slot_of) if s != EMPTY}
        back = {e: s for s, e in enumerate(self.state.expert_in) if e != EMPTY}
        problems = {
            "slot table and slot contents disagree": placed != back,
            "two experts share a slot": len(set(placed.values())) != len(placed),
            "a copy is on its way for an absent expert": not set(self.arriving) <= set(placed),
        }
        for problem, is_so in problems.items():
            if is_so:
                raise RuntimeError(f"Slot cache is inconsistent: {problem}.")

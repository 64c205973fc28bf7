"""Keeps the right experts of one layer in its slots: looks up, copies, counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from foreroute.runtime.host.ledger import Early
from foreroute.runtime.host.run_state import HostRun
from foreroute.runtime.host.slot_cache import EMPTY, SlotCache
from foreroute.runtime.host.transfers import Ticket


class HostResidency:
    """One layer's host rows, its slots, and the copies between them."""

    def __init__(self, rows: Tensor, cache: SlotCache, run: HostRun) -> None:
        """Connect the parts.

        Args:
            rows: Host weights, [E, row_bytes] uint8.
            cache: Slots on the device.
            run: Shared with the engine's other layers.
        """
        self.rows = rows
        self.cache = cache
        self._run = run
        self._early: dict[int, Early] = {}

    @property
    def expert_bytes(self) -> int:
        """Bytes that one copy moves."""
        return self.rows.shape[1]

    def fetch(self, needed: list[int], credited: list[int] | None = None) -> list[Ticket]:
        """Make these experts resident, those that are missing by copies on demand.

        Args:
            needed: Distinct experts, at most as many as slots.
            credited: See `SlotCache.use`.

        Returns:
            What compute must wait for.
        """
        cache, phase = self.cache, self._run.phase
        cache.pin(needed)
        tickets, missing = [], []
        for expert in needed:
            ticket, early = cache.arriving.pop(expert, None), self._early.pop(expert, None)
            if early is not None and cache.slot_of(expert) != EMPTY:
                self._run.ledger.count_needed(early)
            if cache.slot_of(expert) == EMPTY:
                missing.append(expert)
            elif ticket is not None and not ticket.is_done():
                phase.late += 1
                tickets.append(ticket)
            else:
                phase.hits += 1
        if missing:
            tickets.append(self._copy(self._admit(missing)))
            phase.misses += len(missing)
            for expert in cache.arriving.keys() & self._early.keys():
                self._run.ledger.count_delay(self._early[expert])
        phase.lookups += len(needed)
        cache.use(needed, credited=credited, is_step=not self._run.is_prefill)
        cache.unpin()
        return tickets

    def prefetch(self, wanted: Iterable[int], *, kept: Sequence[int]) -> None:
        """Ask for those of these experts that are absent.

        Args:
            wanted: Distinct experts, most likely first; an iterator sees each one's slot taken
                before it is asked for the next.
            kept: Experts that may not go for them, those wanted among them.
        """
        self.cache.pin(kept)
        absent = (expert for expert in wanted if self.cache.slot_of(expert) == EMPTY)
        self._ask_for(absent, is_prefetch=True)
        self.cache.unpin()

    def fetch_behind(
        self, absent: Sequence[int], *, kept: Iterable[int], only_likely: bool
    ) -> None:
        """Ask for experts that nobody waits for, behind the compute enqueued so far.

        Args:
            absent: Distinct experts without a slot, in the router's order.
            kept: Experts that may not go for them.
            only_likely: Ask for the one that is used most alone, and only if it is used more than
                the one it evicts: either costs one copy.
        """
        cache, worth = self.cache, self.cache.state.worth
        cache.pin([*kept, *absent])
        wanted = list(absent[: cache.num_evictable])
        if only_likely and wanted:
            likeliest, victim = max(absent, key=worth.__getitem__), cache.next_victim()
            pays = victim == EMPTY or worth[likeliest] > worth[victim]
            wanted = [likeliest] if pays else []
        self._ask_for(wanted)
        cache.unpin()

    def forget(self) -> None:
        """Empty every slot, and forget what its experts were worth."""
        self.cache.forget()
        self._early.clear()

    def warm(self, rows: Sequence[Sequence[int]]) -> None:
        """Fill the slots with what a recording used most, per token its experts; not counted."""
        self._copy(self.cache.warm(rows)).wait()

    def fill(self) -> None:
        """Make as many experts resident as there are free slots, lowest ids first."""
        absent = [e for e in range(len(self.rows)) if self.cache.slot_of(e) == EMPTY]
        free = self.cache.num_slots - len(self.cache.resident)
        self._copy(self._admit(absent[:free])).wait()

    def check_integrity(self) -> None:
        """Check the tables, and every resident expert against its host row.

        Raises:
            RuntimeError: If they disagree.
        """
        self.cache.check_integrity()
        for expert in self.cache.resident:
            slot = self.cache.slots[self.cache.slot_of(expert)]
            if not torch.equal(slot.cpu(), self.rows[expert]):
                raise RuntimeError(f"The slot of expert {expert} differs from its host row.")

    def _ask_for(self, expert_ids: Iterable[int], *, is_prefetch: bool = False) -> None:
        slots = self._admit(expert_ids, is_prefetch=is_prefetch)
        if slots:
            ticket = self._copy(slots)  # in order: of two in one slot, the one that stays is last
            stay = [expert for expert in slots if self.cache.slot_of(expert) != EMPTY]
            self.cache.arriving.update(dict.fromkeys(stay, ticket))
            if is_prefetch:
                self._early.update(dict.fromkeys(stay, self._run.ledger.asked(len(slots))))

    def _admit(self, expert_ids: Iterable[int], *, is_prefetch: bool = False) -> dict[int, int]:
        """Give absent experts slots, and count their copies; the slot of each."""
        phase, slots = self._run.phase, {}
        for expert in expert_ids:
            slots[expert], is_wasted = self.cache.admit(expert, is_prefetch=is_prefetch)
            phase.wasted_bytes += self.expert_bytes * is_wasted
        if is_prefetch:
            phase.prefetches += len(slots)
            phase.prefetched_bytes += self.expert_bytes * len(slots)
        else:
            phase.fetched_bytes += self.expert_bytes * len(slots)
        return slots

    def _copy(self, slots: dict[int, int]) -> Ticket:
        """Copy experts to the slots they were given."""
        return self._run.transfers.copy(
            [(self.rows[expert], self.cache.slots[slot]) for expert, slot in slots.items()]
        )

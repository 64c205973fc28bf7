"""One layer's slots and tables on the GPU: what is planned, copied and counted for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foreroute.data.adapters import MoELayer
from foreroute.runtime.device.fusions.deferred import Deferred
from foreroute.runtime.device.fusions.routers import Routing
from foreroute.runtime.device.kernels.behind import plan_behind
from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.duel import fill_shadows, follow_lead
from foreroute.runtime.device.kernels.fetch import WORD, fetch
from foreroute.runtime.device.kernels.head import plan_head
from foreroute.runtime.device.kernels.miss import LayerRule, RuledChoice
from foreroute.runtime.device.kernels.plan import plan
from foreroute.runtime.device.kernels.route import DemandPlan
from foreroute.runtime.device.kernels.staging import stage
from foreroute.runtime.device.kernels.tables import MOST_EARLY, ResidencyTables
from foreroute.runtime.device.run_state import DeviceRun
from foreroute.runtime.policies import EvictionPolicy, LayerState
from foreroute.runtime.policies.eviction import ScoreRule
from foreroute.runtime.policies.layer_state import TIE
from foreroute.runtime.store.host_store import RowLayout
from foreroute.runtime.store.pinning import copy_in_parts

FETCH_BLOCKS = 16
"""Thread blocks per expert that is copied beside the compute."""
FILL_EXPERTS = 8


class DeviceResidency:
    """One layer's host rows, its slots, and the tables that say what lies where."""

    def __init__(
        self,
        layer: MoELayer,
        rows: Tensor,
        layout: RowLayout,
        num_slots: int,
        run: DeviceRun,
        counters: Tensor,
        on_miss: LayerRule | None = None,
        *,
        has_shadows: bool = False,
    ) -> None:
        """Allocate the slots, all empty, on the device of the counters.

        Args:
            layer: Handles on the model's modules.
            rows: Host weights, [E, row_bytes] uint8, pinned.
            layout: How an expert lies in a row.
            num_slots: S.
            run: Shared with the engine's other layers.
            counters: This layer's, [8] int32, on the device.
            on_miss: Rule about the router's experts that are absent; all are waited for if None.
            has_shadows: Whether this layer's hits say which of two rules leads.
        """
        device = counters.device
        self.layer_idx = layer.layer_idx
        self.top_k = layer.top_k
        self.rows = rows
        self.on_miss = on_miss
        """What is made of the router's choice before anything is planned."""
        self.slots = torch.zeros(num_slots, rows.shape[1], dtype=torch.uint8, device=device)
        self.weights = layout.weights(self.slots)
        """The slots, as the weights that the products read."""
        self.tables = ResidencyTables.empty(
            len(rows),
            num_slots,
            device,
            trust=run.trust,
            counters=counters,
            lead=run.lead,
            has_shadows=has_shadows and run.lead is not None,
        )
        self.is_pinned = torch.zeros(len(rows), dtype=torch.int32, device=device)
        """Whether the GPU can read an expert's row, [E]; read where the host hands out the rest."""
        self.first_pinned = 0
        """The first such expert; E if there is none."""
        self.place = 0
        """Which of the MoE layers this is."""
        self._first_bytes = _end_of(run.form.first, layout)
        self._run = run

    @property
    def rule(self) -> ScoreRule:
        """How experts are scored for eviction."""
        return self._run.rule

    def demand_of(self, num_ids: int) -> tuple[Demand, Tensor]:
        """Room for a plan of so many experts: the copies, and the places [2, num_ids] int32."""
        device, tables = self.slots.device, self.tables
        copies = torch.empty(3, num_ids, dtype=torch.int32, device=device)
        places = torch.empty(2, num_ids, dtype=torch.int32, device=device)
        demand = Demand(
            self.rows,
            self.slots,
            copies,
            self._run.head_words,
            tables.arrived,
            tables.progress,
            self._first_bytes,
        )
        return demand, places

    def plan_demand(self, expert_ids: Tensor) -> tuple[Demand, Tensor]:
        """What must be copied for these experts, and where each will be.

        Args:
            expert_ids: [T, K], contiguous; no more than there are slots.

        Returns:
            The copies, and the places [2, T * K] int32.
        """
        demand, places = self.demand_of(expert_ids.numel())
        plan(expert_ids, self.tables, self.rule, demand.copies, places=places)
        return self._staged(demand, places)

    def _staged(self, demand: Demand, places: Tensor) -> tuple[Demand, Tensor]:
        """The same, after the host has handed out what the GPU cannot read."""
        staging = self._run.staging
        if staging is None:
            return demand, places
        return stage(demand, places, self.is_pinned, staging, self.place, self.first_pinned)

    def learn_pins(self, is_pinned: Tensor) -> None:
        """Know which rows are page-locked from now on.

        Args:
            is_pinned: [E] bool, on the host.
        """
        self.is_pinned.copy_(is_pinned)
        pinned = is_pinned.nonzero().flatten().tolist()
        self.first_pinned = pinned[0] if pinned else len(is_pinned)

    def _copy(self, copies: Tensor, behind: Tensor | None = None) -> None:
        """Make planned copies of whole experts on the current stream; see `fetch`."""
        if self._run.staging is None:
            fetch(self.rows, self.slots, copies, num_blocks=FETCH_BLOCKS, behind=behind)
            return
        for expert, slot, _ in copies.T.tolist():
            if expert >= 0:
                copy_in_parts(self.slots[slot], self.rows[expert])

    def plan_ruled(
        self,
        router_logits: Tensor,
        expert_ids: Tensor,
        gate_weights: Tensor,
        ranked: Tensor | None = None,
    ) -> tuple[tuple[Demand, Tensor], Tensor, Tensor]:
        """The same after the layer's rule on a miss; and the ids [T, K] and weights that run.

        Args:
            router_logits: [T, E]; as predicted, where those weigh predicted experts.
            expert_ids: The router's, [T, K]; no more than there are slots.
            gate_weights: [T, K].
            ranked: Predicted experts that are to run instead, most likely first, [T, at least K].
        """
        assert self.on_miss is not None
        demand, places = self.demand_of(expert_ids.numel())
        choice = RuledChoice.of(router_logits, expert_ids.long(), gate_weights, ranked)
        ruling = (self.on_miss, choice)
        ids = choice.expert_ids
        plan(ids, self.tables, self.rule, demand.copies, places=places, ruling=ruling)
        return self._staged(demand, places), ids, choice.gate_weights

    def route_and_plan(
        self, routing: Routing, expert_ids: Tensor, on_miss: LayerRule | None
    ) -> tuple[Demand, Tensor]:
        """The same by the launch that runs the layer's router.

        Args:
            routing: Still to run.
            expert_ids: Its choice, or what is planned for in its place, [T, K].
            on_miss: The rule on a miss, if there is one for this step.
        """
        demand, places = self.demand_of(expert_ids.numel())
        is_own = isinstance(expert_ids, Deferred)
        routing.run(
            DemandPlan(
                tables=self.tables,
                rule=self.rule,
                copies=demand.copies,
                places=places,
                expert_ids=None if is_own else expert_ids,
                on_miss=on_miss,
            )
        )
        return self._staged(demand, places)

    def load(self, expert_ids: Tensor, behind: DeviceResidency | None = None) -> None:
        """Make experts resident before they are asked for, by copies on the current stream.

        Args:
            expert_ids: [T, K], contiguous; the first ones that find room.
            behind: A layer whose demand is copied first.
        """
        copies = torch.empty(3, expert_ids.numel(), dtype=torch.int32, device=expert_ids.device)
        plan(expert_ids, self.tables, self.rule, copies, is_prefetch=True)
        self._copy(copies, None if behind is None else behind.tables.progress)

    def load_likely(self, expert_ids: Tensor, chances: Tensor, behind: DeviceResidency) -> None:
        """Copy as much of the likeliest absent experts as there is time for.

        Args:
            expert_ids: [T, M], most likely first.
            chances: How likely each is needed, [T, M] float32, 0..1.
            behind: A layer whose demand is copied first.
        """
        most = min(MOST_EARLY, expert_ids.numel())
        copies = torch.empty(3, most, dtype=torch.int32, device=expert_ids.device)
        head_words = self._run.head_words
        plan_head(
            expert_ids,
            chances,
            self.tables,
            copies,
            num_needed=len(expert_ids) * self.top_k,
            head_words=head_words,
            num_words=self.rows.shape[1] // WORD.itemsize,
            num_whole=self._run.num_whole,
        )
        fetch(
            self.rows,
            self.slots,
            copies,
            num_blocks=FETCH_BLOCKS,
            head_words=head_words,
            behind=behind.tables.progress,
        )

    def load_left(self, chosen: Tensor, run: Tensor) -> None:
        """Copy what the router chose and the rule on a miss did not wait for, where that pays.

        Args:
            chosen: The router's experts, [T, K], contiguous.
            run: What ran in their place, [T, K], contiguous.
        """
        assert self.on_miss is not None  # it left them
        copies = torch.empty(3, chosen.numel(), dtype=torch.int32, device=chosen.device)
        only_likely = not self.on_miss.rule.waits_for_none
        judged = self.on_miss.judged
        plan_behind(chosen, run, self.tables, judged, copies, only_likely=only_likely)
        self._copy(copies)

    def warm(self, rows: Sequence[Sequence[int]], policy: EvictionPolicy) -> None:
        """Count a recording's uses, and make the experts resident that it used most.

        Args:
            rows: By token, the experts used, [T][K].
            policy: What counts for how much.
        """
        state = LayerState(policy, len(self.rows), len(self.slots))
        state.warm(rows)
        held = [expert for expert in state.expert_in if expert >= 0]
        for ids in torch.tensor(held, device=self.slots.device).split(FILL_EXPERTS):
            self.load(ids)
        unit = 1.0 if policy.worth == "recency" else state.unit
        tables, worth = self.tables, torch.tensor(state.worth) / unit
        tables.score.copy_(worth)
        tables.step.fill_(state.step)
        tables.is_unused_prefetch.zero_()
        if tables.rivals is not None:
            tables.rivals.copy_(torch.stack([worth, torch.tensor(state.used_at)]))
            fill_shadows(tables)

    def count_prompt(self, expert_ids: Tensor) -> None:
        """Let a prompt's uses count for eviction, the last token's most.

        Args:
            expert_ids: Of the prompt's tokens, in order, [T, K].
        """
        weight, rule = self._run.prompt_weight, self.rule
        if not weight:
            return
        tables, num_tokens = self.tables, len(expert_ids)
        if rule.is_recency:
            self._date(expert_ids, tables.score, TIE)
        elif tables.rivals is None:
            _fade(expert_ids, tables.score, rule.decay, weight)
        else:
            frequency, used_at = tables.rivals
            _fade(expert_ids, frequency, rule.decay, weight)
            self._date(expert_ids, used_at)
            fill_shadows(tables)
            follow_lead(tables)
        if rule.is_recency or rule.is_adaptive:
            tables.step.add_(num_tokens)

    def _date(self, expert_ids: Tensor, used_at: Tensor, tie: float = 0.0) -> None:
        """Set the steps of last uses, [E], later by `tie` per place in a token's choice."""
        device = used_at.device
        steps = self.tables.step + torch.arange(1, len(expert_ids) + 1, device=device)
        place = torch.arange(expert_ids.shape[1], device=device)
        dates = steps.unsqueeze(1) + tie * place  # [T, K]
        used_at.scatter_reduce_(0, expert_ids.flatten().long(), dates.flatten(), "amax")

    def fill(self) -> None:
        """Make as many experts resident as fit, lowest ids first."""
        every = torch.arange(len(self.slots), device=self.slots.device)
        for ids in every.split(FILL_EXPERTS):
            self.load(ids)

    def check_integrity(self) -> None:
        """Check the tables, and every resident expert against its host row.

        Raises:
            RuntimeError: If they disagree.
        """
        self.tables.check_integrity()
        for slot, expert in enumerate(self.tables.expert_in.tolist()):
            if expert >= 0 and not torch.equal(self.slots[slot].cpu(), self.rows[expert]):
                raise RuntimeError(
                    f"Layer {self.layer_idx}: slot {slot} differs from the host's expert {expert}."
                )


def _fade(expert_ids: Tensor, score: Tensor, decay: float, weight: float) -> None:
    """Decay scores, [E], over a prompt's tokens, each of whose uses counts `weight`."""
    num_tokens = len(expert_ids)
    age = torch.arange(num_tokens - 1, -1, -1, device=score.device)
    uses = torch.zeros(num_tokens, len(score), device=score.device).scatter_(
        1, expert_ids.long(), 1.0
    )
    score.mul_(decay**num_tokens).add_(weight * (decay**age @ uses))


def _end_of(parameter: str, layout: RowLayout) -> int:
    """Bytes of a row up to the end of a weight, with its bias and its scales if it has any."""
    specs = [spec for name, spec in layout.parameters.items() if name.startswith(parameter)]
    return max(spec.offset_bytes + spec.num_bytes for spec in specs)

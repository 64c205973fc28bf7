"""Runs one MoE layer with every decision on the GPU: no id comes to the host while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoELayer
from foreroute.runtime.config import PrefetchMode
from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.fetch import BLOCK_WORDS, WORD, fetch
from foreroute.runtime.device.kernels.head import plan_head
from foreroute.runtime.device.kernels.plan import plan
from foreroute.runtime.device.kernels.products import expert_products
from foreroute.runtime.device.kernels.tables import ResidencyTables, ScoreRule
from foreroute.runtime.device.predictor import DevicePredictor
from foreroute.runtime.device.prefill import StreamedPrefill
from foreroute.runtime.policies import EvictionPolicy, LayerState
from foreroute.runtime.store.host_store import RowLayout

FETCH_BLOCKS = 16
"""Thread blocks per expert that is copied beside the compute."""
FILL_EXPERTS = 8


@dataclass
class DeviceRun:
    """What the layers of one engine share."""

    rule: ScoreRule
    form: ExpertForm
    prefill: StreamedPrefill
    predictor: DevicePredictor | None
    prefetch: PrefetchMode
    ahead: torch.cuda.Stream
    """Predictions and prefetches run here, beside the compute."""
    head_words: Tensor
    """Where an expert's head ends, [1] int32 on the device; see `fetch`."""
    trust: Tensor
    """See `ResidencyTables`."""
    prompt_weight: float
    """What one use by a prompt counts for eviction, in uses by a decode step."""
    is_prefill: bool = True
    is_looking_ahead: bool = True
    """Whether decode steps predict; read when a step is captured."""

    def set_head(self, share: float, row_bytes: int) -> None:
        """Make heads this share of an expert, in whole blocks of the fetch kernel.

        Args:
            share: 0..1.
            row_bytes: Of an expert.
        """
        words = row_bytes // WORD.itemsize
        blocks = max(1, round(share * words / BLOCK_WORDS))
        self.head_words.fill_(min(words, blocks * BLOCK_WORDS))


class DeviceLayer:
    """One layer's slots and tables on the device, and the function in its experts' place."""

    def __init__(
        self,
        layer: MoELayer,
        rows: Tensor,
        layout: RowLayout,
        num_slots: int,
        run: DeviceRun,
        counters: Tensor,
        device: torch.device,
    ) -> None:
        """Allocate the slots, all empty.

        Args:
            layer: Handles on the model's modules.
            rows: Host weights, [E, row_bytes] uint8, pinned.
            layout: How an expert lies in a row.
            num_slots: S.
            run: Shared with the engine's other layers.
            counters: This layer's, [7] int32, on the device.
            device: The GPU.
        """
        self.layer_idx = layer.layer_idx
        self.experts = layer.experts
        self.top_k = layer.top_k
        self.rows = rows
        self.slots = torch.zeros(num_slots, rows.shape[1], dtype=torch.uint8, device=device)
        self.weights = layout.weights(self.slots)
        self._first_bytes = _end_of(run.form.first, layout)
        self.tables = ResidencyTables.empty(
            len(rows), num_slots, device, trust=run.trust, counters=counters
        )
        self.target: DeviceLayer | None = None
        """The layer whose experts are predicted from this one's state."""
        self.residual: Tensor | None = None
        """Set by a hook on the norm; only where estimators read it."""
        self.num_calls = 0
        self._run = run
        self._arriving: torch.cuda.Event | None = None
        self._read_ahead: tuple[Tensor, ...] = ()

    @property
    def rule(self) -> ScoreRule:
        """How experts are scored for eviction."""
        return self._run.rule

    def __call__(
        self, experts: nn.Module, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Stand in for the experts module.

        Args:
            experts: The module, without weights.
            router_input: [T, D].
            expert_ids: The router's choice, [T, K].
            gate_weights: [T, K].

        Returns:
            [T, D].
        """
        self.num_calls += 1
        if self._run.is_prefill:
            return self._run.prefill.run(self, router_input, expert_ids, gate_weights)
        return self._decode(router_input.contiguous(), expert_ids, gate_weights)

    def _decode(self, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Tensor:
        guess = self._predict(router_input, expert_ids, gate_weights)
        self._join_prefetch()
        output = torch.empty_like(router_input)
        num_tokens, top_k = expert_ids.shape
        tokens_at_once = len(self.slots) // top_k
        for start in range(0, num_tokens, tokens_at_once):
            tokens = slice(start, start + tokens_at_once)
            demand, places = self._plan_demand(expert_ids[tokens].contiguous())
            if guess is not None:
                self._run.ahead.wait_stream(torch.cuda.current_stream())
            weights = gate_weights[tokens].contiguous()
            form = self._run.form
            expert_products(
                router_input[tokens], places, weights, self.weights, form, output[tokens], demand
            )
        if guess is not None:
            self._look_ahead(*guess)
        return output

    def _plan_demand(self, expert_ids: Tensor) -> tuple[Demand, Tensor]:
        """What must be copied for these experts, [T, K] contiguous, and where each will be."""
        num_ids, device = expert_ids.numel(), expert_ids.device
        copies = torch.empty(3, num_ids, dtype=torch.int32, device=device)
        places = torch.empty(2, num_ids, dtype=torch.int32, device=device)
        tables = self.tables
        plan(expert_ids, tables, self._run.rule, copies, places=places)
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

    def load(self, expert_ids: Tensor, behind: DeviceLayer | None = None) -> None:
        """Make experts resident before they are asked for, by copies on the current stream.

        Args:
            expert_ids: [T, K], contiguous; the first ones that find room.
            behind: A layer whose demand is copied first.
        """
        copies = torch.empty(3, expert_ids.numel(), dtype=torch.int32, device=expert_ids.device)
        plan(
            expert_ids,
            self.tables,
            self._run.rule,
            copies,
            is_prefetch=True,
            behind=None if behind is None else behind.tables.progress,
        )
        fetch(self.rows, self.slots, copies, num_blocks=FETCH_BLOCKS)

    def _load_head(self, expert_ids: Tensor, chances: Tensor, behind: DeviceLayer) -> None:
        """Copy the beginning of the likeliest absent expert, if it is likely enough."""
        copies = torch.empty(3, 1, dtype=torch.int32, device=expert_ids.device)
        head_words = self._run.head_words
        plan_head(
            expert_ids,
            chances,
            self.tables,
            copies,
            num_needed=len(expert_ids) * self.top_k,
            head_words=head_words,
            num_words=self.rows.shape[1] // WORD.itemsize,
            behind=behind.tables.progress,
        )
        fetch(self.rows, self.slots, copies, num_blocks=FETCH_BLOCKS, head_words=head_words)

    def _predict(
        self, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Rank the target layer's experts, on the stream beside this layer's own demand."""
        run = self._run
        if self.target is None or run.predictor is None or not run.is_looking_ahead:
            return None
        run.ahead.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(run.ahead):
            guess = run.predictor.predict(
                self.layer_idx,
                residual=self.residual,
                router_input=router_input,
                expert_ids=expert_ids,
                gate_weights=gate_weights,
            )
        # read on the other stream until the target joins it: keep the memory from being used again
        states = (self.residual, router_input, expert_ids, gate_weights, *guess)
        self.target._read_ahead = tuple(state for state in states if state is not None)
        return guess

    def _look_ahead(self, expert_ids: Tensor, chances: Tensor) -> None:
        """Load ahead for the target layer, behind this layer's demand: that has the link alone."""
        target, run = self.target, self._run
        assert target is not None  # there is a guess
        with torch.cuda.stream(run.ahead):
            if run.prefetch == "auto":
                target._load_head(expert_ids, chances, behind=self)
            else:
                ids = expert_ids.T.contiguous()  # [M, T]: every token's best guess first
                target.load(ids, behind=self)
            target._arriving = torch.cuda.Event()
            target._arriving.record(run.ahead)

    def _join_prefetch(self) -> None:
        if self._arriving is not None:
            torch.cuda.current_stream().wait_event(self._arriving)
            self._arriving, self._read_ahead = None, ()

    def warm(self, rows: Sequence[Sequence[int]], policy: EvictionPolicy) -> None:
        """Count a recording's uses, per token its experts, and make the best ones resident."""
        state = LayerState(policy, len(self.rows), len(self.slots))
        state.warm(rows)
        held = [expert for expert in state.expert_in if expert >= 0]
        for ids in torch.tensor(held, device=self.slots.device).split(FILL_EXPERTS):
            self.load(ids)
        unit = 1.0 if policy.worth == "recency" else state.unit
        self.tables.score.copy_(torch.tensor(state.worth) / unit)
        self.tables.step.fill_(state.step)
        self.tables.is_unused_prefetch.zero_()

    def count_prompt(self, expert_ids: Tensor) -> None:
        """Let a prompt's uses count for eviction, the last token's most.

        Args:
            expert_ids: Of the prompt's tokens, in order, [T, K].
        """
        weight, rule = self._run.prompt_weight, self.rule
        if not weight or rule.is_recency:
            return
        num_tokens, score = len(expert_ids), self.tables.score
        age = torch.arange(num_tokens - 1, -1, -1, device=score.device)
        uses = torch.zeros(num_tokens, len(score), device=score.device).scatter_(
            1, expert_ids.long(), 1.0
        )
        score.mul_(rule.decay**num_tokens).add_(weight * (rule.decay**age @ uses))

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


def _end_of(parameter: str, layout: RowLayout) -> int:
    """Bytes of a row up to the end of a weight, with its bias and its scales if it has any."""
    specs = [spec for name, spec in layout.parameters.items() if name.startswith(parameter)]
    return max(spec.offset_bytes + spec.num_bytes for spec in specs)

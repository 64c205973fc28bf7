"""The engine's plan, fetch, products and predictions at one layer, as a decode step calls them.

All that `foreroute profile` knows of these kernels is here.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.fetch import WORD, fetch
from foreroute.runtime.device.kernels.head import plan_head
from foreroute.runtime.device.kernels.plan import plan
from foreroute.runtime.device.kernels.predict import predict_logits, rank_experts
from foreroute.runtime.device.kernels.products import expert_products
from foreroute.runtime.device.kernels.tables import ResidencyTables
from foreroute.runtime.device.kernels.top_k import softmax_top_k
from foreroute.runtime.device.residency import FETCH_BLOCKS
from foreroute.runtime.planning.attention_kernels import AttentionKernels
from foreroute.runtime.planning.layer_shape import BYTES, EPS, LayerShape, random_weights
from foreroute.runtime.planning.timings import Call
from foreroute.runtime.policies import DEFAULT_POLICY, find_policy

BLOCKS_ALONE = 32
"""Thread blocks per expert of a fetch that runs alone."""
FORM = ExpertForm(activation="silu")
KNOTS = 65
"""Length of the table of probabilities."""
LIKELY = 0.9
LAYERS = 48
"""Layers, or calls of one kernel, in a row."""


@dataclass(frozen=True)
class Round:
    """Calls in a row, each for other experts than the last; may be repeated at once."""

    run: Call
    count: int


class EngineKernels:
    """One layer's kernels, and the next layer's table.

    A round of demands or of layers holds for the tables until the next one is made, a round of
    prefetches likewise; one of each may run at the same time.
    """

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        """Make weights up, and host rows enough to miss all the time.

        Args:
            shape: Of the layer.
            device: A GPU, or a CPU with interpreted kernels.
        """
        self.shape, self.device = shape, device
        self._attention = AttentionKernels(shape, device)
        self._router, self._estimator, self._vectors = (
            random_weights(shape.experts, shape.hidden, device=device) for _ in range(3)
        )
        self._norm = random_weights(shape.hidden, device=device)
        self._state = random_weights(1, shape.hidden, device=device)
        self._gates = torch.full((1, shape.top_k), 1 / shape.top_k, device=device)
        self._bias = torch.zeros(shape.experts, device=device)
        self._unlikely = torch.zeros(KNOTS, device=device)
        self._likely = torch.full((1, shape.top_k), LIKELY, device=device)
        self._ahead = torch.cuda.Stream(priority=-1) if device.type == "cuda" else None
        self._rule = find_policy(DEFAULT_POLICY).device_rule()
        self._make_experts()

    def _make_experts(self) -> None:
        shape, device = self.shape, self.device
        self.tables, self.next_tables = (
            ResidencyTables.empty(shape.experts, shape.slots, device) for _ in range(2)
        )
        self._every = torch.arange(shape.slots + 2 * shape.top_k, device=device)
        slots = random_weights(shape.slots, shape.expert_bytes // 2, device=device)
        (rows, columns), second = shape.expert
        parts = slots.split([rows * columns, second[0] * second[1]], 1)
        self._weights = {
            "gate_up_proj": parts[0].unflatten(1, (rows, columns)),
            "down_proj": parts[1].unflatten(1, second),
        }
        self._slots = slots.view(torch.uint8)
        self._rows = torch.empty(
            len(self._every), shape.expert_bytes, dtype=torch.uint8, pin_memory=slots.is_cuda
        )
        for expert, row in enumerate(self._rows):
            row.copy_(self._slots[expert % shape.slots])

    def demands(self, absent: int, parts: int = 1) -> Round:
        """Plan and fetch one token's experts.

        Args:
            absent: How many of them are not resident, 0..K.
            parts: Experts are a whole one's bytes over this.
        """
        asked = self._ask(absent)
        rows = self._rows.view(-1, self.shape.expert_bytes // parts)
        slots = self._slots.view(-1, rows.shape[1])
        words = self._words(parts)

        def run() -> None:
            for ids in asked:
                copies = self._copies(ids.numel())
                plan(ids, self.tables, self._rule, copies)
                fetch(rows, slots, copies, num_blocks=BLOCKS_ALONE, head_words=words)

        return Round(run, len(asked))

    def services(self, absent: int) -> Round:
        """Plan one token's experts and multiply them, fetching what is missing meanwhile.

        Args:
            absent: How many of them are not resident, 0..K.
        """
        asked, words = self._ask(absent), self._words(1)

        def run() -> None:
            for ids in asked:
                demand, places = self._plan(ids, words)
                self._multiply(self._state, places, self._gates, demand)

        return Round(run, len(asked))

    def layers(self, *, looks_ahead: bool) -> Round:
        """Whole layers with all their experts there; looking ahead finds nothing to fetch."""
        asked, words = self._ask(0), self._words(1)
        self._fill(self.next_tables)

        def run() -> None:
            for call in range(LAYERS):
                self._layer(asked[call % len(asked)], words, looks_ahead)

        return Round(run, LAYERS)

    def predictions(self) -> Round:
        """Logits, then ranks and probabilities, of a token."""
        ids = self._every[: self.shape.top_k].view(1, -1)

        def run() -> None:
            for _ in range(LAYERS):
                self._predict(self._state, ids, self._gates)

        return Round(run, LAYERS)

    def head_plans(self) -> Round:
        """Choices of a head, each finding one."""
        guesses, words = self._guess(), self._words(1)

        def run() -> None:
            for ids in guesses:
                self._plan_head(ids, self._likely, words)

        return Round(run, len(guesses))

    def prefetches(self, parts: int) -> Round:
        """Heads planned and fetched on the stream beside, one after the other.

        Args:
            parts: Heads are a whole expert's bytes over this.
        """
        guesses, words = self._guess(), self._words(parts)

        def run() -> None:
            for ids in guesses:
                with self._beside():
                    self._fetch_head(self._plan_head(ids, self._likely, words), words)
                self._join()

        return Round(run, len(guesses))

    def _ask(self, absent: int) -> list[Tensor]:
        """What demands ask for, [1, K] each, until they begin again; sets the table up for it."""
        every, top_k = self._every, self.shape.top_k
        if absent == 0:
            self._fill(self.tables)
            resident = every[: self.shape.slots // top_k * top_k]
            return [ids.view(1, -1) for ids in resident.split(top_k)]
        self.tables.reset()
        stay, in_turn = every[: top_k - absent], every[top_k:]
        in_turn = in_turn[: len(in_turn) // absent * absent]
        return [torch.cat([stay, ids]).view(1, -1) for ids in in_turn.split(absent)]

    def _guess(self) -> list[Tensor]:
        """Predictions, [1, K] each, one of them absent; sets the next layer's table up for it."""
        self._fill(self.next_tables)
        stay, absent = self._every[: self.shape.top_k - 1], self._every[self.shape.slots :]
        return [torch.cat([stay, ids]).view(1, -1) for ids in absent.split(1)]

    def _fill(self, tables: ResidencyTables) -> None:
        tables.reset()
        for ids in self._every[: self.shape.slots].split(self.shape.top_k):
            plan(ids, tables, self._rule, self._copies(len(ids)))

    def _layer(self, ids: Tensor, words: Tensor, looks_ahead: bool) -> None:
        state = self._attention.attend(self._state)
        hidden = rms_norm(state, self._norm.shape, self._norm, EPS)
        gates, _ = softmax_top_k(linear(hidden, self._router), self.shape.top_k, renormalise=True)
        if looks_ahead:
            with self._beside():
                guess = self._predict(state, ids, gates)
        demand, places = self._plan(ids, words)
        if looks_ahead:
            self._beside()  # waits for the plan, not for the products
        state + self._multiply(hidden, places, gates, demand)
        if looks_ahead:
            with self._stream_beside():
                self._fetch_head(self._plan_head(*guess, words), words)
            self._join()

    def _plan(self, ids: Tensor, words: Tensor) -> tuple[Demand, Tensor]:
        tables, (rows, columns) = self.tables, self.shape.expert[0]
        copies, places = self._copies(ids.numel()), self._copies(ids.numel())[:2]
        plan(ids, tables, self._rule, copies, places=places)
        moved = (self._rows, self._slots, copies, words, tables.arrived, tables.progress)
        return Demand(*moved, first_bytes=rows * columns * BYTES), places

    def _multiply(self, hidden: Tensor, places: Tensor, gates: Tensor, demand: Demand) -> Tensor:
        output = torch.empty_like(hidden)
        expert_products(hidden, places, gates, self._weights, FORM, output, demand)
        return output

    def _predict(self, state: Tensor, ids: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        scores = predict_logits(
            state,
            self._estimator,
            self._bias,
            eps=EPS,
            default_vectors=self._vectors,
            expert_ids=ids,
            gate_weights=gates,
        )
        table, top_k = self._unlikely, self.shape.top_k
        return rank_experts(scores, table[:1], table[:1], table, top_k=top_k, budget=top_k)

    def _plan_head(self, ids: Tensor, chances: Tensor, words: Tensor) -> Tensor:
        copies = self._copies(1)
        plan_head(
            ids,
            chances,
            self.next_tables,
            copies,
            num_needed=ids.numel(),
            head_words=words,
            num_words=self.shape.expert_bytes // WORD.itemsize,
        )
        return copies

    def _fetch_head(self, copies: Tensor, words: Tensor) -> None:
        fetch(self._rows, self._slots, copies, num_blocks=FETCH_BLOCKS, head_words=words)

    def _copies(self, count: int) -> Tensor:
        return torch.empty(3, count, dtype=torch.int32, device=self.device)

    def _words(self, parts: int) -> Tensor:
        """Where heads of a part of an expert end."""
        words = self.shape.expert_bytes // parts // WORD.itemsize
        return torch.tensor([words], dtype=torch.int32, device=self.device)

    def _beside(self) -> AbstractContextManager[object]:
        """The stream for what is done ahead, behind everything so far."""
        if self._ahead is not None:
            self._ahead.wait_stream(torch.cuda.current_stream())
        return self._stream_beside()

    def _stream_beside(self) -> AbstractContextManager[object]:
        """The stream for what is done ahead."""
        return contextlib.nullcontext() if self._ahead is None else torch.cuda.stream(self._ahead)

    def _join(self) -> None:
        if self._ahead is not None:
            torch.cuda.current_stream().wait_stream(self._ahead)

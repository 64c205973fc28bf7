"""Computes one MoE layer whose experts live in host memory, and looks ahead to a later one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters import (
    ExpertsView,
    MoELayer,
    combine,
    grouped_function,
    is_adapted,
    stock_experts_function,
    unweighted_outputs,
)
from foreroute.data.routes import GUESSES_PER_EXPERT
from foreroute.estimators.selection import nearly_chosen
from foreroute.runtime.hooks import SourceStates
from foreroute.runtime.host.judge import HostJudge
from foreroute.runtime.host.predictor import HostPredictor, Prediction, distinct, most_wanted
from foreroute.runtime.host.residency import HostResidency
from foreroute.runtime.host.run_state import HostRun
from foreroute.runtime.host.slot_cache import EMPTY

GATHER_LIMIT_BYTES = 64 * 2**20  # batched_mm copies a token's experts: bound what one call copies


class HostLayer:
    """One MoE layer's cache and the function that takes its experts' place."""

    def __init__(
        self, layer: MoELayer, residency: HostResidency, run: HostRun, judge: HostJudge | None
    ) -> None:
        """Connect the parts.

        Args:
            layer: Handles on the model's modules.
            residency: The layer's slots and host rows.
            run: Shared with the engine's other layers.
            judge: Applies the rule on a miss; None where this layer is exact.
        """
        self.layer_idx = layer.layer_idx
        self.residency = residency
        self.target: HostLayer | None = None
        """The layer whose experts are predicted from this one's state."""
        self.seen_from = 1.0
        """Layers from the state that predicts this one; a part of one if that is its own input."""
        self.num_calls = 0
        self.states = SourceStates()
        self.layer_input: Tensor | None = None
        """Set by a hook on the decoder layer, [T, D]; only where estimators read it."""
        self.router_logits: Tensor | None = None
        """Set by a hook on the router, [T, E]; only where a rule or a policy reads it."""
        self._run = run
        self._judge = judge
        self._view: Any = ExpertsView(layer.experts, residency.cache.weights)
        self._per_token = stock_experts_function("batched_mm", layer.experts)
        self._grouped = grouped_function(layer.experts)
        self._prediction: Prediction | None = None

    def __call__(
        self, experts: nn.Module, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        """Stand in for the experts module.

        Args:
            experts: The module, without weights.
            router_input: [T, D].
            expert_ids: The true router's choice, [T, K].
            gate_weights: [T, K].

        Returns:
            [T, D].
        """
        self.num_calls += 1
        if is_adapted(experts):  # the host's weights, and no slot
            return self._per_token(experts, router_input, expert_ids, gate_weights)
        if self._run.config.cache == "none":
            self.residency.cache.clear()
        if self._run.is_prefill:
            self._prediction = None
            rows = expert_ids.tolist()
            if self._run.config.warm_start == "prompt":
                self.residency.cache.count_prompt(rows)
            return self._run_exact(router_input, expert_ids, rows, gate_weights)
        output = self._decode(router_input, expert_ids, gate_weights)
        if self._run.policy.likely_bonus:
            self._expect_next(expert_ids.shape[-1])
        return output

    def forget(self) -> None:
        """Empty the slots, and drop what a broken forward pass left."""
        self.residency.forget()
        self._prediction = None
        self.residual = self.router_input = self.layer_input = self.router_logits = None

    def _expect_next(self, top_k: int) -> None:
        """Credit what the router nearly chose: the next token may."""
        assert self.router_logits is not None  # the engine hooks the router under this policy
        chances = nearly_chosen(self.router_logits, top_k).amax(0)  # [E], of any of the tokens
        best = chances.topk(min(GUESSES_PER_EXPERT * top_k, len(chances)))
        self.residency.cache.state.expect(best.indices.tolist(), best.values.tolist())

    def _decode(self, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Tensor:
        prediction, self._prediction = self._prediction, None
        judge, ruling = self._judge, None
        if judge is not None:
            ruling = judge.rule_on(expert_ids, gate_weights, self.router_logits, prediction)
        if ruling is None:
            rows, onward = self._look_ahead(expert_ids, router_input, expert_ids, gate_weights)
            self._settle(rows)
            return self._run_exact(router_input, expert_ids, rows, gate_weights, onward)
        ids, weights = ruling.expert_ids, ruling.gate_weights
        facts = torch.cat([expert_ids, ids, ruling.is_run.long()], dim=-1)
        known, onward = self._look_ahead(facts, router_input, ids, weights)
        true_rows, rows, is_run = _split(known, 3)
        self._settle(true_rows)
        assert judge is not None  # it ruled
        judge.count(true_rows, rows, is_run)
        chosen = distinct(expert for row in true_rows for expert in row)
        output = self._run_exact(router_input, ids, rows, weights, onward, chosen)
        self._fetch_behind(chosen, distinct(expert for row in rows for expert in row))
        return output

    def _settle(self, true_rows: list[list[int]]) -> None:
        """Let the chooser learn from what the router chose."""
        if self._run.chooser is not None and self._run.looks_ahead:
            needed = {expert for row in true_rows for expert in row}
            here = self.residency.cache.state.here
            has_missed = not all(here[expert] for expert in needed)
            self._run.chooser.settle(self.layer_idx, needed, has_missed=has_missed)

    def _fetch_behind(self, chosen: list[int], run: list[int]) -> None:
        """Ask for what the router chose and the rule did not wait for."""
        rule, slot_of = self._run.config.rule, self.residency.cache.slot_of
        if not rule.fetches_behind:
            return
        absent = [expert for expert in chosen if slot_of(expert) == EMPTY]
        only_likely = not rule.waits_for_none
        self.residency.fetch_behind(absent, kept=[*chosen, *run], only_likely=only_likely)

    def _look_ahead(
        self,
        facts: Tensor,
        router_input: Tensor,
        run_ids: Tensor,
        run_weights: Tensor,
    ) -> tuple[list[list[int]], Prediction | None]:
        """Facts [T, any], and the prediction for the target layer, with one sync of the host.

        The prediction stands on the experts that run here, which a rule may have replaced.
        """
        run = self._run
        predictor, is_own = run.predictor, self.target is self
        if predictor is None or not run.looks_ahead or self.target is None or is_own:
            return facts.tolist(), None
        with run.ledger.spending():
            logits, ranked = predictor.predict(
                self.layer_idx,
                residual=self.states.residual,
                router_input=self.states.router_input(router_input),
                expert_ids=run_ids,
                gate_weights=run_weights,
                layer_input=self.layer_input,
            )
            columns = self._for_host(predictor, facts, ranked, logits)
        return _on_host(columns, ranked, logits)

    def enter(self, layer_input: Tensor) -> None:
        """The decoder layer begins: load what is predicted for it, before its attention runs.

        Args:
            layer_input: What enters it, [T, D].
        """
        self.layer_input = layer_input
        if self.target is self:
            self._expect_own(layer_input)

    def _expect_own(self, layer_input: Tensor) -> None:
        run, predictor = self._run, self._run.predictor
        if predictor is None or not run.looks_ahead:
            return
        with run.ledger.spending():
            logits, ranked = predictor.predict(self.layer_idx, layer_input=layer_input)
            columns = self._for_host(predictor, ranked[:, :0], ranked, logits)
        self.expect(_on_host(columns, ranked, logits)[1])

    def _for_host(
        self, predictor: HostPredictor, facts: Tensor, ranked: Tensor, logits: Tensor
    ) -> Tensor:
        """Facts [T, any], the ranking [T, M] and, where a chooser decides, its chances."""
        columns = [facts, ranked]
        if self._run.chooser is not None:
            chances = predictor.probabilities(self.layer_idx, logits)  # [T, E]
            columns = [facts.float(), ranked.float(), chances.gather(-1, ranked)]
        return torch.cat(columns, dim=-1)

    def _run_exact(
        self,
        router_input: Tensor,
        expert_ids: Tensor,
        id_rows: list[list[int]],
        gate_weights: Tensor,
        onward: Prediction | None = None,
        credited: list[int] | None = None,
    ) -> Tensor:
        """Compute these experts for these tokens, fetching what is missing."""
        needed = distinct(expert for row in id_rows for expert in row)
        cache = self.residency.cache
        if _is_cast(router_input):
            return self._run_by_tokens(router_input, expert_ids, id_rows, gate_weights, onward)
        copied_bytes = expert_ids.numel() * self.residency.expert_bytes
        is_one_call = copied_bytes <= GATHER_LIMIT_BYTES and not self._is_grouped(expert_ids)
        if len(needed) > cache.num_slots or not is_one_call:
            output = self._run_in_groups(router_input, expert_ids, needed, gate_weights)
            self._prefetch_onward(onward)
            return output
        tickets = self.residency.fetch(needed, credited)
        self._prefetch_onward(onward)
        for ticket in tickets:
            ticket.wait()
        slot_ids = cache.slot_ids(id_rows, router_input.device)
        return self._per_token(self._view, router_input, slot_ids, gate_weights)

    def _run_in_groups(
        self, router_input: Tensor, expert_ids: Tensor, needed: list[int], gate_weights: Tensor
    ) -> Tensor:
        """Compute with more experts, or more pairs, than slots or one call can take."""
        cache, top_k = self.residency.cache, expert_ids.shape[-1]
        worth = cache.state.worth
        # resident first: nothing is copied twice; then ascending, so that the best stay
        order = sorted(needed, key=lambda e: (cache.slot_of(e) == EMPTY, worth[e]))
        flat_ids = expert_ids.reshape(-1)  # [T * K]
        outputs = router_input.new_empty(flat_ids.numel(), router_input.shape[-1])
        for start in range(0, len(order), cache.num_slots):
            group = order[start : start + cache.num_slots]
            for ticket in self.residency.fetch(group):
                ticket.wait()
            slot_of = torch.full((len(self.residency.rows),), EMPTY)  # [E]
            slot_of[group] = torch.tensor([cache.slot_of(e) for e in group])
            slot_of_pair = slot_of.to(flat_ids.device)[flat_ids]  # [T * K]
            for pairs in self._chunks((slot_of_pair != EMPTY).nonzero().squeeze(1)):
                outputs[pairs] = self._pair_outputs(router_input, pairs, top_k, slot_of_pair)
        return combine(outputs, gate_weights)

    def _run_by_tokens(
        self,
        router_input: Tensor,
        expert_ids: Tensor,
        id_rows: list[list[int]],
        gate_weights: Tensor,
        onward: Prediction | None,
    ) -> Tensor:
        """Compute as many whole tokens at once as slots allow.

        Under autocast what an expert puts out is rounded before its gate weight comes, by rules of
        each model's own: only the stock function, called for whole tokens, rounds as it does.
        """
        cache, outputs, start = self.residency.cache, [], 0
        while start < len(id_rows):
            needed: list[int] = []
            end = start
            while end < len(id_rows):
                more = distinct([*needed, *id_rows[end]])
                if len(more) > cache.num_slots:
                    break
                needed, end = more, end + 1
            for ticket in self.residency.fetch(needed):
                ticket.wait()
            slot_ids = cache.slot_ids(id_rows[start:end], router_input.device)
            tokens = slice(start, end)
            states = router_input[tokens], slot_ids, gate_weights[tokens]
            outputs.append(self._per_token(self._view, *states))
            start = end
        self._prefetch_onward(onward)
        return torch.cat(outputs)

    def _is_grouped(self, expert_ids: Tensor) -> bool:
        """Whether pairs are sorted by expert and multiplied together: prompts on a GPU.

        Not on a CPU, where results shall equal batched_mm's bit for bit.
        """
        return self._run.is_prefill and expert_ids.device.type == "cuda"

    def _chunks(self, pairs: Tensor) -> tuple[Tensor, ...]:
        """Split pairs so that one call copies a bounded number of weights."""
        if self._is_grouped(pairs):
            return (pairs,)
        chunks: tuple[Tensor, ...] = pairs.split(
            max(2, GATHER_LIMIT_BYTES // self.residency.expert_bytes)
        )
        return chunks

    def _pair_outputs(
        self, router_input: Tensor, pairs: Tensor, top_k: int, slot_of_pair: Tensor
    ) -> Tensor:
        """Unweighted outputs of some (token, expert) pairs, [pairs, D]."""
        is_alone = len(pairs) == 1 and len(slot_of_pair) > 1
        if is_alone:  # a product of one row may round differently from the same row among several
            pairs = pairs.repeat(2)
        hidden, slots = router_input[pairs // top_k], slot_of_pair[pairs]
        if self._is_grouped(pairs):
            view, slots = self._view.decoded(slots)
            outputs = unweighted_outputs(self._grouped, view, hidden, slots)
        else:
            outputs = unweighted_outputs(self._per_token, self._view, hidden, slots)
        return outputs[:1] if is_alone else outputs

    def _prefetch_onward(self, onward: Prediction | None) -> None:
        if onward is not None and self.target is not None:
            with self._run.ledger.spending():
                self.target.expect(onward)

    def expect(self, prediction: Prediction) -> None:
        """Load experts predicted for this layer, and remember the prediction."""
        self._prediction = prediction
        cache, chooser = self.residency.cache, self._run.chooser
        wanted = most_wanted(prediction.rows, cache.num_slots)
        if chooser is None:
            self.residency.prefetch(wanted, kept=wanted)
            return
        guesses = prediction.chance_of_any().items()
        chosen = chooser.choose(
            self.layer_idx, cache.state, guesses, kept=wanted, ahead=self.seen_from
        )
        self.residency.prefetch(chosen, kept=wanted)


def _is_cast(states: Tensor) -> bool:
    """Whether autocast computes with these states in another dtype than theirs."""
    kind = states.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != states.dtype


def _on_host(columns: Tensor, ranked: Tensor, logits: Tensor) -> tuple[list[list[int]], Prediction]:
    """Facts, and the prediction that stands beside them; one device-to-host sync."""
    rows, budget = columns.tolist(), ranked.shape[-1]
    has_chances = columns.is_floating_point()
    num_facts = columns.shape[-1] - (2 * budget if has_chances else budget)
    end = num_facts + budget
    ids = [[int(number) for number in row[:end]] for row in rows]
    chances = [row[end:] for row in rows]
    onward = Prediction(ranked, [row[num_facts:] for row in ids], logits, chances)
    return [row[:num_facts] for row in ids], onward


def _split(rows: list[list[int]], count: int) -> list[list[list[int]]]:
    """Rows [T][count x K] as `count` times [T][K]."""
    size = len(rows[0]) // count
    return [[row[at * size : (at + 1) * size] for row in rows] for at in range(count)]

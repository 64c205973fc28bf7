"""A rule on a miss where the host decides: asked for every layer of a decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.runtime.host.predictor import Prediction
from foreroute.runtime.host.run_state import HostRun
from foreroute.runtime.host.slot_cache import SlotCache
from foreroute.runtime.on_miss.choice import Gates, RouterChoice, Ruling
from foreroute.runtime.on_miss.decide import decide
from foreroute.runtime.on_miss.predicted import predicted_choice


class HostJudge:
    """Applies the engine's rule to one layer, and counts what it does."""

    def __init__(self, run: HostRun, cache: SlotCache, gates: Gates, place: int) -> None:
        """Judge a layer.

        Args:
            run: Shared with the engine's other layers.
            cache: The layer's slots.
            gates: How its router weighs experts.
            place: Its place among the MoE layers, 0..L-1.
        """
        self._run, self._cache, self._gates, self._place = run, cache, gates, place
        self._is_here: list[bool] = []

    def rule_on(
        self,
        expert_ids: Tensor,
        gate_weights: Tensor,
        router_logits: Tensor | None,
        prediction: Prediction | None,
    ) -> Ruling | None:
        """What runs in the place of a router's choice; None if that itself does.

        Args:
            expert_ids: [T, K].
            gate_weights: [T, K].
            router_logits: [T, E]; None where the rule does not read them.
            prediction: Of this layer, if there is one.
        """
        rule, run = self._run.config.rule, self._run
        if not run.is_speculating or (rule.predicted and prediction is None):
            return None
        choice = RouterChoice(
            expert_ids=expert_ids,
            gate_weights=gate_weights,
            gates=self._gates,
            router_logits=router_logits,
        )
        if rule.predicted and prediction is not None:
            guess = prediction.expert_ids, prediction.router_logits
            choice = predicted_choice(choice, *guess, rule.predicted)
        self._is_here = self._cache.is_here
        is_here = torch.tensor(self._is_here, device=expert_ids.device)
        allowance = 0
        if run.allowance is not None:
            allowance = run.allowance.at(self._place, len(expert_ids))
        return decide(rule, choice, is_here, allowance)

    def count(
        self, true_rows: list[list[int]], rows: list[list[int]], is_run: list[list[int]]
    ) -> None:
        """Count a ruling's agreement with the router, and what of a budget it spends.

        Args:
            true_rows: The router's choice, [T][K].
            rows: What runs, [T][K].
            is_run: What of that is not left out, [T][K].
        """
        agreed = 0
        for true, row, runs in zip(true_rows, rows, is_run, strict=True):
            agreed += len(set(true) & {e for e, is_one in zip(row, runs, strict=True) if is_one})
        self._run.count_agreement(agreed, sum(map(len, true_rows)))
        if self._run.allowance is not None:
            needed = {expert for row in rows for expert in row}
            self._run.allowance.spent += sum(not self._is_here[expert] for expert in needed)

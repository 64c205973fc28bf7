"""Decides on the host, between one layer and the next, which experts are where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foreroute.data.adapters.early_attention import decoder_layer
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.hooks import watch_input, watch_router_logits
from foreroute.runtime.host.judge import HostJudge
from foreroute.runtime.host.layer import HostLayer
from foreroute.runtime.host.ledger import TRIAL_STEPS, HostLedger, time_copy
from foreroute.runtime.host.predictor import HostPredictor
from foreroute.runtime.host.residency import HostResidency
from foreroute.runtime.host.run_state import HostRun
from foreroute.runtime.host.slot_cache import SlotCache
from foreroute.runtime.host.transfers import Transfers
from foreroute.runtime.look_ahead import LookAhead
from foreroute.runtime.on_miss.agreement import AgreementGuard
from foreroute.runtime.on_miss.budget import Allowance
from foreroute.runtime.on_miss.gates import exact_layers_of, gates_of
from foreroute.runtime.planning.machine import find_profile
from foreroute.runtime.policies import GiveUp, PrefetchChooser, find_policy, find_prefetch_rule
from foreroute.runtime.policies.duel import duelling_layers
from foreroute.runtime.policies.prefetching import ATTENTION_SHARE
from foreroute.runtime.stats import RuntimeStats
from foreroute.runtime.store.offload import OffloadedModel

logger = logging.getLogger(__name__)


class HostDriver:
    """Drives any model on any device, in exact and in speculative execution."""

    def __init__(
        self,
        offloaded: OffloadedModel,
        config: EngineConfig,
        slots_per_layer: Sequence[int],
        ahead: LookAhead | None,
    ) -> None:
        """Give every layer its slots, all empty.

        Args:
            offloaded: The model and its experts' store.
            config: How to run it.
            slots_per_layer: Slots of each MoE layer, [L].
            ahead: What predicts; None to predict nothing.

        Raises:
            ValueError: If the rule on a miss weighs experts and the model's gate rule is unknown.
        """
        self._offloaded = offloaded
        self._gates = gates_of(offloaded.moe, config.rule)
        self.run = HostRun(
            config=config,
            transfers=Transfers.for_device(offloaded.device, offloaded.store.pins.copy_row),
            predictor=HostPredictor(ahead) if ahead else None,
            guard=AgreementGuard(config.agreement_floor),
            policy=find_policy(config.eviction),
        )
        self.run.allowance = self._make_allowance()
        self.layers = self._make_layers(slots_per_layer)
        if ahead is not None:
            self._link_targets(ahead)
        self._begin_to_learn()

    def _begin_to_learn(self) -> None:
        """What of prefetching pays is not known yet."""
        self.run.chooser = _make_chooser(self._offloaded, self.run.config)
        self.run.give_up = self._make_give_up()

    def _make_layers(self, slots_per_layer: Sequence[int]) -> list[HostLayer]:
        moe, store, run = self._offloaded.moe, self._offloaded.store, self.run
        exact = exact_layers_of(run.config, moe.geometry)
        layers: list[HostLayer] = []
        duels = duelling_layers(len(moe.layers))
        for moe_layer, rows, layout, num_slots, gates, has_shadows in zip(
            moe.layers, store.rows, store.layouts, slots_per_layer, self._gates, duels, strict=True
        ):
            cache = SlotCache(
                moe_layer.num_experts,
                num_slots,
                layout,
                self._offloaded.device,
                run.policy,
                run.duel,
                has_shadows=has_shadows,
            )
            judge = HostJudge(run, cache, gates, place=len(layers))
            is_exact = run.config.is_exact or moe_layer.layer_idx in exact
            residency = HostResidency(rows, cache, run)
            layers.append(HostLayer(moe_layer, residency, run, None if is_exact else judge))
        return layers

    def _make_allowance(self) -> Allowance | None:
        """What a rule with a budget lets a decode step copy."""
        offloaded, config = self._offloaded, self.run.config
        if not config.rule.has_budget:
            return None
        size = offloaded.expert_bytes
        experts = config.rule.budget_experts(size, find_profile(config.profile).copy_ms(size))
        return Allowance(experts, offloaded.moe.geometry.num_layers)

    def _link_targets(self, ahead: LookAhead) -> None:
        """Tell each layer which one its state predicts."""
        place_of = {layer.layer_idx: place for place, layer in enumerate(self.layers)}
        for place, layer in enumerate(self.layers):
            target_idx = ahead.target_of(layer.layer_idx)
            if target_idx is not None:
                layer.target = self.layers[place_of[target_idx]]
                layer.target.seen_from = place_of[target_idx] - place or ATTENTION_SHARE

    def _make_give_up(self) -> GiveUp | None:
        """What ends prefetching that does not pay; not where predicted experts run."""
        run = self.run
        if run.chooser is None:
            return None
        if not run.transfers.can_hide:
            logger.info("Nothing is prefetched: copies to this device hide behind nothing.")
            return GiveUp(None)
        first = self.layers[0].residency
        copy_ms = time_copy(run.transfers, first.rows[0], first.cache.slots[0])
        run.ledger = HostLedger(copy_ms)
        return GiveUp(run.ledger, TRIAL_STEPS, run.chooser.forget)

    def attach(self, undo: ExitStack) -> None:
        """Watch what predictions, speculation and `eviction=predicted` read of the model.

        Args:
            undo: Gets what takes the hooks off again.
        """
        run, moe = self.run, self._offloaded.moe
        fields = run.predictor.ahead.stack.input_fields if run.predictor else ()
        if run.predictor is not None and run.predictor.ahead.readouts is not None:
            run.predictor.ahead.readouts.attach(undo, lambda: run.looks_ahead)
        needs_logits = run.config.rule.needs_scores
        for layer, own in zip(moe.layers, self.layers, strict=True):
            if run.predictor is not None:
                own.states.watch(layer, undo)
            if "layer_input" in fields:
                watch_input(decoder_layer(moe, layer), own.enter, undo)
            if needs_logits or run.policy.likely_bonus > 0:
                watch_router_logits(layer, partial(setattr, own, "router_logits"), undo)

    def begin_forward(self, tokens: Tensor, has_past: Callable[[], bool]) -> None:
        """A forward pass begins; see `RunState.begin_forward`."""
        self.run.begin_forward(tokens, has_past)
        if not self.run.is_prefill:
            if not self._offloaded.store.pins.is_settled:
                self._settle_pins()
            self.run.begin_step()

    def end_forward(self) -> None:
        """Nothing: each layer waits for what it needs."""

    def _settle_pins(self) -> None:
        """Pin what was used most so far, before the first step."""
        worth = [torch.tensor(layer.residency.cache.state.worth) for layer in self.layers]
        self._offloaded.store.pins.settle(worth)

    def forget(self) -> None:
        """Empty every slot: nothing of what is there need be right any more."""
        if self._offloaded.device.type == "cuda":
            torch.cuda.synchronize(self._offloaded.device)  # copies on their way land before others
        for layer in self.layers:
            layer.forget()
        self.run.duel.lead = 0
        self._begin_to_learn()

    def decoding(self, settings: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """Nothing else: transformers' own loop decodes."""
        return {}

    def stats(self) -> RuntimeStats:
        """Counters and times since the start or the last `reset_stats`; live, not a copy."""
        return self.run.stats

    def reset_stats(self) -> None:
        """Start counting anew; resident experts stay."""
        self.run.stats = RuntimeStats()

    def fill_slots(self) -> None:
        """Make as many experts resident as fit, lowest ids first, not counted in the statistics."""
        stats, self.run.stats = self.run.stats, RuntimeStats()
        try:
            for layer in self.layers:
                layer.residency.fill()
        finally:
            self.run.stats = stats

    def warm(self, rows: Sequence[Sequence[Sequence[int]]]) -> None:
        """Fill the slots with what a recording used most, not counted in the statistics.

        Args:
            rows: By layer and token, the experts used, [L][T][K].
        """
        for layer, uses in zip(self.layers, rows, strict=True):
            layer.residency.warm(uses)

    def check_integrity(self) -> None:
        """Check every layer's slots: tables consistent, and each slot equal to its host row.

        Raises:
            RuntimeError: If not.
        """
        if self._offloaded.device.type == "cuda":
            torch.cuda.synchronize(self._offloaded.device)
        for layer in self.layers:
            layer.residency.check_integrity()

    def close(self) -> None:
        """Nothing is held that must be let go."""


def _make_chooser(offloaded: OffloadedModel, config: EngineConfig) -> PrefetchChooser | None:
    """What decides on prefetches; none where the rule on a miss needs every prediction."""
    if config.prefetch != "auto" or config.rule.needs_predictions:
        return None
    machine, expert_bytes = find_profile(config.profile), offloaded.expert_bytes
    return PrefetchChooser(
        rule=find_prefetch_rule("whole"),
        layer_ms=machine.layer_ms_for(offloaded.moe.geometry.top_k * expert_bytes),
        copy_ms=machine.copy_ms(expert_bytes),
    )

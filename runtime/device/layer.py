"""Runs one MoE layer with every decision on the GPU: no id comes to the host while decoding."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoELayer, router_logits_of
from foreroute.runtime.device.fusions.deferred import Deferred, Source, settled
from foreroute.runtime.device.fusions.routers import Routed
from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.miss import LayerRule
from foreroute.runtime.device.kernels.products import expert_products
from foreroute.runtime.device.predictor import Guess
from foreroute.runtime.device.prefill import StreamedPrefill
from foreroute.runtime.device.residency import DeviceResidency
from foreroute.runtime.device.run_state import DeviceRun
from foreroute.runtime.hooks import SourceStates


class _DeferredExperts(Source):
    """A layer's experts, left to whoever knows what is added to their results."""

    def __init__(self, layer: DeviceLayer, states: tuple[Deferred, Tensor, Tensor]) -> None:
        """Defer them.

        Args:
            layer: Runs them.
            states: Router input, expert ids and gate weights.
        """
        self._layer, self._states, self.counts = layer, states, states[0].source.counts

    def compute(self) -> Tensor:
        """Their results, [T, D]."""
        return self._layer.decode(*self._states)

    def plus(self, residual: Tensor) -> Tensor:
        """Their results added to a state, [T, D], by the launch that computes them."""
        self.counts["additions in experts"] += 1
        return self._layer.decode(*self._states, residual)


class DeviceLayer:
    """The function in the place of one layer's experts."""

    def __init__(
        self, residency: DeviceResidency, prefill: StreamedPrefill, run: DeviceRun
    ) -> None:
        """Connect the parts.

        Args:
            residency: The layer's slots, tables and host rows.
            prefill: Runs prompts; shared with the engine's other layers.
            run: Shared with them too.
        """
        self.layer_idx = residency.layer_idx
        self.residency = residency
        self.target: DeviceLayer | None = None
        """The layer whose experts are predicted from this one's state."""
        self.states = SourceStates()
        self.router_logits: Tensor | None = None
        """Set by a hook on the router, [T, E], where a rule reads them and no launch fuses it."""
        self.num_calls = 0
        self._prefill = prefill
        self._run = run
        self._tokens_at_once = len(residency.slots) // residency.top_k
        self._arriving: torch.cuda.Event | None = None
        self._read_ahead: tuple[Tensor, ...] = ()
        self._expected: Guess | None = None
        """What was predicted of this layer, where a rule on a miss runs that."""
        self._read_behind: tuple[Tensor, ...] = ()

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
            states = router_input, expert_ids, gate_weights
            return self._prefill.run(self.residency, experts, *states)
        if not isinstance(router_input, Deferred):
            return self.decode(router_input, expert_ids, gate_weights)
        experts_of = _DeferredExperts(self, (router_input, expert_ids, gate_weights))
        return Deferred(experts_of, router_input.shape, router_input.dtype, router_input.device)

    def watch_router(self, layer: MoELayer, undo: ExitStack) -> None:
        """See the logits of a router that no launch fuses, if a rule on a miss is to read them.

        Args:
            layer: Handles on the model's modules.
            undo: Gets what takes the hook off again.
        """
        if self.residency.on_miss is None:
            return

        def show(_: nn.Module, __: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            is_fused = any(isinstance(part, Deferred) for part in parts)
            # none, rather than those of an earlier pass
            self.router_logits = None if is_fused else router_logits_of(output, layer.num_experts)

        undo.callback(layer.router.register_forward_hook(show).remove)

    def forget(self) -> None:
        """Empty the slots, and drop what a broken forward pass left."""
        self.residency.tables.forget()
        self.residual = self.router_input = self.router_logits = None
        self._arriving, self._expected = None, None
        self._read_ahead = self._read_behind = ()

    def decode(
        self,
        router_input: Tensor,
        expert_ids: Tensor,
        gate_weights: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Run a decode step's few tokens, or what is deferred of them.

        Args:
            router_input: [T, D].
            expert_ids: [T, K].
            gate_weights: [T, K].
            residual: Added to the result, [T, D].

        Returns:
            [T, D].
        """
        source = gate_weights.source if isinstance(gate_weights, Deferred) else None
        expected, self._expected = self._expected, None
        planned = self._routed(source, expert_ids)
        expert_ids, gate_weights = settled(expert_ids), settled(gate_weights)  # the router first:
        router_input = settled(router_input).contiguous()  # its launch takes the norm
        chosen = _chosen(source, expert_ids)
        logits = self._logits(source, expected) if planned is None else None
        ranked = None if expected is None else expected.expert_ids
        if logits is not None and len(expert_ids) <= self._tokens_at_once:
            self._join_prefetch()  # what comes ahead is there when the rule looks
            planned, expert_ids, gate_weights = self.residency.plan_ruled(
                logits, expert_ids, gate_weights, ranked
            )
        guess = self._predict(router_input, expert_ids, gate_weights)
        self._join_prefetch()
        residency, form = self.residency, self._run.form
        output, run_ids = torch.empty_like(router_input), []
        for start in range(0, len(expert_ids), self._tokens_at_once):
            tokens = slice(start, start + self._tokens_at_once)
            ids, weights = expert_ids[tokens].contiguous(), gate_weights[tokens].contiguous()
            if planned is None and logits is not None:
                expected_ids = None if ranked is None else ranked[tokens]
                (demand, places), ids, weights = residency.plan_ruled(
                    logits[tokens], ids, weights, expected_ids
                )
            else:
                demand, places = planned or residency.plan_demand(ids)
            run_ids.append(ids)
            if guess is not None:
                self._run.ahead.wait_stream(torch.cuda.current_stream())
            expert_products(
                router_input[tokens],
                places,
                weights,
                residency.weights,
                form,
                output[tokens],
                demand,
                None if residual is None else residual[tokens],
            )
        if guess is not None:
            self._look_ahead(guess)
        if self._on_miss is not None and self._on_miss.rule.fetches_behind:
            self._fetch_behind(chosen, run_ids[0] if planned else torch.cat(run_ids))
        return output

    @property
    def _on_miss(self) -> LayerRule | None:
        """The rule on a miss for the step at hand: none that runs predictions, without any."""
        on_miss = self.residency.on_miss
        lacks = on_miss is not None and on_miss.rule.predicted and not self._run.looks_ahead
        return None if lacks else on_miss

    def _logits(self, source: Source | None, expected: Guess | None) -> Tensor | None:
        """What a rule on a miss weighs experts by, [T, E]; None without a rule."""
        on_miss = self._on_miss
        if on_miss is None:
            return None
        if expected is not None and on_miss.rule.predicted == "predicted-weights":
            return expected.router_logits
        if isinstance(source, Routed):
            return source.routing.results["logits"].value()
        assert self.router_logits is not None  # the driver hooks the router
        return self.router_logits

    def _routed(self, source: Source | None, expert_ids: Tensor) -> tuple[Demand, Tensor] | None:
        """The plan by the router's own launch; None if that must not wait, or has run.

        While something is on its way ahead, the plan alone waits for it, not the router.
        """
        can_plan = self._arriving is None and len(expert_ids) <= self._tokens_at_once
        on_miss = self._on_miss
        if on_miss is not None:  # it decides on the router's own choice
            can_plan = can_plan and isinstance(expert_ids, Deferred)
        if not isinstance(source, Routed) or not source.is_pending or not can_plan:
            return None
        return self.residency.route_and_plan(source.routing, expert_ids, on_miss)

    def _predict(
        self, router_input: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Guess | None:
        """Rank the target layer's experts, on the stream beside this layer's own demand."""
        run = self._run
        if self.target is None or run.predictor is None or not run.looks_ahead:
            return None
        residual, router_input = self.states.residual, self.states.router_input(router_input)
        run.ahead.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(run.ahead):
            guess = run.predictor.predict(
                self.layer_idx,
                residual=residual,
                router_input=router_input,
                expert_ids=expert_ids,
                gate_weights=gate_weights,
            )
        # read on the other stream until the target joins it: keep the memory from being used again
        states = (residual, router_input, expert_ids, gate_weights, *guess)
        self.target._read_ahead = tuple(state for state in states if state is not None)
        if run.config.rule.predicted:
            self.target._expected = guess
        return guess

    def _look_ahead(self, guess: Guess) -> None:
        """Load ahead for the target layer, behind this layer's demand: that has the link alone."""
        target, run = self.target, self._run
        assert target is not None  # there is a guess
        with torch.cuda.stream(run.ahead):
            if run.config.prefetch == "auto" and not run.config.rule.needs_predictions:
                ids, chances = guess.expert_ids, guess.chances
                target.residency.load_likely(ids, chances, behind=self.residency)
            else:
                ids = guess.expert_ids.T.contiguous()  # [M, T]: every token's best guess first
                target.residency.load(ids, behind=self.residency)
            target._arriving = torch.cuda.Event()
            target._arriving.record(run.ahead)

    def _fetch_behind(self, chosen: Tensor, run_ids: Tensor) -> None:
        """Load what the router chose and the rule did not wait for, behind this layer's products.

        The driver waits for it at the end of the forward pass.
        """
        chosen = chosen.contiguous()
        with torch.cuda.stream(self._run.fork_behind()):
            self.residency.load_left(chosen, run_ids)
        self._read_behind = chosen, run_ids  # on the other stream, for as long as the pass

    def _join_prefetch(self) -> None:
        if self._arriving is not None:
            torch.cuda.current_stream().wait_event(self._arriving)
            self._arriving, self._read_ahead = None, ()


def _chosen(source: Source | None, expert_ids: Tensor) -> Tensor:
    """The router's own experts, [T, K], where its launch has perhaps put others in their place."""
    own = source.routing.chosen if isinstance(source, Routed) else None
    return expert_ids if own is None else own

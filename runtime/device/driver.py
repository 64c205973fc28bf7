"""Decides on the GPU which experts are where, inside one CUDA graph for each decode step."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foreroute.data.adapters.exceptions import why_not_captured
from foreroute.estimators.stack import EstimatorStack
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.device.assisted import assisted_loop, is_assisted, why_not_replayed
from foreroute.runtime.device.decode_graph import SPARE_TOKENS, DecodeGraph, DecodeStep
from foreroute.runtime.device.expert_form import find_expert_form, why_no_form
from foreroute.runtime.device.fusions import fuse_norms, survey
from foreroute.runtime.device.kernels.fetch import WORD, fetch
from foreroute.runtime.device.kernels.miss import (
    AGREED,
    BEHIND,
    CHOSEN,
    IS_CLOSED,
    NUM_JUDGED,
    RECENTLY_AGREED,
    RECENTLY_CHOSEN,
    LayerRule,
)
from foreroute.runtime.device.kernels.quasi_hidden import add_expected_output
from foreroute.runtime.device.kernels.tables import (
    EMPTY,
    HEADS,
    HITS,
    MISSES,
    NUM_COUNTERS,
    PREFETCHES,
    TAILS,
    WASTED,
    WASTED_HEADS,
    WHOLE,
)
from foreroute.runtime.device.layer import DeviceLayer
from foreroute.runtime.device.ledger import NUM_MARKS, Trials
from foreroute.runtime.device.marks import DeviceMarks
from foreroute.runtime.device.predictor import DevicePredictor
from foreroute.runtime.device.prefill import StreamedPrefill
from foreroute.runtime.device.residency import FETCH_BLOCKS, DeviceResidency
from foreroute.runtime.device.run_state import DeviceRun
from foreroute.runtime.device.sampling import decode_loop
from foreroute.runtime.device.streams import borrow_stream
from foreroute.runtime.device.timing import milliseconds, ms_of_one_more
from foreroute.runtime.look_ahead import LookAhead
from foreroute.runtime.on_miss.agreement import AgreementGuard
from foreroute.runtime.on_miss.gates import exact_layers_of, gates_of
from foreroute.runtime.planning.machine import find_profile
from foreroute.runtime.policies import find_policy
from foreroute.runtime.policies.duel import duelling_layers
from foreroute.runtime.policies.give_up import LOOK_AHEAD, ON_DEMAND
from foreroute.runtime.policies.prefetching import PRIOR_PREFETCHES, READOUT_SHARE
from foreroute.runtime.policies.slots import prefill_group
from foreroute.runtime.stats import PhaseStats, RuntimeStats
from foreroute.runtime.store.offload import OffloadedModel
from foreroute.runtime.store.staging import Staging

logger = logging.getLogger(__name__)

FIRST_ROOM = 0.4
TUNING_EXPERTS = 8
PREDICTION_MS = 0.012  # from the router's choice until a head can begin; by kernel times
TUNING_REPLAYS = 8
LEAST_HEAD_SHARE = 0.1
"""Heads of a lesser share of an expert have nothing to win (docs/policies.md)."""
ASSISTANTS = ("assistant_model", "assistant_tokenizer", "tokenizer")
"""Arguments of `generate` that assisted decoding needs besides its settings."""
UNSUPPORTED_ARGUMENTS = (
    "return_dict_in_generate",
    "past_key_values",
    "inputs_embeds",
    "custom_generate",
)


def why_not_on_device(
    offloaded: OffloadedModel, config: EngineConfig, stack: EstimatorStack | None = None
) -> str | None:
    """What keeps this model from deciding on the GPU, in one line; None if nothing does."""
    if offloaded.device.type != "cuda":
        return "it needs a CUDA device"
    if offloaded.is_divided:
        return "everything but the experts is divided by transformers' own plan"
    if config.cache == "none":
        return "running without a cache is decided on the host"
    rule, is_locked = config.rule, offloaded.store.pins.budget is None
    if (rule.needs_predictions or rule.fetches_behind) and not is_locked:
        return f"on_miss={rule.text} loads experts ahead or behind, and some are not page-locked"
    policy = find_policy(config.eviction)
    if policy.worth == "static" or policy.likely_bonus:
        return f"eviction={config.eviction} is decided on the host"
    if len(set(map(_shape_of, offloaded.store.layouts))) > 1:
        return "its layers have experts of different shapes"
    if reason := why_no_form(layer.experts for layer in offloaded.moe.layers):
        return reason
    if stack is not None and config.looks_ahead and "layer_input" in stack.input_fields:
        return "pre-attention estimators are run by the host"
    return None


def layer_rules(
    offloaded: OffloadedModel, config: EngineConfig, judged: Tensor, targets: Collection[int] = ()
) -> list[LayerRule | None]:
    """The rule on a miss for each layer, [L]; None where a layer is exact.

    Args:
        offloaded: The model.
        config: Names the rule, and layers that are exact all the same.
        judged: Counters on the device, shared by the layers; see `LayerRule`.
        targets: Layers of which something is predicted; the others are exact under a rule that runs
            predictions.

    Raises:
        ValueError: If the rule weighs experts and the model's gate rule is unknown.
    """
    moe, rule, size = offloaded.moe, config.rule, offloaded.expert_bytes
    if rule.is_exact:
        return [None] * len(moe.layers)
    exact = exact_layers_of(config, moe.geometry)
    if rule.predicted:
        exact |= {layer.layer_idx for layer in moe.layers} - set(targets)
    first = next((layer.layer_idx for layer in moe.layers if layer.layer_idx not in exact), None)
    per_token = rule.budget_experts(size, find_profile(config.profile).copy_ms(size))
    return [
        None
        if layer.layer_idx in exact
        else LayerRule(
            rule=rule,
            gates=gates,
            judged=judged,
            floor=config.agreement_floor,
            allowed=per_token * (place + 1) / len(moe.layers),
            is_first=layer.layer_idx == first,
        )
        for place, (layer, gates) in enumerate(zip(moe.layers, gates_of(moe, rule), strict=True))
    ]


def _shape_of(layout: Any) -> tuple[Any, ...]:
    return tuple((name, spec.shape, spec.dtype) for name, spec in layout.parameters.items())


class DeviceDriver:
    """Drives a model with every decision on the GPU."""

    def __init__(
        self,
        offloaded: OffloadedModel,
        config: EngineConfig,
        slots_per_layer: Sequence[int],
        ahead: LookAhead | None,
    ) -> None:
        """Give every layer its slots, all empty.

        Args:
            offloaded: The model and its experts' store; `why_not_on_device` has nothing against it.
            config: How to run it.
            slots_per_layer: Slots of each MoE layer, [L].
            ahead: What predicts; None to predict nothing.
        """
        self._offloaded = offloaded
        self._policy = find_policy(config.eviction)
        rule = self._policy.device_rule()
        store, device = offloaded.store, offloaded.device
        if store.pins.budget is not None and ahead is not None:
            logger.info("Nothing is prefetched: the host hands out experts that are not pinned.")
            ahead = None
        form = find_expert_form(offloaded.moe.layers[0].experts)
        assert form is not None  # `why_not_on_device` was asked before
        if ahead is not None and ahead.readouts is not None:
            ahead.readouts.add_expected_output = add_expected_output
        self.run = DeviceRun(
            config=config,
            rule=rule,
            form=form,
            predictor=DevicePredictor(ahead, offloaded.moe.model.dtype) if ahead else None,
            ahead=borrow_stream(device, self, priority=-1),
            behind=borrow_stream(device, self),
            head_words=torch.zeros(1, dtype=torch.int32, device=device),
            num_whole=torch.zeros(1, dtype=torch.int32, device=device),
            trust=torch.full((2,), PRIOR_PREFETCHES, device=device),
            lead=torch.zeros(1, dtype=torch.int32, device=device) if rule.is_adaptive else None,
            prompt_weight=self._policy.prompt_weight if config.warm_start == "prompt" else 0.0,
            staging=None if store.pins.budget is None else Staging(store.rows, device),
        )
        self.run.set_room(FIRST_ROOM, store.rows[0].shape[1])
        self._graph: DecodeStep | None = None
        self._steps: dict[int, DecodeStep] = {}
        """Steps over the same cache, by the tokens that they read."""
        self._choose_variant: Callable[[], int] = int
        self._trials: Trials | None = None
        self._has_look_ahead = False
        self._is_decoding = False
        self._knows_pins = False
        num_layers = len(offloaded.moe.layers)
        self._counters = torch.zeros(num_layers, NUM_COUNTERS, dtype=torch.int32, device=device)
        self._counted_before = self._counters.clone()
        self._judged = torch.zeros(NUM_JUDGED, dtype=torch.int32, device=device)
        self._judged_before = self._judged.clone()
        self._guard = AgreementGuard(config.agreement_floor)
        target_of = targets_of(offloaded, ahead)
        self._rules = layer_rules(offloaded, config, self._judged, target_of.values())
        self._prefill = StreamedPrefill(
            store.layouts[0], self._prefill_group(), device, store.pins.copy_row
        )
        self.layers = self._make_layers(slots_per_layer)
        for place, layer in enumerate(self.layers):
            layer.residency.place = place
        by_idx = {layer.layer_idx: layer for layer in self.layers}
        for source, target in target_of.items():
            by_idx[source].target = by_idx[target]

    def _make_layers(self, slots_per_layer: Sequence[int]) -> list[DeviceLayer]:
        store, run = self._offloaded.store, self.run
        return [
            DeviceLayer(
                DeviceResidency(
                    layer,
                    rows,
                    layout,
                    num_slots,
                    run,
                    counters,
                    on_miss,
                    has_shadows=has_shadows,
                ),
                self._prefill,
                run,
            )
            for layer, rows, layout, num_slots, counters, on_miss, has_shadows in zip(
                self._offloaded.moe.layers,
                store.rows,
                store.layouts,
                slots_per_layer,
                self._counters,
                self._rules,
                duelling_layers(len(self._rules)),
                strict=True,
            )
        ]

    def _prefill_group(self) -> int:
        """Experts that a buffer for prompts holds."""
        offloaded = self._offloaded
        encoded = offloaded.store.layouts[0].encoded.values()
        decoded = sum(math.prod(parameter.shape) for parameter in encoded)
        return prefill_group(offloaded.expert_bytes, offloaded.moe.geometry.num_experts, decoded)

    def attach(self, undo: ExitStack) -> None:
        """Watch what predictions read of the model, and fuse its norms.

        Args:
            undo: Gets what takes the hooks off again.
        """
        run, moe = self.run, self._offloaded.moe
        if run.predictor is not None:
            if run.predictor.ahead.readouts is not None:
                run.predictor.ahead.readouts.attach(undo, lambda: run.looks_ahead)
            for layer, own in zip(moe.layers, self.layers, strict=True):
                own.states.watch(layer, undo)
        for layer, own in zip(moe.layers, self.layers, strict=True):
            own.watch_router(layer, undo)
        fuse_norms(moe.model, undo, lambda: run.is_prefill)

    def begin_forward(self, tokens: Tensor, has_past: Callable[[], bool]) -> None:
        """A forward pass begins; see `RunState.begin_forward`."""
        run = self.run
        model_dtype = self._offloaded.moe.model.dtype
        if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != model_dtype:
            raise ValueError(
                f"torch.autocast cannot cast inside this engine's kernels: load the model with "
                f"dtype={str(torch.get_autocast_dtype('cuda'))[6:]}, or decide_on='host'."
            )
        run.begin_forward(tokens, has_past)
        if not run.is_prefill:
            self._settle_pins()
        run.stats.steps_ahead += run.predictor is not None and run.looks_ahead

    def end_forward(self) -> None:
        """Let what is copied behind the layers be there when the next forward pass begins."""
        self.run.join_behind()

    def _settle_pins(self) -> None:
        """Pin what was used most so far, before the first step; see that every step was served."""
        pins, staging = self._offloaded.store.pins, self.run.staging
        if staging is None:
            return
        staging.require_served()
        if not self._knows_pins:
            self._knows_pins = True
            pins.settle([layer.residency.tables.score for layer in self.layers])
            for layer, is_pinned in zip(self.layers, pins.are_pinned, strict=True):
                layer.residency.learn_pins(is_pinned)

    def forget(self) -> None:
        """Empty every slot and drop the graph: nothing of them need be right any more.

        In the midst of a text, when a step could not be captured, the graph stays: its cache holds
        the text.
        """
        torch.cuda.synchronize(self._offloaded.device)
        self.run.is_copying_behind = False
        if not self._is_decoding:
            self._drop_graph()
        for layer in self.layers:
            layer.forget()

    def decoding(self, settings: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """Replays of one captured graph as a loop for `generate`, unless something forbids it.

        Args:
            settings: The arguments of `generate` so far.
            streamer: Gets the tokens.
        """
        model = self._offloaded.moe.model
        if self._is_decoding or any(map(settings.get, UNSUPPORTED_ARGUMENTS)):
            return {}
        if reason := why_not_captured(model):
            logger.info("Decode steps are not captured: %s.", reason)
            return {}
        if model.generation_config.stop_strings:
            return {}
        # transformers hands neither streamer nor tokenizer to a callable: they must come along
        loop = partial(self._decode_loop, streamer=streamer)
        if is_assisted(settings):
            if reason := why_not_replayed(model, settings):
                logger.info("Steps of assisted decoding are not captured: %s.", reason)
                return {}
            helpers = {name: settings[name] for name in ASSISTANTS if name in settings}
            loop = partial(self._assisted_loop, streamer=streamer, helpers=helpers)
        return {"custom_generate": loop} | _stopping_at_strings(settings)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """While open, whoever calls `generate` from within gets another cache."""
        self._is_decoding = True
        try:
            yield
            self._settle_pins()
        finally:
            self._is_decoding = False
            if self._trials is not None:
                self._trials.break_off()
            self._note_agreement()

    def _decode_loop(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        with self._decoding():
            graph = self.graph_for(len(input_ids), int(generation_config.max_length))
            return decode_loop(
                model,
                graph,
                input_ids,
                model_kwargs,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
            )

    def _assisted_loop(
        self,
        model: Any,
        input_ids: Tensor,
        generation_config: Any,
        helpers: dict[str, Any],
        **settings: Any,
    ) -> Tensor:
        length = int(generation_config.max_length) + SPARE_TOKENS
        step_of = partial(self.step_for, length=length)
        with self._decoding():
            return assisted_loop(model, step_of, input_ids, helpers, generation_config, **settings)

    def _note_agreement(self) -> None:
        """Say so, once, if the device has gone back to the router's choice."""
        if self._guard.is_open and any(self._rules):
            judged = self._judged.tolist()
            if judged[IS_CLOSED]:
                self._guard.judge(judged[RECENTLY_AGREED], judged[RECENTLY_CHOSEN])

    def _before_step(self) -> int:
        """Count a decode step, and choose its variant."""
        self._count_step()
        variant = self._choose_variant()
        self.run.stats.steps_ahead += self._has_look_ahead and variant == LOOK_AHEAD
        return variant

    def _count_step(self, variant: int = 0) -> int:
        """Count a decode step; gives its variant back."""
        if self.run.staging is not None:
            self.run.staging.require_served()
        self.run.stats.decode.forwards += 1
        return variant

    @torch.inference_mode(False)  # its cache outlives the call
    def graph_for(self, batch: int, length: int) -> DecodeStep:
        """The step for so many sequences of at most this length; captured when needed.

        A step that cannot be captured runs as it is, with the same kernels, and the log says so.
        """
        self._settle_pins()
        graph = self._graph
        if graph is None or graph.batch != batch or graph.length < length:
            self._drop_graph()  # its cache's memory is free before the next one's is taken
            with self._learning_nothing():
                graph = self._captured(batch, length)
            if graph.is_captured:  # other steps are counted by `begin_forward`
                graph.choose_variant = self._before_step
            self._graph = graph
        return graph

    @torch.inference_mode(False)
    def step_for(self, width: int, length: int) -> DecodeStep:
        """The step that reads so many tokens of one sequence, over the cache of `graph_for`.

        It looks nothing ahead, but where a rule on a miss lives by predictions, in steps of one.
        Captured when first needed, also in the midst of a text.

        Args:
            width: Tokens, 1..`MOST_STEP_TOKENS`.
            length: Greatest number of tokens of the sequence, `SPARE_TOKENS` among them.
        """
        graph = self.graph_for(1, length)
        step = self._steps.get(width)
        if step is None:
            predicts = width == 1 and self.run.config.rule.needs_predictions
            can_rest = width == 1 and self._has_look_ahead and not predicts
            on_demand = partial(self._count_step, ON_DEMAND if can_rest else 0)
            with self._learning_nothing():
                step = copy.copy(graph) if width == 1 else graph.widened(width)
            if step.is_captured:
                step.choose_variant = self._before_step if predicts else on_demand
            self._steps[width] = step
        return step

    @contextmanager
    def _learning_nothing(self) -> Iterator[None]:
        """While open, steps of made-up tokens run, to be captured or measured."""
        stats, self.run.stats = self.run.stats, RuntimeStats()
        tables = [layer.residency.tables for layer in self.layers]
        learnt = [self._counters, self._judged, self.run.trust]
        learnt += [tensor for table in tables for tensor in table.learnt]
        before = [tensor.clone() for tensor in learnt]
        try:
            yield
        finally:
            self.run.stats = stats
            for tensor, value in zip(learnt, before, strict=True):
                tensor.copy_(value)

    def _drop_graph(self) -> None:
        self._graph, self._steps = None, {}

    def _captured(self, batch: int, length: int) -> DecodeStep:
        """Capture the step; with prefetch twice, one looks ahead and the other does not.

        Under a rule on a miss that lives by predictions every step looks ahead.
        """
        run, routers = self.run, [layer.router for layer in self._offloaded.moe.layers]
        self._choose_variant, self._trials = int, None  # the first

        def looking(ahead: bool) -> Callable[[], None]:
            def set_up() -> None:
                run.is_looking_ahead = ahead

            return set_up

        self._has_look_ahead = run.predictor is not None
        variants = [looking(False)]
        if run.predictor is not None:
            variants = [looking(True), looking(False)]  # LOOK_AHEAD, ON_DEMAND
            variants = variants[:1] if run.config.rule.needs_predictions else variants
        try:
            graph = DecodeGraph(self._offloaded.moe.model, batch, length, routers, variants)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning(
                "The decode step runs without a CUDA graph, kernel by kernel: %s", reason
            )
            variants[0]()
            return DecodeStep(self._offloaded.moe.model, batch, length, routers)
        variants[0]()
        logger.info("Fused in a decode step: %s.", graph.fused_parts())
        left = survey(self._offloaded.moe.model, routers).left_text
        logger.info("Left in a decode step as the model has it: %s.", left)
        if len(variants) > 1 and run.config.prefetch == "auto":
            self._tune(graph)
        return graph

    def _tune(self, graph: DecodeGraph) -> None:
        """Measure this machine: how much can be copied early, and what looking ahead must save."""
        run, row_bytes = self.run, self._offloaded.store.rows[0].shape[1]
        graph.begin(torch.ones(graph.batch, 1, dtype=torch.long, device=self._offloaded.device))
        token = torch.zeros(graph.batch, dtype=torch.long, device=self._offloaded.device)
        step_ms = []
        for variant in (LOOK_AHEAD, ON_DEMAND):
            graph.choose_variant = partial(int, variant)
            replays = [milliseconds(lambda: graph.replay(token)) for _ in range(TUNING_REPLAYS)]
            step_ms.append(min(replays))  # the same token again and again: nothing is missing
        expert_ms = self._fetch_ms()
        window_ms = step_ms[ON_DEMAND] / len(self.layers)
        prediction_ms = PREDICTION_MS
        if run.predictor is not None and run.predictor.ahead.readouts is not None:
            prediction_ms += READOUT_SHARE * window_ms
        room = max(0.0, window_ms - prediction_ms) / expert_ms
        run.set_room(room, row_bytes)
        if room < LEAST_HEAD_SHARE:
            share = f"{room:.0%}"
            logger.info("Nothing is prefetched: a layer takes as long as %s of an expert.", share)
            self._choose_variant = partial(int, ON_DEMAND)
            return

        marks = DeviceMarks(self._counters, NUM_MARKS)
        forget = partial(run.trust.fill_, PRIOR_PREFETCHES)
        self._trials = Trials(marks, base_ms=step_ms[ON_DEMAND], forget=forget)
        self._choose_variant = self._trials.next_variant

    def _fetch_ms(self) -> float:
        """Time that one expert more takes on the link; some that are resident are fetched again."""
        layer = self.layers[0].residency
        slots = (layer.tables.expert_in != EMPTY).nonzero()[:TUNING_EXPERTS]
        experts = layer.tables.expert_in[slots]
        places = torch.cat([experts, slots, torch.full_like(slots, WHOLE)], dim=1).T

        def time_of(num_experts: int) -> float:
            copies = places[:, :num_experts].to(torch.int32).contiguous()
            once = partial(fetch, layer.rows, layer.slots, copies, num_blocks=FETCH_BLOCKS)
            return min(milliseconds(once) for _ in range(TUNING_REPLAYS))

        return ms_of_one_more(time_of, len(slots))

    def stats(self) -> RuntimeStats:
        """Counters and times so far; reads the counters off the device."""
        stats, expert_bytes = self.run.stats, self._offloaded.expert_bytes
        head_bytes = int(self.run.head_words) * WORD.itemsize
        totals = (self._counters - self._counted_before).sum(0).tolist()
        misses = totals[MISSES] + totals[TAILS]
        judged = (self._judged - self._judged_before).tolist()
        stats.decode = PhaseStats(
            forwards=stats.decode.forwards,
            lookups=totals[HITS] + misses,
            hits=totals[HITS],
            misses=misses,
            late=totals[TAILS],
            fetched_bytes=(misses + judged[BEHIND]) * expert_bytes - totals[TAILS] * head_bytes,
            prefetches=totals[PREFETCHES] + totals[HEADS],
            prefetched_bytes=totals[PREFETCHES] * expert_bytes + totals[HEADS] * head_bytes,
            wasted_bytes=totals[WASTED] * expert_bytes + totals[WASTED_HEADS] * head_bytes,
        )
        stats.prefill.fetched_bytes = self._prefill.prompt_bytes
        stats.agreed_experts, stats.speculated_experts = judged[AGREED], judged[CHOSEN]
        stats.is_speculation_off = not self._guard.is_open
        return stats

    def reset_stats(self) -> None:
        """Start counting anew; resident experts stay."""
        self.run.stats = RuntimeStats()
        self._prefill.prompt_bytes = 0
        self._counted_before.copy_(self._counters)
        self._judged_before.copy_(self._judged)

    def fill_slots(self) -> None:
        """Make as many experts resident as fit, lowest ids first, not counted in the statistics."""
        for layer in self.layers:
            layer.residency.fill()
        self.reset_stats()

    def warm(self, rows: Sequence[Sequence[Sequence[int]]]) -> None:
        """Fill the slots with what a recording used most, not counted in the statistics.

        Args:
            rows: By layer and token, the experts used, [L][T][K].
        """
        for layer, uses in zip(self.layers, rows, strict=True):
            layer.residency.warm(uses, self._policy)
        self.reset_stats()

    def check_integrity(self) -> None:
        """Check every layer's tables, and each slot against its host row.

        Raises:
            RuntimeError: If they disagree.
        """
        torch.cuda.synchronize(self._offloaded.device)
        for layer in self.layers:
            layer.residency.check_integrity()

    def close(self) -> None:
        """Drop the captured graph, and let nobody wait for the host any more."""
        self._drop_graph()
        if self.run.staging is not None:
            self.run.staging.close()


def targets_of(offloaded: OffloadedModel, ahead: LookAhead | None) -> dict[int, int]:
    """By decoder layer index, the layer predicted from it."""
    sources = [layer.layer_idx for layer in offloaded.moe.layers]
    if ahead is None:
        return {}
    return {s: target for s in sources if (target := ahead.target_of(s)) is not None}


def _stopping_at_strings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` that end it at strings without its knowing the tokenizer."""
    config, tokenizer = settings.get("generation_config"), settings.get("tokenizer")
    strings = settings.get("stop_strings") or getattr(config, "stop_strings", None)
    if not strings or tokenizer is None:
        return {}
    from transformers import StoppingCriteriaList, StopStringCriteria

    ends = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    criteria = StoppingCriteriaList([*(settings.get("stopping_criteria") or ()), ends])
    changed: dict[str, Any] = {"stopping_criteria": criteria, "stop_strings": None}
    if config is not None:
        changed["generation_config"] = copy.deepcopy(config)
        changed["generation_config"].stop_strings = None
    return changed

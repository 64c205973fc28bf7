"""Measures one model under every mode in one run: same prompts, same slots, same machine."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foreroute.estimators.stack import EstimatorStack
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.engine import Engine
from foreroute.runtime.on_miss import find_rule
from foreroute.runtime.stats import RuntimeStats
from foreroute.runtime.store.offload import OffloadedModel
from foreroute.runtime.streamer import TimingStreamer

STOCK = "stock"
BASELINE = "on-demand"
SPECULATIVE = ("predicted", "predicted:predicted-weights", "substitute:0.5", "skip")
"""Rules on a miss that are measured beside the exact modes, which are named by them."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to run the model."""

    name: str
    config: EngineConfig
    uses_bundle: bool = False
    is_filled: bool = False
    """Make experts resident before the first prompt (the all-resident ceiling)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every mode is given."""

    prompts: list[Tensor]
    """Token ids, [1, prompt length] each."""
    continuations: list[Tensor]
    """The text's own next tokens after each prompt, [1, n]; perplexity is measured on them."""
    new_tokens: int
    """Tokens generated per prompt (greedy, no early stop)."""
    repeats: int
    """Rounds: how often every mode runs every prompt, after a warm-up that is thrown away."""

    @classmethod
    def cut(cls, sequences: Sequence[Tensor], prompt_tokens: int, repeats: int) -> Workload:
        """Cut sequences of one length, [1, T], into prompts and continuations."""
        return cls(
            prompts=[tokens[:, :prompt_tokens] for tokens in sequences],
            continuations=[tokens[:, prompt_tokens:] for tokens in sequences],
            new_tokens=sequences[0].shape[1] - prompt_tokens,
            repeats=repeats,
        )


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """What one mode cost and gave."""

    name: str
    is_exact: bool
    tpot_ms: float
    """Median time per output token, first excluded."""
    tpot_ms_p25: float
    tpot_ms_p75: float
    ttft_ms: float
    """Median time to first token."""
    hit_rate: float | None
    """Share of decode lookups served from a resident slot; None for the stock model."""
    bytes_per_token: float
    wasted_bytes_per_token: float
    late_per_token: float
    share_ahead: float | None
    """Share of decode steps that looked ahead; None for modes that never do. `prefetch="auto"` ends
    where it takes longer than it saves, and is tried again now and then."""
    agreement: float
    """Share of speculatively run experts that the true router chose; 1 for exact modes."""
    is_speculation_off: bool
    """Speculation switched itself off during the run."""
    perplexity: float | None
    """On the continuations, token by token; measured for the baseline and inexact modes."""
    perplexity_change: float | None
    """Relative to the baseline; 0.01 is one per cent worse."""
    tokens: list[list[int]] = field(repr=False)
    """What was generated, per prompt."""


def modes_for(
    expert_slots: str,
    *,
    has_bundle: bool,
    has_anchors: bool,
    budget: int | None,
    can_speculate: bool,
    has_room_for_all: bool = True,
) -> list[Mode]:
    """All modes, baselines first.

    Args:
        expert_slots: Slots per layer of every mode but the all-resident one.
        has_bundle: Whether there are trained estimators.
        has_anchors: Whether the routers' copies predict without training; where they do not, modes
            that need predictions are left out unless there is a bundle.
        budget: Experts prefetched per token and layer; top-k if None.
        can_speculate: Whether experts can be weighed that this model's routers did not choose.
        has_room_for_all: Whether the device holds all experts at once.
    """
    demand = EngineConfig(expert_slots=expert_slots)
    prefetch = EngineConfig(expert_slots=expert_slots, prefetch="auto", budget=budget)
    modes = []
    if has_room_for_all:
        every = EngineConfig(expert_slots="100%")
        modes.append(Mode(name="all-resident", config=every, is_filled=True))
    modes += [
        Mode(name="on-demand-no-cache", config=replace(demand, cache="none")),
        Mode(name=BASELINE, config=demand),
    ]
    if has_anchors:
        modes.append(Mode(name="prefetch-next-router", config=prefetch))
    if not has_anchors and not has_bundle:
        return modes
    if has_bundle:
        modes.append(Mode(name="prefetch", config=prefetch, uses_bundle=True))
    whole = replace(prefetch, prefetch="all")
    modes.append(Mode(name="prefetch-all", config=whole, uses_bundle=has_bundle))
    for rule in SPECULATIVE:
        if can_speculate or not find_rule(rule).needs_scores:
            config = replace(prefetch, on_miss=rule)
            modes.append(Mode(name=rule, config=config, uses_bundle=has_bundle))
    return modes


def measure_stock(model: Any, work: Workload, tick: Callable[[], None]) -> ModeResult:
    """Transformers' own `generate` with `batched_mm` experts, all weights on the model's device.

    Args:
        model: With all its weights; its experts implementation is put back afterwards.
        work: What to run.
        tick: Called after every generation.
    """
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    stats = RuntimeStats()

    def generate(prompt: Tensor) -> Tensor:
        output: Tensor = model.generate(
            prompt.to(model.device),
            streamer=TimingStreamer(stats),
            disable_compile=True,
            **_greedy(prompt, work, model.device),
        )
        return output

    try:
        generate(work.prompts[0])
        tick()
        stats.ttft_ms.clear()
        stats.token_ms.clear()
        for _ in range(work.repeats):
            tokens = _generate_all(generate, work, tick)
    finally:
        model.set_experts_implementation(before)
    return _result(STOCK, stats, tokens, is_exact=True, hit_rate=None)


def measure_modes(
    modes: list[Mode],
    offloaded: OffloadedModel,
    stack: EstimatorStack | None,
    work: Workload,
    tick: Callable[[], None],
) -> list[ModeResult]:
    """Time all modes in turn, round after round, so that a machine's drift meets them alike.

    Args:
        modes: How to run.
        offloaded: The model.
        stack: Trained estimators, or None.
        work: What to run; each repeat is a round, with a warm-up of every mode.
        tick: Called after every generation and every continuation.
    """
    stats: dict[str, list[RuntimeStats]] = {mode.name: [] for mode in modes}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(work.repeats):
        for mode in modes:
            with _opened(mode, offloaded, stack) as engine:
                generate = partial(_generate, engine, work)
                generate(work.prompts[0])
                tick()
                engine.reset_stats()
                tokens[mode.name] = _generate_all(generate, work, tick)
                stats[mode.name].append(engine.stats())
    results = []
    for mode in modes:
        merged = RuntimeStats.merged(stats[mode.name])
        is_exact = mode.config.is_exact
        result = _result(mode.name, merged, tokens[mode.name], is_exact, merged.hit_rate)
        if mode.config.looks_ahead:
            result = replace(result, share_ahead=merged.share_ahead)
        if needs_perplexity(mode):
            with _opened(mode, offloaded, stack) as engine:
                result = replace(result, perplexity=_perplexity(engine, work, tick))
        results.append(result)
    return results


def needs_perplexity(mode: Mode) -> bool:
    """Whether a mode's perplexity is measured: the baseline's, and where it can differ."""
    return mode.name == BASELINE or not mode.config.is_exact


def num_ticks(modes: list[Mode], work: Workload, *, has_stock: bool = False) -> int:
    """How often `tick` will be called for these modes, and for the stock model before them."""
    stock = has_stock * (1 + work.repeats * len(work.prompts))
    timed = len(modes) * work.repeats * (1 + len(work.prompts))
    return stock + timed + len(work.prompts) * sum(map(needs_perplexity, modes))


@contextlib.contextmanager
def _opened(
    mode: Mode, offloaded: OffloadedModel, stack: EstimatorStack | None
) -> Iterator[Engine]:
    with Engine(offloaded, mode.config, stack if mode.uses_bundle else None) as engine:
        if mode.is_filled:
            engine.fill_slots()
        yield engine


def with_perplexity_change(results: list[ModeResult]) -> list[ModeResult]:
    """Fill in the change of perplexity against the baseline."""
    baseline = next(r.perplexity for r in results if r.name == BASELINE)
    return [
        r
        if r.perplexity is None or baseline is None
        else replace(r, perplexity_change=r.perplexity / baseline - 1)
        for r in results
    ]


def to_json(results: list[ModeResult], *, is_cpu: bool) -> dict[str, Any]:
    """Rows by name, and whether the exact modes gave the tokens that they must give.

    Args:
        results: Of the stock model, if it was measured, then of all modes.
        is_cpu: Whether it ran on a CPU, where exact modes are bit-equal to the stock model; on a
            GPU they are to each other, whose kernels are not the stock model's.
    """
    is_stocks = is_cpu and results[0].name == STOCK
    reference = next(r for r in results if r.name == (STOCK if is_stocks else BASELINE))
    compared = [r for r in results if r.is_exact and (is_stocks or r.name != STOCK)]
    return {
        "reference": reference.name,
        "exact_tokens_equal": all(r.tokens == reference.tokens for r in compared),
        "modes": {r.name: asdict(r) for r in results},
    }


def _greedy(prompt: Tensor, work: Workload, device: torch.device) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones_like(prompt, device=device),
        "min_new_tokens": work.new_tokens,
        "max_new_tokens": work.new_tokens,
        "do_sample": False,
    }


def _generate(engine: Engine, work: Workload, prompt: Tensor) -> Tensor:
    output: Tensor = engine.generate(prompt, **_greedy(prompt, work, engine.device))
    return output


def _generate_all(
    generate: Callable[[Tensor], Tensor], work: Workload, tick: Callable[[], None]
) -> list[list[int]]:
    """Run all prompts once; returns their new tokens."""
    tokens = []
    for prompt in work.prompts:
        tokens.append(generate(prompt)[0, prompt.shape[1] :].tolist())
        tick()
    return tokens


def _perplexity(engine: Engine, work: Workload, tick: Callable[[], None]) -> float:
    """Exponential of the mean loss on the continuations, one decode step per token."""
    losses: list[float] = []
    for prompt, continuation in zip(work.prompts, work.continuations, strict=True):
        losses += _losses(engine, prompt.to(engine.device), continuation.to(engine.device))
        tick()
    return math.exp(statistics.fmean(losses))


def _losses(engine: Engine, prompt: Tensor, continuation: Tensor) -> Iterator[float]:
    output = engine(input_ids=prompt, use_cache=True, logits_to_keep=1)
    for step in range(continuation.shape[1]):
        token = continuation[:, step : step + 1]  # [1, 1]
        log_likelihood = output.logits[:, -1].float().log_softmax(-1).gather(1, token)
        yield -float(log_likelihood)
        output = engine(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


def _result(
    name: str,
    stats: RuntimeStats,
    tokens: list[list[int]],
    is_exact: bool,
    hit_rate: float | None,
) -> ModeResult:
    quarter, half, three_quarters = statistics.quantiles(stats.token_ms, n=4)
    return ModeResult(
        name=name,
        is_exact=is_exact,
        tpot_ms=half,
        tpot_ms_p25=quarter,
        tpot_ms_p75=three_quarters,
        ttft_ms=statistics.median(stats.ttft_ms),
        hit_rate=hit_rate,
        bytes_per_token=stats.bytes_per_token,
        wasted_bytes_per_token=stats.wasted_bytes_per_token,
        late_per_token=stats.late_per_token,
        share_ahead=None,
        agreement=stats.agreement,
        is_speculation_off=stats.is_speculation_off,
        perplexity=None,
        perplexity_change=None,
        tokens=tokens,
    )

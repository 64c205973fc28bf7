"""Measures rules on a miss: every one on the same texts, beside the exact engine's."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foreroute.estimators.stack import EstimatorStack
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.engine import Engine
from foreroute.runtime.evaluation.comparison import Comparison
from foreroute.runtime.evaluation.forced import ForcedPass, read_by_steps
from foreroute.runtime.evaluation.frontier import PriceRow
from foreroute.runtime.on_miss import find_rule
from foreroute.runtime.policies.slots import parse_slots
from foreroute.runtime.stats import RuntimeStats
from foreroute.runtime.store.offload import OffloadedModel

logger = logging.getLogger(__name__)

EXACT = "fetch"
POSITIONS = 8
"""Parts of a continuation that are reported apart."""
MOST_REFERENCE_BYTES = 8 * 2**30
"""Exact logits are kept in host memory while the rules run."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What every rule reads."""

    prompts: list[Tensor]
    """[1, P] each; read in one pass."""
    continuations: list[Tensor]
    """[1, N] each; read token by token."""
    free_tokens: int = 0
    """Tokens that the model writes itself after each prompt, greedily; 0 to let it write none."""

    @staticmethod
    def cut(sequences: Sequence[Tensor], prompt_tokens: int, free_tokens: int = 0) -> Texts:
        """Texts of sequences [1, P + N], cut after P tokens."""
        return Texts(
            free_tokens=free_tokens,
            prompts=[tokens[:, :prompt_tokens] for tokens in sequences],
            continuations=[tokens[:, prompt_tokens:] for tokens in sequences],
        )


@dataclass(frozen=True, kw_only=True)
class Exact:
    """What the exact engine said and wrote, in host memory."""

    logits: list[Tensor]
    """[N - 1, V] float32 each."""
    written: list[Tensor]
    """[free tokens] int64 each; empty if none were asked for."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One engine's way through all texts."""

    comparison: Comparison
    stats: RuntimeStats
    tpot_ms: float
    same_tokens: float | None
    """See `PriceRow`."""


class PriceList:
    """Measures rules of one model, one engine after the other."""

    def __init__(
        self,
        offloaded: OffloadedModel,
        stack: EstimatorStack | None,
        config: EngineConfig,
        measured: Sequence[PriceRow] = (),
    ) -> None:
        """Measure on a model.

        Args:
            offloaded: No other engine may be attached to it.
            stack: Estimators, if there are any.
            config: All settings but rule and slots. Where a rule runs predicted experts and this
                looks ahead at nothing, every prediction is fetched.
            measured: Rows that are there already, the exact rule's among them.
        """
        self._offloaded, self._stack = offloaded, stack
        self._config = replace(config, agreement_floor=0.0)  # what is asked for runs to the end
        self._noise = {row.slots: row.kl for row in measured if row.rule == EXACT}

    def read_exact(self, texts: Texts, slots: str) -> Exact:
        """What the exact engine makes of the texts.

        Args:
            texts: What is read.
            slots: Those that rules are measured at first; others are taken, so that the exact
                engine's own difference from this is a noise floor.

        Raises:
            ValueError: If they would not fit.
        """
        geometry, model = self._offloaded.moe.geometry, self._offloaded.moe.model
        rows = sum(text.shape[1] - 1 for text in texts.continuations)
        size = 4 * rows * model.config.get_text_config().vocab_size
        if size > MOST_REFERENCE_BYTES:
            raise ValueError(
                f"The exact logits of {rows} tokens take {size / 2**30:.0f} GiB; at most "
                f"{MOST_REFERENCE_BYTES >> 30} are kept. Lower --num-prompts or --new-tokens."
            )
        count = parse_slots(slots, num_experts=geometry.num_experts, top_k=geometry.top_k)
        other = count + 1 if count < geometry.num_experts else count - 1
        with self._opened(EXACT, str(other), "") as engine:
            logits = [run.logits.cpu() for run in _passes(engine, texts)]
            return Exact(logits=logits, written=_written(engine, texts))

    def measure(
        self, texts: Texts, exact: Exact, rule: str, slots: str, exact_layers: str = ""
    ) -> PriceRow:
        """One rule's row; the exact one's comes before others at the same slots.

        Args:
            texts: What is read.
            exact: What the exact engine makes of it.
            rule: As `on_miss` takes it.
            slots: Per layer, a number or a share.
            exact_layers: As the config takes it.
        """
        found = self._measured(texts, exact, rule, slots, exact_layers)
        comparison, stats = found.comparison, found.stats
        ratio, ratio_interval = comparison.perplexity_ratio()
        kl, kl_interval = comparison.mean_kl()
        if rule == EXACT:
            self._noise[slots] = kl
        top1, top1_interval = comparison.top1_agreement()
        return PriceRow(
            model=self._offloaded.moe.geometry.model_name,
            rule=rule,
            slots=slots,
            exact_layers=exact_layers,
            kl=kl,
            kl_interval=kl_interval,
            kl_noise=self._noise[slots],
            perplexity_ratio=ratio,
            perplexity_interval=ratio_interval,
            top1_agreement=top1,
            top1_interval=top1_interval,
            agreement=stats.agreement,
            hit_rate=stats.hit_rate,
            bytes_per_token=stats.bytes_per_token,
            tpot_ms=found.tpot_ms,
            same_tokens=found.same_tokens,
            by_position=comparison.by_position(POSITIONS),
        )

    def _measured(
        self, texts: Texts, exact: Exact, rule: str, slots: str, exact_layers: str
    ) -> Measured:
        comparison, step_ms = Comparison(), []
        with self._opened(rule, slots, exact_layers) as engine:
            runs = _passes(engine, texts)
            for run, expected, tokens in zip(runs, exact.logits, texts.continuations, strict=True):
                came = tokens[0, 1:].to(run.logits.device)
                comparison.add(expected.to(run.logits.device), run.logits, came)
                step_ms += run.step_ms
            stats = copy.deepcopy(engine.stats())  # not of what follows
            same = [
                _same_tokens(*pair)
                for pair in zip(exact.written, _written(engine, texts), strict=True)
            ]
        return Measured(
            comparison=comparison,
            stats=stats,
            tpot_ms=statistics.median(step_ms),
            same_tokens=statistics.fmean(same) if same else None,
        )

    def _opened(self, rule: str, slots: str, exact_layers: str) -> Engine:
        config = self._config
        if find_rule(rule).predicted and not config.looks_ahead:
            config = replace(config, prefetch="all")
        config = replace(config, on_miss=rule, expert_slots=slots, exact_layers=exact_layers)
        return Engine(self._offloaded, config, self._stack)


def _passes(engine: Engine, texts: Texts) -> Iterator[ForcedPass]:
    """Every text in turn, after a first one that only warms up; slots go on from each to the next.

    The engine's counters are of what is given.
    """
    pairs = list(zip(texts.prompts, texts.continuations, strict=True))
    read_by_steps(engine, *pairs[0])
    engine.reset_stats()
    for prompt, continuation in pairs:
        yield read_by_steps(engine, prompt, continuation)


def _written(engine: Engine, texts: Texts) -> list[Tensor]:
    """What the engine writes after each prompt, greedily."""
    if not texts.free_tokens:
        return []
    count = texts.free_tokens
    asked = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    return [
        engine.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)[0, -count:].cpu()
        for prompt in texts.prompts
    ]


def _same_tokens(expected: Tensor, found: Tensor) -> int:
    """Tokens before the first that differs."""
    return int((expected == found).long().cumprod(0).sum())


def rules_of(text: str) -> list[str]:
    """The rules of a comma list, the exact one first.

    Args:
        text: As a user writes it; known rules, see `find_rule`.

    Raises:
        ValueError: If one is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        find_rule(name)
    return list(dict.fromkeys([EXACT, *names]))


def not_measured(
    rules: Sequence[str], slots: Sequence[str], exact_layers: str, rows: Sequence[PriceRow]
) -> list[tuple[str, str]]:
    """Pairs of rule and slots that no row has, in order.

    Args:
        rules: Asked for.
        slots: Asked for.
        exact_layers: Asked for; the exact rule has none.
        rows: There already.
    """
    done = {(row.rule, row.slots, row.exact_layers) for row in rows}
    return [
        (rule, share)
        for share in slots
        for rule in rules
        if (rule, share, "" if rule == EXACT else exact_layers) not in done
    ]

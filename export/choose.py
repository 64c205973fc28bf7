"""Chooses each layer's estimator and the calibration by what they cost on held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreroute.data.traces import Traces
from foreroute.estimators import TRAINING_FREE_FORM, EstimatorStack
from foreroute.estimators.calibration import Calibration
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.estimators.hybrid import HybridStack
from foreroute.export.bundle import CalibrationEntry, CandidateEntry
from foreroute.train.calibrate import METHODS
from foreroute.train.measure import count_margins, judge, measure, predictor_of
from foreroute.train.run import FinishedRun
from foreroute.train.shards import PairedShards
from foreroute.train.split import HeldOutParts


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to predict all pairs."""

    run_idx: int
    """Which of the runs it comes from."""
    run: str
    """That run's folder name."""
    stack: EstimatorStack
    """Trained everywhere, or training-free everywhere."""

    @property
    def is_trained(self) -> bool:
        """Whether it is the run's own form."""
        return all(self.stack.is_trained)

    @property
    def form(self) -> str:
        """The form in use."""
        return self.stack.spec.form if self.is_trained else TRAINING_FREE_FORM


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and from what."""

    stack: EstimatorStack
    """The chosen estimators of all pairs, calibrated."""
    chosen: tuple[Candidate, ...]
    """Per pair."""
    compared: tuple[tuple[CandidateEntry, ...], ...]
    """Per pair, every candidate."""
    calibration: CalibrationEntry
    """How the probabilities came about."""


def candidates_of(runs: Mapping[str, FinishedRun]) -> list[Candidate]:
    """All ways to predict that the runs offer, the training-free ones first.

    Args:
        runs: By folder name; of the same traces, horizon and layers.
    """
    free: dict[str, Candidate] = {}
    trained: list[Candidate] = []
    for idx, (name, finished) in enumerate(runs.items()):
        stack, spec = finished.stack, finished.plan.spec
        none = [False] * len(spec.target_layers)
        if stack.input.router_weight is not None and spec.input_kind not in free:
            without = stack.with_trained(none)
            free[spec.input_kind] = Candidate(run_idx=idx, run=name, stack=without)
        if spec.form != TRAINING_FREE_FORM:
            trained.append(Candidate(run_idx=idx, run=name, stack=stack))
    return [*free.values(), *trained]


def choose(
    runs: Mapping[str, FinishedRun], traces: Traces, parts: HeldOutParts, costs: FetchCosts
) -> Choice:
    """Calibrate every candidate, then take the cheapest one for each pair.

    Two parts of the held-out sequences each judge the probabilities that the other fitted; those
    that are kept are fitted on both. A tie goes to the training-free one, then to the run given
    first.

    Args:
        runs: By folder name; of the same traces, horizon and layers.
        traces: What they were trained on.
        parts: Held-out sequences; the reported ones are not read.
        costs: What a prefetch gains and loses.
    """
    candidates = candidates_of(runs)
    spec, geometry = candidates[0].stack.spec, traces.geometry
    fields = tuple(dict.fromkeys(f for c in candidates for f in c.stack.input_fields))

    def shards(sequences: range) -> PairedShards:
        return PairedShards(traces, spec, sequences, source_fields=fields, cache_bytes=0)

    predictors = {str(idx): predictor_of(c.stack) for idx, c in enumerate(candidates)}

    def fitted_on(tokens: PairedShards) -> dict[str, dict[str, Calibration]]:
        counted = count_margins(predictors, tokens, geometry)
        return {name: {m: margins.fit(m) for m in METHODS} for name, margins in counted.items()}

    one, other = shards(parts.calibrate), shards(parts.choose)
    costs_of, errors_of, recalls_of = [], [], []
    for to_fit, to_judge in ((one, other), (other, one)):  # each part judges what the other fitted
        named = {name: (predictors[name], fit) for name, fit in fitted_on(to_fit).items()}
        judged = judge(named, to_judge, geometry, costs)
        recalls = measure(predictors, to_judge, geometry, (geometry.top_k,))
        num_tokens = to_judge.num_tokens
        costs_of.append((num_tokens, {key: j.expected_cost for key, j in judged.items()}))
        errors_of.append((num_tokens, {key: j.calibration_error for key, j in judged.items()}))
        recalls_of.append((num_tokens, {name: r.recall_at_k for name, r in recalls.items()}))
    cost, recall, error = _mean(costs_of), _mean(recalls_of), _mean(errors_of)
    errors = {method: _mean_error(error, method) for method in METHODS}
    method = min(METHODS, key=lambda name: errors[name])
    compared = tuple(
        tuple(
            CandidateEntry(
                run=candidate.run,
                form=candidate.form,
                input_kind=candidate.stack.spec.input_kind,
                expected_cost=cost[str(idx), method][pair],
                recall_at_k=recall[str(idx)][pair],
            )
            for idx, candidate in enumerate(candidates)
        )
        for pair in range(len(spec.target_layers))
    )
    both = shards(range(parts.calibrate.start, parts.choose.stop))
    fitted = fitted_on(both)
    best = [min(range(len(row)), key=lambda idx: row[idx].expected_cost) for row in compared]
    chosen = tuple(candidates[idx] for idx in best)
    return Choice(
        stack=assemble(chosen, [fitted[str(idx)][method] for idx in best]),
        chosen=chosen,
        compared=compared,
        calibration=CalibrationEntry(
            method=method,
            compared=errors,
            num_fit_tokens=both.num_tokens,
            num_choose_tokens=both.num_tokens,
            costs=costs,
        ),
    )


def assemble(chosen: Sequence[Candidate], calibrations: Sequence[Calibration]) -> EstimatorStack:
    """One stack that predicts each pair by its candidate.

    Args:
        chosen: The candidate of each pair, [P].
        calibrations: Theirs, of all P pairs each.

    Returns:
        A stack of the runs in use alone: one if that is enough.
    """
    used = sorted({candidate.run_idx for candidate in chosen})
    stacks = []
    for run_idx in used:
        stack = next(c.stack for c in chosen if c.run_idx == run_idx)
        stacks.append(stack.with_trained([c.is_trained or c.run_idx != run_idx for c in chosen]))
    stack = stacks[0]
    if len(stacks) > 1:
        stack = HybridStack(stacks, [used.index(c.run_idx) for c in chosen])
    tables = [
        {name: tensor[pair] for name, tensor in calibration.to_tensors().items()}
        for pair, calibration in enumerate(calibrations)
    ]
    joined = {name: torch.stack([table[name] for table in tables]) for name in tables[0]}
    stack.calibration = Calibration(**joined, top_k=stack.geometry.top_k)
    return stack


Figures = tuple[int, Mapping[Any, Sequence[float]]]
"""Tokens, and by name a figure for each pair on them."""


def _mean(parts: Sequence[Figures]) -> dict[Any, list[float]]:
    """The same figures over all tokens."""
    total = sum(num_tokens for num_tokens, _ in parts)
    return {
        name: [
            sum(num_tokens * value for (num_tokens, _), value in zip(parts, values, strict=True))
            / total
            for values in zip(*(figures[name] for _, figures in parts), strict=True)
        ]
        for name in parts[0][1]
    }


def _mean_error(errors: Mapping[tuple[str, str], Sequence[float]], method: str) -> float:
    found = [e for (_, used), values in errors.items() if used == method for e in values]
    return sum(found) / len(found)

"""Recall against training tokens: the same fit on 1/16, 1/8, 1/4, 1/2 and all of them."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from foreroute.data.traces import Traces
from foreroute.train.fit import fit_stack, train_default_vectors
from foreroute.train.measure import measure, predictor_of
from foreroute.train.quiet import quiet_lightning
from foreroute.train.run import RunPlan
from foreroute.train.shards import PairedShards
from foreroute.train.split import split_held_out
from foreroute.train.stacks import build_stack

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
CURVE_FORMS = ("ridge", "low-rank")
"""Closed form, and trained from it."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One fit."""

    form: str
    """One of `CURVE_FORMS`."""
    num_train_tokens: int
    """It was fitted on."""
    recall_at_k: float
    """Mean over layers, on the report's tokens."""


def fit_curve(plan: RunPlan, traces: Traces, device: torch.device) -> list[CurvePoint]:
    """Fit both forms on more and more of the training sequences.

    Default vectors are those of all training sequences.

    Args:
        plan: Of the run whose input, layers and fit are taken.
        traces: What it was trained on.
        device: Where to compute.
    """
    geometry, train = traces.geometry, plan.split.train
    vectors = train_default_vectors(traces, plan)
    report = split_held_out(plan.split.held_out).report
    held_out = PairedShards(traces, plan.spec, report, cache_bytes=0)
    points = []
    for num_sequences in sorted({max(1, round(len(train) * share)) for share in SHARES}):
        split = dataclasses.replace(plan.split, train=train[:num_sequences])
        for form in CURVE_FORMS:
            spec = dataclasses.replace(plan.spec, form=form)
            part = dataclasses.replace(plan, spec=spec, split=split)
            torch.manual_seed(plan.config.seed)
            stack = build_stack(traces, spec, vectors, device)
            with quiet_lightning(), tempfile.TemporaryDirectory() as folder:
                num_tokens = fit_stack(stack, traces, part, Path(folder)).num_tokens
            stack.to(device)
            found = measure(
                {form: predictor_of(stack)}, held_out, geometry, (geometry.top_k,), device
            )
            recall = found[form].recall_at_k
            points.append(
                CurvePoint(
                    form=form,
                    num_train_tokens=num_tokens,
                    recall_at_k=sum(recall) / len(recall),
                )
            )
    return points

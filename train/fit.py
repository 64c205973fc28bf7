"""One fit for all layers, measured beside the baselines: what `train-estimator` does."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from foreroute.data.adapters import resolve_device
from foreroute.data.manifest import MANIFEST_FILE
from foreroute.data.opening import open_traces
from foreroute.data.traces import Traces
from foreroute.estimators import (
    SOURCE_FIELDS,
    EstimatorSpec,
    EstimatorStack,
    RecallMetrics,
    default_budgets,
)
from foreroute.estimators.artifacts import sha256_of
from foreroute.estimators.output import claim
from foreroute.estimators.ranks import ALONE, Ranks, joined_ranks
from foreroute.train.baselines import baseline_fields, build_baselines
from foreroute.train.checkpoints import WholeCheckpoints, require_whole
from foreroute.train.choose import settle_pairs
from foreroute.train.datamodule import RoutingDataModule, Shards
from foreroute.train.measure import measure, predictor_of
from foreroute.train.module import LOG_STEPS, EstimatorModule
from foreroute.train.parts import build_part, join_metrics, join_stacks
from foreroute.train.prepared import PreparedBatch, PreparedShards
from foreroute.train.ridge import has_ridge_start, set_to_ridge
from foreroute.train.run import (
    CHECKPOINT_PATH,
    METRICS_NAME,
    DeviceChoice,
    FitConfig,
    RunPlan,
    finish_run,
    open_run,
    read_metrics,
)
from foreroute.train.shards import PairedShards
from foreroute.train.split import MIN_SEQUENCES, split_off_validation, split_sequences

logger = logging.getLogger(__name__)

TOO_FEW_TO_EXPORT = (
    f"Of %d sequences %d are held out; export-estimator needs {MIN_SEQUENCES}. Collect more tokens "
    "to export what is trained."
)
PARTS = "parts"
"""Folder of a run by several processes, of each one's log and checkpoint."""
LIVE_IS_ALONE = (
    "Training while a model runs is done by one process: start it without torchrun, or record "
    "traces first, which several processes can train on."
)


def train_estimator(
    source: Path | Traces,
    spec: EstimatorSpec,
    config: FitConfig,
    out: Path,
    *,
    device: DeviceChoice = "auto",
    overwrite: bool = False,
    resume: bool = False,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """Fit an estimator of all the spec's layers, measure it, and write the run's folder.

    A layer keeps its parameters after the last epoch, with the correction shrunk as far as
    `kept_gain` of its gain allows. Where training did not pay, it keeps those before the first
    epoch. Training sequences that are set aside decide both; held-out tokens choose nothing.

    Args:
        source: Folder that `collect-traces` wrote, or traces that are open.
        spec: What to predict from what, in which form.
        config: How to fit.
        out: The run's folder.
        device: Where to compute; `auto` takes a GPU if there is one.
        overwrite: Replace a folder that is there already.
        resume: Go on with a killed run of the same settings; start one if there is none.
        memory_bytes: Most bytes of prepared tokens to keep; by the free memory if None.

    Returns:
        What is in metrics.json.

    Raises:
        FileNotFoundError: If there are no traces.
        ValueError: If the traces are damaged, or settings do not fit them or the folder.
    """
    start = time.monotonic()
    with contextlib.ExitStack() as held:
        ranks = held.enter_context(joined_ranks())
        chosen = ranks.device(resolve_device(device))
        traces = source if isinstance(source, Traces) else open_traces(source)
        if traces.manifest.live_sha256 and not ranks.is_alone:
            raise ValueError(LIVE_IS_ALONE)
        ranks.first(lambda: held.enter_context(claim(out)))
        plan = plan_run(traces, spec, config)
        if len(plan.split.held_out) < MIN_SEQUENCES and ranks.is_first:
            logger.warning(TOO_FEW_TO_EXPORT, traces.num_sequences, len(plan.split.held_out))
        vectors = train_default_vectors(traces, plan)
        stack = build_part(traces, spec, ranks, config.seed, vectors, chosen)
        traces.read(stack.source_layers[0], 0, SOURCE_FIELDS[spec.input_kind])  # is it recorded?
        traces.verify(ranks.rank, ranks.num_ranks)
        ranks.wait()
        ranks.first(
            lambda: open_run(out, plan, overwrite=overwrite, resume=resume, inputs=[traces.folder])
        )
        if ranks.first((out / METRICS_NAME).is_file):
            return ranks.first(lambda: read_metrics(out))
        mine = dataclasses.replace(plan, spec=stack.spec)
        fitted = fit_stack(stack, traces, mine, _folder_of(out, stack, ranks), memory_bytes, ranks)
        measured = measure_part(stack, traces, mine, vectors, chosen)
        metrics = describe_run(join_metrics(ranks.gather(measured)), traces, plan)
        whole = join_stacks(stack, traces, spec, vectors, ranks)
        metrics |= {
            "form": spec.form,
            "num_train_tokens": fitted.num_tokens,
            "kept_shares": fitted.kept_shares,
            "seconds": round(time.monotonic() - start, 1),
        }
        return ranks.first(lambda: finish_run(out, whole, metrics))


def _folder_of(out: Path, stack: EstimatorStack, ranks: Ranks) -> Path:
    """Where a process keeps its log and its checkpoint: the run's folder, or one for its layers."""
    if ranks.is_alone:
        return out
    first, last = stack.target_layers[0], stack.target_layers[-1]
    return out / PARTS / f"layers_{first:03d}_{last:03d}"


def plan_run(traces: Traces, spec: EstimatorSpec, config: FitConfig) -> RunPlan:
    """Write down everything that decides what the run gives.

    Raises:
        ValueError: If the traces hold too few sequences to split.
    """
    return RunPlan(
        traces=str(traces.folder.resolve()),
        traces_sha256=sha256_of(traces.folder / MANIFEST_FILE),
        geometry=traces.geometry,
        norm_kind=traces.manifest.norm_kind,
        norm_eps=traces.manifest.norm_eps,
        spec=spec,
        split=split_sequences(traces.num_sequences),
        config=config,
    )


def train_default_vectors(traces: Traces, plan: RunPlan) -> Tensor:
    """Default vectors from the shards that hold nothing but training sequences, [L, E, D].

    All shards are used where there is no such shard (the sums are stored per shard).
    """
    rows_of_shard = PairedShards(traces, plan.spec, plan.split.train).rows
    sizes = [shard.num_tokens for shard in traces.manifest.shards]
    whole = [idx for idx, rows in rows_of_shard.items() if rows == slice(0, sizes[idx])]
    return traces.default_vectors(whole or None)[0]


class Fitted(NamedTuple):
    """What a fit did, besides changing a stack."""

    num_tokens: int
    """Training tokens; 0 if the form has nothing to train."""
    kept_shares: list[float]
    """Share of each layer's correction that is left; none where nothing was trained by steps."""


def fit_stack(
    stack: EstimatorStack,
    traces: Traces,
    plan: RunPlan,
    out: Path,
    memory_bytes: int | None = None,
    ranks: Ranks = ALONE,
) -> Fitted:
    """Train a stack in place, going on from the folder's checkpoint if there is one.

    Args:
        stack: On the device that shall compute.
        traces: Where to read.
        plan: Sequences and settings.
        out: Where log and checkpoint go.
        memory_bytes: Most bytes of prepared tokens to keep; by the free memory if None.
        ranks: The processes that fit the other layers.

    Raises:
        KeyboardInterrupt: If the user interrupts; the last epoch's checkpoint remains.
    """
    if not list(stack.parameters()):
        return Fitted(0, [])
    if stack.form.is_closed_form:
        train = PairedShards(traces, plan.spec, plan.split.train, cache_bytes=0)
        set_to_ridge(stack, PreparedShards.streamed(stack, train))
        stack.eval().requires_grad_(False)
        return Fitted(train.num_tokens, [])
    fitting, choosing = (
        PreparedShards(
            stack,
            PairedShards(traces, plan.spec, sequences, cache_bytes=0),
            seed=plan.config.seed,
            host_bytes=memory_bytes,
        )
        for sequences in split_off_validation(plan.split.train)
    )
    kept_shares = train_stack(stack, fitting, choosing, plan.config, out, ranks)
    return Fitted(fitting.num_tokens, kept_shares)


def train_stack(
    stack: EstimatorStack,
    fitting: Shards[PreparedBatch],
    choosing: Shards[PreparedBatch],
    config: FitConfig,
    out: Path,
    ranks: Ranks = ALONE,
    *,
    show_progress: bool = True,
) -> list[float]:
    """Train by gradient steps, and keep of it what pays (`settle_pairs`).

    Args:
        stack: Trained in place, on the device it lives on.
        fitting: Tokens to train on.
        choosing: Tokens to choose by; all layers keep what training gave if there are none.
        config: How to train.
        out: Folder of the log and of the checkpoint that an interrupted fit goes on from.
        ranks: The processes that train the other pairs.
        show_progress: Draw a progress bar, in the first of them.

    Returns:
        Share of each pair's correction that is left.

    Raises:
        KeyboardInterrupt: If the user interrupts; the last epoch's checkpoint remains.
    """
    if config.init == "ridge" and has_ridge_start(stack):
        set_to_ridge(stack, (fitting.read(shard_idx) for shard_idx in fitting.rows))
    start = {name: value.clone() for name, value in stack.form.state_dict().items()}
    data = RoutingDataModule(fitting, choosing, batch_size=config.batch_size, seed=config.seed)
    module = EstimatorModule(
        stack,
        learning_rate=config.learning_rate,
        num_steps=config.epochs * data.num_batches,
        loss=config.loss,
    )
    device = stack.input.device
    _run_trainer(module, data, config.epochs, out, show_progress and ranks.is_first)
    stack.to(device).eval().requires_grad_(False)  # Lightning leaves it on the CPU
    if not choosing.rows:
        return [1.0] * sum(ranks.gather(len(stack.target_layers)))
    return settle_pairs(stack, start, choosing, config.kept_gain, ranks)


def _run_trainer(
    module: EstimatorModule, data: RoutingDataModule, epochs: int, out: Path, show_progress: bool
) -> None:
    checkpoint = out / CHECKPOINT_PATH
    keep_last = ModelCheckpoint(
        dirpath=checkpoint.parent, filename=checkpoint.stem, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator=module.stack.input.device.type,
        devices=1,
        max_epochs=epochs,
        logger=CSVLogger(out, name="logs"),
        callbacks=[keep_last],
        # one process each, also where SLURM or torchrun have started several
        plugins=[WholeCheckpoints(), LightningEnvironment()],
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        log_every_n_steps=LOG_STEPS,
        enable_model_summary=False,
        enable_progress_bar=show_progress,
    )
    resume_from = checkpoint if checkpoint.is_file() else None
    if resume_from:
        require_whole(resume_from)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except SystemExit as ended:  # Lightning's answer to Ctrl+C
        raise KeyboardInterrupt("the same command with --resume goes on.") from ended


def measure_part(
    stack: EstimatorStack, traces: Traces, plan: RunPlan, vectors: Tensor, device: torch.device
) -> dict[str, RecallMetrics]:
    """Measure a trained stack and all its layers' baselines on the held-out tokens.

    Args:
        stack: Of the plan's layers.
        traces: Where to read.
        plan: Of the same layers.
        vectors: Default vectors of all L MoE layers, [L, E, D].
        device: Where to compute.

    Returns:
        By predictor; the stack is `estimator`.
    """
    geometry, spec = traces.geometry, plan.spec
    held_out = PairedShards(
        traces, spec, plan.split.held_out, source_fields=baseline_fields(spec), cache_bytes=0
    )
    predictors = build_baselines(traces, spec, plan.split, vectors, device)
    predictors["estimator"] = predictor_of(stack.to(device))
    budgets = default_budgets(geometry.top_k, geometry.num_experts)
    return measure(predictors, held_out, geometry, budgets, device)


def describe_run(
    measured: dict[str, RecallMetrics], traces: Traces, plan: RunPlan
) -> dict[str, Any]:
    """What was measured of all layers, beside the random floor.

    Returns:
        metrics.json, less what only the fit knows.
    """
    geometry, spec = traces.geometry, plan.spec
    budgets = default_budgets(geometry.top_k, geometry.num_experts)
    measured["random"] = RecallMetrics.of_chance(
        num_pairs=len(spec.target_layers),
        top_k=geometry.top_k,
        num_experts=geometry.num_experts,
        budgets=budgets,
    )
    results = {name: metrics.to_dict() for name, metrics in measured.items()}
    return {
        "mean": {name: result["recall_at_k"] for name, result in results.items()},
        "estimator": results.pop("estimator"),
        "baselines": results,
        "layers": list(spec.target_layers),
        "budgets": list(budgets),
        "top_k": geometry.top_k,
        "num_held_out_tokens": PairedShards(traces, spec, plan.split.held_out).num_tokens,
    }

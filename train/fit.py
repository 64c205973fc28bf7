"""One fit for all layers, measured beside the baselines: what `train-estimator` does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from foreroute.data.manifest import MANIFEST_FILE
from foreroute.data.traces import Traces
from foreroute.estimators import (
    EstimatorSpec,
    EstimatorStack,
    RecallMetrics,
    default_budgets,
)
from foreroute.estimators.artifacts import read_json, sha256_of
from foreroute.train.baselines import build_baselines
from foreroute.train.datamodule import RoutingDataModule
from foreroute.train.measure import measure, predictor_of
from foreroute.train.module import EstimatorModule
from foreroute.train.run import (
    CHECKPOINT_PATH,
    METRICS_NAME,
    DeviceChoice,
    FitConfig,
    RunPlan,
    finish_run,
    open_run,
)
from foreroute.train.shards import ALL_SOURCE_FIELDS, PairedShards
from foreroute.train.split import split_sequences


def train_estimator(
    traces_path: Path,
    spec: EstimatorSpec,
    config: FitConfig,
    out: Path,
    *,
    device: DeviceChoice = "auto",
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Fit an estimator of all the spec's layers, measure it, and write the run's folder.

    The parameters are those after the last epoch: held-out tokens choose nothing.

    Args:
        traces_path: Folder that `collect-traces` wrote.
        spec: What to predict from what, in which form.
        config: How to fit.
        out: The run's folder.
        device: Where to compute; `auto` takes a GPU if there is one.
        overwrite: Replace a folder that is there already.
        resume: Go on with a killed run of the same settings; start one if there is none.

    Returns:
        What is in metrics.json.

    Raises:
        FileNotFoundError: If there are no traces.
        ValueError: If the traces are damaged, or settings do not fit them or the folder.
    """
    start = time.monotonic()
    chosen = choose_device(device)
    traces = Traces.open(traces_path)
    plan = plan_run(traces_path, traces, spec, config)
    vectors = train_default_vectors(traces, plan)
    torch.manual_seed(config.seed)
    stack = EstimatorStack.build(traces.geometry, spec, traces.anchors, vectors)
    traces.verify()
    open_run(out, plan, overwrite=overwrite, resume=resume)
    if (out / METRICS_NAME).is_file():
        return read_json(out / METRICS_NAME)
    num_train_tokens = fit_stack(stack, traces, plan, out, chosen)
    metrics = measure_run(stack, traces, plan, vectors, chosen)
    metrics |= {
        "form": spec.form,
        "num_train_tokens": num_train_tokens,
        "seconds": round(time.monotonic() - start, 1),
    }
    finish_run(out, stack, metrics)
    return metrics


def choose_device(device: DeviceChoice) -> torch.device:
    """Turn the user's choice into a device.

    Raises:
        ValueError: If a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here. Use --device cpu.")
    return torch.device(device)


def plan_run(traces_path: Path, traces: Traces, spec: EstimatorSpec, config: FitConfig) -> RunPlan:
    """Write down everything that decides what the run gives.

    Raises:
        ValueError: If the traces hold too few sequences to split.
    """
    return RunPlan(
        traces=str(traces_path.resolve()),
        traces_sha256=sha256_of(traces_path / MANIFEST_FILE),
        geometry=traces.geometry,
        norm_kind=traces.anchors.norm_kind,
        norm_eps=traces.anchors.norm_eps,
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


def fit_stack(
    stack: EstimatorStack, traces: Traces, plan: RunPlan, out: Path, device: torch.device
) -> int:
    """Train a stack in place, going on from the folder's checkpoint if there is one.

    Returns:
        Number of training tokens; 0 if the form has nothing to train.

    Raises:
        KeyboardInterrupt: If the user interrupts; the last epoch's checkpoint remains.
    """
    if not list(stack.parameters()):
        return 0
    config = plan.config
    data = RoutingDataModule(
        traces, plan.spec, plan.split, batch_size=config.batch_size, seed=config.seed
    )
    num_steps = config.epochs * data.num_batches
    module = EstimatorModule(stack, learning_rate=config.learning_rate, num_steps=num_steps)
    checkpoint = out / CHECKPOINT_PATH
    keep_last = ModelCheckpoint(
        dirpath=checkpoint.parent, filename=checkpoint.stem, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator=device.type,
        devices=1,
        max_epochs=config.epochs,
        logger=CSVLogger(out, name="logs"),
        callbacks=[keep_last],
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    resume_from = checkpoint if checkpoint.is_file() else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except SystemExit as ended:  # Lightning's answer to Ctrl+C
        raise KeyboardInterrupt("the same command with --resume goes on.") from ended
    stack.eval().requires_grad_(False)
    return data.train.num_tokens


def measure_run(
    stack: EstimatorStack, traces: Traces, plan: RunPlan, vectors: Tensor, device: torch.device
) -> dict[str, Any]:
    """Measure a trained stack and all baselines on the held-out tokens.

    Returns:
        metrics.json, less what only the fit knows.
    """
    geometry, spec = traces.geometry, plan.spec
    budgets = default_budgets(geometry.top_k, geometry.num_experts)
    held_out = PairedShards(
        traces, spec, plan.split.held_out, source_fields=ALL_SOURCE_FIELDS, cache_bytes=0
    )
    predictors = build_baselines(traces, spec, plan.split, vectors, device)
    predictors["estimator"] = predictor_of(stack.to(device))
    measured = measure(predictors, held_out, geometry, budgets, device)
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
        "num_held_out_tokens": held_out.num_tokens,
    }

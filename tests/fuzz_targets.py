"""Every reader of files, and how to make files that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_models import MODEL_TARGETS, Target
from safetensors.torch import save_file
from toys import random_anchors, random_batch, toy_geometry, toy_manifest

from foreroute.data.manifest import read_manifest
from foreroute.data.routes import read_route
from foreroute.data.trace_writer import TraceWriter, read_pending
from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec, EstimatorStack
from foreroute.estimators.artifacts import sha256_of, write_json
from foreroute.estimators.calibration import Calibration
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.estimators.metrics import RecallMetrics
from foreroute.estimators.output import claim
from foreroute.export.bundle import CalibrationEntry, PairEntry, load_bundle, save_bundle
from foreroute.export.compare.rows import read_rows
from foreroute.export.compare.tables import curve_table, main_table, saved_table, worth_table
from foreroute.export.report.bench_page import read_bench, verdict
from foreroute.runtime.planning.machine import find_profile, load_profile
from foreroute.runtime.tune.steps import STATE_NAME, Journal
from foreroute.runtime.tune.summary import summarise
from foreroute.train.checkpoints import require_whole
from foreroute.train.run import FitConfig, RunPlan, finish_run, load_run, open_run, read_metrics
from foreroute.train.split import SequenceSplit


def make_bundle(folder: Path) -> None:
    """A bundle with two layers, one of them trained."""
    torch.manual_seed(0)
    spec = EstimatorSpec(form="low-rank", rank=2, target_layers=(1, 2))
    vectors = torch.randn(3, 8, 16)
    stack = EstimatorStack.build(toy_geometry(0, 1, 2), spec, random_anchors(3), vectors)
    table = torch.linspace(0, 1, 8).repeat(2, 1)
    stack.calibration = Calibration(torch.zeros(2), torch.ones(2), table, top_k=2)
    entries = [
        PairEntry(
            source_layer=source,
            target_layer=source + 1,
            form=form,
            recall_at_k=0.9,
            training_free_recall_at_k=0.8,
            budget=2,
        )
        for source, form in enumerate(("low-rank", "next-router"))
    ]
    fitted = CalibrationEntry(
        method="isotonic",
        compared={"isotonic": 0.1},
        num_fit_tokens=8,
        num_choose_tokens=8,
        costs=FetchCosts(),
    )
    save_bundle(folder, stack, entries, num_held_out_tokens=7, provenance={}, calibration=fitted)


def make_run(folder: Path, *, is_there: bool = True) -> None:
    """A finished run of two layers, in a folder that is there already or not."""
    torch.manual_seed(0)
    spec = EstimatorSpec(form="low-rank", rank=2, target_layers=(1, 2))
    vectors = torch.randn(3, 8, 16)
    stack = EstimatorStack.build(toy_geometry(0, 1, 2), spec, random_anchors(3), vectors)
    plan = RunPlan(
        traces="elsewhere",
        traces_sha256="0" * 64,
        geometry=stack.geometry,
        norm_kind="rms",
        norm_eps=1e-6,
        spec=spec,
        split=SequenceSplit(train=range(8), held_out=range(9, 12)),
        config=FitConfig(),
    )
    if is_there:
        folder.rmdir()
    open_run(folder, plan, overwrite=False, resume=False)
    figures = RecallMetrics(
        recall_at_budgets={2: [0.5, 0.25]}, gate_mass_recall=[0.5, 0.5], exact_set=[0.0, 0.5]
    ).to_dict()
    metrics = {
        "estimator": figures,
        "baselines": {"random": figures},
        "mean": {"random": 0.25},
        "form": "low-rank",
        "layers": [1, 2],
        "budgets": [2],
        "top_k": 2,
        "num_held_out_tokens": 8,
        "num_train_tokens": 8,
    }
    finish_run(folder, stack, metrics)


def make_tuning(folder: Path) -> None:
    """What a tuning reads again when all its steps are done."""
    done = {"command": "foreroute bench", "seconds": 1.5}
    write_json(folder / STATE_NAME, {"steps": {"bench": done, "train": done}})
    figures = ("tpot_ms", "tpot_ms_p25", "tpot_ms_p75", "ttft_ms", "bytes_per_token")
    row = dict.fromkeys((*figures, "wasted_bytes_per_token", "agreement", "hit_rate"), 0.5)
    row |= {"is_exact": True, "perplexity_change": None}
    bench = {
        "device": "cpu",
        "model": toy_geometry(0, 1, 2).to_dict(),
        "reference": "stock",
        "exact_tokens_equal": True,
        "modes": {"stock": row, "on-demand": row, "skip": row | {"is_exact": False}},
        "notes": ["A note."],
    }
    write_json(folder / "bench.json", bench)
    make_run(folder / "run", is_there=False)


def read_tuning(folder: Path) -> None:
    """Read and put together what a finished tuning does, but for the pictures."""
    bench = read_bench(folder / "bench.json")
    summarise(read_metrics(folder / "run"), bench, Journal(folder).seconds)
    verdict(bench)


ROW_NAME = "low-rank-h1.json"


def make_rows(folder: Path) -> None:
    """A predictor's row of a comparison."""
    names = ("recall_at_k", "recall_at_1_5k", "gate_mass_recall", "exact_set", "ece")
    saved = {"profile": "p", "slots": "25%", "rule": "head"}
    row = dict.fromkeys((*names, "fit_seconds", "us_by_layer", "extra_us", "tpot_saved"), 0.5)
    row |= dict.fromkeys(("horizon", "depth", "rank", "width"), 1) | saved
    row |= dict.fromkeys(("tokens_ahead", "params", "training_tokens", "held_out_tokens"), 0)
    row |= dict.fromkeys(("model", "trained_on", "tested_on", "device", "torch"), "text")
    row |= {"form": "low-rank", "input": "residual", "prior": "none", "after": ""}
    row |= {"slug": ROW_NAME.removesuffix(".json"), "recall_at_k_ci": [0.25, 0.75]}
    row |= {"recall_per_layer": [0.5], "chosen_cost_per_layer": [1.5], "is_curve": True}
    worth = saved | {"saved": 0.5, "wasted_bytes": 1.0, "stall_ms": 0.1}
    write_json(folder / ROW_NAME, {"rows": [row | {"worth": [worth]}]})


def read_row(folder: Path) -> None:
    """Read a row and write it into every table."""
    rows = read_rows(folder / ROW_NAME, ["text"])
    for make in (main_table, worth_table, saved_table, curve_table):
        make(rows)


def make_traces(folder: Path, *, is_finished: bool = True) -> None:
    """Traces of three shards; the last is pending if they are not finished."""
    manifest = toy_manifest()
    folder.rmdir()
    anchors = random_anchors(3, seed=0)
    writer = TraceWriter.begin(folder, manifest, anchors, overwrite=False)
    for shard_idx in range(3):
        if shard_idx == 2 and not is_finished:
            writer = TraceWriter(folder, read_manifest(folder), is_shared=True)
        shard = writer.begin_shard(2, shard_idx)
        batch, sums = random_batch(manifest, seed=shard_idx)
        shard.add_batch(batch)
        writer.finish_shard(shard, sums)
    if is_finished:
        writer.finish("tokens-reached")


def repair_traces(folder: Path) -> None:
    """Give the manifest the digests and sizes of the files as they are."""
    values = json.loads((folder / "manifest.json").read_text())
    for shard in values["shards"]:
        for name in shard["sha256"]:
            shard["sha256"][name] = sha256_of(folder / name)
            shard["file_bytes"][name] = (folder / name).stat().st_size
    values["anchors_sha256"] = sha256_of(folder / "anchors.safetensors")
    write_json(folder / "manifest.json", values)


def repair_digest(manifest: str) -> Callable[[Path], None]:
    """Give a manifest the digest of its tensors as they are."""

    def repair(folder: Path) -> None:
        values = json.loads((folder / manifest).read_text())
        digest = sha256_of(folder / "estimators.safetensors")
        write_json(folder / manifest, values | {"tensors_sha256": digest})

    return repair


def read_traces(folder: Path) -> None:
    """Read all there is."""
    traces = Traces.open(folder)
    for shard in traces.manifest.shards:
        traces.tokens(shard.shard_idx)
        for layer in traces.geometry.layer_indices:
            traces.record(layer, shard.shard_idx)
    traces.default_vectors()
    traces.verify()


def read_begun(folder: Path) -> None:
    """Read what a resumed recording reads."""
    for entry in TraceWriter(folder, read_manifest(folder)).entries.values():
        entry.require_whole(folder)
    read_pending(folder, read_manifest(folder))


IDS = np.array([[[0, 1], [2, 3], [1, 2]], [[1, 2], [0, 3], [4, 5]], [[0, 3], [1, 2], [2, 3]]])


def write_table(folder: Path) -> None:
    """A route as rows of step, layer and expert."""
    rows = [
        f"0,{'prefill' if step == 0 else 'decode'},{step},{layer},{slot},{expert}"
        for step, token in enumerate(IDS.tolist())
        for layer, experts in enumerate(token)
        for slot, expert in enumerate(experts)
    ]
    header = ["# n_expert=8", "turn,phase,step,layer,slot,expert"]
    (folder / "route.csv").write_text("\n".join([*header, *rows]))


def write_activations(folder: Path) -> None:
    """A route as llama.cpp lists it."""
    rows = [
        f"{layer},{expert}"
        for token in IDS.tolist()
        for layer, experts in enumerate(token)
        for expert in experts
    ]
    (folder / "llama.csv").write_text("\n".join(["layer,expert", *rows]))


def write_megatron(folder: Path) -> None:
    """A route as Megatron records it."""
    lines = [
        json.dumps({"step": step, "layer": layer, "block": "decoder", "top_indices": [experts]})
        for step, token in enumerate(IDS.tolist())
        for layer, experts in enumerate(token)
    ]
    (folder / "trace.jsonl").write_text("\n".join(lines))


def make_checkpoint(folder: Path) -> None:
    """A checkpoint with its digest."""
    torch.save({"state_dict": {"x": torch.zeros(3)}}, folder / "last.ckpt")
    write_json(folder / "last.json", {"sha256": [sha256_of(folder / "last.ckpt")]})


def route(name: str, make: Callable[[Path], Any], share: int) -> Target:
    """A recorded route in one file."""
    return Target(make, (name,), lambda folder: read_route(folder / name), share=share)


TARGETS: dict[str, Target] = {
    "bundle": Target(
        make_bundle,
        ("manifest.json", "estimators.safetensors"),
        load_bundle,
        repair_digest("manifest.json"),
        share=8,
    ),
    "run": Target(
        make_run,
        ("run.json", "metrics.json", "estimators.safetensors"),
        load_run,
        repair_digest("metrics.json"),
        share=8,
    ),
    "traces": Target(
        make_traces,
        (
            "manifest.json",
            "manifest.json",
            "anchors.safetensors",
            "tokens/shard_00001.safetensors",
            "layer_001/shard_00000.safetensors",
        ),
        read_traces,
        repair_traces,
        share=2,
    ),
    "unfinished traces": Target(
        lambda folder: make_traces(folder, is_finished=False),
        ("manifest.json", "pending/shard_00002.json"),
        read_begun,
        share=8,
    ),
    "tuning": Target(
        make_tuning,
        (STATE_NAME, "bench.json", "run/metrics.json"),
        read_tuning,
        share=8,
    ),
    "comparison": Target(make_rows, (ROW_NAME,), read_row, share=8),
    "profile": Target(
        lambda folder: write_json(folder / "p.json", find_profile("h100-pcie5").to_dict()),
        ("p.json",),
        lambda folder: load_profile(folder / "p.json"),
        share=20,
    ),
    "checkpoint": Target(
        make_checkpoint,
        ("last.ckpt", "last.json"),
        lambda folder: require_whole(folder / "last.ckpt"),
        share=20,
    ),
    "lock": Target(
        lambda folder: write_json(
            folder / "out.lock", {"foreroute_lock_of": "out", "pid": 4194304, "host": "elsewhere"}
        ),
        ("out.lock",),
        lambda folder: claim(folder / "out").__enter__(),
        writes=True,
        share=8,
    ),
    "npy": route("ids.npy", lambda folder: np.save(folder / "ids.npy", IDS), 8),
    "npz": route("ids.npz", lambda folder: np.savez(folder / "ids.npz", routed_experts=IDS), 8),
    "safetensors": route(
        "ids.safetensors",
        lambda folder: save_file(
            {"routed_experts": torch.from_numpy(IDS)}, folder / "ids.safetensors"
        ),
        20,
    ),
    "table": route("route.csv", write_table, 12),
    "llama.cpp": route("llama.csv", write_activations, 12),
    "megatron": route("trace.jsonl", write_megatron, 20),
    **MODEL_TARGETS,
}

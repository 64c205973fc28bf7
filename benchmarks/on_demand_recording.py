"""Recording through the on-demand engine beside stock recording: routing, device memory, rate.

    python benchmarks/on_demand_recording.py --json on_demand_recording.json

The same text is recorded by the whole model on the device and by `--expert-slots`, each in a fresh
process, and the traces are compared number by number. Without --model it writes a checkpoint of
Qwen3-30B-A3B's shape with RANDOM weights and fewer layers, with the bundled model's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from prepared_loading import save_model

from foreroute.data.adapters import resolve_device
from foreroute.data.cli import collect
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import device_name, package_versions, write_json

STOCK = "stock"
BUNDLED = Path(__file__).parents[1] / "data" / "bundled_model"


def record(args: argparse.Namespace) -> None:
    """Record once, and print what it took as the last line."""
    slots = None if args.arm == STOCK else args.arm
    began = time.perf_counter()
    collect(
        model=str(args.model),
        source="dataset",
        expert_slots=slots,
        out=args.out,
        tokens=args.tokens,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        device=args.device,
    )
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    print(json.dumps({"seconds": seconds, "peak_device_mib": peak}))


def recorded_by(args: argparse.Namespace, arm: str, out: Path) -> dict[str, Any]:
    """What a fresh process took to record."""
    command = [sys.executable, __file__, "--arm", arm, "--out", str(out)]
    for name in ("model", "tokens", "sequence_length", "batch_size", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def share_equal(first: Path, second: Path) -> dict[str, float]:
    """By field of the traces, the share of numbers that are the same, bit for bit."""
    ours, theirs = Traces.open(first), Traces.open(second)
    same, count = Counter[str](), Counter[str]()
    for layer in ours.geometry.layer_indices:
        for shard in ours.manifest.shards:
            left, right = (vars(t.record(layer, shard.shard_idx)) for t in (ours, theirs))
            for name, values in left.items():
                if values is not None:
                    same[name] += int((values == right[name]).sum())
                    count[name] += values.numel()
    return {name: same[name] / count[name] for name in count}


def main() -> None:
    """Record in both ways and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, help="folder of a checkpoint; random weights without it")
    add("--layers", type=int, default=8, help="of the random model; 1.2 GB each")
    add("--slots", nargs="+", default=["25%"])
    add("--tokens", type=int, default=32_768)
    add("--sequence-length", type=int, default=512)
    add("--batch-size", type=int, default=8)
    add("--device", default="auto")
    add("--tiny", action="store_true", help="small sizes: a test of this script")
    add("--json", type=Path)
    add("--arm", help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        record(args)
        return
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = "a checkpoint's"
        if args.model is None:
            args.model, weights = Path(folder, "model"), "random"
            save_model(args.model, args.layers, device, args.tiny)
            for path in BUNDLED.glob("tokenizer*"):
                shutil.copy(path, args.model)
        rows = []
        for arm in (STOCK, *args.slots):
            out = Path(folder, f"traces-{arm.rstrip('%')}")
            found = {"arm": arm, **recorded_by(args, arm, out)}
            found["tokens_per_second"] = args.tokens / found["seconds"]
            if arm != STOCK:
                found["share_equal_to_stock"] = share_equal(out, Path(folder, "traces-stock"))
            rows.append(found)
            print(found, flush=True)
    if args.json:
        result = {
            "weights": weights,
            "device": device_name(device),
            "versions": package_versions(),
            "command": " ".join(sys.argv),
            "rows": rows,
        }
        write_json(args.json, result)


if __name__ == "__main__":
    main()

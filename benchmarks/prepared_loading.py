"""Loading one model in three ways: from its source, packed at load, and prepared.

    python benchmarks/prepared_loading.py --json benchmarks/results/prepared_loading.json

A checkpoint of Qwen3-30B-A3B's shape with RANDOM weights and fewer layers is written and prepared,
then loaded by fresh processes each way, its files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_shapes import SHAPES, SPREAD
from transformers import AutoConfig, AutoModelForCausalLM

from foreroute.data.adapters import resolve_device
from foreroute.estimators.artifacts import device_name
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.pack import pack_model

LOAD = """
import json, sys, threading, time
def resident():
    lines = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) / 1024
peak, is_done = 0.0, False
def watch():
    global peak
    while not is_done:
        peak = max(peak, resident())
        time.sleep(0.005)
folder, expert_dtype, device = sys.argv[1:]
import torch
import transformers.conversion_mapping
import transformers.models.qwen3_moe.modeling_qwen3_moe
from foreroute.runtime.store.offload import load_offloaded
torch.zeros(1, device=device)
before = resident()
watcher = threading.Thread(target=watch)
watcher.start()
began, processor = time.perf_counter(), time.process_time()
model = load_offloaded(folder, device=device, expert_dtype=expert_dtype)
seconds, processor = time.perf_counter() - began, time.process_time() - processor
is_done = True
watcher.join()
print(json.dumps({
    "seconds": seconds,
    "processor_seconds": processor,
    "peak_mib": peak - before,
    "experts_mib": model.store.num_bytes / 2**20,
}))
"""


def save_model(folder: Path, layers: int, device: torch.device, is_tiny: bool) -> None:
    """Write a random bfloat16 checkpoint."""
    settings = SHAPES["qwen3-30b-a3b"] | {"num_hidden_layers": layers, "vocab_size": 32000}
    if is_tiny:
        settings |= {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.data.normal_(0, SPREAD)
    model.to("cpu").save_pretrained(folder, max_shard_size="2GB")


def load(folder: Path, expert_dtype: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds, peak and kept memory of one way to load, the least of several fresh processes."""
    command = [sys.executable, "-c", LOAD, str(folder), expert_dtype, device.type]
    runs: list[dict[str, Any]] = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    found = {name: min(run[name] for run in runs) for name in runs[0]}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return found | {"disk_mib": sum(path.stat().st_size for path in files) / 2**20}


def main() -> None:
    """Measure the three ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small sizes: a test of this script")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        source, prepared = Path(folder, "source"), Path(folder, "prepared")
        save_model(source, args.layers, device, args.tiny)
        began = time.perf_counter()
        checkpoint = Checkpoint.open(str(source), expert_dtype="lossless")
        pack_model(checkpoint, prepared, device=device.type)
        pack_seconds = time.perf_counter() - began
        rows = {
            "source, as it is": load(source, "bf16", device, args.repeats),
            "source, packed at load": load(source, "lossless", device, args.repeats),
            "prepared": load(prepared, "auto", device, args.repeats),
        }
    result = {
        "weights": "random",
        "device": device_name(device),
        "layers": args.layers,
        "pack_seconds": pack_seconds,
        "rows": rows,
        "command": " ".join(sys.argv),
    }
    print(f"foreroute pack: {pack_seconds:.1f} s")
    for name, row in rows.items():
        print(f"{name:24}", *(f"{key} {value:.1f}" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

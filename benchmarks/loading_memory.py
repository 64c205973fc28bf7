"""Anonymous memory that loading takes, beside transformers' from_pretrained; a process each.

python benchmarks/loading_memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "loading_memory.json"
PAGE = ROOT / "docs" / "loading.md"
MIB = 2**20
LIMIT_FACTOR = 1.05
LIMIT_EXTRA_MIB = 200.0
SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 4096}
MODELS = {
    "qwen3_moe": {"num_experts": 64, "moe_intermediate_size": 512},
    "mixtral": {"num_local_experts": 32, "intermediate_size": 1024},
    "deepseek_v3": {"n_routed_experts": 64, "moe_intermediate_size": 512},
    "gpt_oss": {"num_local_experts": 32, "intermediate_size": 1024},
    "granitemoe": {"num_local_experts": 32, "intermediate_size": 1024},
}
"""Per-expert tensors (the first three), and tensors that hold all experts (the last two)."""

MEASURE = """
import json, sys, threading, time
def rss():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
peak, done = 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.002)
folder, how = sys.argv[1:]
import torch
from transformers import AutoModelForCausalLM
from foreroute.runtime.store.offload import load_offloaded
import foreroute.runtime.store.loading as loading
before = rss()
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
if how == "foreroute":
    kept = load_offloaded(folder, device="cpu")
elif how == "stock":
    kept = AutoModelForCausalLM.from_pretrained(folder)
else:
    loading.fill_stores = lambda *_: None
    kept = load_offloaded(folder, device="cpu")
seconds = time.perf_counter() - began
done = True
watcher.join()
print(json.dumps({"peak_mib": peak - before, "kept_mib": rss() - before, "seconds": seconds}))
"""


def save_model(model_type: str, folder: str) -> tuple[float, float]:
    """Save a random bfloat16 model; returns the MiB of its experts and of the rest."""
    import torch
    from tiny_models import tiny_model

    from foreroute.data.adapters.weightless import experts_by_path

    model = tiny_model(model_type, dtype=torch.bfloat16, **SIZES, **MODELS[model_type])
    model.save_pretrained(folder, max_shard_size="300MB")
    experts = sum(p.nbytes for m in experts_by_path(model).values() for p in m.parameters())
    return experts / MIB, sum(p.nbytes for p in model.parameters()) / MIB - experts / MIB


def measure(folder: str, how: str) -> dict[str, float]:
    """Peak and kept RssAnon of one way to load, MiB above the imports, in a fresh process."""
    command = [sys.executable, "-c", MEASURE, folder, how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def row_of(model_type: str) -> dict[str, float | str | bool]:
    """All figures of one model type, MiB."""
    with tempfile.TemporaryDirectory() as folder:
        save_in_child = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        save_in_child += (
            f"import loading_memory as m; print(m.save_model({model_type!r}, {folder!r}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", save_in_child], check=True, capture_output=True, text=True
        )
        experts, rest = json.loads("[" + done.stdout.splitlines()[-1].strip("()") + "]")
        stock, ours = measure(folder, "stock"), measure(folder, "foreroute")
        without = measure(folder, "without experts")
    # `without` allocates the rows but writes none of them: memory no page of which is touched.
    limit = without["peak_mib"] + LIMIT_FACTOR * experts + LIMIT_EXTRA_MIB
    return {
        "model_type": model_type,
        "experts_mib": experts,
        "rest_mib": rest,
        "stock_peak_mib": stock["peak_mib"],
        "without_experts_peak_mib": without["peak_mib"],
        "peak_mib": ours["peak_mib"],
        "kept_mib": ours["kept_mib"],
        "limit_mib": limit,
        "is_within_limit": ours["peak_mib"] <= limit,
        "stock_seconds": stock["seconds"],
        "seconds": ours["seconds"],
    }


def table_of(rows: list[dict[str, float | str | bool]]) -> str:
    """The page docs/loading.md."""
    lines = [
        "# Memory while loading",
        "",
        "Anonymous memory (RssAnon, MiB above what the imports take, sampled every 2 ms in a fresh "
        "process each) of random bfloat16 checkpoints in shards of 300 MB. Written by "
        "`python benchmarks/loading_memory.py`.",
        "",
        "| model type | experts | rest | stock peak | without experts | foreroute peak | kept | "
        "limit | within | stock s | foreroute s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for row in rows:
        cells = [f"{v:.0f}" if k.endswith("mib") else v for k, v in row.items()]
        cells = [f"{c:.1f}" if isinstance(c, float) else c for c in cells]
        cells = [("yes" if c else "no") if isinstance(c, bool) else str(c) for c in cells]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "The limit is 1.05 x the experts' bytes + 200 MiB above the model without experts. The "
        "first three types have a tensor per expert and matrix, read straight into the host row; "
        "the last two hold all experts in one tensor, read in slices. Stock takes little anonymous "
        "memory there because it leaves such tensors in the mapped file: they are read from the "
        "disk when used, cannot be pinned, and are copied as a whole when moved or cast. Seconds "
        "are of one run each on cores that others used too, files in the page cache: an order of "
        "magnitude.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all models and write the results."""
    rows = [row_of(model_type) for model_type in MODELS]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(table_of(rows))
    print(table_of(rows), RESULTS, PAGE, sep="\n")


if __name__ == "__main__":
    main()

"""What recording costs over the plain forward pass, on the same tokens, in the same run.

    python benchmarks/recording_overhead.py [--model bundled] [--json overhead.json]

Without --model it builds a model of the bundled one's shape with random weights. Repeats of the
three modes are interleaved, so that a busy machine disturbs all of them alike.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from foreroute.data.adapters import MoEModel, discover, load_model, resolve_device
from foreroute.data.allocator import keep_freed_memory
from foreroute.data.batch import record_batch
from foreroute.data.collection import Collection
from foreroute.data.manifest import TraceManifest
from foreroute.data.packing import TokenSequence
from foreroute.data.recorder import RoutingRecorder
from foreroute.data.trace_writer import TraceWriter
from foreroute.estimators.console import run_command

LIMIT = 1.25  # recorded and written / plain, the project's own ceiling


def like_bundled() -> Any:
    """A model of the bundled one's shape, random weights."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        moe_intermediate_size=40,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


def plain(model: Any, batches: list[Tensor]) -> None:
    """The forward passes alone."""
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)


def recorded(moe: MoEModel, batches: list[Tensor], states_dtype: torch.dtype) -> None:
    """The same, recorded, and the records dropped."""
    with RoutingRecorder(moe, states_dtype) as recorder:
        for batch in batches:
            record_batch(moe.model, recorder, batch, batch.shape[1], torch.Generator())


def written(
    moe: MoEModel, batches: list[Tensor], states_dtype: torch.dtype, batches_per_shard: int
) -> int:
    """The same, recorded and written as collect-traces does; returns the bytes written."""
    name = str(states_dtype).removeprefix("torch.")
    num_sequences = len(batches) * len(batches[0])
    manifest = TraceManifest(
        geometry=moe.geometry,
        model="",
        dataset="",
        split="train",
        tokens=num_sequences * batches[0].shape[1],
        sequence_length=batches[0].shape[1],
        generated_share=0.0,
        dtype=name,
        states_dtype=name,
        device=moe.model.device.type,
        batch_size=len(batches[0]),
        shard_sequences=batches_per_shard * len(batches[0]),
        seed=0,
        norm_kind=moe.anchors.norm_kind,
        norm_eps=moe.anchors.norm_eps,
        command="",
        versions={},
    )
    sequences = [TokenSequence(row) for batch in batches for row in batch.tolist()]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        out = Path(folder) / "traces"
        writer = TraceWriter.begin(out, manifest, moe.anchors, overwrite=False)
        collection = Collection(moe, None, manifest, out)
        num_shards = -(-len(batches) // batches_per_shard)
        collection.record(writer, collection.shards(iter(sequences), num_shards), num_shards)
        return writer.manifest.num_bytes


def require_bit_equal(moe: MoEModel, batch: Tensor) -> None:
    """Compare the logits with and without the recorder."""
    with torch.no_grad():
        expected = moe.model(input_ids=batch).logits
        with RoutingRecorder(moe):
            observed = moe.model(input_ids=batch).logits
    if not torch.equal(expected, observed):
        raise RuntimeError("The outputs changed while they were recorded.")


def measure(
    model: str | None = None,
    device: str = "cpu",
    batch_size: int = 4,
    sequence_length: int = 512,
    num_batches: int = 16,
    batches_per_shard: int = 8,
    states_dtype: str = "bfloat16",
    repeats: int = 7,
    json: Path | None = None,
) -> None:
    """Measure and print one table.

    Args:
        model: `bundled`, a folder or a Hub id; by default the bundled shape with random weights.
        device: cpu or cuda.
        batch_size: Sequences per forward pass.
        sequence_length: Tokens per sequence.
        num_batches: Forward passes per repeat.
        batches_per_shard: Forward passes per written shard.
        states_dtype: Dtype in which states are recorded.
        repeats: Repeats of each mode; medians are shown.
        json: Write the figures there too.
    """
    loaded = load_model(model) if model else like_bundled()
    moe = discover(loaded.to(resolve_device(device)), model or "bundled shape, random weights")
    generator = torch.Generator().manual_seed(0)
    shape = (num_batches, batch_size, sequence_length)
    tokens = torch.randint(3, loaded.config.vocab_size, shape, generator=generator)
    batches = list(tokens)
    stored = getattr(torch, states_dtype)
    require_bit_equal(moe, batches[0].to(loaded.device))

    num_bytes = written(moe, batches, stored, batches_per_shard)  # also warms up
    modes: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(loaded, batches),
        "recorded": lambda: recorded(moe, batches, stored),
        "recorded and written": lambda: written(moe, batches, stored, batches_per_shard),
    }
    times_ms: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(repeats):
        for name, run in modes.items():
            start = time.perf_counter()
            run()
            if loaded.device.type == "cuda":
                torch.cuda.synchronize()
            times_ms[name].append((time.perf_counter() - start) * 1e3 / num_batches)

    ratios = {
        name: statistics.median(
            ms / base for ms, base in zip(times_ms[name], times_ms["plain"], strict=True)
        )
        for name in modes
    }
    title = (
        f"{moe.geometry.describe()}; {batch_size} x {sequence_length} tokens a pass, "
        f"{states_dtype} states, {num_bytes / tokens.numel() / 1e3:.1f} kB a token, "
        f"{loaded.device.type}, {torch.get_num_threads()} threads, outputs bit-equal"
    )
    table = Table("mode", "ms a pass (median)", "min", "max", "over plain", title=title)
    for name, times in times_ms.items():
        cells = [f"{value:.0f}" for value in (statistics.median(times), min(times), max(times))]
        table.add_row(name, *cells, f"{ratios[name]:.3f}")
    Console().print(table)
    verdict = "within" if ratios["recorded and written"] <= LIMIT else "OVER"
    print(f"recorded and written: {verdict} the limit of {LIMIT}")
    if json:
        figures = {"title": title, "ms_per_pass": times_ms, "ratio": ratios, "limit": LIMIT}
        json.write_text(dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    keep_freed_memory()  # as collect-traces does; the plain pass gains by it too
    run_command("recording_overhead.py", measure)

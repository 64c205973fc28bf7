"""Time to first token at the shape of a known model: streamed experts, all resident, accelerate.

    python benchmarks/ttft_gpu.py --json ttft_gpu.json

RANDOM weights, random prompts, and the random model's own routing, which asks for fewer experts
than a trained model's would: the bytes moved stand beside every time, and accelerate always moves
all. All arms run in one process on one model.
`--tiny` runs the whole script on a CPU, with small sizes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate_offload import experts_offloaded
from link import synchronize
from partial_results import PartialResults
from random_shapes import (
    POOL_BYTES,
    SHAPES,
    TINY_POOL_BYTES,
    HostPool,
    build,
    free_memory,
    label_of,
    put_experts_back,
    settings_of,
)

from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.store.offload import OffloadedModel

ACCELERATE_REPEATS = 1


@dataclass(frozen=True)
class Cell:
    """One row of the result."""

    shape: str
    prompt_tokens: int
    arm: str
    ttft_ms: float
    """Median; from the prompt on the GPU to its first token on the host."""
    x_resident: float | None
    """Against all experts resident."""
    bytes_per_prompt: float
    """Over the link."""
    repeats: int


def time_prompts(run: Any, prompts: torch.Tensor, repeats: int) -> list[float]:
    """Milliseconds to the first token on the host, after one run that is thrown away.

    Args:
        run: An engine or a model.
        prompts: One for each run, [repeats + 1, tokens], on the model's device.
        repeats: Runs that count.
    """
    times = []
    for prompt in prompts[: repeats + 1]:
        synchronize(prompt.device)
        start = time.perf_counter()
        with torch.no_grad():
            output = run(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
        output.logits[0, -1].argmax().item()
        times.append(1e3 * (time.perf_counter() - start))
    return times[1:]


def measure(
    offloaded: OffloadedModel,
    label: str,
    args: argparse.Namespace,
    results: PartialResults,
    pool: HostPool,
) -> None:
    """All arms and prompt lengths."""
    vocab = offloaded.moe.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = {
        length: torch.randint(vocab, (args.repeats + 1, length), generator=generator)
        for length in args.prompt_tokens
    }
    resident_ms: dict[int, float] = {}

    def add(arm: str, length: int, times: list[float], num_bytes: float) -> None:
        median = statistics.median(times)
        if arm == "resident":
            resident_ms[length] = median
        base = resident_ms.get(length)
        ratio = None if base is None else median / base
        cell = Cell(label, length, arm, median, ratio, num_bytes, len(times))
        results.add(asdict(cell))
        against = "" if ratio is None else f"  {ratio:6.2f} x resident"
        print(
            f"{label} prompt {length:5} {arm:20} TTFT {median:9.1f} ms{against}"
            f"  {num_bytes / 1e6:8.0f} MB",
            flush=True,
        )

    def stream(arm: str, slots: str) -> None:
        with Engine(offloaded, EngineConfig(expert_slots=slots)) as engine:
            engine.fill_slots()
            for length, ids in prompts.items():
                engine.reset_stats()
                times = time_prompts(engine, ids.to(engine.device), args.repeats)
                moved = engine.stats().prefill.fetched_bytes / (args.repeats + 1)
                add(arm, length, times, moved)

    for arm, slots in (("resident", "100%"), (f"streamed, {args.slots} slots", args.slots)):
        if not results.skip_if_spent(arm):
            with results.phase(arm), results.cell(arm):
                stream(arm, slots)
            free_memory()
    if results.skip_if_spent("accelerate"):
        return
    with results.phase("accelerate"), results.cell("accelerate"):
        put_experts_back(offloaded, pool)
        moe = offloaded.moe
        experts = [layer.experts for layer in moe.layers]
        moved = sum(p.nbytes for module in experts for p in module.parameters())
        with experts_offloaded(moe.model, experts, offloaded.device):
            for length, ids in prompts.items():
                prompt = ids.to(offloaded.device)
                add(
                    "accelerate",
                    length,
                    time_prompts(moe.model, prompt, ACCELERATE_REPEATS),
                    float(moved),
                )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    add("--layers", type=int, help="decoder layers; rows say it")
    add("--prompt-tokens", nargs="+", type=int, default=[512, 2048])
    add("--slots", default="25%", help="of the streamed arm")
    add("--repeats", type=int, default=3)
    add("--minutes", type=float, default=3, help="begin no arm after so many")
    add("--json", type=Path)
    add("--tiny", action="store_true", help="small sizes on the CPU: a test of this script")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --tiny tests the script on a CPU")
    args.device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        args.prompt_tokens = [16, 32]
    results = PartialResults(
        args.json,
        args.minutes,
        weights="random",
        routing="the random model's own",
        host_memory=f"a pinned pool of {POOL_BYTES >> 30} GiB that layers share round robin",
        command=" ".join(sys.argv),
    )
    with results.phase("host pool"):
        pool = HostPool(TINY_POOL_BYTES if args.tiny else POOL_BYTES, torch.device(args.device))
    label = label_of(args.shape, layers=args.layers, is_tiny=args.tiny)
    with results.phase("build"):
        settings = settings_of(args.shape, layers=args.layers, is_tiny=args.tiny)
        offloaded = build(settings, label, pool, args.device)
    measure(offloaded, label, args, results, pool)
    pool.close()
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())

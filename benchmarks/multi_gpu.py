"""Decoding on several GPUs of one host, every expert in slices: time per token beside one GPU's.

    torchrun --standalone --nproc-per-node 2 benchmarks/multi_gpu.py --routes ROUTES.csv --json OUT
    python benchmarks/multi_gpu.py --routes ROUTES.csv --json OUT    # one GPU, into the same file

Qwen3-30B-A3B's shape with random weights, recorded routing replayed, simulated predictions.
`--shares` are of all experts' bytes that each GPU has slots for: 25 % on each of two GPUs are slots
for half of all (halved) experts. A prompt of `--prompt-tokens` is read with those of 25 %; its text
and its routing are the random model's own. Rows are added to the file that is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decode_steps import EagerSteps, GraphSteps
from link import link_bandwidth
from random_shapes import HostPool, build, free_memory, settings_of
from replayed_routing import (
    Replay,
    fit_routes,
    near_miss_predictions,
    random_routes,
    read_steps,
)
from ttft_gpu import time_prompts

from foreroute.estimators.artifacts import device_name, package_versions, read_json, write_json
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.device.driver import DeviceDriver
from foreroute.runtime.parallel import SliceRanks

SHAPE, RECALL = "qwen3-30b-a3b", 0.89
PROMPT_SHARE, PROMPT_REPEATS = 25.0, 3


class MultiGpuBenchmark:
    """All cells on the GPUs at hand."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Join the other processes and build this one's slices.

        Args:
            args: The command line.
        """
        self.args = args
        self.device = torch.device(SliceRanks.local_device(args.device))
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.ranks = SliceRanks.join(self.device)
        settings = settings_of(SHAPE, layers=args.layers, is_tiny=args.tiny)
        pool = HostPool(args.pool_gib * 2**30 // self.ranks.num_ranks, self.device)
        self.offloaded = build(settings, SHAPE, pool, str(self.device), self.ranks)
        geometry = self.offloaded.moe.geometry
        recorded = (
            read_steps(args.routes)
            if args.routes
            else random_routes(96, geometry.num_layers, geometry.num_experts, geometry.top_k)
        )
        self.routes = fit_routes(recorded, self.offloaded.moe, 1)
        self.link_gb_s = link_bandwidth(self.offloaded.store.rows[0], self.device)
        self.rows: list[dict[str, Any]] = []
        self._resident: torch.Tensor | None = None

    def run(self) -> None:
        """All resident, then on demand and prefetch at every share."""
        self._measure("resident", EngineConfig(expert_slots="100%"), 100.0)
        for share in self.args.shares:
            slots = min(100.0, share * self.ranks.num_ranks)
            for arm, prefetch in (("on-demand", "none"), (f"prefetch-{RECALL}", "auto")):
                config = EngineConfig(expert_slots=f"{slots}%", prefetch=prefetch)
                self._measure(arm, config, slots)
        self._read_prompts(min(100.0, PROMPT_SHARE * self.ranks.num_ranks))

    def _read_prompts(self, slots: float) -> None:
        """Time to first token of long prompts, experts streamed over each GPU's own link."""
        vocab = self.offloaded.moe.model.config.vocab_size
        shape, generator = (PROMPT_REPEATS + 1, self.args.prompt_tokens), torch.Generator()
        prompts = torch.randint(vocab, shape, generator=generator.manual_seed(0)).to(self.device)
        with Engine(self.offloaded, EngineConfig(expert_slots=f"{slots}%")) as engine:
            engine.fill_slots()
            times = time_prompts(engine, prompts, PROMPT_REPEATS)
            moved = engine.stats().prefill.fetched_bytes / len(prompts)
        row = {
            "gpus": self.ranks.num_ranks,
            "slots": slots,
            "arm": f"prompt-{self.args.prompt_tokens}",
            "ttft_ms_median": statistics.median(times),
            "ttft_ms_mean": statistics.fmean(times),
            "bytes_per_gpu": moved,
            "link_gb_s": self.link_gb_s,
            "repeats": PROMPT_REPEATS,
        }
        self.rows.append(row)
        if self.ranks.is_first:
            print(row, flush=True)
        free_memory()

    def _measure(self, arm: str, config: EngineConfig, slots: float) -> None:
        num_experts = self.offloaded.moe.geometry.num_experts
        looks = config.looks_ahead
        predictions = near_miss_predictions(self.routes, num_experts, RECALL) if looks else None
        with Engine(self.offloaded, config) as engine:
            if arm == "resident":
                engine.fill_slots()
            replay = Replay(engine, self.routes, predictions)
            driver, context = engine.driver, self.args.context
            if isinstance(driver, DeviceDriver):
                steps: Any = GraphSteps(driver, 1, context, self.device)
            else:
                steps = EagerSteps(engine, engine.model.config, 1, context, self.device)
            logits = steps.run(replay, self.args.warm_up)
            engine.reset_stats()
            times = steps.time(replay, self.args.warm_up, self.args.tokens)
            stats = engine.stats()
            is_graph = isinstance(driver, DeviceDriver)
        if arm == "resident":
            self._resident = logits
        self._add(arm, slots, times, stats, logits, is_graph)
        free_memory()

    def _add(
        self, arm: str, slots: float, times: list[float], stats: Any, logits: Any, is_graph: bool
    ) -> None:
        row_bytes = self.offloaded.expert_bytes
        geometry = self.offloaded.moe.geometry
        num_slots = round(slots / 100 * geometry.num_experts) * geometry.num_layers
        row = {
            "gpus": self.ranks.num_ranks,
            "slots": slots,
            "arm": arm,
            "tpot_ms_median": statistics.median(times),
            "tpot_ms_mean": statistics.fmean(times),
            "slot_bytes_per_gpu": num_slots * row_bytes,
            "bytes_per_gpu": stats.bytes_per_token,
            "hit_rate": stats.hit_rate,
            "link_gb_s": self.link_gb_s,
            "is_one_graph": is_graph,
            "is_bit_equal_to_resident": bool(torch.equal(logits, self._resident)),
            "are_ranks_bit_equal": self._are_ranks_equal(logits),
            "tokens": len(times),
        }
        self.rows.append(row)
        if self.ranks.is_first:
            print(row, flush=True)

    def _are_ranks_equal(self, logits: torch.Tensor) -> bool:
        if self.ranks.is_alone:
            return True
        first = logits.clone()
        dist.broadcast(first, 0)
        differing = torch.tensor([float(not torch.equal(first, logits))], device=self.device)
        dist.all_reduce(differing)
        return float(differing) == 0


def main() -> int:
    """Measure, and add the rows to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--routes", type=Path, help="recorded routing; random if not given")
    add("--json", type=Path, required=True)
    add("--shares", type=float, nargs="+", default=[10, 25, 40], help="%% of all bytes per GPU")
    add("--tokens", type=int, default=64)
    add("--warm-up", type=int, default=32)
    add("--context", type=int, default=512)
    add("--prompt-tokens", type=int, default=2048)
    add("--layers", type=int)
    add("--pool-gib", type=int, default=8, help="host memory for experts, all processes together")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="small sizes, for a CPU")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    benchmark = MultiGpuBenchmark(args)
    benchmark.run()
    if benchmark.ranks.is_first:
        before = read_json(args.json)["rows"] if args.json.is_file() else []
        content = {
            "device": device_name(benchmark.device),
            "versions": package_versions(),
            "shape": f"{SHAPE}{' (tiny)' * args.tiny}: random weights, replayed routing, simulated "
            f"predictions of recall {RECALL}",
            "rows": before + benchmark.rows,
        }
        write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

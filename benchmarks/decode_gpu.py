"""Decode on one GPU at the shapes of known models: what each way of loading experts costs.

    python benchmarks/decode_gpu.py --routes qwen3-30b-a3b.route.csv --shapes qwen3-30b-a3b

Weights are RANDOM and routing is REPLAYED from a recorded route file; predictions of a given recall
are the recorded truth with wrong guesses drawn from the layer's popularity (near misses). The
prediction's own arithmetic runs all the same. Checks correctness first; prints one table.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from foreroute.data.adapters import MoEModel, discover
from foreroute.data.adapters.seam import HANDLER_ATTRIBUTE, is_experts_module
from foreroute.estimators.artifacts import package_versions
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.graph_engine import GraphEngine
from foreroute.runtime.host_store import HostExpertStore, RowLayout, allocate_host
from foreroute.runtime.offload import OffloadedModel
from foreroute.runtime.prefetch import Prefetcher

DEVICE = torch.device("cuda")
POOL_LAYERS = 8
"""Host memory holds the experts of so many layers; the others share them (same bytes moved)."""
WARM_UP_TOKENS = 8
EAGER_TOKENS = 24
TIMELINE_TOKENS = 3

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 6,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "sliding_window": 128,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "sliding_window": None,
    },
}


@dataclass(frozen=True)
class Cell:
    """One row of the result."""

    shape: str
    batch: int
    slots: int
    """Per cent of the experts resident."""
    arm: str
    tpot_ms_median: float
    tpot_ms_p95: float
    bytes_per_token: float
    hit_rate: float
    link_gb_s: float
    tokens: int


def read_routes(path: Path) -> Tensor:
    """Decode steps of a route file, [steps, layers, k] int64, most weighted expert first."""
    steps: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        rows = (line for line in file if not line.startswith("#"))
        for row in csv.DictReader(rows):
            if row["phase"] == "1":
                steps[int(row["step"])][int(row["layer"])].append(int(row["expert"]))
    num_layers = max(len(layers) for layers in steps.values())
    whole = [steps[s] for s in sorted(steps) if len(steps[s]) == num_layers]
    return torch.tensor([[step[layer] for layer in sorted(step)] for step in whole])


def fit_routes(routes: Tensor, moe: MoEModel, batch: int) -> Tensor:
    """Routes for another shape: first layers, ids folded to its experts, the first distinct top-k.

    Returns:
        [steps, layers, batch, top_k]; sequence b starts 17 b steps into the recording.
    """
    geometry = moe.geometry
    layers = routes[:, : geometry.num_layers] % geometry.num_experts
    fitted = torch.empty(*layers.shape[:2], geometry.top_k, dtype=torch.long)
    for step, per_layer in enumerate(layers.tolist()):
        for layer, ids in enumerate(per_layer):
            every = list(dict.fromkeys([*ids, *range(geometry.num_experts)]))
            fitted[step, layer] = torch.tensor(every[: geometry.top_k])
    return torch.stack([fitted.roll(-17 * b, dims=0) for b in range(batch)], dim=2)


def near_miss_predictions(routes: Tensor, num_experts: int, recall: float) -> Tensor:
    """The true experts with a share replaced by others, drawn from the layer's popularity."""
    generator = torch.Generator().manual_seed(0)
    predictions = routes.clone()
    for layer in range(routes.shape[1]):
        popularity = torch.bincount(routes[:, layer].flatten(), minlength=num_experts) + 0.05
        flat = predictions[:, layer].flatten(0, 1)  # [steps * batch, top_k]
        is_wrong = torch.rand(flat.shape, generator=generator) > recall
        for row in is_wrong.any(-1).nonzero().flatten().tolist():
            weights = popularity.clone()
            weights[flat[row]] = 0
            count = int(is_wrong[row].sum())
            flat[row, is_wrong[row]] = torch.multinomial(weights, count, generator=generator)
        predictions[:, layer] = flat.view(predictions[:, layer].shape)
    return predictions


def build(shape: str) -> OffloadedModel:
    """A model of that shape with random weights, its experts pinned on the host."""
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = [module for module in model.modules() if is_experts_module(module)]
    layouts = [RowLayout.of(module) for module in experts]
    num_experts = next(iter(experts[0].parameters())).shape[0]
    for module in experts:
        for name, _ in list(module.named_parameters(recurse=False)):
            del module._parameters[name]
    model.to_empty(device=DEVICE)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):  # its frequencies are no parameters
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config=config).to(DEVICE))
    rows = _random_rows(num_experts, layouts)
    store = HostExpertStore.__new__(HostExpertStore)
    store.is_pinned, store.layouts, store.rows = True, layouts, rows
    return OffloadedModel(discover(model.eval(), f"{shape} (random weights)"), store, DEVICE)


def _random_rows(num_experts: int, layouts: list[RowLayout]) -> list[Tensor]:
    pool = []
    for layout in layouts[:POOL_LAYERS]:
        rows = allocate_host(num_experts, layout.row_bytes, is_pinned=True)
        for start in range(0, num_experts, 8):
            part = rows[start : start + 8]
            noise = torch.randn(part.nbytes // 2, device=DEVICE, dtype=torch.bfloat16) * 0.02
            part.copy_(noise.view(torch.uint8).view(part.shape))
        pool.append(rows)
    return [pool[i % len(pool)] for i in range(len(layouts))]


class Replay:
    """Puts recorded routing (and predictions) in place of the random model's own."""

    def __init__(self, engine: Engine, routes: Tensor, predictions: Tensor | None) -> None:
        self._routes, self._predictions = routes.to(DEVICE), None
        self._ids = self._routes[0].clone()  # [layers, batch, top_k], read by the graph
        position = {layer.layer_idx: i for i, layer in enumerate(engine.layers)}
        for moe_layer, own in zip(engine.offloaded.moe.layers, engine.layers, strict=True):
            handler = self._handler(own, self._ids[position[own.layer_idx]])
            moe_layer.experts.__dict__[HANDLER_ATTRIBUTE] = handler
        if predictions is not None:
            self._predictions = predictions.to(DEVICE)
            self._predicted = self._predictions[0].clone()
            for run in (engine._run, getattr(engine, "_device_run", engine._run)):
                run.prefetcher = _Replayed(run.prefetcher, engine, self._predicted, position)

    def _handler(self, own: Any, ids: Tensor) -> Callable[..., Tensor]:
        def handler(experts: nn.Module, hidden: Tensor, true: Tensor, weights: Tensor) -> Tensor:
            is_decode = len(hidden) == len(ids)
            return own(experts, hidden, ids if is_decode else true, weights)  # type: ignore[no-any-return]

        return handler

    def set_step(self, step: int) -> None:
        """Route the next decode step as the recording did."""
        self._ids.copy_(self._routes[step % len(self._routes)])
        if self._predictions is not None:
            self._predicted.copy_(self._predictions[step % len(self._predictions)])


class _Replayed(Prefetcher):
    """Computes the real prediction, then hands out the replayed one."""

    def __init__(
        self, inner: Any, engine: Engine, predicted: Tensor, position: dict[int, int]
    ) -> None:
        self._inner, self._predicted, self._position = inner, predicted, position

    def target_of(self, source_layer: int) -> int | None:
        return self._inner.target_of(source_layer)  # type: ignore[no-any-return]

    def predict(self, source_layer: int, **states: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = self._inner.predict(source_layer, **states)
        return logits, self._predicted[self._position[self.target_of(source_layer) or 0]]


def link_bandwidth(rows: Tensor) -> float:
    """GB/s of plain pinned copies of whole experts."""
    target = torch.empty_like(rows, device=DEVICE)
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(rows, non_blocking=True)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return rows.nbytes / seconds / 1e9


def time_graph(engine: GraphEngine, replay: Replay, batch: int, context: int, tokens: int) -> Any:
    """Milliseconds of each decode step, by device events."""
    graph = engine.graph_for(batch, context)
    graph.begin(torch.ones(batch, context - 10, dtype=torch.long, device=DEVICE))
    last = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    for step in range(WARM_UP_TOKENS):
        replay.set_step(step)
        graph.replay(last)
    engine.reset_stats()
    events = []
    for step in range(WARM_UP_TOKENS, WARM_UP_TOKENS + tokens):
        replay.set_step(step)
        if step % 8 == 0:  # stay at the context asked for
            graph.begin(torch.ones(batch, context - 10, dtype=torch.long, device=DEVICE))
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        last = graph.replay(last).argmax(-1)
        pair[1].record()
        events.append(pair)
        engine._count_step()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def profile(engine: GraphEngine, replay: Replay, path: Path) -> None:
    """Write a Chrome trace of a few tokens, and print which kernels a token takes."""
    graph = engine.graph_for(1, 1)
    graph.begin(torch.ones(1, graph.length - 10, dtype=torch.long, device=DEVICE))
    last = torch.zeros(1, dtype=torch.long, device=DEVICE)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for step in range(TIMELINE_TOKENS):
            replay.set_step(step + 40)
            graph.replay(last)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    kernels = [e for e in profiler.key_averages() if e.device_time_total > 0]
    print(f"kernels per token: {sum(e.count for e in kernels) / TIMELINE_TOKENS:.0f}")
    for e in sorted(kernels, key=lambda e: -e.device_time_total)[:22]:
        per_token = e.count / TIMELINE_TOKENS
        print(f"{e.device_time_total / e.count:8.1f} us x {per_token:6.1f} a token  {e.key[:90]}")


def time_eager(engine: Engine, replay: Replay, batch: int, context: int, tokens: int) -> Any:
    """Milliseconds of each decode step with a token read on the host, by the clock."""
    from transformers import StaticCache

    cache = StaticCache(config=engine.model.config, max_cache_len=context + 64)
    last = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    times = []
    for step in range(WARM_UP_TOKENS + tokens):
        if step == WARM_UP_TOKENS:
            engine.reset_stats()
        replay.set_step(step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = engine(input_ids=last, past_key_values=cache, use_cache=True).logits
        last = logits[:, -1].argmax(-1, keepdim=True)
        last.tolist()
        times.append(1e3 * (time.perf_counter() - start))
    return times[WARM_UP_TOKENS:]


def arms(slots: int, recalls: list[float]) -> Iterator[tuple[str, EngineConfig, float | None]]:
    """Name, configuration and predicted recall of each arm at one slot count."""
    share = f"{slots}%"
    if slots == 100:
        yield "resident", EngineConfig(expert_slots=share), None
        return
    yield "on-demand", EngineConfig(expert_slots=share), None
    for recall in recalls:
        name = "prefetch-perfect" if recall == 1 else f"prefetch-{recall:g}"
        yield name, EngineConfig(expert_slots=share, policy="prefetch"), recall
    yield "eager-lru", EngineConfig(expert_slots=share, decide_on="host"), None
    if slots == 25:
        yield "eager-no-cache", EngineConfig(expert_slots=share, cache="none"), None


def measure(
    offloaded: OffloadedModel, shape: str, args: argparse.Namespace, batch: int, slots: int
) -> Iterator[Cell]:
    """All arms of one shape, batch and slot count."""
    geometry = offloaded.moe.geometry
    routes = fit_routes(read_routes(args.routes), offloaded.moe, batch)
    bandwidth = link_bandwidth(offloaded.store.rows[0])
    for name, config, recall in arms(slots, args.recalls):
        predictions = (
            near_miss_predictions(routes, geometry.num_experts, recall) if recall else None
        )
        try:
            with Engine.open(offloaded, config) as engine:
                if slots == 100:
                    engine.fill_slots()
                replay = Replay(engine, routes, predictions)
                is_graph = isinstance(engine, GraphEngine)
                tokens = args.tokens if is_graph else min(args.tokens, EAGER_TOKENS)
                timer = time_graph if is_graph else time_eager
                times = sorted(timer(engine, replay, batch, args.context, tokens))
                stats = engine.stats()
                if args.timelines and is_graph and batch == 1 and slots in (25, 100):
                    args.timelines.mkdir(parents=True, exist_ok=True)
                    profile(engine, replay, args.timelines / f"{shape}-{slots}-{name}.json.gz")
                if is_graph and slots < 100:
                    engine.check_integrity()
        except torch.cuda.OutOfMemoryError:
            print(f"{shape} batch {batch} slots {slots} % {name}: does not fit this GPU")
            continue
        finally:
            torch.cuda.empty_cache()
        yield Cell(
            shape=shape,
            batch=batch,
            slots=slots,
            arm=name,
            tpot_ms_median=statistics.median(times),
            tpot_ms_p95=times[int(0.95 * (len(times) - 1))],
            bytes_per_token=stats.bytes_per_token,
            hit_rate=stats.hit_rate,
            link_gb_s=bandwidth,
            tokens=len(times),
        )


def main() -> None:
    """Run the shapes asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--routes", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--slots", nargs="+", type=int, default=[100, 10, 25, 40, 60])
    parser.add_argument("--recalls", nargs="+", type=float, default=[0.89, 1.0])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=112)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timelines", type=Path, help="folder for Chrome traces of a few tokens")
    args = parser.parse_args()
    cells: list[Cell] = []
    for shape in args.shapes:
        start = time.perf_counter()
        offloaded = build(shape)
        print(f"{shape}: built in {time.perf_counter() - start:.0f} s", flush=True)
        floors: dict[int, float] = {}
        for batch in args.batches:
            for slots in args.slots:
                for cell in measure(offloaded, shape, args, batch, slots):
                    cells.append(cell)
                    if cell.arm == "resident":
                        floors[batch] = cell.tpot_ms_median
                    print_row(cell, floors.get(batch))
                    if args.json:
                        write(args.json, cells)
        offloaded.store.close()
        del offloaded
        torch.cuda.empty_cache()


def print_row(cell: Cell, resident_ms: float | None) -> None:
    """One line of the table, beside the floor of doing compute and copies one after the other."""
    copy_ms = cell.bytes_per_token / cell.link_gb_s / 1e6
    serial = "" if resident_ms is None else f"  / serial floor {resident_ms + copy_ms:7.2f}"
    print(
        f"{cell.shape:14} b{cell.batch} {cell.slots:3} %  {cell.arm:18}"
        f" TPOT {cell.tpot_ms_median:8.2f} (p95 {cell.tpot_ms_p95:8.2f}) ms"
        f"  {cell.bytes_per_token / 1e6:7.0f} MB = {copy_ms:6.2f} ms copying{serial}"
        f"  hit {cell.hit_rate:.3f}",
        flush=True,
    )


def write(path: Path, cells: list[Cell]) -> None:
    """The result so far, as JSON."""
    content = {
        "device": torch.cuda.get_device_name(),
        "versions": package_versions() | {"cuda": torch.version.cuda},
        "weights": "random",
        "routing": "replayed",
        "rows": [asdict(cell) for cell in cells],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Microseconds of each decode kernel on a GPU, at the shapes of known models.

    python benchmarks/kernels_gpu.py [--tune] [--json FILE]

Each kernel runs many times in one CUDA graph, over weights larger than the second-level cache, as
in a decode step. Tensors are RANDOM. `--tune` also tries other tile sizes of the expert products.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.runtime.device.kernels import demand as demand_module
from foreroute.runtime.device.kernels import fetch as fetch_module
from foreroute.runtime.device.kernels import linear, predict, transposed
from foreroute.runtime.device.kernels import products as expert_module
from foreroute.runtime.device.kernels import route as route_module
from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.attention import decode_attention
from foreroute.runtime.device.kernels.cache import store_token
from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.fetch import fetch
from foreroute.runtime.device.kernels.head import plan_head
from foreroute.runtime.device.kernels.heads import ProjectedHeads, place_heads
from foreroute.runtime.device.kernels.linear import products
from foreroute.runtime.device.kernels.norm import Norm
from foreroute.runtime.device.kernels.plan import plan
from foreroute.runtime.device.kernels.predict import predict_logits, rank_experts
from foreroute.runtime.device.kernels.products import expert_products
from foreroute.runtime.device.kernels.rotary import rotate
from foreroute.runtime.device.kernels.route import DemandPlan, RouterProduct, route
from foreroute.runtime.device.kernels.tables import ResidencyTables
from foreroute.runtime.device.kernels.top_k import softmax_top_k
from foreroute.runtime.policies import find_policy
from foreroute.runtime.store.encodings import (
    EncodedParameter,
    EncodedWeights,
    Encoding,
    Int4,
    Int8,
    Lossless,
    Mxfp4,
)

DEVICE = torch.device("cuda")
CALLS, REPEATS = 48, 7
LRFU = find_policy("lrfu").device_rule()
CONTEXT = 768


@dataclass(frozen=True)
class Shape:
    """What the kernels of one model see."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    form: ExpertForm
    has_bias: bool = False
    encoding: type[Encoding] | None = None
    """How experts are stored, if in fewer bits."""


QWEN3 = Shape("qwen3-30b-a3b", 2048, 768, 128, 8, 32, 4, 128, ExpertForm(activation="silu"))
GPT_OSS = Shape(
    "gpt-oss-20b",
    2880,
    2880,
    32,
    4,
    64,
    8,
    64,
    ExpertForm(
        activation="clamped-swish", is_interleaved=True, is_transposed=True, alpha=1.702, limit=7.0
    ),
    has_bias=True,
)
MIXTRAL = Shape("mixtral-8x7b", 4096, 14336, 8, 2, 32, 8, 128, ExpertForm(activation="silu"))
QWEN3_INT8 = replace(QWEN3, name="qwen3-30b-a3b-int8", encoding=Int8)
QWEN3_INT4 = replace(QWEN3, name="qwen3-30b-a3b-int4", encoding=Int4)
QWEN3_LOSSLESS = replace(QWEN3, name="qwen3-30b-a3b-lossless", encoding=Lossless)
GPT_OSS_LOSSLESS = replace(GPT_OSS, name="gpt-oss-20b-lossless", encoding=Lossless)
GPT_OSS_MXFP4 = replace(GPT_OSS, name="gpt-oss-20b-mxfp4", encoding=Mxfp4)
SMALL = Shape("12x64 experts", 768, 384, 64, 8, 12, 4, 64, ExpertForm(activation="silu"))
"""The model that `end_to_end_gpu.py` trains: experts of 1.8 MB."""
SHAPES = (
    SMALL,
    QWEN3,
    GPT_OSS,
    MIXTRAL,
    QWEN3_LOSSLESS,
    QWEN3_INT8,
    QWEN3_INT4,
    GPT_OSS_LOSSLESS,
    GPT_OSS_MXFP4,
)


def microseconds(call: Callable[[int], object]) -> float:
    """Time per call, median of several replays of a graph of many; `call` is given its number."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal noise on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


class Experts:
    """Slots with enough random experts that none is in the cache when its turn comes."""

    def __init__(self, shape: Shape) -> None:
        """Allocate the slots."""
        self.shape = shape
        gated = 2 * shape.width if shape.form.has_gate else shape.width
        self.num_slots = max(shape.top_k * 3, shape.experts)
        self.bytes_per_call = 0
        self.weights = {
            "gate_up_proj": self._matrices(gated, shape.hidden),
            "down_proj": self._matrices(shape.hidden, shape.width),
        }
        if shape.has_bias:
            self.weights["gate_up_proj_bias"] = random(self.num_slots, gated)
            self.weights["down_proj_bias"] = random(self.num_slots, shape.hidden)
        self.hidden = random(1, shape.hidden)
        self.gates = torch.full((1, shape.top_k), 1 / shape.top_k, device=DEVICE)
        self.output = torch.empty_like(self.hidden)
        steps = torch.arange(CALLS * shape.top_k, device=DEVICE).view(CALLS, 1, shape.top_k)
        order = torch.arange(shape.top_k, device=DEVICE).expand(CALLS, 1, -1)
        self.places = torch.cat([steps % self.num_slots, order], dim=1).int()

    def _matrices(self, rows: int, columns: int) -> Any:
        """One parameter of all slots; adds what a call reads of it."""
        shape, is_transposed = self.shape, self.shape.form.is_transposed
        size = (columns, rows) if is_transposed else (rows, columns)
        if shape.encoding is None:
            self.bytes_per_call += 2 * rows * columns * shape.top_k
            return random(self.num_slots, *size)
        encoding = shape.encoding(rows, columns)
        parts = {
            suffix: torch.randint(1, 100, (self.num_slots, *part), device=DEVICE).to(dtype)
            for suffix, (part, dtype) in encoding.parts().items()
        }
        for slot in range(self.num_slots if shape.encoding is Lossless else 0):
            for suffix, part in encoding.encode(random(rows, columns) * 0.02).items():
                parts[suffix][slot] = part
        self.bytes_per_call += sum(part[0].nbytes for part in parts.values()) * shape.top_k
        return EncodedWeights(
            EncodedParameter(encoding, size, torch.bfloat16, is_transposed), parts
        )

    def run(self, i: int, demand: Demand | None = None) -> None:
        """One token's experts."""
        expert_products(
            self.hidden,
            self.places[i],
            self.gates,
            self.weights,
            self.shape.form,
            self.output,
            demand,
        )


def around_the_experts(shape: Shape) -> dict[str, float]:
    """Attention, cache, rotation, routing and planning."""
    q = random(1, 1, shape.heads * shape.head_dim).view(1, 1, shape.heads, -1).transpose(1, 2)
    k = random(1, shape.kv_heads, 1, shape.head_dim)
    keys = random(8, 1, shape.kv_heads, CONTEXT, shape.head_dim)
    values = random(8, 1, shape.kv_heads, CONTEXT, shape.head_dim)
    mask = torch.ones(1, 1, 1, CONTEXT, dtype=torch.bool, device=DEVICE)
    at = torch.tensor([CONTEXT - 1], device=DEVICE)
    cos, sin = random(2, 1, 1, shape.head_dim)
    logits = random(1, shape.experts)
    tables = ResidencyTables.empty(shape.experts, shape.experts, DEVICE)
    copies = no_copies(shape.top_k)
    for some in torch.arange(shape.experts, device=DEVICE).split(8):
        plan(some, tables, LRFU, no_copies(len(some)))
    ids = torch.arange(shape.top_k, device=DEVICE).view(1, -1)
    rows = torch.zeros(1, 1 << 20, dtype=torch.uint8, pin_memory=True)
    weight, bias = random(shape.experts, shape.hidden), torch.zeros(shape.experts, device=DEVICE)
    vectors, hidden = random(shape.experts, shape.hidden), random(1, shape.hidden)
    gates = torch.full((1, shape.top_k), 0.1, device=DEVICE)
    scores = torch.randn(1, shape.experts, device=DEVICE)
    table = torch.linspace(0, 1, 65, device=DEVICE)
    chances = torch.full((1, shape.top_k), 0.9, device=DEVICE)
    slots = torch.empty(1, 1 << 20, dtype=torch.uint8, device=DEVICE)
    return {
        "attention": microseconds(
            lambda i: decode_attention(q, keys[i % 8], values[i % 8], mask, scaling=0.1)
        ),
        "store key and value": microseconds(
            lambda i: store_token(k, k, keys[i % 8], values[i % 8], at)
        ),
        "rotary": microseconds(lambda i: rotate(q, k, cos, sin)),
        "softmax and top-k": microseconds(
            lambda i: softmax_top_k(logits, shape.top_k, renormalise=True)
        ),
        "plan, all resident": microseconds(lambda i: plan(ids, tables, LRFU, copies)),
        "predict logits, quasi-hidden": microseconds(
            lambda i: predict_logits(
                hidden,
                weight,
                bias,
                eps=1e-6,
                default_vectors=vectors,
                expert_ids=ids,
                gate_weights=gates,
            )
        ),
        "rank experts": microseconds(
            lambda i: rank_experts(
                scores, table[:1], table[1:2], table, top_k=shape.top_k, budget=shape.top_k
            )
        )
        if shape.experts > shape.top_k
        else 0.0,
        "plan a head, all resident": microseconds(
            lambda i: plan_head(
                ids,
                chances,
                tables,
                no_copies(1),
                num_needed=ids.numel(),
                head_words=copies[0, :1],
                num_words=1,
            )
        ),
        "fetch of nothing": microseconds(lambda i: fetch(rows, slots, copies, num_blocks=32)),
    }


def no_copies(count: int) -> Tensor:
    """Room for planned copies, none yet."""
    return torch.full((3, count), -1, dtype=torch.int32, device=DEVICE)


def projections(shape: Shape) -> dict[str, float]:
    """A layer's projections, by launches of their own, by one, and as TorchInductor writes them."""
    inner, count = shape.heads * shape.head_dim, 8
    into = [inner, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
    weights = [[random(rows, shape.hidden) for rows in into] for _ in range(count)]
    back = [random(shape.hidden, inner) for _ in range(count)]
    state, attended, norm = random(1, shape.hidden), random(1, inner), random(shape.hidden)
    folded = Norm(factor=norm, eps=1e-6)

    def project(x: Tensor, factor: Tensor, *matrices: Tensor) -> list[Tensor]:
        normed = torch.nn.functional.rms_norm(x, factor.shape, factor, 1e-6)
        return [torch.nn.functional.linear(normed, weight) for weight in matrices]

    def add(x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
        return x + torch.nn.functional.linear(y, matrix)

    found = {
        "norm and projections, apart": microseconds(
            lambda i: project(state, norm, *weights[i % count])
        ),
        "output projection and addition, apart": microseconds(
            lambda i: add(state, attended, back[i % count])
        ),
    }
    options: dict[str, Any] = {"coordinate_descent_tuning": True}
    compiled = [torch.compile(function, options=options) for function in (project, add)]
    found["norm and projections, torch.compile"] = microseconds(
        lambda i: compiled[0](state, norm, *weights[i % count])
    )
    found["output projection and addition, torch.compile"] = microseconds(
        lambda i: compiled[1](state, attended, back[i % count])
    )
    for tile, each in ((4096, 32), (8192, 32), (8192, 64), (16384, 64)):
        with tiles(linear, TILE=tile, PER_THREAD=each):
            label = f"one launch, tile {tile}, {each} a thread"
            found[f"norm and projections, {label}"] = microseconds(
                lambda i: products(state, weights[i % count], norm=folded)
            )
            found[f"output projection and addition, {label}"] = microseconds(
                lambda i: products(attended, [back[i % count]], residual=state)
            )
    return found


def routing(shape: Shape) -> dict[str, float]:
    """Norm, router, top-k and plan: by launches of their own, and by one; everything resident."""
    count, rule = 8, LRFU
    routers = [
        RouterProduct(
            weight=random(shape.experts, shape.hidden),
            bias=None,
            top_k=shape.top_k,
            renormalise=True,
            dtype=torch.bfloat16,
            arrivals=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )
        for _ in range(count)
    ]
    state, norm = random(1, shape.hidden), Norm(factor=random(shape.hidden), eps=1e-6)
    tables = ResidencyTables.empty(shape.experts, shape.experts, DEVICE)
    for some in torch.arange(shape.experts, device=DEVICE).split(8):
        plan(some, tables, rule, no_copies(len(some)))
    copies = no_copies(shape.top_k)
    places = torch.zeros(2, shape.top_k, dtype=torch.int32, device=DEVICE)
    demand = DemandPlan(tables=tables, rule=rule, copies=copies, places=places)

    def apart(i: int) -> None:
        normed = torch.nn.functional.rms_norm(state, norm.factor.shape, norm.factor, norm.eps)
        logits = torch.nn.functional.linear(normed, routers[i % count].weight)
        _, ids = softmax_top_k(logits, shape.top_k, renormalise=True)
        plan(ids, tables, rule, copies, places=places)

    found = {"norm, router, top-k and plan, apart": microseconds(apart)}
    for rows, warps in ((1, 4), (2, 4), (1, 8), (2, 8)):
        with tiles(route_module, ROWS=rows, NORM_WARPS=warps):
            label = f"one launch, {rows} rows, {warps} warps"
            found[f"norm, router and top-k, {label}"] = microseconds(
                lambda i: route(state, routers[i % count], norm)
            )
            found[f"norm, router, top-k and plan, {label}"] = microseconds(
                lambda i: route(state, routers[i % count], norm, demand)
            )
    dim = shape.head_dim
    heads = ProjectedHeads(
        states=random(1, (shape.heads + 2 * shape.kv_heads) * dim),
        starts=(0, shape.heads * dim, (shape.heads + shape.kv_heads) * dim),
        query_heads=shape.heads,
        key_heads=shape.kv_heads,
        query_norm=Norm(factor=random(dim), eps=1e-6),
        key_norm=Norm(factor=random(dim), eps=1e-6),
        cos=random(1, 1, dim),
        sin=random(1, 1, dim),
    )
    keys, values = random(2, 1, shape.kv_heads, CONTEXT, dim)
    at = torch.tensor([CONTEXT - 1], device=DEVICE)
    found["head norms, rotary and cache write, one launch"] = microseconds(
        lambda i: place_heads(heads, keys, values, at)
    )
    return found


def while_copying(shape: Shape) -> dict[str, float]:
    """The products where some of a token's experts are missing: copied by the first launch.

    Beside them the same work one after the other: a launch that copies, then the products.
    """
    experts = Experts(shape)
    sizes = [weight[0].nbytes for weight in experts.weights.values()]
    rows = torch.zeros(8, sum(sizes), dtype=torch.uint8, pin_memory=True)
    slots = torch.empty(experts.num_slots, sum(sizes), dtype=torch.uint8, device=DEVICE)
    first, second = slots.split(sizes, dim=1)
    experts.weights = {
        "gate_up_proj": first.view(torch.bfloat16).unflatten(1, (-1, shape.hidden)),
        "down_proj": second.view(torch.bfloat16).unflatten(1, (-1, shape.width)),
    }
    arrived = torch.zeros(experts.num_slots, dtype=torch.int32, device=DEVICE)
    progress = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    middle = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    every = experts.places.clone()
    found = {}
    for missing in (0, 1, 3):
        copies = torch.full((CALLS, 3, shape.top_k), -1, dtype=torch.int32, device=DEVICE)
        copies[:, 0, :missing] = torch.arange(missing, dtype=torch.int32, device=DEVICE)
        copies[:, 1] = every[:, 0]
        copies[:, 2] = 0
        late = every.clone()
        late[:, 0, :missing] = -1 - every[:, 0, :missing]
        late[:, 1] = every[:, 1].roll(-missing, 1)

        def together(i: int) -> None:
            arrived.zero_()
            moved = (rows, slots, copies[i], middle, arrived, progress)  # noqa: B023
            experts.run(i, Demand(*moved, first_bytes=sizes[0]))

        def in_turn(i: int) -> None:
            arrived.zero_()
            fetch(rows, slots, copies[i], num_blocks=32)  # noqa: B023
            experts.run(i)

        name = f"{missing} of {shape.top_k} experts missing"
        experts.places = every
        found[f"{name}: copied by a launch of its own"] = microseconds(in_turn)
        found[f"{name}: by the first product, which does not wait"] = microseconds(together)
        experts.places = late
        sizes_tried = ((32, 1024), (64, 512), (64, 1024), (64, 2048), (128, 512), (128, 1024))
        for programs, words in sizes_tried:
            with tiles(demand_module, DEMAND_PROGRAMS=programs, BLOCK_WORDS=words):
                label = f"{programs} programs of {words} words"
                found[f"{name}: by the first product, {label}"] = microseconds(together)
    found["bytes of an expert at 55 GB/s"] = sum(sizes) / 55e3
    return found


@contextlib.contextmanager
def tiles(module: Any, **values: int) -> Iterator[None]:
    """Give a module's constants other values for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    yield
    for name, value in before.items():
        setattr(module, name, value)


def fetch_bandwidth(expert_bytes: int) -> dict[str, float]:
    """GB/s of the fetch kernel for one, two and four experts, by blocks per expert and tile."""
    size = expert_bytes // 8 * 8
    rows = torch.zeros(16, size, dtype=torch.uint8, pin_memory=True)
    slots = torch.empty(16, rows.shape[1], dtype=torch.uint8, device=DEVICE)
    found = {}
    for count, blocks in itertools.product((1, 2, 4), (8, 16, 32, 64)):
        copies = torch.arange(count, dtype=torch.int32, device=DEVICE).repeat(3, 1)
        us = microseconds(lambda i: fetch(rows, slots, copies, num_blocks=blocks))  # noqa: B023
        found[f"fetch {count} experts, {blocks} blocks each: GB/s"] = (
            count * rows.shape[1] / us / 1e3
        )
    copies = torch.arange(2, dtype=torch.int32, device=DEVICE).repeat(3, 1)
    for words in (256, 512, 2048, 4096):
        with tiles(fetch_module, BLOCK_WORDS=words):
            us = microseconds(lambda i: fetch(rows, slots, copies, num_blocks=32))
        found[f"fetch 2 experts, tiles of {words} words: GB/s"] = 2 * rows.shape[1] / us / 1e3
    us = microseconds(lambda i: slots[:2].copy_(rows[:2], non_blocking=True))
    found["copy engine, 2 experts: GB/s"] = 2 * rows.shape[1] / us / 1e3
    return found


def tune(experts: Experts) -> dict[str, float]:
    """Time of the products with other tiles."""
    found = {}
    names: tuple[str, ...]
    sizes: list[tuple[int, ...]]
    module: Any
    if experts.shape.form.is_transposed and experts.shape.encoding is None:
        names = ("OUTPUTS", "DEPTH", "WARPS")
        module = transposed
        sizes = [(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8), (32, 128, 4), (32, 256, 8)]
    else:
        names = ("ROWS", "COLUMNS", "WARPS")
        module = expert_module
        sizes = [(1, 1024, 2), (1, 2048, 2), (1, 2048, 4), (2, 1024, 4), (2, 2048, 4), (4, 1024, 4)]
    halves: tuple[str, ...] = ("UP", "DOWN")
    if experts.shape.encoding is Lossless:
        halves = ("PACKED_UP", "PACKED_DOWN")
        sizes = [(r, c, w) for r in (1, 2, 4, 8, 16) for c in (32, 128, 256) for w in (1, 2, 4)]
        sizes = [(r, c, w) for r, c, w in sizes if 2 <= r * c / (32 * w) <= 32]
    elif experts.shape.encoding is Mxfp4:
        names, halves = (*names, "UNROLL"), ("FLOAT4_UP", "FLOAT4_DOWN")
        words = ((32, 1), (64, 2), (128, 4))
        sizes = [(r, *w, unroll) for r in (1, 2, 4) for w in words for unroll in (1, 3, 12)]
    elif experts.shape.encoding is not None:
        halves = ("FEW",)
        sizes = [(1, 1024, 2), (2, 512, 2), (4, 256, 2), (4, 512, 4), (8, 256, 4), (8, 512, 4)]
        sizes += [(8, 128, 2), (16, 128, 4)]
    for half, size in itertools.product(halves, sizes):
        with tiles(module, **{f"{half}_{n}": v for n, v in zip(names, size, strict=True)}):
            found[f"products with {half.lower()} tile {size}"] = microseconds(experts.run)
    return found


def tune_predictions(shape: Shape) -> dict[str, float]:
    """Time of a prediction's logits with other tiles."""
    found = {}
    bias = torch.zeros(shape.experts, device=DEVICE)
    vectors, hidden = random(shape.experts, shape.hidden), random(1, shape.hidden)
    weights = random(16, shape.experts, shape.hidden)  # more than stays in the cache near a core
    ids = torch.arange(shape.top_k, device=DEVICE).view(1, -1)
    gates = torch.full((1, shape.top_k), 0.1, device=DEVICE)
    routed = {"default_vectors": vectors, "expert_ids": ids, "gate_weights": gates}
    for rows, columns, warps in itertools.product((1, 2, 4), (512, 1024, 2048), (2, 4, 8)):
        with tiles(predict, ROWS=rows, COLUMNS=columns, WARPS=warps):
            found[f"logits with tile {(rows, columns, warps)}"] = microseconds(
                lambda i: predict_logits(hidden, weights[i % 16], bias, eps=1e-6, **routed)
            )
    return found


def main() -> None:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        if shape.name not in args.shapes:
            continue
        experts = Experts(shape)
        found = {} if shape.encoding else around_the_experts(shape)
        found["expert products"] = us = microseconds(experts.run)
        found["expert products: GB/s of weights"] = experts.bytes_per_call / us / 1e3
        if args.tune:
            found |= tune(experts)
        if args.tune and not shape.encoding:
            found |= tune_predictions(shape)
        del experts
        torch.cuda.empty_cache()
        if not shape.encoding:
            found |= routing(shape) | projections(shape)
        if shape in (QWEN3, SMALL):
            found |= while_copying(shape)
        if shape is QWEN3:
            found |= fetch_bandwidth(6 * shape.hidden * shape.width)
        results[shape.name] = found
        print(shape.name)
        for name, value in found.items():
            print(f"  {name:50} {value:9.1f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

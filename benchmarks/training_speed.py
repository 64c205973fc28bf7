"""How fast all layers train together, and what one token's prediction costs.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --device cuda --layers 48 --tokens 200000 --hidden 2048 \
        --experts 128 --top-k 8 --batch-size 4096

States and routing are synthetic: random numbers of the given shape, so recall means nothing here.
The floor is the same arithmetic in one plain loop of matrix multiplications over the same tokens:
forward and backward products, layer by layer, nothing else (with those of the ridge start). Wall
time and the process's own CPU time are both kept: on a busy machine only the latter compares.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foreroute.estimators import (
    EstimatorSpec,
    EstimatorStack,
    LayerAnchors,
    MoEGeometry,
    SourceState,
    predictable_layers,
)
from foreroute.estimators.artifacts import package_versions, write_json
from foreroute.export.compare.prediction_time import captured_us, eager_us, layer_by_layer_us
from foreroute.train.datamodule import BatchStream
from foreroute.train.fit import train_stack
from foreroute.train.prepared import PreparedBatch, PreparedShards
from foreroute.train.quiet import quieten_lightning
from foreroute.train.ridge import has_ridge_start
from foreroute.train.run import FitConfig
from foreroute.train.shards import RoutingBatch

SHARD_TOKENS = 8192


class SyntheticShards:
    """Random states and routing, made anew and equal at every reading, as `PairedShards` reads."""

    def __init__(
        self, geometry: MoEGeometry, num_pairs: int, tokens: int, device: torch.device
    ) -> None:
        """Tokens of P pairs.

        Args:
            geometry: Gives E, K and D.
            num_pairs: P.
            tokens: How many, all shards together.
            device: Where they are made.
        """
        self.rows: dict[int, slice] = {}
        for start in range(0, tokens, SHARD_TOKENS):
            self.rows[len(self.rows)] = slice(0, min(SHARD_TOKENS, tokens - start))
        self.geometry, self.num_pairs, self.device = geometry, num_pairs, device
        self.num_tokens = tokens

    def read(self, shard_idx: int) -> RoutingBatch:
        """One shard: bfloat16 states, routing that follows from other random numbers."""
        geometry, tokens = self.geometry, self.rows[shard_idx].stop
        generator = torch.Generator(self.device).manual_seed(shard_idx)
        make: dict[str, Any] = {"generator": generator, "device": self.device}
        residual = torch.randn(
            self.num_pairs, tokens, geometry.hidden_size, dtype=torch.bfloat16, **make
        )
        logits = torch.randn(self.num_pairs, tokens, geometry.num_experts, **make)
        weights, ids = logits.softmax(dim=-1).topk(geometry.top_k)
        return RoutingBatch(
            source=SourceState(
                residual=residual, expert_ids=ids.roll(1, dims=1), gate_weights=weights
            ),
            target_logits=logits,
            target_ids=ids,
            target_gate_weights=weights,
            previous_ids=ids,
        )


class NoShards:
    """No tokens."""

    rows: ClassVar[dict[int, slice]] = {}

    def read(self, shard_idx: int) -> PreparedBatch:
        """Never asked for."""
        raise KeyError(shard_idx)


def synthetic_stack(options: argparse.Namespace, form: str) -> EstimatorStack:
    """A fresh stack with random anchors of the shape asked for."""
    layers, experts, hidden = options.layers, options.experts, options.hidden
    geometry = MoEGeometry(
        model_type="synthetic",
        layer_indices=tuple(range(layers)),
        num_experts=experts,
        top_k=options.top_k,
        hidden_size=hidden,
        router_fingerprint="",
        gate_family="softmax-topk-renorm",
    )
    torch.manual_seed(0)
    anchors = LayerAnchors(
        router_weight=torch.randn(layers, experts, hidden) / hidden**0.5,
        router_bias=torch.zeros(layers, experts),
        norm_weight=torch.ones(layers, hidden),
        norm_bias=torch.zeros(layers, hidden),
        norm_kind="rms",
        norm_eps=1e-6,
    )
    spec = EstimatorSpec(form=form, target_layers=predictable_layers(geometry, 1))
    vectors = torch.randn(layers, experts, hidden)
    return EstimatorStack.build(geometry, spec, anchors, vectors).to(options.device)


def fit(stack: EstimatorStack, shards: PreparedShards, options: argparse.Namespace) -> None:
    """One fit of all pairs over tokens that are prepared already."""
    config = FitConfig(
        epochs=options.epochs, batch_size=options.batch_size, loss=options.loss, init=options.init
    )
    with tempfile.TemporaryDirectory() as folder:
        train_stack(stack, shards, NoShards(), config, Path(folder), show_progress=False)


def multiply(stack: EstimatorStack, shards: PreparedShards, options: argparse.Namespace) -> None:
    """The same matrix products of the same tokens, in a plain loop over layers."""
    weights = [p.detach() for p in stack.form.parameters() if p.dim() == 3 and p.shape[1] > 1]
    num_pairs = len(stack.target_layers)
    for _ in range(options.epochs):
        for batch in BatchStream(shards, options.batch_size):
            for pair in range(num_pairs):
                own = [weight[pair % len(weight)] for weight in weights]
                multiply_all(batch.features[pair].float(), own)
    if options.init == "ridge" and has_ridge_start(stack):
        for batch in BatchStream(shards, options.batch_size):
            for pair in range(num_pairs):
                features = batch.features[pair].float()
                _ = features.T @ features, features.T @ batch.target_logits[pair]


def multiply_all(features: Tensor, weights: list[Tensor]) -> None:
    """Forward and backward products of one layer and one batch; the input needs no gradient."""
    states = [features]
    for weight in weights:
        states.append(states[-1] @ weight)
    gradient = states[-1]
    for i in reversed(range(len(weights))):
        _ = states[i].T @ gradient
        if i:
            gradient = gradient @ weights[i].T


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


class Seconds(NamedTuple):
    """How long some work took."""

    wall: float
    """By the clock; what else runs on the machine counts."""
    cpu: float
    """This process's own, all threads together."""


def timed(work: Callable[[], object], device: str) -> Seconds:
    """Do some work and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def measure(options: argparse.Namespace, form: str) -> dict[str, Any]:
    """One row: preparing, training, the floor, and prediction."""
    stack = synthetic_stack(options, form)
    source = SyntheticShards(
        stack.geometry, len(stack.target_layers), options.tokens, torch.device(options.device)
    )
    shards = PreparedShards(stack, source, seed=0)
    prepared = timed(lambda: [shards.read(i) for i in shards.rows], options.device)
    works = (
        lambda: fit(stack.requires_grad_(True), shards, options),
        lambda: multiply(stack, shards, options),
    )
    rounds = [[timed(work, options.device) for work in works] for _ in range(options.rounds)]
    (train_s, train_cpu_s), (products_s, products_cpu_s) = (
        Seconds(*map(min, zip(*times, strict=True))) for times in zip(*rounds, strict=True)
    )
    stack.eval().requires_grad_(False)
    row = {
        "form": form,
        "prepare_s": round(prepared.wall, 2),
        "train_s": round(train_s, 2),
        "products_s": round(products_s, 2),
        "ratio": round(train_s / products_s, 2),
        "train_cpu_s": round(train_cpu_s, 2),
        "products_cpu_s": round(products_cpu_s, 2),
        "cpu_ratio": round(train_cpu_s / products_cpu_s, 2),
        "params": sum(p.numel() for p in stack.form.parameters()),
        "eager_us": round(eager_us(stack), 1),
        "by_layer_us": round(layer_by_layer_us(stack), 1),
    }
    if options.device == "cuda":
        row["graph_us"] = round(captured_us(stack), 1)
        row["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return row


def parse_options() -> argparse.Namespace:
    """What the user asks for; the defaults are the bundled model's shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=FitConfig.batch_size)
    parser.add_argument("--loss", default=FitConfig.loss)
    parser.add_argument("--init", default=FitConfig.init)
    parser.add_argument("--forms", nargs="*", default=["low-rank", "mlp"])
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print one table, write the results if asked to."""
    options = parse_options()
    quieten_lightning()
    warnings.filterwarnings("ignore")
    rows = [measure(options, form) for form in options.forms]
    shape = (
        f"synthetic: {options.layers} layers, {options.tokens:,} tokens, hidden {options.hidden}, "
        f"{options.experts} experts, {options.epochs} epochs, loss {options.loss}, {options.device}"
    )
    table = Table(title=shape, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:,}" if name != "form" else value for name, value in row.items()))
    Console().print(table)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        write_json(
            options.json,
            {"what": "synthetic states", "settings": settings, "versions": package_versions()}
            | {"threads": torch.get_num_threads(), "rows": rows},
        )
        print(options.json)


if __name__ == "__main__":
    main()

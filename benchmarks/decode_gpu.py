"""Decode on one GPU at the shapes of known models: what each way of loading experts costs.

    python benchmarks/decode_gpu.py --routes qwen3-30b-a3b.route.csv --json decode_gpu.json

Weights are RANDOM and routing is REPLAYED from a recorded route file; predictions of a given recall
are those of the simulator's predictor (the recorded truth, wrong guesses drawn from the layer's
popularity, calibrated confidence). A prediction's own arithmetic runs all the same. Every graph's
logits are compared bit for bit with the all-resident graph's, and a layer with transformers' own
experts. A link that others use is now and then slower for seconds: `--repeats` opens every engine
of a cell anew so many times, in turns, and compares each with what was on demand in its turn.

Rows are written after every cell. `--tiny` runs the whole script on a CPU, with small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from accelerate_offload import experts_offloaded
from decode_profile import print_summary, profile_steps
from decode_steps import DecodeSteps, EagerSteps, GraphSteps, tokens_within
from link import link_bandwidth, synchronize
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
from replayed_routing import (
    Replay,
    ReplayedPredictions,
    fit_routes,
    near_miss_predictions,
    random_routes,
    read_steps,
)
from torch import Tensor

from foreroute.data.adapters import ExpertsView, stock_experts_function
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.device.decode_graph import DecodeStep
from foreroute.runtime.device.driver import DeviceDriver, why_not_on_device
from foreroute.runtime.policies.slots import parse_slots
from foreroute.runtime.store.offload import OffloadedModel
from foreroute.runtime.store.pinning import Pins

NO_CACHE_WARM_UP_TOKENS = 4
EAGER_TOKENS = 16
ACCELERATE_TOKENS = 2
TIMELINE_TOKENS = 3
PREDICTING = "resident-predicting"
"""All resident, and every prediction made for nothing: what predicting costs a step."""
APART = "resident-apart"
"""All resident, every module by launches of its own: what joining them saves and changes."""
PINNED_SHARES = (0.75, 0.5)
EAGER_SLOTS = 25
"""Per cent; host-driven arms for several sequences and profiled arms run at this one alone."""


@dataclass(frozen=True)
class Cell:
    """One row of the result."""

    shape: str
    batch: int
    slots: int
    """Per cent of the experts resident."""
    arm: str
    tpot_ms_median: float
    tpot_ms_mean: float
    tpot_ms_p95: float
    bytes_per_token: float
    """Over the link, per decode step (all sequences of the batch together)."""
    prefetched_bytes_per_token: float
    wasted_bytes_per_token: float
    hit_rate: float
    link_gb_s: float
    resident_floor_ms: float | None
    """All-resident TPOT of this shape and batch."""
    copy_floor_ms: float
    """Bytes per token over the measured link."""
    is_bit_equal: bool | None
    """Whether the logits were the all-resident graph's; None where that is not claimed."""
    tokens: int
    warm_up_tokens: int
    repeat: int
    """The turn, 0 or more."""


@dataclass(frozen=True)
class Arm:
    """One way to load experts."""

    name: str
    config: EngineConfig
    recall: float | None = None
    """Of the replayed predictions."""
    has_cache: bool = True
    pinned: float = 1.0
    """Share of each layer's experts, those used most, that count as page-locked; the host hands out
    the others."""


def arms_at(slots: int, batch: int, recalls: list[float]) -> Iterator[Arm]:
    """All arms of an engine at one share of slots."""
    share = f"{slots}%"
    if slots == 100:
        yield Arm("resident", EngineConfig(expert_slots=share))
        yield Arm(APART, EngineConfig(expert_slots=share))
        if batch == 1:
            yield Arm(PREDICTING, EngineConfig(expert_slots=share, prefetch="auto"), recall=1.0)
        return
    yield Arm("on-demand", EngineConfig(expert_slots=share))
    if slots == EAGER_SLOTS and batch == 1:
        for pinned in PINNED_SHARES:
            config = EngineConfig(expert_slots=share)
            yield Arm(f"on-demand-pinned-{pinned:.0%}", config, pinned=pinned)
    for recall in recalls:
        name = "prefetch-perfect" if recall == 1 else f"prefetch-{recall:g}"
        config = EngineConfig(expert_slots=share, prefetch="auto")
        yield Arm(name, config, recall)
        if slots == EAGER_SLOTS and batch == 1:
            yield Arm(f"{name}-all", replace(config, prefetch="all"), recall)
    if slots == EAGER_SLOTS or batch == 1:
        host_lru = EngineConfig(expert_slots=share, decide_on="host", eviction="lru")
        yield Arm("eager-lru", host_lru)
    if slots == EAGER_SLOTS:
        no_cache = EngineConfig(expert_slots=share, cache="none")
        yield Arm("eager-no-cache", no_cache, has_cache=False)


def _pins(routes: Tensor, num_experts: int, share: float) -> Pins:
    """As a system that locks no more than a share of each layer's experts would leave them.

    All memory is locked in truth; the host copies those that do not count as it would any other.
    """
    if share == 1:
        return Pins()
    are_pinned = []
    for layer in range(routes.shape[1]):
        uses = torch.bincount(routes[:, layer].flatten(), minlength=num_experts)
        mask = torch.zeros(num_experts, dtype=torch.bool)
        mask[uses.sort(descending=True, stable=True).indices[: int(share * num_experts)]] = True
        are_pinned.append(mask)
    return Pins(are_pinned=are_pinned, budget=0)


def difference_from_stock(engine: Engine, num_tokens: int) -> float:
    """How far the first layer's output lies from transformers' own eager experts, relatively.

    Args:
        engine: Open, with enough slots for the tokens.
        num_tokens: Tokens, of random router inputs and random experts.
    """
    own, moe_layer = engine.driver.layers[0], engine.offloaded.moe.layers[0]
    geometry, store = engine.geometry, engine.offloaded.store
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(num_tokens, geometry.num_experts, generator=generator)
    ids = noise.topk(geometry.top_k, dim=-1).indices.to(engine.device)
    hidden = torch.randn(num_tokens, geometry.hidden_size, generator=generator)
    hidden = hidden.to(engine.device, torch.bfloat16)
    weights = torch.full(ids.shape, 1 / geometry.top_k, device=engine.device, dtype=hidden.dtype)
    engine.driver.run.is_prefill = False
    got = own(moe_layer.experts, hidden, ids, weights).float()
    rows = store.rows[0].to(engine.device)
    view = ExpertsView(moe_layer.experts, store.layouts[0].weights(rows))
    stock = stock_experts_function("batched_mm", moe_layer.experts)
    expected = stock(view, hidden, ids, weights).float()  # type: ignore[arg-type]
    return float((got - expected).abs().max() / expected.abs().max())


class ShapeBenchmark:
    """All cells of one shape."""

    def __init__(
        self, args: argparse.Namespace, results: PartialResults, shape: str, pool: HostPool
    ) -> None:
        """Build the model.

        Args:
            args: The command line.
            results: Where rows go.
            shape: Which.
            pool: Where experts lie.
        """
        self.args, self.results, self.pool = args, results, pool
        self.label = label_of(shape, layers=args.layers, is_tiny=args.tiny)
        settings = settings_of(shape, layers=args.layers, is_tiny=args.tiny)
        with results.phase(f"{self.label}: build"):
            self.offloaded: OffloadedModel = build(settings, self.label, pool, args.device)
        geometry = self.offloaded.moe.geometry
        self.device = self.offloaded.device
        self.link_gb_s = link_bandwidth(self.offloaded.store.rows[0], self.device)
        self.recorded = (
            read_steps(args.routes)
            if args.routes
            else random_routes(96, geometry.num_layers, geometry.num_experts, geometry.top_k)
        )
        self._routes: dict[int, Tensor] = {}
        self._predictions: dict[tuple[int, float], ReplayedPredictions] = {}
        self._num_tokens: dict[tuple[int, int], int] = {}
        self._resident_ms: dict[int, float] = {}
        self._resident_logits: dict[int, Tensor] = {}
        self._first_logits: dict[int, Tensor] = {}

    def run(self) -> None:
        """Every cell that is asked for and that time allows."""
        args, results = self.args, self.results
        for batch in args.batches:
            for slots in args.slots:
                if reason := self._why_not(slots):
                    results.skip(f"{self.label} batch {batch} slots {slots} %", reason)
                    continue
                for repeat in range(args.repeats):
                    self._measure_arms(batch, slots, repeat)
                self._compare_turns(batch, slots)
        name = f"{self.label} batch 1 accelerate"
        if self.offloaded.store.layouts[0].encoded:
            results.skip(name, "accelerate moves whole modules, which hold no encoded experts")
            return
        if self._is_wanted("accelerate") and not results.skip_if_spent(name):
            with results.phase(f"{self.label}: accelerate"), results.cell(name):
                self._measure_accelerate()

    def _measure_arms(self, batch: int, slots: int, repeat: int) -> None:
        for arm in arms_at(slots, batch, self.args.recalls):
            name = f"{self.label} batch {batch} slots {slots} % {arm.name}"
            if not self._is_wanted(arm.name) or self.results.skip_if_spent(name):
                continue
            with self.results.phase(f"{self.label}: {arm.name}"), self.results.cell(name):
                self._measure(arm, batch, slots, repeat)
            free_memory()

    def _compare_turns(self, batch: int, slots: int) -> None:
        """Each arm's mean times over those on demand in the same turn, where there are several."""
        cell = {"shape": self.label, "batch": batch, "slots": slots}
        rows = [r for r in self.results.content["rows"] if cell.items() <= r.items()]
        on_demand = {r["repeat"]: r["tpot_ms_mean"] for r in rows if r["arm"] == "on-demand"}
        if len(on_demand) < 2:
            return
        for arm in dict.fromkeys(r["arm"] for r in rows):
            own = {r["repeat"]: r["tpot_ms_mean"] for r in rows if r["arm"] == arm}
            ratios = sorted(round(own[k] / on_demand[k], 4) for k in own.keys() & on_demand.keys())
            if not ratios:
                continue
            median = statistics.median(ratios)
            turns = self.results.content.setdefault("means_x_on_demand", [])
            turns.append(cell | {"arm": arm, "median": median, "turns": ratios})
            print(
                f"{self.label[:12]} b{batch} {slots:3} % {arm:22} x on demand: median {median:.3f}"
                f" of {len(ratios)} turns, {ratios[0]:.3f} to {ratios[-1]:.3f}",
                flush=True,
            )
        self.results.write()

    def profile(self) -> None:
        """Trace a few tokens all resident, and of each arm at 25 %; batch 1."""
        share = EAGER_SLOTS
        for arm in [*arms_at(100, 1, []), *arms_at(share, 1, self.args.recalls)]:
            name = f"{self.label} {arm.config.expert_slots} {arm.name}"
            left_out = ("eager-*", "*-all", "*-pinned-*", PREDICTING)
            is_left_out = any(fnmatch(arm.name, pattern) for pattern in left_out)
            if is_left_out or not self._is_wanted(arm.name):
                continue
            if self.results.skip_if_spent(f"profile of {name}"):
                continue
            with self.results.phase("profiles"), self.results.cell(f"profile of {name}"):
                self._profile(arm, name)
            free_memory()

    def _profile(self, arm: Arm, name: str) -> None:
        with self._opened(arm, 1) as (engine, replay):
            steps = self._steps(engine, 1)
            steps.run(replay, self.args.warm_up)
            file = re.sub(r"[^\w.]+", "-", name) + ".json.gz"
            found = profile_steps(steps, replay, self.args.timelines / file, TIMELINE_TOKENS)
        print_summary(name, found)
        profiles = self.results.content.setdefault("profiles", [])
        profiles.append({"arm": name, "chrome_trace": file, **found})
        self.results.write()

    @contextlib.contextmanager
    def _opened(self, arm: Arm, batch: int) -> Iterator[tuple[Engine, Replay]]:
        """An engine of that arm, its routing replayed."""
        DecodeStep.defers = arm.name != APART
        routes = self._routes_of(batch)
        num_experts = self.offloaded.moe.geometry.num_experts
        predictions = self._predictions_of(batch, arm.recall) if arm.recall else None
        self.offloaded.store.pins = _pins(routes, num_experts, arm.pinned)
        with Engine(self.offloaded, arm.config) as engine:
            self._require_graph(engine, arm)
            if arm.name.startswith("resident"):
                engine.fill_slots()
            if arm.name == "resident":
                with self.results.cell(f"{self.label} batch {batch}, against stock experts"):
                    self._check_against_stock(engine, batch)
            yield engine, Replay(engine, routes, predictions)
        DecodeStep.defers = True

    def _routes_of(self, batch: int) -> Tensor:
        if batch not in self._routes:
            self._routes[batch] = fit_routes(self.recorded, self.offloaded.moe, batch)
        return self._routes[batch]

    def _predictions_of(self, batch: int, recall: float) -> ReplayedPredictions:
        if (batch, recall) not in self._predictions:
            num_experts = self.offloaded.moe.geometry.num_experts
            made = near_miss_predictions(self._routes_of(batch), num_experts, recall)
            self._predictions[batch, recall] = made
        return self._predictions[batch, recall]

    def _require_graph(self, engine: Engine, arm: Arm) -> None:
        is_meant = self.device.type == "cuda" and not arm.name.startswith("eager")
        if is_meant and not isinstance(engine.driver, DeviceDriver):
            reason = why_not_on_device(self.offloaded, arm.config)
            raise RuntimeError(f"The engine is driven by the host: {reason}.")

    def _is_wanted(self, arm: str) -> bool:
        return any(fnmatch(arm, pattern) for pattern in self.args.arms)

    def _why_not(self, slots: int) -> str | None:
        geometry = self.offloaded.moe.geometry
        try:
            parse_slots(f"{slots}%", num_experts=geometry.num_experts, top_k=geometry.top_k)
        except ValueError as error:
            return str(error)
        return None

    def _measure(self, arm: Arm, batch: int, slots: int, repeat: int) -> None:
        with self._opened(arm, batch) as (engine, replay):
            steps = self._steps(engine, batch)
            is_graph = isinstance(steps, GraphSteps)
            if arm.name == PREDICTING and is_graph:
                steps.keep_looking_ahead()
            warm_up = self.args.warm_up if arm.has_cache else NO_CACHE_WARM_UP_TOKENS
            first = steps.run(replay, 1)  # compiles what is not compiled yet
            assert first is not None
            logits, ms_per_token = self._warm_up(steps, replay, warm_up)
            engine.reset_stats()
            most = self.args.tokens if is_graph else min(self.args.tokens, EAGER_TOKENS)
            num_tokens = tokens_within(self.args.cell_seconds, ms_per_token, most)
            if is_graph:  # arms of one cell are compared over the same tokens
                num_tokens = self._num_tokens.setdefault((batch, slots), num_tokens)
            times = steps.time(replay, warm_up, num_tokens)
            stats = engine.stats()
            if arm.name == "resident":
                self._resident_ms[batch] = statistics.median(times)
                self._resident_logits[batch] = logits
                self._first_logits[batch] = first
            elif arm.name == APART:
                self._compare_apart(first, batch)
            elif isinstance(engine.driver, DeviceDriver):
                for layer in (engine.driver.layers[0], engine.driver.layers[-1]):
                    layer.residency.check_integrity()
        self._add(
            arm.name,
            batch,
            slots,
            times,
            repeat=repeat,
            warm_up_tokens=warm_up,
            bytes_per_token=stats.bytes_per_token,
            prefetched_bytes_per_token=stats.decode.prefetched_bytes / num_tokens,
            wasted_bytes_per_token=stats.wasted_bytes_per_token,
            hit_rate=stats.hit_rate,
            is_bit_equal=self._is_bit_equal(batch, logits)
            if is_graph and arm.name != APART
            else None,
        )

    def _steps(self, engine: Engine, batch: int) -> DecodeSteps:
        context = self.args.context
        if isinstance(engine.driver, DeviceDriver):
            return GraphSteps(engine.driver, batch, context, self.device)
        return EagerSteps(engine, engine.model.config, batch, context, self.device)

    def _warm_up(
        self, steps: DecodeSteps, replay: Replay | None, num_tokens: int
    ) -> tuple[Tensor, float]:
        """The last logits, and milliseconds per token."""
        synchronize(self.device)
        start = time.perf_counter()
        logits = steps.run(replay, num_tokens)
        synchronize(self.device)
        assert logits is not None
        return logits, 1e3 * (time.perf_counter() - start) / num_tokens

    def _check_against_stock(self, engine: Engine, batch: int) -> None:
        difference = difference_from_stock(engine, batch)
        checks = self.results.content.setdefault("difference_from_stock_experts", {})
        checks[f"{self.label} batch {batch}"] = difference
        print(f"{self.label} b{batch}: a layer differs from stock experts by {difference:.2e}")

    def _compare_apart(self, logits: Tensor, batch: int) -> None:
        """How far one step's logits lie from those of joined launches, relatively."""
        joined = self._first_logits.get(batch)
        if joined is None:
            return
        difference = float((logits - joined).float().abs().max() / logits.float().abs().max())
        checks = self.results.content.setdefault("difference_of_joined_launches", {})
        checks[f"{self.label} batch {batch}"] = difference
        print(f"{self.label} b{batch}: joined launches change the logits by {difference:.2e}")

    def _is_bit_equal(self, batch: int, logits: Tensor) -> bool | None:
        resident = self._resident_logits.get(batch)
        return None if resident is None else torch.equal(logits, resident)

    def _measure_accelerate(self) -> None:
        put_experts_back(self.offloaded, self.pool)
        moe = self.offloaded.moe
        experts = [layer.experts for layer in moe.layers]
        moved = sum(p.nbytes for module in experts for p in module.parameters())
        with experts_offloaded(moe.model, experts, self.device):
            steps = EagerSteps(moe.model, moe.model.config, 1, self.args.context, self.device)
            steps.run(None, 1)
            times = steps.time(None, 1, ACCELERATE_TOKENS)
        self._add(
            "accelerate",
            1,
            0,
            times,
            repeat=0,
            warm_up_tokens=1,
            bytes_per_token=float(moved),
            prefetched_bytes_per_token=0.0,
            wasted_bytes_per_token=0.0,
            hit_rate=0.0,
            is_bit_equal=None,
        )

    def _add(self, arm: str, batch: int, slots: int, times: list[float], **values: object) -> None:
        ordered, resident_ms = sorted(times), self._resident_ms.get(batch)
        cell = Cell(
            shape=self.label,
            batch=batch,
            slots=slots,
            arm=arm,
            tpot_ms_median=statistics.median(times),
            tpot_ms_mean=statistics.fmean(times),
            tpot_ms_p95=ordered[round(0.95 * (len(times) - 1))],
            link_gb_s=self.link_gb_s,
            resident_floor_ms=resident_ms,
            copy_floor_ms=values["bytes_per_token"] / self.link_gb_s / 1e6,  # type: ignore[operator]
            tokens=len(times),
            **values,  # type: ignore[arg-type]
        )
        self.results.add(asdict(cell))
        print_row(cell)


def print_row(cell: Cell) -> None:
    """One line of the table, beside the floor of doing compute and copies one after the other."""
    floor = cell.resident_floor_ms
    serial = (
        ""
        if floor is None
        else f" floor {floor + cell.copy_floor_ms:.2f}"
        f" mean {cell.tpot_ms_mean / (floor + cell.copy_floor_ms):4.2f} x"
    )
    equal = {True: "", False: " LOGITS DIFFER", None: ""}[cell.is_bit_equal]
    print(
        f"{cell.shape[:12]} b{cell.batch} {cell.slots:3} % {cell.arm:22}"
        f"{cell.tpot_ms_median:8.2f} ms (mean {cell.tpot_ms_mean:.2f}, p95 {cell.tpot_ms_p95:.2f})"
        f" {cell.bytes_per_token / 1e6:6.0f} MB hit {cell.hit_rate or 0:.3f}{serial}{equal}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--routes", type=Path, help="route file to replay; drawn at random with --tiny")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--layers", type=int, help="decoder layers; rows say it")
    add("--batches", nargs="+", type=int, default=[1, 4])
    add("--slots", nargs="+", type=int, default=[100, 25, 10, 40, 60], help="per cent, 100 first")
    add("--recalls", nargs="+", type=float, default=[0.89, 1.0])
    add("--arms", nargs="+", default=["*"], help="patterns of the arms to run, such as prefetch-*")
    add("--context", type=int, default=512)
    add("--tokens", type=int, default=96, help="measured in a cell, after the warm-up")
    add("--warm-up", type=int, default=32, help="tokens before the measured ones")
    add("--repeats", type=int, default=1, help="turns of the arms of a cell")
    add("--cell-seconds", type=float, default=4, help="measure fewer tokens than --tokens if slow")
    add("--minutes", type=float, default=9, help="begin no cell after so many")
    add("--json", type=Path)
    add("--timelines", type=Path, help="folder for Chrome traces of a few tokens")
    add("--tiny", action="store_true", help="small sizes on the CPU: a test of this script")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.context = min(args.tokens, 8), 64
    elif not args.routes:
        parser.error("--routes FILE is needed, a recorded route (see docs/gpu.md); or --tiny")
    elif not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --tiny tests the script on a CPU")
    args.device = "cpu" if args.tiny else "cuda"
    return args


def main() -> int:
    """Run the shapes asked for."""
    args = parse_arguments()
    routing = f"replayed from {args.routes.name}" if args.routes else "drawn at random"
    results = PartialResults(
        args.json,
        args.minutes,
        weights="random",
        routing=f"{routing}; for other shapes its ids are folded to their experts",
        predictions="simulated: the recorded truth, wrong guesses by the layer's popularity",
        host_memory=f"a pinned pool of {POOL_BYTES >> 30} GiB that layers share round robin",
        context=args.context,
        command=" ".join(sys.argv),
    )
    with results.phase("host pool"):
        pool = HostPool(TINY_POOL_BYTES if args.tiny else POOL_BYTES, torch.device(args.device))
    for shape in args.shapes:
        if not results.skip_if_spent(shape):
            with results.cell(shape):
                ShapeBenchmark(args, results, shape, pool).run()
            free_memory()
    if args.timelines and not results.skip_if_spent("profiles"):
        # last: once the profiler has run, launches stay slower
        with results.cell("profiles"):
            ShapeBenchmark(args, results, args.shapes[0], pool).profile()
    pool.close()
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())

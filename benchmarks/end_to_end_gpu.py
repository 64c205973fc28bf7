"""Learned routing on one GPU, end to end: train a model, record, train estimators, run every arm.

    python benchmarks/end_to_end_gpu.py --work /tmp/end-to-end --json end_to_end_gpu.json

No replay and no simulated prediction: the model is trained here for a few minutes (so it is a young
one), routes as it learned to, and the estimators predict what they learned from its own traces.
The work folder keeps model, traces, run and bundle; what is there already is not made again.
`--tiny` runs the whole script on a CPU, with small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate_offload import experts_offloaded, move_all_but
from installed_prose import write_installed_prose
from link import link_bandwidth
from partial_results import PartialResults
from random_shapes import free_memory
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from foreroute.data.adapters import load_tokenizer
from foreroute.data.adapters.seam import is_experts_module
from foreroute.data.collect import collect_traces
from foreroute.data.corpus import documents
from foreroute.estimators import EstimatorSpec, EstimatorStack
from foreroute.estimators.artifacts import read_json
from foreroute.estimators.pairs import predictable_layers
from foreroute.estimators.types import InputKind
from foreroute.export.bundle import load_bundle
from foreroute.export.export import export_estimator
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.stats import RuntimeStats
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded
from foreroute.runtime.streamer import TimingStreamer
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig

SCRIPT = Path(__file__).parents[1] / "examples" / "train_bundled_model.py"
LOG_LINES = 12
HOST_SLOTS = "25%"
"""The host-driven arms and those with a readout run at this share alone."""
INPUTS: dict[str, InputKind] = {"trained": "quasi-hidden", "readout": "attention-readout"}
"""What each bundle's estimators read, by the name in the arms."""
CHARACTERS_PER_TOKEN = 4
TINY: dict[str, Any] = {
    "model_minutes": 0.05,
    "layers": 3,
    "experts": 8,
    "top_k": 2,
    "hidden": 64,
    "expert_width": 16,
    "heads": 2,
    "kv_heads": 1,
    "vocab": 512,
    "package_megabytes": 0.2,
    "max_documents": 30,
    "trace_tokens": 4096,
    "prose_tokens": 1024,
    "trace_batch": 4,
    "slots": ["25%", "50%"],
    "num_prompts": 2,
    "prompt_tokens": 24,
    "new_tokens": 8,
    "host_new_tokens": 4,
    "sequence_length": 128,
}


@dataclass(frozen=True)
class Cell:
    """One row of the result; batch 1."""

    shape: str
    slots: float
    """Per cent of the experts resident."""
    arm: str
    tpot_ms_median: float
    tpot_ms_mean: float
    tpot_ms_p95: float
    ttft_ms: float
    hit_rate: float
    bytes_per_token: float
    prefetched_bytes_per_token: float
    wasted_bytes_per_token: float
    link_gb_s: float
    resident_floor_ms: float | None
    """All-resident TPOT."""
    copy_floor_ms: float
    """Bytes per token over the measured link."""
    same_tokens: float | None
    """Share of the all-resident arm's tokens, up to each prompt's first difference: the graph and
    the host-driven engine round differently."""
    tokens: int
    driven_by: str
    """What ran the decode steps."""
    batch: int = 1


@dataclass(frozen=True)
class Arm:
    """One way to run the model."""

    name: str
    config: EngineConfig
    bundle: str | None = None
    """Name of the estimators; the training-free next router if None."""

    @property
    def is_driven_by_host(self) -> bool:
        """Whether its decode steps are eager."""
        return self.name.startswith("eager")


def train_model(args: argparse.Namespace, folder: Path) -> None:
    """The bundled model's script, with a larger model; what it prints goes to a log.

    Raises:
        RuntimeError: If it fails; with the end of the log.
    """
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--overwrite"]
    command += ["--minutes", str(args.model_minutes), "--device", args.device]
    names = "layers experts top_k hidden expert_width heads kv_heads vocab learning_rate epochs"
    names += " package_megabytes max_documents batch_size sequence_length eval_tokens"
    for name in names.split():
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    log = args.work / "train_model.log"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text().replace("\r", "\n").splitlines()[-LOG_LINES:])
        raise RuntimeError(f"{SCRIPT.name} ended with {done.returncode}:\n{tail}")


def record(args: argparse.Namespace, folder: Path, fields: str) -> dict[str, Any]:
    """Traces of code, and of prose if this machine has any; what they hold.

    Args:
        args: The command line.
        folder: The model.
        fields: Optional trace fields, a comma list. Traces that lie there with others are replaced.
    """
    common: dict[str, Any] = {
        "model": str(folder),
        "dtype": args.dtype,
        "device": args.device,
        "batch_size": args.trace_batch,
        "sequence_length": args.sequence_length,
        "record": fields,
        "overwrite": fields != args.record,
    }
    code = collect_traces(
        dataset="python-stdlib",
        out=args.work / "traces",
        tokens=args.trace_tokens,
        generated_share=args.generated_share,
        **common,
    )
    held = {"code_tokens": code.manifest.num_tokens}
    prose = args.work / "prose"
    found = write_installed_prose(prose, 2 * CHARACTERS_PER_TOKEN * args.prose_tokens)
    if found >= CHARACTERS_PER_TOKEN * args.sequence_length * 4:
        traces = collect_traces(
            dataset=str(prose),
            out=args.work / "traces-prose",
            tokens=args.prose_tokens,
            **common,
        )
        held["prose_tokens"] = traces.manifest.num_tokens
    return held | {"prose_source": "descriptions and manuals of installed packages"}


def train_estimators(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Estimators of all layers, exported; their metrics.

    Args:
        args: The command line.
        name: One of `INPUTS`.
    """
    traces, run = args.work / "traces", args.work / f"run-{name}"
    layers = predictable_layers(load_geometry(traces), 1)
    spec = EstimatorSpec(form="low-rank", input_kind=INPUTS[name], target_layers=layers)
    metrics = train_estimator(traces, spec, FitConfig(), run, resume=True)
    export_estimator(run, bundle_folder(args, name), overwrite=True)
    return metrics


def bundle_folder(args: argparse.Namespace, name: str) -> Path:
    """Where the estimators of that name are exported to."""
    folder: Path = args.work / f"bundle-{name}"
    return folder


def load_geometry(traces: Path) -> Any:
    """The recorded model's geometry."""
    from foreroute.data.traces import Traces

    return Traces.open(traces).geometry


def arms_at(slots: str, bundles: Collection[str]) -> list[Arm]:
    """All arms of an engine at one share of slots, with these estimators."""

    def arm(name: str, bundle: str | None = None, **settings: Any) -> Arm:
        return Arm(name, EngineConfig(**({"expert_slots": slots} | settings)), bundle)

    found = [arm("on-demand"), arm("prefetch-next-router", prefetch="auto")]
    for bundle in bundles:
        if bundle == "trained" or slots == HOST_SLOTS:
            found.append(arm(f"prefetch-{bundle}", bundle, prefetch="auto"))
        if slots == HOST_SLOTS:
            found.append(arm(f"prefetch-{bundle}-all", bundle, prefetch="all"))
    if slots == HOST_SLOTS:
        found += [
            arm("eager-lru", decide_on="host", eviction="lru"),
            arm("eager-no-cache", cache="none"),
        ]
    return found


def prompts_of(folder: Path, args: argparse.Namespace) -> list[Tensor]:
    """Beginnings of files the model never saw, [1, prompt tokens] each."""
    tokenizer = load_tokenizer(str(folder))
    prompts: list[Tensor] = []
    for document in documents("python-stdlib", "held-out"):
        ids = tokenizer(document.text, return_tensors="pt")["input_ids"]
        if ids.shape[1] >= args.prompt_tokens and len(prompts) < args.num_prompts:
            prompts.append(ids[:, : args.prompt_tokens])
    return prompts


class ArmsBenchmark:
    """Runs arms on one model and keeps their rows."""

    def __init__(
        self,
        args: argparse.Namespace,
        results: PartialResults,
        offloaded: OffloadedModel,
        prompts: list[Tensor],
    ) -> None:
        """Measure on these prompts.

        Args:
            args: The command line.
            results: Where rows go.
            offloaded: The model.
            prompts: [1, P] each; the first also warms up.
        """
        self.args, self.results, self.offloaded, self.prompts = args, results, offloaded, prompts
        self.stacks: dict[str, EstimatorStack] = {}
        geometry = offloaded.moe.geometry
        self.label = f"{geometry.num_layers} layers x {geometry.num_experts} experts, trained here"
        self._link_gb_s = link_bandwidth(offloaded.store.rows[0], offloaded.device)
        self._resident_tokens: list[list[int]] = []
        self._resident_ms: float | None = None

    def run(self, arm: Arm) -> None:
        """Measure one arm, unless the time is over."""
        name = f"{arm.config.expert_slots} {arm.name}"
        if self.results.skip_if_spent(name):
            return
        with self.results.phase("arms"), self.results.cell(name):
            self._measure(arm)
        free_memory()

    def _measure(self, arm: Arm) -> None:
        args = self.args
        length = args.host_new_tokens if arm.is_driven_by_host else args.new_tokens
        prompts = self.prompts[:1] if arm.is_driven_by_host else self.prompts
        stack = self.stacks[arm.bundle] if arm.bundle else None
        with Engine(self.offloaded, arm.config, stack) as engine:
            if arm.name == "resident":
                engine.fill_slots()
            engine.generate(self.prompts[-1], **greedy(self.prompts[-1], length))
            engine.reset_stats()
            tokens = [
                engine.generate(ids, **greedy(ids, length))[0, ids.shape[1] :].tolist()
                for ids in prompts
            ]
            stats = engine.stats()
        if arm.name == "resident":
            self._resident_tokens, self._resident_ms = tokens, stats.tpot_ms
        slots = float(arm.config.expert_slots.rstrip("%"))
        self._add(arm.name, slots, stats, tokens, type(engine.driver).__name__)

    def run_accelerate(self, folder: Path) -> None:
        """Whole-module offload by accelerate, of the same checkpoint."""
        if self.results.skip_if_spent("accelerate"):
            return
        device, length = self.offloaded.device, self.args.host_new_tokens
        with self.results.phase("accelerate"), self.results.cell("accelerate"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.args.dtype).eval()
            experts = [module for module in model.modules() if is_experts_module(module)]
            moved = sum(p.nbytes for module in experts for p in module.parameters())
            move_all_but(model, experts, device)
            ids, stats = self.prompts[0].to(device), RuntimeStats()
            with experts_offloaded(model, experts, device):
                for streamer in (None, TimingStreamer(stats)):
                    output = model.generate(ids, streamer=streamer, **greedy(ids, length))
            tokens = [output[0, ids.shape[1] :].tolist()]
            self._add("accelerate", 0.0, stats, tokens, "transformers", moved)

    def _add(
        self,
        arm: str,
        slots: float,
        stats: RuntimeStats,
        tokens: list[list[int]],
        driven_by: str,
        bytes_per_token: float | None = None,
    ) -> None:
        times = sorted(stats.token_ms)
        moved = stats.bytes_per_token if bytes_per_token is None else bytes_per_token
        steps = max(1, stats.decode.forwards)
        cell = Cell(
            shape=self.label,
            slots=slots,
            arm=arm,
            tpot_ms_median=statistics.median(times),
            tpot_ms_mean=statistics.fmean(times),
            tpot_ms_p95=times[round(0.95 * (len(times) - 1))],
            ttft_ms=statistics.median(stats.ttft_ms),
            hit_rate=stats.hit_rate,
            bytes_per_token=moved,
            prefetched_bytes_per_token=stats.decode.prefetched_bytes / steps,
            wasted_bytes_per_token=stats.wasted_bytes_per_token,
            link_gb_s=self._link_gb_s,
            resident_floor_ms=self._resident_ms,
            copy_floor_ms=moved / self._link_gb_s / 1e6,
            same_tokens=same_share(tokens, self._resident_tokens),
            tokens=len(times),
            driven_by=driven_by,
        )
        self.results.add(asdict(cell))
        print_row(cell)


def greedy(prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    """Settings of `generate`: so many tokens, always the likeliest."""
    return {
        "attention_mask": torch.ones_like(prompt),
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "do_sample": False,
    }


def same_share(tokens: list[list[int]], reference: list[list[int]]) -> float | None:
    """Share of the tokens that are the reference's, up to each row's first difference."""
    if not reference:
        return None
    same = total = 0
    for row, expected in zip(tokens, reference, strict=False):
        pairs = list(zip(row, expected, strict=False))
        different = [i for i, (a, b) in enumerate(pairs) if a != b]
        same += different[0] if different else len(pairs)
        total += len(pairs)
    return same / total


def print_row(cell: Cell) -> None:
    """One line of the table."""
    same = "-" if cell.same_tokens is None else f"{cell.same_tokens:.2f}"
    print(
        f"{cell.slots:5g} % {cell.arm:21} TPOT {cell.tpot_ms_median:7.2f} ms"
        f" (mean {cell.tpot_ms_mean:.2f}, p95 {cell.tpot_ms_p95:.2f}) TTFT {cell.ttft_ms:5.0f}"
        f" hit {cell.hit_rate:.3f} {cell.bytes_per_token / 1e6:7.2f} MB"
        f" wasted {cell.wasted_bytes_per_token / 1e6:6.2f} same {same}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for model, traces, run and bundle")
    add("--json", type=Path)
    add("--minutes", type=float, default=9, help="begin no arm after so many")
    add("--model-minutes", type=float, default=4, help="training the model")
    add("--layers", type=int, default=12)
    add("--experts", type=int, default=64)
    add("--top-k", type=int, default=8)
    add("--hidden", type=int, default=768)
    add("--expert-width", type=int, default=384, help="384: 1.77 MB an expert")
    add("--heads", type=int, default=12)
    add("--kv-heads", type=int, default=4)
    add("--vocab", type=int, default=4096)
    add("--learning-rate", type=float, default=1e-3)
    add("--epochs", type=float, default=40)
    add("--batch-size", type=int, default=0, help="windows per step; 0: the script's own")
    add("--eval-tokens", type=int, default=65_536)
    add("--package-megabytes", type=float, default=40, help="installed packages' code besides")
    add("--max-documents", type=int, default=0)
    add("--sequence-length", type=int, default=512)
    add("--dtype", default="bfloat16")
    add("--record", default="layer-input,readout", help="optional trace fields; '' for none")
    add("--trace-tokens", type=int, default=65_536)
    add("--prose-tokens", type=int, default=20_480)
    add("--generated-share", type=float, default=0.25)
    add("--trace-batch", type=int, default=32)
    add("--slots", nargs="+", default=["25%", "12.5%", "40%"], help="12.5 %% is top-8 of 64")
    add("--num-prompts", type=int, default=4)
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=128)
    add("--host-new-tokens", type=int, default=24, help="of the host-driven arms")
    add("--tiny", action="store_true", help="small sizes on the CPU: a test of this script")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --tiny tests the script on a CPU")
    args.device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        vars(args).update(TINY)
    return args


def main() -> int:
    """Run what is not there yet, then the arms."""
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.work.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items()}
    results = PartialResults(args.json, args.minutes, weights="trained here", settings=settings)
    folder = args.work / "model"
    with results.phase("train model"):
        if not (folder / "training.json").is_file():
            train_model(args, folder)
    training = read_json(folder / "training.json")
    results.set(model=training["model"], loss=training["loss"])
    run = {k: training["training"][k] for k in ("steps", "tokens", "epochs", "tokens_per_second")}
    print(f"model: {training['model']['num_parameters']:,} parameters, {run}", flush=True)
    print(f"held-out {training['loss']['held_out_bits_per_byte']:.3f} bits per byte", flush=True)
    for fields in dict.fromkeys((args.record, "")):  # optional fields must not stop the rest
        if "traces" in results.content:
            break
        with (
            results.phase("record"),
            results.cell(f"record {fields}"),
            quiet(args.work / "record.log"),
        ):
            results.set(traces=record(args, folder, fields), recorded_fields=fields)
    for name, key in {"trained": "recall_at_k", "readout": "readout_recall_at_k"}.items():
        if name == "readout" and "readout" not in results.content.get("recorded_fields", ""):
            continue
        with results.phase("estimators"), results.cell(f"estimators {name}"):
            with quiet(args.work / f"estimators-{name}.log"):
                metrics = train_estimators(args, name)
            recalls = {kind: round(value, 4) for kind, value in metrics["mean"].items()}
            results.set(**{key: recalls}, held_out_tokens=metrics["num_held_out_tokens"])
            print(f"{name}, recall@k (budget = top-k): {recalls}", flush=True)
    with results.phase("load"):
        offloaded = load_offloaded(str(folder), dtype=args.dtype, device=args.device)
    benchmark = ArmsBenchmark(args, results, offloaded, prompts_of(folder, args))
    for name in INPUTS:
        if bundle_folder(args, name).is_dir():
            with results.cell(f"bundle {name}"):
                benchmark.stacks[name] = load_bundle(bundle_folder(args, name)).stack
    print(f"expert: {offloaded.expert_bytes / 1e6:.2f} MB; {offloaded.moe.geometry.describe()}")
    benchmark.run(Arm("resident", EngineConfig(expert_slots="100%")))
    for slots in args.slots:
        for arm in arms_at(slots, benchmark.stacks):
            benchmark.run(arm)
    benchmark.run_accelerate(folder)
    return results.finish()


@contextlib.contextmanager
def quiet(log: Path) -> Any:
    """Send what libraries print to a file; bars and notices would bury the table."""
    with (
        log.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())

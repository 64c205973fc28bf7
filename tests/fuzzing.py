"""Damaged files for every reader: what they may raise, and what they may open.

By hand, for longer: `python tests/fuzzing.py --inputs 1000000 --seed 1`.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import string
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from toys import random_anchors, random_batch, toy_geometry, toy_manifest

from foreroute.data.manifest import read_manifest
from foreroute.data.routes import read_route
from foreroute.data.trace_writer import TraceWriter, read_pending
from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorSpec, EstimatorStack
from foreroute.estimators.artifacts import sha256_of, write_json
from foreroute.estimators.calibration import Calibration
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.estimators.output import claim
from foreroute.export.bundle import CalibrationEntry, PairEntry, load_bundle, save_bundle
from foreroute.runtime.planning.machine import find_profile, load_profile
from foreroute.train.checkpoints import require_whole
from foreroute.train.run import FitConfig, RunPlan, finish_run, load_run, open_run
from foreroute.train.split import SequenceSplit

DEEP = "\0deep\0"
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 255, 256, 65536, 1 << 31, 1 << 63, 1 << 64, 10**30),
    *(-(1 << 63), 0.0, -0.5, 1.5, 1e308, float("nan"), float("inf"), "", "x", "1", "x" * 5000),
    *("../../../etc/passwd", "/dev/zero", "/etc/passwd", "layer_000/../../x", "\ud800", "[red]"),
    *([], {}, [[]], [0], [None], ["x"], {"a": 1}, DEEP, "float32", "rmz", "low-rank", "train"),
)
ODD_WORDS = ("", "-1", "x", "1e9", "99999999", "9" * 40, "9" * 5000, '"', "\0", "0.5", "nan", "é")
LONG = 3000
"""Characters of a message at most."""


@dataclass(frozen=True)
class Target:
    """One reader, with the files that it reads."""

    make: Callable[[Path], None]
    """Write them, undamaged, into an empty folder."""
    files: tuple[str, ...]
    """Which of them to damage."""
    read: Callable[[Path], Any]
    """Read them from there."""
    repair: Callable[[Path], None] = lambda _: None
    """Make digests right again, so that what is behind them is reached too."""


# What is damaged how


def damage(path: Path, rng: random.Random) -> None:
    """Damage a file: its meaning or its bytes."""
    content = path.read_bytes()
    kinds = [damage_bytes]
    suffix = path.suffix
    if suffix in (".json", ".lock"):
        kinds = [damage_json] * 4 + kinds
    elif suffix in (".csv", ".jsonl", ".txt"):
        kinds = [damage_lines] * 3 + ([damage_json_lines] * 3 if suffix == ".jsonl" else []) + kinds
    elif suffix == ".safetensors":
        kinds = [damage_header] * 3 + kinds
    elif suffix in (".npy", ".npz"):
        kinds = [{".npy": damage_npy, ".npz": damage_npz}[suffix]] * 3 + kinds
    path.write_bytes(rng.choice(kinds)(content, rng))


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert or repeat bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 3:
            del data[at : at + rng.choice((1, 4, 100))]
        else:
            data[at:at] = data[: rng.choice((1, 50, 500))]
    return bytes(data)


def damage_value(value: Any, rng: random.Random) -> Any:
    """Another value somewhere in a nested one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return value | {rng.choice(("x", "../x", "/dev/zero")): value[key]}
        return value | {key: damage_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], damage_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 1 << 16))
    return rng.choice(ODD_VALUES)


def to_json(value: Any, rng: random.Random) -> bytes:
    """JSON with values nested as deep as no parser follows."""
    deep = rng.choice(("[" * 5000, "[" * 200 + "]" * 200, '{"a":' * 5000))
    return json.dumps(value).replace(json.dumps(DEEP), deep).encode()


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Other values in a JSON document."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = damage_value(value, rng)
    return to_json(value, rng)


def damage_json_lines(content: bytes, rng: random.Random) -> bytes:
    """Other values in one line of JSON."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damage_json(lines[at], rng)
    return b"\n".join(lines)


def damage_lines(content: bytes, rng: random.Random) -> bytes:
    """Other words in a table, lines left out or repeated."""
    lines = content.decode().splitlines()
    at, kind = rng.randrange(len(lines)), rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at:at] = lines[at : at + rng.randrange(5)]
    elif kind == 2:
        lines.insert(0, f"# n_expert={rng.choice(ODD_WORDS)}")
    else:
        words = lines[at].split(",")
        words[rng.randrange(len(words))] = rng.choice((*ODD_WORDS, str(rng.randrange(1 << 20))))
        lines[at] = ",".join(words)
    return "\n".join(lines).encode(errors="replace")


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """Another header before the same tensors."""
    size = int.from_bytes(content[:8], "little")
    header = damage_json(content[8 : 8 + size], rng)
    if rng.random() < 0.3:
        dtype = rng.choice((b"F8_E4M3", b"BOOL", b"U8", b"F64", b"BF16", b"F4", b"I64", b"C64"))
        header = content[8 : 8 + size].replace(rng.choice((b"F32", b"I64", b"U8")), dtype, 1)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1 << 20, 1 << 62))
    return length.to_bytes(8, "little") + header + content[8 + size :]


def damage_npy(content: bytes, rng: random.Random) -> bytes:
    """Another description before the same numbers."""
    start, size = 10, int.from_bytes(content[8:10], "little")
    header = content[start : start + size].decode()
    shapes = ("(200000000, 3, 2)", "(True, 3, 2)", "(-1, 3, 2)", "()", "(3,)", "(0, 3, 2)", "x")
    dtypes = ("<m8", "|S0", "|O", "<f8", ">i8", "<U9", "|b1", "<i1", "<u2", "V0", "x")
    shape = header[header.index("(") : header.index(")") + 1]
    header = rng.choice(
        (
            header.replace(shape, rng.choice(shapes)),
            header.replace("<i8", rng.choice(dtypes)),
            header.replace("False", rng.choice(("True", "1", "None"))),
            "-" * rng.choice((100, 5000)),
            header.replace("{", "{" * rng.choice((2, 3000))),
        )
    )
    raw = header.encode()
    return content[:8] + len(raw).to_bytes(2, "little") + raw + content[start + size :]


def damage_npz(content: bytes, rng: random.Random) -> bytes:
    """An archive of damaged arrays, of other names and compressions."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    made = io.BytesIO()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(made, "w", rng.choice(methods)) as archive:
        for name, data in members.items():
            place = rng.choice((name, name, name, "../../x.npy", "a.npy"))
            kind = rng.choice((damage_npy, damage_npy, damage_bytes))
            archive.writestr(place, kind(data, rng) if rng.random() < 0.8 else data)
        if rng.random() < 0.1:
            archive.writestr("zeros.npy", bytes(1 << 22))
    return made.getvalue()


# What is read


def make_bundle(folder: Path) -> None:
    """A bundle with two layers, one of them trained."""
    torch.manual_seed(0)
    spec = EstimatorSpec(form="low-rank", rank=2, target_layers=(1, 2))
    vectors = torch.randn(3, 8, 16)
    stack = EstimatorStack.build(toy_geometry(0, 1, 2), spec, random_anchors(3), vectors)
    table = torch.linspace(0, 1, 8).repeat(2, 1)
    stack.calibration = Calibration(torch.zeros(2), torch.ones(2), table, top_k=2)
    entries = [
        PairEntry(
            source_layer=source,
            target_layer=source + 1,
            form=form,
            recall_at_k=0.9,
            training_free_recall_at_k=0.8,
            budget=2,
        )
        for source, form in enumerate(("low-rank", "next-router"))
    ]
    fitted = CalibrationEntry(
        method="isotonic",
        compared={"isotonic": 0.1},
        num_fit_tokens=8,
        num_choose_tokens=8,
        costs=FetchCosts(),
    )
    save_bundle(folder, stack, entries, num_held_out_tokens=7, provenance={}, calibration=fitted)


def make_run(folder: Path) -> None:
    """A finished run of two layers."""
    torch.manual_seed(0)
    spec = EstimatorSpec(form="low-rank", rank=2, target_layers=(1, 2))
    vectors = torch.randn(3, 8, 16)
    stack = EstimatorStack.build(toy_geometry(0, 1, 2), spec, random_anchors(3), vectors)
    plan = RunPlan(
        traces="elsewhere",
        traces_sha256="0" * 64,
        geometry=stack.geometry,
        norm_kind="rms",
        norm_eps=1e-6,
        spec=spec,
        split=SequenceSplit(train=range(8), held_out=range(9, 12)),
        config=FitConfig(),
    )
    folder.rmdir()
    open_run(folder, plan, overwrite=False, resume=False)
    figures = {"recall_at_k": 0.5, "per_layer": {"recall_at_k": [0.5, 0.5]}}
    finish_run(folder, stack, {"estimator": figures, "num_train_tokens": 8})


def make_traces(folder: Path, *, is_finished: bool = True) -> None:
    """Traces of three shards; the last is pending if they are not finished."""
    manifest = toy_manifest()
    folder.rmdir()
    anchors = random_anchors(3, seed=0)
    writer = TraceWriter.begin(folder, manifest, anchors, overwrite=False)
    for shard_idx in range(3):
        if shard_idx == 2 and not is_finished:
            writer = TraceWriter(folder, read_manifest(folder), is_shared=True)
        shard = writer.begin_shard(2, shard_idx)
        batch, sums = random_batch(manifest, seed=shard_idx)
        shard.add_batch(batch)
        writer.finish_shard(shard, sums)
    if is_finished:
        writer.finish("tokens-reached")


def repair_traces(folder: Path) -> None:
    """Give the manifest the digests and sizes of the files as they are."""
    values = json.loads((folder / "manifest.json").read_text())
    for shard in values["shards"]:
        for name in shard["sha256"]:
            shard["sha256"][name] = sha256_of(folder / name)
            shard["file_bytes"][name] = (folder / name).stat().st_size
    values["anchors_sha256"] = sha256_of(folder / "anchors.safetensors")
    write_json(folder / "manifest.json", values)


def repair_digest(manifest: str) -> Callable[[Path], None]:
    """Give a manifest the digest of its tensors as they are."""

    def repair(folder: Path) -> None:
        values = json.loads((folder / manifest).read_text())
        digest = sha256_of(folder / "estimators.safetensors")
        write_json(folder / manifest, values | {"tensors_sha256": digest})

    return repair


def read_traces(folder: Path) -> None:
    """Read all there is."""
    traces = Traces.open(folder)
    for shard in traces.manifest.shards:
        traces.tokens(shard.shard_idx)
        for layer in traces.geometry.layer_indices:
            traces.record(layer, shard.shard_idx)
    traces.default_vectors()
    traces.verify()


def read_begun(folder: Path) -> None:
    """Read what a resumed recording reads."""
    for entry in TraceWriter(folder, read_manifest(folder)).entries.values():
        entry.require_whole(folder)
    read_pending(folder, read_manifest(folder))


IDS = np.array([[[0, 1], [2, 3], [1, 2]], [[1, 2], [0, 3], [4, 5]], [[0, 3], [1, 2], [2, 3]]])


def write_table(folder: Path) -> None:
    """A route as rows of step, layer and expert."""
    rows = [
        f"0,{'prefill' if step == 0 else 'decode'},{step},{layer},{slot},{expert}"
        for step, token in enumerate(IDS.tolist())
        for layer, experts in enumerate(token)
        for slot, expert in enumerate(experts)
    ]
    header = ["# n_expert=8", "turn,phase,step,layer,slot,expert"]
    (folder / "route.csv").write_text("\n".join([*header, *rows]))


def write_activations(folder: Path) -> None:
    """A route as llama.cpp lists it."""
    rows = [
        f"{layer},{expert}"
        for token in IDS.tolist()
        for layer, experts in enumerate(token)
        for expert in experts
    ]
    (folder / "llama.csv").write_text("\n".join(["layer,expert", *rows]))


def write_megatron(folder: Path) -> None:
    """A route as Megatron records it."""
    lines = [
        json.dumps({"step": step, "layer": layer, "block": "decoder", "top_indices": [experts]})
        for step, token in enumerate(IDS.tolist())
        for layer, experts in enumerate(token)
    ]
    (folder / "trace.jsonl").write_text("\n".join(lines))


def make_checkpoint(folder: Path) -> None:
    """A checkpoint with its digest."""
    torch.save({"state_dict": {"x": torch.zeros(3)}}, folder / "last.ckpt")
    write_json(folder / "last.json", {"sha256": [sha256_of(folder / "last.ckpt")]})


def route(name: str, make: Callable[[Path], Any]) -> Target:
    """A recorded route in one file."""
    return Target(make, (name,), lambda folder: read_route(folder / name))


TARGETS: dict[str, Target] = {
    "bundle": Target(
        make_bundle,
        ("manifest.json", "estimators.safetensors"),
        load_bundle,
        repair_digest("manifest.json"),
    ),
    "run": Target(
        make_run,
        ("run.json", "metrics.json", "estimators.safetensors"),
        load_run,
        repair_digest("metrics.json"),
    ),
    "traces": Target(
        make_traces,
        (
            "manifest.json",
            "manifest.json",
            "anchors.safetensors",
            "tokens/shard_00001.safetensors",
            "layer_001/shard_00000.safetensors",
        ),
        read_traces,
        repair_traces,
    ),
    "unfinished traces": Target(
        lambda folder: make_traces(folder, is_finished=False),
        ("manifest.json", "pending/shard_00002.json"),
        read_begun,
    ),
    "profile": Target(
        lambda folder: write_json(folder / "p.json", find_profile("h100-pcie5").to_dict()),
        ("p.json",),
        lambda folder: load_profile(folder / "p.json"),
    ),
    "checkpoint": Target(
        make_checkpoint,
        ("last.ckpt", "last.json"),
        lambda folder: require_whole(folder / "last.ckpt"),
    ),
    "lock": Target(
        lambda folder: write_json(
            folder / "out.lock", {"foreroute_lock_of": "out", "pid": 4194304, "host": "elsewhere"}
        ),
        ("out.lock",),
        lambda folder: claim(folder / "out").__enter__(),
    ),
    "npy": route("ids.npy", lambda folder: np.save(folder / "ids.npy", IDS)),
    "npz": route("ids.npz", lambda folder: np.savez(folder / "ids.npz", routed_experts=IDS)),
    "safetensors": route(
        "ids.safetensors",
        lambda folder: save_file(
            {"routed_experts": torch.from_numpy(IDS)}, folder / "ids.safetensors"
        ),
    ),
    "table": route("route.csv", write_table),
    "llama.cpp": route("llama.csv", write_activations),
    "megatron": route("trace.jsonl", write_megatron),
}


@dataclass
class Fuzz:
    """Damages files and reads them, one after the other."""

    folder: Path
    seed: int
    counts: Counter[str]
    """How many inputs were read right and how many refused, by target."""

    def __post_init__(self) -> None:
        """Write every target's files once, and read them undamaged."""
        for number, target in enumerate(TARGETS.values()):
            place = self.folder / f"good_{number}"
            place.mkdir(parents=True)
            target.make(place)
            if not (place / "out.lock").is_file():
                target.read(place)

    def one(self, number: int) -> str | None:
        """Damage and read one input; gives what went wrong."""
        rng = random.Random(f"{self.seed}/{number}")
        at = number % len(TARGETS)
        name, target = list(TARGETS.items())[at]
        place = self.folder / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / f"good_{at}", place)
        file = rng.choice(target.files)
        damage(place / file, rng)
        if rng.random() < 0.5 and not file.endswith(".json"):
            target.repair(place)
        OPENED.clear()
        start = time.process_time()
        problem = None
        try:
            target.read(place)
            self.counts[f"{name}: read"] += 1
        except (ValueError, FileNotFoundError) as error:
            self.counts[f"{name}: refused"] += 1
            if not str(error).strip() or len(str(error)) > LONG:
                problem = f"a message of {len(str(error))} characters: {str(error)[:200]}"
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        took = time.process_time() - start
        outside = [path for path in OPENED if not path.startswith(str(self.folder))]
        if outside:
            problem = f"it opened {outside[0]}"
        if took > 2:
            problem = f"it took {took:.1f} s"
        return problem and f"{name}, {file}, input {number} of seed {self.seed}: {problem}"


OPENED: list[str] = []
CODE = (".py", ".pyc", ".so")


def _watch(event: str, details: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(details[0], str) and not details[0].endswith(CODE):
        OPENED.append(details[0])


def watch_opened_files() -> None:
    """List the files that Python opens from now on, but for code."""
    sys.addaudithook(_watch)


def main() -> None:
    """Run as many inputs as are asked for, or as the time allows."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=10**6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60)
    asked = parser.parse_args()
    watch_opened_files()
    until = time.monotonic() + asked.minutes * 60
    problems: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        fuzz = Fuzz(Path(name), asked.seed, Counter())
        done = 0
        while done < asked.inputs and time.monotonic() < until:
            if problem := fuzz.one(done):
                problems[problem.translate(str.maketrans("", "", string.digits))[:120]] += 1
                if sum(problems.values()) < 200:
                    print(problem, flush=True)
            done += 1
    print(f"{done:,} inputs, {sum(problems.values())} problems")
    for name, count in sorted(fuzz.counts.items()):
        print(f"  {name} {count:,}")


if __name__ == "__main__":
    main()

"""What each process of tests/test_parallel.py runs: engines on its slices; writes what it saw."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from foreroute.data.adapters import load_tokenizer
from foreroute.estimators.console import plain_console
from foreroute.export.bundle import load_bundle
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.bench.command import run_bench
from foreroute.runtime.parallel import Lockstep, SliceRanks
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded

PROMPT = "import os\n\ndef read_config(path):\n    with open(path) as file:\n        return"
CASES = {
    "all": {"expert_slots": "100%"},
    "quarter": {"expert_slots": "25%"},
    "again": {"expert_slots": "25%"},
    "prefetch": {"expert_slots": "25%", "prefetch": "all"},
    "bundle": {"expert_slots": "25%", "prefetch": "all"},
}
LICENSE, LICENSE_TOKENS = Path(__file__).parents[1] / "LICENSE", 400
LONG = 200
"""Tokens of an answer that something ends before."""


def device() -> str:
    """Where this process computes: its own GPU, if the test says so."""
    return SliceRanks.local_device(os.environ.get("RANKS_ON", "cpu"))


def cases_of(num_ranks: int) -> list[str]:
    """What so many processes run; each core runs two of four."""
    return [*CASES] if num_ranks == 2 else ["all", "quarter", "bundle"]


def inputs() -> Any:
    return load_tokenizer("bundled")(PROMPT, return_tensors="pt").to(device())


def observe(offloaded: OffloadedModel, settings: dict[str, Any], stack: Any = None) -> Any:
    """Logits of a prompt, greedy and sampled tokens, and what was copied."""
    torch.manual_seed(100 + offloaded.ranks.rank)  # ranks must agree all the same
    with Engine(offloaded, EngineConfig(**settings), stack) as engine:
        logits = engine(**inputs()).logits[0]
        greedy = engine.generate(**inputs(), max_new_tokens=8, do_sample=False)
        sampled = engine.generate(**inputs(), max_new_tokens=8, do_sample=True, temperature=1.5)
        engine.check_integrity()
        stats = engine.stats().decode
        return {
            "logits": logits.cpu(),
            "greedy": greedy.cpu(),
            "sampled": sampled.cpu(),
            "counts": torch.tensor([stats.hits, stats.misses, stats.prefetches]),
            "bytes": torch.tensor([stats.bytes, offloaded.store.num_bytes]),
            "driver": type(engine.driver).__name__,
        }


def logits_in(dtype: str, ranks: SliceRanks) -> torch.Tensor:
    """Of a text that does not change, [T, V]."""
    offloaded = load_offloaded("bundled", device=device(), dtype=dtype, ranks=ranks)
    text = load_tokenizer("bundled")(LICENSE.read_text(), return_tensors="pt").to(device())
    with Engine(offloaded, EngineConfig(expert_slots="25%")) as engine:
        logits: torch.Tensor = engine(text["input_ids"][:, :LICENSE_TOKENS]).logits[0]
        return logits.float().cpu()


def divided(ranks: SliceRanks, stack: Any) -> Any:
    """The same cases where everything else is divided too, by case; or why that is refused."""
    try:
        offloaded = load_offloaded(
            "bundled", device=device(), dtype="float32", ranks=ranks, tp_plan="auto"
        )
    except ValueError as error:
        return str(error)
    keys = offloaded.moe.model.model.layers[0].self_attn.k_proj.weight.to_local()
    seen = {name: observe(offloaded, CASES[name]) for name in ("all", "quarter")}
    return seen | {"bundle": observe(offloaded, CASES["bundle"], stack), "keys": len(keys)}


def benched(bundle: Path) -> Any:
    """What `foreroute bench` finds; None on processes that do not speak."""
    found = run_bench(
        Checkpoint.open("bundled", dtype="float32", device=torch.device(device())),
        [inputs()["input_ids"][:, :20]],
        plain_console(),
        bundle=bundle,
        expert_slots="25%",
        budget=None,
        prompt_tokens=12,
        repeats=1,
        device=device(),
        expert_dtype="auto",
        pinned_memory=None,
    )
    names = ("modes", "num_ranks", "exact_tokens_equal")
    return found and {name: found[0][name] for name in names}


class Failing:
    """A streamer, and a criterion, that fail after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, _: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError("the reader is gone")

    def end(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.left -= 1
        return torch.full((len(input_ids),), self.left < 0, device=input_ids.device)


def lead_or_follow(offloaded: OffloadedModel) -> dict[str, Any]:
    """The first process asks, fails, stops and is asked to end; the others follow."""
    with Engine(offloaded, EngineConfig(expert_slots="25%")) as engine:
        pids = offloaded.ranks.gather(os.getpid())
        lockstep = Lockstep(offloaded.ranks, engine.generate)
        if not offloaded.ranks.is_first:
            lockstep.follow()
            return {"hits": engine.stats().decode.hits}
        seen = {}
        with lockstep.leading(engine.model):
            ask = {"do_sample": False, **inputs()}
            seen["first"] = engine.model.generate(max_new_tokens=8, **ask)
            for name, settings in (
                ("streamer", {"streamer": Failing(4)}),
                ("refusal", {"temperature": "warm", "do_sample": True}),
            ):
                try:
                    engine.model.generate(**(ask | {"max_new_tokens": LONG} | settings))
                except (BrokenPipeError, TypeError, ValueError) as error:
                    seen[name] = str(error)
            stop = [Failing(4)]
            ended = engine.model.generate(max_new_tokens=LONG, stopping_criteria=stop, **ask)
            seen["stopped"] = ended.shape[1] - ask["input_ids"].shape[1]
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            seen["last"] = engine.model.generate(max_new_tokens=8, **ask)
        return seen | {"hits": engine.stats().decode.hits}


def see_one_die(offloaded: OffloadedModel) -> dict[str, Any]:
    """The last process ends in the middle; what the others say, and after how long."""
    with Engine(offloaded, EngineConfig(expert_slots="25%")) as engine:
        engine.generate(**inputs(), max_new_tokens=2, do_sample=False)
        start = time.monotonic()
        if offloaded.ranks.rank == offloaded.ranks.num_ranks - 1:
            os._exit(3)
        try:
            engine.generate(**inputs(), max_new_tokens=LONG, do_sample=False)
        except ConnectionError as error:
            return {"line": str(error), "seconds": time.monotonic() - start}
    return {}


def run_rank(out: Path, bundle: Path, on: str) -> None:
    """Run every case, in order; in the last one, on CPUs alone, a process ends."""
    os.environ["RANKS_ON"] = on
    if on != "cpu":
        torch.cuda.set_device(device())
    ranks = SliceRanks.join(torch.device(device()))
    offloaded = load_offloaded("bundled", device=device(), dtype="float32", ranks=ranks)
    stack = load_bundle(bundle).stack
    for name in cases_of(ranks.num_ranks):
        settings = CASES[name]
        seen = observe(offloaded, settings, stack if name == "bundle" else None)
        torch.save(seen, out / f"{name}_{ranks.rank}.pt")
    torch.save({"logits": logits_in("bfloat16", ranks)}, out / f"bfloat16_{ranks.rank}.pt")
    torch.save(divided(ranks, stack), out / f"divided_{ranks.rank}.pt")
    torch.save(benched(bundle), out / f"bench_{ranks.rank}.pt")
    torch.save(lead_or_follow(offloaded), out / f"lockstep_{ranks.rank}.pt")
    if on != "cpu":
        return
    seen = see_one_die(offloaded)
    torch.save(seen, out / f"die_{ranks.rank}.pt")
    os._exit(0)  # the others' end is not waited for: one is dead

"""What each process of tests/test_parallel.py runs: an engine on its slices; writes what it saw."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from foreroute.data.adapters import load_tokenizer
from foreroute.runtime import Engine

PROMPT = "def read_config(path):"


def observe(settings: dict[str, Any]) -> dict[str, Any]:
    """Logits of a prompt, greedy and sampled tokens, and what was copied."""
    torch.manual_seed(100 + int(os.environ.get("RANK", "0")))  # ranks must agree all the same
    with Engine.from_pretrained("bundled", is_sliced=True, **settings) as engine:
        inputs = load_tokenizer("bundled")(PROMPT, return_tensors="pt")
        logits = engine(**inputs).logits[0]
        greedy = engine.generate(**inputs, max_new_tokens=16, do_sample=False)
        sampled = engine.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=1.5)
        engine.check_integrity()
        stats = engine.stats()
        return {
            "logits": logits,
            "greedy": greedy,
            "sampled": sampled,
            "counts": torch.tensor([stats.decode.hits, stats.decode.misses]),
            "bytes": torch.tensor([stats.decode.bytes, engine.offloaded.store.num_bytes]),
        }


def main() -> None:
    """Run every case, in order; `die` ends one process in the middle."""
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = int(os.environ.get("RANK", "0"))
    for name, settings in cases.items():
        if name == "die" and rank == 1:
            os._exit(3)
        torch.save(observe(settings), out / f"{name}_{rank}.pt")


if __name__ == "__main__":
    main()

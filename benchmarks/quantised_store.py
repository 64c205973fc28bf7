"""What storing experts in fewer bits costs: perplexity of the bundled model, bytes per expert.

python benchmarks/quantised_store.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from foreroute.data.adapters import load_tokenizer
from foreroute.data.corpus import documents
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.store.encodings import EXPERT_DTYPES
from foreroute.runtime.store.offload import load_offloaded

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quantised_store.json"
PAGE = ROOT / "docs" / "quantised.md"
NUM_SEQUENCES = 32
SEQUENCE_TOKENS = 256


def held_out_sequences() -> list[torch.Tensor]:
    """The first tokens of held-out standard-library files, [1, 256] each."""
    tokenizer = load_tokenizer("bundled")
    sequences: list[torch.Tensor] = []
    for document in documents("python-stdlib", "held-out"):
        settings = {"return_tensors": "pt", "truncation": True, "max_length": SEQUENCE_TOKENS}
        ids = tokenizer(document.text, **settings)["input_ids"]
        if ids.shape[1] == SEQUENCE_TOKENS:
            sequences.append(ids)
        if len(sequences) == NUM_SEQUENCES:
            break
    return sequences


def measure(expert_dtype: str, sequences: list[torch.Tensor]) -> dict[str, Any]:
    """Bytes per expert, and the mean loss and its perplexity on the sequences."""
    offloaded = load_offloaded("bundled", device="cpu", dtype="float32", expert_dtype=expert_dtype)
    losses = []
    with Engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
        for tokens in track(sequences, description=f"{expert_dtype:5}", transient=True):
            logits = engine(tokens).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
    loss = float(torch.stack(losses).mean())
    return {
        "expert_dtype": "float32" if expert_dtype == "auto" else expert_dtype,
        "bytes_per_expert": offloaded.expert_bytes,
        "loss": loss,
        "perplexity": math.exp(loss),
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """The page docs/quantised.md."""
    whole = rows[0]
    lines = [
        "# Experts in fewer bits",
        "",
        "`--expert-dtype` stores every expert's matrices in fewer bits when the model is loaded: "
        "in host memory, on the link and in the slots. They are decoded when they are used. The "
        "default, `auto`, keeps what the checkpoint has and is exact; GPT-OSS's MXFP4 and the "
        "128 x 128 FP8 blocks of DeepSeek and Qwen releases are kept as they are, and decode to "
        "the very numbers that transformers dequantises them to.",
        "",
        "Other checkpoints in fewer bits are decoded to the model's dtype while they are read, "
        "matrix by matrix: FP8 with a factor for a tensor, a channel or a block, static or not, "
        "and with some layers left in 16 bits; compressed-tensors in fp8, int8 and int4 "
        "(`pack-quantized`); GPTQ and AWQ (`gemm`) of 4 and 8 bits. Nothing else need be "
        "installed. They then take 16 bits a number in host memory, unless `--expert-dtype` "
        "stores them in fewer again (which rounds). What is quantised otherwise is refused by "
        "`foreroute doctor` and by loading in the same words.",
        "",
        f"Bundled model, float32 but for the experts, {NUM_SEQUENCES} held-out files of the "
        f"standard library, {SEQUENCE_TOKENS} tokens each. Written by "
        "`python benchmarks/quantised_store.py`.",
        "",
        "| expert dtype | bytes per expert | of float32 | perplexity | change |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        share = row["bytes_per_expert"] / whole["bytes_per_expert"]
        change = row["perplexity"] / whole["perplexity"] - 1
        lines.append(
            f"| {row['expert_dtype']} | {row['bytes_per_expert']:,} | {share:.1%} | "
            f"{row['perplexity']:.4f} | {change:+.3%} |"
        )
    lines += [
        "",
        "* `bf16`: rounded to bfloat16 (the bundled checkpoint is in bfloat16, so nothing is "
        "lost).",
        "* `fp8`, `int8`: 8 bits, with a float32 factor per output channel.",
        "* `int4`: 4 bits, with a float16 step and offset per group of 128, 64 or 32 inputs (the "
        "largest that divides them; the bundled model's down projections have 40 inputs, one "
        "group).",
        "",
        "On CUDA the kernels read them from the slots as they lie, in the same graph as any others "
        "([gpu.md](gpu.md)): scales are applied to sums of a group, so that nothing is rounded to "
        "the model's dtype in between. On an H100 a layer's products take no longer than in "
        "bfloat16, and the link a half (int8) or a quarter (MXFP4) of the time.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all and write the results."""
    sequences = held_out_sequences()
    rows = [measure(name, sequences) for name in ("auto", *EXPERT_DTYPES)]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(table_of(rows))
    print(table_of(rows), RESULTS, PAGE, sep="\n")


if __name__ == "__main__":
    main()

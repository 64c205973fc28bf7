"""Measure a trained Qwen3-MoE on packed text and write its model card.

Losses are in bits per byte; routing is counted per layer and per kind of source text.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import platform
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

HALVINGS = 10
"""Random halvings of the held-out files behind the noise floor."""
DEAD_SHARE = 0.1
"""An expert is dead below this share of its fair (uniform) load."""


class Kind(IntEnum):
    """What a character of Python source belongs to."""

    CODE = 0
    DOCSTRING = 1
    COMMENT = 2
    UNKNOWN = 3
    """Document separators, and files that the running Python cannot parse."""


class Stream(NamedTuple):
    """Documents packed into one line of tokens, `<eos>` before, between and after them."""

    token_ids: Tensor
    """[tokens]"""
    num_bytes: int
    """UTF-8 bytes of the documents."""
    document_ids: np.ndarray
    """[tokens]; which document a token is from, a separator counting to the one before it."""
    kinds: np.ndarray
    """[tokens]; `Kind` values."""


def character_kinds(text: str) -> np.ndarray:
    """Kind of every character of a Python source text.

    Args:
        text: Source, its lines ended by a line feed.

    Returns:
        `Kind` values, [characters], uint8.

    Raises:
        SyntaxError: If the running Python cannot parse the text.
        tokenize.TokenError: If it cannot be split into tokens.
        ValueError: If it holds null bytes.
    """
    lines = text.split("\n")
    starts = np.cumsum([0] + [len(line) + 1 for line in lines])
    kinds = np.full(len(text), Kind.CODE, dtype=np.uint8)
    for node in docstrings(text):
        # ast counts columns in UTF-8 bytes, tokenize in characters
        first = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
        last = len(lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode())
        kinds[starts[node.lineno - 1] + first : starts[node.end_lineno - 1] + last] = Kind.DOCSTRING
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            start = starts[token.start[0] - 1] + token.start[1]
            kinds[start : start + len(token.string)] = Kind.COMMENT
    return kinds


def docstrings(text: str) -> Iterator[ast.expr]:
    """String expressions that open a module, class or function body."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the text are not ours to report
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        value = first.value if isinstance(first, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value


def token_kinds(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Kind of every token: that of its last character, for leading blanks join the next word.

    Args:
        text: Python source; one that cannot be parsed gives `Kind.UNKNOWN` throughout.
        offsets: First and past-last character of every token.

    Returns:
        `Kind` values, [tokens], uint8.
    """
    try:
        kinds = character_kinds(text)
    except (SyntaxError, tokenize.TokenError, ValueError):
        return np.full(len(offsets), Kind.UNKNOWN, dtype=np.uint8)
    last = np.array([max(start, end - 1) for start, end in offsets], dtype=np.int64)
    return kinds[last]


def windows(
    token_ids: Tensor, sequence_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a stream into inputs and next-token targets; every token but the first is a target once.

    Args:
        token_ids: [tokens]
        sequence_length: Tokens a window has; the last window may be shorter.
        batch_size: Windows a batch has at most.

    Yields:
        Inputs and targets, both [windows, tokens of a window].
    """
    num_full = (len(token_ids) - 1) // sequence_length
    if num_full:
        rows = token_ids[: num_full * sequence_length + 1].unfold(
            0, sequence_length + 1, sequence_length
        )
        for batch in rows.split(batch_size):
            yield batch[:, :-1], batch[:, 1:]
    tail = token_ids[num_full * sequence_length :]
    if len(tail) > 1:
        yield tail[None, :-1], tail[None, 1:]


@torch.no_grad()
def mean_nats(model: nn.Module, token_ids: Tensor, sequence_length: int, batch_size: int) -> float:
    """Mean next-token loss over a stream, in nats per token; leaves the model in eval mode."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=token_ids.device)
    for inputs, targets in windows(token_ids, sequence_length, batch_size):
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        total += functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).double()
    return total.item() / (len(token_ids) - 1)


def bits_per_byte(nats_per_token: float, stream: Stream) -> float:
    """Loss of a stream in bits per UTF-8 byte of its documents, separators' loss included."""
    return nats_per_token * (len(stream.token_ids) - 1) / math.log(2) / stream.num_bytes


def unigram_nats(train: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Held-out loss of add-one token frequencies counted on train, in nats per token."""
    counts = torch.bincount(train.cpu(), minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out[1:].cpu()].mean().item()


def byte_entropy(texts: Sequence[str]) -> float:
    """Entropy of the byte frequencies of texts, in bits per byte."""
    counts = np.bincount(
        np.frombuffer("".join(texts).encode(errors="replace"), dtype=np.uint8), minlength=256
    )
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@torch.no_grad()
def routed_experts(
    model: nn.Module, token_ids: Tensor, sequence_length: int, batch_size: int
) -> np.ndarray:
    """Experts that every token but the last is routed to, [layers, tokens - 1, top_k]."""
    model.eval()
    top_k = model.config.num_experts_per_tok
    batches = []
    for inputs, _ in windows(token_ids, sequence_length, batch_size):
        output = model.model(input_ids=inputs, use_cache=False, output_router_logits=True)
        logits = torch.stack(output.router_logits)  # [layers, tokens, experts]
        batches.append(logits.topk(top_k, dim=-1).indices.to(torch.int16).cpu())
    return torch.cat(batches, dim=1).numpy()


def expert_shares(expert_ids: np.ndarray, num_experts: int) -> np.ndarray | None:
    """Share of the routing slots that each expert fills, [experts]; None where nothing routed."""
    if not expert_ids.size:
        return None
    return np.bincount(expert_ids.ravel(), minlength=num_experts) / expert_ids.size


def divergence_bits(first: np.ndarray | None, second: np.ndarray | None) -> float | None:
    """Jensen-Shannon divergence of two distributions in bits, 0..1; None where one is missing."""
    if first is None or second is None:
        return None
    middle = (first + second) / 2

    def relative_entropy(shares: np.ndarray) -> float:
        seen = shares > 0
        return float((shares[seen] * np.log2(shares[seen] / middle[seen])).sum())

    return (relative_entropy(first) + relative_entropy(second)) / 2


def load_rows(expert_ids: np.ndarray, num_experts: int) -> list[dict[str, Any]]:
    """Per layer: least and greatest share of the fair load, and the number of dead experts."""
    rows = []
    for layer_idx, layer in enumerate(expert_ids):
        load = expert_shares(layer, num_experts) * num_experts
        rows.append(
            {
                "layer": layer_idx,
                "least_load": float(load.min()),
                "greatest_load": float(load.max()),
                "num_dead_experts": int((load < DEAD_SHARE).sum()),
            }
        )
    return rows


def halves_of_files(document_ids: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Masks of two random halves of the files, for each of the halvings."""
    files = np.unique(document_ids)
    generator = np.random.default_rng(seed)
    for _ in range(HALVINGS):
        chosen = generator.permutation(files)[: len(files) // 2]
        in_first = np.isin(document_ids, chosen)
        yield in_first, ~in_first


def divergence_rows(
    expert_ids: np.ndarray, stream: Stream, num_experts: int, seed: int
) -> list[dict[str, Any]]:
    """Per layer: how far docstrings and comments are routed from code, beside the noise floor.

    Args:
        expert_ids: [layers, tokens - 1, top_k]
        stream: What was routed.
        num_experts: Experts a layer has.
        seed: Of the random halvings.

    Returns:
        One row a layer, Jensen-Shannon divergences in bits; the floor is that between the code of
        two random halves of the files, its mean and greatest over `HALVINGS` halvings.
    """
    kinds, document_ids = stream.kinds[:-1], stream.document_ids[:-1]
    is_code = kinds == Kind.CODE
    halves = list(halves_of_files(document_ids, seed))
    rows = []
    for layer_idx, layer in enumerate(expert_ids):
        code, docstring, comment = (
            expert_shares(layer[kinds == kind], num_experts)
            for kind in (Kind.CODE, Kind.DOCSTRING, Kind.COMMENT)
        )
        floors = [
            divergence_bits(
                expert_shares(layer[is_code & first], num_experts),
                expert_shares(layer[is_code & second], num_experts),
            )
            for first, second in halves
        ]
        known = [floor for floor in floors if floor is not None]
        rows.append(
            {
                "layer": layer_idx,
                "code_docstring": divergence_bits(code, docstring),
                "code_comment": divergence_bits(code, comment),
                "floor_mean": float(np.mean(known)) if known else None,
                "floor_greatest": max(known, default=None),
            }
        )
    return rows


def kind_counts(stream: Stream) -> dict[str, int]:
    """Tokens of each kind."""
    return {kind.name.lower(): int((stream.kinds == kind).sum()) for kind in Kind}


def describe_machine(device: str) -> dict[str, str]:
    """What the run ran on and with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
    }


def describe_model(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Sizes of the written model."""
    config = model.config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    unused = config.num_experts - config.num_experts_per_tok
    expert_size = 3 * config.hidden_size * config.moe_intermediate_size
    return {
        "num_layers": config.num_hidden_layers,
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "hidden_size": config.hidden_size,
        "expert_width": config.moe_intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "num_parameters": num_parameters,
        "num_active_parameters": num_parameters - config.num_hidden_layers * unused * expert_size,
        "weights_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


@torch.no_grad()
def continue_text(model: nn.Module, tokenizer: Tokenizer, prompt: str, num_tokens: int) -> str:
    """Greedy continuation of a prompt at the start of a file, the prompt included."""
    prompt_ids = [model.config.bos_token_id, *tokenizer.encode(prompt).ids]
    inputs = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens
    )
    return tokenizer.decode(output[0].tolist(), skip_special_tokens=True)


def measure_losses(
    model: nn.Module,
    train: Stream,
    sample: Stream,
    held_out: Stream,
    held_out_texts: Sequence[str],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Losses of the written model beside two baselines that know only frequencies."""
    cut = args.sequence_length, args.batch_size
    held_out_nats = mean_nats(model, held_out.token_ids, *cut)
    train_nats = mean_nats(model, sample.token_ids, *cut)
    unigram = unigram_nats(train.token_ids, held_out.token_ids, model.config.vocab_size)
    return {
        "held_out_nats_per_token": held_out_nats,
        "held_out_bits_per_byte": bits_per_byte(held_out_nats, held_out),
        "train_bits_per_byte": bits_per_byte(train_nats, sample),
        "train_sample_bytes": sample.num_bytes,
        "unigram_bits_per_byte": bits_per_byte(unigram, held_out),
        "byte_entropy_bits_per_byte": byte_entropy(held_out_texts),
    }


def measure_routing(model: nn.Module, held_out: Stream, args: argparse.Namespace) -> dict[str, Any]:
    """Load of the experts on held-out text, and how it differs between kinds of text."""
    expert_ids = routed_experts(model, held_out.token_ids, args.sequence_length, args.batch_size)
    return {
        "token_counts": kind_counts(held_out),
        "load": load_rows(expert_ids, args.experts),
        "divergence": divergence_rows(expert_ids, held_out, args.experts, args.seed),
    }


def markdown_table(rows: Sequence[dict[str, Any]], headings: Sequence[str]) -> str:
    """Rows of equal keys as a Markdown table under the given headings."""

    def cell(value: float | int | str | None) -> str:
        if value is None:
            return "n/a"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = [headings, ["---"] * len(headings)]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraph(text: str) -> str:
    """A paragraph wrapped anew, its values filled in."""
    return textwrap.fill(
        " ".join(text.split()), 100, break_on_hyphens=False, break_long_words=False
    )


def model_card(record: dict[str, Any]) -> str:
    """The model card, every number of it from the record of the run."""
    sections = [
        "# A small Qwen3-MoE trained on the Python standard library",
        paragraph("""A causal language model of the Qwen3-MoE architecture with its own byte-level
        BPE tokenizer, small enough to ship beside the code. It is for tests and demonstrations of
        expert prediction: its routing is learned, where that of random weights is not."""),
        *model_section(record["model"]),
        *training_section(record),
        *loss_section(record),
        *routing_section(record),
        *closing_sections(record),
    ]
    text = "\n\n".join(section for section in sections if section)
    return "\n".join(line.rstrip() for line in text.split("\n")) + "\n"


def model_section(model: dict[str, Any]) -> list[str]:
    """What the model is made of."""
    return [
        "## Architecture",
        paragraph(f"""`Qwen3MoeForCausalLM`: {model["num_layers"]} layers, all MoE,
        {model["num_experts"]} experts a layer of width {model["expert_width"]}, {model["top_k"]}
        routed per token (gate weights renormalised), hidden size {model["hidden_size"]},
        {model["num_heads"]} query and {model["num_kv_heads"]} key-value heads of
        {model["head_dim"]}, vocabulary {model["vocab_size"]}, tied embeddings,
        {model["max_positions"]} positions. {model["num_parameters"]:,} parameters, of which
        {model["num_active_parameters"]:,} act on a token; {model["weights_bytes"]:,} bytes of
        weights."""),
        paragraph("""The weights are stored in bfloat16; `config.json` says float32, because CPUs
        run that faster, so `from_pretrained` widens them unless it is told
        `dtype="bfloat16"`."""),
    ]


def training_section(record: dict[str, Any]) -> list[str]:
    """What the model was trained on, how, and for how long."""
    data, run, machine = record["data"], record["training"], record["environment"]
    limited = f"Limited by --max-documents {data['max_documents']}."
    packages = f"""Train holds {data["package_files"]:,} files ({data["package_bytes"]:,} bytes) of
        installed packages besides; the tokenizer did not see those."""
    return [
        "## Training",
        paragraph(f"""Text: the standard library's source of Python {machine["python"]}, without
        its tests and without `pydoc_data` (prose in one literal).
        Train: {data["train_files"]:,} files, {data["train_bytes"]:,} bytes,
        {data["train_tokens"]:,} tokens. Held-out: {data["held_out_files"]:,} files,
        {data["held_out_bytes"]:,} bytes, {data["held_out_tokens"]:,} tokens. {data["split_rule"]}
        The tokenizer saw train files only. {limited if data["max_documents"] else ""}
        {packages if data["package_files"] else ""}"""),
        paragraph(f"""{run["seconds"]:.0f} s on {machine["device"]} (weights and products in
        {run["compute_dtype"]}, AdamW on float32 copies): {run["steps"]:,} steps,
        {run["tokens"]:,} tokens, {run["epochs"]:.2f} epochs, {run["tokens_per_second"]:,.0f}
        tokens/s with the held-out evaluations between. Learning rate {run["learning_rate"]:g} with
        warm-up and cosine, weight decay {run["weight_decay"]:g}, dropout {run["dropout"]:g}, load
        balancing {run["aux_loss"]:g} (mean over layers), {run["batch_size"]} windows of
        {run["sequence_length"]} tokens a step, seed {run["seed"]}. Limited by {run["ended_by"]};
        the weights kept are those of the best held-out evaluation, at step {run["best_step"]:,}.
        torch {machine["torch"]}, transformers {machine["transformers"]}."""),
        f"```\n{record['command']}\n```",
    ]


def loss_section(record: dict[str, Any]) -> list[str]:
    """Losses of the written files beside what token and byte frequencies give."""
    loss, run = record["loss"], record["training"]
    rows = [
        {"what": "this model, held-out", "bits": loss["held_out_bits_per_byte"]},
        {"what": "this model, train", "bits": loss["train_bits_per_byte"]},
        {"what": "train's token frequencies, held-out", "bits": loss["unigram_bits_per_byte"]},
        {"what": "entropy of the held-out bytes", "bits": loss["byte_entropy_bits_per_byte"]},
    ]
    return [
        "## Loss",
        paragraph(f"""Bits per UTF-8 byte in windows of {run["sequence_length"]} tokens without
        overlap, the separators' loss included, measured on the files in this folder in float32.
        Train is a sample of {loss["train_sample_bytes"]:,} bytes. The held-out text also chose
        which weights to keep, so its loss is slightly flattered. Token frequencies are counted on
        train, add-one, under the same tokenizer."""),
        markdown_table(rows, ("what", "bits per byte")),
        paragraph(f"""Held-out: {loss["held_out_nats_per_token"]:.4f} nats per token
        ({loss["trained_nats_per_token"]:.4f} before the weights were written)."""),
    ]


def routing_section(record: dict[str, Any]) -> list[str]:
    """How evenly the experts are used, and whether kinds of text are routed apart."""
    routing, num_experts = record["routing"], record["model"]["num_experts"]
    counts = routing["token_counts"]
    return [
        "## Load of the experts on held-out text",
        paragraph(f"""1 is the fair load, 1/{num_experts} of the routing slots; an expert is dead
        below {DEAD_SHARE:g}."""),
        markdown_table(
            routing["load"],
            ("layer", "least load", "greatest load", f"dead experts of {num_experts}"),
        ),
        "## Routing of code, docstrings and comments",
        paragraph(f"""Jensen-Shannon divergence in bits between the expert loads of held-out tokens
        by kind: {counts["code"]:,} of code, {counts["docstring"]:,} of docstrings,
        {counts["comment"]:,} of comments ({counts["unknown"]:,} separators or unparsed). The floor
        is that between the code of two random halves of the files, over {HALVINGS} halvings: what
        differs by file alone."""),
        markdown_table(
            routing["divergence"],
            ("layer", "code, docstrings", "code, comments", "floor, mean", "floor, greatest"),
        ),
    ]


def closing_sections(record: dict[str, Any]) -> list[str]:
    """Limits, a sample and the licence."""
    sample = record["sample"]
    return [
        "## Limits",
        paragraph(f"""Tiny, and trained on one kind of text: good for showing that a pipeline works,
        and no evidence of the size of any effect in large models. Positions past
        {record["training"]["sequence_length"]} were not trained. What it writes looks like Python
        and is not to be run."""),
        f"Greedy continuation of `{sample['prompt']}`:",
        f"````python\n{sample['text']}\n````",
        "## Licence",
        paragraph("""The weights and the tokenizer derive from the source of CPython's standard
        library, which is under the PSF License Agreement
        (https://docs.python.org/3/license.html). The model is for tests and demonstrations."""),
    ]

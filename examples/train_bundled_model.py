"""Train a small Qwen3-MoE and its tokenizer on this machine's Python standard library.

    python examples/train_bundled_model.py --out runs/bundled_model

Training takes at most --minutes; the tokenizer and the measurements come on top. The folder then
holds the model, the tokenizer, training.json with what was measured, and a model card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bundled_model_report as report
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from foreroute.data.corpus import HELD_OUT_SHARE, stdlib_documents
from foreroute.data.document import Document

logger = logging.getLogger(__name__)

EOS, EOS_ID = "<eos>", 0
HEAD_DIM = 64
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 100
NUM_EVALUATIONS = 25
MAX_WRITTEN_DIFFERENCE = 0.02
"""Nats per token by which rounding to bfloat16 may move the held-out loss."""
SAMPLE_PROMPT = "def read_lines(path):"
BYTE_TOKENS = 256
DOCUMENTS_AT_ONCE = 256
LONGEST_PACKAGE_FILE = 200_000


class TrainingResult(NamedTuple):
    """How the training went."""

    steps: int
    tokens: int
    epochs: float
    seconds: float
    ended_by: str
    best_step: int
    history: list[dict[str, float]]
    """Held-out loss (nats per token, on the evaluated part) and where it was taken."""


def build_parser() -> argparse.ArgumentParser:
    """The command line; each flag's help says its unit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--overwrite", action="store_true", help="replace --out where it exists")
    add("--layers", type=int, default=8, help="layers, all MoE")
    add("--experts", type=int, default=32, help="experts per layer")
    add("--top-k", type=int, default=4, help="experts per token")
    add("--hidden", type=int, default=256, help="width of the residual stream")
    add("--expert-width", type=int, default=40, help="inner width of an expert")
    add("--heads", type=int, default=4, help=f"query heads of {HEAD_DIM}")
    add("--kv-heads", type=int, default=2, help=f"key-value heads of {HEAD_DIM}")
    add("--vocab", type=int, default=4096, help="tokens the tokenizer may have")
    add("--max-positions", type=int, default=2048, help="positions the config allows")
    add("--minutes", type=float, default=5, help="wall-clock limit of the training")
    add("--epochs", type=float, default=12, help="limit in passes over the train text")
    add("--sequence-length", type=int, default=512, help="tokens per window")
    add("--batch-size", type=int, default=0, help="windows per step; 0: 32 on cuda, 4 on cpu")
    add("--eval-tokens", type=int, default=0, help="0: all held-out on cuda, 4096 on cpu")
    add("--learning-rate", type=float, default=2e-3, help="greatest rate of AdamW")
    add("--aux-loss", type=float, default=0.02, help="weight of the load-balancing loss")
    add("--dropout", type=float, default=0.1, help="on embeddings, attention and expert outputs")
    add("--max-documents", type=int, default=0, help="train on the first so many files; 0: all")
    add("--package-megabytes", type=float, default=0, help="also train on installed packages' code")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--seed", type=int, default=0, help="of weights, windows and dropout")
    return parser


def find_mistake(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, as one line; None where nothing is."""
    may_be_zero = {"batch_size", "eval_tokens", "max_documents", "aux_loss", "dropout", "seed"}
    may_be_zero.add("package_megabytes")
    for name, value in vars(args).items():
        is_number = isinstance(value, int | float)
        flag = name.replace("_", "-")
        if is_number and name not in {*may_be_zero, "overwrite"} and not value > 0:
            return f"--{flag} must be greater than 0, got {value}"
        if is_number and not value >= 0:
            return f"--{flag} must be at least 0, got {value}"
    problems = {
        f"--device must be cpu or cuda, got {args.device}": args.device not in ("cpu", "cuda"),
        "--device cuda: this machine has none": args.device == "cuda"
        and not torch.cuda.is_available(),
        f"--top-k must be at most --experts {args.experts}": args.top_k > args.experts,
        "--heads must be a multiple of --kv-heads": args.heads % args.kv_heads != 0,
        "--hidden and --expert-width must be multiples of 8": args.hidden % 8 != 0
        or args.expert_width % 8 != 0,
        f"--vocab must be over {BYTE_TOKENS} (one per byte, and {EOS})": args.vocab <= BYTE_TOKENS,
        "--max-positions must be at least --sequence-length": args.max_positions
        < args.sequence_length,
        "--dropout must be in 0..1, 1 excluded": not 0 <= args.dropout < 1,
        f"{args.out} exists; add --overwrite to replace it": args.out.exists()
        and not args.overwrite,
    }
    return next((text for text, applies in problems.items() if applies), None)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments checked, and those left to the device filled in."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if mistake := find_mistake(args):
        parser.error(mistake)
    on_gpu = args.device == "cuda"
    args.batch_size = args.batch_size or (32 if on_gpu else 4)
    args.eval_tokens = args.eval_tokens or (sys.maxsize if on_gpu else 4096)
    return args


def read_documents(max_documents: int) -> tuple[list[Document], list[Document]]:
    """Train and held-out files; a tenth as many held-out ones where the number is limited.

    Raises:
        ValueError: If this Python has no standard library in source.
    """
    train, held_out = (list(stdlib_documents(split)) for split in ("train", "held-out"))
    if max_documents:
        train, held_out = train[:max_documents], held_out[: max(2, max_documents // 10)]
    if not train or not held_out:
        raise ValueError("this Python's standard library holds no .py files to train on")
    return train, held_out


def package_documents(megabytes: float) -> list[Document]:
    """Python files of the packages installed beside this interpreter, tests excluded.

    They come in hash order, a sample of all packages, up to so many megabytes of text; long files
    (tables, mostly) are left out.
    """
    root = Path(sysconfig.get_path("purelib"))
    names = [
        path.relative_to(root).as_posix()
        for path in (root.rglob("*.py") if megabytes else ())
        if not {"test", "tests", "testing"}.intersection(path.parts)
    ]
    found, size = [], 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size >= 1e6 * megabytes:
            break
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if text.strip() and len(text) <= LONGEST_PACKAGE_FILE:
            found.append(Document(name, text))
            size += num_bytes(found[-1])
    return found


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, lossless on any text, with `<eos>` as token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, device: str, has_kinds: bool = False
) -> report.Stream:
    """Encode documents and line them up, `<eos>` before, between and after them.

    Args:
        documents: What to pack.
        tokenizer: With `<eos>` as token 0.
        device: Where the token ids go.
        has_kinds: Whether to tell code, docstrings and comments apart (slow); else all unknown.

    Returns:
        The stream.
    """
    token_ids, document_ids, kinds = (
        [np.array([value])] for value in (EOS_ID, 0, int(report.Kind.UNKNOWN))
    )
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        some = documents[start : start + DOCUMENTS_AT_ONCE]
        encodings = tokenizer.encode_batch([document.text for document in some])
        for document_idx, (document, encoding) in enumerate(
            zip(some, encodings, strict=True), start
        ):
            num_tokens = len(encoding.ids)
            kinds_here = np.full(num_tokens + 1, report.Kind.UNKNOWN)
            if has_kinds:
                kinds_here[:-1] = report.token_kinds(document.text, encoding.offsets)
            token_ids.append(np.array([*encoding.ids, EOS_ID]))
            document_ids.append(np.full(num_tokens + 1, document_idx))
            kinds.append(kinds_here)
    return report.Stream(
        torch.from_numpy(np.concatenate(token_ids).astype(np.int64)).to(device),
        num_bytes=sum(num_bytes(document) for document in documents),
        document_ids=np.concatenate(document_ids),
        kinds=np.concatenate(kinds).astype(np.uint8),
    )


def num_bytes(document: Document) -> int:
    """UTF-8 bytes of a document's text."""
    return len(document.text.encode(errors="replace"))


def first_bytes(documents: Sequence[Document], limit: int) -> list[Document]:
    """The first documents, up to a number of bytes; they come in hash order, a fair sample."""
    sizes = np.cumsum([num_bytes(document) for document in documents])
    return list(documents[: max(1, int(np.searchsorted(sizes, limit, side="right")))])


def build_model(args: argparse.Namespace, vocab_size: int) -> Qwen3MoeForCausalLM:
    """A model with fresh weights, bfloat16 on cuda and float32 on cpu."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.expert_width * args.top_k,
        moe_intermediate_size=args.expert_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=HEAD_DIM,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=args.max_positions,
        tie_word_embeddings=True,
        router_aux_loss_coef=args.aux_loss,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model = Qwen3MoeForCausalLM(config).to(args.device)
    round_parameters(model, torch.bfloat16 if args.device == "cuda" else torch.float32)
    return model


def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters alone: `.to` would round the rotary frequencies, a buffer, with them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Load-balancing loss of the Switch Transformer, its mean over layers; top_k at balance.

    The one in transformers pools the layers first, so that one layer's busy expert 3 makes up
    for another's idle one.

    Args:
        router_logits: One tensor a layer, [tokens, experts].
        top_k: Experts per token.

    Returns:
        The loss, a scalar.
    """
    probabilities = torch.stack(tuple(router_logits)).float().softmax(dim=-1)
    num_layers, num_tokens, num_experts = probabilities.shape
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten(1)  # [layers, tokens * top_k]
    counts = torch.zeros(num_layers, num_experts, device=chosen.device)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float32))
    load = counts / num_tokens
    return num_experts * (load * probabilities.mean(dim=1)).sum(dim=-1).mean()


def training_loss(model: nn.Module, batch: Tensor, aux_loss: float) -> tuple[Tensor, Tensor]:
    """What to descend, and the next-token loss (nats) within it, for a [windows, tokens] batch."""
    # the whole model would work out transformers' balance loss too, which waits for the GPU
    output = model.model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state).float()  # [windows, tokens, vocabulary]
    nats = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
    return nats + aux_loss * balance, nats.detach()


def add_dropout(model: Qwen3MoeForCausalLM, rate: float) -> list[Any]:
    """Drop embeddings and what attention and experts add to the residual; returns the hooks."""

    def drop(module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return functional.dropout(output, rate, training=module.training)

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn.o_proj, layer.mlp.experts]
    return [module.register_forward_hook(drop) for module in modules] if rate else []


def choose_experts_implementation(model: Qwen3MoeForCausalLM, batch: Tensor) -> str:
    """Set grouped matrix products, or the plain loop where this machine cannot do them."""
    for name in ("grouped_mm", "eager"):
        model.set_experts_implementation(name)
        try:
            training_loss(model.train(), batch, 0.0)[0].backward()
            if batch.is_cuda:
                torch.cuda.synchronize()
        except RuntimeError as error:
            if name == "eager":
                raise
            logger.warning("grouped_mm does not run here, using eager: %s", error)
        else:
            break
        finally:
            model.zero_grad(set_to_none=True)
    logger.info("experts run by %s", name)
    return name


class MasterWeights:
    """Float32 copies of a model's parameters: AdamW updates them, the model gets them rounded.

    The model itself is in bfloat16 on cuda, for autocast does not reach grouped_mm there.
    """

    def __init__(self, model: nn.Module, learning_rate: float, fused: bool) -> None:
        self.parameters = list(model.parameters())
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        decayed = [master for master in self.masters if master.dim() > 1]
        norms = [master for master in self.masters if master.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": norms, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take the parameters' gradients, clip them to norm 1, update, and clear them."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """The model's parameters as they are now."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Put a snapshot into the model."""
        torch._foreach_copy_(self.parameters, snapshot)


def shuffled_windows(
    token_ids: Tensor, sequence_length: int, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Batches of windows without end; each epoch cuts the stream at another offset.

    Yields:
        [windows, sequence_length + 1]; the last of an epoch may have fewer windows.
    """
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(sequence_length + 1, device=token_ids.device)
    while True:
        room = len(token_ids) - sequence_length - 1
        offset = int(torch.randint(min(sequence_length, room + 1), (), generator=generator))
        num_windows = (room - offset) // sequence_length + 1
        order = torch.randperm(num_windows, generator=generator)
        starts = (order * sequence_length + offset).to(token_ids.device)
        for chosen in starts.split(batch_size):
            yield token_ids[chosen[:, None] + span]


def rate_at(step: int, progress: float, args: argparse.Namespace, num_steps: int) -> float:
    """Learning rate: linear warm-up over steps, cosine to 0 over the progress, 0..1."""
    warmup = min(1.0, (step + 1) / max(1, min(WARMUP_STEPS, num_steps // 10)))
    return args.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Evaluations:
    """Held-out losses along the training, and the weights that gave the least."""

    def __init__(self, model: nn.Module, held_out: Tensor, args: argparse.Namespace) -> None:
        self.model, self.held_out = model, held_out
        self.cut = args.sequence_length, args.batch_size
        self.history: list[dict[str, float]] = []
        self.best_nats, self.best_step = math.inf, 0
        self.best: list[Tensor] | None = None

    def is_due(self, progress: float) -> bool:
        """Whether the next of the evaluations has been reached at a progress, 0..1."""
        return progress >= min(1, (len(self.history) + 1) / NUM_EVALUATIONS)

    def evaluate(self, weights: MasterWeights, **row: float) -> bool:
        """Take the loss, beside what the row says of the moment; False where it is not finite."""
        nats = report.mean_nats(self.model, self.held_out, *self.cut)
        self.history.append({**row, "held_out_nats_per_token": nats})
        if nats < self.best_nats:
            self.best_nats, self.best_step = nats, int(row["step"])
            self.best = weights.snapshot()
        return math.isfinite(nats)


def train_model(
    model: Qwen3MoeForCausalLM, train: Tensor, held_out: Tensor, args: argparse.Namespace
) -> TrainingResult:
    """Train until --minutes or --epochs are over, and leave the best held-out weights in.

    Args:
        model: On the device of the tokens.
        train: [tokens]
        held_out: [tokens]; the part that is evaluated along the way.
        args: The command line.

    Returns:
        How it went.

    Raises:
        RuntimeError: If no evaluation gave a finite loss.
    """
    weights = MasterWeights(model, args.learning_rate, fused=args.device == "cuda")
    evaluations = Evaluations(model, held_out, args)
    hooks = add_dropout(model, args.dropout)
    num_steps = math.ceil(args.epochs * len(train) / args.sequence_length / args.batch_size)
    batches = shuffled_windows(train, args.sequence_length, args.batch_size, args.seed)
    start, step, tokens, progress, is_finite = time.monotonic(), 0, 0, 0.0, True
    bar = tqdm(total=num_steps, unit="step", mininterval=5)
    while progress < 1 and is_finite:
        by_time = (time.monotonic() - start) / 60 / args.minutes
        by_epochs = (step + 1) / num_steps
        progress = max(by_time, by_epochs)
        batch = next(batches)
        loss, nats = training_loss(model.train(), batch, args.aux_loss)
        loss.backward()
        weights.step(rate_at(step, progress, args, num_steps))
        step, tokens = step + 1, tokens + batch[:, 1:].numel()
        bar.update()
        if evaluations.is_due(progress):
            train_nats, seconds = nats.item(), time.monotonic() - start
            moment = {"step": step, "tokens": tokens, "seconds": seconds}
            is_finite = evaluations.evaluate(weights, **moment, train_nats_per_token=train_nats)
            bar.set_postfix_str(
                f"loss {train_nats:.3f}, best held-out {evaluations.best_nats:.3f}, "
                f"{tokens / seconds / 1000:.1f}k tokens/s"
            )
    bar.close()
    for hook in hooks:
        hook.remove()
    if evaluations.best is None:
        raise RuntimeError("The held-out loss was never finite. Lower --learning-rate.")
    weights.restore(evaluations.best)
    return TrainingResult(
        steps=step,
        tokens=tokens,
        epochs=tokens / len(train),
        seconds=time.monotonic() - start,
        ended_by="time" if by_time > by_epochs else "epochs",
        best_step=evaluations.best_step,
        history=evaluations.history,
    )


def save_model(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Write bfloat16 weights, config and tokenizer to a folder beside --out, then rename it."""
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID
    )
    round_parameters(model, torch.bfloat16)
    model.save_pretrained(partial)
    config_path = partial / "config.json"
    config = json.loads(config_path.read_text())
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=args.max_positions,
    ).save_pretrained(partial)
    if args.out.exists():
        shutil.rmtree(args.out)
    partial.rename(args.out)


def load_written(folder: Path, device: str) -> nn.Module:
    """The model as `from_pretrained` gives it by default, with the plain loop over experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return model.to(device).eval()


def check_written(
    folder: Path, trained_nats: float, written_nats: float, text: str, token_ids: list[int]
) -> None:
    """Refuse files that do not give back what was trained.

    Raises:
        RuntimeError: If the loss moved, or the tokenizer encodes or decodes otherwise.
    """
    if abs(trained_nats - written_nats) > MAX_WRITTEN_DIFFERENCE:
        raise RuntimeError(
            f"The model in {folder} has a held-out loss of {written_nats:.4f} nats per token; "
            f"the trained one had {trained_nats:.4f}."
        )
    loaded = AutoTokenizer.from_pretrained(folder)
    if loaded(text)["input_ids"] != token_ids or loaded.decode(token_ids) != text:
        raise RuntimeError(f"The tokenizer in {folder} does not encode as the trained one.")


def describe_run(args: argparse.Namespace, result: TrainingResult, experts: str) -> dict[str, Any]:
    """Settings and course of the training."""
    return {
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "learning_rate": args.learning_rate,
        "aux_loss": args.aux_loss,
        "dropout": args.dropout,
        "seed": args.seed,
        "minutes_limit": args.minutes,
        "epochs_limit": args.epochs,
        "weight_decay": WEIGHT_DECAY,
        "compute_dtype": "bfloat16" if args.device == "cuda" else "float32",
        "experts_implementation": experts,
        "tokens_per_second": result.tokens / result.seconds,
        **result._asdict(),
    }


def describe_data(
    train_documents: Sequence[Document],
    held_out_documents: Sequence[Document],
    train: report.Stream,
    held_out: report.Stream,
    max_documents: int,
    package_documents: Sequence[Document],
) -> dict[str, Any]:
    """Size and origin of the text; `train_files` counts those of the standard library alone."""
    return {
        "train_files": len(train_documents),
        "train_bytes": train.num_bytes,
        "train_tokens": len(train.token_ids),
        "held_out_files": len(held_out_documents),
        "held_out_bytes": held_out.num_bytes,
        "held_out_tokens": len(held_out.token_ids),
        "split_rule": "A file is held out if the SHA-256 of its path below the library's root, "
        f"as a fraction of its range, is under {HELD_OUT_SHARE}.",
        "max_documents": max_documents,
        "package_files": len(package_documents),
        "package_bytes": sum(map(num_bytes, package_documents)),
        "held_out_names": [document.name for document in held_out_documents],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, write, load again, measure; returns the record that training.json holds.

    Raises:
        ValueError: If there is too little text for one window.
        RuntimeError: If the written files do not give back what was trained.
    """
    torch.manual_seed(args.seed)
    train_documents, held_out_documents = read_documents(args.max_documents)
    logger.info("training the tokenizer on %d files", len(train_documents))
    tokenizer = train_tokenizer(train_documents, args.vocab)
    extra = package_documents(args.package_megabytes)
    train = pack([*train_documents, *extra], tokenizer, args.device)
    logger.info("%s tokens to train on", f"{len(train.token_ids):,}")
    held_out = pack(held_out_documents, tokenizer, args.device, has_kinds=True)
    if min(len(train.token_ids), len(held_out.token_ids)) <= args.sequence_length + 1:
        raise ValueError(f"--sequence-length {args.sequence_length} is longer than the text")
    model = build_model(args, tokenizer.get_vocab_size())
    first_batch = train.token_ids[: args.sequence_length + 1][None]
    experts = choose_experts_implementation(model, first_batch)
    evaluated = held_out.token_ids[: args.eval_tokens]
    result = train_model(model, train.token_ids, evaluated, args)
    cut = args.sequence_length, args.batch_size
    trained_nats = report.mean_nats(model, held_out.token_ids, *cut)
    save_model(model, tokenizer, args)
    del model
    logger.info("written; measuring what %s holds", args.out)
    written = load_written(args.out, args.device)
    sample = pack(first_bytes(train_documents, held_out.num_bytes), tokenizer, args.device)
    texts = [document.text for document in held_out_documents]
    loss = report.measure_losses(written, train, sample, held_out, texts, args)
    loss["trained_nats_per_token"] = trained_nats
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "model": report.describe_model(written, args.out),
        "data": describe_data(
            train_documents, held_out_documents, train, held_out, args.max_documents, extra
        ),
        "training": describe_run(args, result, experts),
        "loss": loss,
        "routing": report.measure_routing(written, held_out, args),
        "environment": report.describe_machine(args.device),
        "sample": {
            "prompt": SAMPLE_PROMPT,
            "text": report.continue_text(written, tokenizer, SAMPLE_PROMPT, num_tokens=128),
        },
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "README.md").write_text(report.model_card(record))
    check_written(
        args.out,
        trained_nats,
        loss["held_out_nats_per_token"],
        texts[0],
        tokenizer.encode(texts[0]).ids,
    )
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the last line printed is the folder written."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        record = run(args)
    except ValueError as error:
        build_parser().error(str(error))
    loss, model = record["loss"], record["model"]
    print(
        f"held-out {loss['held_out_bits_per_byte']:.3f} bits per byte, "
        f"train {loss['train_bits_per_byte']:.3f}, "
        f"token frequencies {loss['unigram_bits_per_byte']:.3f}; "
        f"{model['num_parameters']:,} parameters in {model['weights_bytes']:,} bytes"
    )
    print(args.out)


if __name__ == "__main__":
    main()

"""`collect_traces`: checks what the user asks for, then has it recorded."""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from foreroute.data.adapters import (
    MoEModel,
    discover,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from foreroute.data.collection import Collection
from foreroute.data.corpus import Split
from foreroute.data.layout import OPTIONAL_FIELDS
from foreroute.data.manifest import (
    MANIFEST_FILE,
    Speculation,
    TextOrigin,
    TraceManifest,
    read_manifest,
)
from foreroute.data.recording_run import run_collection
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import package_versions
from foreroute.estimators.byte_sizes import parse_bytes
from foreroute.estimators.forms import FREE_FORMS
from foreroute.estimators.output import claim, require_free
from foreroute.estimators.ranks import ALONE, Ranks, joined_ranks

logger = logging.getLogger(__name__)

EXPORTABLE_SEQUENCES = 26
"""Fewest sequences of which three are held out, which export-estimator needs."""
LOADING_FLAGS = ("dtype", "device", "device_map", "trust_remote_code")
FREE_FORMS_ONLY = (
    f"Only estimators without an anchor ({', '.join(FREE_FORMS)}) can be trained on them."
)


@dataclass(frozen=True, kw_only=True)
class CollectRequest:
    """What a user asks for, checked before anything is loaded; fields as `collect_traces` says."""

    out: Path
    model: str = "bundled"
    revision: str | None = None
    dataset: str = "python-stdlib"
    column: str = ""
    prompt_tokens: str = ""
    tokens: int = 200_000
    split: str = "train"
    sequence_length: int = 512
    source: str = "dataset"
    generate: int = 256
    generated_share: float = 0.0
    tokens_per_sequence: int | None = None
    record: str = ""
    states_dtype: str = "auto"
    batch_size: int = 8
    shard_tokens: int = 16384
    max_bytes: str | None = None
    seed: int = 0
    overwrite: bool = False
    speculation: Speculation | None = None
    """Under what the model generates, where an engine runs it."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: If one cannot be used.
        """
        for name in ("tokens", "sequence_length", "batch_size", "shard_tokens", "generate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.tokens_per_sequence is not None and self.tokens_per_sequence < 1:
            raise ValueError(
                f"tokens_per_sequence must be at least 1, not {self.tokens_per_sequence}."
            )
        if not 0 <= self.generated_share <= 1:
            raise ValueError(
                f"generated_share must be between 0 and 1, not {self.generated_share}."
            )
        if self.prompt_tokens and (self.source == "generated" or self.generated_share):
            raise ValueError(
                "--prompt-tokens is for rows that a model has continued already; leave out "
                "--source generated and --generated-share."
            )
        if self.source == "generated" and self.generated_share:
            raise ValueError(
                "--generated-share mixes text and continuation; with --source generated give "
                "--generate instead."
            )
        if self.source == "generated" and self.generate >= self.sequence_length:
            raise ValueError(
                f"--generate {self.generate} leaves no prompt in sequences of "
                f"{self.sequence_length} tokens; raise --sequence-length or lower --generate."
            )
        for name, value, known in (
            ("split", self.split, get_args(Split)),
            ("source", self.source, get_args(TextOrigin)),
        ):
            if value not in known:
                raise ValueError(f"Unknown {name} {value!r}; known: {', '.join(known)}.")
        _parse_record(self.record)
        if self.max_bytes is not None:
            parse_bytes(self.max_bytes)
        if self.states_dtype != "int8":
            resolve_dtype(self.states_dtype)

    def manifest(self, moe: MoEModel) -> TraceManifest:
        """The manifest of traces of a model, before anything is recorded."""
        anchors = moe.found_anchors
        is_generated = self.source == "generated"
        manifest = TraceManifest(
            geometry=moe.geometry,
            model=self.model,
            revision=self.revision or "",
            dataset=self.dataset,
            column=self.column,
            prompt_tokens=self.prompt_tokens,
            split=self.split,
            tokens=self.tokens,
            sequence_length=self.sequence_length,
            generated_share=self.generated_share,
            source=self.source,  # type: ignore[arg-type]
            generate=self.generate if is_generated else 0,
            speculation=self.speculation,
            tokens_per_sequence=self.tokens_per_sequence or 0,
            record=_parse_record(self.record),
            dtype=_name_of(moe.model.dtype),
            states_dtype=self._stored_dtype(moe.model.dtype),
            device=moe.model.device.type,
            batch_size=self.batch_size,
            shard_sequences=1,
            seed=self.seed,
            norm_kind=anchors.norm_kind if anchors else "none",
            norm_eps=anchors.norm_eps if anchors else 0.0,
            has_selection_bias=anchors is not None and anchors.selection_bias is not None,
            anchors_problem=moe.anchors_problem,
            command="",
            versions=package_versions(),
        )
        per_shard = max(1, self.shard_tokens // manifest.stored_length)
        manifest = dataclasses.replace(manifest, shard_sequences=per_shard)
        return dataclasses.replace(manifest, command=_command(manifest))

    def require_free(self) -> None:
        """Try the place now: refuse a folder that holds anything but traces to go on with.

        Raises:
            ValueError: If it does, or they are damaged, and `overwrite` is off; or somebody else
                writes there.
            OSError: If nothing can be written there.
        """
        with claim(self.out):
            if not self.overwrite and (self.out / MANIFEST_FILE).is_file():
                read_manifest(self.out)  # says what is wrong with it, before a model is loaded
            else:
                given = self.speculation.bundle if self.speculation else None
                inputs = (self.model, self.dataset, given)
                require_free(self.out, "traces", overwrite=self.overwrite, inputs=inputs)

    def _stored_dtype(self, model_dtype: torch.dtype) -> str:
        if self.states_dtype == "int8":
            return "int8"
        dtype = resolve_dtype(self.states_dtype)
        if not isinstance(dtype, torch.dtype):
            dtype = torch.bfloat16 if model_dtype == torch.float32 else model_dtype
        return _name_of(dtype)


def collect_traces(
    *,
    model: str = CollectRequest.model,
    revision: str | None = CollectRequest.revision,
    dataset: str = CollectRequest.dataset,
    column: str = CollectRequest.column,
    prompt_tokens: str = CollectRequest.prompt_tokens,
    out: Path,
    tokens: int = CollectRequest.tokens,
    split: str = CollectRequest.split,
    sequence_length: int = CollectRequest.sequence_length,
    source: str = CollectRequest.source,
    generate: int = CollectRequest.generate,
    generated_share: float = CollectRequest.generated_share,
    tokens_per_sequence: int | None = CollectRequest.tokens_per_sequence,
    record: str = CollectRequest.record,
    dtype: str = "auto",
    states_dtype: str = CollectRequest.states_dtype,
    device: str = "auto",
    device_map: str | None = None,
    batch_size: int = CollectRequest.batch_size,
    shard_tokens: int = CollectRequest.shard_tokens,
    max_bytes: str | None = CollectRequest.max_bytes,
    seed: int = CollectRequest.seed,
    overwrite: bool = CollectRequest.overwrite,
    trust_remote_code: bool = False,
) -> Traces:
    """Record what a Mixture-of-Experts model routes on a dataset, or on what it makes of it.

    Killed at any point, the same command goes on at the first unfinished shard.

    Args:
        model: `bundled`, a local folder, or a Hub id.
        revision: Branch, tag or commit of a Hub id, for weights and tokenizer.
        dataset: `python-stdlib`; a file, zip archive or folder of text, JSON, CSV, Parquet or
            Arrow; or a Hub id. Chats go through the tokenizer's template; ids are taken as such.
        column: Column of its tables that holds text, chats or token ids; found unless said.
        prompt_tokens: Where the prompt of each row of token ids ends that a model has continued:
            a column of numbers, or one number. Such rows are recorded as they are, one sequence
            each, cut at --sequence-length; shorter ones are left out.
        out: Folder the traces go to.
        tokens: Tokens to record, rounded up to whole sequences.
        split: `train` or `held-out`; documents are assigned by a hash of their names.
        sequence_length: Tokens per sequence, prompt and continuation together.
        source: `dataset` records its text; `generated` takes the start of each sequence as prompt
            and records what the model generates after it, while it does.
        generate: Tokens to generate, and to record, of each sequence (source generated only).
        generated_share: Share of each sequence, 0 to 1, that is the model's own sampled
            continuation, recorded after the text it continues (source dataset only).
        tokens_per_sequence: Record only so many tokens of each sequence, at random positions.
        record: More to record, a comma list: layer-input (the residual that enters a layer),
            readout (the next layer's attention, run early).
        dtype: The model's dtype: auto (what the checkpoint asks for), float32, bfloat16, float16.
        states_dtype: Dtype in which states are stored; auto is the model's, or bfloat16 where the
            model's is float32; int8 has one scale per token.
        device: auto, cpu or cuda.
        device_map: Spread the model's layers over the host's GPUs: auto, balanced or sequential
            (by accelerate); they must hold it whole.
        batch_size: Sequences per forward pass.
        shard_tokens: Tokens per shard, rounded down to whole sequences.
        max_bytes: Stop cleanly before the traces exceed this (500MB, 2GiB).
        seed: Seed of the sampled continuations and positions.
        overwrite: Replace traces that lie at `out` already.
        trust_remote_code: Run code that came with the checkpoint.

    Returns:
        The finished traces.

    Raises:
        FileNotFoundError: If model or dataset do not exist.
        ValueError: If an argument, the model or the dataset cannot be used, the disk is too small,
            or `out` holds something else. Nothing is written then.
    """
    asked = {name: value for name, value in locals().items() if name not in LOADING_FLAGS}
    request = CollectRequest(**asked)
    with joined_ranks() as ranks:
        ranks.first(request.require_free)
        loaded = load_model(
            model,
            dtype=dtype,
            device=ranks.device(resolve_device(device)),
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        moe = discover(loaded, model)
        tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        return collect_from(moe, tokenizer, request, ranks)


def collect_from(
    moe: MoEModel, tokenizer: Any, request: CollectRequest, ranks: Ranks = ALONE
) -> Traces:
    """Record from a model that is loaded; it may be one that an engine runs.

    Args:
        moe: The model.
        tokenizer: Its tokenizer.
        request: What to record, and where to.
        ranks: The processes that share the work.

    Returns:
        As `collect_traces`.

    Raises:
        ValueError: As `collect_traces`.
    """
    logger.info("Model: %s", moe.geometry.describe())
    if moe.found_anchors is None:
        logger.info("No copies of its routers: %s. %s", moe.anchors_problem, FREE_FORMS_ONLY)
    manifest = request.manifest(moe)
    if math.ceil(manifest.tokens / manifest.stored_length) < EXPORTABLE_SEQUENCES:
        logger.info(
            "So few sequences can be trained on, but what is trained cannot be exported: that "
            "takes at least %d sequences (a tenth is held out, and three of them are needed).",
            EXPORTABLE_SEQUENCES,
        )
    byte_limit = None if request.max_bytes is None else parse_bytes(request.max_bytes)
    collection = Collection(moe, tokenizer, manifest, request.out)
    return run_collection(collection, byte_limit, overwrite=request.overwrite, ranks=ranks)


def _parse_record(text: str) -> tuple[str, ...]:
    """Optional fields of `RoutingRecord` that a comma list names, in the order they are stored."""
    asked = {part.strip().replace("-", "_") for part in text.split(",") if part.strip()}
    if asked - set(OPTIONAL_FIELDS):
        known = ", ".join(OPTIONAL_FIELDS).replace("_", "-")
        raise ValueError(f"Unknown --record {text!r}; known: {known}.")
    return tuple(name for name in OPTIONAL_FIELDS if name in asked)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _command(manifest: TraceManifest) -> str:
    """The command that makes these traces, wherever they go."""
    flags = "model dataset tokens split sequence_length generated_share dtype states_dtype"
    typed = [(name.replace("_", "-"), str(getattr(manifest, name))) for name in flags.split()]
    typed += [("batch-size", str(manifest.batch_size)), ("seed", str(manifest.seed))]
    typed.append(("shard-tokens", str(manifest.shard_sequences * manifest.stored_length)))
    for flag in ("revision", "column", "prompt_tokens"):
        if getattr(manifest, flag):
            typed.append((flag.replace("_", "-"), getattr(manifest, flag)))
    if manifest.source != "dataset":
        typed += [("source", manifest.source), ("generate", str(manifest.generate))]
    if manifest.tokens_per_sequence:
        typed.append(("tokens-per-sequence", str(manifest.tokens_per_sequence)))
    if manifest.record:
        typed.append(("record", ",".join(manifest.record).replace("_", "-")))
    name = ["collect-traces"]
    if manifest.speculation:
        name = ["foreroute", "collect"]
        given = dataclasses.asdict(manifest.speculation)
        shown = ("bundle", "on_miss", "expert_slots")
        typed += [(flag.replace("_", "-"), given[flag]) for flag in shown]
    return shlex.join([*name, *[part for n, v in typed for part in (f"--{n}", v)]])

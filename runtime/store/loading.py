"""Loads a model so that its experts go from the checkpoint's files straight to their host rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from foreroute.data.adapters import MoEModel, discover, load_config, resolve_dtype, resolve_model
from foreroute.data.adapters.checkpoint import ExpertReader, checkpoint_files, float_dtypes
from foreroute.data.adapters.model_class import auto_class
from foreroute.data.adapters.weightless import (
    ParameterShape,
    experts_by_path,
    experts_without_weights,
    outline,
    parameter_shapes,
)
from foreroute.estimators.host_memory import require_host_memory
from foreroute.runtime.store.encodings import Encoder, encoder_named, native_encoder
from foreroute.runtime.store.host_store import HostExpertStore, RowLayout, RowWriter


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which checkpoint to load, and how."""

    name: str
    """`bundled`, a local folder or a Hub id."""
    dtype: str | torch.dtype = "auto"
    """`auto`, `float32`, `bfloat16`, `float16`, or one of torch's."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """Run code that came with the checkpoint."""
    expert_dtype: str = "auto"
    """How experts are stored: `auto` (as the checkpoint has them), bf16, fp8, int8 or int4."""


def load_with_host_experts(source: Source, *, is_pinned: bool) -> tuple[MoEModel, HostExpertStore]:
    """Load a model on the CPU; its experts exist once, in the store.

    Args:
        source: What to load.
        is_pinned: Page-lock the store's memory.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it cannot be read, is no MoE that is supported, or does not fit in memory.
    """
    config = load_config(
        source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    dtype = _dtype(source, config)
    encoder = store_encoder(config, source.expert_dtype)
    shapes = outline(config, dtype, trust_remote_code=source.trust_remote_code)
    experts = experts_by_path(shapes)
    if not experts:
        discover(shapes, source.name)  # says why there are none
    _, other_bytes = _bytes_of(shapes)
    stored_bytes = sum(
        RowLayout.of(module, encoder).row_bytes * len(next(module.parameters()))
        for module in experts.values()
    )
    require_host_memory(stored_bytes, other_bytes, model_name=source.name)
    files = _files(source)  # after the check: this downloads them
    with experts_without_weights({type(module) for module in experts.values()}):
        model = _load_the_rest(source, config, dtype)
    moe = discover(model, source.name)
    all_experts = [layer.experts for layer in moe.layers]
    store = HostExpertStore(all_experts, is_pinned=is_pinned, encoder=encoder)
    fill_store(store, moe, files)
    return moe, store


def require_room_for_whole(source: Source) -> None:
    """Refuse a model that the host cannot hold the way stock transformers loads it.

    Raises:
        ValueError: If less memory is available; gives the numbers.
    """
    config = load_config(
        source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    dtype = _dtype(source, config)
    shapes = outline(config, dtype, trust_remote_code=source.trust_remote_code)
    require_host_memory(
        *_bytes_of(shapes),
        model_name=source.name,
        remedy="The stock model is loaded whole, in full precision; foreroute generate is not.",
    )


def _bytes_of(shapes: Any) -> tuple[int, int]:
    """Of all experts, and of everything else, as the model has them."""
    experts = experts_by_path(shapes).values()
    expert_bytes = sum(p.nbytes for module in experts for p in module.parameters())
    return expert_bytes, sum(p.nbytes for p in shapes.parameters()) - expert_bytes


def _files(source: Source) -> dict[str, Path]:
    return checkpoint_files(resolve_model(source.name), source.revision)


def _dtype(source: Source, config: Any) -> torch.dtype:
    """As transformers decides for `auto`: the config's, else the checkpoint's first."""
    known = resolve_dtype(source.dtype)
    if isinstance(known, torch.dtype):
        return known
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return named or next(float_dtypes(_files(source)), torch.float32)


def store_encoder(config: Any, expert_dtype: str = "auto") -> Encoder | None:
    """How the experts will be stored; a checkpoint in fewer bits keeps its own way.

    Args:
        config: The model's; if its checkpoint is quantised, it is told to dequantise all else.
        expert_dtype: What the user asked for.

    Returns:
        None where experts are stored as the model has them.

    Raises:
        ValueError: If the checkpoint's way is not known, or another was asked for.
    """
    chosen = encoder_named(expert_dtype)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return chosen
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    native = native_encoder(quantization)
    if chosen is not None:
        raise ValueError(
            f"The checkpoint comes in {quantization['quant_method']} already, which is kept; "
            f"expert_dtype={expert_dtype} needs a checkpoint in full precision."
        )
    # Everything but the experts is dequantised by transformers while it loads.
    config.quantization_config = quantization | {"dequantize": True}
    return native


def _load_the_rest(source: Source, config: Any, dtype: torch.dtype) -> Any:
    from transformers.utils import logging

    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it would list every expert's tensor as unexpected
    logging.disable_progress_bar()
    try:
        model = auto_class(config, source.name).from_pretrained(
            resolve_model(source.name),
            config=config,
            dtype=dtype,
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, RuntimeError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"Model {source.name} cannot be read: {first_line}") from error
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()
    # Parameters keep requires_grad as stock's do: torch's matmul looks at it to decide whether to
    # fold a batch into rows, and the two ways round differently (jamba's projections).
    return model.eval()


def fill_store(store: HostExpertStore, moe: MoEModel, files: Mapping[str, Path]) -> None:
    """Read all experts into the store's rows, with a progress bar in bytes on a terminal.

    Args:
        store: Allocated, not filled.
        moe: The model; its experts have no weights.
        files: As `checkpoint_files` returns them.

    Raises:
        ValueError: If the checkpoint lacks part of an expert.
    """
    writers: dict[str, tuple[RowWriter, str]] = {}
    targets: dict[str, ParameterShape] = {}
    for layer, layout, rows in zip(moe.layers, store.layouts, store.rows, strict=True):
        writer = RowWriter(layout, rows)
        shapes = parameter_shapes(layer.experts)
        if layout.is_native:  # the checkpoint has the stored parts themselves
            shapes = {
                name: ParameterShape((len(rows), *spec.shape), spec.dtype)
                for name, spec in layout.parameters.items()
            }
        for name, shape in shapes.items():
            writers[f"{layer.name}.{name}"] = (writer, name)
            targets[f"{layer.name}.{name}"] = shape
    sizes = {name: math.prod(target.shape) for name, target in targets.items()}
    item_bytes = {name: target.dtype.itemsize for name, target in targets.items()}
    done = 0
    with _byte_progress("experts", sum(sizes[n] * item_bytes[n] for n in sizes)) as progress:

        def put(target: str, expert_id: int, row: int, part: Tensor) -> None:
            nonlocal done
            writer, name = writers[target]
            writer.put(name, expert_id, row, part)
            done += part.numel()
            progress.advance(progress.task_ids[0], part.numel() * item_bytes[target])

        ExpertReader(moe.model, files, targets).read(put)
    if done != sum(sizes.values()):
        raise ValueError(
            f"The checkpoint holds {done} numbers of experts, the model has {sum(sizes.values())}; "
            "some are missing or have another shape."
        )


@contextlib.contextmanager
def _byte_progress(what: str, num_bytes: int) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        bar.add_task(what, total=num_bytes)
        yield bar

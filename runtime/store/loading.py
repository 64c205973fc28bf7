"""Loads a model so that its experts go from the checkpoint's files straight to their host rows."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from foreroute.data.adapters import MoEModel, discover
from foreroute.data.adapters.loading import loading_alone
from foreroute.data.adapters.weightless import ParameterShape, parameter_shapes, weightless
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.encodings import TooManyExceptions, without
from foreroute.runtime.store.expert_reader import ExpertReader
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.row_writer import RowWriter

logger = logging.getLogger(__name__)


def load_with_host_experts(
    checkpoint: Checkpoint, device: torch.device
) -> tuple[MoEModel, HostExpertStore]:
    """Load a model on the CPU; its experts exist once, in the store.

    Args:
        checkpoint: What to load.
        device: Where it will run; memory for a GPU is page-locked, and the GPU encodes.

    Raises:
        ValueError: If it cannot be read, is no MoE that is supported, or does not fit in memory.
    """
    with loading_alone():
        checkpoint.require_host_memory()  # before the files: they may be downloaded
        moe = discover(_load_the_rest(checkpoint), checkpoint.name)
        store = filled_store(moe, checkpoint, device)
    return moe, store


def filled_store(moe: MoEModel, checkpoint: Checkpoint, device: torch.device) -> HostExpertStore:
    """A store with all experts, each parameter in the checkpoint's encoding if it can be.

    Args:
        moe: The model; its experts have no weights.
        checkpoint: Whose files to read.
        device: Where it will run.
    """
    experts, encoder = [layer.experts for layer in moe.layers], checkpoint.encoder
    while True:
        store = HostExpertStore(experts, is_pinned=device.type == "cuda", encoder=encoder)
        try:
            fill_store(store, moe, checkpoint, device)
        except TooManyExceptions as error:
            assert encoder is not None  # it was the one that met them
            logger.warning("%s stays in bfloat16, and is read again: %s", error.parameter, error)
            encoder = without(encoder, error.parameter)
            store.close()
            continue
        return store


def _load_the_rest(checkpoint: Checkpoint) -> Any:
    """The model with all its weights but the experts'."""
    from transformers.utils import logging

    model_class, config = type(checkpoint.outline), checkpoint.outline.config
    quantization = getattr(checkpoint.config, "quantization_config", None)
    if quantization is not None:
        config.quantization_config = quantization
    logging.set_verbosity_error()  # it would list every expert's tensor as unexpected
    logging.disable_progress_bar()
    try:
        model = weightless(model_class, checkpoint.files).from_pretrained(
            checkpoint.source, config=config, dtype=checkpoint.dtype, **checkpoint.settings
        )
    except (OSError, RuntimeError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"Model {checkpoint.name} cannot be read: {first_line}") from error
    model.__class__ = model_class
    # Parameters keep requires_grad as stock's do: torch's matmul looks at it to decide whether to
    # fold a batch into rows, and the two ways round differently (jamba's projections).
    return model.eval()


def fill_store(
    store: HostExpertStore, moe: MoEModel, checkpoint: Checkpoint, device: torch.device
) -> None:
    """Read all experts into the store's rows, with a progress bar in bytes on a terminal.

    Args:
        store: Allocated, not filled.
        moe: The model; its experts have no weights.
        checkpoint: Whose files to read.
        device: A GPU encodes what is stored in another way than it is read.

    Raises:
        TooManyExceptions: If a parameter must be stored as it is.
        ValueError: If the checkpoint lacks part of an expert.
    """
    writers: dict[str, tuple[RowWriter, str]] = {}
    targets: dict[str, ParameterShape] = {}
    for layer, layout, rows in zip(moe.layers, store.layouts, store.rows, strict=True):
        writer = RowWriter(layout, rows, device if device.type == "cuda" else None)
        shapes = parameter_shapes(layer.experts)
        if layout.is_native:  # the checkpoint has the stored parts themselves
            shapes = {
                name: ParameterShape((len(rows), *spec.shape), spec.dtype)
                for name, spec in layout.parameters.items()
            }
        for name, shape in shapes.items():
            writers[f"{layer.name}.{name}"] = (writer, name)
            targets[f"{layer.name}.{name}"] = shape
    expected = sum(math.prod(target.shape) for target in targets.values())
    num_bytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in targets.values())
    done = 0
    with _byte_progress("experts", num_bytes) as progress:
        for part in ExpertReader(moe.model, checkpoint.files, targets).parts():
            writer, name = writers[part.target]
            writer.put(name, part.expert_id, part.row, part.rows)
            done += part.rows.numel()
            part_bytes = part.rows.numel() * targets[part.target].dtype.itemsize
            progress.advance(progress.task_ids[0], part_bytes)
    if done != expected:
        raise ValueError(
            f"The checkpoint holds {done} numbers of experts, the model has {expected}; "
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

"""Loads a model so that its experts go from the checkpoint's files straight to their host rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from foreroute.data.adapters import MoEModel, discover
from foreroute.data.adapters.loading import loading_alone
from foreroute.data.adapters.weightless import ParameterShape, parameter_shapes, weightless
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.expert_reader import ExpertReader
from foreroute.runtime.store.host_store import HostExpertStore, RowWriter


def load_with_host_experts(
    checkpoint: Checkpoint, *, is_pinned: bool
) -> tuple[MoEModel, HostExpertStore]:
    """Load a model on the CPU; its experts exist once, in the store.

    Args:
        checkpoint: What to load.
        is_pinned: Page-lock the store's memory.

    Raises:
        ValueError: If it cannot be read, is no MoE that is supported, or does not fit in memory.
    """
    with loading_alone():
        checkpoint.require_host_memory()  # before the files: they may be downloaded
        moe = discover(_load_the_rest(checkpoint), checkpoint.name)
        experts = [layer.experts for layer in moe.layers]
        store = HostExpertStore(experts, is_pinned=is_pinned, encoder=checkpoint.encoder)
        fill_store(store, moe, checkpoint)
    return moe, store


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


def fill_store(store: HostExpertStore, moe: MoEModel, checkpoint: Checkpoint) -> None:
    """Read all experts into the store's rows, with a progress bar in bytes on a terminal.

    Args:
        store: Allocated, not filled.
        moe: The model; its experts have no weights.
        checkpoint: Whose files to read.

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

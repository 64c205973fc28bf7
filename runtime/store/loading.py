"""Loads a model so that its experts go from the checkpoint's files straight to their host rows."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor, nn

from foreroute.data.adapters import MoEModel, discover
from foreroute.data.adapters.adapted import checkpoint_name
from foreroute.data.adapters.loading import loading_alone
from foreroute.data.adapters.weightless import ParameterShape, parameter_shapes, weightless
from foreroute.estimators.artifacts import first_line
from foreroute.estimators.console import plain_console
from foreroute.runtime.parallel import (
    UNSLICED,
    ExpertSlice,
    SlicedWriter,
    SliceRanks,
    cut,
    narrowed,
)
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.encodings import Encoder, TooManyExceptions, without
from foreroute.runtime.store.expert_reader import ExpertReader
from foreroute.runtime.store.host_store import HostExpertStore, RowLayout
from foreroute.runtime.store.prepared_rows import read_rows
from foreroute.runtime.store.prepared_slices import read_slices
from foreroute.runtime.store.row_writer import RowWriter
from foreroute.runtime.store.shared_rows import map_rows

logger = logging.getLogger(__name__)


def load_with_host_experts(
    checkpoint: Checkpoint,
    device: torch.device,
    ranks: SliceRanks = UNSLICED,
    most_pinned_bytes: int | None = None,
) -> tuple[MoEModel, HostExpertStore, HostExpertStore]:
    """Load a model on the CPU; its experts exist once, in stores: its layers', and all others.

    Args:
        checkpoint: What to load.
        device: Where it will run; memory for a GPU is page-locked, and the GPU encodes.
        ranks: The processes that hold a slice of each expert each.
        most_pinned_bytes: To page-lock; as much as the system allows if None.

    Raises:
        ValueError: If it cannot be read, is no MoE that is supported, or does not fit in memory.
    """
    with loading_alone():
        checkpoint.require_host_memory()  # before the files: they may be downloaded
        checkpoint = checkpoint.settled()
        checkpoint.require_host_memory()
        moe = discover(load_the_rest(checkpoint), checkpoint.name)
        store = filled_store(moe, checkpoint, device, ranks, most_pinned_bytes)
    return moe, *store.parted(len(moe.layers))


def places_of(moe: MoEModel) -> dict[str, nn.Module]:
    """All experts modules of a model by dotted path: its layers', then those no text reaches."""
    return {layer.name: layer.experts for layer in moe.layers} | dict(moe.others)


def filled_store(
    moe: MoEModel,
    checkpoint: Checkpoint,
    device: torch.device,
    ranks: SliceRanks = UNSLICED,
    most_pinned_bytes: int | None = None,
) -> HostExpertStore:
    """A store of `places_of` a model, each parameter in the checkpoint's encoding if it can be.

    Args:
        moe: The model; its experts have no weights.
        checkpoint: Whose files to read.
        device: Where it will run.
        ranks: The processes that hold a slice of each expert each.
        most_pinned_bytes: To page-lock; as much as the system allows if None.

    Raises:
        ValueError: If its experts cannot be cut into slices.
    """
    experts, encoder = list(places_of(moe).values()), checkpoint.encoder
    if moe.others and not ranks.is_alone:
        raise ValueError(
            f"{checkpoint.name} has experts beside its layers' own, which are not cut into slices; "
            "run it on one GPU."
        )
    if checkpoint.is_shared:
        return _shared_store(experts, moe, checkpoint, device)
    slices = cut(experts, ranks, encoder, is_stored=checkpoint.prepared is not None)
    while True:
        with narrowed(slices):
            store = HostExpertStore(
                experts,
                is_pinned=device.type == "cuda",
                encoder=encoder,
                most_pinned_bytes=most_pinned_bytes,
            )
        try:
            fill_store(store, moe, replace(checkpoint, encoder=encoder), device, slices)
        except TooManyExceptions as error:
            assert encoder is not None  # it was the one that met them
            logger.warning("%s stays in bfloat16; all is read again: %s", error.parameter, error)
            encoder = without(encoder, error.parameter)
            store.close()
            continue
        return store


def _shared_store(
    experts: list[nn.Module], moe: MoEModel, checkpoint: Checkpoint, device: torch.device
) -> HostExpertStore:
    """The rows of a prepared model where they lie."""
    prepared, folder = checkpoint.prepared, checkpoint.rows_folder
    assert prepared is not None  # `Checkpoint.shared` has looked
    prepared.require_routers(folder, moe.geometry.router_fingerprint)
    num_bytes = sum(shard.experts * shard.row_bytes for shard in prepared.shards)
    with byte_progress("experts", num_bytes) as tick:
        is_pinned = device.type == "cuda"
        return map_rows(prepared, folder, experts, checkpoint.encoder, tick, is_pinned=is_pinned)


def load_the_rest(checkpoint: Checkpoint) -> Any:
    """The model with all its weights but the experts'."""
    from transformers.utils import logging

    model_class, config = type(checkpoint.outline), copy.deepcopy(checkpoint.outline.config)
    for part in (config, config.get_text_config()):  # what is quantised comes decoded
        for name in ("quantization_config", "compression_config"):
            part.__dict__.pop(name, None)
    logging.set_verbosity_error()  # it would list every expert's tensor as unexpected
    logging.disable_progress_bar()
    try:
        model = weightless(model_class, checkpoint.tensors).from_pretrained(
            checkpoint.source,
            config=config,
            dtype=checkpoint.dtype,
            **checkpoint.settings,
            **checkpoint.division,
        )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"Model {checkpoint.name} cannot be read: {first_line(error)}") from error
    model.__class__ = model_class
    # Parameters keep requires_grad as stock's do: torch's matmul looks at it to decide whether to
    # fold a batch into rows, and the two ways round differently (jamba's projections).
    return model.eval()


def fill_store(
    store: HostExpertStore,
    moe: MoEModel,
    checkpoint: Checkpoint,
    device: torch.device,
    slices: Sequence[ExpertSlice] = (),
) -> None:
    """Read all experts into the store's rows, with a progress bar in bytes on a terminal.

    Args:
        store: Allocated for `places_of` the model, not filled.
        moe: The model; its experts have no weights.
        checkpoint: Whose files to read.
        device: A GPU encodes what is stored in another way than it is read.
        slices: What of each layer's experts the store holds; all if empty.

    Raises:
        TooManyExceptions: If a parameter must be stored as it is.
        ValueError: If the checkpoint lacks part of an expert, or is prepared and damaged.
    """
    if checkpoint.prepared is not None:
        folder = checkpoint.rows_folder
        checkpoint.prepared.require_routers(folder, moe.geometry.router_fingerprint)
        with byte_progress("experts", store.num_bytes) as tick:
            if slices:
                read_slices(checkpoint.prepared, folder, store, slices, tick)
            else:
                read_rows(checkpoint.prepared, folder, store, tick)
        return
    reader = LayerReader(checkpoint, moe, device, slices)
    with reader.progress() as tick:
        for number, (layout, rows) in enumerate(zip(store.layouts, store.rows, strict=True)):
            reader.read(number, layout, rows, tick)


class LayerReader:
    """Reads one experts module after the other, as in `places_of`, out of a checkpoint's files."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        moe: MoEModel,
        device: torch.device,
        slices: Sequence[ExpertSlice] = (),
    ) -> None:
        """Work out which tensors make which parameter.

        Args:
            checkpoint: Whose files to read.
            moe: The model; its experts have no weights.
            device: A GPU encodes what is stored in another way than it is read.
            slices: What of each layer's experts is kept; all if empty.

        Raises:
            ValueError: If a parameter has no tensor in the checkpoint.
        """
        self._places, self._slices = places_of(moe), slices
        self._gpu = device if device.type == "cuda" else None
        self._targets = [targets_of(*place, checkpoint.encoder) for place in self._places.items()]
        every = {path: shape for targets in self._targets for path, (_, shape) in targets.items()}
        self._reader = ExpertReader(moe.model, checkpoint.expert_tensors, every)
        self._num_bytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in every.values())

    @property
    def tensor_names(self) -> set[str]:
        """Names of the checkpoint's tensors that hold experts."""
        return self._reader.tensor_names

    def progress(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A bar for all layers; the function it gives is told of bytes that were read."""
        return byte_progress("experts", self._num_bytes)

    def read(
        self, number: int, layout: RowLayout, rows: Tensor, tick: Callable[[int], None]
    ) -> None:
        """Read one layer's experts into rows.

        Args:
            number: Which experts module, from 0.
            layout: Of a row.
            rows: Written, [E, row_bytes] uint8.
            tick: Called with the bytes that were read.

        Raises:
            TooManyExceptions: If a parameter must be stored as it is.
            ValueError: If the checkpoint lacks part of an expert.
        """
        targets = self._targets[number]
        writer: RowWriter | SlicedWriter = RowWriter(layout, rows, self._gpu)
        if self._slices:
            cuts = self._slices[number]
            writer = SlicedWriter(writer, cuts.stored if layout.is_native else cuts.parameters)
        done = 0
        for part in self._reader.parts(targets):
            name, shape = targets[part.target]
            writer.put(name, part.expert_id, part.row, part.rows)
            done += part.rows.numel()
            tick(part.rows.numel() * shape.dtype.itemsize)
        expected = sum(math.prod(shape.shape) for _, shape in targets.values())
        if done != expected:
            raise ValueError(
                f"The checkpoint holds {done} numbers of experts of {list(self._places)[number]}, "
                f"the model has {expected}; some are missing or have another shape."
            )


def targets_of(
    path: str, experts: nn.Module, encoder: Encoder | None
) -> dict[str, tuple[str, ParameterShape]]:
    """What a checkpoint is asked for: by its path there, a parameter or a stored part of one.

    Args:
        path: Of the experts module.
        experts: The module; it needs no weights.
        encoder: How its matrices will be stored.
    """
    shapes, layout = parameter_shapes(experts), RowLayout.of(experts, encoder)
    if layout.is_native:  # the checkpoint has the stored parts themselves
        num_experts = next(iter(shapes.values())).shape[0]
        shapes = {
            name: ParameterShape((num_experts, *spec.shape), spec.dtype)
            for name, spec in layout.parameters.items()
        }
    return {
        f"{path}.{checkpoint_name(experts, name)}": (name, shape) for name, shape in shapes.items()
    }


@contextlib.contextmanager
def byte_progress(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on a terminal; gives what is called with bytes that are done."""
    console = plain_console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=num_bytes)
        yield lambda count: bar.advance(task, count)

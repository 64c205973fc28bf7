"""Writes a prepared model: `foreroute pack`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from foreroute.data.adapters import MoEModel, discover, resolve_device
from foreroute.data.adapters.loading import PREPARED_MANIFEST, HubSettings, loading_alone
from foreroute.estimators.artifacts import (
    package_versions,
    read_json,
    sha256_of,
    write_json,
    write_tensors,
)
from foreroute.estimators.output import OutputKind, claim, give_place, require_free, write_command
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.encodings import Lossless, TooManyExceptions, without
from foreroute.runtime.store.encodings.lossless import count_exceptions
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.loading import LayerReader, load_the_rest, places_of
from foreroute.runtime.store.prepared import (
    FORMAT_VERSION,
    PreparedModel,
    RestFile,
    RowFile,
    describe_layout,
)
from foreroute.runtime.store.prepared_rows import ROWS, aligning, block_digests, bytes_of
from foreroute.runtime.store.publish import push_prepared

logger = logging.getLogger(__name__)

KIND: OutputKind = "prepared model"
UNFINISHED_SUFFIX = ".packing"
"""A folder of this name stays when a run is stopped: the next one goes on with it."""
PROGRESS = "progress.json"
REST = "model.safetensors"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
LEFT_OUT = (*WEIGHTS, "*.index.json", ".*")


def pack_model(
    checkpoint: Checkpoint, out: Path, *, device: str = "auto", overwrite: bool = False
) -> PreparedModel:
    """Write a model's experts as rows, and the rest of it beside them.

    A run that was stopped goes on where it was; the folder has its name only when it is complete.

    Args:
        checkpoint: The model.
        out: The folder to write.
        device: Where experts are encoded: `auto`, `cpu` or `cuda`.
        overwrite: Replace a folder that is there already.

    Raises:
        ValueError: If the model is packed already, or `out` is not free.
    """
    if checkpoint.prepared is not None:
        raise ValueError(f"{checkpoint.name} is a prepared model already.")
    checkpoint = checkpoint.settled()
    if checkpoint.expert_tensors is not checkpoint.files:
        raise ValueError(
            f"{checkpoint.name} is quantised in a way that is decoded while it is read, which is "
            "not packed; give a checkpoint in full precision, in mxfp4 or in fp8 of square blocks."
        )
    folder = out.with_name(out.name + UNFINISHED_SUFFIX)
    with claim(out), loading_alone():
        require_free(out, KIND, overwrite=overwrite, inputs=[checkpoint.source])
        moe = discover(load_the_rest(checkpoint), checkpoint.name)
        prepared = _Packing(checkpoint, moe, folder, resolve_device(device)).run()
        write_json(folder / PREPARED_MANIFEST, asdict(prepared))
        (folder / PROGRESS).unlink()
        write_command(folder, KIND)
        give_place(folder, out)
        shutil.rmtree(folder, ignore_errors=True)  # the model that was there before
    return prepared


@dataclass
class _Progress:
    """What is packed so far, as a stopped run leaves it."""

    asked: dict[str, Any]
    """The source, and how it is to be packed."""
    stays: list[str] = field(default_factory=list)
    """Parameters that 12 bits do not pay for."""
    shards: list[RowFile] = field(default_factory=list)
    exceptions: dict[str, int] = field(default_factory=dict)
    """By parameter."""


class _Packing:
    """One model on its way into one folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        moe: MoEModel,
        folder: Path,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._moe, self._folder, self._device = checkpoint, moe, folder, device
        fingerprint = moe.geometry.router_fingerprint
        version = {"format_version": FORMAT_VERSION}
        self._asked = _asked(checkpoint) | {"router_fingerprint": fingerprint} | version
        self._done = self._begun()

    def _begun(self) -> _Progress:
        """What an earlier run of the same left; another's is removed."""
        path = self._folder / PROGRESS
        if path.is_file():
            found = read_json(path, _Progress, f"Remove {self._folder} to begin anew.")
            if found.asked == self._asked:
                return found
        begun = [path, self._folder / "experts"]
        if (
            self._folder.is_dir()
            and any(self._folder.iterdir())
            and not any(map(Path.exists, begun))
        ):
            raise ValueError(
                f"{self._folder} is where an unfinished model would lie, and holds something else; "
                "move it away, or choose another --out."
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return _Progress(self._asked)

    def run(self) -> PreparedModel:
        """Write what is not there yet; gives the manifest."""
        while True:
            try:
                self._pack_layers()
                break
            except TooManyExceptions as error:
                logger.warning(
                    "%s stays in bfloat16; all is packed again: %s", error.parameter, error
                )
                self._done = _Progress(self._asked, [*self._done.stays, error.parameter])
        self._copy_small_files()
        rest = self._write_rest()
        return PreparedModel(
            **self._asked,
            stays=tuple(self._done.stays),
            shards=tuple(self._done.shards),
            exceptions=self._done.exceptions,
            rest=rest,
            plain_bytes=self._checkpoint.expert_bytes,
            versions=package_versions(),
        )

    def _pack_layers(self) -> None:
        encoder = self._checkpoint.encoder
        if encoder is not None:
            encoder = without(encoder, *self._done.stays)
        reader = LayerReader(replace(self._checkpoint, encoder=encoder), self._moe, self._device)
        self._expert_keys = reader.tensor_names
        (self._folder / "experts").mkdir(exist_ok=True)
        with reader.progress() as tick:
            for number, module in enumerate(places_of(self._moe).values()):
                if number < len(self._done.shards):
                    continue
                store = HostExpertStore([module], is_pinned=False, encoder=encoder)
                reader.read(number, store.layouts[0], store.rows[0], tick)
                self._write_shard(number, store)

    def _write_shard(self, number: int, store: HostExpertStore) -> None:
        layout, rows = store.layouts[0], store.rows[0]
        file = f"experts/layer-{number:03}.safetensors"
        write_tensors(self._folder / file, {ROWS: rows}, aligning(rows))
        for name, parameter in layout.encoded.items():
            if isinstance(parameter.encoding, Lossless):
                count = count_exceptions(layout.views(rows)[f"{name}_lines"])
                counts = self._done.exceptions
                counts[name] = counts.get(name, 0) + count
        entry = RowFile(
            file=file,
            sha256=sha256_of(self._folder / file),
            blocks_sha256=block_digests(bytes_of(rows)),
            experts=len(rows),
            row_bytes=layout.row_bytes,
            parameters=describe_layout(layout),
        )
        self._done.shards.append(entry)
        write_json(self._folder / PROGRESS, asdict(self._done))

    def _write_rest(self) -> RestFile:
        """All tensors of the checkpoint that are not its experts', as they are."""
        files, path = self._checkpoint.files, self._folder / REST
        names = [name for name in files if name not in self._expert_keys]
        write_tensors(path, {name: files[name][...] for name in names})
        return RestFile(file=REST, sha256=sha256_of(path))

    def _copy_small_files(self) -> None:
        """Config, tokenizer and whatever else lies beside the weights."""
        with _source_folder(self._checkpoint) as source:
            ignored = shutil.ignore_patterns(*LEFT_OUT)
            shutil.copytree(source, self._folder, ignore=ignored, dirs_exist_ok=True)


def _asked(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says of a request, known before a weight is read."""
    commit = getattr(checkpoint.config, "_commit_hash", None)
    return {
        "source": checkpoint.name,
        "revision": commit or checkpoint.hub.get("revision"),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "expert_dtype": checkpoint.expert_dtype,
    }


@contextmanager
def _source_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder with the model's small files: its own, or the Hub's cache of them."""
    if Path(checkpoint.source).is_dir():
        yield Path(checkpoint.source)
        return
    from huggingface_hub import snapshot_download

    names = ("revision", "cache_dir", "token", "local_files_only")
    hub = {name: checkpoint.settings[name] for name in names if name in checkpoint.settings}
    yield Path(snapshot_download(checkpoint.source, ignore_patterns=list(WEIGHTS), **hub))


def run_pack(
    model: str,
    out: Path,
    expert_dtype: str,
    dtype: str,
    device: str,
    revision: str | None,
    push_to_hub: str | None,
    private: bool,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """The command `foreroute pack`; takes its flags.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it cannot be read or packed.
    """
    from foreroute.estimators.console import plain_console

    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    on_a_gpu = torch.device("cuda")  # what it is packed for, wherever it is packed
    checkpoint = Checkpoint.open(
        model, dtype=dtype, expert_dtype=expert_dtype, device=on_a_gpu, **hub
    )
    is_there = push_to_hub is not None and not overwrite and _holds(out, checkpoint)
    if is_there:  # an upload that failed needs no second packing
        prepared = PreparedModel.read(out / PREPARED_MANIFEST)
    else:
        prepared = pack_model(checkpoint, out, device=device, overwrite=overwrite)
    console = plain_console()
    for line in summary(prepared):
        console.print(line, soft_wrap=True)
    if push_to_hub is not None:
        url = push_prepared(out, push_to_hub, is_private=private)
        console.print(url, soft_wrap=True)
    console.print(str(out), soft_wrap=True)


def _holds(out: Path, checkpoint: Checkpoint) -> bool:
    """Whether a folder is the prepared model that packing a checkpoint would make."""
    if not (out / PREPARED_MANIFEST).is_file():
        return False
    found, asked = PreparedModel.read(out / PREPARED_MANIFEST), _asked(checkpoint.settled())
    return all(getattr(found, name) == value for name, value in asked.items())


def summary(prepared: PreparedModel) -> list[str]:
    """What became of a model's experts, one line each."""
    num_experts = sum(shard.experts for shard in prepared.shards)
    stored = sum(shard.experts * shard.row_bytes for shard in prepared.shards)
    plain = prepared.plain_bytes
    lines = [
        f"{num_experts:,} experts of {len(prepared.shards)} layers as {prepared.expert_dtype}: "
        f"{stored / 1e9:.2f} GB, {stored / plain:.3f} of the {plain / 1e9:.2f} GB they took.",
    ]
    lines += [
        f"{name}: {count:,} exceptions." for name, count in sorted(prepared.exceptions.items())
    ]
    return lines + [f"{name}: as it was; 12 bits do not pay for it." for name in prepared.stays]

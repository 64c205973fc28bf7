"""Training while the model runs: the tokens come from it as they are read, and none are stored."""

from __future__ import annotations

from pathlib import Path

from foreroute.data.adapters import discover, load_model, load_tokenizer, resolve_device
from foreroute.data.collect import CollectRequest
from foreroute.data.live_traces import BUFFER_BYTES, LiveTraces
from foreroute.data.manifest import MANIFEST_FILE
from foreroute.data.opening import open_traces
from foreroute.data.traces import Traces
from foreroute.estimators import InputKind
from foreroute.estimators.output import claim, require_free

RECORDED_FOR: dict[InputKind, str] = {
    "attention-readout": "readout",
    "pre-attention": "layer-input",
}
"""What must be recorded besides the usual, by input kind."""
LIVE_SUFFIX = ".live"


def open_live_traces(
    out: Path,
    *,
    model: str,
    revision: str | None = None,
    dataset: str,
    column: str = "",
    tokens: int,
    record: str = "",
    device: str = "auto",
    buffer_bytes: int = BUFFER_BYTES,
    sequence_length: int = CollectRequest.sequence_length,
    batch_size: int = CollectRequest.batch_size,
    overwrite: bool = False,
    resume: bool = False,
) -> Traces:
    """Traces to train on that exist only while they are read.

    Held-out sequences are the last ones, as with stored traces; the model runs over a shard again
    whenever it is read after it left the buffer, and gives the same states again.

    Args:
        out: Folder of the run; manifest and anchors, which export needs, go beside it.
        model: `bundled`, a local folder or a Hub id.
        revision: Branch, tag or commit of a Hub id, for weights and tokenizer.
        dataset: As `collect-traces` takes it.
        column: Column of its tables; found if empty.
        tokens: Tokens to train on and to measure by, all together.
        record: Optional trace fields to record, a comma list; `RECORDED_FOR` has an input's.
        device: auto, cpu or cuda.
        buffer_bytes: Most bytes of shards in memory.
        sequence_length: Tokens of a sequence.
        batch_size: Sequences that the model runs over together.
        overwrite: Replace the folder of another run.
        resume: Go on with the traces of a run that was killed, if there are any.

    Raises:
        FileNotFoundError: If model or dataset do not exist.
        ValueError: If one of them cannot be used.
    """
    folder = out.with_name(out.name + LIVE_SUFFIX)
    if resume and (folder / MANIFEST_FILE).is_file():
        return open_traces(folder)
    request = CollectRequest(
        out=folder,
        model=model,
        revision=revision,
        dataset=dataset,
        column=column,
        tokens=tokens,
        record=record,
        sequence_length=sequence_length,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    with claim(out), claim(folder):
        require_free(out, "run", overwrite=overwrite, inputs=(model, dataset))
        require_free(folder, "traces", overwrite=overwrite, inputs=(model, dataset))
    loaded = load_model(model, device=resolve_device(device), revision=revision)
    moe = discover(loaded, model)
    return LiveTraces.begin(
        moe,
        load_tokenizer(model, revision=revision),
        request.manifest(moe),
        folder,
        buffer_bytes=buffer_bytes,
        overwrite=overwrite,
    )

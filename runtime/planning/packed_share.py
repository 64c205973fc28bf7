"""Says how much of a model 12 bits hold without loss: counted in its weights, where they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from foreroute.data.adapters.weightless import ParameterShape
from foreroute.runtime.planning.packing_survey import PackingSurvey, coded_weights
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.expert_reader import ExpertReader
from foreroute.runtime.store.host_store import RowLayout
from foreroute.runtime.store.loading import targets_of

NOT_HERE = "not known: a config does not say it, and the weights are not here"


def packed_share(checkpoint: Checkpoint) -> str:
    """One line: the share of the experts' bytes that remains, exceptions, and who counted.

    Args:
        checkpoint: The model; no weights are downloaded.

    Raises:
        ValueError: If a file of weights that is here cannot be read.
    """
    if checkpoint.prepared is not None:
        return _as_prepared(checkpoint)
    if checkpoint.quantization is not None:
        return f"no: they come in {checkpoint.quantization.get('quant_method')} already"
    here = replace(checkpoint, hub=checkpoint.hub | {"local_files_only": True})
    try:
        tensors, dtype = here.files, str(here.dtype).removeprefix("torch.")
    except ValueError:
        if any(Path(here.source).glob("*.safetensors*")):  # they are here, and damaged
            raise
        return NOT_HERE
    if dtype != "bfloat16":
        return f"no: they are for bfloat16, and the experts are in {dtype}"
    survey = PackingSurvey(here, ExpertReader(here.outline, tensors, _shapes(here)))
    survey.count()
    exceptions, weights = map(survey.without_what_stays, (survey.exceptions, survey.weights))
    found = _line(survey.stored_bytes, here.expert_bytes, exceptions, weights, survey.stays)
    is_exact = survey.num_read == survey.num_experts
    how = "exact: all" if is_exact else f"sampled: {survey.num_read:,} of"
    return f"{found} ({how} {survey.num_experts:,} experts)"


def _as_prepared(checkpoint: Checkpoint) -> str:
    prepared = checkpoint.prepared
    assert prepared is not None  # the caller looked
    if prepared.expert_dtype != "lossless":
        return f"no: they are prepared as {prepared.expert_dtype}"
    num_experts = sum(shard.experts for shard in prepared.shards)
    weights = sum(
        shard.experts * sum(coded_weights(RowLayout.of(module, checkpoint.encoder)).values())
        for shard, module in zip(prepared.shards, checkpoint.experts.values(), strict=True)
    )
    stored = sum(shard.experts * shard.row_bytes for shard in prepared.shards)
    exceptions = sum(prepared.exceptions.values())
    found = _line(stored, prepared.plain_bytes, exceptions, weights, prepared.stays)
    return f"{found} (exact: all {num_experts:,} experts, when they were packed)"


def _shapes(checkpoint: Checkpoint) -> dict[str, ParameterShape]:
    places = checkpoint.experts.items()
    return {
        path: shape for place in places for path, (_, shape) in targets_of(*place, None).items()
    }


def _line(stored: int, plain: int, exceptions: int, weights: int, stays: Iterable[str]) -> str:
    if not weights:
        return "no: their matrices are too small for it to pay, or have too many exceptions"
    size = f"{stored / plain:.3f} of {plain / 2**30:.2f} GiB"
    kept = "".join(f", {name} as it was" for name in stays)
    return f"{size}{kept}; {exceptions / weights:.1e} of the weights are exceptions"

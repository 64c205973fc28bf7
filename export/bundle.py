"""The bundle: estimators and a manifest that says which model they fit and how good they were."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.estimators import EstimatorSpec, EstimatorStack, MoEGeometry
from foreroute.estimators.artifacts import (
    Count,
    package_versions,
    read_tensors,
    read_versioned,
    require_digest,
    require_finite,
    sha256_of,
    write_json,
    write_tensors,
)
from foreroute.estimators.calibration import Calibration
from foreroute.estimators.expected_cost import FetchCosts
from foreroute.estimators.hybrid import HybridStack
from foreroute.estimators.inputs import ANCHOR_BUFFERS
from foreroute.estimators.types import NormKind
from foreroute.export.hub import find_bundle

FORMAT_VERSION = 2
REMEDY = "Export the bundle again."
MANIFEST_NAME = "manifest.json"
TENSORS_NAME = "estimators.safetensors"
CALIBRATION_PREFIX = "calibration."
ANCHORS_PREFIX = "anchors."
INPUT_PREFIX = "input."
ANCHOR_NAMES = tuple(INPUT_PREFIX + name for name in ANCHOR_BUFFERS)


@dataclass(frozen=True, kw_only=True)
class CandidateEntry:
    """One way to predict a layer that export compared."""

    run: str
    """Folder name of the run."""
    form: str
    """The run's form, or `next-router` for the training-free logits of its input."""
    input_kind: str
    """State at the source layer that is read."""
    expected_cost: float
    """Copies of one expert per token, under the rule of prefetching; see `FetchCosts`."""
    recall_at_k: float
    """On the same tokens."""


@dataclass(frozen=True, kw_only=True)
class PairEntry:
    """What a bundle says about one pair of source and target layer."""

    source_layer: Count
    """Decoder layer index the estimator reads."""
    target_layer: Count
    """Decoder layer index it predicts."""
    form: str
    """The form in use: a trained one, or `next-router` where training did not pay."""
    recall_at_k: float
    """Recall of the form in use, on held-out tokens that chose nothing, from the written files."""
    training_free_recall_at_k: float
    """The same for the training-free logits of the same input."""
    budget: Count
    """Experts predicted per token for both figures."""
    stack: Count = 0
    """Which of the bundle's stacks predicts it."""
    expected_cost: float | None = None
    """Cost of the form in use, on the same tokens, in copies of one expert per token."""
    calibration_error: float | None = None
    """Error of its probabilities, on the same tokens."""
    uncalibrated_error: float | None = None
    """The same for the sigmoid of the decision margin."""
    compared: tuple[CandidateEntry, ...] = ()
    """What the form was chosen from, measured on the tokens that chose."""


@dataclass(frozen=True, kw_only=True)
class CalibrationEntry:
    """How the probabilities came about."""

    method: str
    """`temperature` or `isotonic`: the better one."""
    compared: dict[str, float]
    """Calibration error of each on the tokens that chose, mean over layers and candidates."""
    num_fit_tokens: Count
    """Held-out tokens they were fitted on."""
    num_choose_tokens: Count
    """Held-out tokens that chose between them, and each layer's form."""
    costs: FetchCosts
    """What a prefetch was taken to gain and lose."""


@dataclass(frozen=True, kw_only=True)
class BundleManifest:
    """Everything about a bundle but its tensors."""

    geometry: MoEGeometry
    """The model it fits."""
    specs: tuple[EstimatorSpec, ...]
    """What is predicted from what, in which form: one for each stack of estimators."""
    pairs: tuple[PairEntry, ...]
    """One entry per target layer, in the specs' order."""
    calibration: CalibrationEntry | None
    """None if its estimators give no probabilities."""
    norm_kind: NormKind
    """The norm in front of the model's routers."""
    norm_eps: float
    """Added to that norm's variance."""
    num_held_out_tokens: Count
    """Tokens the pairs' figures are measured on."""
    tensors_sha256: str
    """sha256 of `estimators.safetensors`."""
    provenance: dict[str, Any]
    """Where it comes from: runs, traces, tokens."""
    versions: dict[str, str]
    """Versions of Python and packages when it was written."""
    format_version: int = FORMAT_VERSION
    """Version of the manifest's form."""

    def __post_init__(self) -> None:
        """Check what a damaged file could say.

        Raises:
            ValueError: If its parts do not fit each other.
        """
        if not self.specs or not 0 <= self.norm_eps < math.inf:
            raise ValueError("expected at least one spec and a finite norm_eps, not negative")
        targets = tuple(pair.target_layer for pair in self.pairs)
        if any(spec.target_layers != targets for spec in self.specs):
            raise ValueError(f"pairs predict layers {list(targets)[:9]}, and a spec others")
        if any(pair.stack >= len(self.specs) for pair in self.pairs):
            raise ValueError(f"a pair is predicted by none of the {len(self.specs)} stacks")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, which `read_versioned` rebuilds."""
        return dataclasses.asdict(self) | {
            "geometry": self.geometry.to_dict(),
            "specs": [spec.to_dict() for spec in self.specs],
        }


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Estimators that are ready to run, and what is known about them."""

    manifest: BundleManifest
    stack: EstimatorStack

    def require_fits(self, geometry: MoEGeometry) -> None:
        """Refuse a model the estimators were not trained for.

        Raises:
            ValueError: If the model's routing is another; the message describes both.
        """
        self.manifest.geometry.require_match(
            geometry,
            what="Bundle was",
            remedy="Use that model, or collect traces of this one, train and export again.",
        )


def save_bundle(
    folder: Path,
    stack: EstimatorStack,
    pairs: Sequence[PairEntry],
    *,
    num_held_out_tokens: int,
    provenance: dict[str, Any],
    calibration: CalibrationEntry | None = None,
) -> BundleManifest:
    """Write a stack's tensors and manifest into a folder that exists.

    Args:
        folder: Where the two files go.
        stack: The estimators, with their calibration if they have one; each pair's `form` and
            `stack` decide what is used when loaded.
        pairs: What to say about each pair, in the stack's order.
        num_held_out_tokens: Tokens the pairs' figures are measured on.
        provenance: Where the estimators come from, JSON-ready.
        calibration: How their probabilities came about.

    Raises:
        ValueError: If only one of calibration and what is said about it is there.
    """
    fitted = stack.calibration
    if (fitted is None) != (calibration is None):
        raise ValueError("Expected a calibration and its entry, or neither.")
    tensors = {} if fitted is None else _prefixed(CALIBRATION_PREFIX, fitted.to_tensors())
    for at, part in enumerate(stack.parts):
        anchors, own = _apart(part.to_tensors())
        tensors |= _prefixed(ANCHORS_PREFIX, _without_prefix(INPUT_PREFIX, anchors)) | _prefixed(
            f"{at}.", own
        )
    write_tensors(folder / TENSORS_NAME, tensors)
    manifest = BundleManifest(
        geometry=stack.geometry,
        specs=tuple(part.spec for part in stack.parts),
        pairs=tuple(pairs),
        calibration=calibration,
        norm_kind=stack.parts[0].input.norm_kind,
        norm_eps=stack.parts[0].input.norm_eps,
        num_held_out_tokens=num_held_out_tokens,
        tensors_sha256=sha256_of(folder / TENSORS_NAME),
        provenance=provenance,
        versions=package_versions(),
    )
    save_manifest(folder, manifest)
    return manifest


def save_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write a bundle's manifest beside its tensors."""
    write_json(folder / MANIFEST_NAME, manifest.to_dict())


def load_bundle(path: Path | str, device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle and check that it is whole.

    Args:
        path: Folder that `export-estimator` wrote, or a Hub id; see `find_bundle`.
        device: Where the estimators shall live.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged or of an unknown format version; the message names it.
    """
    folder = find_bundle(path)
    manifest, path = _read_manifest(folder / MANIFEST_NAME), folder / TENSORS_NAME
    try:
        require_digest(path, manifest.tensors_sha256, REMEDY)
        tensors = read_tensors(path)
    except (FileNotFoundError, ValueError):
        if _read_manifest(folder / MANIFEST_NAME) == manifest:
            raise
        return load_bundle(folder, device)  # another bundle has just taken its place
    require_finite(tensors, path, REMEDY)
    try:
        stack = _build_stack(manifest, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error}). {REMEDY}") from error
    return Bundle(manifest=manifest, stack=stack.to(device).eval().requires_grad_(False))


def _build_stack(manifest: BundleManifest, tensors: dict[str, Tensor]) -> EstimatorStack:
    anchors = _prefixed(INPUT_PREFIX, _without_prefix(ANCHORS_PREFIX, tensors))
    stacks = [
        EstimatorStack.from_tensors(
            manifest.geometry,
            spec,
            anchors | _without_prefix(f"{at}.", tensors),
            norm_kind=manifest.norm_kind,
            norm_eps=manifest.norm_eps,
            is_trained=[pair.form == spec.form or pair.stack != at for pair in manifest.pairs],
        )
        for at, spec in enumerate(manifest.specs)
    ]
    stack = stacks[0]
    if len(stacks) > 1:
        stack = HybridStack(stacks, [pair.stack for pair in manifest.pairs])
    if manifest.calibration is not None:
        fitted = _without_prefix(CALIBRATION_PREFIX, tensors)
        stack.calibration = Calibration(**fitted, top_k=manifest.geometry.top_k)
        if len(stack.calibration.probability) != len(manifest.pairs):
            raise ValueError(f"its probabilities are not of {len(manifest.pairs)} pairs")
    return stack


def _apart(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's own tensors, the same in every stack, and the rest."""
    anchors = {name: t for name in ANCHOR_NAMES if (t := tensors.get(name)) is not None}
    return anchors, {name: t for name, t in tensors.items() if name not in anchors}


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _read_manifest(path: Path) -> BundleManifest:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is this a bundle?")
    return read_versioned(path, FORMAT_VERSION, BundleManifest, REMEDY)

"""The bundle: estimators and a manifest that says which model they fit and how good they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foreroute.estimators import EstimatorSpec, EstimatorStack, MoEGeometry
from foreroute.estimators.artifacts import (
    package_versions,
    read_tensors,
    read_versioned,
    sha256_of,
    write_json,
    write_tensors,
)
from foreroute.estimators.types import NormKind

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TENSORS_NAME = "estimators.safetensors"


@dataclass(frozen=True, kw_only=True)
class PairEntry:
    """What a bundle says about one pair of source and target layer."""

    source_layer: int
    """Decoder layer index the estimator reads."""
    target_layer: int
    """Decoder layer index it predicts."""
    form: str
    """The form in use: the trained one, or `next-router` where training did not pay."""
    recall_at_k: float
    """Of the form in use, on held-out tokens, from the written files."""
    training_free_recall_at_k: float
    """The same for the training-free logits of the same input."""
    budget: int
    """Experts predicted per token for both figures."""


@dataclass(frozen=True, kw_only=True)
class BundleManifest:
    """Everything about a bundle but its tensors."""

    geometry: MoEGeometry
    """The model it fits."""
    spec: EstimatorSpec
    """What is predicted from what, in which form."""
    pairs: tuple[PairEntry, ...]
    """One entry per target layer, in the spec's order."""
    norm_kind: NormKind
    """The norm in front of the model's routers."""
    norm_eps: float
    """Added to that norm's variance."""
    num_held_out_tokens: int
    """Tokens the recall figures are measured on."""
    tensors_sha256: str
    """Of `estimators.safetensors`."""
    provenance: dict[str, Any]
    """Where it comes from: run, traces, tokens."""
    versions: dict[str, str]
    """Of Python and packages when it was written."""
    format_version: int = FORMAT_VERSION
    """Of this manifest."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reverses it."""
        return dataclasses.asdict(self) | {
            "geometry": self.geometry.to_dict(),
            "spec": self.spec.to_dict(),
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BundleManifest:
        """Rebuild from `to_dict`'s output."""
        parts = {
            "geometry": MoEGeometry.from_dict(values["geometry"]),
            "spec": EstimatorSpec.from_dict(values["spec"]),
            "pairs": tuple(PairEntry(**pair) for pair in values["pairs"]),
        }
        return cls(**(values | parts))


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
) -> BundleManifest:
    """Write a stack's tensors and manifest into a folder that exists.

    Args:
        folder: Where the two files go.
        stack: The estimators; each pair's `form` decides whether it is used when loaded.
        pairs: What to say about each pair, in the stack's order.
        num_held_out_tokens: Tokens the recall figures are measured on.
        provenance: Where the estimators come from, JSON-ready.
    """
    write_tensors(folder / TENSORS_NAME, stack.to_tensors())
    manifest = BundleManifest(
        geometry=stack.geometry,
        spec=stack.spec,
        pairs=tuple(pairs),
        norm_kind=stack.input.norm_kind,
        norm_eps=stack.input.norm_eps,
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
        path: Folder that `export-estimator` wrote.
        device: Where the estimators shall live.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged or of an unknown format version; the message names it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"Bundle {folder} is missing; make one with export-estimator.")
    manifest = _read_manifest(folder / MANIFEST_NAME)
    tensors_path = folder / TENSORS_NAME
    tensors = read_tensors(tensors_path)
    if sha256_of(tensors_path) != manifest.tensors_sha256:
        raise ValueError(
            f"{tensors_path} is damaged (its sha256 is not the manifest's). Export it again."
        )
    stack = EstimatorStack.from_tensors(
        manifest.geometry,
        manifest.spec,
        tensors,
        norm_kind=manifest.norm_kind,
        norm_eps=manifest.norm_eps,
        is_trained=[pair.form == manifest.spec.form for pair in manifest.pairs],
    )
    return Bundle(manifest=manifest, stack=stack.to(device).eval().requires_grad_(False))


def _read_manifest(path: Path) -> BundleManifest:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is this a bundle?")
    return read_versioned(
        path, FORMAT_VERSION, BundleManifest.from_dict, "Export the bundle again."
    )

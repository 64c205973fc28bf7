"""Puts bundles and traces on the Hub, with a card each and without a local path in either."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from foreroute.data.manifest import MANIFEST_FILE, TraceManifest
from foreroute.data.traces import Traces
from foreroute.estimators.artifacts import from_values, read_json, write_json
from foreroute.export.bundle import (
    TENSORS_NAME,
    BundleManifest,
    load_bundle,
    save_manifest,
)
from foreroute.export.card import bundle_card, traces_card
from foreroute.export.hub import CARD_FILE, FRONTIER_NAME, linked, upload, without_paths


def push_bundle(folder: Path, repo_id: str, *, is_private: bool = False) -> str:
    """Upload a bundle, and the frontier it carries, with a card that holds its measured table.

    Args:
        folder: The bundle.
        repo_id: `user/name`; made if it is not there.
        is_private: Whether only its owner sees it.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the bundle is damaged, or the Hub refuses.
    """
    manifest = from_values(without_paths(load_bundle(folder).manifest.to_dict()), BundleManifest)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_manifest(place, manifest)
        shutil.copyfile(folder / TENSORS_NAME, place / TENSORS_NAME)
        if (frontier := folder / FRONTIER_NAME).is_file():
            write_json(place / FRONTIER_NAME, without_paths(read_json(frontier)))
        bundle_card(manifest, repo_id).save(place / CARD_FILE)
        return upload(place, repo_id, repo_type="model", is_private=is_private)


def push_traces(folder: Path, repo_id: str, *, is_private: bool = False) -> str:
    """Upload recorded traces with a card, as a dataset: hidden states with their routing.

    Args:
        folder: What collect-traces wrote; its files are linked or copied beside it while it lasts.
        repo_id: `user/name`; made if it is not there.
        is_private: Whether only its owner sees it.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If a file is damaged, or the Hub refuses.
    """
    traces = Traces.open(folder)
    traces.verify()
    manifest = from_values(without_paths(traces.manifest.to_dict()), TraceManifest)
    names = {name for shard in manifest.shards for name in shard.sha256}
    names |= {path.name for path in folder.glob("*.safetensors")}
    with linked(folder, names) as place:
        write_json(place / MANIFEST_FILE, manifest.to_dict())
        traces_card(manifest, repo_id).save(place / CARD_FILE)
        return upload(place, repo_id, repo_type="dataset", is_private=is_private)

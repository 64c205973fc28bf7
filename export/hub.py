"""The Hub, by its own client: bundles found by name, folders uploaded."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from foreroute.estimators.artifacts import first_line

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
LOCAL_PATH = re.compile(r"(?<!\S)(?:/|~|\.{1,2}/|[A-Za-z]:\\|[\w.-]+(?:/[\w.-]+){2,})\S*")
"""A word that is one: absolute, from home or here, or of three parts and more."""
CARD_FILE = "README.md"
"""What the Hub shows of a repository."""
BUNDLE_FILES = ("manifest.json", "estimators.safetensors")
FRONTIER_NAME = "frontier.json"
"""What `foreroute evaluate` measured of rules on a miss; a bundle may carry it."""


def find_bundle(name: str | Path) -> Path:
    """The folder of a bundle: a local one, or one of the Hub's in its cache.

    Args:
        name: A folder, or a Hub id such as `me/qwen3-estimators`, `@` a revision if not the newest.

    Raises:
        FileNotFoundError: If there is no such folder, and no such bundle on the Hub.
        ValueError: If the Hub cannot be reached and the bundle is not in the cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(
            f"Bundle {name} is missing; make one with export-estimator, or give a Hub id."
        )
    return _download(*str(name).partition("@")[::2])


def _download(repo_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = Path(
            snapshot_download(
                repo_id, revision=revision or None, allow_patterns=[*BUNDLE_FILES, FRONTIER_NAME]
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no folder {repo_id}, and no bundle {repo_id}"
            f"{'@' * bool(revision)}{revision} on the Hub."
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"Bundle {repo_id} is not in the local cache, and the Hub cannot be reached."
        ) from error
    missing = [file for file in BUNDLE_FILES if not (found / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{repo_id} on the Hub holds no bundle: it has no {missing[0]}.")
    return found


@contextlib.contextmanager
def linked(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """A folder to upload, removed in the end: links to files of another, which it lies beside.

    Args:
        folder: Where the files are.
        files: Their paths in it.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".push-") as name:
        place = Path(name)
        for file in sorted(files):
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).symlink_to((folder / file).resolve())
        yield place


def upload(folder: Path, repo_id: str, *, repo_type: str, is_private: bool) -> str:
    """Upload a folder's files in one commit.

    Args:
        folder: All of it is uploaded.
        repo_id: `user/name`; made if it is not there.
        repo_type: `model` or `dataset`.
        is_private: Whether only its owner sees it.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the Hub refuses; one line says why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(library_name="foreroute")
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=is_private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message="Upload from foreroute",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"The Hub refused {repo_id}: {first_line(error)}") from error
    return str(commit.commit_url)


def without_paths(value: Any) -> Any:
    """A manifest's values as strangers may see them: of each local path its last part alone."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    return LOCAL_PATH.sub(lambda found: PurePath(found[0]).name, value)

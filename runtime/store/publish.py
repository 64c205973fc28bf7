"""Puts a prepared model on the Hub: what loading it needs, a card, and no local path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.data.adapters.loading import PREPARED_MANIFEST
from foreroute.estimators.artifacts import read_json, sha256_of, write_json
from foreroute.estimators.byte_sizes import format_bytes
from foreroute.export.hub import CARD_FILE, HUB_NAME, linked, upload, without_paths
from foreroute.runtime.store.prepared import REMEDY, PreparedModel, RestFile, RowFile

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = Path(__file__).parent / "prepared_card.md"
SMALL_FILES = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.py"),
    *("LICEN[CS]E*", "NOTICE*", "USE_POLICY*"),
)
"""Config, tokenizer, code and licences: all that is pushed besides weights."""
PLACES = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "special_tokens_map_file",
)
"""Fields in which transformers has kept where a file once lay."""


def push_prepared(folder: Path, repo_id: str, *, is_private: bool = False) -> str:
    """Upload a prepared model with a card.

    Args:
        folder: What `foreroute pack` wrote; its files are linked beside it while that lasts.
        repo_id: `user/name`; made if it is not there.
        is_private: Whether only its owner sees it.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If a file is damaged, or the Hub refuses.
    """
    prepared = PreparedModel.read(folder / PREPARED_MANIFEST)
    weights: tuple[RowFile | RestFile, ...] = (*prepared.shards, prepared.rest)
    for entry in weights:
        _require_whole(folder / entry.file, entry.sha256)
    files = [entry.file for entry in weights]
    with linked(folder, [*files, *_small_files(folder)]) as place:
        _leave_paths_out(place / PREPARED_MANIFEST, without_paths)
        for path in sorted(place.rglob("*config.json")):
            _leave_paths_out(path, _portable)
        prepared_card(prepared, repo_id, folder).save(place / CARD_FILE)
        return upload(place, repo_id, repo_type="model", is_private=is_private)


def prepared_card(prepared: PreparedModel, repo_id: str, folder: Path) -> ModelCard:
    """The card of a prepared model.

    Args:
        prepared: Its manifest.
        repo_id: Where it goes.
        folder: Where it lies, with the card of the model it was made of, if that has one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    is_of_the_hub = prepared.revision is not None and HUB_NAME.fullmatch(prepared.source)
    source = without_paths(prepared.source)
    data = ModelCardData(
        base_model=source if is_of_the_hub else None,
        base_model_relation="quantized" if is_of_the_hub else None,
        library_name="foreroute",
        tags=["mixture-of-experts", "expert-offloading", "foreroute"],
        model_name=repo_id.rpartition("/")[2],
        pipeline_tag="text-generation",
        **_licence(folder / CARD_FILE),
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(CARD),
        source=source,
        revision=prepared.revision if is_of_the_hub else None,
        repo_id=repo_id,
        dtype=prepared.dtype,
        expert_dtype=_form(prepared),
        is_exact=prepared.is_exact,
        table=_table(prepared),
        fingerprint=prepared.router_fingerprint.partition("-")[0],
        versions=", ".join(" ".join(pair) for pair in prepared.versions.items()),
    )
    return card


def _require_whole(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing. {REMEDY}")
    if sha256_of(path) != sha256:
        raise ValueError(f"{path} is damaged: it is not what the manifest says. {REMEDY}")


def _small_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SMALL_FILES):
            yield str(path.relative_to(folder))


def _leave_paths_out(path: Path, clean: Callable[[Any], Any]) -> None:
    """Replace a linked JSON file by one without local paths, if there are any in it."""
    found = read_json(path)
    if (cleaned := clean(found)) != found:
        path.unlink()
        write_json(path, cleaned)


def _portable(value: Any) -> Any:
    """A value of a config whose fields that name places name no local one."""
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_paths(entry) if key in PLACES else _portable(entry)
        for key, entry in value.items()
    }


def _licence(card: Path) -> dict[str, Any]:
    """What the source's card says about its licence, which is the rows' too."""
    from huggingface_hub import metadata_load

    data = (metadata_load(card) if card.is_file() else None) or {}
    return {name: data[name] for name in data if name.startswith("license")}


def _form(prepared: PreparedModel) -> str:
    """How the experts are stored, for a sentence."""
    is_as_it_was = prepared.expert_dtype == "auto"
    return "as the source has them" if is_as_it_was else f"in {prepared.expert_dtype}"


def _table(prepared: PreparedModel) -> str:
    num_experts = sum(shard.experts for shard in prepared.shards)
    stored = sum(shard.experts * shard.row_bytes for shard in prepared.shards)
    rows = {
        "experts": f"{num_experts:,} in {len(prepared.shards)} layers",
        "stored": _form(prepared),
        "size": format_bytes(stored),
        "in the source": format_bytes(prepared.plain_bytes),
        "ratio": f"{stored / prepared.plain_bytes:.3f}",
    }
    rows |= {f"exceptions, {name}": f"{n:,}" for name, n in sorted(prepared.exceptions.items())}
    rows |= dict.fromkeys(prepared.stays, "as it was; 12 bits do not pay for it")
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])

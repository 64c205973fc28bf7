"""The prompts of a recording by several processes: made once, read by all, named by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from foreroute.data.packing import TokenSequence
from foreroute.estimators.artifacts import new_file, sha256_of

PREFIX, SUFFIX = "prompts-", ".i32"
NOT_SAID = -1


class PromptFile:
    """Prompts of one length, as int32 in a file that is mapped, not loaded.

    Each row is where the prompt ends (`NOT_SAID` if the dataset does not say), then the token ids.
    """

    def __init__(self, path: Path, length: int) -> None:
        """Map a file that `write` or `find` has named.

        Args:
            path: The file.
            length: Tokens per prompt.
        """
        self.path = path
        self._rows = np.memmap(path, dtype="<i4", mode="r").reshape(-1, 1 + length)

    @property
    def digest(self) -> str:
        """Hex sha256 of the prompts."""
        return self.path.name.removeprefix(PREFIX).removesuffix(SUFFIX)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._rows)

    def __iter__(self) -> Iterator[TokenSequence]:
        """Every prompt."""
        return self.rows(0, len(self))

    def rows(self, start: int, stop: int) -> Iterator[TokenSequence]:
        """Some of the prompts, as many as there are."""
        for end, *token_ids in map(np.ndarray.tolist, self._rows[start:stop]):
            yield TokenSequence(token_ids, None if end == NOT_SAID else end)

    @classmethod
    def find(cls, folder: Path, length: int) -> PromptFile | None:
        """The prompts that an earlier attempt left, if they are whole."""
        for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
            digest = path.name.removeprefix(PREFIX).removesuffix(SUFFIX)
            if path.is_file() and sha256_of(path) == digest:
                return cls(path, length)
        return None

    @classmethod
    def write(cls, folder: Path, prompts: Iterable[TokenSequence], length: int) -> PromptFile:
        """Write prompts, at least one, of one length each."""
        digest = hashlib.sha256()
        written = folder / f"{PREFIX}written{SUFFIX}"
        with new_file(written) as partial, partial.open("wb") as file:
            for prompt in prompts:
                end = prompt.num_prompt_tokens
                values = [NOT_SAID if end is None else end, *prompt.token_ids]
                row = np.asarray(values, dtype="<i4").tobytes()
                digest.update(row)
                file.write(row)
        named = written.with_name(f"{PREFIX}{digest.hexdigest()}{SUFFIX}")
        written.replace(named)
        return cls(named, length)

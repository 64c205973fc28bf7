"""Reads experts from a checkpoint's safetensors files, one expert's matrix at a time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from foreroute.data.adapters.weightless import ParameterShape, parameters_on_meta

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
Sink = Callable[[str, int, int, Tensor], None]
"""(parameter's dotted path, expert_id, first row, rows): takes part of one expert's parameter."""


def checkpoint_files(source: str, revision: str | None = None) -> dict[str, Path]:
    """The file each tensor of a checkpoint lies in.

    Args:
        source: A local folder, or a Hub id (files are downloaded if they are not cached).
        revision: Branch, tag or commit of a Hub id.

    Raises:
        ValueError: If there are no safetensors files; pickled checkpoints are never opened.
    """
    index = _find(source, INDEX_FILE, revision)
    if index is not None:
        names = json.loads(index.read_text())["weight_map"]
        files = {name: _find(source, name, revision) for name in set(names.values())}
        missing = sorted(name for name, path in files.items() if path is None)
        if missing:
            raise ValueError(f"The checkpoint {source} lacks {missing[0]}, which its index lists.")
        return {key: path for key, name in names.items() if (path := files[name]) is not None}
    single = _find(source, SINGLE_FILE, revision)
    if single is None:
        raise ValueError(
            f"{source} has no safetensors files. Other formats (pytorch_model.bin) run code when "
            "they are opened, so they are not read; convert the checkpoint to safetensors first."
        )
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _find(source: str, name: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        source,
        name,
        revision=revision or "main",
        _raise_exceptions_for_missing_entries=False,
    )
    return Path(found) if found else None


@dataclass(frozen=True)
class _Group:
    """The tensors of a checkpoint that together make one parameter, in the order to read them."""

    target: str
    shape: ParameterShape
    converter: Any
    """Transformers' own, or None where the tensor is the parameter itself."""
    keys: list[tuple[str, str | None]]
    """Tensor names, each with the converter's pattern it matched."""


class ExpertReader:
    """Reads a model's experts out of a checkpoint's files.

    Layouts that transformers only stacks and concatenates are read expert by expert with nothing
    in between; any other goes through transformers' converters, one parameter at a time.
    """

    def __init__(
        self,
        model: Any,
        files: Mapping[str, Path],
        targets: Mapping[str, ParameterShape],
    ) -> None:
        """Work out which tensors make which parameter.

        Args:
            model: The model, its experts without weights.
            files: As `checkpoint_files` returns them.
            targets: The experts' parameters by dotted path.

        Raises:
            ValueError: If a parameter has no tensor in the checkpoint.
        """
        self._model = model
        self._files = files
        self._handles: dict[Path, Any] = {}
        self._groups = self._plan(targets)
        missing = sorted(set(targets) - {group.target for group in self._groups})
        if missing:
            raise ValueError(
                f"The checkpoint has no tensors for {missing[0]} (and {len(missing) - 1} more); "
                "it does not fit this version of transformers."
            )

    def _plan(self, targets: Mapping[str, ParameterShape]) -> list[_Group]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self._model)
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        meta = {name: torch.empty(t.shape, device="meta") for name, t in targets.items()}
        prefix = self._model.base_model_prefix
        groups: dict[str, _Group] = {}
        for key in sorted(self._files, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            if target in targets:
                converter = by_pattern.get(pattern)
                new = _Group(target, targets[target], converter, [])
                groups.setdefault(target, new).keys.append((key, pattern))
        return list(groups.values())

    def read(self, sink: Sink) -> None:
        """Hand every expert's weights to `sink`, in the checkpoint's dtype."""
        for group in self._groups:
            if group.converter is None:
                self._read_whole(group, sink)
            elif _is_stacked(group):
                self._read_stacked(group, sink)
            else:
                self._read_converted(group, sink)
        self._handles.clear()

    def _slice(self, key: str) -> Any:
        path = self._files[key]
        if path not in self._handles:
            self._handles[path] = safe_open(path, "pt")
        return self._handles[path].get_slice(key)

    def _read_whole(self, group: _Group, sink: Sink) -> None:
        """The tensor holds all experts, as the module does."""
        tensor = self._slice(group.keys[0][0])
        for expert_id in range(group.shape.shape[0]):
            sink(group.target, expert_id, 0, tensor[expert_id : expert_id + 1][0])

    def _read_stacked(self, group: _Group, sink: Sink) -> None:
        """One tensor per expert and part; the parts lie one below the other."""
        patterns = group.converter.source_patterns
        rows = group.shape.shape[1] // len(patterns)
        for key, pattern in group.keys:
            expert_id = _expert_in(key, str(pattern))
            sink(group.target, expert_id, rows * patterns.index(pattern), self._slice(key)[...])

    def _read_converted(self, group: _Group, sink: Sink) -> None:
        """Through transformers' converter: the whole parameter is in memory for a moment."""
        converter = copy.deepcopy(group.converter)
        for key, pattern in group.keys:
            lazily = self._slice(key)
            converter.add_tensor(group.target, key, pattern, lambda part=lazily: part[...])
        experts = self._model.get_submodule(group.target.rpartition(".")[0])
        with parameters_on_meta(experts):  # some converters look at the shape they shall give
            result = converter.convert(group.target, model=self._model, config=self._model.config)
        whole = result[group.target]
        whole = whole[0] if isinstance(whole, list) else whole
        for expert_id, weight in enumerate(whole):
            sink(group.target, expert_id, 0, weight)


def _is_stacked(group: _Group) -> bool:
    """Whether the converter only stacks experts, and perhaps concatenates their rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = group.converter.operations
    kinds = [type(operation) for operation in operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
        return False
    dims = [operation.dim for operation in operations]
    names_experts = all("*" in pattern for pattern in group.converter.source_patterns)
    return names_experts and dims in ([0], [0, 1])


def _expert_in(key: str, pattern: str) -> int:
    """The number in a tensor's name that stands where the pattern has its star."""
    literal = pattern.strip("^$").replace("\\.", ".")
    before, after = (re.escape(part) for part in literal.split("*", 1))
    found = re.search(f"{before}(\\d+){after}", key)
    if found is None:
        raise ValueError(f"The tensor {key} does not say which expert it belongs to.")
    return int(found.group(1))


def float_dtypes(files: Mapping[str, Path]) -> Iterator[torch.dtype]:
    """Dtypes of the floating tensors of a checkpoint, in order of name."""
    handles: dict[Path, Any] = {}
    for key, path in files.items():
        handle = handles.setdefault(path, safe_open(path, "pt"))
        dtype = handle.get_slice(key)[:0].dtype
        if dtype.is_floating_point:
            yield dtype

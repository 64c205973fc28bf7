"""Reads experts from a checkpoint's tensors, one expert's matrix at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreroute.data.adapters.weightless import ParameterShape, parameters_on_meta


class ExpertRows(NamedTuple):
    """Part of one expert's parameter."""

    target: str
    """The parameter's dotted path."""
    expert_id: int
    row: int
    """First row of the parameter that the part covers."""
    rows: Tensor
    """In the checkpoint's dtype."""


@dataclass(frozen=True)
class _Group:
    """The tensors of a checkpoint that together make one parameter, in the order to read them."""

    target: str
    shape: ParameterShape
    converter: Any
    """Transformers' own, or None where the tensor is the parameter itself."""
    keys: list[tuple[str, str | None]]
    """Tensor names, each with the converter's pattern it matched."""

    @property
    def made(self) -> list[str]:
        """Every parameter that the tensors make: a converter may split them over several."""
        patterns = self.converter.target_patterns if self.converter is not None else []
        own = next((p for p in patterns if self.target.endswith(p)), None)
        if own is None:
            return [self.target]
        return [self.target.removesuffix(own) + pattern for pattern in patterns]


class ExpertReader:
    """Reads a model's experts out of a checkpoint's files.

    Layouts that transformers only stacks and concatenates are read expert by expert with nothing
    in between; any other goes through transformers' converters, one parameter at a time.
    """

    def __init__(
        self,
        model: Any,
        tensors: Mapping[str, Any],
        targets: Mapping[str, ParameterShape],
    ) -> None:
        """Work out which tensors make which parameter.

        Args:
            model: The model, its experts without weights.
            tensors: The checkpoint's by name; indexing one reads it.
            targets: The experts' parameters by dotted path.

        Raises:
            ValueError: If a parameter has no tensor in the checkpoint.
        """
        self._model = model
        self._tensors = tensors
        self._groups = self._plan(targets)
        made = {name for group in self._groups for name in group.made}
        missing = sorted(set(targets) - made)
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
        for key in sorted(self._tensors, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            if target in targets:
                converter = by_pattern.get(pattern)
                new = _Group(target, targets[target], converter, [])
                groups.setdefault(target, new).keys.append((key, pattern))
        return list(groups.values())

    @property
    def tensor_names(self) -> set[str]:
        """Names of the tensors that hold experts."""
        return {name for group in self._groups for name, _ in group.keys}

    def parts(
        self, targets: Collection[str], expert_ids: Collection[int] | None = None
    ) -> Iterator[ExpertRows]:
        """Experts' weights, part by part, in the checkpoint's dtype.

        Args:
            targets: Dotted paths of the parameters that are asked for.
            expert_ids: The experts that are asked for; all if None.
        """
        for group in self._groups:
            if not any(name in targets for name in group.made):
                continue
            wanted = range(group.shape.shape[0]) if expert_ids is None else expert_ids
            if group.converter is None:
                yield from self._whole(group, wanted)
            elif _is_stacked(group):
                yield from self._stacked(group, wanted)
            else:
                for part in self._converted(group):
                    if part.target in targets and part.expert_id in wanted:
                        yield part

    def _whole(self, group: _Group, wanted: Collection[int]) -> Iterator[ExpertRows]:
        """The tensor holds all experts, as the module does."""
        tensor = self._tensors[group.keys[0][0]]
        for expert_id in wanted:
            yield ExpertRows(group.target, expert_id, 0, tensor[expert_id : expert_id + 1][0])

    def _stacked(self, group: _Group, wanted: Collection[int]) -> Iterator[ExpertRows]:
        """One tensor per expert and part; the parts lie one below the other."""
        patterns = group.converter.source_patterns
        rows = group.shape.shape[1] // len(patterns)
        for key, pattern in group.keys:
            expert_id, row = _expert_in(key, str(pattern)), rows * patterns.index(pattern)
            if expert_id in wanted:
                yield ExpertRows(group.target, expert_id, row, self._tensors[key][...])

    def _converted(self, group: _Group) -> Iterator[ExpertRows]:
        """Through transformers' converter: the whole parameter is in memory for a moment."""
        converter = copy.deepcopy(group.converter)
        for key, pattern in group.keys:
            lazily = self._tensors[key]
            converter.add_tensor(group.target, key, pattern, lambda part=lazily: part[...])
        experts = self._model.get_submodule(group.target.rpartition(".")[0])
        with parameters_on_meta(experts):  # some converters look at the shape they shall give
            result = converter.convert(group.target, model=self._model, config=self._model.config)
        for name in group.made:
            whole = result[name]
            whole = whole[0] if isinstance(whole, list) else whole
            for expert_id, weight in enumerate(whole):
                yield ExpertRows(name, expert_id, 0, weight)


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
    found = _numbered(pattern).search(key)
    if found is None:
        raise ValueError(f"The tensor {key} does not say which expert it belongs to.")
    return int(found.group(1))


@lru_cache
def _numbered(pattern: str) -> re.Pattern[str]:
    """What finds the number: thousands of names have one pattern."""
    literal = pattern.strip("^$").replace("\\.", ".")
    before, after = (re.escape(part) for part in literal.split("*", 1))
    return re.compile(f"{before}(\\d+){after}")

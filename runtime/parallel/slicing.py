"""Which part of every expert a process holds: 1/N of the intermediate dimension.

The first products of a slice give that part of the activations, its second product a part of the
sum over them; the outputs of all slices add up to the expert's.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from foreroute.data.adapters.weightless import ParameterShape, parameter_shapes
from foreroute.runtime.parallel.cuts import Cut, Cuts, Span
from foreroute.runtime.parallel.ranks import SliceRanks
from foreroute.runtime.store.encodings import EncodedParameter, Encoder
from foreroute.runtime.store.host_store import RowLayout

FIRST, SECOND = ("gate_up_proj", "gate_proj", "up_proj"), "down_proj"
MOST_PROCESSES = 16
"""Numbers up to this one are tried for what a refusal says would work."""


class ExpertSlice:
    """Cuts one layer's experts for one process."""

    def __init__(
        self,
        experts: nn.Module,
        ranks: SliceRanks,
        encoder: Encoder | None = None,
        *,
        is_stored: bool = False,
    ) -> None:
        """Work out the cuts.

        Args:
            experts: The layer's experts module, with or without weights.
            ranks: This process among the others.
            encoder: How the experts are stored; as they are if None.
            is_stored: Whether they come as they are stored, and cannot be rounded again.

        Raises:
            ValueError: If the processes do not divide the intermediate dimension, or groups of it
                that are stored together, or a parameter is none that is known; says what would
                work.
        """
        self.experts, self._ranks = experts, ranks
        self.whole = parameter_shapes(experts)
        """What the parameters are before they are cut, by name."""
        self.layout = RowLayout.of(experts, encoder)
        """How a whole expert is stored."""
        self._comes_stored = is_stored or self.layout.is_native
        self._require_known()
        self._require_fitting(ranks.num_ranks)
        cuts = {name: self._cut(name) for name in self.whole}
        self._cuts, is_first = cuts, ranks.is_first
        self.parameters = Cuts(cuts, is_first=is_first)
        """Cuts the module's parameters."""
        stored = {name: cut for name, cut in cuts.items() if name not in self.layout.encoded}
        for name, parameter in self.layout.encoded.items():
            if self.is_cut_as_stored(parameter):
                stored |= self._part_cuts(name, parameter)
        self.stored = Cuts(stored, is_first=is_first)
        """Cuts what a row holds, where that is cut as it is stored."""

    def is_cut_as_stored(self, parameter: EncodedParameter) -> bool:
        """Whether what is stored is cut; if not, it is decoded, cut, and encoded without loss."""
        return self._comes_stored and (parameter.encoding.is_native or not parameter.is_exact)

    @property
    def _width(self) -> int:
        """Intermediate dimensions of an expert."""
        return self.whole[SECOND].shape[1:][0 if self.experts.is_transposed else 1]

    def _require_known(self) -> None:
        for name in self.whole:
            if name.removesuffix("_bias") not in (*FIRST, SECOND):
                raise ValueError(f"Experts with a parameter {name} cannot be cut into slices.")

    def _require_fitting(self, num_ranks: int) -> None:
        if self._fits(num_ranks):
            return
        works = [str(n) for n in range(2, MOST_PROCESSES + 1) if self._fits(n)]
        stored = "" if not self.layout.encoded else ", as they are stored"
        raise ValueError(
            f"{num_ranks} processes do not divide the experts' {self._width} intermediate "
            f"dimensions{stored}; these do: {', '.join(works) or 'none'}."
        )

    def _fits(self, num_ranks: int) -> bool:
        """Whether so many processes can have a slice each."""
        if self._width % num_ranks:
            return False
        for name, parameter in self.layout.encoded.items():
            encoding, axis = parameter.encoding, int(name == SECOND)
            side = "columns" if axis else "rows"
            narrow = replace(encoding, **{side: getattr(encoding, side) // num_ranks})
            try:
                grain = narrow.grain
            except ValueError:  # no group of inputs divides it
                return False
            is_whole = grain == encoding.grain and self._width // num_ranks % grain[axis] == 0
            if self.is_cut_as_stored(parameter) and not is_whole:
                return False
        return True

    def _cut(self, name: str) -> Cut:
        """How a parameter is cut, as the module has it."""
        matrix = name.removesuffix("_bias")
        is_bias = name != matrix
        if matrix == SECOND and is_bias:
            return Cut(-1, ())
        axis = 0 if is_bias or (matrix != SECOND) != bool(self.experts.is_transposed) else 1
        return Cut(axis, self._spans(matrix))

    def _spans(self, matrix: str) -> tuple[Span, ...]:
        """Which intermediate dimensions of a matrix are this process'."""
        is_joint = matrix == "gate_up_proj"
        is_halved = is_joint and bool(self.experts.is_concatenated)
        part = self._width // self._ranks.num_ranks * (1 + (is_joint and not is_halved))
        start = self._ranks.rank * part
        halves = range(0, self._width * (1 + is_halved), self._width)
        return tuple(Span(half + start, half + start + part) for half in halves)

    def _part_cuts(self, name: str, parameter: EncodedParameter) -> dict[str, Cut]:
        """How the parts are cut that a matrix is stored in; their rows are its outputs."""
        axis, encoding = int(name == SECOND), parameter.encoding
        extent, cuts = (encoding.rows, encoding.columns)[axis], {}
        for suffix, (shape, _) in encoding.parts().items():
            spans = self._spans(name)
            if shape[axis] == 1 < extent:  # one scale for all: each process has it
                spans = (Span(0, 1),)
            else:
                ratio = extent // shape[axis]
                spans = tuple(Span(start // ratio, stop // ratio) for start, stop in spans)
            cuts[name + suffix] = Cut(axis, spans)
        return cuts

    def shapes(self) -> dict[str, ParameterShape]:
        """The parameters as this process holds them, by name."""
        found = {}
        for name, (shape, dtype) in self.whole.items():
            cut = self._cuts[name]
            lengths = list(shape)
            if cut.axis >= 0:
                lengths[1 + cut.axis] = cut.length
            found[name] = ParameterShape(tuple(lengths), dtype)
        return found

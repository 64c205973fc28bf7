"""What rules on a miss cost in quality and give in bytes and time, measured on one model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.estimators import MoEGeometry
from foreroute.estimators.artifacts import read_versioned, write_json
from foreroute.export.hub import FRONTIER_NAME

FORMAT_VERSION = 1
REMEDY = "Measure it again: foreroute evaluate --rules ... --slots ... --out F."


@dataclass(frozen=True, kw_only=True)
class PriceRow:
    """One rule at one number of slots."""

    model: str
    """What the user called it."""
    rule: str
    """As `on_miss` takes it; `fetch` is exact."""
    slots: str
    """Per layer, as the user gave them: a number or a share."""
    exact_layers: str = ""
    """Layers that fetch whatever the rule."""
    kl: float
    """Mean divergence of the next token's distribution from the exact model's, nats."""
    kl_interval: tuple[float, float]
    kl_noise: float
    """The same of the exact engine at these slots from itself at others."""
    perplexity_ratio: float
    """Perplexity over the exact engine's, on the same tokens."""
    perplexity_interval: tuple[float, float]
    top1_agreement: float
    """Share of positions with the exact engine's likeliest token, 0..1."""
    top1_interval: tuple[float, float]
    agreement: float
    """Share of the router's experts that ran where the rule decided, 0..1."""
    hit_rate: float
    """Share of the experts that ran which were resident, 0..1."""
    bytes_per_token: float
    tpot_ms: float
    """Median time of a decode step."""
    by_position: list[dict[str, float]]
    """The same figures along the continuation."""
    same_tokens: float | None = None
    """Mean number of tokens that it writes, greedily, before the first that the exact engine would
    not have written; None where nothing was written."""

    @property
    def worst_loss(self) -> float:
        """The upper end of what perplexity rises by; .01 is one per cent."""
        return self.perplexity_interval[1] - 1


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Rules of one model on one kind of device."""

    geometry: MoEGeometry
    """The model's."""
    device: str
    """What it was measured on."""
    settings: dict[str, Any]
    """Text, lengths, dtypes, bundle."""
    command: str
    """What measured it."""
    versions: dict[str, str]
    rows: list[PriceRow]

    @property
    def is_timed(self) -> bool:
        """Whether its times are a GPU's; a CPU's say nothing of what rules save there."""
        return self.device != "cpu"

    @staticmethod
    def find(path: Path | None, bundle: Path | None) -> Frontier:
        """The frontier that a user names, or the one that a bundle carries.

        Args:
            path: Its file.
            bundle: A bundle's folder; its `frontier.json`, if no file is named.

        Raises:
            FileNotFoundError: If there is none; says how it is measured.
            ValueError: If it is damaged.
        """
        if path is None and bundle is not None:
            path = bundle / FRONTIER_NAME
        if path is None or not path.is_file():
            raise FileNotFoundError(
                f"--quality-budget needs what rules cost on this model, and {path or 'nothing'} "
                "says it. Measure it: foreroute evaluate --rules substitute:0.5,... --out F, and "
                "give --frontier F."
            )
        return Frontier.read(path)

    @staticmethod
    def read(path: Path) -> Frontier:
        """A frontier from its file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged or of another version.
        """
        return read_versioned(path, FORMAT_VERSION, Frontier, REMEDY)

    def require_fits(self, geometry: MoEGeometry) -> None:
        """Refuse a model that it was not measured on.

        Raises:
            ValueError: If it is another one.
        """
        self.geometry.require_match(geometry, what="Frontier", remedy=REMEDY)

    def going_on_from(self, path: Path | None) -> Frontier:
        """This one with the rows that a file of the same measurement has already.

        Args:
            path: The file; nothing is read if it is not there.

        Raises:
            ValueError: If it was measured on something else.
        """
        if path is None or not path.exists():
            return self
        before = Frontier.read(path)
        before.require_fits(self.geometry)
        for name in ("device", "settings"):
            then, now = getattr(before, name), getattr(self, name)
            if then != now:
                raise ValueError(
                    f"{path} was measured on {then}, not on {now}: give another --out."
                )
        return dataclasses.replace(self, rows=before.rows)

    def write(self, path: Path) -> None:
        """Write it; a reader never sees half of it."""
        content = dataclasses.asdict(self) | {"geometry": self.geometry.to_dict()}
        write_json(path, {"format_version": FORMAT_VERSION} | content)

    def at(self, slots: str) -> list[PriceRow]:
        """The rows of one number of slots.

        Raises:
            ValueError: If it was not measured.
        """
        rows = [row for row in self.rows if row.slots == slots]
        if not rows:
            known = ", ".join(dict.fromkeys(row.slots for row in self.rows))
            raise ValueError(
                f"The frontier was measured at {known} slots, not at {slots}. Give one of them as "
                f"--expert-slots, or measure them: foreroute evaluate --slots {slots} ..."
            )
        return rows

    def choose(self, slots: str, quality_budget: float) -> PriceRow:
        """The rule that takes least among those whose loss is certain to be small enough.

        Args:
            slots: As the user gives them.
            quality_budget: How far perplexity may rise: .01 for one per cent. The upper end of a
                rule's interval must lie below.

        Returns:
            The fastest on a GPU; where times were a CPU's, the one with the fewest bytes per token.

        Raises:
            ValueError: If these slots were not measured.
        """
        rows = self.at(slots)
        fitting = [row for row in rows if row.rule == "fetch" or row.worst_loss <= quality_budget]
        if not fitting:
            raise ValueError(f"The frontier has no rule within {quality_budget:.2%} at {slots}.")
        return min(fitting, key=lambda row: row.tpot_ms if self.is_timed else row.bytes_per_token)


def parse_quality_budget(text: str) -> float:
    """`1%` or `0.01` as a share of perplexity.

    Raises:
        ValueError: If it is neither.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"--quality-budget takes a rise of perplexity such as 1%, not {text!r}.")
    return share

"""A rule on a miss as a user writes it: parts joined by `+`, each a file beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from foreroute.estimators.byte_sizes import parse_bytes

Weights = Literal["true-weights", "predicted-weights"]
PARTS = {
    "fetch": "wait for the expert: exact, and the default",
    "predicted": "run the experts predicted from the layer before; `:predicted-weights` weighs "
    "them by the predicted logits too, as the paper's engine does",
    "bonus": "choose as if residents scored `:lambda` of the scores' range more; .1 unless said",
    "skip": "leave it out; with `:F` only if its weight is under a share F of 1/K",
    "substitute": "the best resident expert takes its place if its weight is under `:F` of 1/K; "
    ".5 unless said",
    "threshold": "leave out or substitute while that takes less than `:mass` of the token's gate "
    "weights",
    "budget": "fetch the heaviest for `:bytes`, or `:ms` of the link, per token; the rest is left "
    "out or substituted",
    "later": "fetch what was left out or substituted behind the layer, if the next tokens are "
    "likely to use it",
}
"""What can be joined to a rule, and what each part does."""
ALONE = ("fetch",)
EXCLUSIVE = (("predicted", "bonus"), ("skip", "substitute"), ("threshold", "budget"))
DEFAULT_BONUS, DEFAULT_SHARE = 0.1, 0.5


@dataclass(frozen=True, kw_only=True)
class MissRule:
    """What happens to a decode step's choice of experts, in three steps; see `decide`.

    Which experts are wanted; which of the absent ones nobody waits for; what runs in their place.
    """

    text: str
    """As it was written."""
    bonus: float = 0.0
    """Residents rank higher by this share of the scores' range."""
    predicted: Weights | None = None
    """Predicted experts are wanted in place of the router's, with these gate weights."""
    is_leaving: bool = False
    """Whether absent experts are left out or replaced at all."""
    share: float | None = None
    """Only those whose weight is under this share of 1/K, and never the heaviest."""
    mass: float | None = None
    """Only as many, the lightest first, as weigh this share of the token's gate weights together,
    and never the heaviest."""
    budget_bytes: int | None = None
    """The heaviest are fetched as long as a token has not copied so many bytes."""
    budget_ms: float | None = None
    """The same as time on the link, in ms."""
    is_replacing: bool = False
    """Whether residents take the place of what is left."""
    is_later: bool = False
    """Whether what is left may be fetched behind the layer, where that pays."""

    @property
    def is_exact(self) -> bool:
        """Whether every expert that the router chose is waited for."""
        return not (self.bonus or self.predicted or self.is_leaving)

    @property
    def needs_scores(self) -> bool:
        """Whether it weighs experts that the router did not choose, by the router's logits."""
        return bool(self.bonus or self.predicted or self.is_replacing)

    @property
    def waits_for_none(self) -> bool:
        """Whether it leaves whatever is absent: then all of it is fetched behind the layer."""
        limits = (self.share, self.mass, self.budget_bytes, self.budget_ms)
        return self.is_leaving and all(limit is None for limit in limits)

    @property
    def needs_predictions(self) -> bool:
        """Whether each prediction is fetched: nothing else brings experts, or those run."""
        return self.predicted is not None or self.waits_for_none

    @property
    def fetches_behind(self) -> bool:
        """Whether what nobody waited for may be fetched behind the layer."""
        return self.waits_for_none or self.is_later

    @property
    def has_budget(self) -> bool:
        """Whether a token's copies are limited."""
        return self.budget_bytes is not None or self.budget_ms is not None

    def budget_experts(self, expert_bytes: int, copy_ms: float) -> float:
        """The budget in experts per token; 0 without one.

        Args:
            expert_bytes: Bytes of an expert.
            copy_ms: One expert over the link.
        """
        if self.budget_ms is not None:
            return self.budget_ms / copy_ms
        return (self.budget_bytes or 0) / expert_bytes


@lru_cache
def find_rule(text: str) -> MissRule:
    """The rule that a user means.

    Args:
        text: Parts joined by `+`: `substitute:0.5`, `bonus:0.05+substitute:0.4+later`.

    Raises:
        ValueError: If a part is not known, says nothing that it takes, or contradicts another.

    Example:
        >>> find_rule("substitute:0.5").share
        0.5
    """
    parts = _parts(text)
    names = set(parts)
    for one, other in EXCLUSIVE:
        if {one, other} <= names:
            raise ValueError(f"on_miss={text}: {one} and {other} contradict each other.")
    for name in ALONE:
        if name in names and len(names) > 1:
            raise ValueError(f"on_miss={text}: {name} waits for every expert, and stands alone.")
    has_limit = bool(names & {"threshold", "budget"})
    is_leaving = has_limit or bool(names & {"skip", "substitute"})
    if "later" in names and not is_leaving:
        raise ValueError(f"on_miss={text}: later needs skip, substitute, threshold or budget.")
    found: dict[str, Any] = {"is_leaving": is_leaving, "is_replacing": "substitute" in names}
    if "bonus" in parts:
        found["bonus"] = _number(text, "bonus", parts["bonus"] or str(DEFAULT_BONUS), most=1.0)
    if "predicted" in parts:
        found["predicted"] = _weights(text, parts["predicted"])
    share = parts.get("skip") or parts.get("substitute")
    if share is None and "substitute" in names and not has_limit:
        share = str(DEFAULT_SHARE)
    if share is not None:
        found["share"] = _number(text, "a share of 1/K", share, most=1000.0)
    if "threshold" in parts:
        found["mass"] = _number(text, "threshold", parts["threshold"], most=1.0)
    if "budget" in parts:
        if share is not None:
            raise ValueError(f"on_miss={text}: give either a share of 1/K or a budget.")
        found |= _budget(text, parts["budget"])
    return MissRule(text=text, is_later="later" in names, **found)


def _parts(text: str) -> dict[str, str | None]:
    parts: dict[str, str | None] = {}
    for part in text.split("+"):
        name, _, value = part.partition(":")
        if name not in PARTS:
            raise ValueError(f"Unknown on_miss {text!r}; known parts: {', '.join(PARTS)}.")
        if name in parts:
            raise ValueError(f"on_miss={text} names {name} twice.")
        if value and name in ("fetch", "later"):
            raise ValueError(f"on_miss={text}: {name} takes no {value!r}.")
        parts[name] = value or None
    return parts


def _number(text: str, what: str, value: str | None, *, most: float) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = -1.0
    if not 0 < number <= most:
        raise ValueError(
            f"on_miss={text}: {what} must be a number above 0 and at most {most:g}, not {value}."
        )
    return number


def _weights(text: str, value: str | None) -> Weights:
    for known in ("true-weights", "predicted-weights"):
        if (value or "true-weights") == known:
            return known
    raise ValueError(
        f"on_miss={text}: predicted takes true-weights or predicted-weights, not {value}."
    )


def _budget(text: str, value: str | None) -> dict[str, Any]:
    if value and value.endswith("ms"):
        return {"budget_ms": _number(text, "budget", value.removesuffix("ms"), most=1e6)}
    try:
        return {"budget_bytes": parse_bytes(value or "")}
    except ValueError as error:
        raise ValueError(
            f"on_miss={text}: budget takes bytes or ms per token, such as 20MB or 1.5ms."
        ) from error

"""Prefetch rules: what to fetch before it is known to be needed, and when that pays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

PrefetchKind = Literal["none", "all", "head", "whole", "pieces"]
LEAST_CONFIDENCE = 0.1
"""Below, the rule hardly ever finds a prefetch worth it; looking costs time."""
HEAD_CONFIDENCE = 0.5
"""Anything from 0 to 0.7 costs the same on the recorded route; bad predictors need some floor."""
PRIOR_PREFETCHES = 20.0
"""Prefetches that predictions are trusted for before any has come true or not."""
PRIOR_DEMAND = 0.5
"""How often a layer is taken to fetch on demand before it has been seen."""
DEMAND_MEMORY = 0.95
"""Kept of a layer's habit of demanding at each decode step."""

ATTENTION_SHARE = 0.5
"""Share of a layer's compute that is taken to be its attention. Only that can hide a fetch for
experts that are predicted from their own layer's input."""
READOUT_SHARE = 0.4
"""Share of a layer's compute that an early attention takes before a prediction; a guess."""


@dataclass(frozen=True, kw_only=True)
class PrefetchRule:
    """Decides, for one expert that is predicted and absent, whether fetching it now pays.

    All times in ms of the link. The same few products serve host, GPU and simulator.
    """

    kind: PrefetchKind
    """`none` fetches nothing early. `all` fetches every prediction whole, and its layer waits for
    it. `head` fetches, of the next layer's likeliest absent expert, the part that comes while a
    layer computes: the GPU's rule. `whole` fetches what pays by this rule, whole: the host's rule.
    `pieces` fetches what pays in pieces, only while the link would idle."""
    horizon: int = 1
    """Layers ahead that are looked at, H."""
    least_confidence: float = 0.0
    """Predictions below are not looked at, 0..1."""
    trust_tokens: float = 200.0
    """Prefetches over which it learns how often its guesses at absent experts are right."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If one is out of its range.
        """
        if self.horizon < 1:
            raise ValueError(f"A horizon must be at least 1 layer, not {self.horizon}.")
        if self.kind == "head" and self.horizon != 1:
            raise ValueError(f"prefetch head looks 1 layer ahead, not {self.horizon}.")

    @staticmethod
    def is_worth(
        probability: float, saved_ms: float, victim_probability: float, copy_ms: float
    ) -> bool:
        """Whether to evict for an expert and begin to fetch it.

        Args:
            probability: That the expert is needed.
            saved_ms: Stall saved if so: what of its copy fits before its layer is reached, behind
                what is on the link already.
            victim_probability: That the expert it evicts is needed.
            copy_ms: Stall if that one must come back.
        """
        return probability * saved_ms > victim_probability * copy_ms

    @staticmethod
    def may_overhang(
        probability: float, hidden_ms: float, overhang_ms: float, demand_probability: float
    ) -> bool:
        """Whether to send a piece that will still be on the link when the next layer is reached.

        Args:
            probability: That the expert is needed.
            hidden_ms: Link time before that, saved if so.
            overhang_ms: Link time after that.
            demand_probability: That the next layer then needs the link itself.
        """
        return probability * hidden_ms > demand_probability * overhang_ms


_RULES = {
    "none": PrefetchRule(kind="none"),
    "all": PrefetchRule(kind="all"),
    "head": PrefetchRule(kind="head", least_confidence=HEAD_CONFIDENCE),
    "whole": PrefetchRule(kind="whole", least_confidence=LEAST_CONFIDENCE),
    "pieces": PrefetchRule(kind="pieces", least_confidence=LEAST_CONFIDENCE),
}


def find_prefetch_rule(name: str, horizon: int = 1) -> PrefetchRule:
    """The rule behind a name, at a horizon.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    rule = _RULES.get(name.strip())
    if rule is None:
        raise ValueError(f"Unknown prefetch {name!r}; known: {', '.join(_RULES)}.")
    return dataclasses.replace(rule, horizon=horizon)

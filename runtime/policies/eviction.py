"""Eviction policies: how an expert's worth follows from its uses; the least worth goes first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

WorthKind = Literal["recency", "frequency", "adaptive", "static", "future"]
DEFAULT_POLICY = "default"
HALF_LIFE_STEPS = 20.0
LIKELY_BONUS = 1.0
"""Best of 0.25 to 4 on the bundled model's held-out traces; flat around it (docs/policies.md)."""
PROMPT_WEIGHT = 0.25
"""Best of 0.1 to 1 on the recorded route and no loss on the bundled model's (docs/policies.md)."""


@dataclass(frozen=True)
class ScoreRule:
    """How an expert's score follows from its uses; the slot with the least score is evicted.

    At each step `score = decay * score`, and `+ 1` for experts in use; or, for recency, the score
    of experts in use is the step's number.
    """

    decay: float = 1.0
    """1 counts uses (LFU); 0.5 ** (1 / h) halves a use's worth every h steps (LRFU)."""
    is_recency: bool = False
    """Least recently used goes first."""
    is_adaptive: bool = False
    """Whichever of these two scores leads counts; see `duel.py`."""


@dataclass(frozen=True, kw_only=True)
class EvictionPolicy:
    """How experts are scored. One rule serves host, GPU and simulator.

    At each decode step of a layer the score of every expert is multiplied by `decay`; each expert
    in use gains 1, each expert that is likely for the next token gains `likely_bonus` x its
    probability. The resident expert with the least score is evicted; one of this token never is.
    """

    name: str
    """What the user types."""
    worth: WorthKind = "frequency"
    """`frequency` as above; `recency`: the score is the step of the last use; `adaptive`: whichever
    of the two a duel says (`duel.py`); `static`: uses of the warm start alone count; `future`: the
    next use, which only a replay knows."""
    decay: float = 1.0
    """Factor on scores per decode step, over 0 and at most 1; 1 counts uses (LFU)."""
    likely_bonus: float = 0.0
    """Uses that certainty of use by the next token is worth."""
    prompt_weight: float = 1.0
    """What one use by the prompt counts, in uses by a decode step."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If one is out of its range.
        """
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie over 0 and at most at 1, not {self.decay}.")
        if self.likely_bonus < 0 or self.prompt_weight < 0:
            raise ValueError("likely_bonus and prompt_weight must not be negative.")

    @property
    def needs_future(self) -> bool:
        """Whether it is a bound that no engine can reach."""
        return self.worth == "future"

    def device_rule(self) -> ScoreRule:
        """The form that `kernels.plan` runs on the GPU.

        Raises:
            ValueError: If the kernel has no such rule.
        """
        if self.worth == "recency":
            return ScoreRule(is_recency=True)
        if self.worth == "frequency":
            return ScoreRule(decay=self.decay)
        if self.worth == "adaptive":
            return ScoreRule(decay=self.decay, is_adaptive=True)
        raise ValueError(f"Policy {self.name} has no form on the device.")


def decay_of(half_life_steps: float) -> float:
    """The factor per step that halves a use's worth every so many steps.

    Raises:
        ValueError: If the half-life is not positive.
    """
    if half_life_steps <= 0:
        raise ValueError(f"A half-life must be positive, not {half_life_steps} steps.")
    return float(0.5 ** (1 / half_life_steps))


_LRFU = EvictionPolicy(name="lrfu", decay=decay_of(HALF_LIFE_STEPS))
_BEST = dataclasses.replace(_LRFU, name=DEFAULT_POLICY, prompt_weight=PROMPT_WEIGHT)
_POLICIES = {
    policy.name: policy
    for policy in (
        _BEST,
        EvictionPolicy(name="lru", worth="recency"),
        EvictionPolicy(name="lfu"),
        _LRFU,
        dataclasses.replace(_BEST, name="adaptive", worth="adaptive"),
        dataclasses.replace(_BEST, name="predicted", likely_bonus=LIKELY_BONUS),
        EvictionPolicy(name="static", worth="static"),
        EvictionPolicy(name="belady", worth="future"),
    )
}


def known_policies() -> tuple[str, ...]:
    """Names that `find_policy` takes, the bound last."""
    return tuple(_POLICIES)


def find_policy(name: str) -> EvictionPolicy:
    """The policy behind a name; `lrfu:30` and `predicted:30` set the half-life in decode steps.

    Raises:
        ValueError: If there is none; the message lists the known ones.
    """
    word, _, number = name.strip().partition(":")
    policy = _POLICIES.get(word)
    if policy is None or (number and word not in ("lrfu", "predicted")):
        raise ValueError(
            f"Unknown policy {name!r}; known: {', '.join(_POLICIES)} "
            "(lrfu:30 and predicted:30 set the half-life in steps)."
        )
    if not number:
        return policy
    try:
        decay = decay_of(float(number))
    except ValueError as error:
        raise ValueError(f"Policy {name!r} needs a positive half-life: {error}") from None
    return dataclasses.replace(policy, name=name.strip(), decay=decay)

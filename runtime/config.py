"""What a user can set about a run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from foreroute.runtime.on_miss import MissRule, find_rule
from foreroute.runtime.policies import find_policy

CacheKind = Literal["keep", "none"]
DecideOn = Literal["auto", "host"]
PrefetchMode = Literal["none", "auto", "all"]
LayerSlots = Literal["equal", "by-misses"]

_CHOICES = {
    "cache": get_args(CacheKind),
    "decide_on": get_args(DecideOn),
    "prefetch": get_args(PrefetchMode),
    "layer_slots": get_args(LayerSlots),
}
_KINDS: dict[str, tuple[type, ...]] = {
    "context": (int,),
    "budget": (int, type(None)),
    "agreement_floor": (int, float),
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a model."""

    expert_slots: str = "25%"
    """Cache slots per MoE layer: a number, a share of the experts such as `25%`, or `auto`: as
    many as the device has memory for."""
    context: int = 4096
    """Tokens of prompt and answer that `expert_slots=auto` leaves memory for."""
    layer_slots: LayerSlots = "equal"
    """`equal`, or `by-misses`: layers that miss more get more. Misses are counted in the recording
    that `warm_start` names."""
    eviction: str = "default"
    """Which expert goes when room is needed: `default`, `lru`, `lfu`, `lrfu`, `predicted` or
    `static`; `lrfu:30` sets a half-life in decode steps."""
    warm_start: str = "prompt"
    """What fills the slots before the first token: the `prompt`'s routing, `none`, or the path of
    recorded routing (traces, or what else `foreroute simulate` reads)."""
    prefetch: PrefetchMode = "none"
    """Which predicted experts are loaded before the router asks: `none` (on demand); `auto` those
    that are expected to save more time than they cost, and none while looking ahead does not pay;
    `all` each prediction. On-miss rules that wait for nothing, or run predicted experts, load each
    prediction under `auto` too."""
    profile: str = "h100-pcie5"
    """The machine that `prefetch="auto"` decides by where the host decides: a built-in profile, or
    a file that `foreroute profile` wrote."""
    on_miss: str = "fetch"
    """What a decode step does about a chosen expert that is not resident. `fetch` waits for it
    (exact). All else is speculative execution and changes the output: `skip`, `substitute:0.5`,
    `bonus:0.1`, `substitute+threshold:0.15`, `budget:20MB`, `predicted`; see `on_miss.PARTS`."""
    exact_layers: str = ""
    """Layers that fetch whatever the rule: decoder layer indices such as `0` or `0-1,7`."""
    budget: int | None = None
    """Experts prefetched per token and layer; the model's top-k if None."""
    agreement_floor: float = 0.5
    """Speculative execution switches itself off when fewer of its experts than this share, over
    the last tokens, are ones the true router chose. 0..1."""
    cache: CacheKind = "keep"
    """`keep` keeps experts in their slots, under `eviction`; `none` forgets all slots before each
    layer: the baseline without an expert cache."""
    decide_on: DecideOn = "auto"
    """`auto` lets a GPU decide what to fetch and evict, inside one graph per decode step, wherever
    model and settings allow it; `host` never does."""

    def __post_init__(self) -> None:
        """Check every choice.

        Raises:
            ValueError: If a value is unknown or the values contradict each other.
        """
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(f"{name} must be a number, not {value!r}.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}."
                )
        if self.rule.predicted and not self.looks_ahead:
            raise ValueError(
                f"on_miss={self.on_miss} runs predicted experts: give prefetch=auto or all."
            )
        if self.cache == "none" and not self.is_exact:
            raise ValueError(f"on_miss={self.on_miss} needs slots that are kept: use cache=keep.")
        if self.cache == "none" and self.looks_ahead:
            raise ValueError(f"prefetch={self.prefetch} needs slots that are kept: use cache=keep.")
        if find_policy(self.eviction).needs_future:
            raise ValueError(f"eviction={self.eviction} is a bound that only a simulator reaches.")
        if self.layer_slots == "by-misses" and self.warm_start in ("none", "prompt"):
            raise ValueError(
                "layer_slots=by-misses counts misses in recorded routing: give its path as "
                f"warm_start, not {self.warm_start!r}."
            )
        if self.context < 0:
            raise ValueError(f"context must not be negative, not {self.context}.")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1 expert, not {self.budget}.")
        if not 0 <= self.agreement_floor <= 1:
            raise ValueError(f"agreement_floor must lie in 0..1, not {self.agreement_floor}.")

    @property
    def looks_ahead(self) -> bool:
        """Whether later layers' experts are predicted."""
        return self.prefetch != "none"

    @property
    def rule(self) -> MissRule:
        """What `on_miss` means."""
        return find_rule(self.on_miss)

    @property
    def is_exact(self) -> bool:
        """Whether the output is that of the unchanged model."""
        return self.rule.is_exact

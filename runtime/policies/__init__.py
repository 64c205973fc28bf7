"""Rules of the expert cache: what to evict, what to fetch early, how many slots a layer gets."""

from foreroute.runtime.policies.chooser import PrefetchChooser
from foreroute.runtime.policies.duel import Duel
from foreroute.runtime.policies.eviction import (
    DEFAULT_POLICY,
    EvictionPolicy,
    find_policy,
    known_policies,
)
from foreroute.runtime.policies.give_up import GiveUp
from foreroute.runtime.policies.layer_slots import (
    equal_slots,
    miss_curve,
    share_slots,
    slots_by_misses,
)
from foreroute.runtime.policies.layer_state import LayerState
from foreroute.runtime.policies.prefetching import PrefetchRule, find_prefetch_rule

__all__ = [
    "DEFAULT_POLICY",
    "Duel",
    "EvictionPolicy",
    "GiveUp",
    "LayerState",
    "PrefetchChooser",
    "PrefetchRule",
    "equal_slots",
    "find_policy",
    "find_prefetch_rule",
    "known_policies",
    "miss_curve",
    "share_slots",
    "slots_by_misses",
]

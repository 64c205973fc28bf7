"""What the layers of an engine share where the host decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreroute.runtime.driver import RunState
from foreroute.runtime.host.ledger import HostLedger
from foreroute.runtime.host.predictor import HostPredictor
from foreroute.runtime.host.transfers import Transfers
from foreroute.runtime.on_miss.agreement import AgreementGuard
from foreroute.runtime.on_miss.budget import Allowance
from foreroute.runtime.policies import Duel, EvictionPolicy, GiveUp, PrefetchChooser
from foreroute.runtime.policies.give_up import LOOK_AHEAD


@dataclass(kw_only=True)
class HostRun(RunState):
    """Settings, shared resources and counters of one engine."""

    transfers: Transfers
    predictor: HostPredictor | None
    guard: AgreementGuard
    policy: EvictionPolicy
    duel: Duel = field(default_factory=Duel)
    """Which rule evicts under an adaptive policy."""
    allowance: Allowance | None = None
    """What each decode step may still copy; only under a rule with a budget."""
    chooser: PrefetchChooser | None = None
    """Decides which predictions are fetched early; every one is if None."""
    give_up: GiveUp | None = None
    """Decides which decode steps look ahead; every one does if None."""
    ledger: HostLedger = field(default_factory=HostLedger)
    """What looking ahead saves and takes."""

    @property
    def is_speculating(self) -> bool:
        """Whether this forward pass may change the output."""
        return not (self.is_prefill or self.config.is_exact) and self.guard.is_open

    def begin_step(self) -> None:
        """Decide whether a decode step looks ahead."""
        if self.give_up is not None and self.num_tokens == 1:  # others would blur its trials
            self.is_looking_ahead = self.give_up.next_variant() == LOOK_AHEAD
        if self.allowance is not None:
            self.allowance.begin_step()
        self.stats.steps_ahead += self.predictor is not None and self.looks_ahead

    def count_agreement(self, num_agreed: int, num_run: int) -> None:
        """Count one layer's step under a speculative rule.

        Args:
            num_agreed: Experts of the router's choice that ran.
            num_run: Experts that it chose.
        """
        self.stats.agreed_experts += num_agreed
        self.stats.speculated_experts += num_run
        self.guard.observe(num_agreed, num_run)
        self.stats.is_speculation_off = not self.guard.is_open

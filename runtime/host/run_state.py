"""What the layers of an engine share where the host decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreroute.estimators.types import GateFamily
from foreroute.runtime.driver import RunState
from foreroute.runtime.host.ledger import HostLedger
from foreroute.runtime.host.predictor import HostPredictor
from foreroute.runtime.host.speculation import AgreementGuard
from foreroute.runtime.host.transfers import Transfers
from foreroute.runtime.policies import Duel, EvictionPolicy, GiveUp, PrefetchChooser
from foreroute.runtime.policies.give_up import LOOK_AHEAD


@dataclass(kw_only=True)
class HostRun(RunState):
    """Settings, shared resources and counters of one engine."""

    gate_family: GateFamily
    gate_scale: float
    """How gate weights follow from router logits."""
    transfers: Transfers
    predictor: HostPredictor | None
    guard: AgreementGuard
    policy: EvictionPolicy
    duel: Duel = field(default_factory=Duel)
    """Which rule evicts under an adaptive policy."""
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
        if self.give_up is not None:
            self.is_looking_ahead = self.give_up.next_variant() == LOOK_AHEAD
        self.stats.steps_ahead += self.predictor is not None and self.is_looking_ahead

    def count_agreement(self, num_agreed: int, num_run: int) -> None:
        """Count how many of the experts one layer ran speculatively the true router chose."""
        self.stats.agreed_experts += num_agreed
        self.stats.speculated_experts += num_run
        self.guard.observe(num_agreed, num_run)
        self.stats.is_speculation_off = not self.guard.is_open

"""The first process speaks for all: what it generates, the others generate beside it."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from transformers import StoppingCriteriaList

from foreroute.estimators.ranks import LONGEST_WAIT
from foreroute.runtime.parallel.going_on import CarefulStreamer, GoingOn
from foreroute.runtime.parallel.ranks import SliceRanks, noticing_the_dead

Generate = Callable[..., Any]
REFUSALS = (ValueError, TypeError)
"""What arguments raise, on all processes alike, before anything is computed together."""
AGREEING = datetime.timedelta(seconds=10)
"""How long the processes may take to say how a call ended: they come to its end together."""
OUT_OF_STEP = "The processes of this model are out of step, so all of them end."


class Lockstep:
    """Runs what one process is asked for on all of them.

    The first hands each call of `generate` to the others. Before every token it says whether they
    go on, so that whatever only it knows of (a client that is gone, a stop, an exception while it
    hands tokens out) ends the call of all at the same step.
    """

    def __init__(self, ranks: SliceRanks, generate: Generate) -> None:
        """Open a channel of its own between the processes; all of them do it.

        Args:
            ranks: This process among the others.
            generate: The engine's; takes what transformers' does.
        """
        self._ranks, self._generate = ranks, generate
        self._broken_by: Exception | None = None  # only the processes' end can mend it
        if not ranks.is_alone:
            self._orders = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
            self._endings = dist.new_group(backend="gloo", timeout=AGREEING)

    @contextlib.contextmanager
    def leading(self, model: Any) -> Iterator[None]:
        """While open, `model.generate` runs on all processes; the first one's side.

        SIGTERM does not end the process meanwhile: a server takes it for itself.

        Args:
            model: Whoever is handed it generates by it.

        Raises:
            ConnectionError: If the processes came out of step.
        """
        if self._ranks.is_alone:
            yield
            return
        own, model.generate = model.generate, self.generate
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            model.generate = own
            if self._broken_by is None:
                self._order(None)
        if self._broken_by is not None:
            raise ConnectionError(str(self._broken_by)) from self._broken_by

    def generate(self, *args: Any, streamer: Any = None, **settings: Any) -> Any:
        """Generate on all processes; takes and returns what the engine's does.

        Raises:
            ConnectionError: If another process has ended, or they are out of step.
        """
        if self._broken_by is not None:
            raise ConnectionError(OUT_OF_STEP)
        only_here = settings.pop("stopping_criteria", None) or ()
        self._order((args, settings))
        going_on = GoingOn(self._orders, only_here)
        settings["stopping_criteria"] = StoppingCriteriaList([going_on])
        settings["streamer"] = CarefulStreamer(streamer, going_on) if streamer is not None else None
        output = self._run(args, settings)
        if going_on.failure is not None:
            raise going_on.failure
        return output

    def follow(self) -> None:
        """Generate what the first process generates, until it closes; the others' side.

        Signals are left to the first process, which may have an answer to end.

        Raises:
            ConnectionError: If the first process has ended.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while (order := self._order(None)) is not None:
            args, settings = order
            settings["stopping_criteria"] = StoppingCriteriaList([GoingOn(self._orders)])
            with contextlib.suppress(*REFUSALS):  # all refuse the same, and the first says so
                self._run(args, settings)

    def _order(self, order: Any) -> Any:
        """What the first process gives, on all of them."""
        box = [order]
        with noticing_the_dead():
            dist.broadcast_object_list(box, group=self._orders)
        return box[0]

    def _run(self, args: Any, settings: dict[str, Any]) -> Any:
        """Generate, and see that it ended alike on all processes."""
        refusal: Exception | None = None
        try:
            output = self._generate(*args, **settings)
        except REFUSALS as error:
            refusal = error
        except Exception as error:
            self._break(error)
            raise
        endings: list[Any] = [None] * self._ranks.num_ranks
        try:
            dist.all_gather_object(endings, str(refusal), group=self._endings)
        except RuntimeError:  # somebody is not there
            endings = []
        if len(set(endings)) != 1:
            broken = ConnectionError(OUT_OF_STEP)
            self._break(broken)
            raise broken from refusal
        if refusal is not None:
            raise refusal
        return output

    def _break(self, error: Exception) -> None:
        """Nothing can be computed together any more; a server of the first process ends by it."""
        self._broken_by = error
        if self._ranks.is_first:
            os.kill(os.getpid(), signal.SIGTERM)

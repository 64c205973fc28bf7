"""Before every token the first process says whether all go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from foreroute.runtime.parallel.ranks import noticing_the_dead


class GoingOn(StoppingCriteria):  # type: ignore[misc]
    """Ends sequences where the first process does, by what only it knows."""

    def __init__(self, group: Any, only_here: Any = ()) -> None:
        """Ask the first process before every token.

        Args:
            group: Of all processes, for nothing else at that time.
            only_here: Criteria that only the first process has.
        """
        self._group, self._only_here = group, StoppingCriteriaList(only_here)
        self.failure: Exception | None = None
        """What was raised on the first process while others computed."""

    def __call__(self, input_ids: Tensor, scores: Any, **settings: Any) -> Tensor:
        """Whether each sequence ends here, [B]."""
        is_over = torch.zeros(len(input_ids), dtype=torch.uint8)
        if self._only_here and self.failure is None:
            try:
                is_over = self._only_here(input_ids, scores, **settings).cpu().to(torch.uint8)
            except Exception as error:
                self.failure = error
        if self.failure is not None:
            is_over.fill_(1)
        with noticing_the_dead():
            dist.broadcast(is_over, 0, group=self._group)
        return is_over.bool().to(input_ids.device)


class CarefulStreamer:
    """Hands tokens on until that fails, which ends the call at the next step."""

    def __init__(self, inner: Any, going_on: GoingOn) -> None:
        """Stand before a streamer.

        Args:
            inner: The user's.
            going_on: Remembers what it raises.
        """
        self._inner, self._going_on = inner, going_on

    def put(self, tokens: Tensor) -> None:
        """Hand on."""
        self._try(lambda: self._inner.put(tokens))

    def end(self) -> None:
        """Hand on."""
        self._try(self._inner.end)

    def _try(self, hand_on: Callable[[], None]) -> None:
        if self._going_on.failure is None:
            try:
                hand_on()
            except Exception as error:
                self._going_on.failure = error

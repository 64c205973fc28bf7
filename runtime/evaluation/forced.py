"""Reads a text token by token through an engine, as decoding does: in its graph if it has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreroute.runtime.engine import Engine

Step = Callable[[Tensor], Tensor]
"""The token chosen last, [1], to logits for the next, [1, V]."""


@dataclass(frozen=True)
class ForcedPass:
    """What one continuation got."""

    logits: Tensor
    """For every token of it after the first, float32, [N - 1, V], on the engine's device."""
    step_ms: list[float]
    """Time of each decode step, [N - 1]."""


@torch.no_grad()
def read_by_steps(engine: Engine, prompt: Tensor, continuation: Tensor) -> ForcedPass:
    """Read a prompt in one pass and what follows by decode steps, whatever the model would say.

    The first token's logits come from the prompt, in which nothing speculates: they are left out.

    Args:
        engine: Open.
        prompt: [1, P].
        continuation: [1, N], at least 2 tokens.
    """
    prompt, continuation = prompt.to(engine.device), continuation.to(engine.device)
    with engine.turns.call():
        step = _begin(engine, prompt, prompt.shape[1] + continuation.shape[1])
        clock = _Clock(engine.device)
        logits = []
        for token in continuation[0, :-1].split(1):
            clock.start()
            found = step(token)
            clock.stop()
            logits.append(found[0].float())
        return ForcedPass(torch.stack(logits), clock.read())


def _begin(engine: Engine, prompt: Tensor, length: int) -> Step:
    """Read the prompt; what runs a step after it."""
    graph_for = getattr(engine.driver, "graph_for", None)
    if graph_for is None:
        return _begin_on_host(engine, prompt)
    graph, mask = graph_for(1, length), torch.ones_like(prompt)
    graph.begin(mask)
    own: dict[str, Any] = {"past_key_values": graph.cache, "use_cache": True, "logits_to_keep": 1}
    engine.model(input_ids=prompt, attention_mask=mask, **own)

    def replay(token: Tensor) -> Tensor:
        logits: Tensor = graph.replay(token).clone()  # the next step writes over it
        return logits

    return replay


def _begin_on_host(engine: Engine, prompt: Tensor) -> Step:
    cache = engine(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    def step(token: Tensor) -> Tensor:
        output = engine(input_ids=token.unsqueeze(0), past_key_values=cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits

    return step


class _Clock:
    """Times steps by the host's clock, or on a GPU by its own, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._start: Any = None

    def _mark(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._start = self._mark()

    def stop(self) -> None:
        self._marks.append((self._start, self._mark()))

    def read(self) -> list[float]:
        """Milliseconds of every step."""
        if not self._is_gpu:
            return [1e3 * (end - start) for start, end in self._marks]
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in self._marks]

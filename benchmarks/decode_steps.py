"""Decode steps of an engine or a model, alike for graphs and eager code, and their timing."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from link import synchronize
from replayed_routing import Replay
from torch import Tensor
from transformers import StaticCache

from foreroute.runtime.device.driver import DeviceDriver
from foreroute.runtime.policies.give_up import LOOK_AHEAD

RESTART_STEPS = 8
"""Decode so many tokens, then go back: the context stays what was asked for."""
LEAST_TOKENS = 8


class DecodeSteps(ABC):
    """Runs one decode step after another for one batch."""

    def __init__(self, batch: int, context: int, device: torch.device) -> None:
        """Begin with token 0.

        Args:
            batch: B, sequences.
            context: Tokens before the measured ones.
            device: Where the model runs.
        """
        self.batch, self.context, self.device = batch, context, device
        self.last = torch.zeros(batch, dtype=torch.long, device=device)

    @abstractmethod
    def restart(self) -> None:
        """Go back to the context's end; not part of a step."""

    @abstractmethod
    def logits_of(self, tokens: Tensor) -> Tensor:
        """Logits after these tokens, [B] -> [B, V]."""

    def step(self) -> Tensor:
        """Decode one token per sequence, greedily; its logits, [B, V]."""
        logits = self.logits_of(self.last)
        self.last = logits.argmax(-1)
        return logits

    @abstractmethod
    def time(self, replay: Replay | None, first: int, num_tokens: int) -> list[float]:
        """Milliseconds of each of so many steps; routing is replayed from step `first` on."""

    def run(self, replay: Replay | None, num_tokens: int) -> Tensor | None:
        """Decode so many tokens from the first step on, untimed; the last logits."""
        logits = None
        for idx in range(num_tokens):
            self._prepare(replay, idx)
            logits = self.step()
        return None if logits is None else logits.clone()

    def _prepare(self, replay: Replay | None, idx: int) -> None:
        if replay is not None:
            replay.set_step(idx)
        if idx % RESTART_STEPS == 0:
            self.restart()


class GraphSteps(DecodeSteps):
    """Replays of an engine's captured step, timed by events on the device."""

    def __init__(self, driver: DeviceDriver, batch: int, context: int, device: Any) -> None:
        """Capture the step.

        Args:
            driver: An open engine's.
            batch: B.
            context: Tokens of the cache.
            device: Where the model runs.
        """
        super().__init__(batch, context, torch.device(device))
        self._graph = driver.graph_for(batch, context)
        prompt = context - RESTART_STEPS - 2
        self._prompt_mask = torch.ones(batch, prompt, dtype=torch.long, device=device)

    def keep_looking_ahead(self) -> None:
        """Predict at every step, also where the engine finds that it does not pay."""
        self._graph.choose_variant = lambda: LOOK_AHEAD

    def restart(self) -> None:
        """Empty the cache up to the context."""
        self._graph.begin(self._prompt_mask)

    def logits_of(self, tokens: Tensor) -> Tensor:
        """One replay."""
        return self._graph.replay(tokens)

    def time(self, replay: Replay | None, first: int, num_tokens: int) -> list[float]:
        """By events around each replay and the choice of its token; no sync in between."""
        events = []
        for idx in range(first, first + num_tokens):
            self._prepare(replay, idx)
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self.step()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


class EagerSteps(DecodeSteps):
    """Forward passes of any model with a static cache, timed by the clock with the token read."""

    def __init__(self, run: Any, config: Any, batch: int, context: int, device: Any) -> None:
        """Make the cache.

        Args:
            run: An engine or a model: takes what transformers' forward takes.
            config: The model's.
            batch: B.
            context: Tokens of the cache.
            device: Where the model runs.
        """
        super().__init__(batch, context, torch.device(device))
        self._run = run
        self._cache = StaticCache(config=config, max_cache_len=context)

    def restart(self) -> None:
        """Empty the cache (its length, which attention reads, stays)."""
        self._cache.reset()

    def logits_of(self, tokens: Tensor) -> Tensor:
        """One forward pass."""
        with torch.no_grad():
            output = self._run(
                input_ids=tokens.unsqueeze(1), past_key_values=self._cache, use_cache=True
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def time(self, replay: Replay | None, first: int, num_tokens: int) -> list[float]:
        """By the clock, from a quiet device to the token on the host."""
        times = []
        for idx in range(first, first + num_tokens):
            self._prepare(replay, idx)
            synchronize(self.device)
            start = time.perf_counter()
            self.step()
            self.last.tolist()
            times.append(1e3 * (time.perf_counter() - start))
        return times


def tokens_within(seconds: float, ms_per_token: float, most: int) -> int:
    """How many tokens to measure: at most so many, and what the seconds allow."""
    return min(most, max(LEAST_TOKENS, int(1e3 * seconds / max(ms_per_token, 1e-3))))

"""The queue before the engine: one answer runs, a bounded number waits, a dropped one stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _StreamError

from foreroute.estimators.artifacts import first_line

BUSY, DRAINING = "The queue is full; try again later.", "The server is shutting down."


class Answer(StoppingCriteria):  # type: ignore[misc]
    """One request on its way through the queue; made in the event loop's thread.

    As a stopping criterion it ends its own generation at the next step once it is dropped.
    """

    def __init__(self, seed: int | None, stops: Sequence[str]) -> None:
        """Wait to begin.

        Args:
            seed: Of the random numbers it samples with; a fresh one if None.
            stops: Texts that end it, and are cut off.
        """
        self.seed, self.stops = seed, tuple(stops)
        self.is_dropped = False
        self.has_begun = asyncio.get_running_loop().create_future()
        """Done when generation begins; holds an HTTPException if it never will."""
        self._lock, self._is_open = threading.Lock(), True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each sequence ends here, [B]."""
        return torch.full((len(input_ids),), self.is_dropped, device=input_ids.device)

    def drop(self) -> None:
        """Nobody waits for it any more: end it at the next step, or do not begin."""
        self.is_dropped = True

    def begin(self) -> bool:
        """Begin, in the engine's thread; False if it was dropped or refused before."""
        with self._lock:
            is_first, self._is_open = self._is_open and not self.is_dropped, False
        if is_first:
            self.has_begun.get_loop().call_soon_threadsafe(_settle, self.has_begun, None)
        return is_first

    def refuse(self, error: HTTPException) -> None:
        """Never begin, unless it has; called in the event loop's thread."""
        with self._lock:
            is_waiting, self._is_open = self._is_open, False
        if is_waiting:
            _settle(self.has_begun, error)

    def cut(self, text: str) -> str:
        """The text up to the first stop."""
        ends = [text.find(stop) for stop in self.stops if stop in text]
        return text[: min(ends)] if ends else text


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


CURRENT: ContextVar[Answer] = ContextVar("answer")
"""The answer that the request at hand asks for."""


class CutStreamer(DirectStreamer):  # type: ignore[misc]
    """Streams text, holding back what may be the beginning of a stop."""

    def __init__(self, *args: Any, answer: Answer, **settings: Any) -> None:
        """Stream for one answer; other arguments as transformers' `DirectStreamer` has them."""
        super().__init__(*args, **settings)
        self._answer, self._held, self._is_over = answer, "", False

    def _enqueue(self, item: Any) -> None:
        if type(item) is not str:  # the end, reasoning, a tool call
            if item is None and self._held:
                super()._enqueue(self._held)
            super()._enqueue(item)
            return
        if self._is_over:
            return
        self._held += item
        text = self._answer.cut(self._held)
        self._is_over = len(text) < len(self._held)
        keep = 0 if self._is_over else self._may_begin_a_stop()
        out, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if out:
            super()._enqueue(out)

    def _may_begin_a_stop(self) -> int:
        """Characters at the end of what is held that a stop may begin with."""
        held = self._held
        starts = [stop[:n] for stop in self._answer.stops for n in range(1, len(stop))]
        return max((len(start) for start in starts if held.endswith(start)), default=0)

    def cancel(self) -> None:
        """The client is gone: end at the next step."""
        self._answer.drop()


class AnswerQueue(GenerateManager):  # type: ignore[misc]
    """Runs one answer at a time on the engine's thread, in the order they came."""

    def __init__(self, max_waiting: int, max_tokens: int, on_done: Callable[[], None]) -> None:
        """An empty queue.

        Args:
            max_waiting: Answers that wait beside the one that runs; more are refused.
            max_tokens: Of prompt and answer together, that the model can take.
            on_done: Called on the engine's thread after each answer.
        """
        super().__init__()
        self.is_draining = False
        self._most, self._max_tokens, self._on_done = max_waiting + 1, max_tokens, on_done
        self._answers: list[Answer] = []

    @property
    def num_waiting(self) -> int:
        """Answers that have not begun."""
        return sum(not answer.has_begun.done() for answer in self._answers)

    def drain(self) -> None:
        """Refuse all that waits and all that comes; what runs ends."""
        self.is_draining = True
        for answer in list(self._answers):
            answer.refuse(HTTPException(503, DRAINING))

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], CutStreamer]:
        """As transformers' manager does it, for the current answer."""
        loop, queue, answer = asyncio.get_running_loop(), asyncio.Queue[Any](), CURRENT.get()
        rust = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = CutStreamer(rust, loop, queue, response_parser=response_parser, answer=answer)
        run = self._enter(answer, model, processor, inputs, gen_config, streamer)

        def stream() -> None:
            try:
                if run() is None:
                    loop.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(first_line(error)))

        self.submit(stream)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Tensor]:
        """As transformers' manager does it, for the current answer."""
        answer = CURRENT.get()
        run = self._enter(answer, model, processor, inputs, gen_config, None)
        sequences = await self.async_submit(run)
        length = inputs["input_ids"].shape[-1]
        ids = inputs["input_ids"][0, :0] if sequences is None else sequences[0, length:]
        return answer.cut(processor.decode(ids, skip_special_tokens=True)), length, ids

    def _enter(
        self, answer: Answer, model: Any, processor: Any, inputs: Any, config: Any, streamer: Any
    ) -> Callable[[], Tensor | None]:
        """Take a place in the queue, and return what generates when it is its turn."""
        self._check_length(inputs["input_ids"].shape[-1], config)
        if self.is_draining or len(self._answers) >= self._most:
            raise HTTPException(
                503, DRAINING if self.is_draining else BUSY, headers={"Retry-After": "5"}
            )
        self._answers.append(answer)
        ends = [answer]
        if answer.stops:
            tokenizer = getattr(processor, "tokenizer", processor)
            ends.append(StopStringCriteria(tokenizer, list(answer.stops)))

        def generate() -> Tensor | None:
            try:
                if not answer.begin():
                    return None
                torch.seed() if answer.seed is None else torch.manual_seed(answer.seed)
                settings = {"generation_config": config, "streamer": streamer}
                stopping = StoppingCriteriaList(ends)
                sequences: Tensor = model.generate(**inputs, stopping_criteria=stopping, **settings)
                return sequences
            finally:
                self._answers.remove(answer)
                self._on_done()

        return generate

    def _check_length(self, prompt_tokens: int, config: Any) -> None:
        """Refuse what the model cannot hold; an answer without a stated length gets what is left.

        Raises:
            HTTPException: If the prompt, or the answer asked for, is too long.
        """
        room = self._max_tokens - prompt_tokens
        if prompt_tokens == 0:
            raise HTTPException(400, "The prompt is empty.")
        if room < 1 or (config._is_length_given and config.max_new_tokens > room):
            asked = f" and {config.max_new_tokens} for the answer" * config._is_length_given
            raise HTTPException(
                400,
                f"The prompt has {prompt_tokens} tokens{asked}; the model takes "
                f"{self._max_tokens} in all.",
            )
        config.max_new_tokens = min(config.max_new_tokens, room)

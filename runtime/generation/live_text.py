"""Text as it is generated: on a terminal with a live line of what it costs, plain in a pipe."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers import TextStreamer

from foreroute.runtime.engine import Engine

LOOK_EVERY_S = 1.0
"""How often the hit rate is read: on a GPU that waits for the step at hand."""


def text_streamer(tokenizer: Any, engine: Engine) -> TextStreamer:
    """What prints the text: with a live line where standard output is a terminal.

    Args:
        tokenizer: The model's.
        engine: Whose figures the line shows.
    """
    console = Console()
    if console.is_terminal:
        return LiveText(tokenizer, engine, console)
    return TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)


class LiveText(TextStreamer):  # type: ignore[misc]
    """Prints finished lines for good; below them the line at hand and what the text costs."""

    def __init__(self, tokenizer: Any, engine: Engine, console: Console) -> None:
        """Begin with nothing printed.

        Args:
            tokenizer: The model's.
            engine: Whose figures are shown.
            console: A terminal.
        """
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._engine, self._line = engine, ""
        self._num_tokens, self._hit_rate, self._is_prompt = 0, "", True
        self._began = self._looked = 0.0
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def put(self, value: Any) -> None:
        """Count a token, unless it is the prompt, and print what can be printed."""
        if self._is_prompt:
            self._live.start()
        elif self._num_tokens == 0:
            self._began = self._looked = time.monotonic()
        self._num_tokens += not self._is_prompt
        self._is_prompt = False
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print finished lines, and show the rest with the figures."""
        *lines, self._line = (self._line + text).split("\n")
        if stream_end:
            lines, self._line = [*lines, self._line], ""
        for line in lines:
            self._live.console.print(Text(line), soft_wrap=True)
        if stream_end:
            self._live.stop()
        else:
            self._live.update(Group(Text(self._line), Text(self._cost(), "dim")), refresh=True)

    def _cost(self) -> str:
        if not self._num_tokens:
            return "[reading the prompt]"
        now = time.monotonic()
        if now - self._looked > LOOK_EVERY_S:
            self._looked, self._hit_rate = now, f", hit rate {self._engine.stats().hit_rate:.3f}"
        later = self._num_tokens - 1
        rate = f", {later / max(now - self._began, 1e-6):.1f} tokens/s" if later else ""
        return f"[{self._num_tokens} tokens{rate}{self._hit_rate}]"

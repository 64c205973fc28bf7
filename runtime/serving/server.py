"""Runs the application until a signal: what runs is answered, what waits is refused."""

from __future__ import annotations

import asyncio
from types import FrameType
from typing import Any

import uvicorn
from transformers.utils import logging as transformers_logging


class DrainingServer(uvicorn.Server):
    """Refuses what waits as soon as it is asked to stop, and ends when the rest is answered."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A second interrupt ends at once, as uvicorn does it."""
        if not self.should_exit:
            loop = self._loop
            loop.call_soon_threadsafe(self.config.app.state.answers.drain)  # type: ignore[union-attr]
        super().handle_exit(sig, frame)

    async def serve(self, sockets: Any = None) -> None:
        """Serve until a signal."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)


def run_server(app: Any, host: str, port: int) -> None:
    """Serve on an address until SIGTERM or Ctrl-C.

    Args:
        app: Of `make_app`.
        host: Address to bind to.
        port: 0 takes a free one; uvicorn prints it.
    """
    transformers_logging.set_verbosity_error()  # it warns of every request
    config = uvicorn.Config(app, host=host, port=port, log_level="info")
    DrainingServer(config).run()

"""One decode step of a whole model as one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

WARM_UP_STEPS = 2
LENGTH_STEP = 256  # caches are this much longer than needed at most, so that graphs serve again


class DecodeGraph:
    """A captured decode step with its own KV cache, for one batch size and greatest length."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        """Warm up and capture.

        Args:
            model: Transformers causal LM whose experts can be captured.
            batch: B, sequences.
            length: Greatest number of tokens of a sequence; rounded up.

        Raises:
            RuntimeError: If something in the model cannot be captured.
        """
        device = model.device
        self.length = -(-length // LENGTH_STEP) * LENGTH_STEP
        self.batch = batch
        self.cache = _full_length_cache(model.config, self.length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.ones(batch, 1, dtype=torch.long, device=device)
        self._write_at = torch.ones(1, dtype=torch.long, device=device)
        self._mask = torch.zeros(batch, 1, 1, self.length, dtype=torch.bool, device=device)
        self._at = torch.arange(self.length, device=device)
        self._window = _sliding_window(model.config)
        self._model = model
        with torch.no_grad():
            model(input_ids=self.tokens.repeat(1, 2), past_key_values=self.cache, use_cache=True)
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.logits = self._step()
            """[B, V], written by every replay."""

    def _step(self) -> Tensor:
        self._mask.index_fill_(3, self._write_at, True)
        output = self._model(
            input_ids=self.tokens,
            attention_mask=self._masks(),
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions.add_(1)
        self._write_at.add_(1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """The mask, or one by layer type for models in which some layers see a window."""
        if self._window is None:
            return self._mask
        in_window = self._at > self._write_at - self._window  # [length]
        return {"full_attention": self._mask, "sliding_attention": self._mask & in_window}

    def begin(self, prompt_mask: Tensor) -> None:
        """Empty the cache; the caller then reads the prompt into it.

        Args:
            prompt_mask: 1 for tokens, 0 for padding on the left, [B, P].
        """
        self.cache.reset()
        prompt_length = prompt_mask.shape[1]
        self._mask.zero_()
        self._mask[:, 0, 0, :prompt_length] = prompt_mask.bool()
        self.positions.copy_(prompt_mask.sum(-1, keepdim=True))
        self._write_at.fill_(prompt_length)

    def replay(self, tokens: Tensor) -> Tensor:
        """Run one step: one launch.

        Args:
            tokens: The tokens chosen last, [B].

        Returns:
            Logits for the next, [B, V]; valid until the next replay.
        """
        self.tokens.copy_(tokens.unsqueeze(1))
        self._graph.replay()
        return self.logits


def _sliding_window(config: Any) -> int | None:
    text = config.get_text_config()
    types = set(getattr(text, "layer_types", None) or ())
    return int(text.sliding_window) if "sliding_attention" in types else None


def _full_length_cache(config: Any, length: int) -> StaticCache:
    """A static cache in which sliding layers keep every position, and masks make the window.

    Transformers' own sliding layer takes another path on the host once its window is full, which a
    captured graph could not follow.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    cache.layers = [
        StaticLayer(max_cache_len=length) if isinstance(layer, StaticSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache

"""One decode step of a whole model, and the same as one CUDA graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from foreroute.runtime.device.fusions import (
    defer_norms,
    find_norms,
    find_routers,
    fuse_attention,
    fuse_rotary,
    fuse_routers,
)
from foreroute.runtime.device.fusions.deferred import settled
from foreroute.runtime.device.fusions.heads import place
from foreroute.runtime.device.kernels.cache import store_token
from foreroute.runtime.device.streams import borrow_stream

WARM_UP_STEPS = 2
LENGTH_STEP = 256  # caches are this much longer than needed at most, so that graphs serve again


class DecodeCacheLayer(StaticLayer):  # type: ignore[misc]  # transformers is untyped
    """A static layer that keeps every position; decode steps write where the device says."""

    write_at: Tensor | None = None
    """Position of the one new token, [1] int64; set while a decode step runs."""

    @property
    def is_written_again(self) -> bool:
        """Whether a second update in the same step overwrites the first: an early attention's."""
        return self.write_at is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, [B, H_kv, T, d]; returns the whole cache's."""
        if self.write_at is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not place(key_states, value_states, self.keys, self.values, self.write_at):
            key, value = settled(key_states), settled(value_states)
            store_token(key, value, self.keys, self.values, self.write_at)
        return self.keys, self.values


class DecodeStep:
    """A decode step with its own KV cache, for one batch size and greatest length."""

    defers: ClassVar[bool] = True
    """Whether one launch may do several modules' work; benchmarks compare with steps that don't."""

    def __init__(
        self, model: Any, batch: int, length: int, routers: Sequence[nn.Module] = ()
    ) -> None:
        """Allocate the cache.

        Args:
            model: Transformers causal LM.
            batch: B, sequences.
            length: Greatest number of tokens of a sequence; rounded up.
            routers: Of the model's MoE layers, to be fused where that changes nothing.
        """
        device = model.device
        self.length = -(-length // LENGTH_STEP) * LENGTH_STEP
        self.batch = batch
        self.cache = _full_length_cache(model.config, self.length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        ones = torch.ones_like(self.tokens)
        # [B, 1], or [planes, B, 1] in models that place images by time, height and width
        self.positions = torch.ones_like(
            model._prepare_position_ids_for_generation(ones, {"attention_mask": ones})
        )
        self._write_at = torch.ones(1, dtype=torch.long, device=device)
        self._mask = torch.zeros(batch, 1, 1, self.length, dtype=torch.bool, device=device)
        self._at = torch.arange(self.length, device=device)
        self._window = _sliding_window(model.config)
        self._has_layer_types = _layer_types(model.config) is not None
        self._model, self._routers = model, find_routers(routers)
        self._norms = find_norms(model)
        self.fused: Counter[str] = Counter()
        """What the step's launches do at once that the model does apart, how often."""
        self.choose_variant: Callable[[], int] = lambda: 0
        """Asked before every replay which variant of the step to run, if there are several."""
        with torch.no_grad():
            model(input_ids=self.tokens.repeat(1, 2), past_key_values=self.cache, use_cache=True)

    def fused_parts(self) -> str:
        """What the last step that was run or captured did in fewer launches, for a log."""
        parts = [f"{count} {what}" for what, count in self.fused.items() if count]
        return ", ".join(parts) or "nothing"

    @contextlib.contextmanager
    def _fused(self) -> Iterator[None]:
        """While the model runs a step: fewer, larger kernels."""
        own = [layer for layer in self.cache.layers if isinstance(layer, DecodeCacheLayer)]
        with contextlib.ExitStack() as undo:
            fuse_attention(self._model, undo, self.fused if self.defers else None)
            fuse_rotary(self._model, undo)
            fuse_routers(self._routers, undo)
            if self.defers:
                defer_norms(self._norms, undo, self.fused)
            for layer in own:
                layer.write_at = self._write_at
                undo.callback(setattr, layer, "write_at", None)
            yield

    @torch.no_grad()
    def _step(self) -> Tensor:
        self.fused.clear()
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
        windowed = self._mask & (self._at > self._write_at - self._window)
        if not self._has_layer_types:
            return windowed
        return {"full_attention": self._mask, "sliding_attention": windowed}

    def begin(self, prompt_mask: Tensor, positions: Tensor | None = None) -> None:
        """Empty the cache; the caller then reads the prompt into it.

        Args:
            prompt_mask: 1 for tokens, 0 for padding on the left, [B, P].
            positions: Of the token after the prompt, [B, 1] or [planes, B, 1]; None to count the
                prompt's tokens, which is right where they are all text.
        """
        self.cache.reset()
        prompt_length = prompt_mask.shape[1]
        self._mask.zero_()
        self._mask[:, 0, 0, :prompt_length] = prompt_mask.bool()
        self.positions.copy_(prompt_mask.sum(-1, keepdim=True) if positions is None else positions)
        self._write_at.fill_(prompt_length)

    def replay(self, tokens: Tensor) -> Tensor:
        """Run one step.

        Args:
            tokens: The tokens chosen last, [B].

        Returns:
            Logits for the next, [B, V]; valid until the next replay.
        """
        self.choose_variant()
        self.tokens.copy_(tokens.unsqueeze(1))
        with self._fused():
            return self._step()


class DecodeGraph(DecodeStep):
    """A decode step captured as CUDA graphs, one for each variant of it: a replay is one launch."""

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        routers: Sequence[nn.Module] = (),
        variants: Sequence[Callable[[], None]] = (lambda: None,),
    ) -> None:
        """Warm up and capture; takes what `DecodeStep` takes, and the variants to capture.

        Args:
            model: See `DecodeStep`.
            batch: See `DecodeStep`.
            length: See `DecodeStep`.
            routers: See `DecodeStep`.
            variants: Each sets up the model for one variant of the step before it is captured.

        Raises:
            RuntimeError: If something in the model cannot be captured.
        """
        super().__init__(model, batch, length, routers)
        self._graphs = []
        self._warm_up = borrow_stream(self.tokens.device, self)
        for set_up in variants:
            set_up()
            with self._fused():
                self._graphs.append(self._capture())

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a step, and the logits that it writes."""
        stream = self._warm_up
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0][0].pool() if self._graphs else None  # they never run at once
        # other engines' threads go on meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._step()
        return graph, logits

    def replay(self, tokens: Tensor) -> Tensor:
        """Run one step: one copy and one launch; see `DecodeStep.replay`."""
        self.tokens.copy_(tokens.unsqueeze(1))
        graph, logits = self._graphs[self.choose_variant()]
        graph.replay()
        return logits


def _layer_types(config: Any) -> Sequence[str] | None:
    types: Sequence[str] | None = getattr(config.get_text_config(), "layer_types", None)
    return types


def _sliding_window(config: Any) -> int | None:
    """Keys that windowed layers see; None if no layer has a window."""
    types, window = _layer_types(config), getattr(config.get_text_config(), "sliding_window", None)
    has_window = types is None or "sliding_attention" in types
    return int(window) if has_window and window is not None else None


def _full_length_cache(config: Any, length: int) -> StaticCache:
    """A static cache in which sliding layers keep every position, and masks make the window.

    Transformers' own sliding layer takes another path on the host once its window is full, which a
    captured graph could not follow.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    known = (StaticLayer, StaticSlidingWindowLayer)
    cache.layers = [
        DecodeCacheLayer(max_cache_len=length) if type(layer) in known else layer
        for layer in cache.layers
    ]
    return cache

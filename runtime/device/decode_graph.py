"""One decode step of a whole model, and the same as one CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from foreroute.runtime.device.fusions import (
    attention_kinds,
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
from foreroute.runtime.driver import MOST_STEP_TOKENS

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2
SPARE_TOKENS = WARM_UP_STEPS * MOST_STEP_TOKENS
"""Room behind a text that steps are captured in, if that is done between its steps."""
TAKES_MASKS = {"eager", "sdpa"}
"""Attention of transformers' that takes any boolean mask."""
LENGTH_STEP = 256  # caches are this much longer than needed at most, so that graphs serve again


class DecodeCacheLayer(StaticLayer):  # type: ignore[misc]  # transformers is untyped
    """A static layer that keeps every position; decode steps write where the device says."""

    write_at: Tensor | None = None
    """Positions of the T new tokens, [T] int64; set while a decode step runs."""

    def get_seq_length(self) -> Any:
        """Tokens so far; while a decode step runs only the device knows how many: some."""
        return super().get_seq_length() if self.write_at is None else 1

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
        if place(key_states, value_states, self.keys, self.values, self.write_at):
            return self.keys, self.values
        key, value = settled(key_states), settled(value_states)
        if len(self.write_at) == 1:
            store_token(key, value, self.keys, self.values, self.write_at)
        else:
            self.keys.index_copy_(2, self.write_at, key)
            self.values.index_copy_(2, self.write_at, value)
        return self.keys, self.values


class DecodeStep:
    """A decode step with its own KV cache, for one batch size and greatest length.

    It reads one token of each sequence; `widened` gives steps of several over the same cache.
    """

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
        self._written = self._write_at  # by each new token
        self._offsets = torch.zeros_like(self._write_at)  # of new tokens from the first
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

    @property
    def is_captured(self) -> bool:
        """Whether a replay is one launch, of which the model's own code sees nothing."""
        return False

    @property
    def width(self) -> int:
        """Tokens of each sequence that a step reads."""
        return self.tokens.shape[1]

    def widened(self, width: int) -> Self:
        """The step that reads so many tokens of each sequence, over the same cache.

        Each token sees those before it, and every one's logits are given. The model's own attention
        computes it, so that must be one that takes a mask (`why_not_widened`).

        Args:
            width: Tokens of each sequence, 2 or more.
        """
        step = copy.copy(self)
        step.tokens = self.tokens.new_zeros(self.batch, width)
        step._written = self._write_at.new_zeros(width)
        step._offsets = torch.arange(width, device=self.tokens.device)
        step.fused = Counter()
        return step

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
                layer.write_at = self._written
                undo.callback(setattr, layer, "write_at", None)
            yield

    @torch.no_grad()
    def _step(self) -> Tensor:
        self.fused.clear()
        positions = self.positions
        if self.width > 1:
            torch.add(self._write_at, self._offsets, out=self._written)
            positions = positions + self._offsets
        self._mask.index_fill_(3, self._written, True)
        output = self._model(
            input_ids=self.tokens,
            attention_mask=self._masks(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions.add_(self.width)
        self._write_at.add_(self.width)
        logits: Tensor = output.logits if self.width > 1 else output.logits[:, -1]
        return logits

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """The mask, or one by layer type for models in which some layers see a window."""
        mask, own = self._mask, self._written.unsqueeze(1)
        if self.width > 1:
            mask = mask & (self._at <= own)  # [B, 1, T, N]
        if self._window is None:
            return mask
        windowed = mask & (self._at > own - self._window)
        if not self._has_layer_types:
            return windowed
        return {"full_attention": mask, "sliding_attention": windowed}

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

    def crop(self, count: int) -> None:
        """Take back what the last tokens of each sequence left: the next step goes on before them.

        Args:
            count: Tokens of each sequence, 0 or more.
        """
        self.positions.sub_(count)
        self._write_at.sub_(count)
        self._mask &= self._at < self._write_at

    def replay(self, tokens: Tensor) -> Tensor:
        """Run one step.

        Args:
            tokens: The tokens chosen last, [B]; where T > 1 are read, [B, T].

        Returns:
            Logits for the next, [B, V], or after each, [B, T, V]; valid until the next replay.
        """
        self.choose_variant()
        self.tokens.copy_(tokens.view_as(self.tokens))
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
        self._graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        self._pool: Any = None  # one for all graphs: they never run at once
        self._warm_up = borrow_stream(self.tokens.device, self)
        for set_up in variants:
            set_up()
            with self._fused():
                self._graphs.append(self._capture())

    def widened(self, width: int) -> Self:
        """See `DecodeStep.widened`; captured at once, which changes nothing that the cache holds.

        A step that cannot be captured runs as it is, with the same kernels, and the log says so.
        """
        step = super().widened(width)
        state = [self._write_at, self._mask, self.positions]
        before = [tensor.clone() for tensor in state]
        self._write_at.fill_(self.length - WARM_UP_STEPS * width)  # behind what is in the cache
        self.positions.fill_(1)
        step._graphs = []
        try:
            with step._fused():
                step._graphs.append(step._capture())
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("Steps of %d tokens run without a CUDA graph: %s", width, reason)
        finally:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        return step

    @property
    def is_captured(self) -> bool:
        """See `DecodeStep.is_captured`."""
        return bool(self._graphs)

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a step, and the logits that it writes."""
        stream = self._warm_up
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other engines' threads go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._step()
        self._pool = self._pool or graph.pool()
        return graph, logits

    def replay(self, tokens: Tensor) -> Tensor:
        """Run one step: one copy and one launch; see `DecodeStep.replay`."""
        if not self.is_captured:
            return super().replay(tokens)
        self.tokens.copy_(tokens.view_as(self.tokens))
        graph, logits = self._graphs[self.choose_variant()]
        graph.replay()
        return logits


def why_not_widened(model: Any) -> str:
    """What keeps a model's steps from reading several tokens; empty if nothing does."""
    layers = _full_length_cache(model.config, 1).layers
    if not all(isinstance(layer, DecodeCacheLayer) for layer in layers):
        return "its cache has layers that cannot give tokens back"
    others = sorted(attention_kinds(model) - TAKES_MASKS)
    return f"its attention ({', '.join(others)}) takes no mask" if others else ""


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

"""Generates with a captured decode step: sampling on the device, the host one step behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foreroute.runtime.device.decode_graph import DecodeStep


class _HostCopy:
    """A step's tokens and whether all sequences ended, on their way to the host."""

    def __init__(self, tokens: Tensor, is_done: Tensor) -> None:
        on_gpu = tokens.is_cuda
        self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=on_gpu)
        self._is_done = torch.empty((), dtype=torch.bool, pin_memory=on_gpu)
        self._tokens.copy_(tokens, non_blocking=on_gpu)
        self._is_done.copy_(is_done, non_blocking=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[Tensor, bool]:
        """Wait for this step (later ones run on) and hand out its tokens, [B]."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens, bool(self._is_done)


def decode_loop(
    model: Any,
    graph: DecodeStep,
    input_ids: Tensor,
    prompt: Mapping[str, Any],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
) -> Tensor:
    """Read the prompt, then replay the graph until every sequence has ended.

    The host reads step n's tokens while step n + 1 runs, so one step may run past the end; its
    tokens are dropped.

    Args:
        model: Transformers model that writes text, for the prompt.
        graph: The step, captured or not.
        input_ids: Prompts, [B, P].
        prompt: What else the model reads a prompt with, as `generate` prepares it: its
            `attention_mask` [B, P] (all ones if there is none), its `position_ids` [B, P] or
            [planes, B, P], and images.
        logits_processor: As `generate` prepares it.
        stopping_criteria: As `generate` prepares it.
        generation_config: As `generate` prepares it.
        streamer: Gets each step's tokens, or None.

    Returns:
        Prompts and continuations, [B, P + new].
    """
    pad = generation_config._pad_token_tensor
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    mask = prompt.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions = prompt.get("position_ids")
    positions = (mask.cumsum(-1) - 1).clamp_min(0) if positions is None else positions
    graph.begin(mask, positions[..., -1:] + 1)
    own = {"attention_mask": mask, "position_ids": positions, "past_key_values": graph.cache}
    own |= {"use_cache": True, "logits_to_keep": 1}
    output = model(input_ids=input_ids, **(dict(prompt) | own))
    logits, pending = output.logits[:, -1], None
    while True:
        scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
        tokens = _choose(scores, do_sample=generation_config.do_sample)
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        behind, pending = pending, _HostCopy(tokens, ~unfinished.any())
        if behind is not None and _hand_out(behind, streamer):
            input_ids = input_ids[:, :-1]
            break
        if input_ids.shape[1] >= generation_config.max_length:
            _hand_out(pending, streamer)
            break
        logits = graph.replay(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids


def _choose(scores: Tensor, *, do_sample: bool) -> Tensor:
    """Next tokens from processed scores, [B]."""
    if do_sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)


def _hand_out(step: _HostCopy, streamer: Any) -> bool:
    tokens, is_done = step.read()
    if streamer is not None:
        streamer.put(tokens)
    return is_done

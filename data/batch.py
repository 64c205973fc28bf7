"""A batch of sequences through the recorded model: dataset text, then its own continuation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreroute.data.recorder import RoutingRecorder
from foreroute.estimators.types import RoutingRecord


@dataclass(frozen=True, kw_only=True)
class RecordedBatch:
    """Some tokens of sequences that went through the model together, equally many of each."""

    token_ids: Tensor
    """[B, N], int64, on the CPU."""
    positions: Tensor
    """Place of each in its sequence, [B, N], int64, ascending."""
    num_prompt_tokens: Tensor
    """Tokens at the start of each sequence that no model made, [B, 1], int64."""
    records: dict[int, RoutingRecord]
    """By decoder layer index; B x N rows, sequence after sequence."""


def record_batch(
    model: Any,
    recorder: RoutingRecorder,
    prompts: Tensor,
    sequence_length: int,
    generator: torch.Generator,
    positions: Tensor | None = None,
    prompt_ends: Tensor | None = None,
) -> RecordedBatch:
    """Run prompts through the model, continue them by sampling at temperature 1, record it all.

    What is recorded of the continuation is the decode itself, step by step, not a second pass.

    Args:
        model: The model that the open recorder watches.
        recorder: Its recorder.
        prompts: [B, P], int64, P <= sequence_length.
        sequence_length: Tokens per sequence, prompt and continuation together.
        generator: Draws the continuation; on the CPU.
        positions: Tokens to keep of each sequence, [B, N], int64, ascending; all if None.
        prompt_ends: Where each prompt really ends if a model made the rest of it, [B], int64; at P
            if None.
    """
    num_sequences, num_prompt_tokens = prompts.shape
    num_generated = sequence_length - num_prompt_tokens
    if positions is None:
        positions = torch.arange(sequence_length).expand(num_sequences, -1)
    ends = torch.full((num_sequences,), num_prompt_tokens) if prompt_ends is None else prompt_ends
    has_prompts = int(positions.min()) < num_prompt_tokens
    settings: dict[str, Any] = {"use_cache": num_generated > 0}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = 1
    token_ids = [prompts]
    with torch.no_grad():
        output = model(input_ids=prompts.to(model.device), **settings)
        records = [recorder.take()] if has_prompts else []
        for _ in range(num_generated):
            probabilities = output.logits[:, -1].float().softmax(-1).cpu()  # [B, vocabulary]
            token_ids.append(torch.multinomial(probabilities, 1, generator=generator))  # [B, 1]
            output = model(
                input_ids=token_ids[-1].to(model.device),
                past_key_values=output.past_key_values,
                **settings,
            )
            records.append(recorder.take())
    first = 0 if has_prompts else num_prompt_tokens
    joined = {
        layer_idx: _in_sequence_order([record[layer_idx] for record in records], num_sequences)
        for layer_idx in records[0]
    }
    if positions.shape[1] < sequence_length - first:
        starts = torch.arange(num_sequences).unsqueeze(1) * (sequence_length - first)
        rows = (starts + positions - first).flatten()
        joined = {layer_idx: record[rows] for layer_idx, record in joined.items()}
    return RecordedBatch(
        token_ids=torch.cat(token_ids, dim=1).gather(1, positions),
        positions=positions,
        num_prompt_tokens=ends.unsqueeze(1),
        records=joined,
    )


def _in_sequence_order(records: list[RoutingRecord], num_sequences: int) -> RoutingRecord:
    """Join the passes over B sequences, each [B x steps] rows, so that each sequence is whole."""
    if len(records) == 1:
        return records[0]
    joined = {}
    for name in records[0].tensors:
        parts = [record.tensors[name] for record in records]
        steps = [part.unflatten(0, (num_sequences, -1)) for part in parts]  # [B, steps, *]
        joined[name] = torch.cat(steps, dim=1).flatten(0, 1)
    return RoutingRecord(**joined)

"""A batch of sequences through the recorded model: dataset text, then its own continuation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from foreroute.data.recorder import RoutingRecorder
from foreroute.estimators.types import RoutingRecord


@dataclass(frozen=True, kw_only=True)
class RecordedBatch:
    """Some sequences that went through the model together."""

    token_ids: Tensor
    """[B, sequence length], int64, on the CPU."""
    num_prompt_tokens: int
    """Tokens at the start of each sequence that came from the dataset."""
    records: dict[int, RoutingRecord]
    """By decoder layer index; B x sequence length rows, sequence after sequence."""


def record_batch(
    model: Any,
    recorder: RoutingRecorder,
    prompts: Tensor,
    sequence_length: int,
    generator: torch.Generator,
) -> RecordedBatch:
    """Run prompts through the model, continue them by sampling at temperature 1, record it all.

    Args:
        model: The model that the open recorder watches.
        recorder: Its recorder.
        prompts: [B, P], int64, P <= sequence_length.
        sequence_length: Tokens per sequence, prompt and continuation together.
        generator: Draws the continuation; on the CPU.
    """
    num_generated = sequence_length - prompts.shape[1]
    settings: dict[str, Any] = {"use_cache": num_generated > 0}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = 1
    token_ids = [prompts]
    with torch.no_grad():
        output = model(input_ids=prompts.to(model.device), **settings)
        records = [recorder.take()]
        for _ in range(num_generated):
            probabilities = output.logits[:, -1].float().softmax(-1).cpu()  # [B, vocabulary]
            token_ids.append(torch.multinomial(probabilities, 1, generator=generator))  # [B, 1]
            output = model(
                input_ids=token_ids[-1].to(model.device),
                past_key_values=output.past_key_values,
                **settings,
            )
            records.append(recorder.take())
    return RecordedBatch(
        token_ids=torch.cat(token_ids, dim=1),
        num_prompt_tokens=prompts.shape[1],
        records={
            layer_idx: _in_sequence_order([record[layer_idx] for record in records], len(prompts))
            for layer_idx in records[0]
        },
    )


def _in_sequence_order(records: list[RoutingRecord], num_sequences: int) -> RoutingRecord:
    """Join the passes over B sequences, each [B x steps] rows, so that each sequence is whole."""
    joined = {}
    for field in fields(RoutingRecord):
        parts = [getattr(record, field.name) for record in records]
        if len(parts) > 1:
            steps = [part.unflatten(0, (num_sequences, -1)) for part in parts]  # [B, steps, *]
            parts = [torch.cat(steps, dim=1).flatten(0, 1)]
        joined[field.name] = parts[0]
    return RoutingRecord(**joined)

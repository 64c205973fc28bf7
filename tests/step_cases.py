"""What decode steps of every type that can be captured are held to: one pass over the text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foreroute.runtime.device import decode_graph
from foreroute.runtime.device.decode_graph import DecodeStep
from foreroute.runtime.device.kernels import linear, route

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "models.json"
ROWS = json.loads(RESULTS.read_text())
CAPTURABLE: list[tuple[str, dict[str, Any]]] = [
    *((row["model_type"], {}) for row in ROWS if row["graph"] == "yes"),
    ("mixtral", {"sliding_window": 4}),
    ("gpt_oss", {"sliding_window": 4}),
]
"""Model types, and fields of their configs."""
WITH_IMAGES = [row["model_type"] for row in ROWS if row["graph"] == row["images"] == "yes"]
PROMPT = 5
TOLERANCE = 2e-5  # float32, sums in another order


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make steps quick under the interpreter."""
    monkeypatch.setattr(decode_graph, "LENGTH_STEP", 16)
    # programs run one after the other
    monkeypatch.setattr(linear, "TILE", 2**17)
    monkeypatch.setattr(route, "ROWS", 8)


def padded_text(num_steps: int) -> tuple[Tensor, Tensor]:
    """A prompt and so many tokens more, and their mask, [2, P + n] each; one is padded."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 60, (2, PROMPT + num_steps), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0  # padding on the left
    return tokens, mask


def logits_of_one_pass(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits after each token behind the prompt, by the plain model, [B, n, V]."""
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        output = model(input_ids=tokens, attention_mask=mask, position_ids=positions)
    logits: Tensor = output.logits[:, PROMPT:]
    return logits


def read_prompt(model: Any, step: DecodeStep, tokens: Tensor, mask: Tensor) -> None:
    """Read the prompt of padded sequences into a step's cache."""
    mask = mask[:, :PROMPT]
    step.begin(mask)
    with torch.no_grad():
        model(
            input_ids=tokens[:, :PROMPT],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            past_key_values=step.cache,
        )

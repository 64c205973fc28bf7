"""Makes docs/assisted.md's tables: what steps that verify several tokens need of the experts.

    python benchmarks/assisted.py --route qwen3-30b-a3b.route.csv

Counts, not times. The bundled model's are those of an engine on a CPU, where a step fetches an
expert once. A recorded route is replayed as the GPU takes it: as many tokens at once as have slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from foreroute.data.adapters import load_tokenizer
from foreroute.data.columns import RowReading
from foreroute.data.held_out import held_out_sequences
from foreroute.data.routes import Route, read_route
from foreroute.estimators.artifacts import write_json
from foreroute.estimators.console import run_command
from foreroute.runtime import Engine
from foreroute.runtime.driver import MOST_STEP_TOKENS
from foreroute.runtime.planning.machine import find_profile
from foreroute.runtime.policies import find_policy
from foreroute.runtime.simulator import LinkTimes
from foreroute.runtime.simulator.replay import Replay

ROOT = Path(__file__).parents[1]
WIDTHS = (1, 2, 4, MOST_STEP_TOKENS)
DRAFTS = (0, 1, 3, MOST_STEP_TOKENS - 1)
"""Tokens that prompt lookup drafts at most; 0 for plain decoding."""
SHARES = (10, 25, 40)
"""Percent of a layer's experts that are resident."""
PROMPT_TOKENS, AGAIN_TOKENS, NEW_TOKENS = 128, 32, 96
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": NEW_TOKENS}
GREEDY |= {"max_new_tokens": NEW_TOKENS, "disable_compile": True, "pad_token_id": 0}
Cell = dict[str, Any]


def main(
    route: str = "",
    num_prompts: int = 16,
    expert_slots: str = "25%",
    json: Path = ROOT / "benchmarks" / "results" / "assisted.json",
) -> None:
    """Count everything; print a line for each cell, write the rows.

    Args:
        route: Recorded routing to replay besides; nothing if empty.
        num_prompts: Held-out documents of the standard library.
        expert_slots: Of the bundled model.
        json: The rows to write.
    """
    with Engine.from_pretrained("bundled", expert_slots=expert_slots, device="cpu") as engine:
        reading = RowReading(tokenizer=load_tokenizer("bundled"))
        length, known = PROMPT_TOKENS + NEW_TOKENS, engine.model.config.vocab_size
        texts = held_out_sequences(reading, "python-stdlib", num_prompts, length, known)
        cells = [verified(engine, texts, width) for width in WIDTHS]
        for kind in ("continued", "repeated"):
            prompts = [prompt_of(text, kind) for text in texts]
            cells += [looked_up(engine, prompts, kind, drafts) for drafts in DRAFTS]
    if route:
        recorded = read_route(route)
        cells += [replayed(recorded, share, width) for share in SHARES for width in WIDTHS]
    for cell in cells:
        print(
            ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in cell.items())
        )
    write_json(json, {"cells": cells})


def prompt_of(text: Tensor, kind: str) -> Tensor:
    """A document's first tokens; `repeated`: and their beginning again, for the model to go on."""
    prompt = text[:, :PROMPT_TOKENS]
    return prompt if kind == "continued" else torch.cat([prompt, prompt[:, :AGAIN_TOKENS]], dim=1)


def counted(engine: Engine, num_tokens: int) -> Cell:
    """What the engine's decode steps needed, since its statistics were reset."""
    decode, layers = engine.stats().decode, engine.geometry.num_layers
    return {
        "experts": decode.lookups / decode.forwards / layers,
        "hit_rate": decode.hit_rate,
        "misses_per_token": decode.misses / num_tokens / layers,
        "bytes_per_token": decode.bytes / num_tokens,
    }


def verified(engine: Engine, texts: list[Tensor], width: int) -> Cell:
    """Held-out text by steps of so many tokens: every draft is right."""
    engine.driver.forget()
    engine.reset_stats()
    for text in texts:
        cache = DynamicCache(config=engine.model.config)
        parts = [text[:, :PROMPT_TOKENS], *text[:, PROMPT_TOKENS:].split(width, dim=1)]
        for part in parts:
            engine(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    needs = counted(engine, NEW_TOKENS * len(texts))
    return {"what": "bundled, every draft right", "width": width} | needs


def looked_up(engine: Engine, prompts: list[Tensor], kind: str, drafts: int) -> Cell:
    """Greedy decoding with prompt lookup."""
    engine.driver.forget()
    engine.reset_stats()
    lookup = {"prompt_lookup_num_tokens": drafts} if drafts else {}
    for prompt in prompts:
        engine.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY, **lookup)
    stats = engine.stats()
    passes = stats.decode.forwards + stats.prefill.forwards  # the prompt's gives tokens too
    num_tokens = NEW_TOKENS * len(prompts)
    needs = counted(engine, num_tokens)
    return {
        "what": f"bundled, {kind}",
        "drafts": drafts,
        "step_tokens": num_tokens / passes,
    } | needs


def replayed(route: Route, share: int, width: int) -> Cell:
    """A recorded route's decode steps by so many tokens at a time: every draft is right."""
    slots = max(route.top_k, route.num_experts * share // 100)
    uses = route.expert_ids[route.is_decode]  # [T, L, K]
    uses = uses[: len(uses) // width * width]
    unions = [np.unique(step) for group in _groups(uses, width) for step in group.swapaxes(0, 1)]
    at_once = slots // route.top_k
    sizes = [min(at_once, width - start) for start in range(0, width, at_once)]
    merged = _merged(uses, sizes * (len(uses) // width), route.num_experts)
    times = LinkTimes.of(find_profile("h100-pcie5"), top_k=merged.top_k)
    policy = find_policy("default")
    counts = Replay(merged, times, policy, [slots] * route.num_layers).run()
    return {
        "what": f"{Path(route.name).name}, every draft right",
        "slots": f"{share}%",
        "width": width,
        "experts": float(np.mean([(union >= 0).sum() for union in unions])),
        "misses_per_token": counts.fetched / len(uses) / route.num_layers,
    }


def _groups(uses: Any, width: int) -> Any:
    return uses.reshape(-1, width, *uses.shape[1:])


def _merged(uses: Any, sizes: list[int], num_experts: int) -> Route:
    """A route whose steps are the unions of so many tokens each."""
    rows = np.full((len(sizes), uses.shape[1], max(sizes) * uses.shape[2]), -1, dtype=np.int16)
    start = 0
    for row, size in zip(rows, sizes, strict=True):
        for layer in range(uses.shape[1]):
            union = np.unique(uses[start : start + size, layer])
            union = union[union >= 0]
            row[layer, : len(union)] = union
        start += size
    is_decode = np.ones(len(sizes), dtype=np.bool_)
    return Route(name="merged", expert_ids=rows, is_decode=is_decode, num_experts=num_experts)


if __name__ == "__main__":
    run_command("benchmarks/assisted.py", main)

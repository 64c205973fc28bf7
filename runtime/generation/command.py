"""The command `foreroute generate`, but for its flags."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.data.adapters import load_tokenizer
from foreroute.data.adapters.chat import encode_chat
from foreroute.data.adapters.loading import HubSettings
from foreroute.data.adapters.vocabulary import require_known, vocabulary_size
from foreroute.estimators.ranks import are_ranks_started
from foreroute.export.hub import find_bundle
from foreroute.runtime.engine import Engine
from foreroute.runtime.evaluation.frontier import Frontier, parse_quality_budget
from foreroute.runtime.store.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

EMPTY_PROMPT = "The prompt is empty; give at least one token of text."


def run_generate(
    *,
    prompt: str,
    model: str,
    bundle: Path | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    revision: str | None,
    trust_remote_code: bool,
    quality_budget: str | None,
    frontier: Path | None,
    **settings: Any,
) -> str:
    """Print the model's continuation of a prompt as it comes, and give one line on what it cost.

    Args:
        prompt: Text, or `-` for standard input.
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote.
        max_new_tokens: At least 1.
        temperature: 0 is greedy.
        seed: Of the sampling.
        chat: Put the prompt through the tokenizer's template.
        revision: Branch, tag or commit of a Hub id, for weights and tokenizer.
        trust_remote_code: Run code that came with the checkpoint.
        quality_budget: How far perplexity may rise; None to take the rule in the settings.
        frontier: File of what rules cost on this model; the bundle's if None.
        **settings: As `Engine.from_pretrained` takes them.

    Raises:
        FileNotFoundError: If model or bundle are missing.
        ValueError: If something cannot be used.
    """
    from transformers import set_seed

    from foreroute.runtime.generation.live_text import text_streamer

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature must be 0 (greedy) or a number above, not {temperature}.")
    measured = None
    if quality_budget is not None:
        measured = Frontier.find(frontier, find_bundle(bundle) if bundle else None)
        settings |= chosen_rule(measured, quality_budget, settings)
    text = read_prompt(prompt)
    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    token_ids = encode_prompt(tokenizer := _tokenizer(model, hub), text, is_chat=chat)
    settings["is_sliced"] = are_ranks_started()
    with Engine.from_pretrained(model, bundle=bundle, **hub, **settings) as engine:
        if measured is not None:
            measured.require_fits(engine.geometry)
        require_known(token_ids.flatten().tolist(), vocabulary_size(engine.model), "The prompt")
        set_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        sampling |= {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
        sampling["max_new_tokens"] = max_new_tokens
        if engine.model.generation_config.stop_strings:  # to find them, `generate` needs it
            sampling["tokenizer"] = tokenizer
        if (engine.model.generation_config.num_beams or 1) == 1:
            engine.generate(streamer=text_streamer(tokenizer, engine), **sampling)
        else:  # beams are not known before the end
            text = tokenizer.decode(engine.generate(**sampling)[0], skip_special_tokens=True)
            if engine.ranks.is_first:
                sys.stdout.write(text + "\n")
        return _cost_line(engine) if engine.ranks.is_first else ""


def chosen_rule(
    measured: Frontier, quality_budget: str, settings: dict[str, Any]
) -> dict[str, str]:
    """The settings that keep within a budget of quality, and take least.

    Args:
        measured: Rules of the model.
        quality_budget: As the user wrote it.
        settings: Of the engine; names the slots, and no rule.

    Raises:
        ValueError: If a rule is named too, or no such slots were measured.
    """
    if settings["on_miss"] != "fetch" or settings["exact_layers"]:
        raise ValueError("--quality-budget chooses the rule: leave out --on-miss, --exact-layers.")
    row = measured.choose(settings["expert_slots"], parse_quality_budget(quality_budget))
    logger.warning(
        "Rule on a miss: %s (perplexity %+.2f %%, at most %+.2f %%; measured on %s).",
        row.rule,
        100 * (row.perplexity_ratio - 1),
        100 * row.worst_loss,
        measured.device,
    )
    return {"on_miss": row.rule, "exact_layers": row.exact_layers}


def read_prompt(prompt: str) -> str:
    """The text that a user means, from the command line or from standard input.

    Args:
        prompt: The flag's value; `-` reads standard input.

    Raises:
        ValueError: If it is empty, or no UTF-8.
    """
    where = "Standard input" if prompt == "-" else "The prompt"
    try:
        if prompt == "-":
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        else:  # bytes that Python could not decode by the locale are surrogates in it
            text = prompt.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is no UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start}). "
            "If it is text in another encoding, convert it: iconv -f LATIN1 -t UTF-8"
        ) from error
    if not text:
        raise ValueError(EMPTY_PROMPT)
    return text


def encode_prompt(tokenizer: Any, text: str, *, is_chat: bool) -> Tensor:
    """The prompt's token ids, [1, T], int64.

    Args:
        tokenizer: The model's.
        text: The prompt.
        is_chat: Make it the user's turn of a chat, by the template alone.

    Raises:
        ValueError: If the template does not take it, or no token is left.
    """
    if is_chat:
        turns = [{"role": "user", "content": text}]
        token_ids = encode_chat(tokenizer, turns, for_answer=True)
    else:
        token_ids = list(tokenizer(text)["input_ids"])
    if not token_ids:
        raise ValueError(EMPTY_PROMPT)
    return torch.tensor([token_ids])


def _tokenizer(model: str, hub: HubSettings) -> Any:
    """The model's tokenizer, before any weight is read."""
    try:
        return load_tokenizer(model, **hub)
    except ValueError:
        _ = Checkpoint.open(model, **hub).experts  # a model that cannot run is the greater fault
        raise


def _cost_line(engine: Engine) -> str:
    stats = engine.stats()
    ttft_ms = stats.ttft_ms[-1] if stats.ttft_ms else math.nan  # beams have no first token
    kind = "exact"
    if not engine.config.is_exact:
        kind = f"SPECULATIVE ({engine.config.on_miss}), agreement {stats.agreement:.3f}"
    if engine.offloaded.expert_dtype != "auto":
        kind += f" with experts in {engine.offloaded.expert_dtype}"
    if engine.config.looks_ahead and stats.share_ahead < 1:
        kind += f", given up (looked ahead in {stats.steps_ahead} of {stats.decode.forwards} steps)"
    return (
        f"[{engine.geometry.describe()}; prefetch {engine.config.prefetch}, {kind}; "
        f"{engine.num_slots} slots a layer; TTFT {ttft_ms:.0f} ms, "
        f"TPOT {stats.tpot_ms:.2f} ms, hit rate {stats.hit_rate:.3f}, "
        f"{stats.bytes_per_token / 1e6:.2f} MB/token, "
        f"wasted {stats.wasted_bytes_per_token / 1e6:.2f} MB/token]"
    )

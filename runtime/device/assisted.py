"""Assisted decoding by captured steps: transformers drafts and verifies, replays give logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from foreroute.runtime.device.decode_graph import DecodeStep, why_not_widened
from foreroute.runtime.driver import MOST_STEP_TOKENS

OWN_PASSES = ("assistant_early_exit", "use_mtp", "speculation_type")
"""Settings of `generate` whose drafts read more of the model than its logits."""
OWN_PASSES_BY_NAME = ("Gemma4Assistant", "Gemma4UnifiedAssistant")
"""Assistants that do, by the beginning of their classes' names, as transformers knows them."""


def is_assisted(settings: Mapping[str, Any]) -> bool:
    """Whether `generate` is asked for drafts that the model verifies, several tokens a step."""
    return any(map(settings.get, ("assistant_model", "prompt_lookup_num_tokens", "use_mtp")))


def why_not_replayed(model: Any, settings: Mapping[str, Any]) -> str:
    """What keeps assisted decoding from captured steps; empty if nothing does.

    Args:
        model: Transformers causal LM.
        settings: What `generate` is asked for.
    """
    assistant = type(settings.get("assistant_model")).__name__
    reads_more = any(map(settings.get, OWN_PASSES)) or assistant.startswith(OWN_PASSES_BY_NAME)
    return "its drafts read more than logits" if reads_more else why_not_widened(model)


class _Past:
    """The cache of replayed steps, as far as assisted decoding has to do with one."""

    def __init__(self) -> None:
        self.length = 0
        self.step: DecodeStep | None = None
        """Whose cache it is, once the prompt is read."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that are in it."""
        return self.length

    def activate_past_recording(self) -> None:
        """Nothing: no position is ever dropped."""

    def crop(self, tokens_to_remove: Any) -> None:
        """Take back the last tokens; their number is 0 or negative."""
        count = abs(int(tokens_to_remove))
        if count and self.step is not None:
            self.step.crop(count)
            self.length -= count


class ReplayedModel:
    """Stands for a model in transformers' assisted decoding; its steps are replays.

    Whatever else is asked of it, the model answers.
    """

    def __init__(self, model: Any, step_of: Callable[[int], DecodeStep]) -> None:
        """Stand for a model that reads one sequence.

        Args:
            model: Transformers causal LM.
            step_of: The step that reads so many tokens at once, 1..`MOST_STEP_TOKENS`; all of
                them over one cache.
        """
        self._model, self._step_of = model, step_of

    def __getattr__(self, name: str) -> Any:
        """The model's own."""
        return getattr(self._model, name)

    def __call__(self, input_ids: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
        """Logits after the new tokens, [1, T, V] (of a prompt, after as many as are asked for).

        Args:
            input_ids: New tokens, [1, T]; the prompt, and what is drafted after it, come first.
            **inputs: As `prepare_inputs_for_generation` makes them.
        """
        past: _Past = inputs["past_key_values"]
        if past.step is None:
            past.step = self._step_of(1)
            logits = self._read(past.step, input_ids, inputs)
        else:
            parts = input_ids.split(MOST_STEP_TOKENS, dim=1)
            logits = torch.cat([self._verify(part) for part in parts], dim=1)
        past.length += input_ids.shape[1]
        return CausalLMOutputWithPast(logits=logits, past_key_values=past)

    def _read(self, step: DecodeStep, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        mask, positions = (inputs.get(name) for name in ("attention_mask", "position_ids"))
        mask = torch.ones_like(input_ids) if mask is None else mask
        step.begin(mask, None if positions is None else positions[..., -1:] + 1)
        own = {"attention_mask": mask, "past_key_values": step.cache, "use_cache": True}
        logits: Tensor = self._model(input_ids=input_ids, **(inputs | own)).logits
        return logits

    def _verify(self, tokens: Tensor) -> Tensor:
        step = self._step_of(tokens.shape[1])
        logits = step.replay(tokens.view(-1) if step.width == 1 else tokens)
        return logits.view(1, step.width, -1).clone()  # the next replay writes there again


def assisted_loop(
    model: Any,
    step_of: Callable[[int], DecodeStep],
    input_ids: Tensor,
    helpers: Mapping[str, Any],
    generation_config: Any,
    **settings: Any,
) -> Tensor:
    """Decode as transformers does, by replays in the place of the model's steps.

    Args:
        model: Transformers causal LM.
        step_of: See `ReplayedModel`.
        input_ids: The prompt, [1, P].
        helpers: `assistant_model` and tokenizers that `generate` was given.
        generation_config: As `generate` prepares it.
        **settings: What else it prepares.

    Returns:
        Prompt and continuation, [1, P + new].

    Raises:
        ValueError: If transformers has something against the assistant or a batch.
    """
    mode = GenerationMode.ASSISTED_GENERATION
    model._validate_generation_mode(mode, generation_config, helpers)
    ids: Tensor = GenerationMixin._assisted_decoding(
        ReplayedModel(model, step_of),
        input_ids,
        generation_config=generation_config,
        **helpers,
        **(settings | {"past_key_values": _Past()}),
    )
    return ids

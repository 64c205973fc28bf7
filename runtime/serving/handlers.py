"""Transformers' request handlers, with what they leave out: sampling, usage, clean streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, get_response_template

from foreroute.estimators.artifacts import first_line
from foreroute.runtime.serving.answers import CURRENT, AnswerQueue

DONE = "data: [DONE]\n\n"
MOST_BIAS = 100  # as OpenAI's own servers take


class _Unparsed:
    """A model whose answers are plain text; everything else is the model's own."""

    def __init__(self, model: Any) -> None:
        self._model, self.config = model, SimpleNamespace(model_type="")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _parsed_or_not(model: Any, processor: Any) -> Any:
    """The model; its answers stay unparsed where its prompts are not as its type's usually are.

    Transformers parses tool calls and thinking by the model's type, and takes a prompt without the
    usual beginning of an answer for a part of that answer.
    """
    template = get_response_template(processor, model)
    if template is None or not getattr(processor, "chat_template", None):
        return model
    anchors = template.get("start_anchor", ())
    turn = [{"role": "user", "content": "?"}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    is_usual = any(
        anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors)
    )
    return model if is_usual else _Unparsed(model)


class OneModel(ModelManager):  # type: ignore[misc]
    """Stands for the one model that is served; nothing is ever loaded or unloaded."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        """Serve this model under this name.

        Args:
            model: Transformers model whose `generate` is the engine's.
            processor: Its tokenizer or processor.
            name: What clients call it.
        """
        super().__init__()
        self._loaded = _parsed_or_not(model, processor), processor
        self.force_model = name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """What answers call the model: as clients do, without transformers' `@main`."""
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model and its tokenizer, whatever is asked for; `_resolve_model` checks the name."""
        return self._loaded


class OneQueue(GenerationState):  # type: ignore[misc]
    """Hands every request to one queue."""

    def __init__(self, queue: AnswerQueue) -> None:
        """All requests wait in this queue."""
        super().__init__()
        self._queue = queue

    def get_manager(self, model_id: str, use_cb: bool = False) -> AnswerQueue:
        """The queue."""
        return self._queue


class _Sampling:
    """Builds a request's generation config as the OpenAI API means it."""

    _valid_params_class = None  # `requests.checked` has looked at every field

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        fields = {name: value for name, value in body.items() if name not in ("seed", "stop")}
        build = super()._build_generation_config  # type: ignore[misc]
        try:
            config = build(fields, model_generation_config)
            model = self.model_manager.load_model_and_processor()[0]  # type: ignore[attr-defined]
            bias = _bias(body, model)
        except (TypeError, ValueError) as error:
            raise HTTPException(400, f"The generation settings cannot be read: {error}") from error
        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            raise HTTPException(400, "One sequence without beams is generated per request.")
        if "temperature" in body or "top_p" in body:
            config.do_sample = body.get("temperature", 1) != 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        config.sequence_bias = bias or None
        config._is_length_given = "max_tokens" in body
        return config


def _bias(body: dict[str, Any], model: Any) -> dict[tuple[int], float]:
    given = body.get("logit_bias", {})
    if not isinstance(given, dict):
        raise TypeError(f"logit_bias must be an object of token ids, not {given!r}")
    if not given:
        return {}
    vocab_size = len(model.get_input_embeddings().weight)
    bias = {(int(token),): float(value) for token, value in given.items()}
    for (token,), value in bias.items():
        if not (0 <= token < vocab_size and -MOST_BIAS <= value <= MOST_BIAS):
            raise ValueError(
                f"logit_bias takes token ids from 0 to {vocab_size - 1} and values from "
                f"-{MOST_BIAS} to {MOST_BIAS}, not {token}: {value}"
            )
    return bias


class Chat(_Sampling, ChatCompletionHandler):  # type: ignore[misc]
    """`/v1/chat/completions`."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a conversation.

        Raises:
            HTTPException: If the model has no chat template, or it refuses the messages.
        """
        processor = self.model_manager.load_model_and_processor()[1]
        if not getattr(processor, "chat_template", None):
            raise HTTPException(400, "The model has no chat template: use /v1/completions.")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise HTTPException(400, f"messages must be a list of at least one, not {messages!r}.")
        try:
            return await super().handle_request(body, request_id)
        except HTTPException:
            raise
        except Exception as error:  # templates raise what they like
            raise HTTPException(
                400, f"The messages do not fit the chat template: {first_line(error)}"
            ) from error

    def _build_completion(self, request_id: str, content: str, *args: Any, **settings: Any) -> Any:
        return super()._build_completion(
            request_id, CURRENT.get().cut(content or ""), *args, **settings
        )


class Completion(_Sampling, CompletionHandler):  # type: ignore[misc]
    """`/v1/completions`."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Go on with a text.

        Raises:
            HTTPException: If the prompt is not one text.
        """
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = body["prompt"] = prompt[0]
        if not isinstance(prompt, str):
            raise HTTPException(400, "prompt must be one text; token ids are not supported.")
        return await super().handle_request(body, request_id)


def with_usage(response: StreamingResponse, body: dict[str, Any]) -> StreamingResponse:
    """End a stream as the OpenAI API does: usage in a chunk of its own if asked for, then DONE.

    Args:
        response: Of a transformers handler, which puts the usage into the last chunk.
        body: The request.
    """
    is_asked_for = bool((body.get("stream_options") or {}).get("include_usage"))
    response.body_iterator = _rewritten(response.body_iterator, is_asked_for)
    return response


async def _rewritten(parts: Any, has_usage: bool) -> AsyncIterator[str]:
    try:
        async for part in parts:
            for event in part.split("\n\n"):
                if event:
                    yield _event(event, has_usage)
        yield DONE
    finally:
        await parts.aclose()


def _event(event: str, has_usage: bool) -> str:
    text = event.removeprefix("data: ")
    try:
        chunk = json.loads(text)
    except json.JSONDecodeError:  # transformers writes a failure's text as it is
        chunk = {"error": text.removeprefix('{"error": "').removesuffix('"}')}
    if "error" in chunk:
        return _data({"error": {"message": str(chunk["error"]), "type": "server_error"}})
    usage = chunk.pop("usage", None)
    if usage is None or not has_usage:
        return _data(chunk)
    return _data(chunk) + _data(chunk | {"choices": [], "usage": usage})


def _data(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

"""What a request may ask for: refused with a reason where it would be ignored or misunderstood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from foreroute.estimators.artifacts import shown

MOST_STOPS = 4  # as OpenAI's own servers take
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key"}
"""Fields without a meaning here, whose absence changes no answer."""
COMMON = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logit_bias",
    "generation_config",
}
CHAT = COMMON | {
    "messages",
    "max_completion_tokens",
    "tools",
    "tool_choice",
    "response_format",
    "reasoning_effort",
    "chat_template_kwargs",
}
COMPLETION = COMMON | {"prompt", "suffix"}
ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "functions": (),
    "function_call": (),
    "audio": (),
    "prediction": (),
    "modalities": (["text"],),
    "web_search_options": (),
}
"""Fields that are known and do nothing but at these values (null always is one)."""


class BadRequest(ValueError):
    """A request that is refused; the text says why and what to do."""


def checked(body: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """A request's fields, in the words that transformers' handlers know.

    Args:
        body: The JSON object as it came.
        known: `CHAT` or `COMPLETION`.

    Returns:
        A copy: `max_completion_tokens` is `max_tokens`, `stop` a list; null fields are left out.

    Raises:
        BadRequest: If a field is unknown, not supported at its value, or out of its range.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    for name in sorted(fields.keys() - known - IGNORED):
        if name not in ONLY:
            raise BadRequest(f"Unknown field {shown(name)}; known: {', '.join(sorted(known))}.")
        allowed = ONLY[name]
        if fields.pop(name) not in allowed:
            only = f"; leave it out or give {allowed[0]!r}" if allowed else "; leave it out"
            raise BadRequest(f"{name} is not supported{only}.")
    for name in IGNORED & fields.keys():
        del fields[name]
    _check_numbers(fields)
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if "stop" in fields:
        fields["stop"] = _stops(fields["stop"])
    _check_tools(fields)
    _require(fields, "chat_template_kwargs", dict, lambda _: True, "an object")
    if "reasoning_effort" in fields:
        effort = fields.pop("reasoning_effort")
        given = fields.get("chat_template_kwargs", {})
        fields["chat_template_kwargs"] = given | {"reasoning_effort": effort}
    _require(fields, "stream", bool, lambda _: True, "true or false")
    _require(fields, "stream_options", dict, lambda _: True, "an object")
    return fields


def _check_numbers(fields: Mapping[str, Any]) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        _require(fields, name, int, lambda value: value >= 1, "a whole number of at least 1")
    _require(fields, "seed", int, lambda value: 0 <= value < 2**63, "a whole number from 0 up")
    _require(fields, "temperature", (int, float), lambda value: 0 <= value <= 2, "from 0 to 2")
    _require(fields, "top_p", (int, float), lambda value: 0 < value <= 1, "over 0 and at most 1")


def _require(
    fields: Mapping[str, Any],
    name: str,
    kinds: type | tuple[type, ...],
    holds: Callable[[Any], bool],
    expected: str,
) -> None:
    if name not in fields:
        return
    value = fields[name]
    is_kind = isinstance(value, kinds) and (not isinstance(value, bool) or kinds is bool)
    if not is_kind or not holds(value):
        raise BadRequest(f"{name} must be {expected}, not {shown(value)}.")


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    is_texts = isinstance(stops, list) and all(isinstance(text, str) and text for text in stops)
    if not is_texts or len(stops) > MOST_STOPS:
        raise BadRequest(f"stop must be a text or up to {MOST_STOPS} texts, not {shown(stop)}.")
    return list(stops)


def _check_tools(fields: dict[str, Any]) -> None:
    """`tool_choice` and `response_format` as far as a model is free to answer as it likes."""
    choice = fields.pop("tool_choice", "auto")
    if choice == "none":
        fields.pop("tools", None)
    elif choice != "auto":
        raise BadRequest(f"tool_choice is auto or none here, not {shown(choice)}.")
    form = fields.pop("response_format", {"type": "text"})
    if form != {"type": "text"}:
        raise BadRequest("response_format is text alone; ask for another form in the prompt.")

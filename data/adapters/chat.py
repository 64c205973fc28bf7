"""Chats as datasets and users have them, and the one way from a chat to token ids."""

from __future__ import annotations

from typing import Any

from foreroute.estimators.artifacts import first_line

Turn = dict[str, Any]
ROLE_KEYS = (("role", "content"), ("from", "value"))
"""Under which keys a turn says who speaks and what: as everybody does, and as ShareGPT does."""
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names of the speakers, in the words of chat templates."""


def turns_of(value: Any) -> list[Turn] | None:
    """The turns of a chat, each with `role` and `content`, or None if the value is no chat.

    Args:
        value: A list of turns, or (as tables may give it) a turn of lists.
    """
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [
            dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)
        ]
    if not isinstance(value, list) or not value:
        return None
    turns = [_turn(part) for part in value]
    return None if None in turns else turns  # type: ignore[return-value]


def _turn(part: Any) -> Turn | None:
    if not isinstance(part, dict):
        return None
    for role, content in ROLE_KEYS:
        if isinstance(part.get(role), str) and content in part:
            others = {k: v for k, v in part.items() if v is not None and k not in (role, content)}
            name = part[role] if role == "role" else ROLES.get(part[role], part[role])
            return others | {"role": name, "content": _joined(part[content])}
    return None


def _joined(content: Any) -> Any:
    """A content in parts, all of them text, as one text; anything else as it is."""
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
    return content


def encode_chat(tokenizer: Any, turns: list[Turn], *, for_answer: bool = False) -> list[int]:
    """The token ids of a chat, by the tokenizer's own template and by nothing else.

    Args:
        tokenizer: A transformers tokenizer.
        turns: As `turns_of` gives them.
        for_answer: End where the model's answer begins.

    Raises:
        ValueError: If there is no template, or it does not take this chat; one line says why.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template (chat_template), so it cannot read chats."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=for_answer, return_dict=True
        )
    except Exception as error:  # a template is a program, and may end in anything
        raise ValueError(
            f"The tokenizer's chat template refuses this chat: {first_line(error)}"
        ) from error
    return list(encoded["input_ids"])

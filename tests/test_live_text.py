"""The live line of `foreroute generate`: on a terminal below the text, gone at the end; no pipe."""

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from foreroute.data.adapters import load_tokenizer
from foreroute.runtime import Engine
from foreroute.runtime.generation import live_text
from foreroute.runtime.generation.live_text import LiveText, text_streamer

SEQUENCE = re.compile(r"\x1b\[\??(\d*)[\d;]*([A-Za-z])|.", re.DOTALL)
PROMPT = "def parse(line):\n    return"


def screen(written: str) -> str:
    """What a terminal shows in the end."""
    lines, row, column = [""], 0, 0
    for found in SEQUENCE.finditer(written):
        text, (count, command) = found[0], (found[1], found[2])
        if command == "A":
            row = max(0, row - int(count or 1))
        elif command == "K":
            lines[row] = ""
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row - len(lines) + 1)
        elif text == "\r":
            column = 0
        elif command is None:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines).rstrip()


@pytest.fixture(scope="module")
def engine(tiny_moe: Any) -> Iterator[Engine]:
    with Engine.from_pretrained(str(tiny_moe.folder), expert_slots="3") as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(tiny_moe: Any) -> Any:
    return load_tokenizer(str(tiny_moe.folder))


def test_a_terminal_is_left_with_the_text_alone(
    engine: Engine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_text, "LOOK_EVERY_S", 0.0)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=400)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    streamer = LiveText(tokenizer, engine, terminal)
    # digits and letters: what random weights would write is no text
    words = tokenizer("abc\n012", add_special_tokens=False)["input_ids"]
    output = engine.generate(
        ids,
        streamer=streamer,
        max_new_tokens=20,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, __: words,
    )
    written = terminal.file.getvalue()
    assert screen(written) == tokenizer.decode(output[0]).rstrip()
    counts = [int(count) for count in re.findall(r"\[(\d+) tokens", written)]
    assert (counts[0], counts[-1]) == (1, 20)
    assert re.search(r"20 tokens, [\d.]+ tokens/s, hit rate [01]\.\d{3}\]", written)


def test_a_pipe_gets_the_text_and_nothing_else(
    engine: Engine, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    streamer = text_streamer(tokenizer, engine)
    output = engine.generate(ids, streamer=streamer, max_new_tokens=8, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(output[0], skip_special_tokens=True) + "\n"

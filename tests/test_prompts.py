"""Prompts and flags as people type them: stock's text comes out, or one line."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_stub import StubHub

from foreroute.data.adapters import load_tokenizer, resolve_device
from foreroute.data.adapters.chat import encode_chat, turns_of
from foreroute.data.collect import collect_traces
from foreroute.estimators.console import run_command
from foreroute.runtime.cli import generate
from foreroute.runtime.generation.command import encode_prompt, read_prompt

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def stock(tiny: Any, prompt: str, num_tokens: int) -> str:
    tokenizer = load_tokenizer(str(tiny.folder))
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = tiny.model.generate(**given, max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def stdin_of(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `foreroute generate` with these words; gives exit code, standard output and error."""

    def run(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            run_command("foreroute", {"generate": generate}, ["generate", *words])
        except SystemExit as ended:
            code = int(ended.code or 0)
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


@pytest.mark.parametrize("words", [["--prompt", "--"], ["--prompt=--"], ["--prompt", "1e3"]])
def test_a_prompt_that_looks_like_something_else_is_text(
    typed: Callable[..., Any], tiny_moe: Any, words: list[str]
) -> None:
    flags = ("--model", str(tiny_moe.folder), "--device", "cpu", "--max-new-tokens", "4")
    code, out, err = typed(*words, *flags)
    assert code == 0, err
    assert out.rstrip("\n") == stock(tiny_moe, words[-1].split("=")[-1], 4).rstrip("\n")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("temperature", "-1", "0 (greedy) or a number above, not -1.0"),
        ("temperature", "nan", "nan"),
        ("temperature", "inf", "inf"),
        ("max-new-tokens", "0", "at least 1, not 0"),
        ("max-new-tokens", "-3", "at least 1, not -3"),
        ("device", "mps", "Device mps is not supported"),
        ("device", "meta", "Device meta is not supported"),
        ("prompt", "", "The prompt is empty"),
        ("chat", None, "The tokenizer has no chat template"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(
    typed: Callable[..., Any], tiny_moe: Any, flag: str, value: str | None, said: str
) -> None:
    given = {"prompt": "hi", "model": str(tiny_moe.folder), "device": "cpu"} | {flag: value}
    words = [f"--{name}" if v is None else f"--{name}={v}" for name, v in given.items()]
    code, out, err = typed(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err


@pytest.mark.parametrize("content", [b"text\n", "grün 日本".encode(), b"\xef\xbb\xbfmarked"])
def test_standard_input_is_taken_whole(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    stdin_of(monkeypatch, content)
    assert read_prompt("-") == content.decode("utf-8-sig")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"caf\xe9 \xff", r"no UTF-8 text \(byte 0xe9 at 3\)"), (b"", "The prompt is empty")],
)
def test_standard_input_that_is_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    stdin_of(monkeypatch, content)
    with pytest.raises(ValueError, match=said):
        read_prompt("-")


def test_words_that_the_locale_could_not_decode_are_read_as_utf8() -> None:
    assert read_prompt("ünï".encode().decode("ascii", "surrogateescape")) == "ünï"
    with pytest.raises(ValueError, match="The prompt is no UTF-8 text"):
        read_prompt(b"caf\xe9".decode("ascii", "surrogateescape"))


def test_a_chat_has_the_templates_begin_token_and_no_other(make_tiny_moe: Any) -> None:
    folder = make_tiny_moe().folder
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.bos_token = "<eos>"
    token = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    from tokenizers.processors import TemplateProcessing

    rule = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer._tokenizer.post_processor = rule
    assert tokenizer("hi")["input_ids"][0] == 0, token
    ids = encode_prompt(tokenizer, "hi", is_chat=True)
    turns = [{"role": "user", "content": "hi"}]
    right = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert ids.tolist() == [right["input_ids"]]
    assert (ids == 0).sum() == 1


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('Only users!') }}", "{% for m in messages %}{{ m }", "{{ m.x.y }}", ""],
)
def test_a_template_that_does_not_work_is_one_line(tiny_moe: Any, template: str) -> None:
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template") as refused:
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "value", ["text", [], [1, 2], ["a"], [{"role": "user"}], {"a": 1}, [{}], None, [[]]]
)
def test_what_is_no_chat_gives_no_turns(value: Any) -> None:
    assert turns_of(value) is None


def test_a_chat_as_columns_is_the_same_chat() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert turns_of({"role": ["user", "assistant"], "content": ["a", "b"]}) == turns_of(turns)


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="torch sees only 1 CUDA devices"):
        resolve_device("cuda:7")


PRINTS = (
    "from foreroute.estimators.console import run_command\n"
    "def show(count: int = 1):\n    '''Show.'''\n    for _ in range(count):\n"
    "        print('\\xfcn\\xef \\u65e5\\u672c', flush=True)\n"
    "run_command('show', show)\n"
)


def run_python(*words: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PRINTS, *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
    )


def test_a_reader_that_has_enough_ends_the_command_without_a_word() -> None:
    running = run_python("--count=100000")
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait() == 141


def test_any_text_is_printed_whatever_the_locale() -> None:
    ascii_only = run_python(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    latin = run_python(PYTHONIOENCODING="latin-1")
    assert ascii_only.communicate()[0].decode() == "ünï 日本\n"
    assert latin.communicate()[0] == "ünï ??\n".encode("latin-1")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run_command("foreroute", {"generate": generate}, ["--version"])
    name, version = capsys.readouterr().out.split()
    assert name == "foreroute"
    assert version[0].isdecimal()


def test_a_revision_is_one_of_weights_and_tokenizer_alike(
    hub: StubHub,
    typed: Callable[..., Any],
    make_tiny_moe: Any,
    text_dataset: Path,
    tmp_path: Path,
) -> None:
    main, other = make_tiny_moe(), make_tiny_moe(num_hidden_layers=3)
    vocabulary = json.loads((other.folder / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]
    (other.folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    files = [{p.name: p.read_bytes() for p in t.folder.iterdir()} for t in (main, other)]
    hub.repos["me/model"], hub.history["v2"] = files
    for revision, right in ((None, main), ("v2", other)):
        flags = ("--revision", revision) if revision else ()
        settings = ("--prompt", "a tale", "--max-new-tokens", "4", "--device", "cpu")
        code, out, err = typed("--model", "me/model", *flags, *settings)
        assert code == 0, err
        assert out.rstrip("\n") == stock(right, "a tale", 4).rstrip("\n")
        recorded = [
            collect_traces(
                model=model,
                revision=given,
                dataset=str(text_dataset),
                tokens=256,
                sequence_length=64,
                device="cpu",
                out=tmp_path / f"{revision}-{place}",
            )
            for place, (model, given) in enumerate(
                [("me/model", revision), (str(right.folder), None)]
            )
        ]
        assert recorded[0].geometry.num_layers == len(right.moe.layers)
        assert torch.equal(*(traces.tokens(0).token_ids for traces in recorded))

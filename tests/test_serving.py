"""The server, by real clients on loopback: answers, streams, stops, refusals, drops, its end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from foreroute.data.adapters import load_tokenizer
from foreroute.runtime import Engine
from foreroute.runtime.serving.app import make_app
from foreroute.runtime.serving.server import DrainingServer
from foreroute.runtime.stats import RuntimeStats

PROMPT = "import os\n\ndef read_config(path):\n"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LIMIT_S = 60


class Served:
    """A server on loopback, and what talks to it."""

    def __init__(self, engine: Engine, server: DrainingServer, url: str) -> None:
        self.engine, self.server, self.url = engine, server, url
        self.client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=LIMIT_S)

    def complete(self, **settings: Any) -> Any:
        given = {"model": "bundled", "prompt": PROMPT, "temperature": 0} | settings
        return self.client.completions.create(**given)

    def chat(self, **settings: Any) -> Any:
        messages = [{"role": "user", "content": PROMPT}]
        given = {"model": "bundled", "messages": messages, "temperature": 0} | settings
        return self.client.chat.completions.create(**given)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


@contextmanager
def serving(engine: Engine, tokenizer: Any, **settings: Any) -> Iterator[Served]:
    app = make_app(engine, tokenizer, "bundled", **settings)
    server = DrainingServer(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Served(engine, server, f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join(LIMIT_S)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained("bundled", expert_slots="25%", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def served(engine: Engine, tokenizer: Any) -> Iterator[Served]:
    with serving(engine, tokenizer, max_waiting=2) as served:
        yield served


@pytest.fixture(scope="module")
def expected(engine: Engine, tokenizer: Any) -> str:
    """What the engine says without a server, 24 tokens."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = engine.generate(inputs["input_ids"], max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_completion_is_the_engines_own_and_counts_its_tokens(
    served: Served, expected: str
) -> None:
    answer = served.complete(max_tokens=24)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.model == "bundled"
    assert [model.id for model in served.client.models.list().data] == ["bundled"]


def test_a_chat_answers_within_max_completion_tokens(served: Served, expected: str) -> None:
    answer = served.chat(max_completion_tokens=24)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 24


def test_streams_carry_the_same_text_and_usage_only_if_asked_for(
    served: Served, expected: str
) -> None:
    for create, text_of in (
        (served.complete, lambda choice: choice.text),
        (served.chat, lambda choice: choice.delta.content or ""),
    ):
        plain = list(create(max_tokens=24, stream=True))
        assert "".join(text_of(c.choices[0]) for c in plain) == expected
        assert all(chunk.usage is None for chunk in plain)
        asked = list(create(max_tokens=24, stream=True, stream_options={"include_usage": True}))
        assert asked[-1].choices == []
        assert asked[-1].usage.completion_tokens == 24


def test_a_raw_stream_ends_with_done(served: Served) -> None:
    body = {"model": "bundled", "prompt": PROMPT, "max_tokens": 2, "stream": True}
    lines = httpx.post(f"{served.url}/v1/completions", json=body, timeout=LIMIT_S).text.split(
        "\n\n"
    )
    assert lines[-2] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-2])


def test_stops_end_an_answer_and_are_cut_off(served: Served, expected: str) -> None:
    stop = expected[10:14]
    until = expected[: expected.index(stop)]
    answer = served.complete(max_tokens=24, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (until, "stop")
    streamed = served.complete(max_tokens=24, stop=[stop, "never"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == until
    assert served.chat(max_tokens=24, stop=stop).choices[0].message.content == until


def test_sampling_follows_each_requests_temperature_and_seed(served: Served) -> None:
    def sampled(**settings: Any) -> set[str]:
        settings = {"temperature": 1.5, "max_tokens": 8} | settings
        return {served.complete(**settings).choices[0].text for _ in range(3)}

    assert len(sampled(seed=7)) == 1
    assert len(sampled()) > 1
    assert len(sampled(temperature=0)) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n": 2}, "n is not supported"),
        ({"logprobs": 2}, "logprobs is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"extra_body": {"min_tokens": 3}}, "Unknown field 'min_tokens'"),
        ({"temperature": -1}, "temperature must be from 0 to 2"),
        ({"top_p": 0}, "top_p must be over 0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number"),
        ({"max_tokens": 10**9}, "the model takes"),
        ({"seed": -1}, "seed must be"),
        ({"stop": [""]}, "stop must be"),
        ({"prompt": [5, 6]}, "prompt must be one text"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"model": "gpt-4"}, "pinned to 'bundled'"),
        ({"extra_body": {"generation_config": '{"num_beams": 4}'}}, "without beams"),
        ({"extra_body": {"generation_config": "["}}, "cannot be read"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias takes token ids from 0 to"),
        ({"logit_bias": {"5": 1e9}}, "values from -100 to 100"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_reason(
    served: Served, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        served.complete(**settings)


def test_chats_refuse_what_they_cannot_read(served: Served) -> None:
    for settings, reason in (
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"content": "no role"}]}, "do not fit the chat template"),
        ({"tool_choice": "required"}, "tool_choice is auto or none"),
        ({"response_format": {"type": "json_object"}}, "response_format is text"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            served.chat(**settings)
    response = httpx.post(f"{served.url}/v1/chat/completions", content=b"[1")
    assert response.status_code == 400
    assert "not JSON" in response.json()["error"]["message"]


def test_errors_of_the_address_come_in_openais_form_too(served: Served) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, served.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_dropped_request_frees_the_engine(served: Served) -> None:
    before = served.metric("foreroute_lookups_total")
    stream = served.complete(max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.3).completions.create(
            model="bundled", prompt=PROMPT, max_tokens=1000, temperature=0
        )
    assert served.complete(max_tokens=2).choices[0].text  # both were ended, not waited for
    steps = (served.metric("foreroute_lookups_total") - before) / (8 * 4)
    assert 0 < steps < 1000


def test_a_full_queue_refuses_and_answers_the_rest(served: Served) -> None:
    outcomes: list[str] = []

    def ask() -> None:
        try:
            served.complete(max_tokens=60)
            outcomes.append("answered")
        except openai.InternalServerError as error:
            outcomes.append(f"{error.status_code}")

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(outcomes) == ["503"] * 3 + ["answered"] * 3


def test_metrics_count_what_was_answered(served: Served) -> None:
    before = served.metric("foreroute_tpot_seconds_count")
    served.complete(max_tokens=9)
    assert served.metric("foreroute_tpot_seconds_count") == before + 8
    assert 0 < served.metric("foreroute_hit_rate") <= 1
    assert served.metric("foreroute_copied_bytes_total") > 0
    assert served.metric("foreroute_queue_waiting") == 0
    text = httpx.get(f"{served.url}/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    assert {family.name for family in text_string_to_metric_families(text.text)} >= {
        *("foreroute_ttft_seconds", "foreroute_tpot_seconds", "foreroute_requests"),
        *("foreroute_hit_rate", "foreroute_copied_bytes", "foreroute_queue_waiting"),
    }


def test_an_api_key_is_asked_for(engine: Engine, tokenizer: Any) -> None:
    with serving(engine, tokenizer, api_key="secret") as locked:
        with pytest.raises(openai.AuthenticationError):
            locked.complete(max_tokens=1)
        given = OpenAI(base_url=f"{locked.url}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in given.models.list().data] == ["bundled"]
        assert httpx.get(f"{locked.url}/health").json() == {"status": "ok"}


def test_transformers_chat_talks_to_it(served: Served) -> None:
    command = "from transformers.cli.transformers import main; main()"
    flags = [f"{served.url}/v1", "max_new_tokens=4", "do_sample=False"]
    done = subprocess.run(
        [sys.executable, "-c", command, "chat", "bundled", *flags],
        input="def parse(\nn\n!exit\n",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert served.metric('foreroute_requests_total{path="/v1/chat/completions",status="200"}') > 0


class Scripted:
    """Stands for an engine whose model always answers the same text."""

    def __init__(self, model: Any, tokenizer: Any, text: str) -> None:
        self.model, self._ids = self, tokenizer(text)["input_ids"]
        self.config, self.generation_config = model.config, model.generation_config
        self.device, self.name_or_path = model.device, "scripted"

    def generate(self, input_ids: Any, streamer: Any = None, **_: Any) -> Any:
        if streamer is not None:
            streamer.put(input_ids[0])
            for token in self._ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([input_ids, torch.tensor([self._ids])], dim=1)

    def stats(self) -> RuntimeStats:
        return RuntimeStats()

    def reset_stats(self) -> None:
        pass


def test_tool_calls_are_parsed_as_transformers_parses_them(engine: Engine) -> None:
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = TEMPLATE + "{{ '<|im_start|>assistant\\n' }}"
    call = '<tool_call>{"name": "look", "arguments": {"at": "here"}}</tool_call>'
    scripted: Any = Scripted(engine.model, tokenizer, call)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    with serving(scripted, tokenizer) as served:
        answer = served.chat(tools=tools).choices[0]
        chunks = list(served.chat(tools=tools, stream=True))
        plain = served.chat(tool_choice="none", tools=tools).choices[0]
    streamed = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices]
    calls = [*answer.message.tool_calls, *(c for part in streamed if part for c in part)]
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("look", {"at": "here"})
    ] * 2
    assert answer.finish_reason == "tool_calls"
    assert plain.finish_reason == "tool_calls"  # the model did so all the same


@pytest.mark.slow
def test_sigterm_ends_what_runs_and_refuses_what_waits(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "foreroute.runtime.cli", "serve", "--port", "0"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ)
        try:
            url = _address(log, process)
            client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=LIMIT_S)
            stream = client.completions.create(
                model="bundled", prompt=PROMPT, max_tokens=200, stream=True
            )
            first = next(iter(stream))
            waiting: list[int] = []

            def wait() -> None:
                try:
                    client.completions.create(model="bundled", prompt=PROMPT, max_tokens=4)
                except openai.InternalServerError as error:
                    waiting.append(error.status_code)

            thread = threading.Thread(target=wait)
            thread.start()
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
            thread.join(LIMIT_S)
            assert waiting == [503]
            assert chunks[-1].choices[0].finish_reason in ("length", "stop")
            assert process.wait(LIMIT_S) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def _address(log: Any, process: subprocess.Popen[bytes]) -> str:
    for _ in range(10 * LIMIT_S):
        log.seek(0)
        found = [line for line in log.read().splitlines() if "Uvicorn running on" in line]
        if found:
            return found[0].split(" on ")[1].split()[0]
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("the server did not start")

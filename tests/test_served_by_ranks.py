"""The server on several processes of torchrun: one answers, and all stay in step to the end."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreroute.data.adapters import load_tokenizer
from foreroute.runtime import Engine

LIMIT_S = 120
ENDS_WITHIN_S = 25
BODY = {"model": "bundled", "prompt": "import os\n\ndef read_config(path):\n", "temperature": 0}
STREAM = {"stream": True, "max_tokens": 60}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SERVE = ["-m", "foreroute.runtime.cli", "serve", "--port", "0", "--expert-slots", "25%"]


def address(log: Path, process: subprocess.Popen[bytes]) -> str:
    for _ in range(10 * LIMIT_S):
        found = [line for line in log.read_text().splitlines() if "Uvicorn running on" in line]
        if found:
            return found[0].split(" on ")[1].split()[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def complete(url: str, **settings: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=BODY | settings, timeout=LIMIT_S)


def expected(num_tokens: int) -> str:
    tokenizer = load_tokenizer("bundled")
    ids = tokenizer(BODY["prompt"], return_tensors="pt")["input_ids"]
    with Engine.from_pretrained("bundled", expert_slots="25%", device="cpu") as engine:
        output = engine.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.slow
def test_drops_stops_failures_and_sigterm_leave_the_processes_in_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *TORCHRUN, *SERVE], stdout=out, stderr=out)
    try:
        url = address(log, process)
        text = complete(url, max_tokens=12).json()["choices"][0]["text"]
        assert text == expected(12)
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY | STREAM) as dropped:
            next(dropped.iter_lines())
        stop = text[6:9]
        stopped = complete(url, max_tokens=500, stop=stop).json()["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(stop)], "stop")
        assert complete(url, logit_bias={"99999999": 1}).status_code >= 400
        assert complete(url, max_tokens=12).json()["choices"][0]["text"] == text
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY | STREAM) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)  # torchrun hands it on to both
            events = [line for line in lines if line.startswith("data: {")]
        last = json.loads(events[-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        process.wait(ENDS_WITHIN_S)
        assert "has ended, so this one ends too" not in log.read_text()
    finally:
        process.kill()

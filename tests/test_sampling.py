"""The GPU engine's decode loop, on a CPU: a step is run where a GPU would replay its graph."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from foreroute.runtime.device.sampling import decode_loop
from foreroute.runtime.stats import RuntimeStats
from foreroute.runtime.streamer import TimingStreamer


class UncapturedStep:
    """Stands in for `DecodeGraph`: the same step, run anew each time."""

    def __init__(self, model: Any, length: int) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.num_replays = 0
        self._model = model

    def begin(self, prompt_mask: Tensor, positions: Tensor) -> None:
        assert torch.equal(positions, prompt_mask.sum(-1, keepdim=True))
        self._mask = prompt_mask

    def replay(self, tokens: Tensor) -> Tensor:
        self.num_replays += 1
        self._mask = torch.cat([self._mask, torch.ones(len(tokens), 1, dtype=torch.long)], dim=1)
        output = self._model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self._mask,
            position_ids=self._mask.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class Collected:
    def __init__(self) -> None:
        self.puts: list[Tensor] = []
        self.is_ended = False

    def put(self, value: Tensor) -> None:
        self.puts.append(value.clone())

    def end(self) -> None:
        self.is_ended = True


def generate(model: Any, tokens: Tensor, streamer: Any, **settings: Any) -> tuple[Tensor, int]:
    step = UncapturedStep(model, 128)

    def loop(model: Any, input_ids: Tensor, streamer: Any = None, **given: Any) -> Tensor:
        return decode_loop(
            model,
            step,
            input_ids,
            given,
            given.pop("logits_processor"),
            given.pop("stopping_criteria"),
            given.pop("generation_config"),
            streamer,
        )

    output = model.generate(
        tokens,
        custom_generate=partial(loop, streamer=streamer),
        streamer=streamer,
        pad_token_id=0,
        **settings,
    )
    return output, step.num_replays


def prompt() -> Tensor:
    return torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("count", [1, 2, 20])
def test_the_loop_gives_the_tokens_that_generate_gives(tiny_moe: Any, count: int) -> None:
    mask = torch.ones_like(prompt())
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": count, "do_sample": False}
    expected = tiny_moe.model.generate(prompt(), pad_token_id=0, **settings)
    collected = Collected()
    got, num_replays = generate(tiny_moe.model, prompt(), collected, **settings)
    assert torch.equal(got, expected)
    assert num_replays == count - 1
    new = torch.stack(collected.puts[1:], dim=1)  # the prompt comes first
    assert torch.equal(new, expected[:, 9:])
    assert collected.is_ended


def test_the_loop_stops_one_step_after_the_end_of_text_and_drops_that_step(tiny_moe: Any) -> None:
    tokens = prompt()[:1]
    settings = {"max_new_tokens": 40, "do_sample": False}
    free = tiny_moe.model.generate(tokens, pad_token_id=0, eos_token_id=None, **settings)
    end = int(free[0, 9 + 5])  # whatever comes sixth ends the text
    expected = tiny_moe.model.generate(tokens, pad_token_id=0, eos_token_id=end, **settings)
    collected = Collected()
    got, num_replays = generate(
        tiny_moe.model, tokens, collected, eos_token_id=end, attention_mask=None, **settings
    )
    num_new = expected.shape[1] - tokens.shape[1]
    assert torch.equal(got, expected)
    assert len(collected.puts) == 1 + num_new
    assert num_replays == num_new


def test_times_are_taken_for_every_token(tiny_moe: Any) -> None:
    stats = RuntimeStats()
    settings = {"max_new_tokens": 10, "do_sample": False}
    generate(tiny_moe.model, prompt(), TimingStreamer(stats), **settings)
    assert len(stats.ttft_ms) == 1
    assert len(stats.token_ms) == 9

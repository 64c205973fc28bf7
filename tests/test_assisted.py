"""Steps that verify several drafted tokens are decode steps, and change no token."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, TextStreamer

from foreroute.data.adapters import load_tokenizer
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.driver import MOST_STEP_TOKENS
from foreroute.runtime.host.transfers import ImmediateTransfers
from foreroute.runtime.store.offload import offload

CPU = torch.device("cpu")
NEW_TOKENS = 40
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
GREEDY |= {"do_sample": False}
CODE = """class Reader:
    def __init__(self, path):
        self.path = path

    def rows(self):
        with open(self.path) as file:
            return [line.strip() for line in file]


class Writer:
    def __init__(self, path):
        self.path = path
"""


@pytest.fixture(scope="module")
def bundled() -> Iterator[Engine]:
    with Engine.from_pretrained("bundled", expert_slots="25%", device="cpu") as engine:
        yield engine


def code() -> Tensor:
    ids: Tensor = load_tokenizer("bundled")(CODE, return_tensors="pt")["input_ids"]
    return ids


def tiny_engine(slots: str, model_type: str = "qwen3_moe", **settings: Any) -> Engine:
    model = tiny_model(model_type).eval()
    return Engine(offload(model, device=CPU), EngineConfig(expert_slots=slots, **settings))


def assistant_for(model: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vocabulary = model.config.get_text_config().vocab_size
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes, **heads)).eval()


def step_logits(engine: Engine, widths: list[int]) -> Tensor:
    """Logits of a prompt of 3 tokens and of forced steps of so many, [tokens, V]."""
    text = torch.randint(3, 60, (2, 3 + sum(widths)), generator=torch.Generator().manual_seed(5))
    cache, rows, start = DynamicCache(config=engine.model.config), [], 0
    for width in (3, *widths):
        tokens = text[:, start : start + width]
        rows.append(engine(input_ids=tokens, past_key_values=cache, use_cache=True).logits[1])
        start += width
    return torch.cat(rows)


@pytest.mark.parametrize("num_tokens", [1, 3, 7, 10])
def test_looked_up_drafts_change_no_token_and_save_steps(bundled: Engine, num_tokens: int) -> None:
    expected = bundled.generate(code(), **GREEDY)
    bundled.reset_stats()
    got = bundled.generate(code(), prompt_lookup_num_tokens=num_tokens, **GREEDY)
    bundled.check_integrity()
    assert torch.equal(got, expected)
    stats = bundled.stats()
    passes = stats.prefill.forwards + stats.decode.forwards
    assert passes < NEW_TOKENS * 0.7
    if num_tokens < MOST_STEP_TOKENS:
        assert stats.prefill.forwards == 1
    assert len(stats.ttft_ms) == 1
    assert len(stats.token_ms) == NEW_TOKENS - 1


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_an_assistants_drafts_change_no_token(model_type: str) -> None:
    stock = tiny_model(model_type).eval()
    stock.set_experts_implementation("batched_mm")
    prompt = torch.arange(5, 12).unsqueeze(0)
    given = GREEDY | {"assistant_model": assistant_for(stock), "disable_compile": True}
    given["assistant_model"].generation_config.num_assistant_tokens = 5
    with tiny_engine("4", model_type) as engine:
        plain = engine.generate(prompt, **GREEDY)
        engine.reset_stats()
        got = engine.generate(prompt, **given)
        assert engine.stats().prefill.forwards == 1
        engine.check_integrity()
    assert torch.equal(got, plain)
    assert torch.equal(got, stock.generate(prompt, **given))


def test_short_passes_after_a_past_are_decode_steps() -> None:
    with tiny_engine("4") as engine:
        step_logits(engine, [2, MOST_STEP_TOKENS, 1])
        assert (engine.stats().prefill.forwards, engine.stats().decode.forwards) == (1, 3)
        step_logits(engine, [MOST_STEP_TOKENS + 1])
        assert (engine.stats().prefill.forwards, engine.stats().decode.forwards) == (3, 3)
        engine(input_ids=torch.arange(3, 8).unsqueeze(0))
        engine(input_ids=torch.arange(3, 8).unsqueeze(0), past_key_values=DynamicCache())
        assert (engine.stats().prefill.forwards, engine.stats().decode.forwards) == (5, 3)


@pytest.mark.parametrize("slots", ["2", "3", "5"])
def test_steps_of_several_tokens_give_the_same_bits_at_any_slot_count(slots: str) -> None:
    widths = [2, 5, MOST_STEP_TOKENS, 1, 3]
    with tiny_engine("100%") as engine:
        expected = step_logits(engine, widths)
    with tiny_engine(slots, prefetch="all") as engine:
        assert torch.equal(step_logits(engine, widths), expected)
        engine.check_integrity()
        stats = engine.stats()
    assert stats.decode.misses > 0
    assert stats.steps_ahead == 1  # that of one token


@pytest.mark.parametrize("rule", ["skip", "substitute:0.9", "predicted", "budget:20kB"])
def test_a_rule_decides_on_verified_tokens_as_on_others(rule: str) -> None:
    config: dict[str, Any] = {"on_miss": rule, "agreement_floor": 0.0, "prefetch": "all"}
    with tiny_engine("3", **config) as engine:
        step_logits(engine, [4, 4, 4])
        engine.check_integrity()
        stats = engine.stats()
    if rule == "predicted":  # nothing is predicted for several tokens: they run exactly
        assert stats.speculated_experts == 0
    else:
        assert 0 < stats.agreement < 1


@pytest.mark.parametrize("copies", [1, 5, 9])
def test_an_engine_is_right_after_a_verification_that_was_interrupted(
    bundled: Engine, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bundled.generate(code(), **GREEDY)
    given = GREEDY | {"prompt_lookup_num_tokens": 5}
    copy_now, left = ImmediateTransfers.copy, [0]

    def copy_or_break(self: Any, pairs: Any) -> Any:
        left[0] -= not bundled.driver.run.is_prefill
        if left[0] == 0:
            copy_now(self, pairs[: len(pairs) // 2])
            raise KeyboardInterrupt
        return copy_now(self, pairs)

    with monkeypatch.context() as patch:
        patch.setattr(ImmediateTransfers, "copy", copy_or_break)
        left[0] = copies
        with pytest.raises(KeyboardInterrupt):
            bundled.generate(code(), **given)
    bundled.check_integrity()
    assert torch.equal(bundled.generate(code(), **given), expected)


def test_a_streamer_gets_every_verified_token(bundled: Engine, capsys: Any) -> None:
    tokenizer, text = load_tokenizer("bundled"), code()
    plain, assisted = (
        (
            bundled.generate(text, streamer=TextStreamer(tokenizer, skip_prompt=True), **given),
            capsys.readouterr().out,
        )
        for given in (GREEDY, GREEDY | {"prompt_lookup_num_tokens": 1})
    )
    assert assisted[1] == plain[1]

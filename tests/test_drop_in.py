"""While an engine is attached, whoever calls the model's own `generate` runs the engine's."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from foreroute.data.adapters import load_model, load_tokenizer
from foreroute.runtime import Engine

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams-by-config": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=12)},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "constrained": {"prefix_allowed_tokens_fn": lambda _, ids: [5, 6, 7, int(ids[-1])]},
}


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)


@pytest.fixture(scope="module")
def engine(tiny_moe: Any) -> Iterator[Engine]:
    with Engine.from_pretrained(str(tiny_moe.folder), expert_slots="3") as engine:
        yield engine


@pytest.fixture(scope="module")
def stock(tiny_moe: Any) -> Any:
    model = load_model(str(tiny_moe.folder))
    model.set_experts_implementation("batched_mm")
    return model


def prompt() -> torch.Tensor:
    return torch.arange(5, 12).unsqueeze(0)


@pytest.mark.parametrize("name", CALLS)
def test_calls_give_what_stock_gives(engine: Engine, stock: Any, name: str) -> None:
    settings = CALLS[name] | (SETTINGS if "generation_config" not in CALLS[name] else {})
    settings |= CALLS[name]
    outputs = []
    for model in (stock, engine.model):
        torch.manual_seed(3)
        outputs.append(model.generate(prompt(), **settings))
    if name == "scores":
        assert all(torch.equal(a, b) for a, b in zip(*(o.scores for o in outputs), strict=True))
        outputs = [output.sequences for output in outputs]
    assert torch.equal(*outputs)


def test_an_assistant_drafts_and_the_tokens_are_stocks(engine: Engine, stock: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vocabulary = stock.config.vocab_size
    assistant = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes, **heads)).eval()
    given = SETTINGS | {"assistant_model": assistant}
    got, expected = (model.generate(prompt(), **given) for model in (engine.model, stock))
    assert torch.equal(got, expected)


def test_an_early_exit_is_refused_and_leaves_the_model_whole(engine: Engine) -> None:
    before = engine.model.generate(prompt(), **SETTINGS)
    with pytest.raises(ValueError, match="assistant_early_exit leaves layers out"):
        engine.model.generate(prompt(), assistant_early_exit=2, **SETTINGS)
    assert torch.equal(engine.model.generate(prompt(), **SETTINGS), before)


def test_criteria_and_positional_arguments_are_the_engines_too(engine: Engine, stock: Any) -> None:
    config = GenerationConfig(max_new_tokens=30, do_sample=False)
    ends = StoppingCriteriaList([AfterFive()])
    got, expected = (
        model.generate(prompt(), config, None, ends) for model in (engine.model, stock)
    )
    assert torch.equal(got, expected)
    assert got.shape[1] == 12


def test_calls_are_counted(engine: Engine) -> None:
    engine.reset_stats()
    engine.model.generate(prompt(), **SETTINGS)
    stats = engine.stats()
    assert stats.decode.forwards == 11
    assert len(stats.token_ms) == 11
    assert len(stats.ttft_ms) == 1


def test_a_text_iterator_streams_what_is_generated(engine: Engine, tiny_moe: Any) -> None:
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    given = {"inputs": prompt(), "streamer": streamer} | SETTINGS
    thread = Thread(target=engine.model.generate, kwargs=given)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(engine.generate(prompt(), **SETTINGS)[0, 7:])


def test_a_pipeline_runs_the_engine(engine: Engine, stock: Any, tiny_moe: Any) -> None:
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    texts = []
    engine.reset_stats()
    for model in (stock, engine.model):
        run = pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts.append(run("def parse(", max_new_tokens=8, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]
    assert engine.stats().decode.forwards == 7


def test_closing_gives_the_models_own_back(tiny_moe: Any) -> None:
    engine = Engine.from_pretrained(str(tiny_moe.folder), expert_slots="3")
    assert "generate" in vars(engine.model)
    engine.close()
    assert "generate" not in vars(engine.model)

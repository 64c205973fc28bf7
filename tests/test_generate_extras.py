"""What people pass to `generate`: the engine gives the stock model's tokens, or says why not."""

import copy

import pytest
import torch
from tiny_models import tiny_model
from transformers import DynamicCache, StaticCache, TextStreamer

from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.cli import generate as generate_command
from foreroute.runtime.store.offload import offload

TOKENS = torch.arange(3, 12).unsqueeze(0)
GREEDY = {"do_sample": False, "min_new_tokens": 10, "max_new_tokens": 10}
SETTINGS = {
    "beam search": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several samples": {"num_return_sequences": 3, "do_sample": True, "top_p": 0.9},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "deepseek_v3"])
def pair(request):
    model = tiny_model(request.param)
    stock = copy.deepcopy(model)
    stock.set_experts_implementation("batched_mm")
    with Engine(
        offload(model, device=torch.device("cpu")), EngineConfig(expert_slots="4")
    ) as engine:
        yield stock, engine


def run(model, tokens=TOKENS, **settings):
    torch.manual_seed(0)
    mask = settings.pop("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, attention_mask=mask, disable_compile=True, **(GREEDY | settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_generate_give_the_stock_models_tokens(pair, name):
    stock, engine = pair
    expected, got = run(stock, **SETTINGS[name]), run(engine, **SETTINGS[name])
    if name == "scores":
        assert all(map(torch.equal, got.scores, expected.scores))
        expected, got = expected.sequences, got.sequences
    assert torch.equal(got, expected)


def test_left_padded_prompts_of_different_length(pair):
    stock, engine = pair
    tokens = torch.arange(3, 27).view(3, 8)
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[1, :2] = 0
    expected = run(stock, tokens * mask, attention_mask=mask)
    assert torch.equal(run(engine, tokens * mask, attention_mask=mask), expected)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_object_goes_from_one_call_to_the_next(pair, kind):
    stock, engine = pair

    def two_turns(model, config):
        extra = {"max_cache_len": 64} if kind is StaticCache else {}
        cache = kind(config=config, **extra)
        first = run(model, past_key_values=cache)
        second = torch.cat([first, TOKENS], dim=1)
        return run(model, second, past_key_values=cache)

    config = stock.config
    assert torch.equal(two_turns(engine, config), two_turns(stock, config))


def test_a_streamer_with_beams_is_refused_by_transformers(pair, tiny_moe):
    from foreroute.data.adapters import load_tokenizer

    streamer = TextStreamer(load_tokenizer(str(tiny_moe.folder)))
    with pytest.raises(ValueError, match="streamer"):
        run(pair[1], num_beams=2, streamer=streamer)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16])
def test_dtypes_under_both_names(tmp_path, dtype):
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        with Engine.from_pretrained(
            str(tmp_path), device="cpu", expert_slots="4", **{name: dtype}
        ) as engine:
            assert engine.model.dtype == torch.bfloat16


def test_chat_templates_are_applied_or_missed_in_one_line(tiny_moe, tmp_path, capsys):
    from foreroute.data.adapters import load_tokenizer

    settings = {"max_new_tokens": 2, "expert_slots": "4", "device": "cpu", "chat": True}
    with pytest.raises(ValueError, match="chat_template"):
        generate_command("hi", str(tiny_moe.folder), **settings)
    tiny_moe.model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    generate_command("hi", str(tmp_path), **settings)
    assert "<user>hi" in capsys.readouterr().out

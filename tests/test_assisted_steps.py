"""Steps that read several tokens at once by the device's kernels; interpreted on a CPU."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("triton", reason="needs triton")

from interpreted import decide_as_on_a_gpu
from step_cases import (
    CAPTURABLE,
    PROMPT,
    TOLERANCE,
    WITH_IMAGES,
    logits_of_one_pass,
    padded_text,
    quicken,
    read_prompt,
)
from tiny_images import image_prompt
from tiny_models import tiny_model

from foreroute.data.adapters import find_moe_layers
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.device.assisted import assisted_loop, is_assisted, why_not_replayed
from foreroute.runtime.device.decode_graph import (
    SPARE_TOKENS,
    DecodeGraph,
    DecodeStep,
    why_not_widened,
)
from foreroute.runtime.driver import MOST_STEP_TOKENS
from foreroute.runtime.store.offload import offload

WIDTHS, DROPPED = (3, 1), 2
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "disable_compile": True}


@pytest.fixture(autouse=True)
def quick_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def step_of(model: Any, batch: int, length: int) -> DecodeStep:
    return DecodeStep(model, batch, length, [layer.router for layer in find_moe_layers(model)])


def forced_logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits after each token behind the prompt, by steps, [B, n, V].

    The first ones are wrong and given back.
    """
    one = step_of(model, len(tokens), tokens.shape[1] + DROPPED)
    steps = {width: one.widened(width) if width > 1 else one for width in {*WIDTHS, DROPPED}}
    read_prompt(model, one, tokens, mask)
    logits, start = [], PROMPT
    steps[DROPPED].replay(torch.full((len(tokens), DROPPED), 7))
    one.crop(DROPPED)
    for width in WIDTHS:
        part = tokens[:, start : start + width]
        out = steps[width].replay(part if width > 1 else part[:, 0]).clone()
        logits.append(out if width > 1 else out.unsqueeze(1))
        start += width
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("model_type", "overrides"), CAPTURABLE)
def test_steps_of_several_tokens_give_the_logits_of_one_pass_over_the_text(
    model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(model_type, **overrides).eval()
    if reason := why_not_widened(model):
        pytest.skip(reason)
    tokens, mask = padded_text(sum(WIDTHS))
    expected = logits_of_one_pass(model, tokens, mask)
    got = forced_logits(model, tokens, mask)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


class Steps:
    """Steps over one cache by width, as the driver makes them; counts replays by width."""

    def __init__(self, model: Any, length: int) -> None:
        self.one = step_of(model, 1, length + SPARE_TOKENS)
        self.widths: list[int] = []

    def __call__(self, width: int) -> DecodeStep:
        self.widths.append(width)
        return self.one.widened(width) if width > 1 else self.one


def replayed(model: Any, tokens: Tensor, helpers: dict[str, Any], **settings: Any) -> Any:
    """What assisted decoding by steps gives, and the widths of the steps."""
    steps = Steps(model, tokens.shape[1] + settings["max_new_tokens"])

    def loop(model: Any, input_ids: Tensor, generation_config: Any, **given: Any) -> Tensor:
        return assisted_loop(model, steps, input_ids, helpers, generation_config, **given)

    ids = model.generate(tokens, custom_generate=loop, **settings)
    return ids, steps.widths[1:]  # the first is asked for with the prompt


@pytest.mark.parametrize(
    ("num_tokens", "settings"),
    [
        (3, {}),
        (MOST_STEP_TOKENS + 2, {}),
        (3, {"repetition_penalty": 1.1}),
        (3, {"eos_token_id": [24, 41]}),
    ],
)
def test_looked_up_drafts_give_transformers_tokens(
    num_tokens: int, settings: dict[str, Any]
) -> None:
    model = tiny_model("qwen3_moe").eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7]])
    given = GREEDY | settings | {"max_new_tokens": 14}
    plain = model.generate(tokens, **given)
    given["prompt_lookup_num_tokens"] = num_tokens
    expected = model.generate(tokens, **given)
    got, widths = replayed(model, tokens, {}, **given)
    assert torch.equal(got, expected)
    assert torch.equal(got, plain)
    assert max(widths) > 1


def test_a_step_that_cannot_be_captured_goes_on_with_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide_as_on_a_gpu(monkeypatch)
    captured = DecodeGraph._capture

    def capture_one(step: DecodeGraph) -> Any:
        def refuse(*_: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        if step.width == 1:
            return captured(step)
        hook = step._model.lm_head.register_forward_pre_hook(refuse)
        try:
            return step._step()
        finally:
            hook.remove()

    monkeypatch.setattr(DecodeGraph, "_capture", capture_one)
    model = tiny_model("qwen3_moe", num_hidden_layers=1).eval()
    assistant = copy.deepcopy(model)  # every draft is right
    assistant.generation_config.num_assistant_tokens = 2
    tokens, given = torch.arange(5, 12).unsqueeze(0), GREEDY | {"max_new_tokens": 6}
    expected = model.generate(tokens, **given)
    offloaded = offload(model, device=torch.device("cpu"), model_name="tiny")
    with Engine(offloaded, EngineConfig(expert_slots="4", prefetch="none")) as engine:
        driver: Any = engine.driver
        got = engine.generate(tokens, assistant_model=assistant, **given)
        is_captured = {step.width: step.is_captured for step in driver._steps.values()}
        assert max(is_captured) > 1
        assert [width for width, is_so in is_captured.items() if is_so] == [1]
        engine.check_integrity()
    assert torch.equal(got, expected)


def test_an_assistants_drafts_give_transformers_tokens() -> None:
    model = tiny_model("qwen3_moe").eval()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vocabulary = model.config.vocab_size
    assistant = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes, **heads)).eval()
    assistant.generation_config.num_assistant_tokens = 4
    for helper in (assistant, copy.deepcopy(model)):  # few are right, and all are
        given = GREEDY | {"max_new_tokens": 7}
        tokens = torch.arange(5, 12).unsqueeze(0)
        expected = model.generate(tokens, assistant_model=helper, **given)
        given["assistant_model"] = helper
        got, widths = replayed(model, tokens, {"assistant_model": helper}, **given)
        assert torch.equal(got, expected)
        assert max(widths) > 1


def test_sampled_tokens_are_transformers_by_the_same_seed() -> None:
    model, tokens = tiny_model("qwen3_moe").eval(), torch.tensor([[5, 6, 7, 8, 5, 6]])
    given = GREEDY | {"max_new_tokens": 6, "do_sample": True, "prompt_lookup_num_tokens": 3}
    torch.manual_seed(3)
    expected = model.generate(tokens, **given)
    torch.manual_seed(3)
    assert torch.equal(replayed(model, tokens, {}, **given)[0], expected)


@pytest.mark.parametrize("model_type", WITH_IMAGES)
def test_looked_up_drafts_after_an_image_give_transformers_tokens(model_type: str) -> None:
    model = tiny_model(model_type)
    if reason := why_not_widened(model):
        pytest.skip(reason)
    tokens, image = image_prompt(model)
    given = GREEDY | {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6} | image
    given["prompt_lookup_num_tokens"] = 2
    expected = model.generate(tokens, **given)
    assert torch.equal(replayed(model, tokens, {}, **given)[0], expected)


def test_a_batch_and_a_foreign_vocabulary_are_refused_by_transformers() -> None:
    model = tiny_model("qwen3_moe").eval()
    given = GREEDY | {"max_new_tokens": 4, "prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="batch_size = 1"):
        replayed(model, torch.tensor([[5, 6, 5], [7, 8, 7]]), {}, **given)
    foreign = tiny_model("qwen3_moe", vocab_size=model.config.vocab_size + 8)
    given = GREEDY | {"max_new_tokens": 4, "assistant_model": foreign}
    with pytest.raises(ValueError, match="different tokenizers"):
        replayed(model, torch.tensor([[5, 6, 5]]), {"assistant_model": foreign}, **given)


def test_drafts_that_read_more_than_logits_are_left_to_transformers() -> None:
    model = tiny_model("qwen3_moe")
    assert not is_assisted({"max_new_tokens": 3})
    assert is_assisted({"prompt_lookup_num_tokens": 3})
    assert not why_not_replayed(model, {"prompt_lookup_num_tokens": 3})
    assert why_not_replayed(model, {"use_mtp": True})
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "flash_attention_2" in why_not_replayed(model, {"prompt_lookup_num_tokens": 3})

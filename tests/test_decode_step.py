"""A decode step with its kernels gives the logits of the plain model; interpreted on a CPU."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

pytest.importorskip("triton", reason="needs triton")

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
from foreroute.runtime.device.decode_graph import DecodeStep
from foreroute.runtime.device.fusions import find_routers, fuse_attention, fuse_rotary, fuse_routers
from foreroute.runtime.device.sampling import decode_loop

STEPS = 4


@pytest.fixture(autouse=True)
def quick_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def forced_logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits after the prompt and each forced token but the last, by decode steps, [B, n, V]."""
    routers = [layer.router for layer in find_moe_layers(model)]
    step = DecodeStep(model, len(tokens), PROMPT + STEPS, routers)
    assert vars(step.cache).keys() == vars(StaticCache(config=model.config, max_cache_len=1)).keys()
    read_prompt(model, step, tokens, mask)
    return torch.stack([step.replay(t).clone() for t in tokens[:, PROMPT:].T], dim=1)


@pytest.mark.parametrize(("model_type", "overrides"), CAPTURABLE)
def test_decode_steps_give_the_logits_of_one_pass_over_the_text(
    model_type: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(model_type, **overrides).eval()
    tokens, mask = padded_text(STEPS)
    expected = logits_of_one_pass(model, tokens, mask)
    got = forced_logits(model, tokens, mask)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("model_type", WITH_IMAGES)
def test_decode_steps_after_an_image_give_the_logits_of_generate(model_type: str) -> None:
    model = tiny_model(model_type)
    tokens, image = image_prompt(model)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": STEPS} | image
    settings |= {"do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **settings, output_logits=True, return_dict_in_generate=True)
    step = RecordedStep(model, 1, tokens.shape[1] + STEPS)

    def loop(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
        names = ("logits_processor", "stopping_criteria", "generation_config")
        return decode_loop(model, step, input_ids, given, *map(given.pop, names), None)

    assert torch.equal(model.generate(tokens, **settings, custom_generate=loop), expected.sequences)
    for got, logits in zip(step.logits, expected.logits[1:], strict=True):
        torch.testing.assert_close(got, logits, atol=TOLERANCE, rtol=TOLERANCE)


class RecordedStep(DecodeStep):
    """Keeps the logits of its replays."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logits: list[Tensor] = []

    def replay(self, tokens: Tensor) -> Tensor:
        self.logits.append(super().replay(tokens).clone())
        return self.logits[-1]


def test_a_prompt_of_one_token_is_stored_at_the_start() -> None:
    model = tiny_model("qwen3_moe").eval()
    step = DecodeStep(model, 1, 8)
    step.begin(torch.ones(1, 1, dtype=torch.long))
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]), past_key_values=step.cache)
        got = step.replay(torch.tensor([9]))
        expected = model(input_ids=torch.tensor([[7, 9]])).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_fusions_apply_to_this_architecture_and_are_undone() -> None:
    model = tiny_model("qwen3_moe").eval()
    layers = find_moe_layers(model)
    tokens = torch.arange(3, 14).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
        with ExitStack() as undo:
            assert fuse_attention(model, undo) == 1
            assert fuse_rotary(model, undo) == 1
            routers = find_routers([layer.router for layer in layers])
            assert len(routers) == len(layers)
            fuse_routers(routers, undo)
        again = model(tokens).logits
    assert torch.equal(again, expected)


def test_a_sigmoid_router_is_left_alone() -> None:
    layers = find_moe_layers(tiny_model("deepseek_v3").eval())
    assert not find_routers([layer.router for layer in layers])

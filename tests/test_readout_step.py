"""A decode step with its kernels and cache runs attentions early and stays as it was; on a CPU."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from tiny_models import tiny_model

from foreroute.data.adapters import MoEModel
from foreroute.estimators import EstimatorSpec, EstimatorStack, predictable_layers
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.device import decode_graph
from foreroute.runtime.device.decode_graph import DecodeStep
from foreroute.runtime.device.driver import why_not_on_device
from foreroute.runtime.device.kernels import linear, route
from foreroute.runtime.device.kernels.quasi_hidden import add_expected_output
from foreroute.runtime.device.predictor import DevicePredictor
from foreroute.runtime.store.offload import offload

CPU = torch.device("cpu")
PROMPT, STEPS = 7, 4
TOLERANCE = 2e-5  # float32, sums in another order
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {},
    "mixtral": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4, "num_hidden_layers": 4},
}


@pytest.fixture(autouse=True)
def quick_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "LENGTH_STEP", 16)
    # programs run one after the other
    monkeypatch.setattr(linear, "TILE", 2**17)
    monkeypatch.setattr(route, "ROWS", 8)


def readout_stack(moe: MoEModel, form: str = "low-rank") -> EstimatorStack:
    geometry = moe.geometry
    torch.manual_seed(0)
    spec = EstimatorSpec(
        form=form,
        input_kind="attention-readout",
        rank=4,
        width=16,
        target_layers=predictable_layers(geometry, 1),
    )
    shape = (geometry.num_layers, geometry.num_experts, geometry.hidden_size)
    stack = EstimatorStack.build(geometry, spec, moe.anchors, torch.randn(shape) * 0.1)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(0, 0.2)
    return stack.requires_grad_(False)


def tokens_and_mask() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 60, (2, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0  # padding on the left
    return tokens, mask


def forced_steps(engine: Engine) -> tuple[Tensor, list[Tensor]]:
    """Logits of forced decode steps by kernels, [B, n, V], and what the cache then holds."""
    tokens, mask = tokens_and_mask()
    routers = [layer.router for layer in engine.offloaded.moe.layers]
    step = DecodeStep(engine.model, len(tokens), PROMPT + STEPS, routers)
    step.begin(mask[:, :PROMPT])
    engine(
        input_ids=tokens[:, :PROMPT],
        attention_mask=mask[:, :PROMPT],
        position_ids=(mask[:, :PROMPT].cumsum(-1) - 1).clamp_min(0),
        past_key_values=step.cache,
    )
    logits = [step.replay(ids).clone() for ids in tokens[:, PROMPT:].T]
    held = [tensor for layer in step.cache.layers for tensor in (layer.keys, layer.values)]
    return torch.stack(logits, dim=1), held


def spied_readouts(engine: Any) -> list[Tensor]:
    """What estimators read from now on, in order."""
    seen, readouts = [], engine.driver.run.predictor.ahead.readouts
    read = readouts.read

    def watched(source: int, **states: Any) -> Tensor | None:
        readout: Tensor | None = read(source, **states)
        if readout is not None:
            seen.append(readout.clone())
        return readout

    readouts.read = watched
    return seen


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_and_cache_stay_bit_equal_and_readouts_are_those_of_a_growing_cache(
    model_type: str,
) -> None:
    model = tiny_model(model_type, **MODELS[model_type]).eval()
    offloaded = offload(copy.deepcopy(model), device=CPU, model_name="tiny")
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        expected, expected_cache = forced_steps(engine)
    config = EngineConfig(expert_slots="4", prefetch="all")
    with Engine(offloaded, config, readout_stack(offloaded.moe)) as engine:
        by_kernels = spied_readouts(engine)
        engine.driver.run.predictor.ahead.readouts.add_expected_output = add_expected_output
        got, cache = forced_steps(engine)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(cache, expected_cache, strict=True))
    tokens, mask = tokens_and_mask()
    with Engine(offloaded, config, readout_stack(offloaded.moe)) as engine:
        by_host, past = spied_readouts(engine), None
        for upto in range(PROMPT, PROMPT + STEPS + 1):
            start = 0 if past is None else upto - 1
            output = engine(
                input_ids=tokens[:, start:upto],
                attention_mask=mask[:, :upto],
                position_ids=(mask[:, :upto].cumsum(-1) - 1).clamp_min(0)[:, start:],
                past_key_values=past,
                use_cache=True,
            )
            past = output.past_key_values
    assert len(by_host) == len(by_kernels) > 0
    for kernels, host in zip(by_kernels, by_host, strict=True):
        torch.testing.assert_close(kernels, host, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("form", "is_affine"), [("low-rank", True), ("mlp", False)])
def test_the_device_predicts_from_readouts_what_the_host_predicts(
    tiny_moe: Any, form: str, is_affine: bool
) -> None:
    offloaded = offload(copy.deepcopy(tiny_moe.model), device=CPU, model_name="tiny")
    config = EngineConfig(expert_slots="4", prefetch="all")
    stack = readout_stack(offloaded.moe, form)
    with Engine(offloaded, config, stack) as engine:
        predictor = engine.driver.run.predictor
        assert predictor is not None
        device, sources = DevicePredictor(predictor.ahead, torch.float32), stack.source_layers
        assert device.num_folded == (len(sources) if is_affine else 0)
        predict, num_compared = predictor.predict, 0

        def compared(source: int, **states: Any) -> tuple[Tensor, Tensor]:
            nonlocal num_compared
            logits, ranked = predict(source, **states)
            del states["layer_input"]
            assert torch.equal(device.predict(source, **states)[0], ranked)
            num_compared += 1
            return logits, ranked

        predictor.predict = compared  # type: ignore[method-assign]
        forced_steps(engine)
    assert num_compared == STEPS * len(sources)


def test_the_gpu_takes_readouts_and_leaves_a_layers_own_input_to_the_host(tiny_moe: Any) -> None:
    offloaded = offload(copy.deepcopy(tiny_moe.model), device=CPU, model_name="tiny")
    on_gpu = dataclasses.replace(offloaded, device=torch.device("cuda"))
    config, moe = EngineConfig(prefetch="auto"), offloaded.moe
    own = EstimatorStack.training_free(
        moe.geometry, moe.anchors, horizon=0, input_kind="pre-attention"
    )
    assert why_not_on_device(on_gpu, config, readout_stack(moe)) is None
    assert why_not_on_device(on_gpu, config, own) == "pre-attention estimators are run by the host"
    assert why_not_on_device(on_gpu, EngineConfig(prefetch="none"), own) is None

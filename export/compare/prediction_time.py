"""Times one token's prediction for all layers of a stack, eager and as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foreroute.data.adapters import MoEModel
from foreroute.data.adapters.early_attention import find_early_attention, split_input
from foreroute.estimators import EstimatorStack, SourceState

WARM_UP = 5
SECONDS = 0.05
"""At least so long is measured."""


def one_token(stack: EstimatorStack, dtype: torch.dtype = torch.float32) -> SourceState:
    """Random source states of one token, for all pairs, on the stack's device."""
    geometry, pairs = stack.geometry, len(stack.target_layers)
    device = stack.input.device
    states = [
        torch.randn(pairs, 1, geometry.hidden_size, device=device, dtype=dtype) for _ in range(4)
    ]
    ids = torch.rand(pairs, 1, geometry.num_experts, device=device).topk(geometry.top_k).indices
    return SourceState(
        residual=states[0],
        router_input=states[1],
        expert_ids=ids,
        gate_weights=torch.rand(pairs, 1, geometry.top_k, device=device),
        readout=states[2],
        layer_input=states[3],
    )


@torch.inference_mode()
def eager_us(stack: EstimatorStack) -> float:
    """Microseconds of one token through all pairs at once, launched kernel by kernel."""
    source = one_token(stack)
    return _repeat(lambda: stack(source), stack.input.device)


@torch.inference_mode()
def captured_us(stack: EstimatorStack) -> float:
    """The same as one CUDA graph.

    Raises:
        ValueError: If the stack is not on a GPU: the graph would be empty, and take no time.
    """
    if stack.input.device.type != "cuda":
        raise ValueError("A CUDA graph needs a stack on a GPU; this one is on the CPU.")
    source = one_token(stack)
    return _repeat(_captured(lambda: stack(source)), stack.input.device)


@torch.inference_mode()
def layer_by_layer_us(stack: EstimatorStack) -> float:
    """Microseconds of one token through one pair after the other, as decoding does it.

    One CUDA graph of all pairs on a GPU, eager on a CPU.
    """
    source = one_token(stack)
    fields = [name for name in source._fields if name in stack.input.needed]
    states = [
        {name: getattr(source, name)[pair] for name in fields}
        for pair in range(len(stack.source_layers))
    ]

    def predict_all() -> None:
        for layer, given in zip(stack.source_layers, states, strict=True):
            stack.predict(layer, **given)

    is_gpu = stack.input.device.type == "cuda"
    return _repeat(_captured(predict_all) if is_gpu else predict_all, stack.input.device)


def prediction_us(stack: EstimatorStack) -> float:
    """As the runtime would do it: a CUDA graph on a GPU, eager on a CPU."""
    return captured_us(stack) if stack.input.device.type == "cuda" else eager_us(stack)


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    """The replay of a step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _repeat(step: Callable[[], object], device: torch.device) -> float:
    """Microseconds of one step, mean over at least `SECONDS`."""
    for _ in range(WARM_UP):
        step()
    count, spent = 10, 0.0
    while spent < SECONDS:
        count *= 2
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        _wait(device)
        spent = time.perf_counter() - start
    return spent / count * 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def early_attention_us(moe: MoEModel, context: int) -> float:
    """Microseconds of running one layer's attention early, for one token, as decoding does it.

    Mean over the layers that a readout can be made for; one CUDA graph of them on a GPU. Kernels
    are those of transformers, on its growing cache.

    Args:
        moe: A model whose layers allow it.
        context: Tokens in the cache.

    Raises:
        ValueError: If the model's layers do not allow a readout.
    """
    sites = find_early_attention(moe).values()
    device = moe.model.device
    seen: dict[nn.Module, Any] = {}

    def see(module: nn.Module, arguments: Any, settings: Any) -> None:
        seen[module] = split_input(arguments, settings)

    tokens = torch.zeros(1, context, dtype=torch.long, device=device)
    cache = moe.model(input_ids=tokens, use_cache=True).past_key_values
    hooks = [s.attention.register_forward_pre_hook(see, with_kwargs=True) for s in sites]
    moe.model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()

    def run_all() -> None:
        for site in sites:
            state, settings = seen[site.attention]
            site.step(state, settings)

    step = _captured(run_all) if device.type == "cuda" else run_all
    return _repeat(step, device) / len(sites)

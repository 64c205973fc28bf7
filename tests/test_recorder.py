"""The recorder sees the true routing and leaves the model as it was."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import linear

from foreroute.data.adapters import routed_through, stock_experts_function, unweighted_outputs
from foreroute.data.adapters.seam import held_function
from foreroute.data.recorder import RoutingRecorder

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def some_tokens() -> torch.Tensor:
    return torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def with_implementation(tiny_moe, request):
    before = tiny_moe.model.get_experts_implementation()
    tiny_moe.model.set_experts_implementation(request.param)
    yield tiny_moe
    tiny_moe.model.set_experts_implementation(before)


def record(tiny, **settings):
    with torch.no_grad(), RoutingRecorder(tiny.moe, **settings) as recorder:
        logits = tiny.model(input_ids=some_tokens()).logits
        return logits, recorder.take(), recorder.take_expert_sums()


@pytest.mark.parametrize("with_implementation", IMPLEMENTATIONS, indirect=True)
def test_outputs_stay_bit_equal_while_recorded(with_implementation):
    with torch.no_grad():
        expected = with_implementation.model(input_ids=some_tokens()).logits
    logits, _, _ = record(with_implementation)
    assert torch.equal(logits, expected)


def test_generation_stays_bit_equal_while_recorded(tiny_moe):
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = tiny_moe.model.generate(some_tokens(), **settings)
    with RoutingRecorder(tiny_moe.moe):
        assert torch.equal(tiny_moe.model.generate(some_tokens(), **settings), expected)


def test_recorded_routing_is_the_routers_own(tiny_moe):
    logits_of_model = []
    handles = [
        layer.router.register_forward_hook(lambda _, __, output: logits_of_model.append(output))
        for layer in tiny_moe.moe.layers
    ]
    _, records, _ = record(tiny_moe)
    for handle in handles:
        handle.remove()

    for (logits, weights, ids), one in zip(logits_of_model, records.values(), strict=True):
        assert torch.equal(one.router_logits, logits)
        assert torch.equal(one.gate_weights, weights)
        assert torch.equal(one.expert_ids, ids)
        assert torch.equal(one.expert_ids, logits.topk(2).indices)
        assert len(one) == some_tokens().numel()


def test_routing_of_the_tiny_model_is_not_uniform(tiny_moe):
    _, _, sums = record(tiny_moe)
    for _, count in sums.values():
        assert count.max() > 2 * count.float().mean()


@pytest.mark.parametrize("with_implementation", IMPLEMENTATIONS, indirect=True)
def test_expert_sums_are_those_of_the_unweighted_outputs(with_implementation):
    moe = with_implementation.moe
    _, records, sums = record(with_implementation)

    for layer in moe.layers:
        one = records[layer.layer_idx]
        pairs = one.router_input.repeat_interleave(2, dim=0)
        stock = stock_experts_function("batched_mm", layer.experts)
        flat_ids = one.expert_ids.flatten()
        outputs = unweighted_outputs(stock, layer.experts, pairs, flat_ids)
        expected = torch.zeros(8, 32).index_add_(0, flat_ids, outputs)
        output_sum, count = sums[layer.layer_idx]
        # Summed before instead of after the down projection: float32 rounding only.
        assert torch.allclose(output_sum, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(count, flat_ids.bincount(minlength=8))


def test_sums_of_experts_that_another_function_computes_are_the_same(tiny_moe):
    _, records, expected = record(tiny_moe)
    layers = tiny_moe.moe.layers
    stock = {layer.experts: stock_experts_function("eager", layer.experts) for layer in layers}
    with routed_through(tiny_moe.model, stock):
        _, found_records, found = record(tiny_moe)
        with torch.no_grad(), RoutingRecorder(tiny_moe.moe) as recorder:
            tiny_moe.model(input_ids=some_tokens()[:, :1])  # a decode step: not exact there
            with pytest.raises(RuntimeError, match="No forward pass"):
                recorder.take_expert_sums()
        assert tiny_moe.model.get_experts_implementation() == {"": "foreroute"}
        assert all(held_function(layer.experts) is stock[layer.experts] for layer in layers)
    for layer_idx, (output_sum, count) in found.items():
        assert torch.equal(count, expected[layer_idx][1])
        assert torch.allclose(output_sum, expected[layer_idx][0], atol=1e-4, rtol=1e-4)
        assert torch.equal(found_records[layer_idx].expert_ids, records[layer_idx].expert_ids)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_that_another_function_computes_are_computed_once(tiny_moe, implementation):
    num_pairs = []

    def counted(experts, hidden, ids, weights):
        num_pairs.append(ids.numel())
        return stock_experts_function(implementation, experts)(experts, hidden, ids, weights)

    with routed_through(tiny_moe.model, {layer.experts: counted for layer in tiny_moe.moe.layers}):
        with torch.no_grad():
            expected = tiny_moe.model(input_ids=some_tokens()).logits
        num_pairs.clear()
        logits, _, _ = record(tiny_moe)
    assert num_pairs == [some_tokens().numel() * 2] * len(tiny_moe.moe.layers)
    assert torch.equal(logits, expected)


def test_expert_sums_add_up_over_passes_and_start_anew_once_taken(tiny_moe):
    with torch.no_grad(), RoutingRecorder(tiny_moe.moe) as recorder:
        for _ in range(2):
            tiny_moe.model(input_ids=some_tokens())
        twice = recorder.take_expert_sums()
        tiny_moe.model(input_ids=some_tokens())
        once = recorder.take_expert_sums()
    for layer_idx, (output_sum, count) in once.items():
        assert torch.equal(twice[layer_idx][1], 2 * count)
        assert torch.allclose(twice[layer_idx][0], 2 * output_sum, rtol=1e-5)


def test_default_vector_of_a_hand_made_expert_is_its_output(make_tiny_moe):
    tiny = make_tiny_moe(num_hidden_layers=1)
    experts = tiny.moe.layers[0].experts
    _, records, sums = record(tiny)
    one = records[0]
    rows = (one.expert_ids == 3).any(-1)
    gate, up = linear(one.router_input[rows], experts.gate_up_proj[3]).chunk(2, dim=-1)
    expected = linear(torch.nn.functional.silu(gate) * up, experts.down_proj[3]).sum(0)
    assert torch.allclose(sums[0][0][3], expected, atol=1e-4)


def test_nothing_remains_after_an_exception(tiny_moe):
    before = tiny_moe.model.get_experts_implementation()
    hooks = [list(module._forward_hooks) for module in tiny_moe.model.modules()]
    hook = tiny_moe.moe.layers[2].experts.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), RoutingRecorder(tiny_moe.moe):
        tiny_moe.model(input_ids=some_tokens())
    hook.remove()
    assert [list(module._forward_hooks) for module in tiny_moe.model.modules()] == hooks
    assert tiny_moe.model.get_experts_implementation() == before
    assert not any("_foreroute_handler" in vars(m) for m in tiny_moe.model.modules())


def test_states_are_stored_in_the_dtype_asked_for(tiny_moe):
    _, full, _ = record(tiny_moe)
    _, half, _ = record(tiny_moe, states_dtype=torch.bfloat16)
    assert torch.equal(half[2].residual, full[2].residual.bfloat16())
    assert half[2].router_input.dtype == torch.bfloat16
    assert torch.equal(half[2].router_logits, full[2].router_logits)


def test_a_record_can_be_taken_once(tiny_moe):
    with torch.no_grad(), RoutingRecorder(tiny_moe.moe) as recorder:
        tiny_moe.model(input_ids=some_tokens())
        recorder.take()
        with pytest.raises(RuntimeError, match="No forward pass"):
            recorder.take()


def test_decoder_layer_numbers_are_the_models_own(make_tiny_moe):
    tiny = make_tiny_moe(mlp_only_layers=[1])
    _, records, _ = record(tiny)
    assert list(records) == [0, 2, 3]


def test_freed_memory_is_kept_where_the_c_library_can():
    script = (
        "import platform; from foreroute.data.allocator import keep_freed_memory; "
        "print(keep_freed_memory() or platform.libc_ver()[0] != 'glibc')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr

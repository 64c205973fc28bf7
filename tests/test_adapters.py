"""Finding the MoE layers of several architectures, and the seam through their experts."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from foreroute.data.adapters import (
    discover,
    find_moe_layers,
    load_model,
    resolve_device,
    resolve_dtype,
    resolve_model,
    routed_through,
)
from foreroute.data.adapters.discovery import layer_index
from foreroute.data.recorder import RoutingRecorder
from foreroute.estimators.inputs import apply_norm
from foreroute.estimators.selection import selection_scores

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ARCHITECTURES = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "norm_topk_prob": False},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4},
}
LAYERS = {"qwen3_moe": (1, 2), "deepseek_v3": (1, 2)}
GATE_FAMILIES = {"deepseek_v3": ("other", "sigmoid-topk-renorm"), "olmoe": ("softmax-topk",)}


def make(model_type: str, **overrides):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**(BASE | ARCHITECTURES[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return model


def some_tokens() -> torch.Tensor:
    return torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_moe_layers_of_an_architecture_are_found(model_type):
    moe = discover(make(model_type), "m")

    geometry = moe.geometry
    assert geometry.layer_indices == LAYERS.get(model_type, (0, 1, 2))
    assert (geometry.num_experts, geometry.top_k, geometry.hidden_size) == (4, 2, 32)
    assert geometry.gate_family in GATE_FAMILIES.get(model_type, ("softmax-topk-renorm",))
    assert geometry.model_type == model_type


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_anchors_give_the_recorded_router_logits_from_the_residual(model_type):
    moe = discover(make(model_type), "m")
    with torch.no_grad(), RoutingRecorder(moe) as recorder:
        moe.model(input_ids=some_tokens())
        records = recorder.take()

    for position, layer in enumerate(moe.layers):
        record = records[layer.layer_idx]
        assert torch.equal(layer.norm(record.residual), record.router_input)
        logits = record.router_input @ moe.anchors.router_weight[position].T
        logits += moe.anchors.router_bias[position]
        # The same product in another shape: float32 rounding only.
        assert torch.allclose(logits, record.router_logits.float(), atol=1e-4)


@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "deepseek_v4", "ernie4_5_moe", "lfm2_moe", "minimax_m2"]
)
def test_a_selection_bias_explains_every_choice_that_logits_do_not(model_type):
    moe = discover(tiny_model(model_type))
    assert moe.anchors.selection_bias is not None
    with torch.no_grad(), RoutingRecorder(moe) as recorder:
        moe.model(some_tokens(), use_cache=False)
        records = recorder.take()

    num_by_logits = num_by_scores = num_true = 0
    for layer, bias in zip(moe.layers, moe.anchors.selection_bias, strict=True):
        if layer.is_hash_routed:
            continue
        record = records[layer.layer_idx]
        logits, true = record.router_logits.float(), record.expert_ids
        scores = selection_scores(logits, moe.geometry.gate_family, bias)
        num_by_logits += num_shared(logits.topk(layer.top_k).indices, true)
        num_by_scores += num_shared(scores.topk(layer.top_k).indices, true)
        num_true += true.numel()
    assert num_by_logits < num_by_scores == num_true


def num_shared(left, right):
    return int((left.unsqueeze(-1) == right.unsqueeze(-2)).sum())


def test_models_without_a_selection_bias_have_none():
    assert discover(tiny_model("qwen3_moe")).anchors.selection_bias is None


def test_a_norm_inside_the_router_is_found():
    moe = discover(tiny_model("gemma4_text"))
    with torch.no_grad(), RoutingRecorder(moe) as recorder:
        moe.model(some_tokens(), use_cache=False)
        records = recorder.take()

    anchors = moe.anchors
    for position, layer in enumerate(moe.layers):
        record = records[layer.layer_idx]
        weight, bias = anchors.norm_weight[position, None], anchors.norm_bias[position, None]
        normed = apply_norm(
            record.residual[None], weight, bias, kind=anchors.norm_kind, eps=anchors.norm_eps
        )
        # The factors are found by division: float32 rounding of two more steps.
        assert torch.allclose(normed[0], record.router_input, atol=1e-5)
        logits = record.router_input @ anchors.router_weight[position].T
        assert torch.allclose(logits, record.router_logits, atol=1e-5)


def test_the_router_fingerprint_is_the_same_in_bfloat16_and_float32():
    model = make("qwen3_moe")
    before = discover(model).geometry.router_fingerprint
    assert discover(model.to(torch.bfloat16)).geometry.router_fingerprint == before


def test_a_checkpoint_is_known_again_in_float16():
    model = make("qwen3_moe")
    before = discover(model).geometry
    after = discover(model.to(torch.float16)).geometry
    before.require_match(after, what="Bundle", remedy="Export again.")
    after.require_match(before, what="Bundle", remedy="Export again.")


def test_the_router_fingerprint_tells_checkpoints_apart():
    model = make("qwen3_moe")
    before = discover(model).geometry
    discovered = discover(model)
    discovered.layers[-1].router.weight.mul_(1.1)
    after = discover(model).geometry
    assert after != before
    with pytest.raises(ValueError, match=r"Bundle made for .* this model is"):
        before.require_match(after, what="Bundle", remedy="Export again.")


def test_experts_that_only_images_reach_are_beside_the_layers_that_text_takes():
    model = tiny_model("ernie4_5_vl_moe")
    moe = discover(model)
    assert [layer.layer_idx for layer in moe.layers] == [
        layer_index(path) for path, _ in moe.others
    ]
    assert all("text_moe" in layer.name for layer in moe.layers)


def test_a_dense_model_is_refused_in_one_line():
    settings = {k: v for k, v in BASE.items() if k != "num_experts_per_tok"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with pytest.raises(ValueError, match=r"tiny-llama .* is not a Mixture-of-Experts model"):
        discover(model, "tiny-llama")


def test_the_experts_implementation_is_restored_after_an_exception():
    model = make("qwen3_moe")
    moe = discover(model)
    before = model.get_experts_implementation()

    def fail(*_):
        raise KeyError("broken handler")

    with (
        pytest.raises(KeyError, match="broken handler"),
        routed_through(model, {layer.experts: fail for layer in moe.layers}),
    ):
        model(input_ids=some_tokens())

    assert model.get_experts_implementation() == before
    assert not any("_foreroute_handler" in vars(layer.experts) for layer in moe.layers)
    model(input_ids=some_tokens())


def test_discovery_leaves_no_hook_and_keeps_the_training_mode():
    model = make("mixtral").train()
    discover(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_names_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        resolve_model("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(str(tmp_path))


def test_unknown_dtypes_and_devices_are_refused():
    with pytest.raises(ValueError, match="known: auto, float32"):
        resolve_dtype("int3")
    with pytest.raises(ValueError, match="Unknown device"):
        resolve_device("abacus")


def test_moe_layers_are_found_alone_as_with_all_the_rest() -> None:
    model = tiny_model("qwen3_moe")
    assert find_moe_layers(model) == discover(model).layers

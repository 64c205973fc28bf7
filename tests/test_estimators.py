"""Inputs, forms and the stack: worked numbers, and one pair equals all pairs."""

import dataclasses

import pytest
import torch
from toys import random_anchors, toy_geometry

from foreroute.estimators import (
    FORMS,
    SOURCE_FIELDS,
    EstimatorForm,
    EstimatorSpec,
    EstimatorStack,
    LayerAnchors,
    SourceState,
    find_form,
    predictable_layers,
)
from foreroute.estimators.inputs import apply_norm, expected_output

# Layers 1, 3, 4, 6 of the decoder have experts: indices and positions differ on purpose.
GEOMETRY = toy_geometry(1, 3, 4, 6)
# One pair alone goes through another matrix kernel than all pairs together.
FLOAT32_TOLERANCE = 1e-5


def random_source(num_pairs: int, num_tokens: int = 5) -> SourceState:
    return SourceState(
        residual=torch.randn(num_pairs, num_tokens, 16),
        router_input=torch.randn(num_pairs, num_tokens, 16),
        expert_ids=torch.rand(num_pairs, num_tokens, 8).topk(2).indices,
        gate_weights=torch.rand(num_pairs, num_tokens, 2),
        readout=torch.randn(num_pairs, num_tokens, 16),
        layer_input=torch.randn(num_pairs, num_tokens, 16),
    )


def stack_with_noise(form: str, **changes) -> EstimatorStack:
    torch.manual_seed(0)
    spec = EstimatorSpec(form=form, rank=3, width=6, target_layers=(3, 4, 6))
    spec = dataclasses.replace(spec, **changes)
    stack = EstimatorStack.build(GEOMETRY, spec, random_anchors(4), torch.randn(4, 8, 16))
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    return stack.requires_grad_(False)


def test_rms_norm_matches_a_hand_worked_number() -> None:
    # mean square of (3, 4, 0, 0) is 6.25, so each value is divided by 2.5.
    out = apply_norm(
        torch.tensor([[[3.0, 4.0, 0.0, 0.0]]]),
        torch.tensor([[1.0, 2.0, 1.0, 1.0]]),
        torch.tensor([[0.0, 0.0, 5.0, 0.0]]),
        kind="rms",
        eps=0.0,
    )
    assert torch.allclose(out, torch.tensor([[[1.2, 3.2, 5.0, 0.0]]]))


def test_layer_norm_equals_torch_and_none_changes_nothing() -> None:
    x, weight, bias = torch.randn(1, 3, 16), torch.randn(1, 16), torch.randn(1, 16)
    out = apply_norm(x, weight, bias, kind="layer", eps=1e-5)
    reference = torch.nn.functional.layer_norm(x, (16,), weight[0], bias[0], eps=1e-5)
    assert torch.allclose(out, reference, atol=FLOAT32_TOLERANCE)
    assert torch.equal(apply_norm(x, weight, bias, kind="none", eps=1.0), x)


def test_expected_output_weighs_default_vectors_by_gate_weights() -> None:
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]], [[0.0, 0.0], [4.0, 0.0], [1, 1]]])
    ids = torch.tensor([[[1, 0]], [[1, 2]]], dtype=torch.uint8)
    weights = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]])
    out = expected_output(ids, weights, vectors)
    assert out.tolist() == [[[0.25, 1.5]], [[2.5, 0.5]]]


def test_quasi_hidden_prediction_matches_a_hand_worked_number() -> None:
    geometry = dataclasses.replace(
        GEOMETRY, layer_indices=(0, 1), num_experts=2, top_k=1, hidden_size=2
    )
    anchors = LayerAnchors(
        router_weight=torch.tensor([[[7.0, 7.0], [7.0, 7.0]], [[1.0, 0.0], [1.0, 1.0]]]),
        router_bias=torch.tensor([[0.0, 0.0], [0.0, 0.5]]),
        norm_weight=torch.tensor([[7.0, 7.0], [1.0, 2.0]]),
        norm_bias=torch.zeros(2, 2),
        norm_kind="rms",
        norm_eps=0.0,
    )
    vectors = torch.tensor([[[0.0, 0.0], [4.0, 6.0]], [[7.0, 7.0], [7.0, 7.0]]])
    stack = EstimatorStack.training_free(
        geometry, anchors, input_kind="quasi-hidden", default_vectors=vectors
    )
    # residual (1, -2) + 0.5 * (4, 6) = (3, 1), rms sqrt(5); normed (3, 2) / sqrt(5).
    logits = stack.predict(
        0,
        residual=torch.tensor([[1.0, -2.0]]),
        expert_ids=torch.tensor([[1]]),
        gate_weights=torch.tensor([[0.5]]),
    )
    assert torch.allclose(logits, torch.tensor([[3 / 5**0.5, 5**0.5 + 0.5]]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("input_kind", SOURCE_FIELDS)
@pytest.mark.parametrize("is_trained", [(True, True, True), (True, False, True)])
def test_one_pair_predicts_what_all_pairs_predict(form, input_kind, is_trained) -> None:
    stack = stack_with_noise(form, input_kind=input_kind)
    stack.is_trained = is_trained
    source = random_source(num_pairs=3)
    together = stack(source)
    assert together.shape == (3, 5, 8)
    for pair, source_layer in enumerate((1, 3, 4)):
        fields = {name: field[pair] for name, field in source._asdict().items()}
        alone = stack.predict(source_layer, **fields)
        assert torch.allclose(alone, together[pair], atol=FLOAT32_TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("form", ["low-rank", "ridge", "mlp"])
def test_an_untrained_anchored_form_is_exactly_the_next_router(form: str) -> None:
    anchors, vectors = random_anchors(4), torch.randn(4, 8, 16)
    spec = EstimatorSpec(form=form, target_layers=(3, 4, 6))
    fresh = EstimatorStack.build(GEOMETRY, spec, anchors, vectors)
    free = EstimatorStack.training_free(
        GEOMETRY, anchors, input_kind="quasi-hidden", default_vectors=vectors
    )
    source = random_source(num_pairs=3)
    assert torch.equal(fresh(source), free(source))


def test_pairs_where_training_did_not_pay_fall_back_to_training_free_logits() -> None:
    stack = stack_with_noise("low-rank")
    source = random_source(num_pairs=3)
    trained = stack(source)
    stack.is_trained = (False,) * 3
    free = stack(source)
    stack.is_trained = (True, False, True)
    assert torch.equal(stack(source), torch.stack([trained[0], free[1], trained[2]]))


def test_layers_are_paired_by_moe_position_not_by_decoder_index() -> None:
    stack = EstimatorStack.training_free(GEOMETRY, random_anchors(4), horizon=2)
    assert (stack.source_layers, stack.target_layers) == ((1, 3), (4, 6))
    assert stack.target_of(1) == 4
    assert stack.target_of(6) is None


def test_low_precision_states_give_float32_logits() -> None:
    stack = stack_with_noise("low-rank")
    source = random_source(num_pairs=3)
    half = SourceState(*(f.bfloat16() if f.is_floating_point() else f for f in source))
    assert stack(half).dtype == torch.float32


def test_tensors_round_trip_bit_equal_and_leave_random_numbers_alone() -> None:
    stack = stack_with_noise("mlp")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    again = EstimatorStack.from_tensors(
        GEOMETRY, stack.spec, stack.to_tensors(), norm_kind="rms", norm_eps=1e-6
    )
    assert torch.equal(torch.rand(1), expected)
    source = random_source(num_pairs=3)
    assert torch.equal(again(source), stack(source))


def test_tensors_that_do_not_fit_are_refused() -> None:
    stack = stack_with_noise("low-rank")
    keep = {"norm_kind": "rms", "norm_eps": 1e-6}
    tensors = stack.to_tensors()
    without = {name: t for name, t in tensors.items() if name != "form.up"}
    with pytest.raises(ValueError, match=r"form\.up"):
        EstimatorStack.from_tensors(GEOMETRY, stack.spec, without, **keep)
    wrong = tensors | {"input.router_weight": torch.zeros(3, 8, 15)}
    with pytest.raises(ValueError, match=r"router_weight of shape \[3, 8, 16\]"):
        EstimatorStack.from_tensors(GEOMETRY, stack.spec, wrong, **keep)


def test_messages_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="known forms: next-router, low-rank, ridge, linear, mlp"):
        find_form("transformer")
    with pytest.raises(ValueError, match="Layer 1 cannot be predicted"):
        EstimatorStack.build(
            GEOMETRY, EstimatorSpec(form="linear", target_layers=(1,)), random_anchors(4)
        )
    with pytest.raises(ValueError, match="needs default vectors"):
        EstimatorStack.training_free(GEOMETRY, random_anchors(4), input_kind="quasi-hidden")
    with pytest.raises(ValueError, match="needs at least 5 MoE layers"):
        predictable_layers(GEOMETRY, 4)
    stack = stack_with_noise("low-rank")
    with pytest.raises(ValueError, match="sources are"):
        stack.predict(6, residual=torch.zeros(1, 16))
    with pytest.raises(ValueError, match="needs expert_ids, gate_weights"):
        stack.predict(1, residual=torch.zeros(1, 16))


def test_every_form_is_an_estimator_form_with_pairs_first() -> None:
    spec = EstimatorSpec(form="linear")
    for form in FORMS.values():
        made = form(spec, num_pairs=3, hidden_size=16, num_experts=8)
        assert isinstance(made, EstimatorForm)
        # What all pairs share has a first dimension of 1.
        assert all(parameter.shape[0] in (1, 3) for parameter in made.parameters())


def test_a_readout_is_read_as_the_target_layers_own_residual() -> None:
    stack = stack_with_noise("next-router", input_kind="attention-readout")
    source = random_source(num_pairs=3)
    free = stack_with_noise("next-router", input_kind="residual")
    assert torch.equal(stack(source), free(SourceState(residual=source.readout)))


def test_only_pre_attention_input_predicts_its_own_and_the_first_layer() -> None:
    spec = EstimatorSpec(
        form="next-router", input_kind="pre-attention", horizon=0, target_layers=(1, 3, 4, 6)
    )
    stack = EstimatorStack.build(GEOMETRY, spec, random_anchors(4))
    assert stack.source_layers == stack.target_layers == (1, 3, 4, 6)
    assert stack.predict(1, layer_input=torch.randn(5, 16)).shape == (5, 8)
    assert predictable_layers(GEOMETRY, 0) == (1, 3, 4, 6)
    with pytest.raises(ValueError, match="only pre-attention input predicts its own layer"):
        EstimatorSpec(form="next-router", input_kind="residual", horizon=0)


def test_a_selection_bias_decides_the_ranking_but_not_the_logits() -> None:
    geometry = dataclasses.replace(GEOMETRY, gate_family="sigmoid-topk-renorm")
    anchors = random_anchors(4)
    biased = dataclasses.replace(anchors, selection_bias=torch.tensor([[0.0] * 7 + [9.0]] * 4))
    plain, ranked = (
        EstimatorStack.training_free(geometry, a, input_kind="residual") for a in (anchors, biased)
    )
    source = random_source(num_pairs=3)
    logits = ranked(source)
    assert torch.equal(logits, plain(source))
    assert plain.ranking(logits) is logits
    scores = ranked.ranking(logits)
    assert torch.allclose(scores[..., :7], logits[..., :7].sigmoid())
    assert (scores.argmax(-1) == 7).all()
    assert torch.equal(ranked.ranking(logits[1], source_layer=3), scores[1])
    tensors = ranked.to_tensors()
    again = EstimatorStack.from_tensors(
        geometry, ranked.spec, tensors, norm_kind="rms", norm_eps=1e-6
    )
    assert torch.equal(again.ranking(logits), scores)


def test_without_anchors_only_free_forms_on_router_input_are_possible() -> None:
    spec = EstimatorSpec(form="linear", input_kind="router-input", target_layers=(3, 4, 6))
    stack = EstimatorStack.build(GEOMETRY, spec, None)
    source = random_source(num_pairs=3)
    logits = stack(source)
    assert logits.shape == (3, 5, 8)
    assert stack.ranking(logits) is logits
    again = EstimatorStack.from_tensors(
        GEOMETRY, spec, stack.to_tensors(), norm_kind="none", norm_eps=0.0
    )
    assert torch.equal(again(source), logits)
    with pytest.raises(ValueError, match="choose --form linear or mlp-free or shared-mlp"):
        EstimatorStack.build(GEOMETRY, dataclasses.replace(spec, form="low-rank"), None)
    with pytest.raises(ValueError, match="choose --input router-input"):
        EstimatorStack.build(GEOMETRY, dataclasses.replace(spec, input_kind="residual"), None)
    with pytest.raises(ValueError, match="choose --form linear"):
        EstimatorStack(GEOMETRY, spec, None, is_trained=[True, False, True])

"""What is kept of a training: starts that were better, and corrections no larger than pays."""

import pytest
import torch
from toys import Listed

from foreroute.estimators import (
    FORMS,
    EstimatorSpec,
    EstimatorStack,
    LayerAnchors,
    MoEGeometry,
    RecallMeter,
    SourceState,
)
from foreroute.train.choose import least_share, recall_by_share, settle_pairs
from foreroute.train.fit import train_stack
from foreroute.train.prepared import PreparedBatch, prepare
from foreroute.train.run import FitConfig
from foreroute.train.shards import RoutingBatch

HIDDEN, EXPERTS, TOP_K = 32, 16, 4
SHRINKABLE = [name for name in FORMS if FORMS[name].correction_parameters]


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small lose time by being shared among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy_stack(form: str = "low-rank") -> EstimatorStack:
    """Two pairs whose routers have logits of about unit size."""
    torch.manual_seed(0)
    anchors = LayerAnchors(
        router_weight=torch.randn(3, EXPERTS, HIDDEN) / HIDDEN**0.5,
        router_bias=torch.zeros(3, EXPERTS),
        norm_weight=torch.ones(3, HIDDEN),
        norm_bias=torch.zeros(3, HIDDEN),
        norm_kind="rms",
        norm_eps=1e-6,
    )
    geometry = MoEGeometry(
        model_type="toy",
        layer_indices=(0, 1, 2),
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        router_fingerprint="f" * 64,
    )
    spec = EstimatorSpec(form=form, input_kind="residual", width=16, target_layers=(1, 2))
    return EstimatorStack.build(geometry, spec, anchors)


def text_of(stack: EstimatorStack, num_tokens: int, kind: int) -> PreparedBatch:
    """Routing as the anchor has it, plus what all texts share, plus or minus what only one has.

    Args:
        stack: Prepares it.
        num_tokens: How many.
        kind: 1 or -1, the sign of what the two kinds of text do not share.
    """
    generator = torch.Generator().manual_seed(7)
    shared, own = torch.randn(2, 2, HIDDEN, EXPERTS, generator=generator) / HIDDEN**0.5
    source = SourceState(residual=torch.randn(2, num_tokens, HIDDEN))
    features = stack.input.features(source)
    noise = 0.5 * torch.randn(2, num_tokens, EXPERTS)
    logits = stack.anchor_logits(features) + features @ (shared + 0.69 * kind * own) + noise
    weights, ids = logits.softmax(dim=-1).topk(TOP_K)
    return prepare(stack, RoutingBatch(source, logits, ids, weights, torch.full_like(ids, -1)))


def recall_of(stack: EstimatorStack, tokens: PreparedBatch) -> torch.Tensor:
    return recall_by_share(stack, Listed(tokens), torch.ones(1))[0]


def trained(kept_gain: float, tmp_path) -> tuple[EstimatorStack, list[float]]:
    stack = toy_stack()
    fitting, choosing = (Listed(text_of(stack, num, kind=1)) for num in (4000, 2000))
    config = FitConfig(
        epochs=10, batch_size=500, learning_rate=0.03, init="zero", kept_gain=kept_gain
    )
    return stack, train_stack(stack, fitting, choosing, config, tmp_path, show_progress=False)


def test_shrinking_keeps_a_correction_from_losing_to_the_anchor_on_other_text(tmp_path) -> None:
    whole, _ = trained(1.0, tmp_path / "whole")
    shrunk, shares = trained(0.9, tmp_path / "shrunk")
    other = text_of(whole, 8000, kind=-1)
    anchor = recall_by_share(whole, Listed(other), torch.zeros(1)).mean()
    assert 0.5 < shares[0] == shares[1] < 1
    # Means of 64,000 draws of the same tokens: a standard error below 0.002.
    assert recall_of(whole, other).mean() < anchor - 0.004
    assert recall_of(shrunk, other).mean() > anchor + 0.004


def test_shrinking_keeps_the_gain_it_was_told_to_keep(tmp_path) -> None:
    whole, _ = trained(1.0, tmp_path / "whole")
    shrunk, _ = trained(0.9, tmp_path / "shrunk")
    same = text_of(whole, 8000, kind=1)
    anchor = recall_by_share(whole, Listed(same), torch.zeros(1))[0]
    kept = (recall_of(shrunk, same) - anchor) / (recall_of(whole, same) - anchor)
    # The share was chosen on 2,000 tokens x 4 draws: a standard error of about 0.01 of the gain.
    assert (kept > 0.87).all()


def test_the_smallest_share_that_reaches_gain_and_floor_is_taken() -> None:
    recalls = torch.tensor([0.50, 0.60, 0.69, 0.70], dtype=torch.float64)
    asked = ((0.9, 0.5), (0.4, 0.5), (0.4, 0.65), (1.0, 0.5), (0.9, 0.9))
    found = [least_share(recalls, floor, kept_gain) for kept_gain, floor in asked]
    # Thresholds .68, .54, .65, .70, .90; the last is out of reach, so that all is kept.
    assert found == [2, 1, 2, 3, 3]


def test_nothing_is_left_of_a_correction_that_harms() -> None:
    recalls = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)
    assert least_share(recalls, 0.2, 0.9) == 0


@pytest.mark.parametrize("form", SHRINKABLE)
def test_scaling_a_correction_adds_that_share_of_it(form) -> None:
    stack = toy_stack(form)
    tokens = text_of(stack, 10, kind=1)
    shares = torch.tensor([0.25, 1.0])
    with torch.no_grad():
        for parameter in stack.form.parameters():
            parameter.normal_()
        whole = stack.form(tokens.features, tokens.anchor_logits) - tokens.anchor_logits
        stack.form.scale_correction(shares)
        part = stack.form(tokens.features, tokens.anchor_logits) - tokens.anchor_logits
    assert torch.allclose(part, whole * shares.view(2, 1, 1), atol=1e-4)


def test_forms_without_an_anchor_are_not_shrunk() -> None:
    assert {"low-rank", "mlp"} <= set(SHRINKABLE)
    assert all(FORMS[name].is_anchored for name in SHRINKABLE)


def test_a_start_that_was_better_is_given_back_whole() -> None:
    stack = toy_stack()
    tokens = text_of(stack, 2000, kind=1)
    start = {name: value.clone() for name, value in stack.form.state_dict().items()}
    with torch.no_grad():
        stack.form.bias[0].normal_(std=10.0)  # harms the first pair alone
        stack.form.bias[1] = (tokens.target_logits - tokens.anchor_logits)[1].mean(dim=0)
    shares = settle_pairs(stack, start, Listed(tokens), kept_gain=0.9)
    assert shares[0] == 1.0
    assert torch.equal(stack.form.bias[0], start["bias"][0])


def test_recall_of_no_share_is_the_anchors_own() -> None:
    stack = toy_stack()
    tokens = text_of(stack, 500, kind=1)
    with torch.no_grad():
        stack.form.up.normal_()
    meter = RecallMeter(2, TOP_K)
    meter.update(tokens.anchor_logits, tokens.target_ids, tokens.target_gate_weights)
    found = recall_by_share(stack, Listed(tokens), torch.zeros(1))[0]
    assert found.tolist() == meter.compute().recall_at_k


@pytest.mark.parametrize("kept_gain", [0.0, -0.5, 1.1])
def test_a_kept_gain_out_of_range_is_refused(kept_gain) -> None:
    with pytest.raises(ValueError, match="kept_gain must be above 0 and at most 1"):
        FitConfig(kept_gain=kept_gain)

"""The kernels around the experts agree with their plain references; interpreted on a CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from foreroute.runtime.device.kernels.attention import (
    can_attend,
    decode_attention,
    decode_attention_reference,
)
from foreroute.runtime.device.kernels.cache import store_token, store_token_reference
from foreroute.runtime.device.kernels.predict import (
    predict_logits,
    predict_logits_reference,
    rank_experts,
    rank_experts_reference,
)
from foreroute.runtime.device.kernels.quasi_hidden import add_expected_output
from foreroute.runtime.device.kernels.rotary import rotate, rotate_reference
from foreroute.runtime.device.kernels.top_k import softmax_top_k, softmax_top_k_reference
from foreroute.runtime.early_readout import add_expected_output as add_expected_output_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # a few units in the last place of each


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "length", "extras"),
    [
        (8, 2, 64, 64, 320, {}),
        (4, 4, 24, 16, 70, {}),
        (6, 2, 32, 32, 64 * 33, {}),
        (8, 1, 64, 64, 100, {"softcap": 5.0}),
        (4, 2, 32, 32, 100, {"sinks": True}),
    ],
    ids=["gqa", "uneven-dims", "many-splits", "softcap", "sinks"],
)
def test_decode_attention_agrees_with_the_reference(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    length: int,
    extras: dict[str, object],
) -> None:
    query = random(2, 1, heads, dim, dtype=dtype).transpose(1, 2)
    keys = random(2, kv_heads, length, dim, dtype=dtype, seed=1)
    values = random(2, kv_heads, length, value_dim, dtype=dtype, seed=2)
    mask = random(2, 1, 1, length, seed=3) > 0.5
    mask[1, ..., 40:] = False  # whole blocks unseen
    settings = {"scaling": dim**-0.5, "softcap": extras.get("softcap")}
    if "sinks" in extras:
        settings["sinks"] = random(heads, dtype=dtype, seed=4)
    assert can_attend(query, keys, values, mask)
    got = decode_attention(query, keys, values, mask, **settings)
    expected = decode_attention_reference(query, keys, values, mask, **settings)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


def test_unseen_keys_do_not_matter_even_if_they_are_not_numbers() -> None:
    query, keys = random(1, 4, 1, 32), random(1, 2, 130, 32, seed=1)
    mask = torch.zeros(1, 1, 1, 130, dtype=torch.bool, device=DEVICE)
    mask[..., :3] = True
    expected = decode_attention(query, keys, keys, mask, scaling=0.2)
    keys[:, :, 3:] = float("nan")
    assert torch.equal(decode_attention(query, keys, keys, mask, scaling=0.2), expected)


@pytest.mark.parametrize("position", [0, 5, 9])
def test_a_token_is_stored_at_its_position_only(position: int) -> None:
    key, value = random(2, 1, 3, 20).transpose(1, 2), random(2, 3, 1, 12, seed=1)
    at = torch.tensor([position], device=DEVICE)
    got = random(2, 3, 10, 20, seed=2), random(2, 3, 10, 12, seed=3)
    expected = tuple(t.clone() for t in got)
    store_token(key, value, *got, at)
    store_token_reference(key, value, *expected, at)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_half_table", [False, True], ids=["full-table", "half-table"])
def test_rotation_is_that_of_the_reference(dtype: torch.dtype, is_half_table: bool) -> None:
    q = random(2, 3, 4, 24, dtype=dtype).transpose(1, 2)  # [B, H, T, d]
    k = random(2, 2, 3, 24, dtype=dtype, seed=1)
    angles = random(2, 3, 12, seed=2)
    if not is_half_table:
        angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for got, expected in zip(rotate(q, k, cos, sin), rotate_reference(q, k, cos, sin), strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # a unit in bfloat16's last place
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (60, 6), (8, 2), (32, 1)])
def test_top_k_chooses_what_the_reference_chooses(
    num_experts: int, top_k: int, renormalise: bool
) -> None:
    logits = random(5, num_experts)
    weights, ids = softmax_top_k(logits, top_k, renormalise=renormalise)
    expected, expected_ids = softmax_top_k_reference(logits, top_k, renormalise=renormalise)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)


def test_equal_logits_go_to_the_lower_ids() -> None:
    _, ids = softmax_top_k(torch.zeros(1, 6, device=DEVICE), 3, renormalise=True)
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("has_vectors", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_predicted_logits_are_those_of_the_reference(eps: float | None, has_vectors: bool) -> None:
    extras = {}
    if has_vectors:
        extras = {
            "default_vectors": random(9, 40, seed=3),
            "expert_ids": torch.tensor([[0, 8], [3, 4], [5, 3]], device=DEVICE),
            "gate_weights": random(3, 2, seed=4),
        }
    given = random(3, 40), random(9, 40, seed=1), random(9, seed=2)
    got = predict_logits(*given, eps=eps, **extras)
    expected = predict_logits_reference(*given, eps=eps, **extras)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [2, 4, 7])
def test_ranks_and_chances_are_those_of_the_reference(budget: int) -> None:
    table = torch.linspace(0, 1, 9, device=DEVICE).square()
    settings = torch.tensor([-2.0], device=DEVICE), torch.tensor([2.0], device=DEVICE), table
    logits = 2 * random(5, 24)
    ids, chances = rank_experts(logits, *settings, top_k=4, budget=budget)
    expected = rank_experts_reference(logits, *settings, top_k=4, budget=budget)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(chances, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [40, 768])
def test_expected_outputs_are_added_as_the_reference_adds_them(
    dtype: torch.dtype, depth: int
) -> None:
    residual, vectors = random(3, depth, dtype=dtype), random(8, depth, seed=1)
    gates, ids = random(3, 8, seed=2).topk(2)
    gates = gates.to(dtype)
    got = add_expected_output(residual, ids, gates, vectors)
    expected = add_expected_output_reference(residual, ids, gates, vectors)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

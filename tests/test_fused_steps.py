"""A decode step's launches that do several modules' work; interpreted on a CPU."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs triton")

from interpreted import run_on_cpu
from tiny_models import tiny_model

from foreroute.data.adapters.seam import routed_through
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.device import decode_graph
from foreroute.runtime.device.decode_graph import DecodeStep
from foreroute.runtime.device.fusions.deferred import Deferred, Known, settled
from foreroute.runtime.device.fusions.deferred_norms import defer_norms
from foreroute.runtime.device.fusions.norms import find_norms
from foreroute.runtime.device.kernels import demand as demand_module
from foreroute.runtime.device.kernels import plan as plan_module
from foreroute.runtime.device.kernels import route as route_module
from foreroute.runtime.device.kernels.heads import (
    ProjectedHeads,
    place_heads,
    place_heads_reference,
)
from foreroute.runtime.device.kernels.linear import products, products_reference
from foreroute.runtime.device.kernels.norm import Norm
from foreroute.runtime.device.kernels.route import (
    DemandPlan,
    RouterProduct,
    route,
    route_reference,
)
from foreroute.runtime.device.kernels.tables import NUM_COUNTERS, ResidencyTables
from foreroute.runtime.device.layer import DeviceLayer
from foreroute.runtime.device.residency import DeviceResidency
from foreroute.runtime.policies import find_policy
from foreroute.runtime.store.offload import offload
from foreroute.runtime.store.staging import Staging

LRFU = find_policy("lrfu").device_rule()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums in another order: some units in the last place of each type, of numbers up to 16.
PIECE_BYTES = 8192
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_of(size: int, dtype: torch.dtype) -> Norm:
    return Norm(factor=random(size, dtype=dtype, seed=9), eps=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products_of_one_input_agree_with_separate_ones(dtype: torch.dtype, tokens: int) -> None:
    state = random(tokens, 96, dtype=dtype)
    weights = [random(rows, 96, dtype=dtype, seed=rows) for rows in (40, 7, 9)]
    biases = [random(len(weight), dtype=dtype, seed=1) for weight in weights]
    residual = random(tokens, 40, dtype=dtype, seed=2)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype] / 16}
    for given in ({"norm": norm_of(96, dtype)}, {}):
        got = products(state, weights, biases, **given)  # type: ignore[arg-type]
        expected = products_reference(state, weights, biases, **given)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, **close)
        added = products(state, weights[:1], residual=residual, **given)  # type: ignore[arg-type]
        expected = products_reference(state, weights[:1], residual=residual, **given)  # type: ignore[arg-type]
        torch.testing.assert_close(added, expected, **close)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [16, 8])
def test_heads_are_placed_as_norms_rotation_and_cache_writes_place_them(
    dtype: torch.dtype, width: int
) -> None:
    heads = ProjectedHeads(
        states=random(2, 8 * 16, dtype=dtype),
        starts=(32, 0, 96),
        query_heads=4,
        key_heads=2,
        query_norm=norm_of(16, dtype),
        key_norm=None,
        cos=random(2, 1, width, dtype=dtype, seed=3),
        sin=random(2, 1, width, dtype=dtype, seed=4),
    )
    position = torch.tensor([3], device=DEVICE)
    got, expected = (torch.zeros(2, 2, 2, 5, 16, dtype=dtype, device=DEVICE) for _ in range(2))
    query = place_heads(heads, *got, position)
    reference = place_heads_reference(heads, *expected, position)
    for one, other in ((query, reference), (got, expected)):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype] / 4, rtol=0.02)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_router_that_plans_does_what_router_and_plan_do(tokens: int) -> None:
    norm, num_ids = norm_of(96, torch.float32), 3 * tokens
    router = RouterProduct(
        weight=random(12, 96, seed=5),
        bias=random(12, seed=6),
        top_k=3,
        renormalise=True,
        dtype=torch.float32,
        arrivals=torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )
    both = [ResidencyTables.empty(12, 7, DEVICE) for _ in range(2)]
    for step in range(12):
        plans = [
            DemandPlan(
                tables=tables,
                rule=LRFU,
                copies=torch.zeros(3, num_ids, dtype=torch.int32, device=DEVICE),
                places=torch.zeros(2, num_ids, dtype=torch.int32, device=DEVICE),
                expert_ids=torch.arange(num_ids, device=DEVICE).view(tokens, 3) % 5
                if step == 7
                else None,
            )
            for tables in both
        ]
        state = random(tokens, 96, seed=10 + step)
        got, expected = (
            route(state, router, norm, plans[0]),
            route_reference(state, router, norm, plans[1]),
        )
        assert torch.equal(got.expert_ids, expected.expert_ids)
        for name in ("router_input", "logits", "gate_weights"):
            torch.testing.assert_close(
                getattr(got, name), getattr(expected, name), atol=2e-5, rtol=2e-5
            )
        assert torch.equal(plans[0].places, plans[1].places)
        for name in ("slot_of", "expert_in", "counters", "progress", "score"):
            torch.testing.assert_close(getattr(both[0], name), getattr(both[1], name))
        assert int(router.arrivals) == 0


def test_what_a_model_does_with_a_deferred_norm_is_what_it_would_do_with_the_norm() -> None:
    norm = nn.RMSNorm(8, eps=1e-6).requires_grad_(False).to(DEVICE)
    linear = nn.Linear(8, 6, bias=False).to(DEVICE)
    state, other = random(1, 1, 8), random(1, 1, 6, seed=1)
    counts: Counter[str] = Counter()
    with ExitStack() as undo, torch.no_grad():
        expected = norm(state)
        defer_norms(find_norms(norm), undo, counts)
        normed = norm(state)
        assert isinstance(normed, Deferred)
        torch.testing.assert_close(normed * 2 + normed[..., :1], expected * 2 + expected[..., :1])
        product = linear(norm(state))
        assert isinstance(product, Deferred)
        torch.testing.assert_close(settled(other + product), other + linear(expected))
        torch.testing.assert_close(product.sigmoid(), linear(expected).sigmoid())
        assert counts["additions in products"] == 1
    assert torch.equal(norm(state), expected)


def test_a_state_that_changes_before_its_norm_is_read_is_an_error() -> None:
    state = torch.ones(1, 8)
    known = Known(state, Counter())
    state.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        _ = known.state


class ExpertsInSlots:
    """A tiny model whose experts run by the device's kernels, from few slots."""

    def __init__(self, model: Any, slots: int) -> None:
        self.offloaded = offload(model, device=torch.device("cpu"), model_name="tiny")
        store, moe = self.offloaded.store, self.offloaded.moe
        run = run_on_cpu(self.offloaded, EngineConfig(), LRFU)
        counters = torch.zeros(len(moe.layers), NUM_COUNTERS, dtype=torch.int32)
        self.layers = [
            DeviceLayer(
                DeviceResidency(layer, rows, layout, slots, run, own),
                None,
                run,  # type: ignore[arg-type]
            )
            for layer, rows, layout, own in zip(
                moe.layers, store.rows, store.layouts, counters, strict=True
            )
        ]
        self.counters, self.run = counters, run

    def hand_out(self, pinned: list[int]) -> Staging:
        """Let the host hand out all other experts; where their rows are, kernels find nothing."""
        rows = self.offloaded.store.rows
        self.run.staging = Staging(rows, torch.device("cpu"), PIECE_BYTES)
        for place, layer in enumerate(self.layers):
            residency = layer.residency
            residency.place, residency.rows = place, torch.full_like(rows[place], 255)
            residency.rows[pinned] = rows[place][pinned]
            residency.is_pinned[pinned] = 1
        return self.run.staging

    def step(self, tokens: Tensor, width: int = 1) -> tuple[Tensor, DecodeStep]:
        """Logits of decode steps of so many tokens from an empty cache, [tokens, V]."""
        moe = self.offloaded.moe
        handlers = {m.experts: own for m, own in zip(moe.layers, self.layers, strict=True)}
        with routed_through(moe.model, handlers):
            step = DecodeStep(moe.model, 1, 8, [layer.router for layer in moe.layers])
            step.begin(torch.ones(1, 1, dtype=torch.long))
            step.positions.zero_()
            step._write_at.zero_()
            if width > 1:
                step = step.widened(width)
            parts = [step.replay(part.view(1, -1)).clone() for part in tokens.split(width)]
            return torch.cat([part.view(width, -1) for part in parts]), step


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py runs whole engines there")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_layers_that_plan_in_their_routers_give_the_plain_models_logits(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graph, "LENGTH_STEP", 8)
    monkeypatch.setattr(route_module, "ROWS", 16)  # few programs: they are interpreted
    for module in (demand_module, plan_module):
        monkeypatch.setattr(module, "DEMAND_PROGRAMS", 2)
    model = tiny_model(model_type).eval()
    plain, tokens = copy.deepcopy(model), torch.tensor([7, 9])
    with torch.no_grad():
        expected = plain(input_ids=tokens.unsqueeze(0)).logits[0]
    num_layers = model.config.num_hidden_layers
    experts = ExpertsInSlots(model, slots=model.config.num_experts_per_tok + 1)
    got, step = experts.step(tokens)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    for what in ("plans in routers", "norms in routers", "additions in experts"):
        assert step.fused[what] == num_layers, step.fused_parts()
    assert step.fused["projections that share a launch"] == 2 * num_layers
    for layer in experts.layers:
        layer.residency.check_integrity()


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py runs whole engines there")
def test_steps_give_the_same_bits_whoever_hands_out_the_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_graph, "LENGTH_STEP", 8)
    monkeypatch.setattr(route_module, "ROWS", 16)
    for module in (demand_module, plan_module):
        monkeypatch.setattr(module, "DEMAND_PROGRAMS", 2)
    model = tiny_model("qwen3_moe", num_hidden_layers=2).eval()
    tokens, slots = torch.tensor([7, 9]), model.config.num_experts_per_tok + 1
    expected, _ = ExpertsInSlots(copy.deepcopy(model), slots).step(tokens)
    experts = ExpertsInSlots(model, slots)
    staging = experts.hand_out([0, 2, 3, 5])
    got, _ = experts.step(tokens)
    staging.require_served()
    staging.close()
    assert torch.equal(got, expected)
    assert int(staging.turns.sum()) > 0
    for layer, rows in zip(experts.layers, experts.offloaded.store.rows, strict=True):
        layer.residency.rows = rows
        layer.residency.check_integrity()


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py runs whole engines there")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_steps_of_several_tokens_give_the_same_bits_from_few_slots(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graph, "LENGTH_STEP", 8)
    monkeypatch.setattr(route_module, "ROWS", 16)
    for module in (demand_module, plan_module):
        monkeypatch.setattr(module, "DEMAND_PROGRAMS", 2)
    model = tiny_model(model_type, num_hidden_layers=2).eval()
    top_k, num_experts = model.config.num_experts_per_tok, model.config.num_local_experts
    plain, tokens = copy.deepcopy(model), torch.tensor([7, 9, 11, 5, 9, 7])
    with torch.no_grad():
        expected = plain(input_ids=tokens.unsqueeze(0)).logits[0]
    few, enough = (
        ExpertsInSlots(copy.deepcopy(model), slots) for slots in (top_k + 1, num_experts)
    )
    got, _ = few.step(tokens, width=3)
    assert torch.equal(got, enough.step(tokens, width=3)[0])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    for layer in few.layers:
        layer.residency.check_integrity()

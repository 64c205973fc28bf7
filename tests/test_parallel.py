"""Experts in slices over processes: ranks agree, slots change nothing, and nothing hangs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from sliced_worker import CASES, cases_of, logits_in, observe, run_rank

from foreroute.estimators import EstimatorStack
from foreroute.export.bundle import PairEntry, save_bundle
from foreroute.runtime.parallel import UNSLICED
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded

Seen = dict[str, list[Any]]


@pytest.fixture(scope="module")
def alone() -> OffloadedModel:
    return load_offloaded("bundled", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def bundle(alone: OffloadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "bundle"
    geometry = alone.moe.geometry
    stack = EstimatorStack.training_free(geometry, alone.moe.anchors)
    claims = {"recall_at_k": 0.5, "training_free_recall_at_k": 0.5, "budget": geometry.top_k}
    pairs = [
        PairEntry(source_layer=source, target_layer=target, form="next-router", **claims)
        for source, target in zip(stack.source_layers, stack.target_layers, strict=True)
    ]
    folder.mkdir()
    save_bundle(folder, stack, pairs, num_held_out_tokens=1, provenance={})
    return folder


ON_GPUS = pytest.param(
    (2, "cuda"),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    ],
    id="2-GPUs",
)


@pytest.fixture(scope="module", params=[(2, "cpu"), (4, "cpu"), ON_GPUS], ids=["2", "4", None])
def seen(request: Any, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By case, what each rank saw, from one start of the processes."""
    num_ranks, device = request.param
    out = tmp_path_factory.mktemp(f"ranks{num_ranks}{device}")
    ended = run_ranks(num_ranks, run_rank, out, bundle, device)
    is_one_dead = device == "cpu"
    assert ended == [0] * (num_ranks - 1) + [3 * is_one_dead]  # the last one was made to end so
    names = [*cases_of(num_ranks), "bfloat16", "divided", "bench", "lockstep"]
    read: Seen = {"die": []}
    if is_one_dead:
        read["die"] = [torch.load(out / f"die_{rank}.pt") for rank in range(num_ranks - 1)]
    for name in names:
        read[name] = [torch.load(out / f"{name}_{rank}.pt") for rank in range(num_ranks)]
    return read


def test_ranks_are_bit_equal_to_each_other(seen: Seen) -> None:
    for case in cases_of(len(seen["all"])):
        first, *others = seen[case]
        for other in others:
            for name in ("logits", "greedy", "sampled", "counts", "bytes"):
                assert torch.equal(other[name], first[name]), (case, name)


def test_slots_prefetch_and_a_bundle_change_no_bit(seen: Seen) -> None:
    for case in cases_of(len(seen["all"])):
        for name in ("logits", "greedy"):
            assert torch.equal(seen[case][0][name], seen["all"][0][name]), (case, name)
    assert seen["quarter"][0]["counts"][1] > 0
    assert seen["bundle"][0]["counts"][2] > 0


def test_tokens_are_the_same_from_run_to_run(seen: Seen) -> None:
    if "again" not in seen:
        pytest.skip("run once by four processes")
    for name in ("logits", "greedy", "sampled", "counts"):
        assert torch.equal(seen["again"][0][name], seen["quarter"][0][name]), name


def test_slices_are_near_one_process_and_hold_their_share(
    seen: Seen, alone: OffloadedModel
) -> None:
    whole, ranks = observe(alone, CASES["quarter"]), seen["quarter"]
    # float32 sums in another order, on a GPU by other kernels: 8 layers of 1e-7 relative steps
    assert torch.allclose(ranks[0]["logits"], whole["logits"], atol=1e-4)
    assert torch.equal(ranks[0]["greedy"], whole["greedy"])
    assert torch.equal(ranks[0]["bytes"] * len(ranks), whole["bytes"])


@pytest.fixture(scope="module")
def whole_logits() -> list[torch.Tensor]:
    """Of one process, in float32 and bfloat16."""
    return [logits_in(dtype, UNSLICED) for dtype in ("float32", "bfloat16")]


def test_slices_are_no_further_from_float32_than_one_process(
    seen: Seen, whole_logits: list[torch.Tensor]
) -> None:
    truth, whole = whole_logits

    def divergence(logits: torch.Tensor) -> float:
        """Mean over tokens, from float32."""
        both = truth.log_softmax(-1), logits.log_softmax(-1)
        return float((both[0].exp() * (both[0] - both[1])).sum(-1).mean())

    # which way a rounding falls is chance: the figures of two runs differ by a quarter
    assert divergence(seen["bfloat16"][0]["logits"]) < 1.5 * divergence(whole)


def test_all_else_is_divided_by_transformers_plan_under_the_same_promises(seen: Seen) -> None:
    first, *others = seen["divided"]
    if len(others) == 3:  # of the bundled model's two heads of keys
        assert "4 processes do not divide the model's 2 num_key_value_heads" in first
        assert first.endswith("these do: 2.")
        return
    assert first["keys"] == 64  # one of two heads
    for case in ("all", "quarter", "bundle"):
        for name in ("logits", "greedy", "sampled"):
            assert torch.equal(others[0][case][name], first[case][name])
        assert torch.equal(first[case]["greedy"], first["all"]["greedy"])
        assert torch.equal(first[case]["logits"], first["all"]["logits"])
    whole = seen["quarter"][0]
    assert torch.allclose(first["quarter"]["logits"], whole["logits"], atol=1e-4)
    assert torch.equal(first["quarter"]["greedy"], whole["greedy"])


def test_a_bench_measures_the_exact_modes_and_the_first_process_reports(seen: Seen) -> None:
    found, *others = seen["bench"]
    assert others == [None] * len(others)
    assert found["num_ranks"] == 1 + len(others)
    assert found["exact_tokens_equal"]
    assert {"all-resident", "on-demand", "prefetch", "prefetch-all"} <= found["modes"].keys()
    assert all(mode["is_exact"] for mode in found["modes"].values())


def test_what_only_the_first_process_knows_leaves_all_in_step(seen: Seen) -> None:
    first, *others = seen["lockstep"]
    assert first["streamer"] == "the reader is gone"
    assert "temperature" in first["refusal"]
    assert first["stopped"] == 5
    assert torch.equal(first["last"], first["first"])  # after SIGTERM, which all were sent
    assert all(other["hits"] == first["hits"] for other in others)


def test_a_process_that_dies_ends_all_within_seconds(seen: Seen) -> None:
    for rank in seen["die"]:
        assert rank["line"] == "Another process of this model has ended, so this one ends too."
        assert rank["seconds"] < 10

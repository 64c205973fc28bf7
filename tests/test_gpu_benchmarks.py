"""The GPU benchmarks run to their end on a CPU, and what they replay and count is right."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import decode_gpu
import decode_profile
import end_to_end_gpu
import installed_prose
import partial_results
import pytest
import random_shapes
import replayed_routing
import torch
import ttft_gpu

from foreroute.runtime.store.host_store import RowLayout


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(script: ModuleType, *flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, "--tiny", *flags])
        assert script.main() == 0

    return run


def test_a_route_file_is_read_and_folded_to_another_shape(tmp_path: Path) -> None:
    header = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
    rows = [(1, 0, (5, 9)), (1, 1, (2, 6)), (2, 0, (1, 3)), (2, 1, (0, 4)), (3, 0, (7, 8))]
    lines = [f"0,1,{s},{la},{i},{e},0.5,0,1" for s, la, es in rows for i, e in enumerate(es)]
    path = tmp_path / "route.csv"
    path.write_text("\n".join(["# a comment", header, "0,0,0,0,0,1,1,0,1", *lines]) + "\n")
    routes = replayed_routing.read_steps(path)
    assert routes.tolist() == [
        [[5, 9], [2, 6]],
        [[1, 3], [0, 4]],
    ]  # step 3 is not whole
    moe = SimpleNamespace(geometry=SimpleNamespace(num_layers=2, num_experts=4, top_k=2))
    fitted = replayed_routing.fit_routes(routes, moe, batch=2)
    assert fitted[0, :, 0].tolist() == [[1, 0], [2, 0]]  # 5 and 9 are both expert 1 of 4
    assert torch.equal(fitted[0, :, 1], fitted[17 % 2, :, 0])
    moe.geometry.num_layers = 5  # more than the recording has
    deeper = replayed_routing.fit_routes(routes, moe, batch=2)
    assert torch.equal(deeper, fitted[:, [0, 1, 0, 1, 0]])


@pytest.mark.parametrize("recall", [0.5, 1.0])
def test_replayed_predictions_have_the_recall_asked_for(recall: float) -> None:
    routes = replayed_routing.random_routes(400, 2, 32, 4).unsqueeze(2)
    said = replayed_routing.near_miss_predictions(routes, 32, recall)
    is_hit = (said.expert_ids.unsqueeze(-1) == routes.unsqueeze(-2)).any(-1)
    assert abs(is_hit.float().mean().item() - recall) < 0.03
    assert (said.expert_ids.sort(-1).values.diff(dim=-1) > 0).all()  # no expert twice
    assert (said.confidence.diff(dim=-1) <= 0).all()  # most likely first
    assert abs(said.confidence.mean().item() - recall) < 0.03  # calibrated
    of_named = said.scores.sigmoid().gather(-1, said.expert_ids)
    torch.testing.assert_close(of_named, said.confidence, atol=2e-3, rtol=0)
    assert abs(said.scores.sigmoid().sum(-1).mean().item() - 4 * recall) < 0.1


def test_layers_share_the_pool_and_rows_lie_in_it() -> None:
    pool = random_shapes.HostPool(4096, torch.device("cpu"))
    rows = pool.rows(num_layers=5, num_experts=4, layout=RowLayout({}, 512))
    assert [r.data_ptr() == rows[0].data_ptr() for r in rows] == [True, False, True, False, True]
    assert rows[0].shape == (4, 512)
    with pytest.raises(ValueError, match="8,192 bytes; the pool has 4,096"):
        pool.rows(num_layers=1, num_experts=16, layout=RowLayout({}, 512))


def test_a_shape_with_fewer_layers_says_so() -> None:
    assert random_shapes.label_of("mixtral-8x7b") == "mixtral-8x7b (16 of 32 layers)"
    assert random_shapes.label_of("qwen3-30b-a3b") == "qwen3-30b-a3b"
    assert random_shapes.label_of("qwen3-30b-a3b", layers=12).endswith("(12 of 48 layers)")


def event(name: str, kind: str, start: int, end: int) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=SimpleNamespace(name=kind), time_range=span)


def test_a_profile_counts_launches_and_waits_within_steps_alone() -> None:
    found = decode_profile.summary(
        [
            event(decode_profile.STEP_NAME, "CPU", 0, 10),
            event(decode_profile.STEP_NAME, "CPU", 20, 30),
            event("cudaGraphLaunch", "CPU", 1, 2),
            event("cudaGraphLaunch", "CPU", 21, 22),
            event("cudaLaunchKernel", "CPU", 3, 4),
            event("cudaLaunchKernel", "CPU", 12, 13),  # between two steps
            event("cudaStreamSynchronize", "CPU", 25, 26),
            event("cudaDeviceSynchronize", "CPU", 40, 50),
            event("gemv", "CUDA", 2, 8),
            event("gemv", "CUDA", 22, 28),
        ],
        num_tokens=2,
    )
    assert found["graph_launches_per_token"] == 1
    assert found["kernel_launches_outside_graph_per_token"] == 0.5
    assert found["waits_for_the_device"] == 1
    assert found["greatest"] == [{"kernel": "gemv", "us_per_token": 6.0, "count_per_token": 1.0}]


def test_a_failed_cell_is_written_down_and_the_next_one_runs(tmp_path: Path) -> None:
    results = partial_results.PartialResults(tmp_path / "r.json", minutes=1)
    with results.cell("first"):
        raise RuntimeError("broken")
    results.add({"arm": "second"})
    assert results.finish() == 1
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["failed"] == ["first: RuntimeError: broken"]
    assert written["rows"] == [{"arm": "second"}]


def test_no_cell_begins_after_the_time_is_over(tmp_path: Path) -> None:
    results = partial_results.PartialResults(tmp_path / "r.json", minutes=0)
    assert results.skip_if_spent("late")
    assert json.loads((tmp_path / "r.json").read_text())["skipped"] == [
        "late: the 0 minutes are over"
    ]


def test_the_decode_benchmark_runs_to_its_end(
    run_script: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "decode.json"
    flags = ["--shapes", "qwen3-30b-a3b", "--slots", "100", "25", "--batches", "1"]
    run_script(decode_gpu, *flags, "--json", str(path), "--timelines", str(tmp_path / "t"))
    written = json.loads(path.read_text())
    of_one = {r["arm"] for r in written["rows"]}
    assert of_one == {
        *("resident", "resident-apart", "resident-predicting", "on-demand"),
        *("on-demand-pinned-75%", "on-demand-pinned-50%"),
        *("prefetch-0.89", "prefetch-perfect"),
        *("prefetch-0.89-all", "prefetch-perfect-all"),
        *("eager-lru", "eager-no-cache", "accelerate"),
    }
    assert max(written["difference_from_stock_experts"].values()) == 0  # the same code on a CPU
    assert len(list((tmp_path / "t").glob("*.json.gz"))) == 5


@pytest.mark.parametrize("shape", ["gpt-oss-20b-mxfp4", "qwen3-30b-a3b-int8"])
def test_the_decode_benchmark_runs_experts_in_fewer_bits(
    run_script: Callable[..., None], tmp_path: Path, shape: str
) -> None:
    path = tmp_path / "decode.json"
    arms = ["resident", "on-demand", "eager-lru", "accelerate"]
    flags = ["--shapes", shape, "--slots", "100", "25", "--batches", "1", "--arms", *arms]
    run_script(decode_gpu, *flags, "--json", str(path))
    written = json.loads(path.read_text())
    assert [row["arm"] for row in written["rows"]] == ["resident", "on-demand", "eager-lru"]
    assert "accelerate" in written["skipped"][0]
    assert all(row["shape"] == f"tiny {shape}" for row in written["rows"])


def test_arms_are_compared_with_what_was_on_demand_in_their_turn(
    run_script: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "decode.json"
    flags = ["--shapes", "qwen3-30b-a3b", "--slots", "25", "--batches", "1", "--repeats", "2"]
    arms = ["--arms", "on-demand", "eager-lru"]
    run_script(decode_gpu, *flags, *arms, "--json", str(path))
    written = json.loads(path.read_text())
    turns = [(row["repeat"], row["arm"]) for row in written["rows"]]
    assert turns == [(k, arm) for k in (0, 1) for arm in ("on-demand", "eager-lru")]
    means = [row["tpot_ms_mean"] for row in written["rows"]]
    expected = sorted([means[1] / means[0], means[3] / means[2]])
    own, other = written["means_x_on_demand"]
    assert own["turns"] == [1.0, 1.0]
    assert other["arm"] == "eager-lru"
    assert other["turns"] == pytest.approx(expected, abs=1e-4)


def test_the_ttft_benchmark_runs_to_its_end(
    run_script: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "ttft.json"
    run_script(ttft_gpu, "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert [r["arm"] for r in rows[::2]] == ["resident", "streamed, 25% slots", "accelerate"]
    assert all(r["bytes_per_prompt"] > 0 for r in rows[2:])


def test_tokens_count_as_the_same_up_to_the_first_difference() -> None:
    reference = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert end_to_end_gpu.same_share([[1, 2, 9, 4], [5, 6, 7, 8]], reference) == 6 / 8
    assert end_to_end_gpu.same_share([[1, 2]], reference) == 1.0  # a shorter run
    assert end_to_end_gpu.same_share([[1]], []) is None


def test_lists_of_versions_are_not_taken_for_prose() -> None:
    prose = "This package reads the files of the old format and writes the new one. " * 40
    assert installed_prose.is_prose(prose)
    assert not installed_prose.is_prose(prose[:200])
    assert not installed_prose.is_prose("numpy==2.1.3; the >= 3.11\n" * 100)


@pytest.mark.slow
def test_the_end_to_end_benchmark_runs_to_its_end_and_keeps_what_is_there(
    run_script: Callable[..., None], tmp_path: Path
) -> None:
    path, work = tmp_path / "end.json", tmp_path / "work"
    run_script(end_to_end_gpu, "--work", str(work), "--json", str(path))
    first = json.loads(path.read_text())
    trained = (work / "model" / "training.json").stat().st_mtime_ns
    assert [r["arm"] for r in first["rows"]] == [
        *("resident", "on-demand", "prefetch-next-router", "prefetch-trained"),
        *("prefetch-trained-all", "prefetch-readout", "prefetch-readout-all"),
        *("eager-lru", "eager-no-cache"),
        *("on-demand", "prefetch-next-router", "prefetch-trained", "accelerate"),
    ]
    assert all(r["same_tokens"] == 1 for r in first["rows"])  # one arithmetic on a CPU
    assert first["recall_at_k"].keys() >= {"previous-token", "next-router"}
    assert first["readout_recall_at_k"].keys() >= {"previous-token", "next-router"}
    run_script(end_to_end_gpu, "--work", str(work), "--json", str(path), "--minutes", "0")
    assert (work / "model" / "training.json").stat().st_mtime_ns == trained
    second = json.loads(path.read_text())
    assert second["recall_at_k"] == first["recall_at_k"]
    assert second["rows"] == []
    assert len(second["skipped"]) == len(first["rows"])

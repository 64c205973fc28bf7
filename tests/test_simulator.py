"""Replays: hand-worked times, bounds, readers, and that prefetch in pieces does not lose."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from foreroute.data.collect import collect_traces
from foreroute.data.routes import ReadOptions, Route, read_route
from foreroute.estimators import EstimatorStack
from foreroute.export.bundle import PairEntry, save_bundle
from foreroute.runtime import cli
from foreroute.runtime.planning.machine import find_profile
from foreroute.runtime.policies import LayerState, PrefetchRule, find_policy
from foreroute.runtime.policies.prefetching import READOUT_SHARE
from foreroute.runtime.simulator import (
    LinkTimes,
    Predictions,
    Scenario,
    SimulatedPredictor,
    bounds,
    simulate,
    timeline,
)
from foreroute.runtime.simulator.cli import SimulateRequest, _expert_bytes, foretold_by_bundle
from foreroute.runtime.simulator.replay import Replay

TIMES = LinkTimes(
    layer_ms=1.0,
    token_ms=0.5,
    predict_ms=0.0,
    demand_ms=(0.0, 2.0, 4.0),
    pieces=4,
    piece_ms=0.5,
)
TIMES_OF_FOUR = dataclasses.replace(TIMES, demand_ms=(0.0, 2.0, 4.0, 6.0, 8.0))


def route_of(ids: list[list[list[int]]], num_experts: int = 6, prompt: int = 0) -> Route:
    array = np.array(ids, dtype=np.int16)
    return Route(
        name="hand-made",
        expert_ids=array,
        is_decode=np.arange(len(array)) >= prompt,
        num_experts=num_experts,
    )


def random_route(
    seed: int, steps: int = 80, layers: int = 8, experts: int = 32, top_k: int = 4
) -> Route:
    """Liked experts by layer, half of a token's taken over from the one before."""
    rng = np.random.default_rng(seed)
    liking = rng.gumbel(size=(layers, experts)) * rng.uniform(0.5, 2.0)
    ids = np.zeros((steps, layers, top_k), dtype=np.int16)
    for step in range(steps):
        keys = liking + rng.gumbel(size=(layers, experts))
        if step:
            np.put_along_axis(keys, ids[step - 1, :, : top_k // 2].astype(int), 99.0, axis=1)
        ids[step] = np.argsort(-keys, axis=1)[:, :top_k]
    is_decode = np.arange(steps) >= steps // 5
    return Route(name=f"seed {seed}", expert_ids=ids, is_decode=is_decode, num_experts=experts)


def scenario_of(route: Route, times: LinkTimes = TIMES, **more: object) -> Scenario:
    return Scenario(route=route, times=times, expert_bytes=100, **more)  # type: ignore[arg-type]


def test_on_demand_time_is_compute_plus_copies() -> None:
    # token 0 misses 0, 1 | 2, 3; token 1 finds 0, 1 and misses 4 beside 2 with 2 slots
    route = route_of([[[0, 1], [2, 3]], [[0, 1], [2, 4]]])
    row = simulate(scenario_of(route), eviction="lru", slots="2")
    # (1 + 4 + 1 + 4 + 0.5) + (1 + 1 + 2 + 0.5) over 2 tokens
    assert row.tpot_ms == pytest.approx((10.5 + 4.5) / 2)
    assert row.hit_rate == pytest.approx(3 / 8)
    assert row.bytes_per_token == pytest.approx(5 * 100 / 2)
    assert row.stall_ms == pytest.approx(10 / 2)


def test_prefetching_all_waits_for_everything_predicted() -> None:
    route = route_of([[[0, 1], [2, 3]]])
    right = SimulatedPredictor(recall=1.0).predict(route, 1)
    row = simulate(scenario_of(route, predictions=right), eviction="lru", prefetch="all", slots="2")
    # layer 0: 4 ms on demand, then 4 ms of copies beside 1 ms of compute; layer 1: 1 ms
    assert row.tpot_ms == pytest.approx(4 + 4 + 1 + 0.5)
    assert row.hit_rate == pytest.approx(0.5)


def test_prefetch_in_pieces_uses_only_the_time_the_link_would_idle() -> None:
    route = route_of([[[0, 1], [2, 3]]])
    right = SimulatedPredictor(recall=1.0).predict(route, 1)
    scenario = scenario_of(route, predictions=right)
    row = simulate(scenario, eviction="lru", prefetch="pieces", slots="2")
    # 1 ms of compute hides 2 of the first expert's 4 pieces: 1.5 experts are left, 3 ms
    assert row.tpot_ms == pytest.approx(4 + 1 + 3 + 1 + 0.5)
    assert row.late_per_token == 1
    assert row.bytes_per_token == pytest.approx(400)


def test_bounds_are_not_passed() -> None:
    route = random_route(0)
    scenario = scenario_of(route, dataclasses.replace(TIMES, demand_ms=(0, 2, 4, 6, 8)))
    belady, infinite = bounds(scenario, "30%")
    for policy in ("lru", "lfu", "lrfu", "default", "static"):
        row = simulate(scenario, eviction=policy, slots="30%")
        assert infinite.tpot_ms < belady.tpot_ms <= row.tpot_ms
        assert belady.hit_rate >= row.hit_rate
    assert infinite.tpot_ms == pytest.approx(8.5)


def test_bytes_are_fetched_prefetched_and_wasted_consistently() -> None:
    route = random_route(1)
    wrong = SimulatedPredictor(recall=0.5, errors="uniform").predict(route, 2)
    scenario = scenario_of(route, _times(0), predictions=wrong)
    for prefetch in ("all", "pieces"):
        row = simulate(scenario, eviction="default", prefetch=prefetch, horizon=2, slots="25%")
        assert (row.wasted_bytes_per_token > 0) == (prefetch == "all")
        assert row.wasted_bytes_per_token < row.bytes_per_token
        assert 0 < row.hit_rate < 1


def test_the_gpus_rule_fetches_the_head_early_and_the_tail_on_demand() -> None:
    route = route_of([[[0, 1], [2, 3]]])
    right = SimulatedPredictor(recall=1.0).predict(route, 1)
    scenario = scenario_of(route, predictions=right)
    row = simulate(scenario, eviction="lru", prefetch="head", slots="2")
    # 1 ms of compute is half an expert: the tail and the other one take 1.5 x 2 ms
    assert row.tpot_ms == pytest.approx(4 + 1 + 3 + 1 + 0.5)
    assert row.bytes_per_token == pytest.approx(400)
    assert row.late_per_token == 1


def test_a_wrong_head_costs_no_time_beyond_its_window() -> None:
    route = route_of([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    wrong = Predictions(
        expert_ids=np.full((1, 2, 2, 1), 5, dtype=np.int16),
        confidence=np.ones((1, 2, 2, 1), dtype=np.float32),
    )
    scenario = scenario_of(route, predictions=wrong)
    demand = simulate(scenario, eviction="lru", slots="3")
    row = simulate(scenario, eviction="lru", prefetch="head", slots="3")
    assert row.tpot_ms == pytest.approx(demand.tpot_ms)
    assert row.wasted_bytes_per_token == pytest.approx(50)


@pytest.mark.parametrize("prefetch", ["all", "head", "pieces"])
def test_predicting_costs_each_layer_but_the_last_what_the_machine_says(prefetch: str) -> None:
    route = route_of([[[0, 1], [2, 3]]] * 2, prompt=1)
    said = SimulatedPredictor(recall=1.0).predict(route, 1)
    slow = dataclasses.replace(TIMES, ahead_ms=0.25)
    row = simulate(
        scenario_of(route, slow, predictions=said), eviction="lru", prefetch=prefetch, slots="2"
    )
    assert row.tpot_ms == pytest.approx(2 * 1 + 0.25 + 0.5)


def test_the_fixed_part_of_a_fetch_is_not_shared_out_to_a_tail() -> None:
    times = np.array([0.0, 2.0, 3.5])
    assert timeline.copy_ms(times, 0.0, 0.5) == 0
    assert timeline.copy_ms(times, 0.4, 0.0) == pytest.approx(0.8)
    assert timeline.copy_ms(times, 0.4, 0.5) == pytest.approx(0.5 + 0.4 * 1.5)
    assert timeline.copy_ms(times, 1.4, 0.5) == pytest.approx(2.0 + 0.4 * 1.5)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu", "default", "static"])
def test_replays_evict_as_the_engines_state_does(policy: str) -> None:
    route, rule = random_route(11), find_policy(policy)
    replay = Replay(route, TIMES_OF_FOUR, rule, [9] * route.num_layers)
    replay.run()
    for layer in range(route.num_layers):
        state = LayerState(rule, route.num_experts, 9)
        rows = [tuple(ids) for ids in route.expert_ids[:, layer].tolist()]
        decode = int(route.is_decode.argmax())
        state.warm(rows[:decode])
        for ids in rows[decode:]:
            state.demand(ids)
        held = replay.cache.expert_in[9 * layer : 9 * layer + 9] - layer * route.num_experts
        assert held.tolist() == state.expert_in


def test_replays_decide_as_the_prefetch_rule_does() -> None:
    rng = np.random.default_rng(0)
    for numbers in rng.random((200, 4)):
        assert timeline.is_worth(*numbers) == PrefetchRule.is_worth(*numbers)
        assert timeline.may_overhang(*numbers) == PrefetchRule.may_overhang(*numbers)


@pytest.mark.parametrize(
    ("prefetch", "horizon", "hits", "tpot_ms"),
    [
        ("none", 1, 0.8716796875, 16.71250),
        ("all", 2, 0.9455078125, 14.86250),
        ("head", 1, 0.8693359375, 14.16250),
        ("pieces", 4, 0.91953125, 12.80000),
    ],
)
def test_replays_give_what_they_always_gave(
    prefetch: str, horizon: int, hits: float, tpot_ms: float
) -> None:
    route = random_route(12, steps=200)
    said = SimulatedPredictor(seed=3).predict(route, 4)
    scenario = scenario_of(route, TIMES_OF_FOUR, predictions=said)
    row = simulate(scenario, eviction="default", prefetch=prefetch, horizon=horizon, slots="30%")
    assert row.hit_rate == pytest.approx(hits, abs=1e-6)
    assert row.tpot_ms == pytest.approx(tpot_ms, abs=1e-4)


def _times(seed: int) -> LinkTimes:
    dice = random.Random(seed)
    copy, latency = 10 ** dice.uniform(-1.5, 0.5), dice.uniform(0, 0.1)
    pieces = dice.choice((1, 2, 4, 9, 32))
    return LinkTimes(
        layer_ms=10 ** dice.uniform(-1.5, 0),
        token_ms=0.0,
        predict_ms=dice.choice((0.0, 0.01)),
        demand_ms=(0.0, *(latency + n * copy for n in range(1, 5))),
        pieces=pieces,
        piece_ms=copy * dice.uniform(1.0, 1.2) / pieces,
    )


def test_prefetch_in_pieces_with_calibrated_confidence_does_not_lose() -> None:
    ratios = []
    for seed in range(60):
        dice = random.Random(seed)
        route = random_route(seed)
        horizon = dice.randint(1, 4)
        predictor = SimulatedPredictor(
            recall=dice.uniform(0.2, 1.0),
            errors=dice.choice(("near-miss", "uniform")),
            concentration=10 ** dice.uniform(-0.5, 1.5),
            seed=seed,
        )
        scenario = scenario_of(route, _times(seed), predictions=predictor.predict(route, horizon))
        slots = dice.choice(("13%", "20%", "30%", "50%", "80%"))
        policy = dice.choice(("lru", "default"))
        demand = simulate(scenario, eviction=policy, slots=slots)
        early = simulate(scenario, eviction=policy, prefetch="pieces", horizon=horizon, slots=slots)
        ratios.append(early.tpot_ms / demand.tpot_ms)
    assert float(np.mean(ratios)) <= 1.01
    assert max(ratios) <= 1.03


def test_a_simulated_predictor_has_the_recall_and_calibration_it_says() -> None:
    route = random_route(3, steps=400)
    said = SimulatedPredictor(recall=0.8).predict(route, 3)
    assert said.recall(route) == pytest.approx([0.8, 0.752, 0.707], abs=0.02)
    for step in range(3):
        is_right = (said.expert_ids[step][..., None] == route.expert_ids[:, :, None]).any(-1)
        for low in (0.2, 0.5, 0.8):
            chosen = (said.confidence[step] > low) & (said.confidence[step] < low + 0.2)
            assert is_right[chosen].mean() == pytest.approx(
                said.confidence[step][chosen].mean(), abs=0.05
            )


def test_slots_shared_by_misses_keep_their_total() -> None:
    route = random_route(4)
    scenario = scenario_of(route, _times(1), layer_slots="by-misses")
    row = simulate(scenario, eviction="default", slots="25%")
    assert row.slots == 8


def test_belady_with_prefetch_and_missing_predictions_are_refused() -> None:
    scenario = scenario_of(random_route(5), _times(1))
    with pytest.raises(ValueError, match="needs predictions"):
        simulate(scenario, eviction="lru", prefetch="all")
    with pytest.raises(ValueError, match="bound"):
        simulate(scenario, eviction="belady", prefetch="all")


# readers

IDS = [[[0, 1], [2, 3]], [[1, 2], [0, 3]], [[0, 3], [1, 2]]]


def write_table(path: Path) -> None:
    lines = ["# n_expert=6", "turn,phase,step,layer,slot,expert,weight"]
    for step, token in enumerate(IDS):
        for layer, experts in enumerate(token):
            lines += [
                f"0,{int(step > 0)},{step},{layer},{i},{e},0.5" for i, e in enumerate(experts)
            ]
    path.write_text("\n".join(lines))


def write_activations(path: Path) -> None:
    lines = ["layer,expert"]
    for token in IDS:
        for layer, experts in enumerate(token):
            lines += [f"{layer},{expert}" for expert in experts]
    path.write_text("\n".join(lines))


def write_megatron(path: Path) -> None:
    records = [
        {"step": step, "block": "decoder", "layer": layer, "rank": 0, "top_indices": [experts]}
        for step, token in enumerate(IDS)
        for layer, experts in enumerate(token)
    ]
    path.write_text("\n".join(map(json.dumps, records)))


WRITERS = {
    "route.csv": write_table,
    "moe_trace.csv": write_activations,
    "router_trace_rank0.jsonl": write_megatron,
    "ids.npy": lambda path: np.save(path, np.array(IDS)),
    "ids.npz": lambda path: np.savez(path, routed_experts=np.array(IDS), other=np.zeros(3)),
    "ids.safetensors": lambda path: save_file({"routed_experts": torch.tensor(IDS)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_recording_is_read(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    route = read_route(tmp_path / name, ReadOptions(num_experts=6))
    assert route.expert_ids.tolist() == IDS
    assert route.num_experts == 6
    assert route.is_decode.tolist() == [name != "route.csv", True, True]


def test_llama_cpp_passes_of_many_tokens_are_a_prompt(tmp_path: Path) -> None:
    lines = ["0,1", "0,2", "0,3", "0,4", "1,0", "1,5"]  # two tokens; the last layer's second only
    lines += ["0,1", "0,2", "1,3", "1,4"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    route = read_route(tmp_path / "t.csv")
    assert route.expert_ids.tolist() == [[[1, 2], [-1, -1]], [[3, 4], [0, 5]], [[1, 2], [3, 4]]]
    assert route.is_decode.tolist() == [False, False, True]


def test_a_lost_row_does_not_change_how_many_experts_a_token_has(tmp_path: Path) -> None:
    write_activations(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join(lines[:3] + lines[4:]))
    with pytest.raises(ValueError, match=r"1 rows of layer 1 in a run, no multiple of 2"):
        read_route(tmp_path / "t.csv")


def test_unknown_recordings_are_refused_with_the_kinds_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"arrays .*megatron .*table .*llama\.cpp"):
        read_route(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError):
        read_route(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), "expected integers"),
        (np.zeros((2, 2, 2), dtype=int), "one expert twice"),
        (np.full((2, 2, 1), 40000), "outside"),
        (np.zeros((0, 2, 1), dtype=int), "no expert ids"),
    ],
)
def test_arrays_that_are_no_routing_are_refused(
    array: np.ndarray, message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ValueError, match=message):
        read_route(tmp_path / "ids.npy")


def test_the_command_prints_and_writes_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    route = random_route(6)
    np.save(tmp_path / "ids.npy", route.expert_ids)
    cli.simulate(
        tmp_path / "ids.npy",
        slots="25%",
        prefetch="none,pieces",
        horizon=2,
        num_experts=32,
        prompt_tokens=10,
        json=tmp_path / "rows.json",
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    wanted = {
        "eviction",
        "prefetch",
        "horizon",
        "slots",
        "hit_rate",
        "tpot_ms",
        "bytes_per_token",
        "wasted_bytes_per_token",
        "stall_ms",
    }
    assert wanted <= set(rows[0])
    assert len(rows) == 2 * 3 + 2
    assert capsys.readouterr().out.strip().endswith("rows.json")


@pytest.fixture(scope="module")
def rich_traces(tiny_moe: Any, text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Traces that hold what every kind of estimator reads."""
    return collect_traces(
        model=str(tiny_moe.folder),
        dataset=str(text_dataset),
        tokens=16 * 32,
        out=tmp_path_factory.mktemp("rich") / "traces",
        sequence_length=32,
        generated_share=0.5,
        record="readout,layer-input",
    )


@pytest.mark.parametrize(
    ("input_kind", "horizon"), [("quasi-hidden", 1), ("attention-readout", 1), ("pre-attention", 0)]
)
def test_bundles_of_every_kind_are_simulated_and_say_more_than_chance(
    rich_traces: Any, input_kind: Any, horizon: int, tmp_path: Path
) -> None:
    geometry, vectors = rich_traces.geometry, rich_traces.readout_vectors()
    settings = {"input_kind": input_kind, "horizon": horizon, "default_vectors": vectors}
    stack = EstimatorStack.training_free(geometry, rich_traces.anchors, **settings)
    entries = [
        PairEntry(
            source_layer=source,
            target_layer=target,
            form="next-router",
            recall_at_k=0.5,
            training_free_recall_at_k=0.5,
            budget=2,
        )
        for source, target in zip(stack.source_layers, stack.target_layers, strict=True)
    ]
    save_bundle(tmp_path, stack, entries, num_held_out_tokens=1, provenance={})
    route = read_route(rich_traces.folder)
    told = foretold_by_bundle(route, rich_traces.folder, tmp_path, 1)
    assert told.predictions is not None
    assert told.predictions.recall(told.route)[0] > 0.5  # the top 4 of 8 by chance
    shares = {"quasi-hidden": 0, "attention-readout": READOUT_SHARE, "pre-attention": 0.5}
    assert told.delay_share == shares[input_kind]
    times = LinkTimes.of(find_profile("h100-pcie5"), top_k=route.top_k).delayed(told.delay_share)
    scenario = Scenario(
        route=told.route, times=times, expert_bytes=10**6, predictions=told.predictions
    )
    assert simulate(scenario, eviction="lru", prefetch="head", slots="4").tpot_ms > 0


def test_heads_do_not_lose_with_few_slots_and_large_experts() -> None:
    ratios = []
    for seed in range(60):
        dice = random.Random(seed)
        experts, top_k, slots = dice.choice(((8, 2, 2), (8, 2, 4), (16, 2, 3), (32, 4, 8)))
        route = random_route(seed, experts=experts, top_k=top_k)
        copy_ms = 10 ** dice.uniform(0.5, 1.5)  # a layer computes for 3 % to 30 % of an expert
        times = dataclasses.replace(
            TIMES,
            demand_ms=tuple(n * copy_ms for n in range(top_k + 1)),
            piece_ms=copy_ms / TIMES.pieces,
        )
        predictor = SimulatedPredictor(
            recall=dice.uniform(0.5, 1.0), concentration=10 ** dice.uniform(-0.5, 1.5), seed=seed
        )
        scenario = scenario_of(route, times, predictions=predictor.predict(route, 1))
        demand = simulate(scenario, eviction="lrfu", slots=str(slots))
        early = simulate(scenario, eviction="lrfu", prefetch="head", slots=str(slots))
        ratios.append(early.tpot_ms / demand.tpot_ms)
    assert float(np.mean(ratios)) <= 1.0
    assert max(ratios) <= 1.01


def test_a_head_evicts_nobody_who_is_likelier_to_be_needed() -> None:
    route = route_of([[[0], [1]], [[0], [1]]], num_experts=3)
    half = Predictions(
        expert_ids=np.full((1, 2, 2, 1), 2, dtype=np.int16),
        confidence=np.full((1, 2, 2, 1), 0.5, dtype=np.float32),
    )
    scenario = scenario_of(route, predictions=half)  # a head is half an expert: 1/4 against 1/4
    demand = simulate(scenario, eviction="lru", slots="1")
    row = simulate(scenario, eviction="lru", prefetch="head", slots="1")
    assert row.hit_rate == demand.hit_rate == 0.5
    assert row.wasted_bytes_per_token == pytest.approx(50 / 2)  # the first found an empty slot


def test_unlikely_guesses_beside_a_likely_one_raise_no_fear() -> None:
    route = route_of([[[0], [1]], [[0], [1]]], num_experts=4)
    said = Predictions(
        expert_ids=np.tile(np.array([2, 3], dtype=np.int16), (1, 2, 2, 1)),
        confidence=np.tile(np.array([0.9, 0.1], dtype=np.float32), (1, 2, 2, 1)),
    )
    row = simulate(scenario_of(route, predictions=said), eviction="lru", prefetch="head", slots="1")
    assert row.wasted_bytes_per_token == pytest.approx(50)  # a head for each token, both wrong


def test_the_size_of_a_models_experts_follows_their_dtype(tmp_path):
    config = Qwen3MoeConfig(
        **{"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "dtype": "bfloat16"}
    )
    config.save_pretrained(tmp_path)
    given = dict.fromkeys(SimulateRequest.__dataclass_fields__) | {
        **{"slots": "25%", "eviction": "lru", "prefetch": "none", "on_miss": "fetch"},
        **{"layer_slots": "equal", "errors": "uniform", "expert_dtype": "auto"},
    }
    profile = find_profile("h100-pcie5")

    def size(**asked):
        return _expert_bytes(SimulateRequest(**(given | asked)), profile)

    plain = 3 * 128 * 128 * 2
    assert size(model=str(tmp_path), expert_dtype="bf16") == plain
    assert plain / 2 < size(model=str(tmp_path), expert_dtype="int8") < 0.6 * plain
    assert 0.75 * plain < size(model=str(tmp_path), expert_dtype="lossless") < 0.9 * plain
    assert size(model=str(tmp_path)) == size(model=str(tmp_path), expert_dtype="lossless")
    assert size() == profile.expert_bytes
    with pytest.raises(ValueError, match="needs --model"):
        size(expert_dtype="int8")
    with pytest.raises(ValueError, match="not both"):
        size(model=str(tmp_path), expert_bytes="3MiB")


def test_rules_on_a_miss_save_copies_on_recorded_scores(tiny_traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    rules = "fetch,substitute:2,threshold:0.4,substitute+budget:9.44MB"
    cli.simulate(routes=tiny_traces, slots="3", eviction="default", on_miss=rules, json=out)
    rows = {
        row["on_miss"]: row for row in json.loads(out.read_text())["rows"] if not row["is_bound"]
    }
    assert list(rows) == rules.split(",")
    exact = rows.pop("fetch")
    assert exact["agreement"] == 1
    for row in rows.values():
        assert row["agreement"] < 1
        assert row["bytes_per_token"] < exact["bytes_per_token"]
        assert row["tpot_ms"] < exact["tpot_ms"]
    budget = rows["substitute+budget:9.44MB"]
    assert 0 < budget["bytes_per_token"] <= 9_440_000
    for change, message in (
        ({"on_miss": "predicted"}, "is not simulated"),
        ({"on_miss": "skip:1", "prefetch": "all"}, "use --prefetch none"),
        ({"on_miss": "skip:1", "eviction": "belady"}, "a bound of exact runs"),
    ):
        with pytest.raises(ValueError, match=message):
            cli.simulate(**{"routes": tiny_traces, "slots": "3", **change})

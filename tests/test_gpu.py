"""On CUDA: pinned memory of exact size, copies on their own stream, exact at any slot count."""

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from tiny_images import image_prompt
from tiny_models import tiny_model
from torch import Tensor

from foreroute.data.adapters import discover, load_tokenizer
from foreroute.data.recorder import RoutingRecorder
from foreroute.estimators import EstimatorStack
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.device.decode_graph import SPARE_TOKENS, DecodeGraph, DecodeStep
from foreroute.runtime.device.driver import DeviceDriver
from foreroute.runtime.device.kernels.tables import ResidencyTables
from foreroute.runtime.driver import MOST_STEP_TOKENS
from foreroute.runtime.host.driver import HostDriver
from foreroute.runtime.host.ledger import TRIAL_STEPS
from foreroute.runtime.host.transfers import StreamTransfers
from foreroute.runtime.store.host_store import allocate_host
from foreroute.runtime.store.offload import OffloadedModel, offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
# Rounding of bfloat16 products summed in another order, through four layers.
STOCK_TOLERANCE = 0.06


@pytest.fixture(scope="module")
def offloaded(make_tiny_moe: Any) -> OffloadedModel:
    tiny = make_tiny_moe(
        hidden_size=128, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4
    )
    return offload(copy.deepcopy(tiny.model).to(torch.bfloat16), device=CUDA, model_name="tiny")


@pytest.fixture(scope="module")
def stock(make_tiny_moe: Any) -> Any:
    tiny = make_tiny_moe(
        hidden_size=128, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4
    )
    model = copy.deepcopy(tiny.model).to(torch.bfloat16).to(CUDA)
    model.set_experts_implementation("batched_mm")
    return model


def step_logits(model: Any, tokens: Tensor, steps: int) -> Tensor:
    """Logits of a prompt and of forced decode steps, [steps + 1, vocab]."""
    rows = []
    with torch.no_grad():
        output = model(input_ids=tokens[:, :-steps], use_cache=True, logits_to_keep=1)
        rows.append(output.logits[0, -1])
        for i in range(tokens.shape[1] - steps, tokens.shape[1]):
            cache = output.past_key_values
            output = model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1])
    return torch.stack(rows)


def prompt() -> Tensor:
    return torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(1)).to(CUDA)


def test_pinned_memory_has_exactly_the_size_asked_for() -> None:
    rows = allocate_host(3, 1_000_003, is_pinned=True)
    assert rows.is_pinned()
    assert rows.untyped_storage().nbytes() == 3 * 1_000_003


def test_copies_land_and_compute_waits_for_them() -> None:
    rows = allocate_host(4, 8_000_000, is_pinned=True)
    rows.random_(0, 255)
    slots = torch.zeros(4, 8_000_000, dtype=torch.uint8, device=CUDA)
    transfers = StreamTransfers(CUDA)
    for _ in range(5):
        slots.zero_()
        transfers.copy([(rows[i], slots[i]) for i in range(4)]).wait()
        assert torch.equal(slots.clone().cpu(), rows)


@pytest.mark.parametrize("prefetch", ["none", "auto"])
@pytest.mark.parametrize("slots", ["4", "6", "9"])
def test_any_slot_count_gives_the_all_resident_logits_bit_for_bit(
    offloaded: OffloadedModel, slots: str, prefetch: Any
) -> None:
    with Engine(offloaded, EngineConfig(expert_slots="100%", decide_on="host")) as engine:
        engine.fill_slots()
        expected = step_logits(engine, prompt(), steps=40)
        assert engine.stats().hit_rate == 1.0
    with Engine(
        offloaded, EngineConfig(expert_slots=slots, prefetch=prefetch, decide_on="host")
    ) as engine:
        assert torch.equal(step_logits(engine, prompt(), steps=40), expected)
        engine.check_integrity()
        assert engine.stats().decode.misses > 0
        stats = engine.stats()
    if prefetch == "auto":
        assert TRIAL_STEPS <= stats.steps_ahead <= stats.decode.forwards
    else:
        assert stats.steps_ahead == 0


def test_exact_mode_matches_stock_transformers(offloaded: OffloadedModel, stock: Any) -> None:
    expected = step_logits(stock, prompt(), steps=20).float()
    with Engine(
        offloaded, EngineConfig(expert_slots="5", prefetch="auto", decide_on="host")
    ) as engine:
        got = step_logits(engine, prompt(), steps=20).float()
    assert (got - expected).abs().max() <= STOCK_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {"on_miss": "skip"},
        {"on_miss": "predicted"},
        {"on_miss": "predicted:predicted-weights"},
        {"on_miss": "skip:0.9"},
        {"on_miss": "substitute:0.9"},
        {"on_miss": "substitute+threshold:0.4"},
        {"on_miss": "bonus:0.2", "exact_layers": "0"},
        {"on_miss": "substitute+budget:20kB"},
    ],
)
def test_speculative_modes_run_and_keep_the_slots_right(
    offloaded: OffloadedModel, settings: dict[str, Any]
) -> None:
    config = EngineConfig(expert_slots="6", prefetch="auto", agreement_floor=0.0, **settings)
    with Engine(offloaded, config) as engine:
        engine.generate(prompt(), max_new_tokens=30, do_sample=False, pad_token_id=0)
        engine.check_integrity()
        assert 0 < engine.stats().agreement < 1


def test_batches_run_with_fewer_slots_than_they_need(offloaded: OffloadedModel) -> None:
    tokens = torch.randint(3, 250, (8, 12), generator=torch.Generator().manual_seed(2))
    with Engine(
        offloaded, EngineConfig(expert_slots="4", prefetch="auto", decide_on="host")
    ) as engine:
        output = engine.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
        engine.check_integrity()
    assert output.shape[0] == 8


@pytest.mark.parametrize("prefetch", ["none", "auto"])
@pytest.mark.parametrize(
    "rule",
    [
        "substitute:0.9",
        "threshold:0.4",
        "bonus:0.2+substitute:0.5",
        "budget:20kB",
        "skip",
        "substitute:0.9+later",
        "predicted",
        "predicted:predicted-weights",
        "predicted+skip",
    ],
)
def test_a_rule_runs_in_the_graph_with_no_wait_of_the_host(
    offloaded: OffloadedModel, rule: str, prefetch: Any
) -> None:
    if "predicted" in rule and prefetch == "none":
        pytest.skip("nothing is predicted")
    config = EngineConfig(expert_slots="5", on_miss=rule, prefetch=prefetch, agreement_floor=0.0)
    with graph_engine(offloaded, config) as engine:
        graph = graph_for(engine, 1, 64)
        assert isinstance(graph, DecodeGraph)
        graph.begin(torch.ones(1, 1, dtype=torch.long, device=CUDA))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            token = torch.full((1,), 7, dtype=torch.long, device=CUDA)
            for _ in range(20):
                token = graph.replay(token).argmax(-1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stats = engine.stats()
        assert 0 < stats.agreement < 1
        if prefetch == "none":
            behind = stats.decode.fetched_bytes // offloaded.expert_bytes - stats.decode.misses
            assert (behind > 0) == config.rule.fetches_behind
        elif config.rule.needs_predictions:
            assert stats.steps_ahead == 20
        engine.check_integrity()


def graph_engine(offloaded: OffloadedModel, config: EngineConfig, stack: Any = None) -> Engine:
    engine = Engine(offloaded, config, stack)
    assert isinstance(engine.driver, DeviceDriver)
    return engine


def graph_for(engine: Engine, batch: int, length: int) -> DecodeStep:
    assert isinstance(engine.driver, DeviceDriver)
    return engine.driver.graph_for(batch, length)


def tables_of(engine: Engine) -> list[ResidencyTables]:
    layers: Any = engine.driver.layers
    return [layer.residency.tables for layer in layers]


def graph_logits(engine: Engine, tokens: Tensor, steps: int) -> Tensor:
    """Logits of forced decode steps by replays of the captured graph, [steps, vocab]."""
    graph = graph_for(engine, len(tokens), tokens.shape[1])
    prompt_ids = tokens[:, :-steps]
    graph.begin(torch.ones_like(prompt_ids))
    engine(input_ids=prompt_ids, past_key_values=graph.cache, use_cache=True)
    return torch.stack(
        [graph.replay(tokens[:, i])[0].clone() for i in range(prompt_ids.shape[1], tokens.shape[1])]
    )


@pytest.mark.parametrize(
    "prefetch",
    ["none", "all", "auto"],
)
@pytest.mark.parametrize("slots", ["4", "6", "9"])
def test_graph_gives_the_all_resident_logits_bit_for_bit_at_any_slot_count(
    offloaded: OffloadedModel, slots: str, prefetch: Any
) -> None:
    with graph_engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
        engine.fill_slots()
        expected = graph_logits(engine, prompt(), steps=40)
        assert engine.stats().hit_rate == 1.0
    config = EngineConfig(expert_slots=slots, prefetch=prefetch)
    with graph_engine(offloaded, config) as engine:
        assert torch.equal(graph_logits(engine, prompt(), steps=40), expected)
        engine.check_integrity()
        stats = engine.stats()
    assert stats.decode.misses > 0
    assert (stats.decode.prefetches > 0) == (prefetch != "none")
    assert (stats.share_ahead > 0) == (prefetch != "none")


def test_graph_matches_stock_transformers(offloaded: OffloadedModel, stock: Any) -> None:
    expected = step_logits(stock, prompt(), steps=20)[1:].float()
    with graph_engine(offloaded, EngineConfig(expert_slots="6")) as engine:
        got = graph_logits(engine, prompt(), steps=20).float()
    assert (got - expected).abs().max() <= STOCK_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("slots", ["6", "13"])
def test_batches_that_look_ahead_give_the_all_resident_logits_bit_for_bit(
    offloaded: OffloadedModel, slots: str
) -> None:
    tokens = torch.cat([prompt().roll(shift, dims=1) for shift in (0, 7, 19)])
    with graph_engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
        engine.fill_slots()
        expected = graph_logits(engine, tokens, steps=40)
    config = EngineConfig(expert_slots=slots, prefetch="auto")
    with graph_engine(offloaded, config) as engine:
        assert torch.equal(graph_logits(engine, tokens, steps=40), expected)
        engine.check_integrity()
        assert engine.stats().decode.misses > 0


def test_joined_launches_are_as_near_to_float32_as_separate_ones(
    offloaded: OffloadedModel, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = step_logits(copy.deepcopy(stock).float(), prompt(), steps=20)[1:]
    errors = {}
    for defers in (True, False):
        monkeypatch.setattr(DecodeStep, "defers", defers)
        with graph_engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
            engine.fill_slots()
            errors[defers] = (graph_logits(engine, prompt(), steps=20).float() - exact).norm()
            fused = graph_for(engine, 1, 60).fused
        assert (fused["plans in routers"] == len(offloaded.moe.layers)) == defers
    # both round where bfloat16 rounds; sums in another order are as good as those before
    assert errors[True] <= 1.25 * errors[False]


@pytest.mark.parametrize("batch", [1, 3])
def test_graph_generates_what_the_kernels_generate_step_by_step(
    offloaded: OffloadedModel, batch: int
) -> None:
    tokens = prompt().repeat(batch, 1)[:, :20]
    tokens[1:] = tokens[1:].flip(1)
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    if batch > 1:
        mask[0, :6] = 0
    with graph_engine(offloaded, EngineConfig(expert_slots="6", prefetch="auto")) as engine:
        got = engine.generate(tokens, attention_mask=mask, **settings)
        again = engine.generate(tokens, attention_mask=mask, **settings)
        engine.check_integrity()
        times = list(engine.stats().token_ms)
        plain = engine.model.generate(tokens, attention_mask=mask, **settings)
    assert torch.equal(got, again)
    assert len(times) == 2 * 29  # the first token of each call is not counted
    agreement = (got[:, :30] == plain[:, :30]).float().mean()  # masked attention rounds otherwise
    assert agreement > 0.9


def test_a_decode_step_never_waits_for_the_host(offloaded: OffloadedModel) -> None:
    config = EngineConfig(expert_slots="6", prefetch="auto")
    with graph_engine(offloaded, config) as engine:
        graph = graph_for(engine, 1, 64)
        graph.begin(torch.ones(1, 4, dtype=torch.long, device=CUDA))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            token = torch.zeros(1, dtype=torch.long, device=CUDA)
            for _ in range(5):
                token = graph.replay(token).argmax(-1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_sampling_with_the_same_seed_gives_the_same_text(offloaded: OffloadedModel) -> None:
    with graph_engine(offloaded, EngineConfig(expert_slots="6")) as engine:
        outputs = []
        for _ in range(2):
            torch.manual_seed(3)
            outputs.append(
                engine.generate(prompt(), max_new_tokens=12, do_sample=True, pad_token_id=0)
            )
    assert torch.equal(*outputs)


def test_a_prompt_leaves_the_decode_working_set_in_place(offloaded: OffloadedModel) -> None:
    with graph_engine(offloaded, EngineConfig(expert_slots="6")) as engine:
        engine.generate(prompt(), max_new_tokens=20, do_sample=False, pad_token_id=0)
        before = [tables.expert_in.clone() for tables in tables_of(engine)]
        engine(input_ids=prompt().flip(1))
        after = [tables.expert_in for tables in tables_of(engine)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "olmoe", "deepseek_v3"])
def test_graph_matches_stock_for_other_architectures(model_type: str) -> None:
    windowed = {"sliding_window": 8} if model_type in ("gpt_oss", "mixtral") else {}
    model = tiny_model(model_type, **windowed)
    plain = copy.deepcopy(model).to(CUDA)
    tokens = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1)).to(CUDA)
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits[0, 20:]
    offloaded = offload(model, device=CUDA, model_name=model_type)
    with graph_engine(offloaded, EngineConfig(expert_slots="4", prefetch="auto")) as engine:
        got = graph_logits(engine, tokens, steps=20)
        engine.check_integrity()
    # float32 sums in another order
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_a_step_that_cannot_be_captured_runs_kernel_by_kernel_and_says_so(
    offloaded: OffloadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    config = EngineConfig(expert_slots="6", prefetch="auto")
    with graph_engine(offloaded, config) as engine:
        expected = engine.generate(prompt(), **settings)
        num_steps = engine.stats().decode.forwards
    norm = offloaded.moe.model.model.norm
    waiting = norm.register_forward_hook(lambda _, __, output: output.sum().item() and None)
    with graph_engine(offloaded, config) as engine:
        got = engine.generate(prompt(), **settings)
        engine.check_integrity()
        assert engine.stats().decode.forwards == num_steps >= 11
    waiting.remove()
    assert torch.equal(got, expected)
    assert "without a CUDA graph" in caplog.text


def test_a_prompts_last_uses_count_most_for_eviction(offloaded: OffloadedModel) -> None:
    with graph_engine(offloaded, EngineConfig(expert_slots="6")) as engine:
        layers: Any = engine.driver.layers
        residency = layers[0].residency
        residency.count_prompt(torch.tensor([[0, 1], [2, 1], [3, 4]], device=CUDA))
        score = residency.tables.score.tolist()
    assert score[0] < score[2] < score[3] == score[4]
    assert score[1] == pytest.approx(score[0] + score[2])
    assert score[5] == 0


def widened_logits(engine: Engine, tokens: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Logits of forced steps of so many tokens in turn, each giving its last one back."""
    driver: Any = engine.driver
    steps = [driver.step_for(width, tokens.shape[1] + SPARE_TOKENS) for width in (1, *widths)]
    assert all(step.is_captured for step in steps)
    at = 20
    steps[0].begin(torch.ones_like(tokens[:, :at]))
    engine(input_ids=tokens[:, :at], past_key_values=steps[0].cache, use_cache=True)
    rows = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in 3 * steps[1:]:
            rows.append(step.replay(tokens[:, at : at + step.width])[0].clone())
            step.crop(1)
            at += step.width - 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.cat(rows)


@pytest.mark.parametrize("prefetch", ["none", "auto"])
@pytest.mark.parametrize("slots", ["4", "9"])
def test_steps_of_several_tokens_give_the_all_resident_logits_bit_for_bit(
    offloaded: OffloadedModel, stock: Any, slots: str, prefetch: Any
) -> None:
    widths = (3, MOST_STEP_TOKENS)
    with graph_engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
        engine.fill_slots()
        expected = widened_logits(engine, prompt(), widths)
    with graph_engine(offloaded, EngineConfig(expert_slots=slots, prefetch=prefetch)) as engine:
        assert torch.equal(widened_logits(engine, prompt(), widths), expected)
        engine.check_integrity()
        stats = engine.stats()
    assert (stats.decode.forwards, stats.steps_ahead) == (6, 0)
    assert stats.decode.misses > 0
    with torch.no_grad():
        plain = stock(input_ids=prompt()).logits[0, 20 : 20 + widths[0]].float()
    got = expected[: widths[0]].float()
    assert (got - plain).abs().max() <= STOCK_TOLERANCE * plain.abs().max()


class StopsAtThree:
    """A streamer that somebody interrupts."""

    puts = 0

    def put(self, value: Tensor) -> None:
        self.puts += 1
        if self.puts == 3:
            raise KeyboardInterrupt

    def end(self) -> None: ...


@pytest.mark.parametrize("prefetch", ["none", "auto"])
def test_assisted_decoding_replays_graphs_and_gives_the_tokens_of_plain_decoding(
    prefetch: Any,
) -> None:
    model = tiny_model("qwen3_moe").eval()  # float32: steps of any width round alike enough
    assistant = copy.deepcopy(model).to(CUDA)  # every draft is right
    assistant.generation_config.num_assistant_tokens = 5
    plain = copy.deepcopy(model).to(CUDA)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7]], device=CUDA)
    given: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    stocks = plain.generate(tokens, **given)
    drafts = ({"prompt_lookup_num_tokens": 5}, {"assistant_model": assistant})
    config = EngineConfig(expert_slots="4", prefetch=prefetch)
    with graph_engine(offload(model, device=CUDA, model_name="tiny"), config) as engine:
        expected = engine.generate(tokens, **given)
        assert torch.equal(expected, stocks)
        driver: Any = engine.driver
        for helper in drafts:
            engine.reset_stats()
            assert torch.equal(engine.generate(tokens, **given, **helper), expected)
            engine.check_integrity()
            stats = engine.stats()
            assert stats.prefill.forwards == 1
            assert 0 < stats.decode.forwards < 39
            assert len(stats.token_ms) == 39
            assert stats.steps_ahead == 0
            assert all(step.is_captured for step in driver._steps.values())
            assert max(driver._steps) > 1
            with pytest.raises(KeyboardInterrupt):
                engine.generate(tokens, streamer=StopsAtThree(), **given, **helper)
            engine.check_integrity()
            assert torch.equal(engine.generate(tokens, **given, **helper), expected)
        assert torch.equal(engine.generate(tokens, **given), expected)


@pytest.mark.parametrize("rule", ["skip", "substitute:0.9+later", "predicted+skip"])
def test_steps_of_several_tokens_are_captured_under_rules_that_fetch_behind(
    offloaded: OffloadedModel, rule: str
) -> None:
    config = EngineConfig(expert_slots="5", on_miss=rule, prefetch="auto", agreement_floor=0.0)
    with graph_engine(offloaded, config) as engine:
        driver: Any = engine.driver
        assert all(driver.step_for(width, 64).is_captured for width in (1, 2, 4))
        engine.check_integrity()


def test_capturing_a_step_teaches_eviction_nothing(offloaded: OffloadedModel) -> None:
    config = EngineConfig(expert_slots="6", prefetch="auto")
    with graph_engine(offloaded, config) as engine:
        graph_for(engine, 1, 64)
        assert all(not tables.score.any() for tables in tables_of(engine))
        assert all(not tables.step.any() for tables in tables_of(engine))
        assert engine.stats().decode.lookups == 0


def readout_stack(offloaded: OffloadedModel, input_kind: Any = "attention-readout") -> Any:
    geometry, anchors = offloaded.moe.geometry, offloaded.moe.anchors
    shape = (geometry.num_layers, geometry.num_experts, geometry.hidden_size)
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    horizon = int(input_kind != "pre-attention")
    settings = {"horizon": horizon, "input_kind": input_kind, "default_vectors": vectors}
    return EstimatorStack.training_free(geometry, anchors, **settings)


@pytest.mark.parametrize("prefetch", ["all", "auto"])
@pytest.mark.parametrize("slots", ["4", "9"])
def test_graph_with_attentions_run_early_gives_the_all_resident_logits_bit_for_bit(
    offloaded: OffloadedModel, slots: str, prefetch: Any
) -> None:
    with graph_engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
        engine.fill_slots()
        expected = graph_logits(engine, prompt(), steps=40)
    config = EngineConfig(expert_slots=slots, prefetch=prefetch)
    with graph_engine(offloaded, config, readout_stack(offloaded)) as engine:
        for _ in range(3):  # an order that is not kept need not show at once
            assert torch.equal(graph_logits(engine, prompt(), steps=40), expected)
        engine.check_integrity()
        assert engine.stats().decode.prefetches > 0 or prefetch == "auto"


def test_graph_with_attentions_run_early_predicts_as_well_as_the_host(
    offloaded: OffloadedModel,
) -> None:
    wasted = {}
    for decide_on in ("auto", "host"):
        config = EngineConfig(expert_slots="50%", prefetch="all", decide_on=decide_on)
        with Engine(offloaded, config, readout_stack(offloaded)) as engine:
            engine.generate(prompt(), max_new_tokens=60, do_sample=False, pad_token_id=0)
            decode = engine.stats().decode
        wasted[decide_on] = decode.wasted_bytes / decode.prefetched_bytes
    assert wasted["auto"] == pytest.approx(wasted["host"], abs=0.1)


def test_the_device_predicts_from_the_routers_input_where_the_experts_read_another() -> None:
    offloaded = offload(tiny_model("gemma4_text"), device=CUDA, model_name="gemma4_text")
    moe = offloaded.moe
    stack = EstimatorStack.training_free(moe.geometry, moe.anchors, input_kind="router-input")
    config = EngineConfig(expert_slots="4", prefetch="all")
    with graph_engine(offloaded, config, stack) as engine:
        run: Any = engine.driver.run
        predict, seen = run.predictor.predict, []

        def watched(source: int, *, router_input: Tensor, **states: Any) -> Any:
            seen.append((source, router_input.clone()))
            return predict(source, router_input=router_input, **states)

        run.predictor.predict = watched
        tokens = torch.arange(3, 13, device=CUDA).unsqueeze(0)
        cache = engine(input_ids=tokens[:, :9], use_cache=True).past_key_values
        with RoutingRecorder(moe) as recorder:
            engine(input_ids=tokens[:, 9:], past_key_values=cache, use_cache=True)
            records = recorder.take()
        torch.cuda.synchronize()
    assert len(seen) == len(stack.source_layers)
    assert all(torch.equal(state, records[source].router_input.to(CUDA)) for source, state in seen)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "glm4v_moe", "gemma4", "deepseek_ocr2"])
def test_a_graph_decodes_what_stock_writes_after_an_image(model_type: str) -> None:
    model = tiny_model(model_type)
    tokens, image = image_prompt(model)
    model.set_experts_implementation("batched_mm")
    stock = copy.deepcopy(model).to(CUDA)
    tokens, image = tokens.to(CUDA), {name: tensor.to(CUDA) for name, tensor in image.items()}
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, **image}
    settings |= {"do_sample": False, "pad_token_id": 0}
    expected = stock.generate(tokens, **settings)
    offloaded = offload(model, device=CUDA, model_name=model_type)
    with graph_engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        assert torch.equal(engine.generate(tokens, **settings), expected)
        driver: Any = engine.driver
        assert isinstance(driver._graph, DecodeGraph)
        engine.check_integrity()


def test_an_engine_on_demand_records_the_routing_of_the_whole_model() -> None:
    model = tiny_model("qwen3_moe")
    tokens = torch.randint(3, 60, (4, 40), generator=torch.Generator().manual_seed(1)).to(CUDA)
    whole = discover(copy.deepcopy(model).to(CUDA))
    with torch.no_grad(), RoutingRecorder(whole) as recorder:
        whole.model(input_ids=tokens)
        expected, expected_sums = recorder.take(), recorder.take_expert_sums()
    offloaded = offload(model, device=CUDA, model_name="qwen3_moe")
    with graph_engine(offloaded, EngineConfig(expert_slots="2")) as engine:
        with RoutingRecorder(offloaded.moe) as recorder:
            engine(input_ids=tokens)
            records, sums = recorder.take(), recorder.take_expert_sums()
        engine.check_integrity()
    for layer_idx, record in expected.items():
        assert torch.equal(records[layer_idx].expert_ids, record.expert_ids)
        torch.testing.assert_close(records[layer_idx].residual, record.residual)
        # added after the down projection, not before it: float32 rounding
        torch.testing.assert_close(
            sums[layer_idx][0], expected_sums[layer_idx][0], atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "deepseek_v3"])
def test_early_attentions_change_nothing_of_other_architectures(model_type: str) -> None:
    windowed = {"sliding_window": 8} if model_type in ("gpt_oss", "mixtral") else {}
    model = tiny_model(model_type, **windowed, num_hidden_layers=4)
    tokens = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1)).to(CUDA)
    offloaded = offload(model, device=CUDA, model_name=model_type)
    with graph_engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        expected = graph_logits(engine, tokens, steps=20)
    config = EngineConfig(expert_slots="4", prefetch="all")
    with graph_engine(offloaded, config, readout_stack(offloaded)) as engine:
        assert torch.equal(graph_logits(engine, tokens, steps=20), expected)
        assert engine.stats().decode.prefetches > 0


def test_a_step_that_runs_attentions_early_never_waits_for_the_host(
    offloaded: OffloadedModel,
) -> None:
    config = EngineConfig(expert_slots="6", prefetch="auto")
    with graph_engine(offloaded, config, readout_stack(offloaded)) as engine:
        graph = graph_for(engine, 1, 64)
        assert isinstance(graph, DecodeGraph)  # it could be captured
        graph.begin(torch.ones(1, 4, dtype=torch.long, device=CUDA))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            token = torch.zeros(1, dtype=torch.long, device=CUDA)
            for _ in range(5):
                token = graph.replay(token).argmax(-1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_pre_attention_estimators_are_run_by_the_host(offloaded: OffloadedModel) -> None:
    stack = readout_stack(offloaded, "pre-attention")
    config = EngineConfig(expert_slots="6", prefetch="all")
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with Engine(offloaded, EngineConfig(expert_slots="6", decide_on="host")) as engine:
        expected = engine.generate(prompt(), **settings)
    with Engine(offloaded, config, stack) as engine:
        assert isinstance(engine.driver, HostDriver)
        assert torch.equal(engine.generate(prompt(), **settings), expected)


@pytest.mark.parametrize("expert_dtype", ["fp8", "int8", "int4"])
def test_graph_decodes_experts_in_fewer_bits(make_tiny_moe: Any, expert_dtype: str) -> None:
    tiny = make_tiny_moe(
        hidden_size=128, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4
    )
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)
    offloaded = offload(model, device=CUDA, model_name="tiny", expert_dtype=expert_dtype)
    with Engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
        assert isinstance(engine.driver, DeviceDriver)
        engine.fill_slots()
        expected = graph_logits(engine, prompt(), steps=30)
    with graph_engine(offloaded, EngineConfig(expert_slots="6", prefetch="auto")) as engine:
        assert torch.equal(graph_logits(engine, prompt(), steps=30), expected)
        engine.check_integrity()
        assert engine.stats().decode.misses > 0
    with Engine(offloaded, EngineConfig(expert_slots="6", decide_on="host")) as engine:
        by_host = step_logits(engine, prompt(), steps=30)[1:]
    difference = (by_host - expected).float().abs().amax(-1) / expected.float().abs().max()
    # the median step: where a router is near a tie, rounding chooses another expert
    assert difference.median() <= STOCK_TOLERANCE


def test_threads_are_answered_one_after_the_other(offloaded: OffloadedModel) -> None:
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompts = [prompt()[:, : 6 + i] for i in range(4)]
    with graph_engine(offloaded, EngineConfig(expert_slots="6")) as engine:
        expected = [engine.generate(tokens, **settings) for tokens in prompts]
        wrong: list[int] = []

        def ask(number: int) -> None:
            for _ in range(3):
                if not torch.equal(engine.generate(prompts[number], **settings), expected[number]):
                    wrong.append(number)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        engine.check_integrity()


def test_engines_leave_nothing_on_the_device() -> None:
    def bytes_left() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    left = []
    for _ in range(3):
        model = offload(tiny_model("qwen3_moe", dtype=torch.bfloat16), device=CUDA)
        config = EngineConfig(expert_slots="4", prefetch="all")
        with Engine(model, config) as engine:
            engine.generate(prompt()[:, :8] % 128, max_new_tokens=4, do_sample=False)
        del engine, model
        left.append(bytes_left())
    assert left[0] == left[1] == left[2]


def test_an_engine_made_under_inference_mode_decodes_in_its_graph() -> None:
    settings = {"max_new_tokens": 6, "do_sample": False}
    with torch.inference_mode():
        model = offload(tiny_model("qwen3_moe", dtype=torch.bfloat16), device=CUDA)
        engine = Engine(model, EngineConfig(expert_slots="4"))
        inside = engine.generate(prompt()[:, :8] % 128, **settings)
    with engine:
        assert torch.equal(engine.generate(prompt()[:, :8] % 128, **settings), inside)
        assert isinstance(engine.driver._graph, DecodeGraph)  # type: ignore[attr-defined]


def test_generation_ends_at_a_string(tiny_moe: Any) -> None:
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    tokens = prompt()[:, :8]
    settings = {"max_new_tokens": 12, "min_new_tokens": 1, "do_sample": False}
    with Engine.from_pretrained(str(tiny_moe.folder), device="cuda", expert_slots="4") as engine:
        whole = engine.generate(tokens, **settings)
        stop = tokenizer.decode(whole[0, 10:11])
        ended = engine.generate(tokens, stop_strings=[stop], tokenizer=tokenizer, **settings)
    assert ended.shape[1] <= 11
    assert torch.equal(ended, whole[:, : ended.shape[1]])


def test_an_adapter_is_heard_by_the_graph() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    tokens, settings = prompt()[:, :8] % 128, {"max_new_tokens": 8, "do_sample": False}
    lora = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    with Engine(offload(model, device=CUDA), EngineConfig(expert_slots="8")) as engine:
        plain = engine.generate(tokens, **settings)
        adapted = peft.get_peft_model(engine.model, lora)
        with_adapter = engine.generate(tokens, **settings)
        assert not torch.equal(with_adapter, plain)
        with adapted.disable_adapter():
            assert torch.equal(engine.generate(tokens, **settings), plain)


def test_experts_that_are_not_pinned_give_the_same_logits_bit_for_bit(make_tiny_moe: Any) -> None:
    """Half of the experts come through the staging area, inside the graph and without."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16}
    model = make_tiny_moe(**sizes, num_experts_per_tok=4).model
    found = []
    for pinned_memory in (None, "1KiB", "1MiB"):
        half = copy.deepcopy(model).to(torch.bfloat16)
        given = {"device": CUDA, "model_name": "tiny", "pinned_memory": pinned_memory}
        offloaded = offload(half, **given)
        share = offloaded.store.pins.budget
        assert (share is None) == (pinned_memory is None)
        for decide_on in ("auto", "host"):
            config = EngineConfig(expert_slots="5", decide_on=decide_on)
            with Engine(offloaded, config) as engine:
                logits = step_logits(engine, prompt(), steps=20)
                tokens = engine.generate(input_ids=prompt(), max_new_tokens=12, do_sample=False)
                engine.check_integrity()
            found.append((decide_on, logits, tokens))
    for decide_on, logits, tokens in found[2:]:
        expected = next(entry for entry in found if entry[0] == decide_on)
        assert torch.equal(logits, expected[1])
        assert torch.equal(tokens, expected[2])


def test_experts_too_narrow_for_grouped_products_read_prompts_all_the_same() -> None:
    """Slices of experts can be: CUDA multiplies groups of rows of whole 16 bytes alone."""
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=20)
    tokens = prompt() % 128
    found = []
    for slots in ("8", "4"):
        offloaded = offload(copy.deepcopy(model), device=CUDA)
        with Engine(offloaded, EngineConfig(expert_slots=slots)) as engine:
            found.append((engine(input_ids=tokens).logits, step_logits(engine, tokens, steps=6)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)

"""Whatever the slots, policy and prompts: exact modes give the stock model's bits."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TextIteratorStreamer

from foreroute.estimators import EstimatorStack
from foreroute.export.bundle import PairEntry, save_bundle
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.host import layer as layer_module
from foreroute.runtime.host.transfers import ImmediateTransfers
from foreroute.runtime.planning import slot_plan
from foreroute.runtime.policies.slots import RESERVE_BYTES, parse_slots
from foreroute.runtime.store.offload import OffloadedModel, offload

PROMPT_SHAPES = [(1, 1), (1, 17), (3, 5), (2, 40)]
EXACT = {
    "on-demand": {},
    "no-cache": {"cache": "none"},
    "prefetch": {"prefetch": "auto"},
    "prefetch-all": {"prefetch": "all"},
    "wide-prefetch": {"prefetch": "auto", "budget": 5},
    "lru": {"eviction": "lru", "warm_start": "none"},
    "lfu": {"eviction": "lfu", "prefetch": "auto"},
    "lrfu": {"eviction": "lrfu:5", "prefetch": "all"},
    "predicted": {"eviction": "predicted", "prefetch": "auto"},
    "static": {"eviction": "static"},
    "adaptive": {"eviction": "adaptive", "prefetch": "auto"},
}
SPECULATIVE = {
    "skip": {"on_miss": "skip"},
    "skip-with-prefetch": {"prefetch": "auto", "on_miss": "skip"},
    "true-weights": {"prefetch": "auto", "on_miss": "predicted"},
    "predicted-weights": {"prefetch": "auto", "on_miss": "predicted:predicted-weights"},
    "substitute": {"on_miss": "substitute:0.9"},
    "substitute-with-prefetch": {"prefetch": "all", "on_miss": "substitute:0.9+later"},
    "bonus": {"on_miss": "bonus:0.2+skip:0.9"},
    "threshold": {"on_miss": "substitute+threshold:0.45"},
    "budget": {"on_miss": "substitute+budget:8kB"},
}


@pytest.fixture
def hiding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if copies could hide behind compute, so that prefetch=auto is tried."""
    monkeypatch.setattr(ImmediateTransfers, "can_hide", True)


@pytest.fixture(scope="module")
def stock(tiny_moe: Any) -> Any:
    model = copy.deepcopy(tiny_moe.model)
    model.set_experts_implementation("batched_mm")
    return model


@pytest.fixture(scope="module")
def offloaded(tiny_moe: Any) -> OffloadedModel:
    return offload(copy.deepcopy(tiny_moe.model), device=torch.device("cpu"), model_name="tiny")


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy(model: Any, tokens: Tensor, count: int = 12, **kwargs: Any) -> Tensor:
    output: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    return output


@pytest.mark.usefixtures("hiding")
@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("slots", ["2", "5", "100%"])
def test_exact_modes_give_the_stock_logits_and_tokens_bit_for_bit(
    stock: Any, offloaded: OffloadedModel, mode: str, slots: str
) -> None:
    config = EngineConfig(expert_slots=slots, **EXACT[mode])
    for shape in PROMPT_SHAPES:
        tokens = prompt(*shape)
        with torch.no_grad():
            expected = stock(tokens).logits
        with Engine(offloaded, config) as engine:
            assert torch.equal(engine(tokens).logits, expected)
            assert torch.equal(greedy(engine, tokens), greedy(stock, tokens))
            engine.check_integrity()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_in_half_precision(tiny_moe: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_moe.model).to(dtype)
    model.set_experts_implementation("batched_mm")
    expected = greedy(model, prompt(2, 9))
    with Engine(
        offload(model, device=torch.device("cpu")), EngineConfig(expert_slots="3")
    ) as engine:
        assert torch.equal(greedy(engine, prompt(2, 9)), expected)


def test_exact_when_one_call_may_copy_only_a_few_experts(
    stock: Any, offloaded: OffloadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "GATHER_LIMIT_BYTES", 3 * offloaded.expert_bytes)
    tokens = prompt(2, 13)
    with torch.no_grad():
        expected = stock(tokens).logits
    for slots in ("2", "8"):
        with Engine(offloaded, EngineConfig(expert_slots=slots)) as engine:
            assert torch.equal(engine(tokens).logits, expected)


def test_exact_with_left_padding_and_sampling(stock: Any, offloaded: OffloadedModel) -> None:
    tokens = prompt(2, 10)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": True}
    torch.manual_seed(5)
    expected = stock.generate(tokens, **settings)
    with Engine(offloaded, EngineConfig(expert_slots="3")) as engine:
        torch.manual_seed(5)
        assert torch.equal(engine.generate(tokens, **settings), expected)


def test_exact_with_beam_search_and_several_returned_sequences(
    stock: Any, offloaded: OffloadedModel
) -> None:
    settings = {"num_beams": 3, "num_return_sequences": 2}
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        got = greedy(engine, prompt(1, 6), **settings)
    assert torch.equal(got, greedy(stock, prompt(1, 6), **settings))


def test_a_fixed_number_of_misses_by_hand(make_tiny_moe: Callable[..., Any]) -> None:
    """With every slot needed anew for each token, a token costs top-k copies in each layer."""
    tiny = make_tiny_moe(num_hidden_layers=2)
    model = offload(copy.deepcopy(tiny.model), device=torch.device("cpu"))
    with Engine(model, EngineConfig(expert_slots="2", cache="none")) as engine:
        greedy(engine, prompt(1, 4), count=6)
        decode = engine.stats().decode
    num_forwards = 5  # the first of six tokens comes from the prompt's forward pass
    assert decode.forwards == num_forwards
    assert decode.misses == decode.lookups == num_forwards * 2 * 2  # layers x top-k
    assert engine.stats().bytes_per_token == 2 * 2 * model.expert_bytes
    assert len(engine.stats().token_ms) == num_forwards
    assert len(engine.stats().ttft_ms) == 1


class Oracle(EstimatorStack):
    """Knows the next layer's experts, from a list made by running the model before."""

    def predict(self, source_layer: int, **_: Any) -> Tensor:
        target = self.target_of(source_layer)
        assert target is not None
        expected: Tensor = self.future[target].pop(0)
        return torch.zeros(len(expected), self.geometry.num_experts).scatter_(1, expected, 1.0)


def routed_decode_ids(tiny: Any, tokens: Tensor) -> dict[int, list[Tensor]]:
    ids: dict[int, list[Tensor]] = {layer.layer_idx: [] for layer in tiny.moe.layers}
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, output, idx=layer.layer_idx: ids[idx].append(output[2])
        )
        for layer in tiny.moe.layers
    ]
    before = tiny.model.get_experts_implementation()
    tiny.model.set_experts_implementation("batched_mm")
    greedy(tiny.model, tokens)
    tiny.model.set_experts_implementation(before)  # the model is shared with other tests
    for hook in hooks:
        hook.remove()
    return {idx: rows[1:] for idx, rows in ids.items()}  # without the prompt's


def make_oracle(tiny: Any, tokens: Tensor) -> Oracle:
    oracle = Oracle.training_free(tiny.moe.geometry, tiny.moe.anchors)
    oracle.future = routed_decode_ids(tiny, tokens)
    return oracle


def test_a_perfect_predictor_leaves_no_miss_after_the_first_layer(
    tiny_moe: Any, stock: Any, offloaded: OffloadedModel
) -> None:
    tokens = prompt(1, 8)
    config = EngineConfig(expert_slots="2", prefetch="all")
    with Engine(offloaded, config, make_oracle(tiny_moe, tokens)) as engine:
        assert torch.equal(greedy(engine, tokens), greedy(stock, tokens))
        decode = engine.stats().decode
    first_layer_lookups = decode.lookups // 4
    assert decode.misses <= first_layer_lookups
    assert decode.wasted_bytes == 0


def test_speculation_with_a_perfect_predictor_changes_no_token(
    tiny_moe: Any, stock: Any, offloaded: OffloadedModel
) -> None:
    tokens = prompt(1, 8)
    config = EngineConfig(expert_slots="2", prefetch="auto", on_miss="predicted")
    with Engine(offloaded, config, make_oracle(tiny_moe, tokens)) as engine:
        assert torch.equal(greedy(engine, tokens), greedy(stock, tokens))
        assert engine.stats().agreement == 1.0


def test_a_useless_predictor_still_gives_the_right_tokens(
    tiny_moe: Any, stock: Any, offloaded: OffloadedModel
) -> None:
    class Useless(EstimatorStack):
        def predict(self, source_layer: int, *, router_input: Tensor, **_: Any) -> Tensor:
            return torch.rand(len(router_input), 8)

    useless = Useless.training_free(tiny_moe.moe.geometry, tiny_moe.moe.anchors)
    config = EngineConfig(expert_slots="3", prefetch="all")
    with Engine(offloaded, config, useless) as engine:
        assert torch.equal(greedy(engine, prompt(2, 8)), greedy(stock, prompt(2, 8)))
        assert engine.stats().decode.wasted_bytes > 0


@pytest.mark.parametrize("mode", SPECULATIVE)
def test_speculative_modes_leave_the_prompt_exact_and_count_agreement(
    stock: Any, offloaded: OffloadedModel, mode: str
) -> None:
    tokens = prompt(2, 20)
    config = EngineConfig(expert_slots="4", agreement_floor=0.0, **SPECULATIVE[mode])
    with torch.no_grad():
        expected = stock(tokens).logits
    with Engine(offloaded, config) as engine:
        assert torch.equal(engine(tokens).logits, expected)
        greedy(engine, tokens)
        stats = engine.stats()
        engine.check_integrity()
    assert 0 < stats.agreement < 1
    assert not stats.is_speculation_off


def test_speculation_switches_itself_off_under_its_floor(
    offloaded: OffloadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(
        expert_slots="4", prefetch="auto", on_miss="predicted", agreement_floor=1.0
    )
    with Engine(offloaded, config) as engine:
        greedy(engine, prompt(1, 8), count=100)
        stats = engine.stats()
        before = stats.speculated_experts
        greedy(engine, prompt(1, 8))
    assert stats.is_speculation_off
    assert stats.speculated_experts == before
    assert "Speculative execution is off" in caplog.text


def test_a_bypassed_engine_fails_instead_of_giving_tokens(offloaded: OffloadedModel) -> None:
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        engine.model.set_experts_implementation("batched_mm")
        with pytest.raises(RuntimeError, match="do not go through foreroute"):
            greedy(engine, prompt(1, 4))
        engine.model.set_experts_implementation("foreroute")


def test_a_layer_that_computes_its_experts_elsewhere_is_named(offloaded: OffloadedModel) -> None:
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        block = engine.model.model.layers[2].mlp
        stock_forward = block.forward
        block.forward = lambda hidden: hidden  # a patch that never asks the experts
        try:
            with pytest.raises(RuntimeError, match=r"layers \[2\] did not run"):
                engine(prompt(1, 4))
        finally:
            block.forward = stock_forward


def test_closing_an_engine_leaves_no_hook_and_lets_another_attach(
    offloaded: OffloadedModel,
) -> None:
    model = offloaded.moe.model

    def num_hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    before = num_hooks()
    config = EngineConfig(expert_slots="4", prefetch="auto", on_miss="predicted")
    with Engine(offloaded, config) as engine:
        assert num_hooks() > before
        with pytest.raises(ValueError, match="attached to another engine"):
            Engine(offloaded, config)
        greedy(engine, prompt(1, 4))
    assert num_hooks() == before


def test_a_streamer_gets_the_text_that_generate_returns(
    offloaded: OffloadedModel, tiny_moe: Any
) -> None:
    from foreroute.data.adapters import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_moe.folder))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine:
        output = greedy(engine, prompt(1, 5), streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output[0, 5:])


def test_filled_slots_serve_every_lookup(offloaded: OffloadedModel) -> None:
    with Engine(offloaded, EngineConfig(expert_slots="100%")) as engine:
        engine.fill_slots()
        greedy(engine, prompt(1, 20))
        assert engine.stats().hit_rate == 1.0
        assert engine.stats().bytes_per_token == 0


@pytest.mark.parametrize(
    ("text", "slots"), [("25%", 8), ("8", 8), ("100%", 32), ("12.5%", 4), (" 32 ", 32)]
)
def test_slots_as_a_number_or_a_share(text: str, slots: int) -> None:
    assert parse_slots(text, num_experts=32, top_k=4) == slots


@pytest.mark.parametrize(
    ("text", "message"),
    [("33", "more than the 32"), ("5%", "fewer than the 4"), ("3", "fewer"), ("many", "number")],
)
def test_impossible_slots_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_slots(text, num_experts=32, top_k=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_miss": "pray"}, "known parts: fetch, predicted, bonus, skip"),
        ({"on_miss": "skip", "cache": "none"}, "needs slots that are kept"),
        ({"on_miss": "predicted"}, "give prefetch=auto or all"),
        ({"prefetch": "auto", "cache": "none"}, "use cache=keep"),
        ({"budget": 0}, "at least 1"),
        ({"agreement_floor": 2.0}, r"0\.\.1"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefetch": "auto", "budget": 9}, "more than the 8 experts"),
        ({"prefetch": "auto", "on_miss": "predicted", "budget": 1}, "at least that"),
    ],
)
def test_a_budget_that_does_not_fit_the_model_is_refused(
    offloaded: OffloadedModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(offloaded, EngineConfig(expert_slots="4", **settings))


def write_training_free_bundle(tiny: Any, folder: Path) -> Path:
    stack = EstimatorStack.training_free(tiny.moe.geometry, tiny.moe.anchors)
    pairs = [
        PairEntry(
            source_layer=source,
            target_layer=target,
            form="next-router",
            recall_at_k=0.5,
            training_free_recall_at_k=0.5,
            budget=tiny.moe.geometry.top_k,
        )
        for source, target in zip(stack.source_layers, stack.target_layers, strict=True)
    ]
    folder.mkdir()
    save_bundle(folder, stack, pairs, num_held_out_tokens=1, provenance={})
    return folder


@pytest.mark.usefixtures("hiding")
def test_from_pretrained_runs_a_folder_with_its_bundle(
    tiny_moe: Any, stock: Any, tmp_path: Path
) -> None:
    bundle = write_training_free_bundle(tiny_moe, tmp_path / "bundle")
    folder = str(tiny_moe.folder)
    with Engine.from_pretrained(folder, bundle=bundle, expert_slots="3", device="cpu") as engine:
        assert engine.config.prefetch == "auto"
        assert torch.equal(greedy(engine, prompt(2, 7)), greedy(stock, prompt(2, 7)))
        assert engine.stats().decode.prefetches > 0


def test_another_models_bundle_is_refused_and_both_are_named(
    tiny_moe: Any, make_tiny_moe: Callable[..., Any], tmp_path: Path
) -> None:
    other = make_tiny_moe(num_experts=16)
    bundle = write_training_free_bundle(other, tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"16 experts.*8 experts"):
        Engine.from_pretrained(str(tiny_moe.folder), bundle=bundle, device="cpu")


def write_route(folder: Path, steps: int = 40) -> Path:
    """Recorded routing for the tiny model: experts 6 and 7 much liked, but in the last layer."""
    dice = torch.Generator().manual_seed(0)
    liking = torch.tensor([1.0, 1, 1, 1, 1, 1, 20, 20]).expand(4, 8).clone()
    liking[3] = 1.0
    ids = [torch.multinomial(liking, 2, generator=dice) for _ in range(steps)]
    save_file({"routed_experts": torch.stack(ids)}, folder / "route.safetensors")
    return folder / "route.safetensors"


def test_a_recording_fills_the_slots_before_the_first_token(
    stock: Any, offloaded: OffloadedModel, tmp_path: Path
) -> None:
    config = EngineConfig(expert_slots="2", warm_start=str(write_route(tmp_path)))
    with Engine(offloaded, config) as engine:
        assert sorted(engine.driver.layers[0].residency.cache.resident) == [6, 7]
        engine.check_integrity()
        assert engine.stats().decode.lookups == 0
        assert torch.equal(greedy(engine, prompt(1, 9)), greedy(stock, prompt(1, 9)))


def test_slots_by_misses_go_to_the_layer_that_misses_more(
    stock: Any, offloaded: OffloadedModel, tmp_path: Path
) -> None:
    route = str(write_route(tmp_path))
    config = EngineConfig(expert_slots="4", warm_start=route, layer_slots="by-misses")
    with Engine(offloaded, config) as engine:
        assert sum(engine.slots_per_layer) == 4 * 4
        assert engine.slots_per_layer[3] > engine.slots_per_layer[0]
        assert torch.equal(greedy(engine, prompt(2, 9)), greedy(stock, prompt(2, 9)))


def test_automatic_slots_are_what_the_memory_holds(
    offloaded: OffloadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(expert_slots="auto", context=0)
    room = 2 * 8 * offloaded.expert_bytes + RESERVE_BYTES  # two buffers of all 8 experts
    with Engine(offloaded, config) as engine:
        assert engine.slots_per_layer == [8] * 4
    slots_of_five = 4 * 5 * offloaded.expert_bytes
    monkeypatch.setattr(slot_plan, "available_host_bytes", lambda: room + slots_of_five)
    with Engine(offloaded, config) as engine:
        assert engine.slots_per_layer == [5] * 4
    monkeypatch.setattr(slot_plan, "available_host_bytes", lambda: room)
    with pytest.raises(ValueError, match="free on the device"):
        Engine(offloaded, config)


def test_a_prompt_leaves_its_most_used_experts_resident(offloaded: OffloadedModel) -> None:
    tokens = prompt(1, 40)
    config = EngineConfig(expert_slots="3", eviction="lfu")
    with Engine(offloaded, config) as engine:
        engine(tokens)
        for layer in engine.driver.layers:
            state = layer.residency.cache.state
            least = min(state.worth[expert] for expert in layer.residency.cache.resident)
            absent = [state.worth[e] for e in range(8) if not state.here[e]]
            assert least >= max(absent)


@pytest.mark.usefixtures("hiding")
def test_prefetch_auto_leaves_what_does_not_pay(offloaded: OffloadedModel) -> None:
    copied = {}
    for prefetch in ("all", "auto"):
        config = EngineConfig(expert_slots="2", prefetch=prefetch)
        with Engine(offloaded, config) as engine:
            greedy(engine, prompt(1, 9), count=40)
            copied[prefetch] = engine.stats().decode
    assert 0 < copied["auto"].prefetches < copied["all"].prefetches
    assert copied["auto"].wasted_bytes < copied["all"].wasted_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eviction": "belady"}, "bound"),
        ({"eviction": "mru"}, "known: default, lru"),
        ({"layer_slots": "by-misses"}, "path as warm_start"),
        ({"prefetch": "some"}, "known: none, auto, all"),
        ({"context": -1}, "not be negative"),
    ],
)
def test_policies_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_a_recording_of_another_model_is_refused(offloaded: OffloadedModel, tmp_path: Path) -> None:
    save_file({"routed_experts": torch.tensor([[[0, 1]]])}, tmp_path / "one-layer.safetensors")
    path = str(tmp_path / "one-layer.safetensors")
    with pytest.raises(ValueError, match="does not fit this model"):
        Engine(offloaded, EngineConfig(expert_slots="2", warm_start=path))
    with pytest.raises(FileNotFoundError):
        Engine(offloaded, EngineConfig(expert_slots="2", warm_start=str(tmp_path / "none.csv")))

"""What the runtime reads early is what was recorded, and nothing of the model changes for it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from foreroute.data.adapters import MoEModel, discover, load_model
from foreroute.data.adapters.early_attention import find_early_attention
from foreroute.data.collect import collect_traces
from foreroute.data.recorder import EarlyReadout, RoutingRecorder
from foreroute.estimators import EstimatorSpec, EstimatorStack, predictable_layers
from foreroute.estimators.hybrid import HybridStack
from foreroute.export.export import export_estimator
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.store.offload import offload
from foreroute.train.fit import train_estimator
from foreroute.train.run import FitConfig

CPU = torch.device("cpu")
STEPS = 4
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {},
    "mixtral": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4, "num_hidden_layers": 4},
}


def default_vectors(moe: MoEModel) -> Tensor:
    geometry = moe.geometry
    shape = (geometry.num_layers, geometry.num_experts, geometry.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1


def stack_of(moe: MoEModel, input_kind: Any = "attention-readout", horizon: int = 1) -> Any:
    vectors = default_vectors(moe)
    settings = {"horizon": horizon, "input_kind": input_kind, "default_vectors": vectors}
    return EstimatorStack.training_free(moe.geometry, moe.anchors, **settings)


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy(model: Any, tokens: Tensor, **changes: Any) -> Tensor:
    settings = {
        "attention_mask": torch.ones_like(tokens),
        "min_new_tokens": 8,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    output: Tensor = model.generate(tokens, **(settings | changes))
    return output


@contextmanager
def engine_of(model: Any, stack: Any, moe: MoEModel | None = None, **changes: Any) -> Iterator[Any]:
    offloaded = offload(copy.deepcopy(model), device=CPU, model_name="tiny")
    config = EngineConfig(**({"expert_slots": "3", "prefetch": "auto"} | changes))
    with Engine(offloaded, config, stack(offloaded.moe)) as engine:
        engine.driver.run.give_up = None  # on a CPU nothing would be predicted otherwise
        yield engine


def spy(owner: Any, name: str) -> list[tuple[Any, Any]]:
    """Arguments and results of a method from now on."""
    seen, method = [], getattr(owner, name)

    def watched(*arguments: Any, **settings: Any) -> Any:
        result = method(*arguments, **settings)
        seen.append((arguments, result))
        return result

    setattr(owner, name, watched)
    return seen


def assert_reads_what_is_recorded(engine: Any, tokens: Tensor, mask: Tensor | None = None) -> None:
    moe = engine.offloaded.moe
    vectors = default_vectors(moe)
    readout = EarlyReadout(sites=find_early_attention(moe), vectors=vectors)
    seen = spy(engine.driver.run.predictor.ahead.readouts, "read")
    with RoutingRecorder(moe, readout=readout) as recorder:
        cache = None
        for step in range(-STEPS - 1, 0):
            upto = tokens.shape[1] + step + 1
            start = 0 if cache is None else upto - 1
            seen.clear()
            given = {} if mask is None else {"attention_mask": mask[:, :upto]}
            output = engine(
                input_ids=tokens[:, start:upto], past_key_values=cache, use_cache=True, **given
            )
            records, is_prompt = recorder.take(), cache is None
            cache = output.past_key_values
            found = {source: state for (source,), state in seen if state is not None}
            assert bool(found) is not is_prompt
            for source, state in found.items():
                assert torch.equal(state, records[source].readout)


def test_a_readout_that_predicts_further_is_of_the_layer_after_the_source(tiny_moe) -> None:
    with engine_of(tiny_moe.model, lambda moe: stack_of(moe, horizon=2)) as engine:
        assert_reads_what_is_recorded(engine, prompt(1, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODELS)
def test_estimators_read_what_the_recorder_records_bit_for_bit(
    model_type: str, dtype: torch.dtype
) -> None:
    model = tiny_model(model_type, **MODELS[model_type]).to(dtype)
    with engine_of(model, stack_of) as engine:
        assert_reads_what_is_recorded(engine, prompt(2, 13))


def test_with_padding_too_and_with_dense_layers_between(make_tiny_moe: Callable[..., Any]) -> None:
    tokens = prompt(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    model = make_tiny_moe(mlp_only_layers=[0, 2], num_hidden_layers=5).model
    with engine_of(model, stack_of) as engine:
        layers = engine.driver.layers
        assert [layer.target and layer.target.layer_idx for layer in layers] == [3, 4, None]
        assert_reads_what_is_recorded(engine, tokens, mask)


def test_so_it_is_on_the_bundled_model() -> None:
    with engine_of(load_model("bundled"), stack_of, expert_slots="8") as engine:
        assert_reads_what_is_recorded(engine, prompt(1, 24))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", MODELS)
def test_generated_tokens_are_the_plain_models(model_type: str, cache: str) -> None:
    model = tiny_model(model_type, **MODELS[model_type]).eval()
    model.set_experts_implementation("batched_mm")
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    for shape in ((1, 1), (1, 9), (3, 5)):
        tokens = prompt(*shape)
        expected = greedy(model, tokens, **settings, disable_compile=True)
        for prefetch in ("all", "auto"):
            with engine_of(model, stack_of, prefetch=prefetch) as engine:
                assert torch.equal(greedy(engine, tokens, **settings), expected)
                engine.check_integrity()
                assert engine.stats().decode.prefetches > 0 or prefetch == "auto"


@pytest.mark.parametrize("input_kind", ["attention-readout", "pre-attention"])
def test_nothing_is_predicted_where_drafts_are_verified(tiny_moe: Any, input_kind: str) -> None:
    def stack(moe: MoEModel) -> EstimatorStack:
        return stack_of(moe, input_kind, horizon=int(input_kind != "pre-attention"))

    tokens = torch.cat([prompt(1, 9), prompt(1, 9)], dim=1)
    drafts = {"prompt_lookup_num_tokens": 3, "min_new_tokens": 24, "max_new_tokens": 24}
    expected = greedy(tiny_moe.model, tokens, **drafts)
    with engine_of(tiny_moe.model, stack, prefetch="all") as engine:
        assert torch.equal(greedy(engine, tokens, **drafts), expected)
        engine.check_integrity()
        assert engine.stats().steps_ahead < engine.stats().decode.forwards < 23


def test_beams_and_logits_stay_bit_equal(tiny_moe: Any) -> None:
    model = copy.deepcopy(tiny_moe.model)
    model.set_experts_implementation("batched_mm")
    tokens, next_token = prompt(2, 7), prompt(2, 1)
    with torch.no_grad(), engine_of(model, stack_of) as engine:
        beams = {"num_beams": 3, "num_return_sequences": 2}
        assert torch.equal(greedy(engine, tokens, **beams), greedy(model, tokens, **beams))
        logits = []
        for runs in (model, engine):
            cache = runs(input_ids=tokens, use_cache=True).past_key_values
            output = runs(input_ids=next_token, past_key_values=cache, use_cache=True)
            logits.append(output.logits)
        assert torch.equal(*logits)


def tensors_of(cache: Any) -> list[Tensor]:
    found = [v for layer in cache.layers for v in vars(layer).values() if isinstance(v, Tensor)]
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_an_early_attention_leaves_the_cache_as_it_is(model_type: str, cache: str) -> None:
    model = tiny_model(model_type, **MODELS[model_type]).eval()
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with engine_of(model, stack_of) as engine:
        readouts, compared = engine.driver.run.predictor.ahead.readouts, []
        read = readouts.read

        def watched(*arguments: Any, **states: Any) -> Any:
            past = next(s["past_key_values"] for s in readouts._settings.values())
            lengths = [int(layer.get_seq_length()) for layer in past.layers]
            before = tensors_of(past)
            result = read(*arguments, **states)
            after = tensors_of(past)
            compared.append(len(before))
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert [int(layer.get_seq_length()) for layer in past.layers] == lengths
            return result

        readouts.read = watched
        greedy(engine, prompt(1, 9), **settings)
    assert min(compared) > 0


def test_no_hook_is_left_and_nothing_of_a_pass_is_kept(tiny_moe: Any) -> None:
    def num_hooks(modules: list[Any]) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    own = num_hooks(list(tiny_moe.model.modules()))  # transformers', where states were asked for
    with engine_of(tiny_moe.model, stack_of) as engine:
        greedy(engine, prompt(1, 5))
        assert engine.driver.run.predictor.ahead.readouts._settings == {}
        modules = list(engine.model.modules())
        assert num_hooks(modules) > own
    assert num_hooks(modules) == own


def test_the_first_layer_of_a_kind_of_attention_is_not_predicted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    model = tiny_model("gpt_oss", sliding_window=4, num_hidden_layers=4)
    with engine_of(model, stack_of) as engine:
        targets = [layer.target and layer.target.layer_idx for layer in engine.driver.layers]
    assert targets == [None, 2, 3, None]
    assert "Not predicted with tiny (gpt_oss)" in caplog.text
    assert "mask and positions of layers [1]" in caplog.text


def test_a_model_in_which_that_is_every_layer_is_refused_in_one_line() -> None:
    model = tiny_model("gpt_oss", num_hidden_layers=2)
    message = r"cannot run with tiny \(gpt_oss\): no earlier layer is called .* \[1\]\. Export"
    with pytest.raises(ValueError, match=message), engine_of(model, stack_of):
        pass


def test_a_model_of_another_structure_is_refused_in_one_line() -> None:
    model = tiny_model("gemma4_text")
    message = r"cannot run with tiny \(gemma4_text\): decoder layer 1 is not x \+ attention\(norm"
    with pytest.raises(ValueError, match=message), engine_of(model, stack_of):
        pass


def test_mask_and_positions_come_from_the_last_layer_of_the_same_kind() -> None:
    moe = discover(tiny_model("gpt_oss", num_hidden_layers=6), "tiny")
    donors = {i: s.settings_from for i, s in find_early_attention(moe).items()}
    assert {i: d and d.layer_idx for i, d in donors.items()} == {1: None, 2: 0, 3: 1, 4: 2, 5: 3}


def test_in_a_hybrid_only_pairs_that_read_a_readout_run_an_attention(tiny_moe: Any) -> None:
    def mixed(moe: MoEModel) -> EstimatorStack:
        parts = [stack_of(moe), stack_of(moe, "quasi-hidden")]
        return HybridStack(parts, (1, 0, 1))

    with engine_of(tiny_moe.model, mixed) as engine:
        seen = spy(engine.driver.run.predictor.ahead.readouts, "read")
        greedy(engine, prompt(1, 5))
    assert {source for (source,), state in seen if state is not None} == {1}
    assert {source for (source,), state in seen} == {0, 1, 2}


@pytest.mark.parametrize("prefetch", ["all", "auto"])
def test_layers_are_predicted_from_their_own_input_the_first_one_too(
    tiny_moe: Any, prefetch: str
) -> None:
    model = copy.deepcopy(tiny_moe.model)
    model.set_experts_implementation("batched_mm")

    def own(moe: MoEModel) -> EstimatorStack:
        return stack_of(moe, "pre-attention", 0)

    with engine_of(model, own, prefetch=prefetch) as engine:
        assert all(layer.target is layer for layer in engine.driver.layers)
        seen = spy(engine.driver.run.predictor, "predict")
        for shape in ((1, 1), (1, 9), (3, 5)):
            tokens = prompt(*shape)
            assert torch.equal(greedy(engine, tokens), greedy(model, tokens))
            engine.check_integrity()
        moe, decoders = engine.offloaded.moe, engine.model.model.layers
        cache = engine(input_ids=prompt(1, 9), use_cache=True).past_key_values
        seen.clear()
        entered = [
            layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0][:, 0]))
            for layer in decoders
        ]
        inputs: list[Tensor] = []
        engine(input_ids=prompt(1, 1), past_key_values=cache, use_cache=True)
        for handle in entered:
            handle.remove()
    stack = stack_of(moe, "pre-attention", 0)
    for ((source,), (logits, _)), layer_input in zip(seen, inputs, strict=True):
        assert torch.equal(logits, stack.predict(source, layer_input=layer_input))


@pytest.mark.parametrize("input_kind", ["attention-readout", "pre-attention"])
def test_predicted_experts_can_be_run_speculatively(tiny_moe: Any, input_kind: str) -> None:
    def stack(moe: MoEModel) -> EstimatorStack:
        return stack_of(moe, input_kind, horizon=int(input_kind == "attention-readout"))

    settings = {"on_miss": "predicted", "agreement_floor": 0.0}
    with engine_of(tiny_moe.model, stack, **settings) as engine:
        greedy(engine, prompt(1, 9))
        engine.check_integrity()
        assert 0 < engine.stats().agreement <= 1


def measured_recall(engine: Engine, tokens: Tensor, prompt_length: int) -> float:
    """Share of the true experts among as many predicted ones, over forced decode steps."""
    predictor = engine.driver.run.predictor
    assert predictor is not None
    seen, hits, total = spy(predictor, "predict"), 0, 0
    with RoutingRecorder(engine.offloaded.moe) as recorder:
        cache = engine(input_ids=tokens[:, :prompt_length], use_cache=True).past_key_values
        recorder.take()
        for at in range(prompt_length, tokens.shape[1]):
            seen.clear()
            engine(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            records = recorder.take()
            for (source,), (_, ranked) in seen:
                true_ids = records[predictor.ahead.target_of(source)].expert_ids
                hits += int((ranked.unsqueeze(-1) == true_ids.unsqueeze(-2)).sum())
                total += true_ids.numel()
    return hits / total


@pytest.mark.slow
def test_from_traces_to_tokens_a_readout_predicts_better_than_the_quasi_hidden_state(
    tmp_path: Path,
) -> None:
    traces = collect_traces(
        model="bundled",
        dataset="python-stdlib",
        tokens=8192,
        out=tmp_path / "traces",
        sequence_length=256,
        batch_size=8,
        record="readout,layer-input",
    )
    ids = traces.tokens(0).token_ids[:160].view(1, -1).long()
    stock = load_model("bundled")
    stock.set_experts_implementation("batched_mm")
    expected, recall = greedy(stock, ids[:, :20]), {}
    settings = {"expert_slots": "25%", "prefetch": "all"}
    for input_kind in ("quasi-hidden", "attention-readout", "pre-attention"):
        horizon = int(input_kind != "pre-attention")
        layers = predictable_layers(traces.geometry, horizon)
        spec = EstimatorSpec(
            form="low-rank", input_kind=input_kind, target_layers=layers, horizon=horizon
        )
        run, bundle = tmp_path / f"run-{input_kind}", tmp_path / f"bundle-{input_kind}"
        train_estimator(traces.folder, spec, FitConfig(epochs=3), run)
        export_estimator(run, bundle)
        with Engine.from_pretrained("bundled", bundle=bundle, **settings) as engine:
            assert torch.equal(greedy(engine, ids[:, :20]), expected)
            recall[input_kind] = measured_recall(engine, ids, 32)
    also, mixed = [tmp_path / "run-attention-readout"], tmp_path / "bundle-mixed"
    export_estimator(tmp_path / "run-quasi-hidden", mixed, also=also)
    with Engine.from_pretrained("bundled", bundle=mixed, **settings) as engine:
        assert torch.equal(greedy(engine, ids[:, :20]), expected)
        recall["mixed"] = measured_recall(engine, ids, 32)
    assert recall["mixed"] > recall["quasi-hidden"]
    assert recall["attention-readout"] > recall["quasi-hidden"] + 0.02
    assert recall["pre-attention"] > 0.5

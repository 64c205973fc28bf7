"""What collect-traces can record besides dataset text in full: each choice keeps what it says."""

import math

import pytest
import torch
from tiny_models import tiny_model

from foreroute.data.adapters import discover
from foreroute.data.adapters.early_attention import find_early_attention
from foreroute.data.collect import collect_traces
from foreroute.data.int8_rows import from_int8, to_int8
from foreroute.data.recorder import EarlyReadout, RoutingRecorder
from foreroute.estimators import EstimatorSpec
from foreroute.estimators.inputs import expected_output
from foreroute.train.shards import NOT_STORED, SEQUENCE_START, PairedShards

SEQUENCES, LENGTH, LAST_LAYER = 6, 32, 3


@pytest.fixture(scope="module")
def arguments(tiny_moe, text_dataset):
    """2 shards of 3 sequences of 32 tokens, states as the model has them."""
    return {
        "model": str(tiny_moe.folder),
        "dataset": str(text_dataset),
        "tokens": SEQUENCES * LENGTH,
        "sequence_length": LENGTH,
        "states_dtype": "float32",
        "batch_size": 3,
        "shard_tokens": 3 * LENGTH,
    }


@pytest.fixture(scope="module")
def collected(arguments, tmp_path_factory):
    """Collect with some arguments changed; the same change is collected once."""
    there = {}

    def collect(**changes):
        key = tuple(sorted(changes.items()))
        if key not in there:
            out = tmp_path_factory.mktemp("traces") / "t"
            there[key] = collect_traces(**(arguments | changes | {"out": out}))
        return there[key]

    return collect


def forward(tiny_moe, token_ids):
    """Records of one pass over whole sequences, with both optional fields' parts to compare."""
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, arguments: inputs.append(arguments[0].flatten(0, 1))
        )
        for layer in tiny_moe.model.model.layers
    ]
    with torch.no_grad(), RoutingRecorder(tiny_moe.moe) as recorder:
        tiny_moe.model(input_ids=token_ids)
        records = recorder.take()
    for hook in hooks:
        hook.remove()
    return records, inputs


def test_nothing_more_is_recorded_unless_asked_for(collected):
    traces = collected()
    record = traces.record(0, 0)
    assert record.layer_input is None
    assert record.readout is None
    for name in ("layer_input", "readout"):
        flag = name.replace("_", "-")
        with pytest.raises(ValueError, match=rf"holds no {flag}.*--record {flag}"):
            traces.read(0, 0, (name,))
    with pytest.raises(ValueError, match="holds no readout"):
        traces.readout_vectors()


def test_more_fields_leave_the_others_as_they_are(collected):
    plain, more = collected(), collected(record="layer-input,readout")
    for layer_idx in range(LAST_LAYER + 1):
        for name, tensor in plain.record(layer_idx, 1).tensors.items():
            assert torch.equal(more.record(layer_idx, 1).tensors[name], tensor)


def test_layer_input_is_what_enters_the_layer(tiny_moe, collected):
    traces = collected(record="layer-input")
    _, inputs = forward(tiny_moe, traces.tokens(0).token_ids.view(3, LENGTH))
    for layer_idx, expected in enumerate(inputs):
        found = traces.read(layer_idx, 0, ("layer_input",))["layer_input"]
        assert torch.equal(found, expected)


def by_hand(tiny_moe, record, true_inputs, layer_idx, vectors):
    """The readout, token by token: the next layer runs on the true past and one approximation."""
    layer = tiny_moe.model.model.layers[layer_idx + 1]
    added = expected_output(record.expert_ids[None], record.gate_weights[None], vectors[None])[0]
    approximate = (record.residual + added).view(3, LENGTH, -1)
    true = true_inputs[layer_idx + 1].view(3, LENGTH, -1)
    made = []
    for position in (0, 1, 13, LENGTH - 1):
        mixed = torch.cat([true[:, :position], approximate[:, position : position + 1]], dim=1)
        angles = tiny_moe.model.model.rotary_emb(mixed, torch.arange(position + 1)[None])
        mask = torch.full((position + 1, position + 1), -1e9).triu(1)[None, None]
        attended = layer.self_attn(
            layer.input_layernorm(mixed), position_embeddings=angles, attention_mask=mask
        )[0]
        made.append((mixed + attended)[:, -1])
    return torch.stack(made, dim=1)  # [B, 4, D]


@torch.no_grad()
def test_readout_is_the_next_attention_on_the_true_past_and_the_expected_output(
    tiny_moe, collected
):
    traces = collected(record="layer-input,readout")
    records, inputs = forward(tiny_moe, traces.tokens(0).token_ids.view(3, LENGTH))
    for layer_idx in range(LAST_LAYER):
        found = traces.record(layer_idx, 0).readout.view(3, LENGTH, -1)
        vectors = traces.readout_vectors()[layer_idx]
        expected = by_hand(tiny_moe, records[layer_idx], inputs, layer_idx, vectors)
        assert torch.allclose(found[:, [0, 1, 13, -1]], expected, atol=1e-4)


def test_a_readout_made_while_decoding_is_that_of_the_whole_sequence(tiny_moe, collected):
    traces = collected(record="readout", generated_share=0.5)
    with_readout = find_early_attention(tiny_moe.moe)
    assert sorted(with_readout) == [1, 2, 3]
    token_ids = traces.tokens(0).token_ids.view(3, LENGTH)
    records, inputs = forward(tiny_moe, token_ids)
    with torch.no_grad():
        for layer_idx in range(LAST_LAYER):
            vectors = traces.readout_vectors()[layer_idx]
            expected = by_hand(tiny_moe, records[layer_idx], inputs, layer_idx, vectors)
            found = traces.record(layer_idx, 0).readout.view(3, LENGTH, -1)
            assert torch.allclose(found[:, -1], expected[:, -1], atol=1e-4)


def test_a_readout_is_nearer_to_the_next_residual_than_the_residual_before(collected):
    traces = collected(record="layer-input,readout")
    for layer_idx in range(LAST_LAYER):
        record, after = traces.record(layer_idx, 0), traces.record(layer_idx + 1, 0)
        far = (record.residual - after.residual).norm()
        assert (record.readout - after.residual).norm() < 0.7 * far


def test_the_last_layer_has_no_readout_and_says_so(collected):
    traces = collected(record="layer-input,readout")
    assert traces.record(LAST_LAYER, 0).readout is None
    with pytest.raises(ValueError, match="last MoE layer"):
        traces.read(LAST_LAYER, 0, ("readout",))


def test_default_vectors_of_the_readout_are_those_of_the_first_prompts(collected):
    traces = collected(record="layer-input,readout")
    assert traces.manifest.readout_tokens == SEQUENCES * LENGTH  # all there are
    vectors, _ = traces.default_vectors()
    assert torch.allclose(traces.readout_vectors(), vectors, atol=1e-4)
    traces.verify()


def test_a_model_with_another_layer_structure_is_refused_in_one_line(
    tiny_moe, arguments, tmp_path, monkeypatch
):
    attention = type(tiny_moe.model.model.layers[0].self_attn)
    forward_of = attention.forward

    def scaled(self, *rest, **settings):
        hidden, weights = forward_of(self, *rest, **settings)
        return hidden * (2 if settings["hidden_states"].shape[1] == 5 else 1), weights

    monkeypatch.setattr(attention, "forward", scaled)
    with pytest.raises(ValueError, match=r"decoder layer 1 is not x \+ attention\(norm\(x\)\)"):
        collect_traces(**arguments, out=tmp_path / "t", record="readout")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_readouts_of_a_decode_step_and_of_a_whole_pass_agree(model_type):
    moe = discover(tiny_model(model_type), model_type)
    shape = (moe.geometry.num_layers, moe.geometry.num_experts, moe.geometry.hidden_size)
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    readout = EarlyReadout(sites=find_early_attention(moe), vectors=vectors)
    token_ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), RoutingRecorder(moe, readout=readout) as recorder:
        moe.model(input_ids=token_ids, use_cache=False)
        whole = recorder.take()
        cache = moe.model(input_ids=token_ids[:, :-1], use_cache=True).past_key_values
        recorder.take()
        moe.model(input_ids=token_ids[:, -1:], past_key_values=cache, use_cache=True)
        step = recorder.take()
    for layer_idx in moe.geometry.layer_indices[:-1]:
        expected = whole[layer_idx].readout.view(2, 9, -1)[:, -1]
        assert torch.allclose(step[layer_idx].readout, expected, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma4_text", "qwen3_next"])
def test_layers_of_other_structure_have_no_readout(model_type):
    moe = discover(tiny_model(model_type), model_type)
    with pytest.raises(ValueError, match=rf"readout cannot be recorded from .*{model_type}"):
        find_early_attention(moe)


def test_int8_states_come_back_within_half_a_step(collected):
    exact, rounded = collected(), collected(states_dtype="int8")
    for name in ("residual", "router_input"):
        there = exact.read(2, 0, (name,))[name]
        found = rounded.read(2, 0, (name,))[name]
        step = there.abs().amax(-1, keepdim=True) / 127
        assert found.dtype == torch.float32
        assert ((found - there).abs() <= 0.5001 * step).all()
        assert not torch.equal(found, there)
    assert rounded.manifest.num_bytes < 0.75 * exact.manifest.num_bytes
    logits = ("router_logits",)
    assert torch.equal(rounded.read(2, 0, logits)[logits[0]], exact.read(2, 0, logits)[logits[0]])


def test_rows_of_zeros_survive_int8():
    states = torch.zeros(2, 3)
    assert torch.equal(from_int8(*to_int8(states)), states)


def test_some_positions_of_each_sequence_are_those_of_the_whole(collected):
    whole, some = collected(), collected(tokens_per_sequence=5, tokens=SEQUENCES * 5)
    assert (some.num_sequences, some.num_tokens) == (SEQUENCES, SEQUENCES * 5)
    tokens = some.tokens(0)
    positions = tokens.positions.view(-1, 5)
    assert (positions.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in positions.tolist()}) == len(positions)
    sequences = torch.arange(len(positions)).unsqueeze(1) * LENGTH
    rows = (positions + sequences).flatten()
    every = torch.cat([whole.record(1, shard).residual for shard in (0, 1)])
    ids = torch.cat([whole.tokens(shard).token_ids for shard in (0, 1)])
    assert torch.equal(some.record(1, 0).residual, every[rows])
    assert torch.equal(tokens.token_ids, ids[rows])


def test_the_previous_token_is_unknown_where_it_is_not_stored(collected):
    traces = collected(tokens_per_sequence=20, tokens=SEQUENCES * 20)
    spec = EstimatorSpec(form="linear", input_kind="router-input", target_layers=(1,))
    batch = next(iter(PairedShards(traces, spec, range(SEQUENCES))))
    positions = traces.tokens(0).positions
    for row, position in enumerate(positions.tolist()):
        is_next = row % 20 > 0 and position == positions[row - 1] + 1
        unknown = SEQUENCE_START if row % 20 == 0 else NOT_STORED
        expected = batch.target_ids[0, row - 1] if is_next else torch.tensor([unknown] * 2)
        assert torch.equal(batch.previous_ids[0, row], expected)
    assert batch.starts.nonzero().flatten().tolist() == list(range(0, len(positions), 20))


def test_generated_text_is_stored_without_its_prompt(tiny_moe, collected):
    traces = collected(source="generated", generate=8, tokens=SEQUENCES * 8)
    tokens = traces.tokens(0)
    assert traces.num_tokens == SEQUENCES * 8
    assert (tokens.phases == 1).all()
    assert torch.equal(tokens.positions.view(-1, 8)[0], torch.arange(24, 32))
    assert traces.manifest.source == "generated"
    prompts = collected().tokens(0).token_ids.view(-1, LENGTH)  # same first window, cut elsewhere
    token_ids = torch.cat([prompts[:1, :24], tokens.token_ids[:8].view(1, 8)], dim=1)
    records, _ = forward(tiny_moe, token_ids)
    expected = records[2].router_logits[24:]
    assert torch.allclose(traces.record(2, 0).router_logits[:8], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": "everything"}, "Unknown --record 'everything'; known: layer-input, readout"),
        ({"source": "dreams"}, "Unknown source 'dreams'; known: dataset, generated"),
        ({"source": "generated", "generate": 32}, "--generate 32 leaves no prompt"),
        ({"source": "generated", "generated_share": 0.5}, "give --generate instead"),
        ({"tokens_per_sequence": 0}, "tokens_per_sequence must be at least 1"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_the_model_loads(
    arguments, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        collect_traces(**(arguments | change | {"out": tmp_path / "t", "model": "./nowhere"}))


def test_bytes_of_a_token_are_as_small_as_said(collected):
    per_token = {
        name: collected(**change).manifest.num_bytes / (SEQUENCES * LENGTH)
        for name, change in {
            "plain": {"states_dtype": "bfloat16"},
            "int8": {"states_dtype": "int8"},
            "more": {"states_dtype": "bfloat16", "record": "layer-input,readout"},
        }.items()
    }
    layers, hidden = 4, 32
    saved = per_token["plain"] - per_token["int8"]
    assert math.isclose(saved, layers * 2 * (hidden - 4), rel_tol=0.2)
    added = per_token["more"] - per_token["plain"]
    assert math.isclose(added, (2 * layers - 1) * hidden * 2, rel_tol=0.2)

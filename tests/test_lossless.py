"""Experts in 12 bits: every bfloat16 number comes back bit for bit, and what does not pay stays."""

import copy

import pytest
import torch
from tiny_models import tiny_model

from foreroute.data.adapters import load_model
from foreroute.data.adapters.weightless import experts_by_path
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.store import row_writer
from foreroute.runtime.store.encodings import (
    Lossless,
    TooManyExceptions,
    encoder_named,
    lossless,
    lossless_on_cpu,
)
from foreroute.runtime.store.encodings.lossless import count_exceptions
from foreroute.runtime.store.host_store import HostExpertStore
from foreroute.runtime.store.offload import load_offloaded, offload

SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
TOKENS = torch.arange(3, 14).unsqueeze(0)


def bits_of(matrices):
    return matrices.view(torch.int16)


def every_pattern(columns, per_row=2):
    """Rows of ordinary weights in which each of the 65,536 patterns stands once."""
    rows = 65536 // per_row
    matrix = (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    )
    at = torch.arange(65536)
    places = at % per_row * (columns // per_row) + at // 7 % (columns // per_row)
    bits_of(matrix)[at // per_row, places] = at.to(torch.int16)
    return matrix


def ordinary(*shape, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def with_outliers():
    matrix = ordinary(64, 512)
    matrix[::3, ::200] *= 10_000
    matrix[5] = 0
    matrix[6] = -0.0
    matrix[7, ::32] = 2.0**-133  # the least subnormal
    matrix[8, :9] = torch.tensor([float("inf"), float("-inf"), float("nan")] * 3).bfloat16()
    return matrix


MATRICES = {
    "every pattern": lambda: every_pattern(64),
    "every pattern, columns that do not divide": lambda: every_pattern(67),
    "outliers": with_outliers,
    "large numbers": lambda: (ordinary(48, 256).float() * 2.0**65).bfloat16(),
    "small numbers": lambda: (ordinary(48, 256).float() * 2.0**-112).bfloat16(),
    "one column": lambda: ordinary(128, 1),
    "odd": lambda: ordinary(33, 40 + 1),
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_bit_comes_back(name):
    matrix = MATRICES[name]()
    encoding = Lossless(*matrix.shape)
    parts = encoding.encode(torch.stack([matrix, matrix.flip(0)]))
    for suffix, (shape, dtype) in encoding.parts().items():
        assert parts[suffix].shape == (2, *shape)
        assert parts[suffix].dtype == dtype
    decoded = encoding.decode(parts)
    assert torch.equal(bits_of(decoded[0]), bits_of(matrix))
    assert torch.equal(bits_of(decoded[1]), bits_of(matrix.flip(0)))


def test_zeros_of_both_signs_and_ordinary_rows_have_no_exceptions():
    matrix = torch.zeros(4, 64, dtype=torch.bfloat16)
    matrix[1] = -0.0
    matrix[2] = 1.0
    matrix[3, ::2] = 2.0**-14
    assert count_exceptions(Lossless(4, 64).encode(matrix)["_lines"]) == 0


def test_a_row_by_hand():
    """1.5 has exponent 127 and mantissa 0x40; the base is 112, so its code is 15."""
    row = torch.zeros(1, 8, dtype=torch.bfloat16)
    row[0, 2], row[0, 5] = -1.5, 2.0**-20  # planes of one column each
    parts = Lossless(1, 8).encode(row)
    first, second, codes = (word & 0xFFFFFFFF for word in parts[""][0].tolist())
    assert (first, second) == (0xC0 << 16, 0)
    assert codes == 15 << 4 * 4  # plane 2 is the fourth nibble
    listed = 5 << 16 | (127 - 20) << 7
    assert parts["_lines"][0].tolist() == [112, listed, 0, 0]


def test_a_row_of_outliers_takes_the_base_that_leaves_the_fewest():
    matrix = ordinary(1, 512)
    matrix[0, :5] = 1e4
    lines = Lossless(1, 512).encode(matrix)["_lines"]
    assert 5 <= count_exceptions(lines) <= 6


@pytest.mark.parametrize("name", MATRICES)
def test_both_ways_to_pack_write_the_same_bytes(name):
    """The compiled one on a CPU, and the one a GPU runs."""
    matrix = MATRICES[name]()
    encoding = Lossless(*matrix.shape)
    parts = encoding.encode(matrix.unsqueeze(0))
    missing = encoding.words * lossless.PLANES - encoding.columns
    padded = torch.nn.functional.pad(matrix, (0, missing)).unsqueeze(0)
    others = [torch.empty_like(part) for part in parts.values()]
    assert encoding._pack(bits_of(padded.contiguous()), *others)
    for part, other in zip(parts.values(), others, strict=True):
        assert torch.equal(part, other)
    shared = ("PLANES", "LARGEST_CODE", "LARGEST_BASE", "IN_LINE", "MOST_LINES_OF_ROW")
    for constant in shared:
        assert getattr(lossless, constant) == getattr(lossless_on_cpu, constant)


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_with_inputs_as_rows_are_packed_to_the_same_bytes(name):
    matrix = MATRICES[name]()
    encoding = Lossless(*matrix.shape)
    for lies in (matrix.mT.contiguous().mT, matrix.repeat(2, 2)[: len(matrix), : matrix.shape[1]]):
        parts = encoding.encode(lies.unsqueeze(0))
        for part, other in zip(parts.values(), encoding.encode(matrix).values(), strict=True):
            assert torch.equal(part[0], other)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_adversarial_experts_keep_every_bit_whichever_way_they_lie(model_type):
    """Outputs as rows; inputs as rows with gate and up interleaved; inputs as rows, gate first."""
    model = tiny_model(model_type, dtype=torch.bfloat16, **SIZES)
    for experts in experts_by_path(model).values():
        for parameter in experts.parameters():
            if parameter.dim() == 3:
                wild = with_outliers().flatten()[: parameter[0].numel()]
                bits_of(parameter.data[1]).view(-1)[: len(wild)] = bits_of(wild)
    stock = copy.deepcopy(model)
    store = offload(model, device=torch.device("cpu"), expert_dtype="lossless").store
    assert all(layout.encoded and layout.is_exact for layout in store.layouts)
    layers = zip(experts_by_path(stock).values(), store.layouts, store.rows, strict=True)
    for experts, layout, rows in layers:
        for name, weight in layout.weights(rows).items():
            assert torch.equal(bits_of(weight[:]), bits_of(experts.get_parameter(name)))


def test_too_many_exceptions_are_refused_in_both_ways():
    matrix = torch.arange(65536).to(torch.int16).view(torch.bfloat16).view(256, 256)
    encoding = Lossless(256, 256)
    with pytest.raises(TooManyExceptions, match="more exceptions than fit the 24 lines"):
        encoding.encode(matrix)
    parts = [torch.empty(1, *size, dtype=dtype) for size, dtype in encoding.parts().values()]
    assert not encoding._pack(bits_of(matrix).unsqueeze(0), *parts)


def test_only_bfloat16_of_some_size_is_worth_it():
    assert Lossless(1536, 2048).pays(torch.bfloat16)
    assert not Lossless(1536, 2048).pays(torch.float16)
    assert not Lossless(4, 4).pays(torch.bfloat16)
    with pytest.raises(ValueError, match="not torch"):
        Lossless(1, 8).encode(torch.zeros(1, 8))


def test_the_bundled_models_experts_lose_nothing_and_shrink():
    model = load_model("bundled", dtype="bfloat16")
    stock = copy.deepcopy(model)
    offloaded = offload(model, device=torch.device("cpu"), expert_dtype="lossless")
    store = offloaded.store
    assert store.is_exact
    layers = zip(offloaded.moe.layers, store.layouts, store.rows, strict=True)
    for layer, layout, rows in layers:
        for name, weight in layout.weights(rows).items():
            expected = stock.get_parameter(f"{layer.name}.{name}")
            assert torch.equal(bits_of(weight[:]), bits_of(expected))
    experts = experts_by_path(stock).values()
    whole = sum(p.nbytes for module in experts for p in module.parameters())
    assert store.num_bytes < 0.87 * whole  # rows of 256 and of 40 columns


def logits_of(offloaded, slots):
    with Engine(offloaded, EngineConfig(expert_slots=slots)) as engine, torch.no_grad():
        cache = engine(TOKENS, use_cache=True)
        step = engine(TOKENS[:, :1], past_key_values=cache.past_key_values)
        engine.check_integrity()
    return torch.cat([cache.logits, step.logits], dim=1)


@pytest.mark.parametrize("slots", ["4", "8"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral", "nemotron_h"])
def test_packed_and_plain_engines_give_the_same_bits(model_type, slots):
    model = tiny_model(model_type, dtype=torch.bfloat16, **SIZES)
    plain = offload(copy.deepcopy(model), device=torch.device("cpu"))
    packed = offload(model, device=torch.device("cpu"), expert_dtype="lossless")
    assert packed.store.layouts[0].encoded
    assert packed.expert_bytes < plain.expert_bytes
    assert torch.equal(logits_of(packed, slots), logits_of(plain, slots))


def save(model, folder):
    model.save_pretrained(folder, max_shard_size="200KB")
    return str(folder)


def with_wild_exponents(model):
    """A model one of whose matrices has no use for codes of four bits."""
    experts = next(iter(experts_by_path(model).values()))
    with torch.no_grad():
        wild = torch.arange(experts.down_proj[3].numel()).to(torch.int16).view(torch.bfloat16)
        experts.down_proj[3].copy_(wild.nan_to_num(1.0, 1.0, 1.0).view_as(experts.down_proj[3]))
    return model


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_what_does_not_pay_stays_as_it_is(model_type, tmp_path, caplog):
    model = with_wild_exponents(tiny_model(model_type, dtype=torch.bfloat16, **SIZES))
    folder = save(model, tmp_path)
    loaded = load_offloaded(folder, device="cpu", expert_dtype="lossless")
    assert "down_proj stays in bfloat16" in caplog.text
    moved = offload(copy.deepcopy(model), device=torch.device("cpu"), expert_dtype="lossless")
    for layout in (*loaded.store.layouts, *moved.store.layouts):
        assert isinstance(layout.encoded["gate_up_proj"].encoding, Lossless)
        assert layout.parameters["down_proj"].dtype == torch.bfloat16
        assert layout.is_exact
    assert all(map(torch.equal, loaded.store.rows, moved.store.rows))
    plain = offload(model, device=torch.device("cpu"))
    assert torch.equal(logits_of(loaded, "4"), logits_of(plain, "4"))


def test_parts_of_matrices_may_come_in_any_order(monkeypatch):
    monkeypatch.setattr(row_writer, "BATCH_BYTES", 3 * 64 * 128 * 2)
    module = next(
        iter(experts_by_path(tiny_model("qwen3_moe", dtype=torch.bfloat16, **SIZES)).values())
    )
    weights = {name: p.detach() for name, p in module.named_parameters()}
    store = HostExpertStore([module], is_pinned=False, encoder=encoder_named("lossless"))
    writer = row_writer.RowWriter(store.layouts[0], store.rows[0])
    for name, weight in weights.items():
        half = weight.shape[1] // 2
        for expert_id in range(len(weight)):
            writer.put(name, expert_id, half, weight[expert_id, half:])
        for expert_id in reversed(range(len(weight))):
            writer.put(name, expert_id, 0, weight[expert_id, :half])
    for name, stored in store.layouts[0].weights(store.rows[0]).items():
        assert torch.equal(bits_of(stored[:]), bits_of(weights[name]))

"""Experts stored in fewer bits: what is lost is small, and native formats lose nothing."""

import copy

import pytest
import torch
from low_bit import add_quantization, save_fp8, save_mxfp4
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from foreroute.data.adapters import ExpertsView
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.planning.doctor import diagnose
from foreroute.runtime.store.encodings import EXPERT_DTYPES, Fp8Blocks, Int4, Mxfp4
from foreroute.runtime.store.offload import load_offloaded, offload

# Half a step: of 8 bits over twice the largest number of a row, of e4m3's three mantissa bits, of
# 4 bits over the span of a group (whose float16 step and offset round once more).
WORST_ERROR = {"bf16": 2**-8, "int8": 0.5 / 127, "fp8": 2**-4, "int4": 1.05 / 15}
TOKENS = torch.arange(3, 14).unsqueeze(0)


def run(offloaded, tokens=TOKENS):
    with Engine(offloaded, EngineConfig(expert_slots="4")) as engine, torch.no_grad():
        return engine(tokens).logits


@pytest.mark.parametrize("name", WORST_ERROR)
def test_a_matrix_comes_back_within_half_a_step(name):
    matrix = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    encoding = EXPERT_DTYPES[name](48, 64)
    parts = {suffix: part.unsqueeze(0) for suffix, part in encoding.encode(matrix).items()}
    for suffix, (shape, dtype) in encoding.parts().items():
        assert parts[suffix].shape == (1, *shape)
        assert parts[suffix].dtype == dtype
    largest = matrix.abs().amax(-1, keepdim=True)
    error = (encoding.decode(parts)[0] - matrix).abs() / largest
    assert error.max() <= WORST_ERROR[name]


@pytest.mark.parametrize("name", WORST_ERROR)
def test_rows_of_zeros_stay_zero(name):
    encoding = EXPERT_DTYPES[name](4, 32)
    parts = {k: v.unsqueeze(0) for k, v in encoding.encode(torch.zeros(4, 32)).items()}
    assert torch.equal(encoding.decode(parts), torch.zeros(1, 4, 32))


def test_int4_by_hand():
    row = torch.arange(32.0).div(31).mul(15).round().unsqueeze(0)  # 0..15: a step of one
    parts = Int4(1, 32).encode(row)
    assert parts["_steps"].item() == 1.0
    assert parts["_offsets"].item() == 0.0
    assert parts[""][0, 0].item() == int(row[0, 0]) | int(row[0, 1]) << 4
    assert torch.equal(Int4(1, 32).decode({k: v.unsqueeze(0) for k, v in parts.items()})[0], row)


def test_int4_refuses_inputs_it_cannot_group():
    assert Int4(8, 40).group == 40
    with pytest.raises(ValueError, match="divide, not 262; use int8"):
        Int4(8, 262).parts()


@pytest.mark.parametrize("name", EXPERT_DTYPES)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_engine_runs_exactly_what_the_store_decodes_to(name, model_type):
    model = tiny_model(model_type, intermediate_size=96)
    stock = copy.deepcopy(model)
    offloaded = offload(model, device=torch.device("cpu"), expert_dtype=name)
    store = offloaded.store
    for layer, layout, rows in zip(offloaded.moe.layers, store.layouts, store.rows, strict=True):
        for parameter, weight in layout.weights(rows).items():
            stock.get_parameter(f"{layer.name}.{parameter}").data.copy_(weight[:])
    stock.set_experts_implementation("batched_mm")
    with torch.no_grad():
        assert torch.equal(run(offloaded), stock(TOKENS).logits)


def test_slots_and_rows_hold_the_quantised_bytes():
    full = offload(tiny_model("qwen3_moe"), device=torch.device("cpu"))
    few = offload(tiny_model("qwen3_moe"), device=torch.device("cpu"), expert_dtype="int8")
    scales = 4 * (2 * 32 + 64)  # float32, one per output channel
    assert few.expert_bytes == full.expert_bytes // 4 + scales
    with Engine(few, EngineConfig(expert_slots="2")) as engine, torch.no_grad():
        engine(TOKENS)
        engine.check_integrity()
        assert engine.driver.layers[0].residency.cache.slots.shape == (2, few.expert_bytes)


@pytest.mark.parametrize("name", EXPERT_DTYPES)
def test_loading_quantises_as_it_reads(tmp_path, name):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = load_offloaded(str(tmp_path), device="cpu", expert_dtype=name)
    moved = offload(model, device=torch.device("cpu"), expert_dtype=name)
    for got, expected in zip(loaded.store.rows, moved.store.rows, strict=True):
        for view, other in zip(
            loaded.store.layouts[0].views(got).values(),
            moved.store.layouts[0].views(expected).values(),
            strict=True,
        ):
            assert torch.equal(view.view(torch.uint8), other.view(torch.uint8))


def test_bf16_of_a_bf16_model_is_stored_as_it_is():
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    plain = offload(copy.deepcopy(model), device=torch.device("cpu"))
    asked = offload(model, device=torch.device("cpu"), expert_dtype="bf16")
    assert not asked.store.layouts[0].encoded
    assert all(map(torch.equal, asked.store.rows, plain.store.rows))


def test_only_the_experts_asked_for_are_decoded_for_a_prompt():
    offloaded = offload(tiny_model("mixtral"), device=torch.device("cpu"), expert_dtype="int8")
    layer, store = offloaded.moe.layers[0], offloaded.store
    weights = store.layouts[0].weights(store.rows[0])
    asked = torch.tensor([[6, 1], [1, 6], [6, 6]])
    view, ids = ExpertsView(layer.experts, weights).decoded(asked)
    assert view.num_experts == 2
    for name, weight in weights.items():
        assert torch.equal(getattr(view, name)[ids], weight[asked.flatten()].unflatten(0, (3, 2)))


def test_plain_weights_are_used_where_they_lie():
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    view = ExpertsView(experts, dict(experts.named_parameters()))
    asked = torch.tensor([5, 3])
    assert view.decoded(asked) == (view, asked)


def test_unknown_expert_dtypes_are_refused(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="known: auto, bf16, lossless, fp8, int8, int4"):
        load_offloaded(str(tmp_path), device="cpu", expert_dtype="int2")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_fp8_checkpoints_keep_their_bytes_and_give_transformers_logits(tmp_path, model_type):
    save_fp8(tmp_path, model_type)
    settings = FineGrainedFP8Config(
        weight_block_size=(32, 32), dequantize=True, modules_to_not_convert=["gate", "lm_head"]
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
    stock.set_experts_implementation("batched_mm")
    offloaded = load_offloaded(str(tmp_path), device="cpu")
    layout = offloaded.store.layouts[0]
    assert layout.parameters["gate_up_proj"].dtype == torch.float8_e4m3fn
    assert offloaded.expert_bytes < 3 * 64 * 32 * 1.1  # a byte a number, and the factors
    with torch.no_grad():
        assert torch.equal(run(offloaded), stock(TOKENS).logits)


def test_fp8_blocks_that_do_not_divide_the_matrix():
    """Gate and up have blocks of their own; the last of each is not full."""
    encoding = Fp8Blocks(rows=2 * 3, columns=5, stacked=2, block=2)
    assert encoding.parts()["_scale_inv"][0] == (4, 3)
    scales = torch.arange(1.0, 13.0).view(1, 4, 3)
    decoded = encoding.decode({"": torch.ones(1, 6, 5), "_scale_inv": scales})[0]
    assert decoded[:, 0].tolist() == [1, 1, 4, 7, 7, 10]
    assert decoded[0].tolist() == [1, 1, 2, 2, 3]


def test_mxfp4_by_hand():
    """Codes 2 and 10 are 1 and -1; the exponent 128 doubles them."""
    blocks = torch.full((1, 1, 1, 16), 2 | 10 << 4, dtype=torch.uint8)
    scales = torch.full((1, 1, 1), 128, dtype=torch.uint8)
    decoded = Mxfp4(1, 32).decode({"_blocks": blocks, "_scales": scales})
    assert decoded.flatten().tolist() == [2.0, -2.0] * 16


def test_mxfp4_checkpoints_keep_their_bytes_and_give_transformers_logits(tmp_path):
    save_mxfp4(tmp_path)
    settings = Mxfp4Config(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
    stock.set_experts_implementation("batched_mm")
    offloaded = load_offloaded(str(tmp_path), device="cpu")
    assert "gate_up_proj_blocks" in offloaded.store.layouts[0].parameters
    assert offloaded.expert_bytes < full_bytes(stock) / 3
    with torch.no_grad():
        assert torch.equal(run(offloaded), stock(TOKENS).logits)


def full_bytes(stock):
    experts = stock.model.layers[0].mlp.experts
    return sum(p.nbytes for p in experts.parameters()) // 8


def test_other_quantisations_and_requantising_are_refused_by_doctor_too(tmp_path):
    save_fp8(tmp_path, "qwen3_moe")
    with pytest.raises(ValueError, match="comes in fp8 already"):
        load_offloaded(str(tmp_path), device="cpu", expert_dtype="int8")
    for settings in (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ):
        add_quantization(tmp_path, settings)
        for ask in (load_offloaded, diagnose):
            with pytest.raises(ValueError, match="cannot be read; known: mxfp4, fp8"):
                ask(str(tmp_path), **({} if ask is diagnose else {"device": "cpu"}))


def packed(numbers, bits=4):
    """Numbers along a row into words, the first in the lowest bits."""
    words = numbers.to(torch.int64).unflatten(1, (-1, 32 // bits))
    words = (words << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def fp8_per(scale_of, name, **extra):
    def form(matrix):
        scale = scale_of(matrix.float()) / 448
        values = (matrix.float() / scale).to(torch.float8_e4m3fn)
        tensors = {"weight": values, name: scale.reshape(scale.shape or (1,)), **extra}
        return tensors, values.float() * scale

    return form


def int8_channels(matrix):
    scale = (matrix.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    values = (matrix.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def grouped(matrix, group=16):
    """Codes 0..15, and a scale and a zero for each group of inputs."""
    parts = matrix.float().unflatten(1, (-1, group))
    low, high = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    codes = (parts / scale + zero).round().clamp(0, 15)
    return codes.flatten(1), scale.squeeze(2), zero.squeeze(2), ((codes - zero) * scale).flatten(1)


def int4_packed(matrix):
    codes, scale, zero, decoded = grouped(matrix)
    shape = torch.tensor(matrix.shape)
    tensors = {"weight_packed": packed(codes), "weight_scale": scale.half(), "weight_shape": shape}
    return tensors | {"weight_zero_point": packed(zero.T.contiguous()).T.contiguous()}, decoded


def gptq(matrix):
    codes, scale, zero, decoded = grouped(matrix)
    order = torch.arange(matrix.shape[1]) // 16
    return {
        "qweight": packed(codes).T.contiguous(),
        "qzeros": packed((zero - 1).T.contiguous()),
        "scales": scale.T.contiguous().half(),
        "g_idx": order.int(),
    }, decoded


def awq(matrix):
    codes, scale, zero, decoded = grouped(matrix)
    places = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # which number lies n-th in a word

    def words(rows):
        return packed(rows.unflatten(1, (-1, 8))[..., places].flatten(1))

    return {
        "qweight": words(codes.T.contiguous()),
        "qzeros": words(zero.T.contiguous()),
        "scales": scale.T.contiguous().half(),
    }, decoded


COMPRESSED = {"quant_method": "compressed-tensors"}
STATIC = {"input_scale": torch.tensor(0.5)}
FORMS = {
    "fp8-per-tensor-static": (
        fp8_per(lambda m: m.abs().max(), "weight_scale", **STATIC),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8-per-channel": (
        fp8_per(lambda m: m.abs().amax(1, keepdim=True), "weight_scale"),
        COMPRESSED | {"format": "float-quantized"},
    ),
    "fp8-inverse-per-tensor": (
        fp8_per(lambda m: m.abs().max(), "weight_scale_inv"),
        {"quant_method": "fp8"},
    ),
    "int8-per-channel": (int8_channels, COMPRESSED | {"format": "int-quantized"}),
    "int4-packed": (int4_packed, COMPRESSED | {"format": "pack-quantized"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
}


@pytest.mark.parametrize("left", ["nothing", "layer-1"])
@pytest.mark.parametrize("form", FORMS)
def test_quantised_checkpoints_are_decoded_as_they_are_read(tmp_path, form, left):
    """Attention and experts in fewer bits, one layer perhaps left as it was."""
    encode, settings = FORMS[form]
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    tensors, decoded = {}, dict(plain)
    for name, matrix in plain.items():
        is_left = "layers.1." in name and left == "layer-1"
        if is_left or not ("experts." in name or "_proj." in name) or matrix.dim() != 2:
            tensors[name] = matrix
            continue
        prefix = name.removesuffix("weight")
        parts, dense = encode(matrix)
        tensors |= {prefix + part: value.clone() for part, value in parts.items()}
        decoded[name] = dense.bfloat16()
    model.config.save_pretrained(tmp_path / "quantised")
    save_file(tensors, tmp_path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    add_quantization(tmp_path / "quantised", settings)
    save_file(decoded, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    stock.set_experts_implementation("batched_mm")
    offloaded = load_offloaded(str(tmp_path / "quantised"), device="cpu")
    with torch.no_grad():
        assert torch.equal(run(offloaded), stock(TOKENS).logits)
    assert diagnose(str(tmp_path / "quantised")).dtype.startswith("bfloat16, decoded from")


def test_blocks_of_fp8_with_a_layer_left_in_bf16_are_decoded(tmp_path):
    save_fp8(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if "layers.1." in n and n.endswith("_scale_inv")]:
        weight, scale = name.removesuffix("_scale_inv"), tensors.pop(name)
        blocks = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        tensors[weight] = (tensors[weight].float() * blocks).bfloat16()
    whole = run(load_offloaded(str(tmp_path), device="cpu"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    offloaded = load_offloaded(str(tmp_path), device="cpu")
    assert not offloaded.store.layouts[0].encoded
    assert torch.equal(run(offloaded), whole)

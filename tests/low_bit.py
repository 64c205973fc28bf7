"""Checkpoints in fewer bits as others publish them, of tiny random models."""

import json

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model


def save_fp8(folder, model_type, block=32, **sizes):
    """A checkpoint as DeepSeek and Qwen publish them: e4m3 matrices and factors of blocks."""
    model = tiny_model(model_type, dtype=torch.bfloat16, **sizes)
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_quantised = "experts." in name and "shared" not in name
        if not is_quantised:
            tensors[name] = tensor
            continue
        blocks = tensor.float().unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        values = (blocks / scales).flatten(2, 3).flatten(0, 1)
        tensors[name] = values.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales[:, 0, :, 0]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    add_quantization(
        folder,
        {
            "quant_method": "fp8",
            "weight_block_size": [block, block],
            "modules_to_not_convert": [
                "self_attn",
                "gate",
                "lm_head",
                "shared_experts",
                "mlp.gate",
            ],
        },
    )


def add_quantization(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def save_mxfp4(folder, **sizes):
    """A checkpoint as GPT-OSS is published: random codes of four bits, and exponents of groups."""
    tiny_model("gpt_oss", dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, inputs, outputs = tensor.shape
            shape = (num_experts, outputs, inputs // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=generator).byte()
            exponents = torch.randint(119, 124, shape[:-1], generator=generator)
            tensors[f"{name}_scales"] = exponents.byte()
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    add_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": []})

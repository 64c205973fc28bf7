"""Models of known shapes with RANDOM weights, their experts in one pool of pinned host memory.

Pinning costs about a second per GiB, so all layers and all shapes share the pool: layer i reads
the rows of layer i modulo the layers that fit. The bytes that cross the link are the same.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from foreroute.data.adapters import discover
from foreroute.data.adapters.seam import is_experts_module
from foreroute.runtime.parallel import UNSLICED, SliceRanks, cut, narrowed
from foreroute.runtime.store.encodings import Encoder, Lossless, encoder_named, native_encoder
from foreroute.runtime.store.host_store import HostExpertStore, RowLayout, allocate_host
from foreroute.runtime.store.offload import OffloadedModel
from foreroute.runtime.store.row_writer import RowWriter

POOL_BYTES = 6 << 30
TINY_POOL_BYTES = 2 << 20
CHUNK_BYTES = 256 << 20
SPREAD = 0.02

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 6,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "sliding_window": 128,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "sliding_window": None,
    },
}
"""Qwen3's top-k is the recording's 6 (the model's own is 8)."""

SHAPES |= {
    "12-layers-64-small-experts": {
        "model_type": "qwen3_moe",
        "hidden_size": 768,
        "moe_intermediate_size": 384,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""The sizes of the model that `end_to_end_gpu.py` trains: experts of 1.8 MB."""

SHAPES |= {
    "gpt-oss-20b-mxfp4": SHAPES["gpt-oss-20b"] | {"expert_dtype": "mxfp4"},
    "qwen3-30b-a3b-lossless": SHAPES["qwen3-30b-a3b"] | {"expert_dtype": "lossless"},
    "qwen3-30b-a3b-int8": SHAPES["qwen3-30b-a3b"] | {"expert_dtype": "int8"},
}
"""Experts in fewer bits: as GPT-OSS is released, and as `--expert-dtype` stores them."""
MXFP4_EXPONENT = 127 - 9
INT8_SCALE = SPREAD / 64

FEWER_LAYERS = {"mixtral-8x7b": 16}
"""So that all experts fit an 80 GB GPU; rows say it in the shape's name, nothing is scaled up."""

TINY = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
"""What replaces a shape's sizes under --tiny; experts and top-k stay."""


class HostPool:
    """Random bfloat16 numbers in host memory, pinned for a GPU."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Allocate and fill.

        Args:
            num_bytes: Size; a multiple of 2.
            device: The GPU that will read it (which also draws the numbers), or the CPU.
        """
        self._is_pinned = device.type == "cuda"
        self._flat, self._device = allocate_host(1, num_bytes, is_pinned=self._is_pinned)[0], device
        self._fill()

    def _fill(self) -> None:
        for part in self._flat.split(CHUNK_BYTES):
            noise = torch.randn(len(part) // 2, device=self._device, dtype=torch.bfloat16) * SPREAD
            part.copy_(noise.view(torch.uint8))

    def rows(self, num_layers: int, num_experts: int, layout: RowLayout) -> list[Tensor]:
        """Rows for every layer, [E, row_bytes] each; layers share them round robin.

        Args:
            num_layers: L.
            num_experts: E.
            layout: Of a row; scales are set so that numbers are about as large as unscaled ones.

        Raises:
            ValueError: If not even one layer fits.
        """
        row_bytes = layout.row_bytes
        layer_bytes = num_experts * row_bytes
        num_distinct = min(num_layers, len(self._flat) // layer_bytes)
        if num_distinct < 1:
            raise ValueError(
                f"One layer's experts take {layer_bytes:,} bytes; the pool has "
                f"{len(self._flat):,}. Give a larger pool."
            )
        self._fill()  # another model's scales may lie where this one's numbers do
        distinct = self._flat[: num_distinct * layer_bytes].view(
            num_distinct, num_experts, row_bytes
        )
        if any(isinstance(p.encoding, Lossless) for p in layout.encoded.values()):
            for rows in distinct:
                self._encode(rows, layout)
        scales = [name for name in layout.parameters if name.endswith("_scales")]
        for rows in distinct if scales else ():
            views = layout.views(rows)
            for name in scales:
                is_exponent = views[name].dtype == torch.uint8
                views[name].fill_(MXFP4_EXPONENT if is_exponent else INT8_SCALE)
        return [distinct[i % num_distinct] for i in range(num_layers)]

    def _encode(self, rows: Tensor, layout: RowLayout) -> None:
        """Write encoded normal numbers, exceptions and all; random bits would have no base."""
        writer = RowWriter(layout, rows, self._device if self._is_pinned else None)
        for name, parameter in layout.encoded.items():
            for expert_id in range(len(rows)):
                noise = torch.randn(parameter.shape, device=self._device, dtype=torch.bfloat16)
                writer.put(name, expert_id, 0, noise * SPREAD)

    def filled(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Ordinary (pageable) memory of that shape with numbers of the pool."""
        tensor = torch.empty(shape, dtype=dtype)
        flat = tensor.view(-1).view(torch.uint8)
        for part in flat.split(len(self._flat)):
            part.copy_(self._flat[: len(part)])
        return tensor

    def close(self) -> None:
        """Give the page locks back."""
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._flat.data_ptr())


def settings_of(shape: str, *, layers: int | None = None, is_tiny: bool = False) -> dict[str, Any]:
    """A shape's configuration values.

    Args:
        shape: One of `SHAPES`.
        layers: Decoder layers; if None, all, or what an 80 GB GPU holds of them.
        is_tiny: Sizes for a test on a CPU.
    """
    settings = dict(SHAPES[shape])
    settings["num_hidden_layers"] = (
        layers or FEWER_LAYERS.get(shape) or settings["num_hidden_layers"]
    )
    if is_tiny:
        settings |= {name: value for name, value in TINY.items() if name in settings}
    return settings


def label_of(shape: str, *, layers: int | None = None, is_tiny: bool = False) -> str:
    """What rows call a shape: says where it has fewer layers than the model of that name."""
    if is_tiny:
        return f"tiny {shape}"
    own = settings_of(shape, layers=layers)["num_hidden_layers"]
    full = SHAPES[shape]["num_hidden_layers"]
    return shape if own == full else f"{shape} ({own} of {full} layers)"


def build(
    settings: dict[str, Any], name: str, pool: HostPool, device: str, ranks: SliceRanks = UNSLICED
) -> OffloadedModel:
    """A model of those sizes with random weights, all but its experts on the device.

    Args:
        settings: From `settings_of`.
        name: What messages call it.
        pool: Where its experts' weights are.
        device: cuda or cpu.
        ranks: The processes that hold a slice of each expert each.
    """
    kind, expert_dtype = settings.pop("model_type"), settings.pop("expert_dtype", None)
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = [module for module in model.modules() if is_experts_module(module)]
    with narrowed(cut(experts, ranks)):
        layouts = [RowLayout.of(module, _encoder(expert_dtype)) for module in experts]
    num_experts = next(iter(experts[0].parameters())).shape[0]
    for module in experts:
        module._parameters.clear()
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(0, SPREAD) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    for path, module in list(model.named_modules()):
        if path.endswith("rotary_emb"):  # its frequencies are no parameters
            parent, _, attribute = path.rpartition(".")
            fresh = type(module)(config=config).to(device)
            setattr(model.get_submodule(parent), attribute, fresh)
    target = torch.device(device)
    store = HostExpertStore([], is_pinned=target.type == "cuda")
    store.layouts += layouts
    store.rows += pool.rows(len(layouts), num_experts, layouts[0])
    return OffloadedModel(discover(model.eval(), name), store, target, ranks=ranks)


def _encoder(expert_dtype: str | None) -> Encoder | None:
    if expert_dtype == "mxfp4":
        return native_encoder({"quant_method": "mxfp4"})
    return None if expert_dtype is None else encoder_named(expert_dtype)


def put_experts_back(offloaded: OffloadedModel, pool: HostPool, num_distinct: int = 2) -> None:
    """Give a model its experts' parameters again, in ordinary host memory shared by its layers.

    Args:
        offloaded: A model of `build`, not attached to an engine.
        pool: Where the numbers come from.
        num_distinct: Layers with memory of their own.
    """
    tensors: list[dict[str, Tensor]] = []
    for i, (layer, layout) in enumerate(
        zip(offloaded.moe.layers, offloaded.store.layouts, strict=True)
    ):
        if i < num_distinct:
            sizes = {n: (layer.num_experts, *spec.shape) for n, spec in layout.parameters.items()}
            tensors.append(
                {
                    n: pool.filled(torch.Size(size), layout.parameters[n].dtype)
                    for n, size in sizes.items()
                }
            )
        for name, tensor in tensors[i % num_distinct].items():
            layer.experts.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def free_memory() -> None:
    """Give back the memory of engines that are closed: their hooks make reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Makes a model without weights run: fewer layers and made-up numbers show how it routes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

SPREAD = 0.08
NUM_DRAWN = 1_000_003  # a prime: rows of a matrix filled over and over with them differ
LARGEST = 2**28  # numbers of a matrix; larger ones are embeddings, and only some rows are read


def keep_one_layer_of_each_kind(layers: nn.ModuleList) -> None:
    """Cut a model's layers off after the last one that is unlike all before it.

    Args:
        layers: Decoder layers, in order; changed in place. Two are of a kind if their tensors have
            the same names and shapes.
    """
    kinds = [
        tuple((name, tensor.shape) for name, tensor in layer.state_dict().items())
        for layer in layers
    ]
    del layers[1 + max(map(kinds.index, kinds)) :]


def make_up_numbers(model: nn.Module, *, but_not: Iterable[nn.Module]) -> None:
    """Replace every tensor on the meta device by random numbers, float32, on the CPU.

    All matrices share the memory of the largest, so that a model of any size fits. Biases are near
    0, other vectors near 1 as the weights of norms are, and integers are 0.

    Args:
        model: Built on the meta device; changed in place.
        but_not: Modules whose own tensors stay as they are: the experts.
    """
    left_out = set(but_not)
    modules = [module for module in model.modules() if module not in left_out]
    sizes = [p.numel() for module in modules for p in module.parameters(recurse=False)]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(NUM_DRAWN, generator=generator) * SPREAD
    most = max((size for size in sizes if size <= LARGEST), default=0)
    pool = drawn.repeat(1 + most // NUM_DRAWN)

    def made_up(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.dim() < 2:
            around = 0.0 if name.endswith("bias") else 1.0
            return around + torch.randn(tensor.shape, generator=generator) * SPREAD
        if tensor.numel() > LARGEST:
            return pool.as_strided(tensor.shape, [1] * tensor.dim())
        return pool[: tensor.numel()].view(tensor.shape)

    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(
                name, nn.Parameter(made_up(name, parameter), requires_grad=False)
            )
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, made_up(name, buffer))

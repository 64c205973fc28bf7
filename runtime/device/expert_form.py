"""Recognises how an experts module computes, so that the kernels can stand in for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.runtime.device.kernels.activation import Activation, ExpertForm, activate_reference

PROBE_WIDTH = 64
TOLERANCE = 1e-3
GATED: tuple[Activation, ...] = ("silu", "gelu-tanh", "clamped-swish")


def find_expert_form(experts: nn.Module) -> ExpertForm | None:
    """The form whose activation gives what the module's own gives, by trying each.

    Args:
        experts: A module that goes through transformers' experts interface.

    Returns:
        None if no form does; such a model cannot use the kernels.
    """
    module: Any = experts
    sample = torch.linspace(-9, 9, 3 * 2 * PROBE_WIDTH).view(3, -1)  # [3, 2 * width]
    layout = {
        "is_interleaved": not module.is_concatenated,
        "is_transposed": bool(module.is_transposed),
    }
    if not module.has_gate:
        form = ExpertForm(activation="relu-squared", has_gate=False, **layout)
        return form if _agrees(module.act_fn(sample), sample, form) else None
    expected = module._apply_gate(sample)
    for activation in GATED:
        form = ExpertForm(
            activation=activation,
            alpha=float(getattr(module, "alpha", 1.0)),
            limit=float(getattr(module, "limit", 0.0) or 0.0),
            **layout,
        )
        if _agrees(expected, sample, form):
            return form
    return None


def why_no_form(layers: Iterable[nn.Module]) -> str:
    """Why the kernels cannot stand in for a model's experts; empty if they can.

    Args:
        layers: The experts modules of all its MoE layers.
    """
    forms = {find_expert_form(experts) for experts in layers}
    if None in forms:
        return "the experts' activation has no kernel"
    return "its layers' experts compute in different ways" if len(forms) > 1 else ""


def _agrees(expected: Tensor, sample: Tensor, form: ExpertForm) -> bool:
    got = activate_reference(sample, form)
    return got.shape == expected.shape and torch.allclose(got, expected, atol=TOLERANCE)

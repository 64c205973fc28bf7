"""Fused norms give what the model's own give, and go away again."""

import copy
from contextlib import ExitStack
from typing import Any

import torch

from foreroute.runtime.device.fusions import norms, survey
from foreroute.runtime.device.fusions.norms import fuse_norms


def test_fused_norms_change_steps_by_rounding_only_and_no_prompt(
    tiny_moe: Any, monkeypatch: Any
) -> None:
    is_prompt = False
    model = copy.deepcopy(tiny_moe.model)
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
        with ExitStack() as undo:
            # 4 layers: two norms and one each for queries and keys; one at the end
            assert fuse_norms(model, undo, lambda: is_prompt) == 4 * 4 + 1
            fused = model(tokens).logits
            is_prompt = True
            monkeypatch.setattr(norms, "normed_reference", None)  # nobody calls it
            assert torch.equal(model(tokens).logits, expected)
        again = model(tokens).logits
    torch.testing.assert_close(fused, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, expected)


def test_a_layer_norm_is_left_alone() -> None:
    with ExitStack() as undo:
        assert fuse_norms(torch.nn.LayerNorm(8), undo, bool) == 0


def test_a_norm_that_may_take_a_gate_is_left_alone() -> None:
    class Gated(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x if gate is None else x * gate)

    with ExitStack() as undo:
        assert fuse_norms(Gated(8, eps=1e-6), undo, bool) == 0


def test_a_survey_names_each_part_once_with_its_reason() -> None:
    class OddNorm(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    class Picky(torch.nn.Linear):
        pass

    norms = [torch.nn.RMSNorm(8, eps=1e-6), torch.nn.RMSNorm(4, eps=1e-6)]
    model = torch.nn.Sequential(*norms, OddNorm(8, eps=1e-6), torch.nn.LayerNorm(8))
    found = survey(model, [Picky(8, 4)] * 2)
    assert found.joined == ("norm RMSNorm",)
    assert found.left == (
        "norm OddNorm: it gives something else than an RMS norm",
        "norm LayerNorm: it has other parameters than an RMS norm's",
        "router Picky: it does not return logits, gate weights and ids",
        "rotation: no apply_rotary_pos_emb in the model's files",
        "attention of single tokens: its config names no implementation",
    )

"""The fit as Lightning sees it: KL to the true routers, AdamW with a cosine, held-out recall."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional

from foreroute.estimators import EstimatorStack, RecallMeter
from foreroute.train.shards import RoutingBatch

WEIGHT_DECAY = 0.1


def kl_to_router(predicted_logits: Tensor, router_logits: Tensor) -> Tensor:
    """Divergence of the predicted from the true routing distribution, per layer pair.

    Args:
        predicted_logits: [P, T, E], float.
        router_logits: True logits, [P, T, E], float.

    Returns:
        KL(softmax(true) || softmax(predicted)) in nats, mean over tokens, [P], float32.
    """
    predicted = functional.log_softmax(predicted_logits.float(), dim=-1)
    true = functional.log_softmax(router_logits.float(), dim=-1)
    divergence = functional.kl_div(predicted, true, reduction="none", log_target=True)
    return divergence.sum(dim=-1).mean(dim=-1)


class EstimatorModule(LightningModule):
    """Trains all pairs of a stack together; no pair's gradient depends on another's.

    Args:
        stack: What is trained.
        learning_rate: At the first step; follows a cosine to zero.
        num_steps: Optimizer steps of the whole fit.
    """

    def __init__(self, stack: EstimatorStack, *, learning_rate: float, num_steps: int) -> None:
        super().__init__()
        self.stack, self.learning_rate, self.num_steps = stack, learning_rate, num_steps
        self._meter = self._new_meter()

    def training_step(self, batch: RoutingBatch, batch_idx: int) -> Tensor:
        """Sum over pairs, so that each pair learns as if it were alone."""
        divergence = kl_to_router(self.stack(batch.source), batch.target_logits)
        self.log("train_kl", divergence.mean(), prog_bar=True, batch_size=batch.num_tokens)
        return divergence.sum()

    def on_validation_epoch_start(self) -> None:
        """Start counting held-out recall anew."""
        self._meter = self._new_meter()

    def validation_step(self, batch: RoutingBatch, batch_idx: int) -> None:
        """Count one batch of held-out tokens."""
        logits = self.stack(batch.source)
        self._meter.update(logits, batch.target_ids, batch.target_gate_weights)
        divergence = kl_to_router(logits, batch.target_logits).mean()
        self.log("held_out_kl", divergence, batch_size=batch.num_tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over layers."""
        recall = self._meter.compute().recall_at_k
        self.log("held_out_recall_at_k", sum(recall) / len(recall), prog_bar=True)

    def configure_optimizers(self) -> Any:  # Lightning's own return type is a private union
        """AdamW over the form's parameters, whose steps do not depend on the number of pairs."""
        optimizer = torch.optim.AdamW(
            self.stack.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _new_meter(self) -> RecallMeter:
        return RecallMeter(len(self.stack.target_layers), self.stack.geometry.top_k)

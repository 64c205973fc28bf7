"""The fit as Lightning sees it: one loss over all pairs, AdamW with a cosine, recall as it goes."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from foreroute.estimators import EstimatorStack, RecallMeter
from foreroute.train.losses import LOSSES, LossName, RouterRule
from foreroute.train.prepared import PreparedBatch, prepare
from foreroute.train.shards import RoutingBatch

WEIGHT_DECAY = 0.1
LOG_STEPS = 10
"""Optimizer steps between two entries of the log."""


class EstimatorModule(LightningModule):
    """Trains all pairs of a stack together; no pair's gradient depends on another's."""

    def __init__(
        self,
        stack: EstimatorStack,
        *,
        learning_rate: float,
        num_steps: int,
        loss: LossName = "kl",
    ) -> None:
        """Take the stack and what fits it.

        Args:
            stack: What is trained.
            learning_rate: At the first step; follows a cosine to zero.
            num_steps: Optimizer steps of the whole fit.
            loss: What training makes small.
        """
        super().__init__()
        self.stack, self.learning_rate, self.num_steps = stack, learning_rate, num_steps
        self.loss = LOSSES[loss]
        self._meter = self._new_meter()

    def training_step(self, batch: PreparedBatch | RoutingBatch, batch_idx: int) -> Tensor:
        """Sum over pairs, so that each pair learns as if it were alone."""
        losses, _ = self._losses(batch)
        if batch_idx % LOG_STEPS == 0:
            self.log("train_loss", losses.detach().mean(), prog_bar=True, batch_size=1)
        return losses.sum()

    def on_validation_epoch_start(self) -> None:
        """Start counting recall anew."""
        self._meter = self._new_meter()

    def validation_step(self, batch: PreparedBatch | RoutingBatch, batch_idx: int) -> None:
        """Count one batch of sequences that are not trained on."""
        losses, logits = self._losses(batch)
        self._meter.update(self.stack.ranking(logits), batch.target_ids, batch.target_gate_weights)
        self.log("validation_loss", losses.mean(), batch_size=batch.num_tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over layers."""
        recall = self._meter.compute().recall_at_k
        self.log("validation_recall_at_k", sum(recall) / len(recall), prog_bar=True)

    def configure_optimizers(self) -> Any:  # Lightning's own return type is a private union
        """AdamW over the form's parameters, whose steps do not depend on the number of pairs."""
        optimizer = torch.optim.AdamW(
            self.stack.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _losses(self, batch: PreparedBatch | RoutingBatch) -> tuple[Tensor, Tensor]:
        """Loss of each pair, [P], and the predicted logits, [P, T, E]."""
        tokens = batch if isinstance(batch, PreparedBatch) else prepare(self.stack, batch)
        logits = self.stack.form(tokens.features.float(), tokens.anchor_logits)
        return self.loss(logits, tokens, RouterRule.of(self.stack)), logits

    def _new_meter(self) -> RecallMeter:
        return RecallMeter(len(self.stack.target_layers), self.stack.geometry.top_k)

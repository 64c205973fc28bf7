"""What is kept of a training, pair by pair: judged by training sequences set aside for that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foreroute.estimators import EstimatorStack, RecallMeter
from foreroute.estimators.ranks import ALONE, Ranks
from foreroute.train.datamodule import BatchStream, Shards
from foreroute.train.measure import MEASURE_BATCH
from foreroute.train.prepared import PreparedBatch

NUM_SHARES = 21
"""Shares of a correction that are tried, evenly spaced from none to all of it."""


@torch.no_grad()
def settle_pairs(
    stack: EstimatorStack,
    start: Mapping[str, Tensor],
    choosing: Shards[PreparedBatch],
    kept_gain: float,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Give each pair its start back where training did not pay, and shrink the others' corrections.

    A correction is worth most at full size on text like the training text only: on other text its
    best size is smaller. The curve is flat near the top, so that most of the gain stays. All pairs
    get one share: what is set aside is too little to choose each its own.

    Args:
        stack: As trained; changed in place. Pairs that share parameters are left alone.
        start: The form's parameters before training, by name.
        choosing: Tokens to choose by.
        kept_gain: As in `least_share`.
        ranks: The processes that have the other pairs, which get the same share.

    Returns:
        Share that is left of the correction of each pair of all processes; 1 where the start was
        given back.
    """
    trained = {name: value.clone() for name, value in stack.form.state_dict().items()}
    num_pairs = len(stack.target_layers)
    if any(len(value) != num_pairs for value in trained.values()):
        return [1.0] * num_pairs
    num_shares = NUM_SHARES if stack.form.correction_parameters else 1  # the whole, if alone
    shares = torch.linspace(1, 0, num_shares).flip(0)  # [S]
    after = recall_by_share(stack, choosing, shares)  # [S, P]
    stack.form.load_state_dict(start)
    before = recall_by_share(stack, choosing, shares[-1:])[0]  # [P]
    both = ranks.gather((after, before))
    after, before = torch.cat([a for a, _ in both], dim=1), torch.cat([b for _, b in both])
    has_paid = after[-1] > before  # [pairs of all processes]
    kept = torch.ones(len(before))
    if has_paid.any():
        floor = float(before[has_paid].mean())
        kept[has_paid] = shares[least_share(after[:, has_paid].mean(dim=1), floor, kept_gain)]
    first = sum(len(b) for _, b in both[: ranks.rank])
    mine = slice(first, first + num_pairs)
    mask = has_paid[mine].to(stack.input.device)
    for name, parameter in stack.form.named_parameters():
        parameter[mask] = trained[name][mask]
    stack.form.scale_correction(kept[mine].to(stack.input.device))
    return [round(share, 4) for share in kept.tolist()]


def least_share(recalls: Tensor, floor: float, kept_gain: float) -> int:
    """The smallest share of a correction that is good enough.

    Args:
        recalls: Recall of each share, in rising order from none to all, [S].
        floor: Recall that must be reached.
        kept_gain: Share of the whole correction's gain in recall that must be reached too.

    Returns:
        Index of the share; of the whole correction where no other is good enough.
    """
    none, whole = recalls[[0, -1]].tolist()
    is_enough = recalls >= max(none + kept_gain * (whole - none), floor)
    is_enough[-1] = True
    return int(is_enough.int().argmax())


def recall_by_share(stack: EstimatorStack, tokens: Shards[PreparedBatch], shares: Tensor) -> Tensor:
    """Recall at budget K with parts of what the form adds to the anchor logits.

    Args:
        stack: Its form has an anchor, unless the whole of it is all that is asked for.
        tokens: Tokens to measure on.
        shares: [S], in 0..1.

    Returns:
        [S, P], float64, on the CPU.
    """
    meters = [RecallMeter(len(stack.target_layers), stack.geometry.top_k) for _ in shares]
    for batch in BatchStream(tokens, MEASURE_BATCH):
        here = batch.to(stack.input.device)
        logits = stack.form(here.features.float(), here.anchor_logits)
        for meter, share in zip(meters, shares.tolist(), strict=True):
            part = logits if share == 1 else torch.lerp(here.anchor_logits, logits, share)
            meter.update(stack.ranking(part), here.target_ids, here.target_gate_weights)
    return torch.tensor([meter.compute().recall_at_k for meter in meters], dtype=torch.float64)

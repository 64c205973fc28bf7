"""What estimators say on recorded tokens, as likely as it came true on the first of them."""

from __future__ import annotations

import torch
from torch import Tensor

from foreroute.data.routes.traces import gathered
from foreroute.data.traces import Traces
from foreroute.estimators import EstimatorStack
from foreroute.train.calibrate import MarginHistogram


@torch.no_grad()
def predicted(
    traces: Traces, stack: EstimatorStack, source_layer: int, *, num_calibrate: int, count: int
) -> tuple[Tensor, Tensor]:
    """The likeliest experts of one pair's target layer, for every recorded token.

    Args:
        traces: What the source layer saw, and what the target layer then used.
        stack: Estimators, on the CPU.
        source_layer: Decoder layer index the pair reads.
        num_calibrate: Tokens at the start that probabilities are learnt from.
        count: N, experts to name.

    Returns:
        Ids [T, N], int64, most likely first, and probabilities [T, N], float32.

    Raises:
        ValueError: If what the pair reads was not recorded, or there is nothing to learn from.
    """
    own_input, target = stack.input_of(source_layer)[0], stack.target_of(source_layer)
    assert target is not None  # every source layer has one
    parts = []
    for shard_idx in range(len(traces.manifest.shards)):
        read = traces.read(source_layer, shard_idx, own_input.needed)
        state = {name: t if name == "expert_ids" else t.float() for name, t in read.items()}
        logits = stack.predict(source_layer, **state)
        parts.append(stack.ranking(logits, source_layer))
    scores = torch.cat(parts).unsqueeze(0)  # [1, T, E]
    true_ids = gathered(traces, target, "expert_ids").unsqueeze(0)
    histogram = MarginHistogram(traces.geometry.top_k)
    histogram.update(scores[:, :num_calibrate], true_ids[:, :num_calibrate])
    chances, ids = histogram.fit("isotonic")(scores)[0], scores[0].topk(count).indices
    return ids, chances.gather(-1, ids)

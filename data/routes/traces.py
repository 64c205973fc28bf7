"""Reads the routing in traces that collect-traces wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreroute.data.layout import DECODE
from foreroute.data.manifest import MANIFEST_FILE
from foreroute.data.opening import open_traces
from foreroute.data.routes.assemble import ReadOptions
from foreroute.data.routes.route import Route, Scores
from foreroute.data.traces import Traces
from foreroute.estimators.selection import nearly_chosen, router_scores

GUESSES_PER_EXPERT = 2
"""Experts taken to be likely for the next token, per expert that a token uses."""


def is_traces(path: Path) -> bool:
    """Whether this is a folder of traces."""
    return path.is_dir() and (path / MANIFEST_FILE).is_file()


def read_traces(path: Path, options: ReadOptions) -> Route:
    """Read the routing of traces.

    If no token was generated, all count as decode steps. What the router nearly chose is taken as
    likely for the next token.

    Raises:
        ValueError: If the traces are unfinished or damaged.
    """
    traces = open_traces(path)
    geometry = traces.geometry
    phases = torch.cat([traces.tokens(i).phases for i in range(len(traces.manifest.shards))])
    is_decode = (phases == DECODE).numpy()
    ids = [gathered(traces, layer, "expert_ids").numpy() for layer in geometry.layer_indices]
    likely = [_likely(traces, layer) for layer in geometry.layer_indices]
    return Route(
        name=str(path),
        expert_ids=np.stack(ids, 1).astype(np.int16),
        is_decode=is_decode if is_decode.any() else np.ones(len(phases), dtype=bool),
        num_experts=geometry.num_experts,
        likely_ids=np.stack([entry[0] for entry in likely], 1),
        likely_probability=np.stack([entry[1] for entry in likely], 1),
    )


def gathered(traces: Traces, layer_idx: int, name: str) -> Tensor:
    """One tensor of one layer over all shards, [T, ...], as stored."""
    shards = range(len(traces.manifest.shards))
    return torch.cat([traces.read(layer_idx, shard, (name,))[name] for shard in shards])


def _likely(traces: Traces, layer_idx: int) -> tuple[Any, Any]:
    """The experts that the router came nearest to choosing, chosen or not, [T, N] each."""
    top_k = traces.geometry.top_k
    chances = nearly_chosen(gathered(traces, layer_idx, "router_logits"), top_k)  # [T, E]
    best = chances.topk(min(GUESSES_PER_EXPERT * top_k, chances.shape[-1]))
    return best.indices.numpy().astype(np.int16), best.values.numpy()


def read_scores(path: Path) -> Scores | None:
    """How the routers of traces ranked and weighed all experts.

    Args:
        path: A folder of traces.

    Returns:
        None if how gate weights follow from logits is not known.

    Raises:
        ValueError: If the traces are unfinished or damaged.
    """
    traces = open_traces(path)
    geometry, biases = traces.geometry, None
    if geometry.gate_family.scores is None:
        return None
    if traces.anchors is not None:
        biases = traces.anchors.selection_bias
    ranking, scores = [], []
    for place, layer in enumerate(geometry.layer_indices):
        logits = gathered(traces, layer, "router_logits").float()
        found = router_scores(logits, geometry.gate_family)
        scores.append(found.numpy())
        ranking.append((logits if biases is None else found + biases[place]).numpy())
    return Scores(ranking=np.stack(ranking, 1), scores=np.stack(scores, 1))

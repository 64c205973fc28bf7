"""The card of a published trace set: what it holds, and how to score a predictor on it."""

from __future__ import annotations

from collections.abc import Sequence

from foreroute.estimators.types import MoEGeometry


def trace_card(
    geometry: MoEGeometry, name: str, dataset: str, norm: str, states: Sequence[str]
) -> str:
    """The README.md that `datasets` reads the splits from.

    Args:
        geometry: The recorded model's routing.
        name: Of the set.
        dataset: Whose held-out documents they are.
        norm: The norm in front of the routers, in words.
        states: Columns of states.
    """
    columns = " and ".join(f"`{field}`" for field in states)
    return f"""---
license: apache-2.0
pretty_name: {name}
tags: [mixture-of-experts, routing, expert-prefetch]
configs:
- config_name: default
  data_files:
  - split: calibrate
    path: calibrate.parquet
  - split: test
    path: test.parquet
---

# {name}

Routing and hidden states of {geometry.describe()},
recorded by foreroute on held-out documents of `{dataset}`: no predictor of its comparison
was trained on them. One row a token, in order; a layer's arrays come in the order of
`geometry.json`'s `layer_indices`.

| column | shape | what |
|---|---|---|
| `sequence`, `position`, `token_id` | | which token; the first ones of each sequence |
| `expert_ids`, `gate_weights` | layers x {geometry.top_k} | each router's choice and weights |
| `router_logits` | layers x {geometry.num_experts} | what each router said, float16 |
| {columns} | layers x {geometry.hidden_size} | in 8 bits; times `_scale` of token and layer |

`residual` enters the norm in front of a layer's router. `readout` is the next layer's `residual` as
its own attention gives it when run early on this layer's (zeros for the last layer).
`model.safetensors` has what training-free prediction needs: routers, norms ({norm})
and default vectors, in bfloat16.

Fit probabilities on `calibrate`, predict `test`, write a safetensors file of `expert_ids` [tokens,
layers, predictions] (likeliest first), `target_layers` [layers] and `confidence`, and score it
without a GPU:

```
foreroute score --traces THIS_FOLDER --predictions FILE
```
"""

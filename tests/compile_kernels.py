"""Compiles every kernel launch for a GPU that need not be there; run by test_kernels_compile.py.

The interpreter accepts what the compiler does not. Each wrapper is called as the runtime calls it,
on CPU tensors; where it would launch a kernel, that is compiled for an H100 instead.
"""

import itertools
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from foreroute.estimators.types import GateFamily
from foreroute.runtime.device.kernels import demand as demand_module
from foreroute.runtime.device.kernels.activation import ExpertForm
from foreroute.runtime.device.kernels.attention import decode_attention
from foreroute.runtime.device.kernels.behind import plan_behind
from foreroute.runtime.device.kernels.cache import store_token
from foreroute.runtime.device.kernels.demand import Demand
from foreroute.runtime.device.kernels.fetch import BLOCK_WORDS, fetch
from foreroute.runtime.device.kernels.head import plan_head
from foreroute.runtime.device.kernels.heads import ProjectedHeads, place_heads
from foreroute.runtime.device.kernels.linear import products
from foreroute.runtime.device.kernels.lossless import unpack
from foreroute.runtime.device.kernels.miss import NUM_JUDGED, LayerRule, RuledChoice
from foreroute.runtime.device.kernels.norm import Norm, normed
from foreroute.runtime.device.kernels.plan import plan
from foreroute.runtime.device.kernels.predict import predict_logits, rank_experts
from foreroute.runtime.device.kernels.products import expert_products
from foreroute.runtime.device.kernels.quasi_hidden import add_expected_output
from foreroute.runtime.device.kernels.rotary import rotate
from foreroute.runtime.device.kernels.route import DemandPlan, RouterProduct, route
from foreroute.runtime.device.kernels.staging import stage
from foreroute.runtime.device.kernels.tables import ResidencyTables
from foreroute.runtime.device.kernels.top_k import softmax_top_k
from foreroute.runtime.on_miss import find_rule
from foreroute.runtime.on_miss.choice import Gates
from foreroute.runtime.policies import find_policy
from foreroute.runtime.store.encodings import (
    EncodedParameter,
    EncodedWeights,
    Fp8,
    Fp8Blocks,
    Int4,
    Int8,
    Lossless,
    Mxfp4,
)
from foreroute.runtime.store.staging import Staging

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float16: "*fp16",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages")
compiled: set[str] = set()


def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for a launch."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    asm = triton.compile(source, target=H100, options=options).asm
    assert asm["cubin"]
    if kernel.fn.__name__ == "_up_kernel":  # what it copies takes no turn through shared memory
        assert not re.search(r"ttg.convert_layout.*i64", asm["ttgir"])
    compiled.add(kernel.fn.__name__ + ":" + kernel.fn.__module__.rpartition(".")[2])


def call_everything() -> None:
    """One call of every wrapper in every form that compiles differently."""
    half = {"dtype": torch.bfloat16}
    ids, chances = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4)
    tables = ResidencyTables.empty(16, 8, "cpu")
    copies = torch.zeros(3, 4, dtype=torch.int32)
    places = torch.zeros(2, 4, dtype=torch.int32)
    for rule in (find_policy("lrfu").device_rule(), find_policy("lru").device_rule()):
        plan(ids, tables, rule, copies, places=places)
        plan(ids, tables, rule, copies, is_prefetch=True)
    head = {"num_needed": 8, "head_words": copies[0, :1], "num_words": 8}
    plan_head(ids, chances, tables, copies, **head)
    plan_head(ids, chances, tables, copies, **head, num_whole=copies[0, :1])
    rows = torch.zeros(16, 64, dtype=torch.uint8)
    fetch(rows, rows, copies, num_blocks=4)
    fetch(rows, rows, copies, num_blocks=4, head_words=copies[0, :1])
    fetch(rows, rows, copies, num_blocks=4, behind=tables.progress)
    fetch(rows, rows, copies, num_blocks=4, head_words=copies[0, :1], behind=tables.progress)
    area = Staging([rows], torch.device("cpu"))
    demand = Demand(rows, rows, copies, copies[0, :1], tables.arrived, tables.progress, 48)
    stage(demand, places, torch.ones(16, dtype=torch.int32), area, 0)
    forms = {
        "rows": ExpertForm(activation="silu"),
        "tanh": ExpertForm(activation="gelu-tanh"),
        "ungated": ExpertForm(activation="relu-squared", has_gate=False),
        "transposed": ExpertForm(
            activation="clamped-swish", is_interleaved=True, is_transposed=True, limit=7.0
        ),
    }
    hidden = torch.zeros(1, 64, **half)
    for form in forms.values():
        name = "gate_up_proj" if form.has_gate else "up_proj"
        first, second = (8, 96 if form.has_gate else 48, 64), (8, 64, 48)
        if form.is_transposed:
            first, second = (8, 64, 96), (8, 48, 64)
        weights = {name: torch.zeros(first, **half), "down_proj": torch.zeros(second, **half)}
        if form.is_interleaved:
            weights |= {f"{name}_bias": torch.zeros(8, 96, **half)}
            weights |= {"down_proj_bias": torch.zeros(8, 64, **half)}
        moved = (rows, rows, copies, copies[0, :1], tables.arrived, tables.progress)
        for demand in (None, Demand(*moved, first_bytes=48)):
            expert_products(hidden, places, chances, weights, form, hidden, demand)
        demand_module.BLOCK_WORDS = 64  # as many as a product has inputs
        expert_products(hidden, places, chances, weights, form, hidden, demand, hidden)
        demand_module.BLOCK_WORDS = BLOCK_WORDS
    for kind in (Int8, Fp8, Int4, Mxfp4, Fp8Blocks, Lossless):
        weights = {}
        for name, rows, columns in (("gate_up_proj", 128, 64), ("down_proj", 64, 64)):
            encoding = kind(rows, columns)
            parts = {k: torch.zeros(8, *size, dtype=t) for k, (size, t) in encoding.parts().items()}
            parameter = EncodedParameter(encoding, (rows, columns), torch.bfloat16, False)
            weights[name] = EncodedWeights(parameter, parts)
        expert_products(hidden, places, chances, weights, forms["rows"], hidden)
    encoding = Lossless(16, 67)
    packed = [torch.zeros(2, *size, dtype=t) for size, t in encoding.parts().values()]
    unpack(*packed, 16, 67)
    for dtype in (torch.bfloat16, torch.float32):
        query, keys = torch.zeros(1, 8, 1, 64, dtype=dtype), torch.zeros(1, 2, 128, 64, dtype=dtype)
        mask = torch.ones(1, 1, 1, 128, dtype=torch.bool)
        decode_attention(query, keys, keys, mask, scaling=0.1)
        sinks = torch.zeros(8, dtype=dtype)
        decode_attention(query, keys, keys, mask, scaling=0.1, softcap=5.0, sinks=sinks)
        store_token(query[:, :2], query[:, :2], keys, keys, torch.zeros(1, dtype=torch.long))
        rotate(query, query[:, :2], *torch.zeros(2, 1, 1, 64, dtype=dtype))
        softmax_top_k(torch.zeros(1, 16, dtype=dtype), 4, renormalise=True)
    softmax_top_k(torch.zeros(1, 16), 4, renormalise=False)
    weight, factor = torch.zeros(16, 64, **half), torch.zeros(64, **half)
    norm, arrivals = Norm(factor=factor, eps=1e-6), torch.zeros(1, dtype=torch.int32)
    for tokens in (hidden, torch.zeros(3, 64, **half)):
        products(tokens, [weight] * 3, [factor] * 3, norm=norm)
        products(tokens, [weight], residual=tokens)
        normed(tokens, norm)
        for bias, before in ((None, norm), (factor, None)):
            router = RouterProduct(
                weight=weight,
                bias=bias,
                top_k=4,
                renormalise=True,
                dtype=torch.bfloat16,
                arrivals=arrivals,
            )
            demand = DemandPlan(
                tables=tables, rule=find_policy("lrfu").device_rule(), copies=copies, places=places
            )
            route(tokens, router, before, demand)
            route(tokens, router, before)
    call_rules(router, Norm(factor=factor, eps=1e-6))
    heads = ProjectedHeads(
        states=torch.zeros(1, 6 * 64, **half),
        starts=(0, 128, 256),
        query_heads=2,
        key_heads=2,
        query_norm=norm,
        key_norm=None,
        cos=factor.view(1, 1, 64),
        sin=factor.view(1, 1, 64),
    )
    cached = torch.zeros(1, 2, 8, 64, **half)
    place_heads(heads, cached, cached, torch.zeros(1, dtype=torch.long))
    weight, bias = torch.zeros(16, 64, **half), torch.zeros(16)
    routed = {"default_vectors": weight, "expert_ids": ids, "gate_weights": chances}
    predict_logits(hidden, weight, bias, eps=1e-6, **routed)
    predict_logits(hidden, weight, bias, eps=None)
    add_expected_output(hidden, ids, chances, weight.float())
    adaptive, lead = find_policy("adaptive").device_rule(), arrivals
    for has_shadows in (True, False):
        tables = ResidencyTables.empty(16, 8, "cpu", lead=lead, has_shadows=has_shadows)
        plan(ids, tables, adaptive, copies, places=places)
        demand = DemandPlan(tables=tables, rule=adaptive, copies=copies, places=places)
        route(hidden, router, norm, demand)
    table = torch.zeros(9)
    rank_experts(torch.zeros(1, 16), table[:1], table[:1], table, top_k=4, budget=4)


def call_rules(router: RouterProduct, norm: Norm) -> None:
    """Rules on a miss in the launches that decide on a router's choice."""
    tables, score_rule = ResidencyTables.empty(16, 8, "cpu"), find_policy("lrfu").device_rule()
    judged = torch.zeros(NUM_JUDGED, dtype=torch.int32)
    rules = ("skip:0.5", "bonus:0.1+substitute:0.5", "threshold:0.2", "substitute+budget:1MB")
    rules += ("skip", "predicted", "predicted+substitute:0.5")
    kinds = [kind for kind in GateFamily if kind.scores]
    for text, kind in zip(rules, itertools.cycle(kinds), strict=False):
        bias = torch.zeros(16) if kind.scores == "sigmoid" else None
        layer_rule = LayerRule(
            rule=find_rule(text),
            gates=Gates(family=kind, selection_bias=bias),
            judged=judged,
            floor=0.5,
            allowed=1.5,
            is_first=True,
        )
        copies = torch.zeros(3, 4, dtype=torch.int32)
        given = {"tables": tables, "rule": score_rule, "copies": copies, "places": copies[:2]}
        state = torch.zeros(1, 64, dtype=torch.bfloat16)
        route(state, router, norm, DemandPlan(**given, on_miss=layer_rule))
        ids, copies = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 12, dtype=torch.int32)
        ranked = torch.cat([ids, ids], -1) if layer_rule.rule.predicted else None
        choice = RuledChoice.of(torch.zeros(3, 16), ids, torch.zeros(3, 4), ranked)
        plan(choice.expert_ids, tables, score_rule, copies, ruling=(layer_rule, choice))
        for only_likely in (False, True):
            plan_behind(ids, ids, tables, judged, copies, only_likely=only_likely)


if __name__ == "__main__":
    JITFunction.run = compile_launch
    call_everything()
    print("\n".join(sorted(compiled)))  # noqa: T201

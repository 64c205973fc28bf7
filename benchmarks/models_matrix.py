"""Checks every MoE type transformers knows on a tiny random model, and writes docs/models.md.

python benchmarks/models_matrix.py              # all of them
python benchmarks/models_matrix.py qwen3_vl_moe  # one, and the other rows as they were
"""

from __future__ import annotations

import copy
import io
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tiny_images import image_prompt, takes_images
from tiny_models import SUPPORTED, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING

from foreroute.data.adapters import MoEModel, discover, stock_experts_function
from foreroute.data.adapters.exceptions import why_not_captured
from foreroute.data.adapters.model_class import auto_class, writing_part
from foreroute.data.recorder import RoutingRecorder
from foreroute.estimators.selection import gate_weights
from foreroute.runtime import Engine, EngineConfig
from foreroute.runtime.device.expert_form import why_no_form
from foreroute.runtime.planning.doctor import diagnose, report
from foreroute.runtime.store.offload import OffloadedModel, offload

ROOT = Path(__file__).parents[1]
UNSUPPORTED = [
    "dbrx",
    "diffusion_gemma",
    "doge",
    "jetmoe",
    "longcat_flash",
    "switch_transformers",
]
"""MoE types that are refused, each in one line."""
TYPES = [*sorted(SUPPORTED), *UNSUPPORTED]
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}
"""What the config.json of Qwen/Qwen3-30B-A3B says about its size."""
NUM_SLOTS = 4  # of 8 experts
NEW_TOKENS = 16
PROMPT_SHAPES = [(1, 1), (1, 9), (3, 6), (1, 24)]
GENERATED_SHAPES = [(1, 9), (3, 6)]
EXTRAS: dict[str, dict[str, Any]] = {
    "left padding": {},
    "beam search": {"num_beams": 3},
    "several samples": {"num_return_sequences": 2, "do_sample": True},
}
EXTRA_TOKENS = 5
WEIGHT_TOLERANCE = 1e-3  # float32; models that gather in bfloat16 are not among the tiny ones
LOGIT_TOLERANCE = 1e-4  # float32, sums in another order
LEGEND = """\
* **recorded**: with the recorder on, logits are bit-equal; `norm(residual)` is the router input bit
  for bit where there is such a norm; the recorded ids and gate weights reproduce the experts'
  output bit for bit, and follow from the recorded logits where the gate rule is known.
* **exact**: 4 slots of 8 experts, prompts of 1, 9, 24 and 3 x 6 tokens, then 16 generated tokens
  for batch 1 and 3: logits and tokens bit-equal to stock `batched_mm` on the CPU. So are 5 tokens
  with left padding, beam search and several samples.
* **speculative**: `on_miss=predicted` runs, with gate weights from the true router's logits; where
  it says `skip only`, that mode runs and `predicted` is refused in one line.
* **graph**: a static cache gives the same 16 tokens and the experts' activation has a kernel, so
  nothing known stands in the way of one CUDA graph per token. `tests/test_decode_step.py` holds the
  step with its kernels, interpreted, to the plain logits. `tests/test_gpu.py` runs qwen3_moe,
  gpt_oss, mixtral, olmoe and deepseek_v3 on a GPU; **the others were not run on one**.
* **images**: a prompt with an image in it (made-up pixels, in the layout of transformers'
  processor) and 16 generated tokens are bit-equal too; `-` where the model reads text alone.
"""

IMAGES = """\
## Images in the prompt

Models that take images are built whole (`AutoModelForImageTextToText`), so `generate` takes what
their processor gives; images are read with the prompt, and what is written is text, in the same
decode steps as ever. Where a whole also speaks (qwen3_omni_moe), its thinker is run.

```python
inputs = AutoProcessor.from_pretrained(name).apply_chat_template(
    [{"role": "user", "content": [{"type": "image", "path": "cat.png"},
                                  {"type": "text", "text": "What is this?"}]}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = Engine.from_pretrained(name, expert_slots="25%").generate(**inputs, max_new_tokens=64)
```

Any text model above inside a whole of another type (mistral3 with mistral4, internvl with
qwen3_moe) goes the same way: parts are found by structure.
"""


@dataclass(frozen=True)
class Row:
    """What works for one model type."""

    model_type: str
    recorded: str
    """`yes` or `no`."""
    exact: str
    """`yes` or `no`."""
    speculative: str
    """`yes`, `skip only` or `no`."""
    graph: str
    """`yes` or `no`."""
    images: str
    """`yes`, `no` or `-` for a model of text alone."""
    note: str
    """The reasons, one line."""


def row_of(model_type: str) -> Row:
    """Build a tiny model of that type and check everything the table states.

    Raises:
        AssertionError: If something that was found to be supported gives other results.
    """
    try:
        auto_class(writing_part(CONFIG_MAPPING[model_type]()), model_type)
        model = tiny_model(model_type)
        moe = discover(model, model_type)
    except ValueError as error:
        return Row(model_type, "no", "no", "no", "no", "no", str(error).rpartition(": ")[2])
    with torch.no_grad():
        expected = model(prompt(2, 7), use_cache=False).logits  # as transformers runs it
        model.set_experts_implementation("batched_mm")
        again = model(prompt(2, 7), use_cache=False).logits
    torch.testing.assert_close(again, expected, atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)
    stock = copy.deepcopy(model)
    check_recording(moe)
    with torch.no_grad():
        offloaded = offload(model, device=torch.device("cpu"), model_name=model_type)
    check_exact(stock, offloaded)
    predicted = why_not_predicted(offloaded)
    graph = why_no_graph(stock, offloaded)
    hashed = [layer.layer_idx for layer in moe.layers if layer.is_hash_routed]
    notes = [f"layers {hashed} route by token, not by logits"] if hashed else []
    notes += [f"predicted: {predicted}"] if predicted else []
    notes += [f"graph: {graph}"] if graph else []
    return Row(
        model_type=model_type,
        recorded="yes",
        exact="yes",
        speculative="skip only" if predicted else "yes",
        graph="no" if graph else "yes",
        images="yes" if takes_images(stock) else "-",
        note="; ".join(notes),
    )


def prompt(batch: int, length: int) -> Tensor:
    """Random tokens, [batch, length]."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(3, 100, (batch, length), generator=generator)


def greedy(model: Any, tokens: Tensor, **settings: Any) -> Tensor:
    """Prompt and 16 more tokens, [batch, length + 16]."""
    output: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **settings,
    )
    return output


def with_extra(model: Any, name: str) -> Tensor:
    """A left-padded prompt of two sequences and 5 more tokens, by one of `EXTRAS`."""
    tokens = prompt(2, 8)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    torch.manual_seed(0)
    count = {"min_new_tokens": EXTRA_TOKENS, "max_new_tokens": EXTRA_TOKENS}
    settings = {"do_sample": False} | count | EXTRAS[name]
    output: Tensor = model.generate(tokens * mask, attention_mask=mask, **settings)
    return output


def check_recording(moe: MoEModel) -> None:
    """The recorder changes nothing, and what it gives fits together."""
    tokens = prompt(2, 7)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    hooks = []
    for layer in moe.layers:

        def keep(_: Any, args: Any, output: Tensor, idx: int = layer.layer_idx) -> None:
            inputs[idx], outputs[idx] = args[0], output

        hooks.append(layer.experts.register_forward_hook(keep))
    with torch.no_grad():
        expected = moe.model(tokens, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        with RoutingRecorder(moe) as recorder:
            logits = moe.model(tokens, use_cache=False).logits
            records = recorder.take()
            sums = recorder.take_expert_sums()
        assert torch.equal(logits, expected), "recording changes the output"
        for layer in moe.layers:
            record = records[layer.layer_idx]
            if layer.norm is not None:
                normed = layer.norm(record.residual.view(*tokens.shape, -1))
                assert torch.equal(normed.view_as(record.router_input), record.router_input)
            function = stock_experts_function("batched_mm", layer.experts)
            pair = record.expert_ids, record.gate_weights
            again = function(layer.experts, inputs[layer.layer_idx], *pair)
            assert torch.equal(again, outputs[layer.layer_idx]), "ids and weights differ"
            if moe.geometry.gate_family != "other":
                rule = moe.geometry.gate_family, moe.geometry.gate_scale
                weights = gate_weights(record.router_logits, record.expert_ids.long(), *rule)
                assert torch.allclose(weights, record.gate_weights.float(), rtol=WEIGHT_TOLERANCE)
            assert sums[layer.layer_idx][0].shape == (layer.num_experts, moe.geometry.hidden_size)


def check_exact(stock: Any, offloaded: OffloadedModel) -> None:
    """Logits and tokens through 4 slots are the stock model's, bit for bit."""
    reference = {shape: greedy(stock, prompt(*shape)) for shape in GENERATED_SHAPES}
    modes = ["none"] + ["all"] * (offloaded.moe.found_anchors is not None)
    for prefetch in modes:
        config = EngineConfig(
            expert_slots=str(NUM_SLOTS),
            prefetch=prefetch,  # type: ignore[arg-type]
        )
        with Engine(offloaded, config) as engine, torch.no_grad():
            for shape in PROMPT_SHAPES if prefetch == "none" else []:
                tokens = prompt(*shape)
                expected = stock(tokens, use_cache=False).logits
                assert torch.equal(engine(tokens, use_cache=False).logits, expected), shape
            for shape in GENERATED_SHAPES:
                assert torch.equal(greedy(engine, prompt(*shape)), reference[shape]), shape
            if takes_images(stock):
                tokens, image = image_prompt(stock)
                assert torch.equal(greedy(engine, tokens, **image), greedy(stock, tokens, **image))
            for name in EXTRAS if prefetch == "none" else []:
                assert torch.equal(with_extra(engine, name), with_extra(stock, name)), name
            engine.check_integrity()


def why_not_predicted(offloaded: OffloadedModel) -> str:
    """Why predicted experts cannot run in place of the true ones; empty if they do."""
    reason = ""
    for mode in ("skip", "predicted"):
        prefetch = "auto" if mode == "predicted" else "none"
        config = EngineConfig(
            expert_slots=str(NUM_SLOTS),
            prefetch=prefetch,  # type: ignore[arg-type]
            on_miss=mode,
            agreement_floor=0.0,
        )
        try:
            with Engine(offloaded, config) as engine:
                greedy(engine, prompt(1, 9))
                assert 0 < engine.stats().agreement <= 1, mode
        except ValueError:
            assert mode == "predicted"
            problem = offloaded.moe.anchors_problem
            reason = problem or "the gate weights follow no rule known"
    return reason


def why_no_graph(stock: Any, offloaded: OffloadedModel) -> str:
    """What is known to keep a decode step out of one CUDA graph; empty if nothing is."""
    forms = why_no_form(layer.experts for layer in offloaded.moe.layers)
    if reason := forms or why_not_captured(stock):
        return reason
    tokens = prompt(1, 9)
    settings = {"cache_implementation": "static", "disable_compile": True}
    try:
        with Engine(offloaded, EngineConfig(expert_slots=str(NUM_SLOTS))) as engine:
            same = torch.equal(greedy(engine, tokens, **settings), greedy(stock, tokens))
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, NotImplementedError):
        return "no static cache for this model in transformers"
    return "" if same else "a static cache gives other tokens in transformers"


def doctor_output() -> str:
    """What `foreroute doctor` prints about a folder that holds a config.json and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(QWEN3_30B))
        found = replace(diagnose(folder), name="qwen3-30b-a3b/")
    printed = io.StringIO()
    Console(width=100, file=printed).print(report(found))
    return "\n".join(map(str.rstrip, printed.getvalue().splitlines())).strip()


def page_of(rows: list[Row]) -> str:
    """The page docs/models.md."""
    supported = sum(row.recorded == row.exact == "yes" for row in rows)
    lines = [
        "# Models",
        "",
        f"{supported} of {len(rows)} MoE types of transformers are recorded and run exactly, each "
        "checked on a tiny random model. Written by `python benchmarks/models_matrix.py`; "
        "`tests/test_models_matrix.py` fails when a row stops being true.",
        "",
        LEGEND,
        "| model type | recorded | exact | speculative | graph | images | note |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(asdict(row).values()) + " |" for row in rows]
    lines += ["", IMAGES]
    lines += [
        "## Any other model",
        "",
        "`foreroute doctor` says the same of any folder or Hub id, from its `config.json` alone: "
        "no weights are downloaded or allocated. It follows one layer of each kind through a "
        "forward pass over made-up numbers.",
        "",
        "```",
        "$ foreroute doctor --model qwen3-30b-a3b/",
        doctor_output(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check all types, or those named on the command line, and write the results."""
    results = ROOT / "benchmarks" / "results" / "models.json"
    asked = sys.argv[1:] or TYPES
    kept = (
        {}
        if asked == TYPES
        else {row["model_type"]: row for row in json.loads(results.read_text())}
    )
    kept |= {name: asdict(row_of(name)) for name in track(asked, description="models")}
    rows = [Row(**kept[name]) for name in TYPES]
    results.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    page = ROOT / "docs" / "models.md"
    page.write_text(page_of(rows))
    print(results, page, sep="\n")


if __name__ == "__main__":
    main()

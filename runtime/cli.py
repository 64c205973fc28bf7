"""The umbrella command: `foreroute generate`, `doctor` and `bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.estimators.console import run_command

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from foreroute.runtime.bench import ModeResult
    from foreroute.runtime.engine import Engine

CPU_NOTE = (
    "On this CPU a fetch is a copy from memory to memory, done at once: nothing overlaps, and no "
    "figure here stands for PCIe or a GPU."
)


def generate(
    prompt: str,
    model: str = "bundled",
    bundle: Path | None = None,
    max_new_tokens: int = 128,
    expert_slots: str = "25%",
    policy: str | None = None,
    on_miss: str = "fetch",
    weights: str = "true",
    budget: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    expert_dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Generate text, streamed, and say what it cost.

    Args:
        prompt: Text to continue; `-` reads it from standard input.
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote; without it, prefetch uses the next router.
        max_new_tokens: Stop after so many tokens.
        expert_slots: Slots per MoE layer on the device: a number, or a share such as 25%.
        policy: on-demand or prefetch; prefetch where there is a bundle, unless said.
        on_miss: fetch (exact), or speculative execution: skip, predicted.
        weights: Gate weights of predicted experts: true or predicted.
        budget: Experts prefetched per token and layer; the model's top-k unless said.
        temperature: 0 is greedy; above, tokens are sampled.
        seed: Of the sampling.
        chat: Put the prompt through the model's chat template.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        revision: Branch, tag or commit of a Hub id.
        expert_dtype: How experts are stored: auto (as the checkpoint has them, exact), bf16, fp8,
            int8 or int4.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from transformers import TextStreamer, set_seed

    from foreroute.data.adapters import load_tokenizer
    from foreroute.runtime.engine import Engine

    text = sys.stdin.read() if prompt == "-" else prompt
    with Engine.from_pretrained(
        model,
        bundle=bundle,
        expert_slots=expert_slots,
        policy=policy,
        on_miss=on_miss,
        weights=weights,
        budget=budget,
        device=device,
        dtype=dtype,
        revision=revision,
        expert_dtype=expert_dtype,
        trust_remote_code=trust_remote_code,
    ) as engine:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        if chat:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError("The prompt is empty; give at least one token of text.")
        set_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        streamer = TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)
        engine.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        print(_cost_line(engine), file=sys.stderr)


def bench(
    model: str = "bundled",
    bundle: Path | None = None,
    expert_slots: str = "25%",
    budget: int | None = None,
    dataset: str = "python-stdlib",
    num_prompts: int = 4,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repeats: int = 2,
    json: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    expert_dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Run every mode on the same prompts and print what each cost.

    Args:
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote.
        expert_slots: Slots per MoE layer on the device: a number, or a share such as 25%.
        budget: Experts prefetched per token and layer; the model's top-k unless said.
        dataset: Where prompts come from (its held-out split); as collect-traces takes it.
        num_prompts: How many prompts.
        prompt_tokens: Length of each.
        new_tokens: Tokens generated after each, and forced for perplexity.
        repeats: Times every prompt is run, after one warm-up.
        json: Write the results here too.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        expert_dtype: How experts are stored: auto (as the checkpoint has them, exact), bf16, fp8,
            int8 or int4.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from rich.console import Console
    from rich.progress import Progress

    from foreroute.data.adapters import discover, load_model, load_tokenizer, resolve_device
    from foreroute.estimators.artifacts import package_versions, write_json
    from foreroute.export.bundle import load_bundle
    from foreroute.runtime import bench as measure
    from foreroute.runtime.config import parse_slots
    from foreroute.runtime.offload import offload

    if min(num_prompts, prompt_tokens, repeats) < 1 or new_tokens < 8:
        raise ValueError("bench needs at least 1 prompt of 1 token, 1 repeat and 8 new tokens.")
    target = resolve_device(device)
    loaded = load_bundle(bundle) if bundle else None
    whole = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    geometry = discover(whole, model).geometry
    if loaded is not None:
        loaded.require_fits(geometry)
    slots = parse_slots(expert_slots, num_experts=geometry.num_experts, top_k=geometry.top_k)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    sequences = _sequences(tokenizer, dataset, num_prompts, prompt_tokens + new_tokens)
    work = measure.Workload(
        prompts=[tokens[:, :prompt_tokens] for tokens in sequences],
        continuations=[tokens[:, prompt_tokens:] for tokens in sequences],
        new_tokens=new_tokens,
        repeats=repeats,
    )
    modes = measure.modes_for(
        expert_slots,
        has_bundle=loaded is not None,
        budget=budget,
        can_speculate=geometry.gate_family != "other",
    )
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("stock", total=measure.num_ticks(modes, work))

        def tick() -> None:
            progress.advance(task)

        results = [measure.measure_stock(whole.to(target), work, tick)]
        offloaded = offload(
            whole.to("cpu"), device=target, model_name=model, expert_dtype=expert_dtype
        )
        for mode in modes:
            progress.update(task, description=mode.name)
            stack = loaded.stack if loaded else None
            results.append(measure.measure_mode(mode, offloaded, stack, work, tick))
    results = measure.with_perplexity_change(results)
    title = f"{model} on {target}, {slots} slots for the {geometry.num_experts} experts of a layer"
    console.print(_time_table(results, title))
    console.print(_traffic_table(results))
    if target.type == "cpu":
        console.print(CPU_NOTE)
    if json is not None:
        settings = {
            "device": str(target),
            "versions": package_versions(),
            "model": geometry.to_dict(),
            "expert_slots": slots,
            "expert_bytes": offloaded.expert_bytes,
        }
        write_json(json, settings | measure.to_json(results))
        console.print(str(json), soft_wrap=True)


def doctor(
    model: str = "bundled",
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Say what was found in a model and what can be done with it, from its config alone.

    Args:
        model: `bundled`, a local folder with at least a config.json, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        dtype: In which sizes are given: auto, float32, bfloat16 or float16.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from rich.console import Console

    from foreroute.runtime.doctor import diagnose, report

    found = diagnose(model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    Console().print(report(found))


def _sequences(tokenizer: Any, dataset: str, count: int, length: int) -> list[Tensor]:
    """The first tokens of held-out documents, [1, length] each."""
    from foreroute.data.corpus import documents

    sequences: list[Tensor] = []
    for document in documents(dataset, "held-out"):
        ids = tokenizer(document.text, return_tensors="pt", truncation=True, max_length=length)
        if ids["input_ids"].shape[1] == length:
            sequences.append(ids["input_ids"])
        if len(sequences) == count:
            return sequences
    raise ValueError(
        f"{dataset} has only {len(sequences)} held-out documents of {length} tokens; bench needs "
        f"{count}. Lower --num-prompts, --prompt-tokens or --new-tokens."
    )


def _time_table(results: list[ModeResult], title: str) -> Table:
    """What each mode took."""
    table = _table(title, "TPOT ms", "p25-p75", "x on-demand", "TTFT ms", "same tokens")
    baseline = next(r.tpot_ms for r in results if r.name == "on-demand")
    for r in results:
        table.add_row(
            r.name,
            f"{r.tpot_ms:.2f}",
            f"{r.tpot_ms_p25:.2f}-{r.tpot_ms_p75:.2f}",
            f"{r.tpot_ms / baseline:.2f}",
            f"{r.ttft_ms:.0f}",
            "yes" if r.tokens == results[0].tokens else "no",
        )
    return table


def _traffic_table(results: list[ModeResult]) -> Table:
    """What each mode copied, and what it did to the output."""
    table = _table(
        "Copies per token, and the output against the exact model",
        *("hit rate", "MB", "wasted MB", "late", "agreement", "perplexity"),
    )
    for r in results:
        perplexity = f"{r.perplexity:.2f} ({r.perplexity_change:+.1%})" if r.perplexity else "exact"
        table.add_row(
            r.name,
            "-" if r.hit_rate is None else f"{r.hit_rate:.3f}",
            f"{r.bytes_per_token / 1e6:.2f}",
            f"{r.wasted_bytes_per_token / 1e6:.2f}",
            f"{r.late_per_token:.2f}",
            "exact" if r.is_exact else f"{r.agreement:.3f}" + " (off)" * r.is_speculation_off,
            perplexity,
        )
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    table.add_column("mode", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _cost_line(engine: Engine) -> str:
    stats = engine.stats()
    kind = "exact" if engine.config.is_exact else f"SPECULATIVE, agreement {stats.agreement:.3f}"
    return (
        f"[{engine.geometry.describe()}; {engine.config.policy}, {kind}; "
        f"{engine.num_slots} slots a layer; TTFT {stats.ttft_ms[-1]:.0f} ms, "
        f"TPOT {stats.tpot_ms:.2f} ms, hit rate {stats.hit_rate:.3f}, "
        f"{stats.bytes_per_token / 1e6:.2f} MB/token, "
        f"wasted {stats.wasted_bytes_per_token / 1e6:.2f} MB/token]"
    )


def main() -> None:
    """Entry point of `foreroute`."""
    run_command("foreroute", {"generate": generate, "doctor": doctor, "bench": bench})


if __name__ == "__main__":
    main()

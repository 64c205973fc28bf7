"""The umbrella command `foreroute`: one function per subcommand."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from foreroute.estimators.console import one_line_errors, plain_console, run_command


def generate(
    prompt: str,
    model: str = "bundled",
    bundle: Path | None = None,
    max_new_tokens: int = 128,
    expert_slots: str = "25%",
    on_miss: str = "fetch",
    exact_layers: str = "",
    quality_budget: str | None = None,
    frontier: Path | None = None,
    budget: int | None = None,
    prefetch: str | None = None,
    eviction: str = "default",
    warm_start: str = "prompt",
    layer_slots: str = "equal",
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    expert_dtype: str = "auto",
    pinned_memory: str | None = None,
    share_experts: bool = False,
    tp_plan: str = "none",
    trust_remote_code: bool = False,
) -> None:
    """Generate text, streamed, and say what it cost.

    Args:
        prompt: Text to continue; `-` reads it from standard input.
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote, or a Hub id, `@` a revision; without it,
            prefetch uses the next router.
        max_new_tokens: Stop after so many tokens.
        expert_slots: Slots per MoE layer on the device: a number, a share such as 25%, or auto.
        on_miss: fetch (exact), or speculative execution by a rule: skip, substitute:0.5,
            substitute+threshold:0.15, bonus:0.1, budget:20MB, predicted; docs/speculation.md.
        exact_layers: Layers that fetch whatever the rule: decoder layer indices, 0 or 0-1,7.
        quality_budget: How far perplexity may rise, such as 1%: in place of --on-miss, the rule
            that takes least among those measured to stay within it.
        frontier: What foreroute evaluate --rules measured on this model; the bundle's unless said.
        budget: Experts prefetched per token and layer; the model's top-k unless said.
        prefetch: What is fetched early: none, auto (what pays) or all (each prediction); auto
            where there is a bundle, unless said.
        eviction: Which expert goes: default, lru, lfu, lrfu, adaptive, predicted or
            static.
        warm_start: What fills the slots before the first token: prompt, none, or recorded routing.
        layer_slots: equal, or by-misses: layers that miss more in that recording get more slots.
        temperature: 0 is greedy; above, tokens are sampled.
        seed: Of the sampling.
        chat: Put the prompt through the model's chat template.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        revision: Branch, tag or commit of a Hub id.
        expert_dtype: How experts are stored: auto (exact: on a GPU lossless, else as the checkpoint
            has them), lossless (bfloat16 in 12 bits), bf16, fp8, int8 or int4.
        pinned_memory: Host memory to page-lock for experts, such as 24GiB; as much as the system
            allows unless said.
        share_experts: Map a prepared model's rows: engines of one host have one copy in memory.
        tp_plan: Of several processes: none (each has everything but the experts) or auto
            (divided by transformers' own plan).
        trust_remote_code: Run code that came with the checkpoint.
    """
    given = locals().copy()
    from foreroute.runtime.generation.command import run_generate

    if cost := run_generate(**given):
        print(cost, file=sys.stderr)


def bench(
    model: str = "bundled",
    bundle: Path | None = None,
    expert_slots: str = "25%",
    budget: int | None = None,
    dataset: str = "python-stdlib",
    column: str = "",
    num_prompts: int = 4,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repeats: int = 2,
    json: Path | None = None,
    html: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    expert_dtype: str = "auto",
    pinned_memory: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Run every mode on the same prompts and print what each cost.

    Of several processes that torchrun started, each has a slice of every expert; then there is no
    stock model beside the exact modes.

    Args:
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote, or a Hub id, `@` a revision.
        expert_slots: Slots per MoE layer on the device: a number, a share such as 25%, or auto.
        budget: Experts prefetched per token and layer; the model's top-k unless said.
        dataset: Where prompts come from (its held-out split); as collect-traces takes it.
        column: Column of its tables; found unless said.
        num_prompts: How many prompts.
        prompt_tokens: Length of each.
        new_tokens: Tokens generated after each, and forced for perplexity.
        repeats: Times every prompt is run, after one warm-up.
        json: Write the results here too.
        html: Draw them here, as one page that needs nothing from elsewhere.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        revision: Branch, tag or commit of a Hub id, for weights and tokenizer.
        expert_dtype: How experts are stored: auto (exact: on a GPU lossless, else as the checkpoint
            has them), lossless (bfloat16 in 12 bits), bf16, fp8, int8 or int4.
        pinned_memory: Host memory to page-lock for experts, such as 24GiB; as much as the system
            allows unless said.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from foreroute.data.adapters import load_tokenizer, resolve_device
    from foreroute.data.adapters.loading import HubSettings
    from foreroute.data.adapters.vocabulary import vocabulary_size
    from foreroute.data.columns import RowReading
    from foreroute.data.held_out import held_out_sequences
    from foreroute.estimators.artifacts import require_file_place, write_json, write_text
    from foreroute.runtime.bench.command import run_bench
    from foreroute.runtime.store.checkpoint import Checkpoint

    if min(num_prompts, prompt_tokens, repeats) < 1 or new_tokens < 8:
        raise ValueError("bench needs at least 1 prompt of 1 token, 1 repeat and 8 new tokens.")
    require_file_place(json)
    require_file_place(html)
    target = resolve_device(device)
    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    checkpoint = Checkpoint.open(
        model, dtype=dtype, expert_dtype=expert_dtype, device=target, **hub
    )
    reading = RowReading(column=column, tokenizer=load_tokenizer(model, **hub))
    length, num_known = prompt_tokens + new_tokens, vocabulary_size(checkpoint.outline)
    console = plain_console()
    measured = run_bench(
        checkpoint,
        held_out_sequences(reading, dataset, num_prompts, length, num_known),
        console,
        bundle=bundle,
        expert_slots=expert_slots,
        budget=budget,
        prompt_tokens=prompt_tokens,
        repeats=repeats,
        device=device,
        expert_dtype=expert_dtype,
        pinned_memory=pinned_memory,
    )
    if measured is None:  # the first process speaks
        return
    found, title = measured
    if json is not None:
        write_json(json, found)
        console.print(str(json), soft_wrap=True)
    if html is not None:
        from foreroute.export.report.bench_page import bench_page

        write_text(html, bench_page(found, title, shlex.join(sys.argv)))
        console.print(str(html), soft_wrap=True)


def doctor(
    model: str = "bundled",
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Say what was found in a model and what can be done with it, from its config alone.

    Where the weights are here too, some are read, to say how much of them 12 bits hold.

    Args:
        model: `bundled`, a local folder with at least a config.json, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        dtype: In which sizes are given: auto, float32, bfloat16 or float16.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from foreroute.data.adapters.loading import HubSettings
    from foreroute.runtime.planning.doctor import diagnose, report
    from foreroute.runtime.planning.packed_share import packed_share
    from foreroute.runtime.store.checkpoint import Checkpoint

    found = diagnose(model, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    packed = packed_share(Checkpoint.open(model, dtype=dtype, **hub))
    plain_console().print(report(found, packed))


def simulate(
    routes: Path,
    profile: str = "h100-pcie5",
    slots: str = "10%,25%,40%",
    eviction: str = "lru,default",
    prefetch: str = "none",
    on_miss: str = "fetch",
    horizon: int = 1,
    bundle: Path | None = None,
    recall: float = 0.89,
    errors: str = "near-miss",
    concentration: float = 2.0,
    warm_start: str = "prompt",
    layer_slots: str = "equal",
    expert_bytes: str | None = None,
    model: str | None = None,
    expert_dtype: str = "auto",
    layer_ms: float | None = None,
    num_experts: int | None = None,
    prompt_tokens: int = 0,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Replay recorded routing on a machine's timeline: what each policy would cost.

    Args:
        routes: Traces, or another recording: route CSV, llama.cpp CSV, routed_experts, Megatron.
        profile: A machine: a built-in name such as h100-pcie5, or a file of foreroute profile.
        slots: Slots per MoE layer, each a number or a share; a comma list.
        eviction: lru, lfu, lrfu, default, adaptive, predicted, static, belady; a comma list.
        prefetch: none, all, head, pieces; a comma list.
        on_miss: fetch, substitute:0.5 or another rule; a comma list. Needs traces; on demand only.
        horizon: Layers ahead to predict; 1, 2, 4, ... up to it are tried.
        bundle: Real predictions of this bundle (a folder or a Hub id) on traces, in place of a
            simulated predictor.
        recall: Of the simulated predictor, one layer ahead.
        errors: Its wrong guesses: near-miss or uniform.
        concentration: How little it knows which guesses are wrong; calibrated for any value.
        warm_start: What fills the slots before: prompt, none, or another recording.
        layer_slots: equal, or by-misses: layers that missed more before get more.
        expert_bytes: Size of an expert as copied (9.44MB, 3MiB); the profile's model unless said.
        model: Whose experts' size counts, by its config: a folder, a config.json or a Hub id.
        expert_dtype: How that model's experts are stored: auto (what a GPU does), lossless, bf16,
            fp8, int8 or int4.
        layer_ms: Compute of a layer; the profile's model unless said.
        num_experts: Experts of a layer, where the recording does not say.
        prompt_tokens: Tokens of the prompt at the start, where the recording does not say.
        seed: Of the simulated predictor.
        json: Write the rows here too.
    """
    given = dict(locals())
    from foreroute.runtime.simulator.cli import SimulateRequest, run_simulate

    run_simulate(SimulateRequest(**given))


def plan(
    model: str,
    gpu_memory: str,
    host_memory: str,
    profile: str = "h100-pcie5",
    context: int = 4096,
    gpus: int = 1,
    json: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Say what fits and what to expect, from the model's configuration alone.

    Args:
        model: `bundled`, a folder, a config.json or a Hub id.
        gpu_memory: Device memory to use, such as 24GiB; of each GPU.
        host_memory: Host memory to use, such as 64GiB.
        profile: A machine: a built-in name such as rtx4090-pcie4, or a file of foreroute profile.
        context: Tokens of context, prompt and answer.
        gpus: GPUs of one host that share the model, each with a slice of every expert.
        json: Write the plan here too.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from foreroute.runtime.planning.plan_report import run_plan

    memory = (gpu_memory, host_memory)
    run_plan(model, *memory, profile, context, json, trust_remote_code, revision, gpus)


def pack(
    model: str,
    out: Path,
    expert_dtype: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a prepared model: it loads as fast as it is read, wherever the model itself does.

    Args:
        model: `bundled`, a local folder or a Hub id.
        out: The folder to write; a run that was stopped goes on where it was, an upload too.
        expert_dtype: How experts are stored: auto (bfloat16 in 12 bits without loss; others as
            they are), lossless, bf16, fp8, int8 or int4.
        dtype: Of the model: auto, float32, bfloat16 or float16.
        device: Where experts are encoded: auto, cpu or cuda.
        revision: Branch, tag or commit of a Hub id.
        push_to_hub: Upload it there too, with a card: user/name.
        private: Whether only its owner sees it there.
        overwrite: Replace a folder that is there already.
        trust_remote_code: Run code that came with the checkpoint.
    """
    given = locals().copy()
    from foreroute.runtime.store.pack import run_pack

    run_pack(**given)


def profile(out: Path, device: str = "auto", name: str = "", overwrite: bool = False) -> None:
    """Measure this machine for simulate and plan, in under a minute.

    Args:
        out: The file to write, JSON.
        device: auto, cpu or cuda; on a CPU, copies are from memory to memory.
        name: What to call it; the device's name unless said.
        overwrite: Replace a file that is there already.
    """
    from foreroute.runtime.planning.profile_report import run_profile

    run_profile(out, device, name, overwrite)


def main() -> None:
    """Entry point of `foreroute`."""
    with one_line_errors("foreroute"):
        from foreroute.data.cli import collect
        from foreroute.export.compare.cli import compare_predictors, score
        from foreroute.export.report.cli import report
        from foreroute.runtime.evaluation.cli import evaluate
        from foreroute.runtime.serving.cli import serve
        from foreroute.runtime.tune.cli import tune

        run_command(
            "foreroute",
            {
                "generate": generate,
                "collect": collect,
                "doctor": doctor,
                "bench": bench,
                "simulate": simulate,
                "pack": pack,
                "plan": plan,
                "profile": profile,
                "report": report,
                "compare-predictors": compare_predictors,
                "score": score,
                "serve": serve,
                "evaluate": evaluate,
                "tune": tune,
            },
        )


if __name__ == "__main__":
    main()

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
    trust_remote_code: bool = False,
) -> None:
    """Generate text, streamed, and say what it cost.

    Args:
        prompt: Text to continue; `-` reads it from standard input.
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote; without it, prefetch uses the next router.
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
        eviction: Which expert goes: default, lru, lfu, lrfu, predicted or static.
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

    Args:
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote.
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
    from rich.progress import Progress

    from foreroute.data.adapters import discover, load_model, load_tokenizer, resolve_device
    from foreroute.data.adapters.loading import HubSettings
    from foreroute.data.adapters.vocabulary import vocabulary_size
    from foreroute.data.columns import RowReading
    from foreroute.data.held_out import held_out_sequences
    from foreroute.estimators.artifacts import (
        package_versions,
        require_file_place,
        write_json,
        write_text,
    )
    from foreroute.export.bundle import load_bundle
    from foreroute.runtime.bench import measure
    from foreroute.runtime.bench.tables import notes, print_results
    from foreroute.runtime.config import EngineConfig
    from foreroute.runtime.planning.slot_plan import plan_slots
    from foreroute.runtime.policies.slots import parse_slots
    from foreroute.runtime.store.checkpoint import Checkpoint
    from foreroute.runtime.store.offload import offload

    if min(num_prompts, prompt_tokens, repeats) < 1 or new_tokens < 8:
        raise ValueError("bench needs at least 1 prompt of 1 token, 1 repeat and 8 new tokens.")
    require_file_place(json)
    target = resolve_device(device)
    loaded = load_bundle(bundle) if bundle else None
    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    checkpoint = Checkpoint.open(model, dtype=dtype, **hub)
    checkpoint.require_room_for_whole()
    tokenizer = load_tokenizer(model, **hub)
    reading, length = RowReading(column=column, tokenizer=tokenizer), prompt_tokens + new_tokens
    num_known = vocabulary_size(checkpoint.outline)
    sequences = held_out_sequences(reading, dataset, num_prompts, length, num_known)
    whole = load_model(model, dtype=dtype, **hub)
    moe = discover(whole, model)
    geometry = moe.geometry
    if loaded is not None:
        loaded.require_fits(geometry)
    if expert_slots != "auto":  # refuse impossible ones before anything runs
        parse_slots(expert_slots, num_experts=geometry.num_experts, top_k=geometry.top_k)
    work = measure.Workload(
        prompts=[tokens[:, :prompt_tokens] for tokens in sequences],
        continuations=[tokens[:, prompt_tokens:] for tokens in sequences],
        new_tokens=new_tokens,
        repeats=repeats,
    )
    modes = measure.modes_for(
        expert_slots,
        has_bundle=loaded is not None,
        has_anchors=moe.found_anchors is not None,
        budget=budget,
        can_speculate=geometry.gate_family != "other",
    )
    console = plain_console()
    with Progress(console=console) as progress:
        task = progress.add_task("stock", total=measure.num_ticks(modes, work))

        def tick() -> None:
            progress.advance(task)

        results = [measure.measure_stock(whole.to(target), work, tick)]
        progress.update(task, description="modes in turn")
        offloaded = offload(
            whole.to("cpu"),
            device=target,
            model_name=model,
            expert_dtype=expert_dtype,
            pinned_memory=pinned_memory,
        )
        stack = loaded.stack if loaded else None
        slots = plan_slots(offloaded, EngineConfig(expert_slots=expert_slots), None)[0]
        results += measure.measure_modes(modes, offloaded, stack, work, tick)
    results = measure.with_perplexity_change(results)
    title = f"{model} on {target}, {slots} slots for the {geometry.num_experts} experts of a layer"
    is_cpu = target.type == "cpu"
    print_results(console, results, title, is_cpu=is_cpu)
    settings = {
        "device": str(target),
        "versions": package_versions(),
        "model": geometry.to_dict(),
        "expert_slots": slots,
        "expert_bytes": offloaded.expert_bytes,
    }
    found = settings | measure.to_json(results, is_cpu=is_cpu)
    found["notes"] = notes(results, is_cpu=is_cpu)
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
        eviction: lru, lfu, lrfu, default, predicted, static, belady; a comma list.
        prefetch: none, all, head, pieces; a comma list.
        horizon: Layers ahead to predict; 1, 2, 4, ... up to it are tried.
        bundle: Real predictions of this bundle on traces, in place of a simulated predictor.
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
    json: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Say what fits and what to expect, from the model's configuration alone.

    Args:
        model: `bundled`, a folder, a config.json or a Hub id.
        gpu_memory: Device memory to use, such as 24GiB.
        host_memory: Host memory to use, such as 64GiB.
        profile: A machine: a built-in name such as rtx4090-pcie4, or a file of foreroute profile.
        context: Tokens of context, prompt and answer.
        json: Write the plan here too.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from foreroute.runtime.planning.plan_report import run_plan

    run_plan(model, gpu_memory, host_memory, profile, context, json, trust_remote_code, revision)


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

"""The command `foreroute bench`, but for its flags and where its prompts come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from foreroute.data.adapters import discover, load_model, resolve_device
from foreroute.estimators.artifacts import package_versions
from foreroute.export.bundle import load_bundle
from foreroute.runtime.bench import measure
from foreroute.runtime.bench.tables import notes, print_results
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.parallel import SliceRanks
from foreroute.runtime.planning.slot_plan import plan_slots
from foreroute.runtime.policies.slots import parse_slots
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.offload import load_offloaded, offload


def run_bench(
    checkpoint: Checkpoint,
    sequences: Sequence[Tensor],
    console: Console,
    *,
    bundle: Path | None,
    expert_slots: str,
    budget: int | None,
    prompt_tokens: int,
    repeats: int,
    device: str,
    expert_dtype: str,
    pinned_memory: str | None,
) -> tuple[dict[str, Any], str] | None:
    """Measure every mode on the same prompts and print what each cost.

    Where the device does not hold the whole model, the stock model is left out, and the mode with
    all experts resident if those do not fit either; the model is loaded as an engine loads it. So
    is a prepared one.

    Several processes that torchrun started share the model, each with a slice of every expert.
    Then there is no stock model beside the modes, which no process could hold, and no speculative
    one; only the first process prints.

    Args:
        checkpoint: The model, opened with that `expert_dtype` for that device.
        sequences: Token ids, [1, prompt and continuation] each.
        console: Where to print.
        bundle: Folder that export-estimator wrote, or a Hub id.
        expert_slots: Slots per MoE layer.
        budget: Experts prefetched per token and layer; the model's top-k if None.
        prompt_tokens: How many of a sequence are prompt; as many as are left are generated.
        repeats: Times every prompt is run.
        device: As `load_offloaded` takes it.
        expert_dtype: How experts are stored.
        pinned_memory: As `load_offloaded` takes it.

    Returns:
        Everything that was found, JSON-ready, and a title for it; None on processes that are not
        the first.

    Raises:
        ValueError: If model, bundle and slots do not fit together, or the host lacks memory.
    """
    target = resolve_device(SliceRanks.local_device(device))
    ranks = SliceRanks.join(target)
    loaded = load_bundle(bundle) if bundle else None
    work = measure.Workload.cut(sequences, prompt_tokens, repeats)
    model, hub, dtype = checkpoint.name, checkpoint.hub, checkpoint.asked_dtype or "auto"
    has_stock = ranks.is_alone and checkpoint.prepared is None
    has_stock = has_stock and checkpoint.is_held_by(target, is_stock=True)
    if has_stock:
        checkpoint.require_room_for_whole()
        whole = load_model(model, dtype=dtype, **hub)
        moe = discover(whole, model)
    else:
        offloaded = load_offloaded(
            model,
            device=target,
            dtype=dtype,
            expert_dtype=expert_dtype,
            ranks=ranks,
            pinned_memory=pinned_memory,
            **hub,
        )
        moe = offloaded.moe
    geometry = moe.geometry
    if loaded is not None:
        loaded.require_fits(geometry)
    if expert_slots != "auto":  # refuse impossible ones before anything runs
        parse_slots(expert_slots, num_experts=geometry.num_experts, top_k=geometry.top_k)
    modes = measure.modes_for(
        expert_slots,
        has_bundle=loaded is not None,
        has_anchors=moe.found_anchors is not None,
        budget=budget,
        can_speculate=geometry.gate_family != "other",
        has_room_for_all=not ranks.is_alone or checkpoint.is_held_by(target),
    )
    modes = [mode for mode in modes if ranks.is_alone or mode.config.is_exact]
    with Progress(console=console, disable=not ranks.is_first) as progress:
        total = measure.num_ticks(modes, work, has_stock=has_stock)
        task = progress.add_task("modes in turn", total=total)

        def tick() -> None:
            progress.advance(task)

        results = []
        if has_stock:
            results.append(measure.measure_stock(whole.to(target), work, tick))
            offloaded = offload(
                whole.to("cpu"),
                device=target,
                model_name=model,
                expert_dtype=expert_dtype,
                pinned_memory=pinned_memory,
            )
        stack = loaded.stack if loaded else None
        results += measure.measure_modes(modes, offloaded, stack, work, tick)
    results = measure.with_perplexity_change(results)
    slots = plan_slots(offloaded, EngineConfig(expert_slots=expert_slots), None)[0]
    title = f"{model} on {target}, {slots} slots for the {geometry.num_experts} experts a layer"
    title += f", in slices on {ranks.num_ranks} processes" * (not ranks.is_alone)
    if not ranks.is_first:
        return None
    is_cpu = target.type == "cpu"
    print_results(console, results, title, is_cpu=is_cpu)
    found = {
        "device": str(target),
        "versions": package_versions(),
        "model": geometry.to_dict(),
        "expert_slots": slots,
        "expert_bytes": offloaded.expert_bytes,
        "num_ranks": ranks.num_ranks,
        "notes": notes(results, is_cpu=is_cpu),
    }
    return found | measure.to_json(results, is_cpu=is_cpu), title

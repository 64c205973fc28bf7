"""The command `foreroute bench`, but for its flags and where its prompts come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from foreroute.data.adapters import MoEModel, discover, load_model, resolve_device
from foreroute.data.adapters.loading import HubSettings
from foreroute.estimators.artifacts import package_versions
from foreroute.export.bundle import load_bundle
from foreroute.runtime.bench import measure
from foreroute.runtime.bench.tables import notes, print_results
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.parallel import SliceRanks
from foreroute.runtime.planning.slot_plan import plan_slots
from foreroute.runtime.policies.slots import parse_slots
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded, offload


def run_bench(
    sequences: Sequence[Tensor],
    console: Console,
    *,
    model: str,
    bundle: Path | None,
    expert_slots: str,
    budget: int | None,
    prompt_tokens: int,
    repeats: int,
    device: str,
    dtype: str,
    expert_dtype: str,
    hub: HubSettings,
) -> tuple[dict[str, Any], str] | None:
    """Measure every mode on the same prompts and print what each cost.

    Several processes that torchrun started share the model, each with a slice of every expert.
    Then there is no stock model beside the modes, which no process could hold, and no speculative
    one; only the first process prints.

    Args:
        sequences: Token ids, [1, prompt and continuation] each.
        console: Where to print.
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote.
        expert_slots: Slots per MoE layer.
        budget: Experts prefetched per token and layer; the model's top-k if None.
        prompt_tokens: How many of a sequence are prompt; as many as are left are generated.
        repeats: Times every prompt is run.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        expert_dtype: How experts are stored.
        hub: Where the model's files come from.

    Returns:
        Everything that was found, JSON-ready, and a title for it; None on processes that are not
        the first.

    Raises:
        ValueError: If model, bundle and slots do not fit together.
    """
    target = resolve_device(SliceRanks.local_device(device))
    ranks = SliceRanks.join(target)
    loaded = load_bundle(bundle) if bundle else None
    work = measure.Workload(
        prompts=[tokens[:, :prompt_tokens] for tokens in sequences],
        continuations=[tokens[:, prompt_tokens:] for tokens in sequences],
        new_tokens=sequences[0].shape[1] - prompt_tokens,
        repeats=repeats,
    )
    whole: Any = None
    offloaded: OffloadedModel | None = None
    if ranks.is_alone:
        whole = load_model(model, dtype=dtype, **hub)
        moe = discover(whole, model)
    else:
        offloaded = load_offloaded(
            model, device=target, dtype=dtype, expert_dtype=expert_dtype, ranks=ranks, **hub
        )
        moe = offloaded.moe
    if loaded is not None:
        loaded.require_fits(moe.geometry)
    modes = _modes(moe, expert_slots, budget, has_bundle=loaded is not None, ranks=ranks)
    with Progress(console=console, disable=not ranks.is_first) as progress:
        task = progress.add_task("modes in turn", total=measure.num_ticks(modes, work))

        def tick() -> None:
            progress.advance(task)

        results = []
        if offloaded is None:
            progress.update(task, total=measure.num_ticks(modes, work, has_stock=True))
            results.append(measure.measure_stock(whole.to(target), work, tick))
            offloaded = offload(
                whole.to("cpu"), device=target, model_name=model, expert_dtype=expert_dtype
            )
        stack = loaded.stack if loaded else None
        results += measure.measure_modes(modes, offloaded, stack, work, tick)
    results = measure.with_perplexity_change(results)
    slots = plan_slots(offloaded, EngineConfig(expert_slots=expert_slots), None)[0]
    title = f"{model} on {target}, {slots} slots for the {moe.geometry.num_experts} experts a layer"
    if not ranks.is_alone:
        title += f", in slices on {ranks.num_ranks} processes"
    if not ranks.is_first:
        return None
    is_cpu = target.type == "cpu"
    print_results(console, results, title, is_cpu=is_cpu)
    settings = {
        "device": str(target),
        "versions": package_versions(),
        "model": moe.geometry.to_dict(),
        "expert_slots": slots,
        "expert_bytes": offloaded.expert_bytes,
        "num_ranks": ranks.num_ranks,
    }
    found = settings | measure.to_json(results, is_cpu=is_cpu)
    return found | {"notes": notes(results, is_cpu=is_cpu)}, title


def _modes(
    moe: MoEModel, expert_slots: str, budget: int | None, *, has_bundle: bool, ranks: SliceRanks
) -> list[measure.Mode]:
    """What can be measured with a model; refuses impossible slots before anything runs."""
    geometry = moe.geometry
    if expert_slots != "auto":
        parse_slots(expert_slots, num_experts=geometry.num_experts, top_k=geometry.top_k)
    modes = measure.modes_for(
        expert_slots,
        has_bundle=has_bundle,
        has_anchors=moe.found_anchors is not None,
        budget=budget,
        can_speculate=geometry.gate_family != "other",
    )
    return modes if ranks.is_alone else [mode for mode in modes if mode.config.is_exact]

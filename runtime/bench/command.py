"""Runs a bench: loads the model, measures every mode on the same prompts, prints and returns it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from foreroute.data.adapters import MoEModel, discover, load_model
from foreroute.estimators.artifacts import package_versions
from foreroute.estimators.console import plain_console
from foreroute.export.bundle import Bundle, load_bundle
from foreroute.runtime.bench import measure
from foreroute.runtime.bench.tables import notes, print_results
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.planning.slot_plan import plan_slots
from foreroute.runtime.policies.slots import parse_slots
from foreroute.runtime.store.checkpoint import Checkpoint
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded, offload


def run_bench(
    checkpoint: Checkpoint,
    sequences: Sequence[Tensor],
    *,
    prompt_tokens: int,
    repeats: int,
    device: torch.device,
    expert_dtype: str,
    expert_slots: str,
    bundle: Path | None,
    budget: int | None,
) -> tuple[dict[str, Any], str]:
    """Measure every mode and print the tables.

    Where the device does not hold the whole model, the stock model and the all-resident mode are
    left out, and the model is loaded as an engine loads it.

    Args:
        checkpoint: The model; how its experts are stored is `expert_dtype`'s.
        sequences: Prompt and continuation, [1, T] token ids each, all of one length.
        prompt_tokens: Of each sequence, the prompt's.
        repeats: Times every prompt is run, after one warm-up.
        device: Where to run.
        expert_dtype: How experts are stored.
        expert_slots: Slots per MoE layer: a number, a share such as 25%, or auto.
        bundle: Trained estimators, a folder or a Hub id.
        budget: Experts prefetched per token and layer; the model's top-k if None.

    Returns:
        JSON-ready: device, versions, model, slots, every mode and what to know; and its title.

    Raises:
        FileNotFoundError: If the bundle is missing.
        ValueError: If model, bundle and slots do not fit together, or the host lacks memory.
    """
    loaded = load_bundle(bundle) if bundle else None
    subject = _Subject(checkpoint, device, expert_dtype)
    geometry = subject.moe.geometry
    if loaded is not None:
        loaded.require_fits(geometry)
    if expert_slots != "auto":  # refuse impossible ones before anything runs
        parse_slots(expert_slots, num_experts=geometry.num_experts, top_k=geometry.top_k)
    work = measure.Workload(
        prompts=[tokens[:, :prompt_tokens] for tokens in sequences],
        continuations=[tokens[:, prompt_tokens:] for tokens in sequences],
        new_tokens=sequences[0].shape[1] - prompt_tokens,
        repeats=repeats,
    )
    modes = measure.modes_for(
        expert_slots,
        has_bundle=loaded is not None,
        has_anchors=subject.moe.found_anchors is not None,
        budget=budget,
        can_speculate=geometry.gate_family != "other",
        has_room_for_all=subject.has_room_for_all,
    )
    results = measure.with_perplexity_change(_measure(subject, modes, loaded, work))
    offloaded = subject.offloaded
    slots = plan_slots(offloaded, EngineConfig(expert_slots=expert_slots), None)[0]
    is_cpu, console = device.type == "cpu", plain_console()
    title = (
        f"{checkpoint.name} on {device}, {slots} slots for the {geometry.num_experts} experts of a "
        "layer"
    )
    print_results(console, results, title, is_cpu=is_cpu)
    settings = {
        "device": str(device),
        "versions": package_versions(),
        "model": geometry.to_dict(),
        "expert_slots": slots,
        "expert_bytes": offloaded.expert_bytes,
        "notes": notes(results, is_cpu=is_cpu),
    }
    return settings | measure.to_json(results, is_cpu=is_cpu), title


class _Subject:
    """The model that is measured: stock first where the device holds it, then offloaded."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, expert_dtype: str) -> None:
        self._checkpoint, self._device, self._expert_dtype = checkpoint, device, expert_dtype
        self.has_room_for_all = checkpoint.is_held_by(device)
        self.stock: Any = None
        if checkpoint.prepared is None and checkpoint.is_held_by(device, is_stock=True):
            checkpoint.require_room_for_whole()
            hub, dtype = checkpoint.hub, checkpoint.asked_dtype or "auto"
            self.stock = load_model(checkpoint.name, dtype=dtype, **hub)
            self.moe: MoEModel = discover(self.stock, checkpoint.name)
        else:
            self.offloaded: OffloadedModel = load_offloaded(
                checkpoint.name,
                device=device,
                dtype=checkpoint.asked_dtype or "auto",
                expert_dtype=expert_dtype,
                **checkpoint.hub,
            )
            self.moe = self.offloaded.moe

    def measure_stock(self, work: measure.Workload, tick: Any) -> list[measure.ModeResult]:
        """Measure the stock model, if there is one, and take its experts out of it."""
        if self.stock is None:
            return []
        results = [measure.measure_stock(self.stock.to(self._device), work, tick)]
        self.offloaded = offload(
            self.stock.to("cpu"),
            device=self._device,
            model_name=self._checkpoint.name,
            expert_dtype=self._expert_dtype,
        )
        return results


def _measure(
    subject: _Subject, modes: list[measure.Mode], loaded: Bundle | None, work: measure.Workload
) -> list[measure.ModeResult]:
    """The stock model, then all modes, with a progress bar."""
    with Progress(console=plain_console()) as progress:
        num_ticks = measure.num_ticks(modes, work, has_stock=subject.stock is not None)
        task = progress.add_task("stock", total=num_ticks)

        def tick() -> None:
            progress.advance(task)

        results = subject.measure_stock(work, tick)
        progress.update(task, description="modes in turn")
        stack = loaded.stack if loaded else None
        return results + measure.measure_modes(modes, subject.offloaded, stack, work, tick)

"""The command `foreroute plan`, but for its flags."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from foreroute.data.adapters.loading import HubSettings
from foreroute.estimators.artifacts import require_file_place, write_json
from foreroute.estimators.byte_sizes import parse_bytes
from foreroute.estimators.console import plain_console
from foreroute.runtime.planning.doctor import diagnose
from foreroute.runtime.planning.gpus import GpuGroup
from foreroute.runtime.planning.machine import find_profile
from foreroute.runtime.planning.model_size import ModelSize, measure_model, model_folder
from foreroute.runtime.planning.planner import PlanChoice, assumptions, command_line, plan_choices

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30


def run_plan(
    model: str,
    gpu_memory: str,
    host_memory: str,
    profile: str,
    context: int,
    json: Path | None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    gpus: int = 1,
) -> None:
    """Plan a run and print it; takes the command's flags.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If something cannot be read, or doctor refuses the model.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1 token, not {context}.")
    require_file_place(json)
    machine = find_profile(profile)
    group = GpuGroup.of(gpus, machine)
    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    diagnose(model_folder(model), revision=revision, trust_remote_code=trust_remote_code)
    size = measure_model(model, gpus, **hub)
    memory = {"gpu_bytes": parse_bytes(gpu_memory), "host_bytes": parse_bytes(host_memory)}
    choices = plan_choices(size, machine, **memory, context=context, gpus=group)
    notes = assumptions(size, machine, context, group)
    console = plain_console()
    console.print(_table(size, choices))
    for note in notes:
        console.print(f"- {note}", soft_wrap=True)
    console.print(_verdict(size, choices, gpu_memory, host_memory), soft_wrap=True)
    if json is not None:
        _write(json, size, choices, notes)
        console.print(str(json), soft_wrap=True)


def _table(model: ModelSize, choices: list[PlanChoice]) -> Table:
    from rich import box
    from rich.table import Table

    title = (
        f"{model.name}: {model.num_layers} MoE layers, {model.num_experts} experts, "
        f"top-{model.top_k}" + f"; {model.num_gpus} GPUs" * (model.num_gpus > 1)
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    table.add_column("experts", no_wrap=True)
    for column in ("host GiB", "GPU GiB", "slots", "hits", "TPOT ms", "prefetch"):
        table.add_column(column, justify="right", no_wrap=True)
    for choice in choices:
        share = choice.slots / model.num_experts
        does_fit = choice.slots > 0
        table.add_row(
            choice.expert_dtype,
            f"{choice.host_bytes / GIB:.1f}" + ("" if choice.fits_host else " (!)"),
            f"{choice.device_bytes / GIB:.1f}" if does_fit else "too much",
            f"{choice.slots} ({share:.0%})" if does_fit else "-",
            f"{choice.hit_rate:.3f}" if does_fit else "-",
            f"{choice.tpot_ms:.1f}" if does_fit else "-",
            f"{choice.prefetch_tpot_ms:.1f}" if does_fit else "-",
        )
    return table


def _verdict(model: ModelSize, choices: list[PlanChoice], gpu_memory: str, host_memory: str) -> str:
    best = next((choice for choice in choices if choice.fits), None)
    if best is not None:
        return command_line(model, best)
    stored = choices[-1]
    missing = []
    if not stored.fits_host:
        missing.append(
            f"{host_memory} of host memory cannot hold {stored.host_bytes / GIB:.1f} GiB"
        )
    if not stored.slots:
        missing.append(f"{gpu_memory} on the device cannot hold one token's experts and the rest")
    return f"It does not fit: {'; '.join(missing)}."


def _write(path: Path, model: ModelSize, choices: list[PlanChoice], notes: list[str]) -> None:
    rows = [
        dataclasses.asdict(c)
        | {"fits": c.fits, "command": command_line(model, c) if c.fits else None}
        for c in choices
    ]
    content = {"model": dataclasses.asdict(model), "choices": rows, "assumptions": notes}
    write_json(path, content)

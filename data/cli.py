"""The command `collect-traces`."""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

from foreroute.estimators.console import run_command

if TYPE_CHECKING:
    from foreroute.data.manifest import TraceManifest
    from foreroute.data.traces import Traces


def main() -> None:
    """Entry point of the console script."""
    from foreroute.data.collect import collect_traces

    @functools.wraps(collect_traces)
    def command(**arguments: Any) -> None:
        prepare_process()
        show_traces(collect_traces(**arguments))

    run_command("collect-traces", command)


def prepare_process() -> None:
    """Keep freed memory, and print what is logged."""
    from foreroute.data.allocator import keep_freed_memory

    keep_freed_memory()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("foreroute").setLevel(logging.INFO)


def show_traces(traces: Traces) -> None:
    """Print what finished traces hold, and last their folder."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from foreroute.data.layout import DECODE
    from foreroute.estimators.byte_sizes import format_bytes

    manifest = traces.manifest
    phases = torch.cat([traces.tokens(shard.shard_idx).phases for shard in manifest.shards])
    num_decode = int((phases == DECODE).sum())
    rows = {
        "MoE layers": f"{traces.geometry.num_layers}",
        "sequences": f"{traces.num_sequences:,}",
        "tokens": f"{traces.num_tokens:,} (asked for {manifest.tokens:,})",
        "prefill / decode": f"{traces.num_tokens - num_decode:,} / {num_decode:,}",
        "source": _source_of(manifest),
        "shards": f"{len(manifest.shards)}",
        "on disk": format_bytes(manifest.num_bytes),
        "a token": format_bytes(manifest.num_bytes / manifest.num_tokens),
        "states": ", ".join((manifest.states_dtype, *manifest.record)),
        "stopped": manifest.stop_reason,
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    print(traces.folder)


def _source_of(manifest: TraceManifest) -> str:
    if manifest.speculation is None:
        return manifest.source
    given = manifest.speculation
    return f"generated under speculation ({given.on_miss}, {given.expert_slots} slots)"

"""The command `collect-traces`."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from foreroute.estimators.console import run_command


def main() -> None:
    """Entry point of the console script."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from foreroute.data.allocator import keep_freed_memory
    from foreroute.data.collect import collect_traces
    from foreroute.data.layout import DECODE
    from foreroute.estimators.byte_sizes import format_bytes

    keep_freed_memory()
    from foreroute.data.traces import Traces

    def show(traces: Traces) -> None:
        manifest = traces.manifest
        phases = torch.cat([traces.tokens(shard.shard_idx).phases for shard in manifest.shards])
        num_decode = int((phases == DECODE).sum())
        rows = {
            "MoE layers": f"{traces.geometry.num_layers}",
            "sequences": f"{traces.num_sequences:,}",
            "tokens": f"{traces.num_tokens:,} (asked for {manifest.tokens:,})",
            "prefill / decode": f"{traces.num_tokens - num_decode:,} / {num_decode:,}",
            "shards": f"{len(manifest.shards)}",
            "on disk": format_bytes(manifest.num_bytes),
            "states": manifest.states_dtype,
            "stopped": manifest.stop_reason,
        }
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        Console().print(table)
        print(traces.folder)

    @functools.wraps(collect_traces)
    def command(**arguments: Any) -> None:
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        logging.getLogger("foreroute").setLevel(logging.INFO)
        show(collect_traces(**arguments))

    run_command("collect-traces", command)

"""What `foreroute evaluate --rules` prints."""

from __future__ import annotations

from rich import box
from rich.table import Table

from foreroute.runtime.evaluation.frontier import Frontier, PriceRow

NOTE = "at most: the upper end of the 95 % interval over texts; bytes x: of the exact rule's."
CPU_NOTE = "Times are a CPU's, where a fetch is a copy in memory: they stand for no GPU."


def price_table(frontier: Frontier) -> Table:
    """Every rule beside the exact one at the same slots.

    Args:
        frontier: Has a row of the exact rule for each number of slots.
    """
    exact = {row.slots: row for row in frontier.rows if row.rule == "fetch"}
    table = Table(
        title=f"{frontier.geometry.describe()} on {frontier.device}",
        caption=NOTE if frontier.is_timed else f"{NOTE} {CPU_NOTE}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("slots", justify="right", no_wrap=True)
    table.add_column("rule", overflow="fold", min_width=20)
    for name in ("perplexity", "at most", "KL", "top-1", "bytes x", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frontier.rows:
        table.add_row(*_cells(row, exact[row.slots]))
    return table


def _cells(row: PriceRow, exact: PriceRow) -> tuple[str, ...]:
    layers = f" (exact: {row.exact_layers})" if row.exact_layers else ""
    return (
        row.slots,
        row.rule + layers,
        f"{row.perplexity_ratio - 1:+.2%}",
        f"{row.worst_loss:+.2%}",
        f"{row.kl:.4f}",
        f"{row.top1_agreement:.3f}",
        f"{row.bytes_per_token / exact.bytes_per_token:.3f}" if exact.bytes_per_token else "-",
        f"{row.tpot_ms:.2f}",
    )

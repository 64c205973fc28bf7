"""What `foreroute bench` prints: what each mode took, what it copied, and what to know about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from foreroute.runtime.bench.measure import BASELINE, STOCK, ModeResult

if TYPE_CHECKING:
    from rich.console import Console

SPECULATIVE_NOTE = (
    "predicted runs the predicted experts with the true router's gate weights or, as the paper's "
    "engine does, with predicted ones; substitute puts residents in the place of light missing "
    "experts, skip leaves missing ones out: these change the output."
)
NO_STOCK_NOTE = (
    "The stock model was left out: it is prepared, in slices, or larger than the device's memory."
)
ALL_NOTE = "prefetch-all fetches each prediction, whether or not that pays."
CPU_NOTE = (
    "On this CPU a fetch is a copy from memory to memory, done at once: nothing overlaps, and no "
    "figure here stands for PCIe or a GPU."
)


def print_results(console: Console, results: list[ModeResult], title: str, *, is_cpu: bool) -> None:
    """Print both tables and the notes that belong below them.

    Args:
        console: Where.
        results: Of all modes, on-demand among them.
        title: Of the first table.
        is_cpu: Whether it ran on a CPU, whose times mean nothing for a GPU.
    """
    console.print(time_table(results, title))
    console.print(traffic_table(results))
    for note in notes(results, is_cpu=is_cpu):
        console.print(note)


def notes(results: list[ModeResult], *, is_cpu: bool) -> list[str]:
    """What to know about the figures, a paragraph each.

    Args:
        results: Of all modes.
        is_cpu: Whether it ran on a CPU.
    """
    speculative = "" if all(r.is_exact for r in results) else SPECULATIVE_NOTE
    whole = "" if results[0].name == STOCK else NO_STOCK_NOTE
    lines = (whole, gave_up_note(results), ALL_NOTE, speculative, CPU_NOTE if is_cpu else "")
    return [line for line in lines if line]


def time_table(results: list[ModeResult], title: str) -> Table:
    """What each mode took."""
    table = _table(title, "TPOT ms", "p25-p75", "x on-demand", "TTFT ms", "tokens")
    baseline = next(r.tpot_ms for r in results if r.name == BASELINE)
    same = "stock's" if results[0].name == STOCK else "same"
    for r in results:
        table.add_row(
            r.name,
            f"{r.tpot_ms:.2f}",
            f"{r.tpot_ms_p25:.1f}-{r.tpot_ms_p75:.1f}",
            f"{r.tpot_ms / baseline:.2f}",
            f"{r.ttft_ms:.0f}",
            same if r.tokens == results[0].tokens else "other",
        )
    return table


def gave_up_note(results: list[ModeResult]) -> str:
    """Which modes stopped looking ahead; empty if none did."""
    gave_up = [
        f"{r.name} ({r.share_ahead:.0%})"
        for r in results
        if r.share_ahead is not None and r.share_ahead < 1
    ]
    if not gave_up:
        return ""
    return (
        f"Gave up, as looking ahead takes longer here than it saves (share of steps that did all "
        f"the same): {', '.join(gave_up)}."
    )


def traffic_table(results: list[ModeResult]) -> Table:
    """What each mode copied, and what it did to the output."""
    table = _table(
        "Copies per token, and the output against the exact model",
        *("hit rate", "MB", "wasted", "late", "agree", "perplexity"),
    )
    for r in results:
        change = "exact" if r.is_exact else f"{r.perplexity:.2f} {r.perplexity_change:+.1%}"
        table.add_row(
            r.name,
            "-" if r.hit_rate is None else f"{r.hit_rate:.3f}",
            f"{r.bytes_per_token / 1e6:.2f}",
            f"{r.wasted_bytes_per_token / 1e6:.2f}",
            f"{r.late_per_token:.2f}",
            "exact" if r.is_exact else f"{r.agreement:.3f}" + " (off)" * r.is_speculation_off,
            f"{r.perplexity:.2f}" if r.is_exact and r.perplexity else change,
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("mode", overflow="fold", min_width=12)  # its names give way, no figure does
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table

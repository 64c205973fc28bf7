"""Prints the tables of docs/gpu.md from the results of the GPU benchmarks.

python benchmarks/gpu_tables.py
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from foreroute.estimators.artifacts import read_json

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
COMMON = ["slots", "arm", "median", "p95", "mean", "x on demand (median, mean)"]
TIMES = ("tpot_ms_median", "tpot_ms_p95", "tpot_ms_mean")


def on_demand_of(row: Row, rows: list[Row]) -> str:
    """How a row's times compare with on demand at the same slots: median, mean."""
    same = [r for r in rows if r["arm"] == "on-demand" and r["slots"] == row["slots"]]
    if not same or same[0] is row:
        return ""
    return ", ".join(f"{row[name] / same[0][name]:.2f}" for name in TIMES if name != "tpot_ms_p95")


def common_cells(row: Row, rows: list[Row]) -> list[str]:
    """Slots, arm, times and the comparison."""
    slots = f"{row['slots']:g} %" if row["slots"] else "none"
    times = [f"{row[name]:.2f}" for name in TIMES]
    return [slots, row["arm"], *times, on_demand_of(row, rows)]


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """One table in Markdown."""
    for cells in (header, ["---"] * len(header), *lines):
        print("| " + " | ".join(cells) + " |")
    print()


def main() -> None:
    """All tables."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in read_json(RESULTS / "decode_gpu.json")["rows"]:
        groups[row["shape"], row["batch"]].append(row)
    for (shape, batch), rows in groups.items():
        print(f"### {shape}, batch {batch}\n")
        rows.sort(key=lambda r: (r["slots"] != 100, r["slots"] == 0, r["slots"]))
        lines = []
        for row in rows:
            floor = (row["resident_floor_ms"] or 0) + row["copy_floor_ms"]
            megabytes = f"{row['bytes_per_token'] / 1e6:.0f}"
            measured = [megabytes, f"{row['hit_rate']:.3f}", f"{floor:.1f}", str(row["tokens"])]
            lines.append(common_cells(row, rows) + measured)
        print_table([*COMMON, "MB/token", "hit rate", "floor", "tokens"], lines)
    rows = read_json(RESULTS / "end_to_end_gpu.json")["rows"]
    lines = []
    for row in rows:
        megabytes = [f"{row[n] / 1e6:.1f}" for n in ("bytes_per_token", "wasted_bytes_per_token")]
        hit_rate = f"{row['hit_rate']:.3f}"
        lines.append([*common_cells(row, rows), f"{row['ttft_ms']:.0f}", *megabytes, hit_rate])
    print(f"### {rows[0]['shape']}\n")
    print_table([*COMMON, "TTFT", "MB/token", "wasted MB", "hit rate"], lines)
    rows = read_json(RESULTS / "ttft_gpu.json")["rows"]
    lines = []
    for row in rows:
        times = [f"{row['ttft_ms']:.0f}", f"{row['x_resident']:.1f}"]
        moved = f"{row['bytes_per_prompt'] / 1e6:.0f}"
        lines.append([str(row["prompt_tokens"]), row["arm"], *times, moved])
    print(f"### Prompts, {rows[0]['shape']}\n")
    print_table(["prompt", "arm", "TTFT", "x resident", "MB"], lines)


if __name__ == "__main__":
    main()

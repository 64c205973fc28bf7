"""Packing experts into 12 bits on CPU cores: GB of bfloat16 a second, by threads.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --json benchmarks/results/packing.json

Experts of Qwen3-30B-A3B's shape with RANDOM weights, in memory, go through the loader's `RowWriter`
into a store's rows: what loading does, but for reading files. Per core is by the processor's time,
so that a busy machine is not counted in; the wall clock stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from random_shapes import SPREAD
from torch import Tensor

from foreroute.runtime.store.encodings import EncodedParameter, Lossless
from foreroute.runtime.store.host_store import ParameterSpec, RowLayout
from foreroute.runtime.store.row_writer import RowWriter

ROWS, COLUMNS = 1536, 2048
"""Of the gate and up projections of one expert, one below the other."""


def layout_of(rows: int, columns: int, *, is_transposed: bool) -> RowLayout:
    """A row of one packed matrix."""
    encoding = Lossless(rows, columns)
    shape = (columns, rows) if is_transposed else (rows, columns)
    encoded = EncodedParameter(encoding, shape, torch.bfloat16, is_transposed)
    specs, offset = {}, 0
    for suffix, (size, dtype) in encoding.parts().items():
        specs["weight" + suffix] = spec = ParameterSpec(size, dtype, offset)
        offset += spec.num_bytes
    return RowLayout(specs, offset, {"weight": encoded})


def pack(weights: Tensor, layout: RowLayout, rows: Tensor) -> tuple[float, float]:
    """Pack experts once: seconds on the wall clock, and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    writer = RowWriter(layout, rows)
    for expert_id, weight in enumerate(weights):
        writer.put("weight", expert_id, 0, weight)
    return time.perf_counter() - wall, time.process_time() - processor


def measure(threads: int, *, experts: int, repeats: int, is_transposed: bool) -> dict[str, float]:
    """The best of several."""
    torch.set_num_threads(threads)
    layout = layout_of(ROWS, COLUMNS, is_transposed=is_transposed)
    shape = (COLUMNS, ROWS) if is_transposed else (ROWS, COLUMNS)
    weights = (torch.randn(experts, *shape) * SPREAD).bfloat16()
    rows = torch.zeros(experts, layout.row_bytes, dtype=torch.uint8)
    pack(weights[:1], layout, rows[:1])  # compiles
    runs = [pack(weights, layout, rows) for _ in range(repeats)]
    best = [min(times) for times in zip(*runs, strict=True)]
    return {
        "GB/s": weights.nbytes / best[0] / 1e9,
        "GB/s a core": weights.nbytes / best[1] / 1e9,
    }


def main() -> None:
    """Measure each number of threads, for both ways that matrices lie."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for threads in map(int, args.threads.split(",")):
        for is_transposed in (False, True):
            found = measure(
                threads, experts=args.experts, repeats=args.repeats, is_transposed=is_transposed
            )
            rows.append({"threads": threads, "is_transposed": is_transposed, **found})
            way = "inputs as rows" if is_transposed else "outputs as rows"
            print(f"{threads} threads, {way:15}", *(f"{n} {v:.2f}" for n, v in found.items()))
    if args.json:
        result = {"weights": "random", "rows": rows, "command": " ".join(sys.argv)}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Writes a trace set to publish: held-out routing with hidden states, to score predictors on.

collect-traces --model bundled --split held-out --tokens 16384 --record readout --out held-out
python benchmarks/publish_traces.py --traces held-out --name "foreroute bundled" --out trace-set
foreroute score --traces trace-set --predictions FILE
"""

from __future__ import annotations

import argparse
from pathlib import Path

from foreroute.data.traces import Traces
from foreroute.estimators.byte_sizes import format_bytes, parse_bytes
from foreroute.export.compare.published import MOST_BYTES, TraceSet


def main() -> None:
    """Take some tokens of every sequence and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="of held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="foreroute trace set")
    parser.add_argument("--tokens-per-sequence", type=int, default=128)
    parser.add_argument("--max-bytes", default=str(MOST_BYTES))
    options = parser.parse_args()
    found = TraceSet.gather(Traces.open(options.traces), options.tokens_per_sequence)
    limit = parse_bytes(options.max_bytes)
    written = found.write(options.out, name=options.name, max_bytes=limit)
    print(f"{len(found.columns['sequence']):,} tokens, {format_bytes(written)}")
    print(options.out)


if __name__ == "__main__":
    main()

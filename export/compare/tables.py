"""The tables of a comparison, in Markdown and as rows of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from foreroute.estimators import EstimatorSpec

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
"""Heads, and rows of as many cells."""

ORDER = ("none", "router-input", "quasi-hidden", "attention-readout", "pre-attention")


def main_table(rows: Iterable[Row]) -> Table:
    """What every predictor reached, by input and horizon."""
    heads = ["input", "h", "form", "recall@K", "95 % interval", "@1.5 K", "gate mass", "exact set"]
    heads += ["calib. error", "parameters", "trained on", "us", "TPOT saved"]
    ordered = sorted(rows, key=_place)
    return heads, [_cells(row) for row in ordered]


def _place(row: Row) -> tuple[int, int, int, int]:
    known = row["input"] in ORDER
    at = ORDER.index(row["input"]) if known else len(ORDER)
    return row["tokens_ahead"], at, row["horizon"], 0


def _cells(row: Row) -> list[str]:
    low_high = row["recall_at_k_ci"]
    interval = "" if low_high is None else "-".join(map(decimals, low_high))
    numbers = [row[k] for k in ("recall_at_1_5k", "gate_mass_recall", "exact_set", "ece")]
    timed = row.get("us_by_layer")
    saved = row.get("tpot_saved")
    return [
        row["input"],
        "token" if row["tokens_ahead"] else str(row["horizon"]),
        name_of(row),
        decimals(row["recall_at_k"]),
        interval,
        *map(decimals, numbers),
        f"{row['params']:,}" if row.get("params") else "",
        f"{row['training_tokens']:,}" if row.get("training_tokens") else "",
        "" if timed is None else f"{timed:.1f}",
        "" if saved is None else f"{100 * saved:.1f} %",
    ]


def name_of(row: Row) -> str:
    """A predictor as tables call it: its form, its size where several are compared, whose it is."""
    name: str = row["form"]
    if name in ("mlp", "mlp-free", "shared-mlp"):
        layers = row.get("depth", 1)
        name += f" {row['width']}" + (f" x {layers}" if layers > 1 else "")
    if row["form"] in ("low-rank", "ridge") and row["rank"] != EstimatorSpec.rank:
        name += f" {row['rank']}"
    if row.get("after"):
        name += f" ({row['after']})"
    if row.get("prior", "none") != "none":
        name += f" + {row['prior']}"
    return name


def worth_table(rows: Iterable[Row]) -> Table:
    """What each predictor saves on each machine, at each number of slots."""
    told = [row for row in rows if row.get("worth")]
    keys = list(dict.fromkeys((e["profile"], e["slots"]) for row in told for e in row["worth"]))
    heads = ["input", "h", "form", "rule", *(f"{p}, {s}" for p, s in keys), "wasted MB", "stall ms"]
    body = []
    for row in sorted(told, key=_place):
        for rule in dict.fromkeys(e["rule"] for e in row["worth"]):
            found = {(e["profile"], e["slots"]): e for e in row["worth"] if e["rule"] == rule}
            at = found.get((row.get("profile"), row.get("slots")))
            body.append(
                [
                    row["input"],
                    "token" if row["tokens_ahead"] else str(row["horizon"]),
                    name_of(row),
                    rule,
                    *(f"{100 * found[k]['saved']:+.1f} %" if k in found else "" for k in keys),
                    "" if at is None else f"{at['wasted_bytes'] / 1e6:.1f}",
                    "" if at is None else f"{at['stall_ms']:.2f}",
                ]
            )
    return heads, body


def saved_table(rows: Iterable[Row]) -> Table:
    """What each predictor saves at the slots that tables tell, its own cost beside it."""
    told = [row for row in rows if row.get("tpot_saved") is not None]
    heads = ["form", "input", "h", "recall@K", "extra us a layer", "TPOT saved", "rule"]
    body = [
        [
            name_of(row),
            row["input"],
            "token" if row["tokens_ahead"] else str(row["horizon"]),
            decimals(row["recall_at_k"]),
            f"{row.get('extra_us', 0.0):+.1f}",
            f"{100 * row['tpot_saved']:.1f} %",
            row["rule"],
        ]
        for row in sorted(told, key=lambda row: -row["tpot_saved"])
    ]
    return heads, body


def readout_table(rows: Iterable[Row]) -> Table:
    """What predictors that run an attention early save, by what that costs a layer."""
    told = [row for row in rows if row.get("saved_by_extra_us")]
    costs = [us for us, _ in told[0]["saved_by_extra_us"]] if told else []
    heads = ["form", "input", *(f"+{us:g} us" for us in costs)]
    body = [
        [
            name_of(row),
            row["input"],
            *(f"{100 * saved:.1f} %" for _, saved in row["saved_by_extra_us"]),
        ]
        for row in told
    ]
    return heads, body


def curve_table(points: Sequence[Row]) -> Table:
    """Recall by training tokens, a column a form."""
    names = list(dict.fromkeys(name_of(p) for p in points))
    tokens = sorted({p["training_tokens"] for p in points})
    found = {(p["training_tokens"], name_of(p)): p["recall_at_k"] for p in points}
    body = [[f"{t:,}", *(decimals(found.get((t, name))) for name in names)] for t in tokens]
    return ["training tokens", *names], body


def markdown(table: Table) -> str:
    """A table as Markdown."""
    heads, body = table
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def decimals(value: float | None) -> str:
    """Four of them, without the zero in front."""
    if value is None:
        return ""
    return f"{value:.4f}".removeprefix("0") if value < 1 else f"{value:.4f}"

"""The command `export-estimator`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from foreroute.estimators.console import plain_console, run_command

if TYPE_CHECKING:
    from foreroute.export.bundle import BundleManifest


def export(
    *,
    run: Path,
    out: Path,
    also: str = "",
    saved: float = 1.0,
    delay: float = 1.0,
    traces: Path | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a finished run's estimators as a calibrated bundle, measured from the written files.

    Each layer gets the form that costs least on held-out tokens: the run's, the training-free next
    router, or another run's. Costs count what the runtime's rule of prefetching would miss and
    fetch for nothing, in copies of one expert.

    Args:
        run: Folder that train-estimator finished.
        out: Folder of the bundle, made new.
        also: Further runs on the same traces to choose each layer from; a comma list.
        saved: What a right prefetch saves, in copies of one expert.
        delay: What a wrong one costs.
        traces: Where the runs' traces lie now, if they have moved.
        push_to_hub: Upload the bundle there too, with a card: user/name.
        private: Whether only its owner sees it there.
        overwrite: Replace the folder if it is there already.
    """
    from foreroute.estimators.expected_cost import FetchCosts
    from foreroute.export.export import export_estimator

    manifest = export_estimator(
        run,
        out,
        also=[Path(part.strip()) for part in also.split(",") if part.strip()],
        costs=FetchCosts(saved=saved, delay=delay),
        traces_path=traces,
        overwrite=overwrite,
    )
    _print_table(manifest)
    if push_to_hub is not None:
        from foreroute.export.push import push_bundle

        print(push_bundle(out, push_to_hub, is_private=private))
    print(out)


def _print_table(manifest: BundleManifest) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    top_k, fitted = manifest.geometry.top_k, manifest.calibration
    assert fitted is not None
    table = Table(
        title=f"recall@{top_k}(budget={top_k}), cost in copies per token, error of the "
        f"probabilities ({fitted.method}), on {manifest.num_held_out_tokens:,} held-out tokens",
        box=SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        show_edge=False,
    )
    columns = ("layer", "form", "input", "recall", "training\nfree", "cost")
    for name in (*columns, "error\nbefore", "error\nafter"):
        justify: Literal["left", "right"] = "left" if name in ("form", "input") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for pair in manifest.pairs:
        figures = (
            pair.recall_at_k,
            pair.training_free_recall_at_k,
            pair.expected_cost,
            pair.uncalibrated_error,
            pair.calibration_error,
        )
        table.add_row(
            str(pair.target_layer),
            pair.form,
            manifest.specs[pair.stack].input_kind,
            *(f"{figure:.3f}" for figure in figures),
        )
    plain_console().print(table)


def main() -> None:
    """Entry point of `export-estimator`."""
    run_command("export-estimator", export)


if __name__ == "__main__":
    main()

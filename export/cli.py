"""The command `export-estimator`."""

from __future__ import annotations

from pathlib import Path

from foreroute.estimators.console import run_command
from foreroute.export.bundle import BundleManifest


def export(*, run: Path, out: Path, traces: Path | None = None, overwrite: bool = False) -> None:
    """Write a finished run's estimators as a bundle, measured again from the written files.

    Args:
        run: Folder that train-estimator finished.
        out: Folder of the bundle, made new.
        traces: Where the run's traces lie now, if they have moved.
        overwrite: Replace the folder if it is there already.
    """
    from foreroute.export.export import export_estimator

    manifest = export_estimator(run, out, traces_path=traces, overwrite=overwrite)
    _print_table(manifest)
    print(out)


def _print_table(manifest: BundleManifest) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    top_k = manifest.geometry.top_k
    table = Table(
        title=f"recall@{top_k}(budget={top_k}) measured again on "
        f"{manifest.num_held_out_tokens:,} held-out tokens",
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    for name in ("source layer", "target layer", "form", "recall", "training-free recall"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for pair in manifest.pairs:
        recall = (f"{pair.recall_at_k:.3f}", f"{pair.training_free_recall_at_k:.3f}")
        table.add_row(str(pair.source_layer), str(pair.target_layer), pair.form, *recall)
    Console().print(table)


def main() -> None:
    """Entry point of `export-estimator`."""
    run_command("export-estimator", export)


if __name__ == "__main__":
    main()

"""The cards of what is pushed to the Hub: what it is, what was measured, where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.export.bundle import BundleManifest

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard, ModelCard

    from foreroute.data.manifest import TraceManifest

CARDS = Path(__file__).parent / "cards"


def bundle_card(manifest: BundleManifest, repo_id: str) -> ModelCard:
    """The card of a bundle, with its measured table.

    Args:
        manifest: Without local paths.
        repo_id: Where it goes.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    geometry, top_k = manifest.geometry, manifest.geometry.top_k
    mean = sum(pair.recall_at_k for pair in manifest.pairs) / len(manifest.pairs)
    data = ModelCardData(
        base_model=geometry.model_name if "/" in geometry.model_name else None,
        library_name="foreroute",
        license="apache-2.0",
        tags=["mixture-of-experts", "expert-prefetch", "foreroute"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="other",
                task_name="expert prediction",
                dataset_type="other",
                dataset_name=f"held-out traces, {manifest.num_held_out_tokens} tokens",
                metric_type="recall",
                metric_name=f"recall@{top_k} (budget {top_k}), mean over layers",
                metric_value=round(mean, 4),
            )
        ],
    )
    fitted = manifest.calibration
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(CARDS / "bundle.md"),
        model=geometry.model_name or geometry.model_type,
        repo_id=repo_id,
        held_out=f"{manifest.num_held_out_tokens:,}",
        top_k=top_k,
        experts=geometry.num_experts,
        table=_table(manifest),
        training=_training(manifest),
        calibration=f"{fitted.method}, fitted on {fitted.num_fit_tokens:,} held-out tokens"
        if fitted
        else "none were fitted",
        geometry=geometry.describe(),
    )
    return card


def traces_card(manifest: TraceManifest, repo_id: str) -> DatasetCard:
    """The card of recorded traces.

    Args:
        manifest: Without local paths.
        repo_id: Where they go.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(
        tags=["mixture-of-experts", "routing", "hidden-states", "foreroute"],
        pretty_name=f"Routing of {manifest.model}",
    )
    card: DatasetCard = DatasetCard.from_template(
        data,
        template_path=str(CARDS / "traces.md"),
        model=manifest.model,
        layers=manifest.geometry.num_layers,
        tokens=f"{manifest.num_tokens:,}",
        dataset=manifest.dataset,
        split=manifest.split,
        repo_id=repo_id,
        states=manifest.states_dtype,
    )
    return card


def _table(manifest: BundleManifest) -> str:
    lines = [
        "| layer | form | input | recall | training free | cost | calibration error |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in manifest.pairs:
        figures = (
            pair.recall_at_k,
            pair.training_free_recall_at_k,
            pair.expected_cost,
            pair.calibration_error,
        )
        words = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        kind = manifest.specs[pair.stack].input_kind
        lines.append(" | ".join(["", str(pair.target_layer), pair.form, kind, *words, ""]).strip())
    return "\n".join(lines)


def _training(manifest: BundleManifest) -> str:
    known: dict[str, Any] = manifest.provenance
    tokens = known.get("num_train_tokens")
    forms = ", ".join(sorted({f"{spec.form} on {spec.input_kind}" for spec in manifest.specs}))
    amount = f"{tokens:,} tokens" if tokens else "tokens"
    return (
        f"`train-estimator` ({forms}, {manifest.specs[0].horizon} MoE layers ahead) on {amount} of "
        "the model's own hidden states and routing."
    )

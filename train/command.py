"""What `train-estimator` does with its flags."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from foreroute.estimators import EstimatorSpec, InputKind
from foreroute.estimators.console import plain_console
from foreroute.train.losses import LossName
from foreroute.train.run import DeviceChoice, FitConfig, InitName


def train(
    *,
    traces: Path | None = None,
    out: Path,
    model: str | None = None,
    revision: str | None = None,
    dataset: str = "python-stdlib",
    column: str = "",
    tokens: int = 200_000,
    buffer: str = "1GiB",
    layers: str = "all",
    form: str = "low-rank",
    input: InputKind = "quasi-hidden",
    horizon: int = 1,
    rank: int = EstimatorSpec.rank,
    width: int = 256,
    depth: int = 1,
    epochs: int = FitConfig.epochs,
    batch_size: int = FitConfig.batch_size,
    learning_rate: float = FitConfig.learning_rate,
    loss: LossName = FitConfig.loss,
    init: InitName = FitConfig.init,
    kept_gain: float = FitConfig.kept_gain,
    device: DeviceChoice = "auto",
    seed: int = FitConfig.seed,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Fit estimators of where an MoE routes next, for all chosen layers in one run.

    Args:
        traces: Folder that collect-traces wrote; without it, give --model.
        out: Folder of the run, made new.
        model: Train while this model runs, and store nothing of it: bundled, a folder or a Hub id.
        revision: Branch, tag or commit of a Hub id, for that model and its tokenizer.
        dataset: Text that model runs on, as collect-traces takes it.
        column: Column of its tables; found unless said.
        tokens: Tokens of it, to train on and to measure by.
        buffer: Most memory for its states; the model runs again over what does not fit.
        layers: Layers to predict, as the model counts them: all, 3, 3,4 or 3-7.
        form: Estimator form: next-router, low-rank, ridge, linear, mlp, mlp-free or shared-mlp.
        input: State at the source layer that is read. The last two must have been recorded
            (collect-traces --record readout,layer-input).
        horizon: Distance from source to target layer, in MoE layers; 0 with pre-attention only.
        rank: Rank of the correction (low-rank and ridge only).
        width: Hidden units of a layer (mlp, mlp-free and shared-mlp only).
        depth: Hidden layers (shared-mlp only).
        epochs: Passes over the training tokens.
        batch_size: Tokens per optimizer step.
        learning_rate: At the first step; follows a cosine to zero.
        loss: What training makes small: kl to the routers' distribution; boundary, kl and how far
            soft membership in the top K is off; gate-mass, kl to the gate weights of the top K;
            bce, cross-entropy with which experts were chosen.
        init: Where low-rank starts: ridge (closed form), or zero (the next router alone).
        kept_gain: Share of the gain over the next router to keep when corrections are shrunk, which
            makes them hold on text of other kinds; 1 gives up nothing on text of this kind.
        device: Where to compute; auto takes a GPU if there is one.
        seed: Of the initial parameters and of the order of tokens.
        overwrite: Replace the folder if it is there already.
        resume: Go on with a run that was killed.
    """
    from foreroute.train.quiet import quieten_lightning

    quieten_lightning()
    from foreroute.data.manifest import read_manifest
    from foreroute.estimators import parse_layers
    from foreroute.estimators.byte_sizes import format_bytes, parse_bytes
    from foreroute.estimators.output import claim
    from foreroute.estimators.ranks import joined_ranks
    from foreroute.train.fit import LIVE_IS_ALONE, train_estimator
    from foreroute.train.online import RECORDED_FOR, open_live_traces

    if (traces is None) == (model is None):
        raise ValueError("Give either --traces, or --model to train while a model runs.")
    source: Any = traces
    with contextlib.ExitStack() as held:
        ranks = held.enter_context(joined_ranks())
        if model is not None and not ranks.is_alone:
            raise ValueError(LIVE_IS_ALONE)
        ranks.first(lambda: held.enter_context(claim(out)))
        buffer_bytes = None
        if traces is not None:
            geometry = read_manifest(traces).geometry
        else:
            assert model is not None
            buffer_bytes = parse_bytes(buffer)
            source = open_live_traces(
                out,
                model=model,
                revision=revision,
                dataset=dataset,
                column=column,
                tokens=tokens,
                record=RECORDED_FOR.get(input, ""),
                device=device,
                buffer_bytes=buffer_bytes,
                overwrite=overwrite,
                resume=resume,
            )
            geometry = source.geometry
        targets = parse_layers(layers, geometry, horizon)
        spec = EstimatorSpec(
            form=form,
            input_kind=input,
            horizon=horizon,
            rank=rank,
            width=width,
            depth=depth,
            target_layers=targets,
        )
        config = FitConfig(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            loss=loss,
            init=init,
            kept_gain=kept_gain,
            seed=seed,
        )
        metrics = train_estimator(
            source,
            spec,
            config,
            out,
            device=device,
            overwrite=overwrite,
            resume=resume,
            memory_bytes=buffer_bytes,
        )
    if not ranks.is_first:
        return
    _print_tables(metrics)
    if traces is None:
        print(
            f"The model ran over {source.num_recorded_tokens:,} tokens in all, "
            f"{source.num_recorded_tokens / source.num_tokens:.1f} times each; at most "
            f"{format_bytes(source.peak_bytes)} of states lay in memory, none on the disk."
        )
    print(out)


def _print_tables(metrics: dict[str, Any]) -> None:
    """Print the trained form beside the baselines, then all there is about the trained form."""
    ours, top_k, form = metrics["estimator"], metrics["top_k"], metrics["form"]
    others = [(name, found) for name, found in metrics["baselines"].items() if name != "random"]
    beside = [
        (name, result["per_layer"]["recall_at_k"], result["recall_at_k"])
        for name, result in [(form, ours), *others]
    ]
    title = (
        f"recall@{top_k}(budget={top_k}) on {metrics['num_held_out_tokens']:,} held-out tokens, "
        f"random {metrics['mean']['random']:.3f}"
    )
    _print_table(title, metrics["layers"], beside)
    alone = [
        (
            f"recall@{top_k} budget={budget}",
            ours["per_layer"]["recall_at_budgets"][str(budget)],
            ours["recall_at_budgets"][str(budget)],
        )
        for budget in metrics["budgets"]
    ]
    alone += [
        (name.replace("_", " "), ours["per_layer"][name], ours[name])
        for name in ("gate_mass_recall", "exact_set")
    ]
    title = f"{form}, trained on {metrics['num_train_tokens']:,} tokens"
    _print_table(title, metrics["layers"], alone)


def _print_table(
    title: str, layers: list[int], columns: list[tuple[str, list[float], float]]
) -> None:
    """Print one row per layer and a row of means; a column is a name, its values, their mean."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title,
        collapse_padding=True,
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        title_justify="left",
    )
    table.add_column("layer", justify="right")
    for name, _, _ in columns:
        table.add_column(name.replace("-", " "), justify="right")
    for row, layer in enumerate(layers):
        table.add_row(str(layer), *(f"{values[row]:.3f}" for _, values, _ in columns))
    table.add_section()
    table.add_row("mean", *(f"{mean:.3f}" for _, _, mean in columns))
    plain_console().print(table)

"""The command `foreroute evaluate`."""

from __future__ import annotations

from pathlib import Path


def evaluate(
    tasks: str,
    model: str = "bundled",
    bundle: Path | None = None,
    on_miss: str = "fetch",
    weights: str = "true",
    expert_slots: str = "25%",
    prefetch: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    include_path: Path | None = None,
    json: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    expert_dtype: str = "auto",
    revision: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> None:
    """Score an engine on tasks of lm-evaluation-harness, exact or speculative.

    Args:
        tasks: Names that the harness knows, such as hellaswag,gsm8k; a comma list.
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote, or a Hub id, `@` a revision.
        on_miss: fetch (exact), skip or predicted; both others are speculative, and read texts
            token by token, so that their price is measured.
        weights: Gate weights of predicted experts: true or predicted.
        expert_slots: Slots per MoE layer: a number, a share such as 25%, or auto.
        prefetch: none, auto or all; auto where there is a bundle, unless said.
        limit: Examples per task; all unless said.
        num_fewshot: Examples in the prompt; the task's own number unless said.
        batch_size: Sequences per forward pass.
        include_path: Folder with tasks of your own.
        json: Write the figures here too.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        expert_dtype: How experts are stored; auto is exact.
        revision: Branch, tag or commit of a Hub id.
        seed: Of all that is drawn.
        trust_remote_code: Run code that came with the checkpoint.
    """
    try:
        from foreroute.runtime.evaluation.score import score
    except ImportError as error:
        raise ValueError(
            f"foreroute evaluate needs more packages ({error.name} is missing): "
            'pip install "foreroute[eval]".'
        ) from error
    from rich.table import Table

    from foreroute.data.adapters import load_tokenizer
    from foreroute.estimators.artifacts import package_versions, require_file_place, write_json
    from foreroute.estimators.console import plain_console
    from foreroute.runtime.engine import Engine

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks is empty; give names such as hellaswag,gsm8k.")
    require_file_place(json)
    with Engine.from_pretrained(
        model,
        bundle=bundle,
        on_miss=on_miss,
        weights=weights,
        expert_slots=expert_slots,
        prefetch=prefetch,
        device=device,
        dtype=dtype,
        expert_dtype=expert_dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    ) as engine:
        found = score(
            engine,
            load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code),
            names,
            batch_size=batch_size,
            limit=limit,
            num_fewshot=num_fewshot,
            include_path=include_path,
            seed=seed,
        )
        kind = "exact" if engine.config.is_exact else f"SPECULATIVE ({on_miss})"
        agreement = engine.stats().agreement
    table = Table(title=f"{model}, {kind}, lm-evaluation-harness", title_justify="left")
    for column in ("task", "metric", "value"):
        table.add_column(column)
    for task, values in found.items():
        for metric, value in values.items():
            table.add_row(task, metric, f"{value:.4f}")
    plain_console().print(table)
    if json is not None:
        settings = {"model": model, "kind": kind, "agreement": agreement, "limit": limit}
        write_json(json, {"settings": settings, "versions": package_versions(), "tasks": found})
        plain_console().print(str(json), soft_wrap=True)

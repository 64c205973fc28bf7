"""The command `foreroute evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def evaluate(
    tasks: str | None = None,
    rules: str | None = None,
    slots: str = "25%",
    out: Path | None = None,
    model: str = "bundled",
    bundle: Path | None = None,
    on_miss: str = "fetch",
    exact_layers: str = "",
    expert_slots: str = "25%",
    prefetch: str | None = None,
    dataset: str = "python-stdlib",
    column: str = "",
    num_prompts: int = 24,
    prompt_tokens: int = 32,
    new_tokens: int = 160,
    free_tokens: int = 0,
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
    """Score an engine on tasks of lm-evaluation-harness, or measure what rules on a miss cost.

    With --tasks, the engine runs under --on-miss and --expert-slots. With --rules, each rule reads
    held-out texts token by token at each number of --slots, beside the exact engine; what is in
    --out already is not measured again.

    Args:
        tasks: Names that the harness knows, such as hellaswag,gsm8k; a comma list.
        rules: Rules on a miss, such as substitute:0.5,substitute+threshold:0.15; a comma list.
        slots: Slots per MoE layer that rules are measured at, numbers or shares; a comma list.
        out: The frontier's file, JSON; generate --quality-budget chooses from it.
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote, or a Hub id, `@` a revision.
        on_miss: Of --tasks: fetch (exact), or a rule; engines under rules read texts token by
            token, so that their price is measured.
        exact_layers: Layers that fetch whatever the rule: decoder layer indices, 0 or 0-1,7.
        expert_slots: Slots per MoE layer of --tasks: a number, a share such as 25%, or auto.
        prefetch: none, auto or all; auto where there is a bundle, unless said.
        dataset: Where the texts of --rules come from (its held-out split).
        column: Column of its tables; found unless said.
        num_prompts: How many texts.
        prompt_tokens: Tokens of each that are read in one pass.
        new_tokens: Tokens of each that follow, read one by one.
        free_tokens: Tokens that the model writes itself after each prompt, to see how many of them
            are the exact model's before one is not.
        limit: Examples per task; all unless said.
        num_fewshot: Examples in the prompt; the task's own number unless said.
        batch_size: Sequences per forward pass of --tasks.
        include_path: Folder with tasks of your own.
        json: Write the figures of --tasks here too.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        expert_dtype: How experts are stored; auto is exact.
        revision: Branch, tag or commit of a Hub id.
        seed: Of all that is drawn.
        trust_remote_code: Run code that came with the checkpoint.
    """
    given = dict(locals())
    if (tasks is None) == (rules is None):
        raise ValueError(
            "Give --tasks (of lm-evaluation-harness) or --rules (on a miss), and not both."
        )
    if rules is not None:
        _measure_rules(**{name: given[name] for name in RULE_FLAGS})
    else:
        _score_tasks(**{name: given[name] for name in TASK_FLAGS})


COMMON_FLAGS = (
    "model",
    "bundle",
    "exact_layers",
    "prefetch",
    "device",
    "dtype",
    "expert_dtype",
    "revision",
    "trust_remote_code",
)
RULE_FLAGS = (
    *COMMON_FLAGS,
    "rules",
    "slots",
    "out",
    "dataset",
    "column",
    "num_prompts",
    "prompt_tokens",
    "new_tokens",
    "free_tokens",
)
TASK_FLAGS = (
    *COMMON_FLAGS,
    "tasks",
    "on_miss",
    "expert_slots",
    "limit",
    "num_fewshot",
    "batch_size",
    "include_path",
    "json",
    "seed",
)


def _measure_rules(
    *,
    rules: str,
    slots: str,
    out: Path | None,
    model: str,
    bundle: Path | None,
    exact_layers: str,
    prefetch: str | None,
    dataset: str,
    column: str,
    num_prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    free_tokens: int,
    device: str,
    dtype: str,
    expert_dtype: str,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    import shlex
    import sys

    from foreroute.data.adapters import load_tokenizer
    from foreroute.data.adapters.loading import HubSettings
    from foreroute.data.adapters.vocabulary import vocabulary_size
    from foreroute.data.columns import RowReading
    from foreroute.data.held_out import held_out_sequences
    from foreroute.estimators.artifacts import device_name, package_versions, require_file_place
    from foreroute.estimators.console import plain_console
    from foreroute.export.bundle import load_bundle
    from foreroute.runtime.config import EngineConfig
    from foreroute.runtime.evaluation.frontier import Frontier
    from foreroute.runtime.evaluation.price import PriceList, Texts, not_measured, rules_of
    from foreroute.runtime.evaluation.tables import price_table
    from foreroute.runtime.store.offload import load_offloaded

    if num_prompts < 2 or prompt_tokens < 1 or new_tokens < 2:
        raise ValueError("--rules needs at least 2 prompts of 1 token, and 2 new tokens each.")
    names, shares = rules_of(rules), [s.strip() for s in slots.split(",") if s.strip()]
    require_file_place(out)
    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    loaded = load_bundle(bundle) if bundle else None
    offloaded = load_offloaded(model, device=device, dtype=dtype, expert_dtype=expert_dtype, **hub)
    if loaded is not None:
        loaded.require_fits(offloaded.moe.geometry)
    config = EngineConfig(prefetch=prefetch or ("auto" if bundle else "none"))  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "dataset": dataset,
        "num_prompts": num_prompts,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "dtype": str(offloaded.moe.model.dtype).removeprefix("torch."),
        "expert_dtype": offloaded.expert_dtype,
        "bundle": str(bundle or ""),
        "prefetch": config.prefetch,
    }
    if free_tokens:
        settings["free_tokens"] = free_tokens
    frontier = Frontier(
        geometry=offloaded.moe.geometry,
        device=device_name(offloaded.device),
        settings=settings,
        command=shlex.join(sys.argv),
        versions=package_versions(),
        rows=[],
    ).going_on_from(out)
    todo = not_measured(names, shares, exact_layers, frontier.rows)
    if todo:
        reading = RowReading(column=column, tokenizer=load_tokenizer(model, **hub))
        length = prompt_tokens + new_tokens
        num_known = vocabulary_size(offloaded.moe.model)
        texts = Texts.cut(
            held_out_sequences(reading, dataset, num_prompts, length, num_known),
            prompt_tokens,
            free_tokens,
        )
        prices = PriceList(offloaded, loaded.stack if loaded else None, config, frontier.rows)
        exact = prices.read_exact(texts, shares[0])
        for rule, share in todo:
            layers = "" if rule == "fetch" else exact_layers
            frontier.rows.append(prices.measure(texts, exact, rule, share, layers))
            if out is not None:  # a run that is stopped goes on from here
                frontier.write(out)
    console = plain_console()
    console.print(price_table(frontier))
    if out is not None:
        console.print(str(out), soft_wrap=True)


def _score_tasks(
    *,
    tasks: str,
    model: str,
    bundle: Path | None,
    on_miss: str,
    exact_layers: str,
    expert_slots: str,
    prefetch: str | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    include_path: Path | None,
    json: Path | None,
    device: str,
    dtype: str,
    expert_dtype: str,
    revision: str | None,
    seed: int,
    trust_remote_code: bool,
) -> None:
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
        exact_layers=exact_layers,
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

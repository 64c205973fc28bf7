"""The command `foreroute tune`."""

from __future__ import annotations

from pathlib import Path


def tune(
    out: Path,
    model: str = "bundled",
    dataset: str = "python-stdlib",
    tokens: int = 200_000,
    form: str = "low-rank",
    expert_slots: str = "25%",
    device: str = "auto",
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    revision: str | None = None,
    prompt: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """From a model's name to a faster engine: every step, resumable, and a page at the end.

    Runs doctor, profile, plan, collect-traces, train-estimator, export-estimator, report and
    bench, each as a user would type it. The same command goes on where it was ended.

    Args:
        out: Folder that everything goes to.
        model: `bundled`, a local folder or a Hub id.
        dataset: Text to learn from, as collect-traces takes it.
        tokens: To record.
        form: Of the estimators, as train-estimator takes it.
        expert_slots: Slots per MoE layer to measure: a number, a share such as 25%, or auto.
        device: auto, cpu or cuda.
        gpu_memory: To plan for, such as 24GiB; this GPU's unless said, no plan where there is none.
        host_memory: To plan for, such as 64GiB; what is available here unless said.
        revision: Branch, tag or commit of a Hub id.
        prompt: Text to go on with at the end.
        trust_remote_code: Run code that came with the checkpoint.
    """
    from foreroute.data.adapters import resolve_device
    from foreroute.data.adapters.loading import HubSettings
    from foreroute.estimators.artifacts import write_json, write_text
    from foreroute.estimators.console import plain_console
    from foreroute.estimators.host_memory import available_host_bytes
    from foreroute.export.report.bench_page import read_bench, verdict
    from foreroute.export.report.tune_page import tune_page
    from foreroute.runtime.store.checkpoint import Checkpoint
    from foreroute.runtime.tune.plan import Tuning
    from foreroute.runtime.tune.steps import Journal, run_all
    from foreroute.runtime.tune.summary import show, summarise
    from foreroute.train.run import read_metrics

    if out.is_file():
        raise ValueError(f"{out} is a file; give a folder.")
    _require_enough(tokens)
    hub: HubSettings = {"revision": revision, "trust_remote_code": trust_remote_code}
    checkpoint = Checkpoint.open(model, **hub)
    tuning = Tuning(
        model=model,
        out=out,
        dataset=dataset,
        tokens=tokens,
        form=form,
        expert_slots=expert_slots,
        device=device,
        gpu_memory=gpu_memory or _gpu_memory(device),
        host_memory=host_memory or _as_text(available_host_bytes()),
        revision=revision,
        prompt=prompt,
        trust_remote_code=trust_remote_code,
        is_held=checkpoint.is_held_by(resolve_device(device), is_stock=True),
    )
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out)

    def say(line: str) -> None:
        print(line, flush=True)

    steps = tuning.steps()
    run_all(steps, journal, say)
    bench = read_bench(out / "bench.json")
    summary = summarise(read_metrics(out / "run"), bench, journal.seconds)
    write_json(out / "summary.json", summary)
    commands = [(step.text, journal.seconds[step.name]) for step in steps]
    title = f"{model} on {summary['device']}, tuned by foreroute"
    write_text(out / "index.html", tune_page(title, summary, bench, commands))
    show(out, summary, verdict(bench), plain_console())
    if not summary["runtime"]["exact_tokens_equal"]:
        raise SystemExit(1)


def _require_enough(tokens: int) -> None:
    """Refuse an amount of which too little is held out, before it is recorded.

    Raises:
        ValueError: If it is.
    """
    from foreroute.data.collect import CollectRequest
    from foreroute.train.split import split_held_out, split_sequences

    try:
        split_held_out(split_sequences(-(-tokens // CollectRequest.sequence_length)).held_out)
    except ValueError as error:
        raise ValueError(f"--tokens {tokens}: {error} Give more --tokens.") from error


def _gpu_memory(device: str) -> str | None:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    return _as_text(torch.cuda.mem_get_info()[1])


def _as_text(num_bytes: int | None) -> str | None:
    """In whole GiB, so that the same machine gives the same commands."""
    return None if num_bytes is None else f"{num_bytes // 2**30}GiB"

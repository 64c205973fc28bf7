"""The commands `collect-traces` and `foreroute collect`, which can record a running engine too."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.estimators.console import one_line_errors, plain_console, run_command

if TYPE_CHECKING:
    from foreroute.data.manifest import TraceManifest
    from foreroute.data.traces import Traces

ENGINE_FLAGS = ("bundle", "on_miss", "expert_slots")
SLOTS_HELP = (
    "expert_slots: Run the model in an engine with its experts in host memory and so many of each "
    "layer's on the device, a number or a share such as 25%; for models that it cannot hold whole."
)
HUB_HELP = "push_to_hub: Upload the finished traces there too, as a dataset with a card: user/name."
PRIVATE_HELP = "private: Whether only its owner sees it there."


def main() -> None:
    """Entry point of the console script."""
    with one_line_errors("collect-traces"):
        from foreroute.data.collect import collect_traces
        from foreroute.data.recording_run import ShardsElsewhere
        from foreroute.estimators.ranks import joined_ranks

        @functools.wraps(collect_traces)
        def command(
            *,
            expert_slots: str | None = None,
            push_to_hub: str | None = None,
            private: bool = False,
            **arguments: Any,
        ) -> None:
            with joined_ranks() as ranks:
                try:
                    if expert_slots is not None:
                        collect(expert_slots=expert_slots, **arguments)
                    else:
                        prepare_process(is_quiet=not ranks.is_first)
                        traces = collect_traces(**arguments)
                        if ranks.is_first:
                            show_traces(traces)
                except ShardsElsewhere as problem:
                    logging.getLogger(__name__).info("%s", problem)
                    return
                if ranks.is_first and push_to_hub is not None:
                    _push(arguments["out"], push_to_hub, is_private=private)

        run_command("collect-traces", _with_more(command))


def _with_more(command: Any) -> Any:
    """The command with what needs other rooms among its flags and in its help."""
    signature = inspect.signature(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter("expert_slots", kind, default=None, annotation=str | None),
        inspect.Parameter("push_to_hub", kind, default=None, annotation=str | None),
        inspect.Parameter("private", kind, default=False, annotation=bool),
    ]
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
    lines = "".join(f"        {text}\n" for text in (SLOTS_HELP, HUB_HELP, PRIVATE_HELP))
    command.__doc__ = command.__doc__.replace("\n    Returns:", f"{lines}\n    Returns:")
    return command


def _push(folder: Path, repo_id: str, *, is_private: bool) -> None:
    """Upload finished traces and print where they are."""
    from foreroute.export.push import push_traces

    print(push_traces(Path(folder), repo_id, is_private=is_private))


def collect(
    *,
    bundle: Path | None = None,
    on_miss: str | None = None,
    expert_slots: str | None = None,
    model: str = "bundled",
    revision: str | None = None,
    dataset: str = "python-stdlib",
    column: str = "",
    prompt_tokens: str = "",
    out: Path,
    tokens: int = 200_000,
    split: str = "train",
    sequence_length: int = 512,
    source: str = "generated",
    generate: int = 256,
    generated_share: float = 0.0,
    tokens_per_sequence: int | None = None,
    record: str = "",
    dtype: str = "auto",
    states_dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    batch_size: int = 8,
    shard_tokens: int = 16384,
    max_bytes: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Record what a model routes; with a bundle, on states that its speculation has produced.

    What is recorded as routing is always the true router's choice, whichever experts ran. Which
    ones are resident depends on all that ran before, so traces of a run that was killed and went on
    differ from an uninterrupted run's. Without --bundle this is collect-traces, of the model's own
    text unless --source says otherwise; with --expert-slots alone, of a model whose experts are
    fetched when they are needed, so that the device need not hold them.

    Args:
        bundle: Run the model in an engine with the estimators of this bundle, a folder or a Hub id.
        on_miss: What the engine does about a missing expert: skip (unless said) or another of its
            speculative rules, with a bundle; fetch (unless said, without one) is exact.
        expert_slots: Slots per MoE layer on the device: a number, or a share such as 25% (unless
            said, with a bundle); without it and a bundle the whole model is on the device.
        model: As collect-traces takes it, like all that follow.
        revision: Branch, tag or commit of a Hub id, for weights and tokenizer.
        dataset: Where prompts, or text, come from.
        column: Column of its tables that holds text, chats or token ids; found unless said.
        prompt_tokens: Where the prompt of each row of token ids ends: a column, or a number.
        out: Folder the traces go to.
        tokens: Tokens to record.
        split: train or held-out.
        sequence_length: Tokens per sequence, prompt and continuation together.
        source: generated or dataset; speculation is off while the engine reads text, so a
            speculative rule takes generated.
        generate: Tokens to generate, and to record, of each sequence.
        generated_share: Share of each sequence that is generated after text (source dataset only).
        tokens_per_sequence: Record only so many tokens of each sequence, at random positions.
        record: More to record: layer-input, readout.
        dtype: auto, float32, bfloat16 or float16.
        states_dtype: auto, float32, bfloat16, float16 or int8.
        device: auto, cpu or cuda.
        device_map: Spread the layers over GPUs that hold the whole model: auto, balanced,
            sequential.
        batch_size: Sequences per forward pass; sequences of a batch share the slots.
        shard_tokens: Tokens per shard.
        max_bytes: Stop cleanly before the traces exceed this.
        seed: Of the sampled continuations and positions.
        overwrite: Replace traces that lie at `out` already.
        trust_remote_code: Run code that came with the checkpoint.
    """
    given = {name: value for name, value in locals().items() if name not in ENGINE_FLAGS}
    from foreroute.data.adapters import load_tokenizer, resolve_device
    from foreroute.data.collect import (
        LOADING_FLAGS,
        CollectRequest,
        collect_from,
        collect_traces,
    )
    from foreroute.data.manifest import MANIFEST_FILE, Speculation
    from foreroute.estimators.artifacts import sha256_of
    from foreroute.estimators.ranks import joined_ranks
    from foreroute.export.hub import find_bundle
    from foreroute.runtime import Engine

    with joined_ranks() as ranks:
        prepare_process(is_quiet=not ranks.is_first)
        on_miss = on_miss or ("skip" if bundle else "fetch")
        if bundle is None and on_miss != "fetch":
            raise ValueError(f"--on-miss {on_miss} needs --bundle, which predicts.")
        if bundle is None and expert_slots is None:
            traces = collect_traces(**given)
            if ranks.is_first:
                show_traces(traces)
            return
        if on_miss != "fetch" and source != "generated":
            raise ValueError(
                f"--on-miss {on_miss} speculates while the model generates, not while it "
                "reads text: give --source generated, or --on-miss fetch."
            )
        if device_map is not None:
            raise ValueError(
                "--device-map is for models without an engine: leave out --expert-slots."
            )
        speculation, expert_slots = None, expert_slots or "25%"
        if bundle is not None:
            bundle = find_bundle(bundle)
            if not (bundle / MANIFEST_FILE).is_file():
                raise FileNotFoundError(f"{bundle} holds no bundle: it has no {MANIFEST_FILE}.")
        if bundle is not None and on_miss != "fetch":
            speculation = Speculation(
                bundle=str(bundle),
                bundle_sha256=sha256_of(bundle / MANIFEST_FILE),
                on_miss=on_miss,
                expert_slots=expert_slots,
            )
        asked = {name: value for name, value in given.items() if name not in LOADING_FLAGS}
        request = CollectRequest(**asked, speculation=speculation)
        if speculation and not ranks.is_alone:
            raise ValueError(
                "What speculation makes depends on all that ran before: record it with one "
                "process, or give --on-miss fetch."
            )
        ranks.first(request.require_free)
        engine = Engine.from_pretrained(
            model,
            bundle=bundle,
            on_miss=on_miss,
            expert_slots=expert_slots,
            device=str(ranks.device(resolve_device(device))),
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            # under speculation the host decides, as recording needs it; on demand, a GPU may
            decide_on="host" if speculation else "auto",
            agreement_floor=0.0,  # what is asked for is recorded to the end
        )
        tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        with engine:
            traces = collect_from(engine.offloaded.moe, tokenizer, request, ranks)
            if ranks.is_first:
                show_traces(traces)


def prepare_process(*, is_quiet: bool = False) -> None:
    """Keep freed memory, and print what is logged.

    Args:
        is_quiet: Leave the printing to another process.
    """
    from foreroute.data.allocator import keep_freed_memory

    keep_freed_memory()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("foreroute").setLevel(logging.WARNING if is_quiet else logging.INFO)


def show_traces(traces: Traces) -> None:
    """Print what finished traces hold, and last their folder."""
    import torch
    from rich.table import Table

    from foreroute.data.layout import DECODE
    from foreroute.estimators.byte_sizes import format_bytes

    manifest = traces.manifest
    phases = torch.cat([traces.tokens(shard.shard_idx).phases for shard in manifest.shards])
    num_decode = int((phases == DECODE).sum())
    rows = {
        "MoE layers": f"{traces.geometry.num_layers}",
        "sequences": f"{traces.num_sequences:,}",
        "tokens": f"{traces.num_tokens:,} (asked for {manifest.tokens:,})",
        "prefill / decode": f"{traces.num_tokens - num_decode:,} / {num_decode:,}",
        "source": _source_of(manifest),
        "shards": f"{len(manifest.shards)}",
        "on disk": format_bytes(manifest.num_bytes),
        "a token": format_bytes(manifest.num_bytes / manifest.num_tokens),
        "states": ", ".join((manifest.states_dtype, *manifest.record)),
        "stopped": manifest.stop_reason,
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    plain_console().print(table)
    print(traces.folder)


def _source_of(manifest: TraceManifest) -> str:
    if manifest.speculation is None:
        return manifest.source
    given = manifest.speculation
    return f"generated under speculation ({given.on_miss}, {given.expert_slots} slots)"


if __name__ == "__main__":
    main()

"""The command `foreroute serve`."""

from __future__ import annotations

from pathlib import Path


def serve(
    model: str = "bundled",
    bundle: Path | None = None,
    port: int = 8000,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    max_waiting: int = 8,
    name: str | None = None,
    expert_slots: str = "auto",
    prefetch: str | None = None,
    eviction: str = "default",
    device: str = "auto",
    dtype: str = "auto",
    expert_dtype: str = "auto",
    pinned_memory: str | None = None,
    share_experts: bool = False,
    tp_plan: str = "none",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve a model to OpenAI clients: /v1/chat/completions, /v1/completions, /health, /metrics.

    Of several processes that torchrun started, each with a slice of every expert, the first one
    answers.

    Args:
        model: `bundled`, a local folder or a Hub id.
        bundle: Folder that export-estimator wrote, or a Hub id, `@` a revision.
        port: To listen on; 0 takes a free one.
        host: Address to listen on; others than this machine reach the server only if it says so.
        api_key: What clients must send as a bearer token; nothing unless said.
        max_waiting: Requests that wait while another is answered; more get 503.
        name: What clients call the model; as --model unless said.
        expert_slots: Slots per MoE layer: a number, a share such as 25%, or auto.
        prefetch: none, auto or all; auto where there is a bundle, unless said.
        eviction: Which expert goes: default, lru, lfu, lrfu, adaptive, predicted or
            static.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        expert_dtype: How experts are stored; auto is exact.
        pinned_memory: Host memory to page-lock for experts, such as 24GiB; as much as the system
            allows unless said.
        share_experts: Map a prepared model's rows: engines of one host have one copy in memory.
        tp_plan: Of several processes: none (each has everything but the experts) or auto
            (divided by transformers' own plan).
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that came with the checkpoint.
    """
    if not 0 <= port < 65536 or max_waiting < 0:
        raise ValueError(
            f"--port must lie in 0..65535 and --max-waiting not be negative, not {port} and "
            f"{max_waiting}."
        )
    try:
        from foreroute.runtime.serving.app import make_app
        from foreroute.runtime.serving.server import run_server
    except ImportError as error:
        raise ValueError(
            f"foreroute serve needs more packages ({error.name} is missing): "
            'pip install "foreroute[serve]".'
        ) from error
    from foreroute.data.adapters import load_tokenizer
    from foreroute.estimators.ranks import are_ranks_started
    from foreroute.runtime.engine import Engine
    from foreroute.runtime.parallel import Lockstep

    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    with Engine.from_pretrained(
        model,
        bundle=bundle,
        expert_slots=expert_slots,
        prefetch=prefetch,
        eviction=eviction,
        device=device,
        dtype=dtype,
        expert_dtype=expert_dtype,
        pinned_memory=pinned_memory,
        share_experts=share_experts,
        tp_plan=tp_plan,
        revision=revision,
        trust_remote_code=trust_remote_code,
        is_sliced=are_ranks_started(),
    ) as engine:
        lockstep = Lockstep(engine.ranks, engine.generate)
        if not engine.ranks.is_first:
            lockstep.follow()
            return
        app = make_app(engine, tokenizer, name or model, api_key=api_key, max_waiting=max_waiting)
        with lockstep.leading(engine.model):
            run_server(app, host, port)

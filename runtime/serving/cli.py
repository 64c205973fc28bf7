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
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve a model to OpenAI clients: /v1/chat/completions, /v1/completions, /health, /metrics.

    Args:
        model: `bundled`, a local folder or a Hub id.
        bundle: Estimators that export-estimator wrote.
        port: To listen on; 0 takes a free one.
        host: Address to listen on; others than this machine reach the server only if it says so.
        api_key: What clients must send as a bearer token; nothing unless said.
        max_waiting: Requests that wait while another is answered; more get 503.
        name: What clients call the model; as --model unless said.
        expert_slots: Slots per MoE layer: a number, a share such as 25%, or auto.
        prefetch: none, auto or all; auto where there is a bundle, unless said.
        eviction: Which expert goes: default, lru, lfu, lrfu, predicted or static.
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16 or float16.
        expert_dtype: How experts are stored; auto is exact.
        pinned_memory: Host memory to page-lock for experts, such as 24GiB; as much as the system
            allows unless said.
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
    from foreroute.runtime.engine import Engine

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
        revision=revision,
        trust_remote_code=trust_remote_code,
    ) as engine:
        app = make_app(engine, tokenizer, name or model, api_key=api_key, max_waiting=max_waiting)
        run_server(app, host, port)

"""The HTTP application: routes, errors in OpenAI's form, and who may come in."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as AnyHTTPException  # what FastAPI itself raises too

from foreroute.runtime.engine import Engine
from foreroute.runtime.serving.answers import CURRENT, Answer, AnswerQueue
from foreroute.runtime.serving.handlers import Chat, Completion, OneModel, OneQueue, with_usage
from foreroute.runtime.serving.metrics import ServerMetrics
from foreroute.runtime.serving.requests import CHAT, COMPLETION, BadRequest, checked

LOOK_EVERY_S = 0.05
"""How often a waiting request looks whether its client is still there."""
NO_LIMIT = 1 << 62


def make_app(
    engine: Engine, processor: Any, name: str, *, api_key: str | None = None, max_waiting: int = 8
) -> FastAPI:
    """The application that serves one engine.

    Args:
        engine: Runs every answer, one at a time.
        processor: The model's tokenizer.
        name: What clients call the model.
        api_key: What clients must send as a bearer token; nothing if None.
        max_waiting: Answers that wait beside the one that runs; more get 503.

    Returns:
        It, with the queue as `app.state.answers`.
    """
    queue = AnswerQueue(max_waiting, _context_of(engine), lambda: _count(engine, metrics))
    metrics = ServerMetrics(lambda: queue.num_waiting)
    one, state = OneModel(engine.model, processor, name), OneQueue(queue)
    app = FastAPI(title="foreroute", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.answers = queue
    _handle_errors(app)
    _route_the_rest(app, name, queue, metrics)
    keyed = [Depends(_key_check(api_key))]
    for path, handler, known in (
        ("/v1/chat/completions", Chat(one, state), CHAT),
        ("/v1/completions", Completion(one, state), COMPLETION),
    ):
        app.post(path, dependencies=keyed)(_route(handler, known, path, metrics))

    @app.get("/v1/models", dependencies=keyed)
    def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": started, "owned_by": "foreroute"}
        return {"object": "list", "data": [entry]}

    started = int(time.time())
    return app


def _route_the_rest(app: FastAPI, name: str, queue: AnswerQueue, metrics: ServerMetrics) -> None:
    """What monitors and `transformers chat` ask for."""

    @app.get("/health")
    def health() -> JSONResponse:
        if queue.is_draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/load_model")
    def load_model() -> PlainTextResponse:
        ready = {"status": "ready", "model": name, "cached": True}
        return PlainTextResponse(f"data: {json.dumps(ready)}\n\n", media_type="text/event-stream")


def _route(handler: Any, known: set[str], path: str, metrics: ServerMetrics) -> Any:
    async def answer_request(request: Request) -> Any:
        status = 500
        try:
            response = await _answered(request, handler, known)
            status = response.status_code
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            metrics.requests.labels(path, str(status)).inc()
        return response

    return answer_request


async def _answered(request: Request, handler: Any, known: set[str]) -> Any:
    """Answer one request, unless its client goes away before."""
    body = await _body(request, known)
    answer = Answer(body.get("seed"), body.get("stop", ()))
    CURRENT.set(answer)
    work = asyncio.ensure_future(handler.handle_request(body, str(uuid.uuid4())))
    is_stream = bool(body.get("stream"))
    try:
        while not work.done() or (is_stream and not answer.has_begun.done()):
            if work.done() and work.exception() is not None:
                break
            waits = [work, answer.has_begun]
            await asyncio.wait(
                [future for future in waits if not future.done()], timeout=LOOK_EVERY_S
            )
            if answer.has_begun.done():
                answer.has_begun.result()  # raises if it was refused
            if await request.is_disconnected():
                answer.drop()
                if work.done():
                    break
    finally:
        if not work.done():
            answer.drop()
            work.cancel()
    response = work.result()
    return with_usage(response, body) if isinstance(response, StreamingResponse) else response


async def _body(request: Request, known: set[str]) -> dict[str, Any]:
    try:
        body = await request.json()
        if not isinstance(body, dict):
            raise BadRequest("The request's body must be a JSON object.")
        return checked(body, known)
    except BadRequest as error:
        raise HTTPException(400, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The request's body is not JSON.") from error


def _key_check(api_key: str | None) -> Any:
    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "This server asks for its API key as a bearer token.")

    return check


def _handle_errors(app: FastAPI) -> None:
    """Errors in the form that OpenAI's clients read."""

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        content = {"message": str(error.detail), "type": kind, "code": error.status_code}
        return JSONResponse({"error": content}, error.status_code, headers=error.headers)


def _context_of(engine: Engine) -> int:
    """Tokens of prompt and answer that the model was made for."""
    text = engine.model.config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or NO_LIMIT)


def _count(engine: Engine, metrics: ServerMetrics) -> None:
    metrics.count(engine.stats())
    engine.reset_stats()

"""The HTTP application: endpoints of OpenAI's and Anthropic's APIs on one loaded model.

Every request has passed the Guard, so bodies here are bounded JSON. What goes wrong is an ApiError, told in
the words of the API that was asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from http import HTTPStatus
from time import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

import edgespec
from edgespec.app.engine.completions import CompletionService
from edgespec.app.serve.access_control import Guard
from edgespec.app.serve.apis.chat_completions import chat, complete
from edgespec.app.serve.apis.errors import ApiError, as_api_error, error_body, first_fault
from edgespec.app.serve.apis.messages import CountRequest, MessagesRequest, count, messages
from edgespec.app.serve.apis.responses import ResponsesRequest, respond
from edgespec.app.serve.apis.schemas import Body, ChatRequest, CompletionRequest
from edgespec.app.serve.apis.streaming import Json, Served
from edgespec.app.serve.metrics import Metrics
from edgespec.core import EdgespecError

_ERRORS = {
    400: "The request is wrong.",
    401: "The token is missing or wrong.",
    403: "Host or Origin is not served.",
    404: "There is nothing of that name.",
    405: "Not with this method.",
    413: "The request is too large.",
    415: "The body is not JSON.",
    429: "Too many requests wait: ask again after Retry-After seconds.",
    431: "The headers, or the request's target, are too long.",
    500: "A mistake of the server.",
    503: "The server is stopping, or short of memory.",
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class TokenizeRequest(Body):
    """`special`: control tokens written in `content` count as such."""

    content: str
    add_special: bool = False
    parse_special: bool = False
    with_pieces: bool = False


class DetokenizeRequest(Body):
    tokens: list[int]


_STREAMS: Any = {200: {"description": "The answer.", "content": {"text/event-stream": {}}}}


def make_app(
    service: CompletionService,
    metrics: Metrics,
    names: list[str],
    *,
    token: str | None = None,
    hosts: Iterable[str] = (),
) -> Callable[..., Awaitable[None]]:
    """The ASGI application. `names` are what the model is called, the first of them in answers.

    TCP clients must show `token` and ask for one of `hosts`; clients of a Unix socket need neither.
    """
    app = FastAPI(
        title="Edgespec",
        version=edgespec.__version__,
        docs_url=None,
        redoc_url=None,
        responses={
            status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
            for status, text in _ERRORS.items()
        },
        telemetry=None,
    )
    served = Served(service, names)
    _add_errors(app)
    _add_openai(app, served)
    _add_anthropic(app, served)
    _add_rest(app, served, metrics)
    _describe(app)
    return metrics.counting(Guard(app, token, hosts), {route.path for route in app.routes})  # type: ignore[attr-defined]


def _add_openai(app: FastAPI, served: Served) -> None:
    @app.post("/v1/chat/completions", responses=_STREAMS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat(served, body, request)

    @app.post("/v1/completions", responses=_STREAMS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await complete(served, body, request)

    @app.post("/v1/responses", responses=_STREAMS)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await respond(served, body, request)


def _add_anthropic(app: FastAPI, served: Served) -> None:
    @app.post("/v1/messages", responses=_STREAMS)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        return await messages(served, body, request)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        return await count(served, body, request)


def _add_rest(app: FastAPI, served: Served, metrics: Metrics) -> None:
    service = served.service
    started = int(time())

    def model(name: str) -> dict[str, Any]:
        """One entry that both families of clients can read."""
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "edgespec",
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(started, UTC).isoformat(),
            "context_length": service.context_length,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        names = served.names
        page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        return Json({"object": "list", "data": [model(name) for name in names], **page})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        served.check_model(name)
        return Json(model(name))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        tokens = service.tokenize(body.content, begin=body.add_special, special=body.parse_special)
        if not body.with_pieces:
            return Json({"tokens": tokens})
        pieces = [service.piece(token).decode("utf-8", "replace") for token in tokens]
        return Json({"tokens": [{"id": t, "piece": p} for t, p in zip(tokens, pieces, strict=True)]})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_tokens(body.tokens)
        return Json({"content": service.text_of(body.tokens)})

    @app.get("/health")
    async def health() -> Response:
        load = service.scheduler.load
        return Json(
            {
                "status": "ok",
                "model": served.names[0],
                "running": load.running,
                "waiting": load.waiting,
                "parallel": load.parallel,
            }
        )

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    def told(request: Request, error: ApiError) -> Response:
        body = error_body(error, request.url.path)
        return Json(body, status_code=error.status, headers=error.headers)

    async def fault(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return told(request, first_fault(error.errors(), error.body))

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        where = f"{request.method} {request.url.path[:200]}"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        given = ApiError(error.status_code, f"{phrase}: {where}", kind=kind, headers=error.headers)
        return told(request, given)

    async def other(request: Request, error: Exception) -> Response:
        return told(request, as_api_error(error))

    app.add_exception_handler(RequestValidationError, fault)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ApiError, other)
    app.add_exception_handler(EdgespecError, other)
    app.add_exception_handler(Exception, other)


def _describe(app: FastAPI) -> None:
    """FastAPI's own description says 422 of what is 400 here."""
    made = app.openapi

    def described() -> dict[str, Any]:
        schema = made()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = described  # type: ignore[method-assign]

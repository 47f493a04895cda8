"""The HTTP application: endpoints of OpenAI's and Anthropic's APIs on one loaded model.

Every request has passed the Guard, so that bodies here are JSON of a bounded size. Every error is an ApiError
and is sent in the format of the API that the path belongs to.
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
from edgespec.app.serve.apis import chat_completions, embeddings, llama_cpp, messages, ollama, responses
from edgespec.app.serve.apis.body import Body, UnknownFields
from edgespec.app.serve.apis.errors import ApiError, as_api_error, error_body, first_fault
from edgespec.app.serve.apis.names import ModelNames
from edgespec.app.serve.apis.streaming import Json, Routes, ServedModel
from edgespec.app.serve.metrics import Metrics
from edgespec.app.serve.paths import with_paths
from edgespec.core import EdgespecError

_ERRORS = {
    400: "The request is invalid.",
    401: "The token is missing or wrong.",
    403: "The Host or Origin is not allowed.",
    404: "The path or the model does not exist.",
    405: "The method is not allowed.",
    413: "The request is too large.",
    415: "The body is not JSON.",
    429: "The queue is full: retry after Retry-After seconds.",
    431: "The headers or the request target are too long.",
    500: "Internal error.",
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
_TEXT_ERROR_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


class TokenizeRequest(Body):
    """`/tokenize`. With `parse_special`, control tokens written in `content` become these tokens."""

    content: str
    add_special: bool = False
    parse_special: bool = False
    with_pieces: bool = False


class DetokenizeRequest(Body):
    tokens: list[int]


AddRoutes = Callable[[Routes, ServedModel], None]

APIS: tuple[AddRoutes, ...] = (
    chat_completions.add_routes,
    responses.add_routes,
    messages.add_routes,
    ollama.add_routes,
    llama_cpp.add_routes,
    embeddings.add_routes,
)
"""The APIs that are served. Each registers its endpoints."""


def make_app(
    service: CompletionService,
    metrics: Metrics,
    names: list[str],
    *,
    token: str | None = None,
    hosts: Iterable[str] = (),
    strict: bool = False,
    apis: Iterable[AddRoutes] = APIS,
) -> Callable[..., Awaitable[None]]:
    """Build the ASGI application. The model is served under each of `names`, of which some may be patterns.

    TCP clients have to send `token` and one of `hosts` as Host; clients of a Unix socket need neither.
    `strict`: unknown fields of requests are refused.
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
    served = ServedModel(service, ModelNames(names), UnknownFields(metrics.ignored, strict=strict))
    _add_errors(app)
    for add_routes in apis:
        add_routes(app, served)
    _add_models(app, served)
    _add_tokens(app, served)
    _add_state(app, served, metrics)
    _describe(app)
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    return with_paths(metrics.counting(Guard(app, token, hosts), paths))


def _add_models(app: FastAPI, served: ServedModel) -> None:
    service = served.service
    started = int(time())

    def model(name: str) -> dict[str, Any]:
        """Return one entry, with the fields of OpenAI's and Anthropic's API, of OpenRouter's and vLLM's."""
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "edgespec",
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(started, UTC).isoformat(),
            "context_length": service.context_length,
            "max_model_len": service.context_length,
            "max_input_tokens": service.context_length,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        names = served.names.listed
        page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        return Json({"object": "list", "data": [model(name) for name in names], **page})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        return Json(model(served.check_name(name)))


def _add_tokens(app: FastAPI, served: ServedModel) -> None:
    service = served.service

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        served.check_fields(body, request)
        tokens = service.tokenize(body.content, begin=body.add_special, special=body.parse_special)
        if not body.with_pieces:
            return Json({"tokens": tokens})
        pieces = [service.piece(token).decode("utf-8", "replace") for token in tokens]
        return Json({"tokens": [{"id": t, "piece": p} for t, p in zip(tokens, pieces, strict=True)]})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        served.check_fields(body, request)
        service.check_tokens(body.tokens)
        return Json({"content": service.text_of(body.tokens)})


def _add_state(app: FastAPI, served: ServedModel, metrics: Metrics) -> None:
    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return PlainTextResponse("Edgespec is running")

    @app.get("/health")
    async def health() -> Response:
        load = served.service.scheduler.load
        return Json(
            {
                "status": "ok",
                "model": served.names.listed[0],
                "running": load.running,
                "waiting": load.waiting,
                "parallel": load.parallel,
            }
        )

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    def send(request: Request, error: ApiError) -> Response:
        body = error_body(error, request.url.path)
        return Json(body, status_code=error.status, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return send(request, first_fault(error.errors(), error.body))

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        where = f"{request.method} {request.url.path[:200]}"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        given = ApiError(error.status_code, f"{phrase}: {where}", kind=kind, headers=error.headers)
        return send(request, given)

    async def other(request: Request, error: Exception) -> Response:
        return send(request, as_api_error(error))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ApiError, other)
    app.add_exception_handler(EdgespecError, other)
    app.add_exception_handler(Exception, other)


def _describe(app: FastAPI) -> None:
    """Correct FastAPI's description: invalid requests are 400 here, and Ollama's errors are texts."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    if path.startswith("/api/") and status != "200":
                        response["content"] = {"application/json": {"schema": _TEXT_ERROR_SCHEMA}}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]

"""HTTP around encoded responses: JSON, server-sent events, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from edgespec.app.engine.completions import (
    CompletionService,
    GenerationRequest,
    PreparedRequest,
    ResponseStream,
)
from edgespec.app.serve.apis.body import Body, UnknownFields
from edgespec.app.serve.apis.encoding import Encoder, collect, stream
from edgespec.app.serve.apis.errors import ApiError, dumps
from edgespec.app.serve.apis.names import ModelNames

KEEP_ALIVE_SECONDS = 15.0
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The response.", "content": {"text/event-stream": {}}}
}
"""The OpenAPI description of an endpoint that can stream."""

T = TypeVar("T")
Endpoint = TypeVar("Endpoint", bound=Callable[..., Coroutine[Any, Any, Response]])


class Routes(Protocol):
    """Where an API registers its endpoints: the FastAPI application."""

    def post(
        self, path: str, *, responses: dict[int | str, dict[str, Any]] | None = None
    ) -> Callable[[Endpoint], Endpoint]: ...

    def get(self, path: str) -> Callable[[Endpoint], Endpoint]: ...


class NamedBody(Protocol):
    """The body of an HTTP request that names the model."""

    model: str


class GenerationBody(NamedBody, Protocol):
    """The body of an HTTP request for a generation."""

    stream: bool | None

    def requests(self) -> list[GenerationRequest]:
        """One request for each prompt. Raises ValueError for fields that contradict each other."""


class Json(Response):
    """A JSON response in ASCII characters."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


class ServedModel:
    """The model that the endpoints serve."""

    def __init__(self, service: CompletionService, names: ModelNames, unknown: UnknownFields) -> None:
        self.service, self.names, self._unknown = service, names, unknown

    def check_name(self, name: str) -> str:
        """Return the name to answer with: the first one for "". Raises ApiError for another model."""
        if (found := self.names.resolve(name)) is None:
            known = ", ".join(self.names.listed)
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist here. Available: {known}.",
                param="model",
                code="model_not_found",
            )
        return found

    def check_fields(self, body: Body, request: Request) -> None:
        """Count the unknown fields of `body`. Raises ApiError for the first one if the server is strict."""
        self._unknown.check(body, request.headers.get("user-agent", ""))

    def accept(self, body: NamedBody, request: Request) -> None:
        """Check the fields of `body`, and the name of its model, which is filled in if it is missing."""
        if isinstance(body, Body):
            self.check_fields(body, request)
        body.model = self.check_name(body.model)

    async def respond(
        self,
        body: GenerationBody,
        request: Request,
        encoder: Callable[[Sequence[PreparedRequest]], Encoder],
    ) -> Response:
        """Generate what `body` asks for: a stream of events, or one JSON object."""
        self.accept(body, request)
        prepared = await self.prepare(body.requests, request)
        encoding = encoder(prepared)
        responses = self._submit(prepared, request)
        if body.stream:
            events = stream(responses, encoding)
            if encoding.media_type != EventStream.media_type:
                return LineStream(events, responses, encoding.media_type)
            return EventStream(events, responses)
        try:
            return Json(await while_connected(request, collect(responses, encoding)))
        finally:
            _close(responses)

    async def prepare(
        self, requests: Callable[[], Sequence[GenerationRequest]], request: Request
    ) -> list[PreparedRequest]:
        """Prepare `requests`, unless the client leaves meanwhile. Raises ApiError and EdgespecError."""
        try:
            wanted = requests()
        except ValueError as error:
            raise ApiError(400, f"Invalid request: {error}.", code="invalid_value") from None

        async def prepared() -> list[PreparedRequest]:
            return [await self.service.prepare(one) for one in wanted]

        return await while_connected(request, prepared())

    def _submit(self, prepared: Sequence[PreparedRequest], request: Request) -> list[ResponseStream]:
        """Queue all of `prepared` or none. Raises BusyError."""
        host, number = request.scope.get("client") or ("", 0)
        client = f"{host}:{number}" if host == "unix" else host
        responses: list[ResponseStream] = []
        try:
            for one in prepared:
                responses.append(self.service.submit(one, client))  # noqa: PERF401 - closed below
        except BaseException:
            _close(responses)
            raise
        return responses


class LineStream(StreamingResponse):
    """A stream of lines of `responses`, which are closed with it, whatever ends it."""

    def __init__(
        self, lines: AsyncIterator[bytes], responses: Sequence[ResponseStream], media_type: str
    ) -> None:
        super().__init__(lines, media_type=media_type)
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _close(self._responses)


class EventStream(EventSourceResponse):
    """Server-sent events of `responses`, which are closed with it, whatever ends it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], responses: Sequence[ResponseStream]) -> None:
        super().__init__(
            events,
            sep="\n",
            ping=KEEP_ALIVE_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        )
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _close(self._responses)


def _close(responses: Sequence[ResponseStream]) -> None:
    for response in responses:
        response.close()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`. As soon as the client leaves, it is canceled and ApiError is raised."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(400, "The client disconnected.")  # nobody reads it
        return task.result()
    finally:
        for one in (task, disconnected):
            one.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""How answers leave the server: whole or as a stream of events, and what if the client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgespec.app.engine.completions import (
    CompletionService,
    Finished,
    GenerationRequest,
    PreparedRequest,
    ResponseStream,
)
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import Collected
from edgespec.app.serve.apis.errors import ApiError, as_api_error, dumps

KEEP_ALIVE_SECONDS = 15.0

T = TypeVar("T")
_LOG = logging.getLogger("edgespec")


class Json(Response):
    """A JSON answer in ASCII characters."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


class Served:
    """What the endpoints share: the desk, and the names that the model answers to."""

    def __init__(self, service: CompletionService, names: Sequence[str]) -> None:
        self.service, self.names = service, list(names)

    def check_model(self, name: str) -> None:
        """Raises ApiError for another model: its answers are not to be had here."""
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"The model {name[:200]!r} is not served here; there is: {known}.",
                param="model",
                code="model_not_found",
            )

    async def jobs(
        self, asks: Callable[[], Sequence[GenerationRequest]], request: Request
    ) -> list[PreparedRequest]:
        """`asks` made ready; a client that goes away meanwhile is not waited for."""
        try:
            given = asks()
        except ValueError as error:
            raise ApiError(400, f"Invalid request: {error}.", code="invalid_value") from None

        async def all_() -> list[PreparedRequest]:
            return [await self.service.prepare(ask) for ask in given]

        return await unless_gone(request, all_())

    def submit(self, jobs: Sequence[PreparedRequest], request: Request) -> list[ResponseStream]:
        """Queue all of `jobs` or none. Raises BusyError."""
        host, number = request.scope.get("client") or ("", 0)
        client = f"{host}:{number}" if host == "unix" else host
        answers: list[ResponseStream] = []
        try:
            for job in jobs:
                answers.append(self.service.submit(job, client))  # noqa: PERF401 - what was let in must be known
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        return answers


class Stream(EventSourceResponse):
    """Server-sent events of `answers`, which end with it, whatever ends it."""

    def __init__(self, events: AsyncIterator[bytes], answers: Sequence[ResponseStream]) -> None:
        super().__init__(
            events,
            sep="\n",
            ping=KEEP_ALIVE_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.close()


def event(data: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else dumps(data)}\n\n".encode()


def failure(end: Finished) -> ApiError | None:
    """What an answer's end means if it was not the model's."""
    if end.error is not None:
        error = as_api_error(end.error)
        if error.status == 500:
            _LOG.error("An answer failed.", exc_info=end.error)
        return error
    if end.result.stop_reason == "cancelled":
        return ApiError(503, "The server is stopping.", kind="server_error")
    return None


async def collect(answer: ResponseStream) -> tuple[list[Collected], list[GenerationStats]]:
    """All of one job's answers, which the caller closes. Raises ApiError if one fails."""
    count = answer.job.ask.count
    texts, results = [Collected() for _ in range(count)], [GenerationStats() for _ in range(count)]
    async for news in answer:
        if not isinstance(news, Finished):
            texts[news.index].add(news)
        elif (error := failure(news)) is not None:
            raise error
        else:
            results[news.index] = news.result
    return texts, results


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """`work`'s result. It is cancelled, and ApiError raised, as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(400, "The client went away.")  # nobody reads it
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

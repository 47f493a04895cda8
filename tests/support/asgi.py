"""HTTP requests to an ASGI application in this process, whose clients may leave early."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp, Message

UNIX = ("unix", 1)


class Exchange:
    """A request under way: `status`, `headers` and `body` fill up as the application sends them."""

    def __init__(
        self, app: ASGIApp, method: str, path: str, body: bytes, headers: Mapping[str, str | None],
        client: tuple[str, int],
    ) -> None:  # fmt: skip
        self.status, self.headers, self.body = 0, dict[str, str](), b""
        self._request: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._left, self._changed = asyncio.Event(), asyncio.Event()
        given = {"host": "localhost", "content-type": "application/json", **headers}
        fields = {name: value for name, value in given.items() if value is not None}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            "client": client, "server": None,
        }  # fmt: skip
        self._task = asyncio.ensure_future(app(scope, self._receive, self._send))
        self._task.add_done_callback(lambda _: self._changed.set())

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()

    async def ended(self) -> None:
        """Wait until the application is done. Raises what it raised."""
        await asyncio.wait_for(asyncio.shield(self._task), 10)

    async def received(self, text: bytes) -> None:
        """Wait until the body contains `text`."""
        async with asyncio.timeout(10):
            while text not in self.body:
                assert not self._task.done(), self.body
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        self.leave()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._task

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[str, Any]]:
        """Name and data of each server-sent event; the data is parsed unless it is [DONE]."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in lines:
                data = lines["data"]
                found.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
        return found

    async def _receive(self) -> Message:
        if self._request is not None:
            request, self._request = self._request, None
            return request
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._left.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
        self._changed.set()


@asynccontextmanager
async def opened(
    app: ASGIApp,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str | None] | None = None,
    client: tuple[str, int] = UNIX,
    method: str = "",
) -> AsyncIterator[Exchange]:
    """A request that has been sent; the block may read on, or leave. A header of None is left out."""
    data = b"" if body is None else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    exchange = Exchange(app, method, path, data, headers or {}, client)
    try:
        yield exchange
    finally:
        await exchange.close()


async def fetch(app: ASGIApp, path: str, body: Any = None, **options: Any) -> Exchange:
    """A request and its complete response."""
    async with opened(app, path, body, **options) as exchange:
        await exchange.ended()
    return exchange

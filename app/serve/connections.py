"""uvicorn's HTTP connections, with checks of the peer, a maximum number of connections, and timeouts.

A connection that exceeds a limit is closed without a response, which would cost more than the rejection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgespec.app.serve.apis.errors import ApiError, dumps, error_body
from edgespec.app.serve.sockets import peer_of

REQUEST_SECONDS = 10.0  # from the first byte of a request to the end of its headers
BODY_SECONDS = 60.0  # from there to the end of its body
WRITE_SECONDS = 60.0  # for which a client may leave a response unread
IDLE_SECONDS = 60  # between two requests
_BURST = 32  # connections accepted at once, before the first of them is checked
_RESERVED = 64 + 3 * _BURST  # file descriptors kept for other purposes
UNIX = "unix"  # the client's address on a Unix socket; its port is the process id


class Connection(H11Protocol):
    """One connection. `limit` is the maximum number of connections."""

    limit: ClassVar[int] = 1024
    _deadline: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        socket = transport.get_extra_info("socket")
        peer = peer_of(socket)
        stranger = self.client is None and (peer is None or peer.uid != os.geteuid())
        if stranger or len(self.connections) > self.limit:
            self.transport.abort()
        else:
            if peer is not None:
                self.client = (UNIX, peer.pid)
            self._expect(REQUEST_SECONDS)

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            # Nothing may follow a request before its response: pipelined data would hide that the client
            # disconnects. Some clients end a request with an empty line too many.
            if data.strip(b"\r\n"):
                self.transport.abort()
            return
        if self._deadline is None and (cycle is None or cycle.response_complete):
            self._expect(REQUEST_SECONDS)
        super().data_received(data)
        if self.cycle is not cycle:
            self._expect(BODY_SECONDS)
        if self.cycle is not None and not self.cycle.more_body:
            self._expect(None)

    def send_400_response(self, msg: str) -> None:
        self._expect(None)
        body = dumps(error_body(ApiError(400, msg), "")).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self.transport.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def on_response_complete(self) -> None:
        self._expect(None)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None
        super().resume_writing()

    def _expect(self, seconds: float | None) -> None:
        """Close the connection unless this is called again within `seconds`."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn's server, which calls `stopping` before it waits for the responses under way."""

    def __init__(self, config: uvicorn.Config, stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(4096)  # the length of the accept queue, for which asyncio uses _BURST too

    async def shutdown(self, sockets: Any = None) -> None:
        self._stopping()
        await super().shutdown(sockets)


def make_server(
    app: Callable[..., Awaitable[None]], stopping: Callable[[], None], most: int = 2048
) -> Server:
    """Build a server of `app` for `most` connections, or as many as there are file descriptors for."""
    # Any client could fill the log with invalid requests.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    Connection.limit = min(most, _descriptors() - _RESERVED)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # no proxy is trusted to name the client
        backlog=_BURST,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return Server(config, stopping)


def _descriptors() -> int:
    """Return how many file descriptors this process may open, after raising the limit as far as allowed."""
    try:
        import resource
    except ImportError:
        return 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 8192 if soft == resource.RLIM_INFINITY else soft

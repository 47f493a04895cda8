"""The checks that every request passes first: client, host, origin, token, and the size of what it sends.

A web page that the user visits can make the browser send requests to this server, also under a host name that
the owner of the page resolves to this machine (DNS rebinding). Over TCP, therefore, the Host has to be one of
this server's names, other origins are rejected, and the token, which a page does not know, is required. Over
the Unix socket the operating system identifies the client.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgespec.app.serve.apis.errors import ApiError, dumps, error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 8_000_000  # bytes of one request
MAX_BODIES = 64_000_000  # bytes of all requests in memory
MAX_HEAD = 32_768  # bytes of the headers, and of the request target
_UNIX = "unix"
_DRAIN_SECONDS = 3.0
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware. TCP clients have to send `token`; without one all of them are rejected."""

    def __init__(self, app: ASGIApp, token: str | None = None, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._token = token.encode() if token else None
        self._hosts = {*_LOCAL, *(host.lower() for host in hosts)}
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # web sockets are not supported
            return
        size = 0
        try:
            headers = _single(scope)
            self._check_sender(scope, headers)
            body = await self._read(scope, headers, receive)
            size = len(body)
            _check_json(body)
        except ApiError as error:
            self._held -= size
            await _reject(error, scope["path"], send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        if "content-type" not in headers:
            scope = {**scope, "headers": [*scope["headers"], (b"content-type", b"application/json")]}
        try:
            await self._app(scope, replay, send)
        finally:
            self._held -= size

    def _check_sender(self, scope: Scope, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if (scope.get("client") or ("",))[0] == _UNIX:
            if origin is not None:
                raise _forbidden(f"Requests from web pages are not allowed (Origin {_shown(origin)}).")
            return
        host = headers.get("host", "")
        here = scope.get("server") or ("",)
        if _name(host) not in self._hosts and _name(host) != str(here[0]).lower():
            raise _forbidden(
                f"The host {_shown(host)} is not allowed: "
                "use localhost, or start the server with --host-name for another name."
            )
        if origin is not None and origin.lower() != f"http://{host.lower()}":
            raise _forbidden(f"Requests from other origins are not allowed (Origin {_shown(origin)}).")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise _forbidden("Requests from other sites are not allowed.")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")  # Anthropic's clients
        received = given.strip().encode("utf-8", "replace")
        if self._token is None or not hmac.compare_digest(received, self._token):
            raise ApiError(
                401,
                "The token is missing or wrong: send the content of the token file, "
                "which `edgespec serve` prints the path of, as the API key.",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes:
        """Read the whole body. Its size is added to `_held`."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > MAX_BODY:
            if (
                headers.get("expect", "").lower() != "100-continue"
            ):  # such a client waits before it sends the body
                await _drain(receive)
            raise _too_large()
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "The request ended early.")
                part = message.get("body", b"")
                size += len(part)
                self._held += len(part)
                parts.append(part)
                if size > MAX_BODY:
                    parts.clear()
                    await _drain(receive)
                    raise _too_large()
                if self._held > MAX_BODIES:
                    wait = {"retry-after": "2"}
                    raise ApiError(503, "Too many large requests at once.", kind="server_error", headers=wait)
                if not message.get("more_body"):
                    break
            typed = headers.get("content-type")  # some clients leave it out
            if (
                size
                and scope["method"] == "POST"
                and typed is not None
                and _media(typed) != "application/json"
            ):
                raise ApiError(415, "Send JSON, with the header Content-Type: application/json.")
        except BaseException:
            self._held -= size
            raise
        return b"".join(parts)


def own_names() -> set[str]:
    """Return the host names of this machine on its network."""
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"}


def _single(scope: Scope) -> dict[str, str]:
    """Return the headers by name.

    Raises ApiError if they are too long, or if one that the checks depend on occurs twice: parsers could
    differ in which they use.
    """
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
        raise ApiError(431, f"The headers are longer than {MAX_HEAD:,} bytes.")
    if len(scope.get("raw_path", b"")) + len(scope.get("query_string", b"")) > MAX_HEAD:
        raise ApiError(431, f"The request target is longer than {MAX_HEAD:,} bytes.")
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in found and name in ("host", "origin", "authorization", "x-api-key", "content-type"):
            raise ApiError(400, f"The header {name} occurs twice.")
        found[name] = value.decode("latin-1")
    if not scope["path"].startswith("/"):
        raise ApiError(400, "The request target must be a path.")
    if scope.get("http_version") not in ("1.0", "1.1"):
        raise ApiError(400, "Only HTTP/1.0 and HTTP/1.1 are supported.")
    if "transfer-encoding" in found and "content-length" in found:
        raise ApiError(400, "The request has both Content-Length and Transfer-Encoding.")
    return found


def _check_json(body: bytes) -> None:
    """Reject a body that is not JSON, before any slower or recursive parser reads it.

    This parser stops at 200 levels and accepts neither NaN nor lone surrogates.
    """
    from pydantic_core import from_json

    if not body:
        return
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None


async def _drain(receive: Receive) -> None:
    """Read on for a while: a client that still sends when the connection closes may lose the response."""
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        pass


async def _reject(error: ApiError, path: str, send: Send) -> None:
    body = dumps(error_body(error, path)).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    start: dict[str, Any] = {"type": "http.response.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _name(host: str) -> str:
    """Return the name in a Host header, without the port."""
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name.lower() if bracket and (not rest or (rest[1:].isdigit() and rest[0] == ":")) else ""
    name, colon, port = host.partition(":")
    return "" if colon and not port.isdigit() else name.lower().removesuffix(".")


def _media(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _shown(value: str) -> str:
    return repr(value[:100])


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, kind="permission_error", code="forbidden")


def _too_large() -> ApiError:
    return ApiError(413, f"The request is larger than {MAX_BODY:,} bytes.", code="request_too_large")

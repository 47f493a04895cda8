"""Paths as clients spell them: without /v1, with it twice, with a slash at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_SHORT = {
    f"/{name}": f"/v1/{name}"
    for name in (
        "chat/completions", "completions", "embeddings", "messages", "messages/count_tokens", "models",
        "rerank", "responses",
    )
}  # fmt: skip
_OTHERS = {
    "/v1/reranking": "/v1/rerank",
    "/reranking": "/v1/rerank",
    "/v1/health": "/health",
    "/embedding": "/v1/embeddings",
}


def spelled_out(path: str) -> str:
    """Return the path of the endpoint that is meant by `path`."""
    path = path.rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    if path.startswith("/models/"):
        return f"/v1{path}"
    return _SHORT.get(path) or _OTHERS.get(path, path)


def with_paths(app: ASGIApp) -> ASGIApp:
    """Wrap `app`, whose endpoints are then found under other spellings of their paths, too."""

    async def renamed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": spelled_out(scope["path"])}
        await app(scope, receive, send)

    return renamed

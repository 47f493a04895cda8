"""Embeddings and rankings, which no model that is served here gives: a clear error for each API."""

from __future__ import annotations

from typing import Any, ClassVar

from starlette.responses import Response

from edgespec.app.serve.apis.body import Body
from edgespec.app.serve.apis.errors import ApiError
from edgespec.app.serve.apis.streaming import Routes, ServedModel


def add_routes(app: Routes, served: ServedModel) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest) -> Response:
        raise refusal(served.check_name(body.model), "embeddings")

    @app.post("/v1/rerank")
    async def rerank(body: EmbeddingsRequest) -> Response:
        raise refusal(served.check_name(body.model), "rankings")


class EmbeddingsRequest(Body):
    """Any request for embeddings or a ranking."""

    counts_unknown: ClassVar[bool] = False

    model: str = ""
    input: Any = None


def refusal(model: str, what: str) -> ApiError:
    return ApiError(
        400,
        f"The model {model[:200]!r} gives no {what}, it generates text: use a model for {what}.",
        param="model",
        code="unsupported_model",
    )

"""The server against its own description: no request gets a 5xx or an undocumented response."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as openapi_checks
from serving import MODEL, Running, running

CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
PATHS = {
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "POST /v1/messages",
    "POST /v1/messages/count_tokens", "GET /v1/models", "GET /v1/models/{name}", "POST /tokenize",
    "POST /detokenize", "GET /health", "GET /metrics", "POST /completion", "POST /infill",
    "POST /v1/embeddings", "POST /v1/rerank", "POST /api/chat", "POST /api/generate", "POST /api/show",
    "POST /api/embed", "POST /api/embeddings", "GET /api/tags", "GET /api/ps", "GET /api/version",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # A small context, so that generations without a limit end soon.
    with running(tmp_path_factory.mktemp("schema"), "--draft", "none", "--context", "160") as one:
        yield one


@pytest.fixture(scope="module")
def described(server: Running) -> Any:
    with server.client() as client:
        return client.get("/openapi.json").json()


def test_every_endpoint_is_described(described: Any) -> None:
    found = {f"{method.upper()} {path}" for path, methods in described["paths"].items() for method in methods}
    assert found == PATHS
    for methods in described["paths"].values():
        for operation in methods.values():
            assert {"200", "400", "401", "403", "404", "429"} <= set(operation["responses"])
            assert "422" not in operation["responses"]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
@pytest.mark.parametrize("path", sorted(PATHS))
def test_nothing_that_is_not_described(
    path: str, mode: GenerationMode, server: Running, described: Any
) -> None:
    method, _, name = path.partition(" ")
    schema = schemathesis.openapi.from_dict(described)
    schema.config.update(base_url=f"http://127.0.0.1:{server.port}")
    operation = schema[name][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        return  # nothing in it can be wrong

    @settings(
        max_examples=12, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL  # else the response is 404
        case.call_and_validate(headers={"authorization": f"Bearer {server.token}"}, checks=CHECKS, timeout=60)

    check()
    assert server.health()["status"] == "ok"

"""What the server accepts that no specification lists: unknown fields, nulls, -1, names of models."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from asgi import fetch
from fake_service import MODEL, FakeScheduler, fake_app

from edgespec.app.serve.apis.names import ModelNames
from edgespec.models.sampling_defaults import as_metadata, sampling_defaults

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HI: Any = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    MESSAGES: {"messages": HI, "max_tokens": 5},
    RESPONSES: {"input": "hi"},
    "/v1/completions": {"prompt": "hi"},
}
DEEP = {
    CHAT: ({"messages": [{**HI[0], "flavor": 1}]}, "messages[0].flavor"),
    MESSAGES: (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "flavor": 1}]}]},
        "messages[0].content[0].flavor",
    ),
    RESPONSES: ({"input": [{"role": "user", "content": "hi", "flavor": 1}]}, "input[0].flavor"),
    "/v1/completions": ({"stream_options": {"flavor": 1}, "stream": True}, "stream_options.flavor"),
}


@pytest.mark.parametrize("path", BODIES)
async def test_unknown_fields_are_counted_and_reported_once(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, place = DEEP[path]
    body, agent = BODIES[path] | {"novelty": {"a": 1}} | change, {"user-agent": "some-agent/1.2"}
    with caplog.at_level(logging.WARNING, "edgespec"), fake_app(FakeScheduler()) as app:
        for headers in (agent, agent, {"user-agent": "Other/Python 3"}):
            assert (await fetch(app, path, body, headers=headers)).status == 200
        metrics = (await fetch(app, "/metrics")).body.decode()
    field = place.replace("[0]", "[]")
    assert 'edgespec_ignored_fields_total{field="novelty"} 3.0' in metrics
    assert f'edgespec_ignored_fields_total{{field="{field}"}} 3.0' in metrics
    assert sorted(caplog.messages) == sorted(
        f"edgespec: ignored the unknown field {one} of {client}"
        for one in ("novelty", field)
        for client in ("some-agent", "Other/Python")
    )


@pytest.mark.parametrize("path", BODIES)
async def test_a_strict_server_refuses_unknown_fields(path: str) -> None:
    change, place = DEEP[path]
    with fake_app(FakeScheduler(), strict=True) as app:
        plain = await fetch(app, path, BODIES[path])
        error = (await fetch(app, path, BODIES[path] | change)).json()["error"]
    assert plain.status == 200
    assert error["message"] == f"Unrecognized request argument supplied: {place}"
    assert error.get("code", "unknown_parameter") == "unknown_parameter"


async def test_the_names_of_unknown_fields_cannot_fill_the_metrics() -> None:
    with fake_app(FakeScheduler()) as app:
        for i in range(3):
            body = BODIES[CHAT] | {f"x{i}-{n}": 1 for n in range(150)}
            assert (await fetch(app, CHAT, body)).status == 200
        metrics = (await fetch(app, "/metrics")).body.decode()
    assert metrics.count("edgespec_ignored_fields_total{") <= 201
    assert 'edgespec_ignored_fields_total{field="other"} 250.0' in metrics


@pytest.mark.parametrize("path", BODIES)
async def test_null_is_absent(path: str) -> None:
    names = ("temperature", "tools", "tool_choice", "functions", "function_call", "reasoning_effort", "audio")
    nulls = dict.fromkeys((*names, "verbosity", "web_search_options", "seed", "stop", "model", "metadata"))
    scheduler = FakeScheduler()
    with fake_app(scheduler, strict=True) as app:
        answer = await fetch(app, path, BODIES[path] | nulls)
    assert answer.status == 200, answer.body
    assert answer.json()["model"] == MODEL


async def test_minus_one_is_no_bound() -> None:
    scheduler = FakeScheduler()
    with fake_app(scheduler) as app:
        await fetch(app, CHAT, BODIES[CHAT] | {"max_tokens": -1, "top_k": -1, "seed": -1})
        await fetch(app, MESSAGES, BODIES[MESSAGES] | {"top_k": -1})
        await fetch(app, RESPONSES, BODIES[RESPONSES] | {"max_output_tokens": -1})
        refused = await fetch(app, CHAT, BODIES[CHAT] | {"max_tokens": -2})
    assert [one.max_tokens for one in scheduler.requests] == [0, 5, 0]
    assert all(one.sampling.top_k == 0 and one.sampling.seed is None for one in scheduler.requests)
    assert (refused.status, refused.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("name", "answered"),
    [
        ("", "a-1.5b"),
        ("a-1.5b", "a-1.5b"),
        ("second", "second"),
        ("a:1.5b", "a:1.5b"),
        ("a:1.5B", "a:1.5B"),
        ("a-1.5b:latest", "a-1.5b:latest"),
        ("claude-haiku-4-5", "claude-haiku-4-5"),
        ("gpt-5.4", "gpt-5.4"),
        ("local/any", "local/any"),
        ("gpt-4o", None),
        ("a", None),
        ("claude", None),
        ("*", None),
    ],
)
def test_names_of_the_model(name: str, answered: str | None) -> None:
    assert ModelNames(["a-1.5b", "second", "local/*"]).resolve(name) == answered


async def test_another_model_is_not_found_and_the_served_names_are_reported() -> None:
    with fake_app(FakeScheduler()) as app:
        for path, body in BODIES.items():
            answer = await fetch(app, path, body | {"model": "gpt-4o"})
            assert answer.status == 404
            assert f"{MODEL}, other" in answer.json()["error"]["message"]
        (first, *_) = (await fetch(app, "/v1/models")).json()["data"]
    assert (first["id"], first["context_length"], first["max_model_len"]) == (MODEL, 256, 256)


def test_sampling_defaults_of_a_model() -> None:
    prefix = "general.sampling"
    given = {f"{prefix}.temp": 0.7, f"{prefix}.top_k": 20, f"{prefix}.top_p": 0.8, f"{prefix}.min_p": 2.0}
    assert sampling_defaults(given) == {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    broken = {f"{prefix}.temp": float("nan"), f"{prefix}.top_k": -5, f"{prefix}.top_p": True}
    assert sampling_defaults(broken | {f"{prefix}.penalty_repeat": "x"}) == {}
    config = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "bos_token_id": 1}
    found = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    assert sampling_defaults(as_metadata(config)) == found
    assert sampling_defaults(as_metadata(config | {"do_sample": False})) == found | {"temperature": 0.0}


async def test_sampling_defaults_apply_to_what_a_request_leaves_open() -> None:
    scheduler = FakeScheduler()
    scheduler.engine.model.metadata = {"general.sampling.temp": 0.3, "general.sampling.top_k": 7}
    with fake_app(scheduler) as app:
        for path, body in BODIES.items():
            await fetch(app, path, body)
            await fetch(app, path, body | {"temperature": 0.9})
    assert [one.sampling.temperature for one in scheduler.requests] == [0.3, 0.9] * len(BODIES)
    assert {one.sampling.top_k for one in scheduler.requests} == {7}

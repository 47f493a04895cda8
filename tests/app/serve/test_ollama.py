"""Ollama's API, on scripted responses and by Ollama's own rules."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi import Exchange, fetch
from fake_service import MODEL, FakeScheduler, fake_app

from edgespec.core import EdgespecError

HI: Any = {"role": "user", "content": "hi"}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def lines(answer: Exchange) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.body.decode().splitlines()]


async def test_a_chat_is_a_stream_unless_it_is_not() -> None:
    with fake_app(FakeScheduler(["hello", " world"])) as app:
        whole = (await fetch(app, "/api/chat", {"messages": [HI], "stream": False})).json()
        parts = lines(await fetch(app, "/api/chat", {"model": MODEL, "messages": [HI]}))
    assert whole["message"] == {"role": "assistant", "content": "hello world"}
    assert (whole["model"], whole["done"], whole["done_reason"]) == (MODEL, True, "stop")
    assert (whole["prompt_eval_count"], whole["eval_count"]) == (2, 3)
    assert [part["message"]["content"] for part in parts] == ["hello", " world", ""]
    assert [part["done"] for part in parts] == [False, False, True]
    assert {name: type(value) for name, value in parts[-1].items()} == {
        name: type(value) for name, value in whole.items()
    }


async def test_generate() -> None:
    scheduler = FakeScheduler(["hello", " world", "length"])
    with fake_app(scheduler, strict=True) as app:
        body = {"prompt": "hi", "system": "S", "keep_alive": "5m", "context": [1], "options": {"num_ctx": 9}}
        whole = (await fetch(app, "/api/generate", body | {"stream": False})).json()
        parts = lines(await fetch(app, "/api/generate", body))
        raw = await fetch(app, "/api/generate", {"prompt": "hi", "raw": True, "stream": False})
    assert (whole["response"], whole["done_reason"]) == ("hello world", "length")
    assert [part["response"] for part in parts] == ["hello", " world", ""]
    assert raw.json()["response"] == "hello world"
    assert [asked[0] for asked in scheduler.engine.asked] == [[{"role": "system", "content": "S"}, HI]] * 2


async def test_calls_are_objects() -> None:
    with fake_app(FakeScheduler([CALL + "\n" + CALL])) as app:
        body = {"messages": [HI], "tools": [TOOL]}
        whole = (await fetch(app, "/api/chat", body | {"stream": False})).json()
        parts = lines(await fetch(app, "/api/chat", body))
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    assert whole["message"]["tool_calls"] == [call, call]
    assert [part["message"].get("tool_calls") for part in parts] == [[call], [call], None]


async def test_results_come_in_the_order_of_the_calls() -> None:
    calls = [{"function": {"name": "f", "arguments": {"n": n}}} for n in range(2)]
    results = [{"role": "tool", "content": f"R{n}", "tool_name": "f"} for n in range(2)]
    scheduler = FakeScheduler()
    messages = [HI, {"role": "assistant", "tool_calls": calls, "thinking": "T"}, *results]
    with fake_app(scheduler, strict=True) as app:
        assert (await fetch(app, "/api/chat", {"messages": messages})).status == 200
    (_, answer, *found) = scheduler.engine.asked[0][0]
    assert answer["reasoning_content"] == "T"
    assert [one["tool_call_id"] for one in found] == [call["id"] for call in answer["tool_calls"]]


async def test_options_and_defaults() -> None:
    scheduler = FakeScheduler()
    options = {
        "num_predict": 7, "temperature": 0.1, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.2,
        "seed": 5, "stop": ["x"], "presence_penalty": 1.0, "frequency_penalty": 0.5, "mirostat": 0,
    }  # fmt: skip
    begun = {"role": "assistant", "content": "I"}
    with fake_app(scheduler, strict=True) as app:
        body = {"messages": [HI, begun], "options": options, "think": False}
        assert (await fetch(app, "/api/chat", body)).status == 200
        open_: Any = {"num_predict": -1, "seed": -1, "top_k": -1}
        await fetch(app, "/api/chat", {"messages": [HI], "options": open_, "format": "json", "think": "low"})
    given, default = scheduler.requests
    s = given.sampling
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed) == (
        0.1,
        3,
        0.5,
        0.1,
        1.2,
        5,
    )
    assert (given.max_tokens, list(given.stops), s.presence_penalty, s.frequency_penalty) == (
        7,
        ["x"],
        1.0,
        0.5,
    )
    assert scheduler.engine.asked[0][2:] == ({"enable_thinking": False, "thinking": False}, True)
    assert scheduler.engine.asked[1][2:] == ({"reasoning_effort": "low"}, False)
    s = default.sampling
    assert (s.temperature, s.top_k, s.top_p, s.seed, default.max_tokens) == (0.8, 40, 0.9, None, 0)
    assert default.constraint is not None


async def test_a_format_is_a_schema() -> None:
    scheduler = FakeScheduler(['{"a": true}'])
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    with fake_app(scheduler) as app:
        answer = await fetch(app, "/api/chat", {"messages": [HI], "format": schema, "stream": False})
    assert json.loads(answer.json()["message"]["content"]) == {"a": True}
    assert scheduler.requests[0].constraint is not None


@pytest.mark.parametrize(
    ("path", "body"), [("/api/chat", {"messages": []}), ("/api/generate", {"prompt": ""})]
)
async def test_a_request_without_a_prompt_loads_the_model(path: str, body: dict[str, Any]) -> None:
    scheduler = FakeScheduler()
    with fake_app(scheduler) as app:
        answer = (await fetch(app, path, body)).json()
    assert (answer["done"], answer["done_reason"], scheduler.requests) == (True, "load", [])


async def test_what_is_served() -> None:
    with fake_app(FakeScheduler()) as app:
        (first, second) = (await fetch(app, "/api/tags")).json()["models"]
        (running,) = (await fetch(app, "/api/ps")).json()["models"]
        shown = (await fetch(app, "/api/show", {"model": f"{MODEL}:latest"})).json()
        version = (await fetch(app, "/api/version")).json()["version"]
        root = await fetch(app, "/")
    assert (first["model"], second["model"], running["name"]) == (MODEL, "other", MODEL)
    assert shown["model_info"]["fake.context_length"] == 256
    assert shown["capabilities"] == ["completion", "tools"]
    assert version
    assert (root.status, root.body) == (200, b"Edgespec is running")


ERRORS: list[tuple[str, dict[str, Any], int, str]] = [
    ("/api/chat", {"model": "gpt", "messages": [HI]}, 404, "'gpt' does not exist here"),
    ("/api/show", {"model": "gpt"}, 404, "'gpt' does not exist here"),
    ("/api/embed", {"input": "x"}, 400, "gives no embeddings"),
    ("/api/embeddings", {"prompt": "x"}, 400, "gives no embeddings"),
    ("/api/chat", {"messages": [{**HI, "images": ["x"]}]}, 400, "messages[0].images"),
    ("/api/generate", {"prompt": "x", "images": ["x"]}, 400, "images"),
    ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "no tokens to fill in the middle"),
    ("/api/chat", {"messages": 5}, 400, "messages"),
    ("/api/pull", {"model": "x"}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), ERRORS, ids=lambda value: str(value)[:40])
async def test_errors_are_texts(path: str, body: dict[str, Any], status: int, text: str) -> None:
    with fake_app(FakeScheduler()) as app:
        answer = await fetch(app, path, body)
    assert answer.status == status
    assert list(answer.json()) == ["error"]
    assert text in answer.json()["error"]


async def test_an_error_ends_a_stream() -> None:
    with fake_app(FakeScheduler(["hello", EdgespecError("It broke.")])) as app:
        parts = lines(await fetch(app, "/api/chat", {"messages": [HI]}))
    assert parts[1] == {"error": "It broke."}

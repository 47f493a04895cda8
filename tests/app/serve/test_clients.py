"""Requests in the form that real programs send: each is answered in the form that its API has.

clients.json has the fields that agents, editors and libraries were seen to send, with texts of our own, a few
of their tools, and the status of the answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from asgi import Exchange, fetch
from fake_service import MODEL, FakeScheduler, fake_app

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("clients.json").read_text("utf-8"))
SAID = "Well said."


def served(value: Any) -> Any:
    """`value` with the name of the model that is served here."""
    if isinstance(value, dict):
        return {name: served(one) for name, one in value.items()}
    if isinstance(value, list):
        return [served(one) for one in value]
    return MODEL if value == "MODEL" else value


def schema_of(body: dict[str, Any]) -> dict[str, Any] | None:
    """The schema that the answer has to keep to, in any of the APIs."""
    given = body.get("response_format") or (body.get("text") or {}).get("format") or {}
    if isinstance(body.get("format"), dict):
        return dict(body["format"])
    if given.get("type") == "json_object":
        return dict(given.get("schema") or {"type": "object"})
    inner = given.get("json_schema", given)
    return dict(inner["schema"]) if given.get("type") == "json_schema" else None


def instance(schema: dict[str, Any]) -> Any:
    """A small value of a schema."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "string")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: instance(properties[name]) for name in properties}
    values: dict[str, Any] = {"string": "ab", "integer": 1, "number": 1, "boolean": True, "array": []}
    return values[kind[0] if isinstance(kind, list) else kind]


def scheduler_of(text: str) -> FakeScheduler:
    """A scheduler that answers `text`, with the tokens for filling in the middle."""
    scheduler = FakeScheduler([text], context=60_000)
    names = {1: "<|fim_prefix|>", 2: "<|fim_suffix|>", 3: "<|fim_middle|>"}
    model = scheduler.engine.model
    model.metadata = dict(
        zip((f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid")), names, strict=True)
    )
    usual = model.vocab.text
    model.vocab.text = lambda token: names.get(token) or usual(token)
    return scheduler


async def exchanged(case: dict[str, Any], text: str) -> tuple[Exchange, FakeScheduler]:
    scheduler = scheduler_of(text)
    with fake_app(scheduler) as app:
        answer = await fetch(app, case["path"].partition("?")[0], served(case["body"]))
    return answer, scheduler


def messages(answer: Exchange, stream: bool) -> tuple[str, list[str]]:
    """Text and names of calls of Anthropic's API."""
    if stream:
        events = answer.events()
        assert events[0][0] == "message_start"
        assert events[-1][0] == "message_stop"
        assert all(name == data["type"] for name, data in events)
        (end,) = [data for name, data in events if name == "message_delta"]
        assert end["delta"]["stop_reason"]
        blocks = [data["content_block"] for name, data in events if name == "content_block_start"]
        deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
        text = "".join(one.get("text", "") for one in deltas)
    else:
        whole = answer.json()
        assert (whole["type"], bool(whole["stop_reason"])) == ("message", True)
        blocks = whole["content"]
        text = "".join(block.get("text", "") for block in blocks)
    return text, [block["name"] for block in blocks if block["type"] == "tool_use"]


def chat(answer: Exchange, stream: bool) -> tuple[str, list[str]]:
    """Text and names of calls of OpenAI's chat completions."""
    if not stream:
        whole = answer.json()
        (choice,) = whole["choices"]
        assert (whole["object"], bool(choice["finish_reason"])) == ("chat.completion", True)
        parts = [choice["message"]]
    else:
        events = [data for _, data in answer.events()]
        assert events[-1] == "[DONE]"
        assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
        choices = [choice for event in events[:-1] for choice in event["choices"]]
        assert len([choice for choice in choices if choice["finish_reason"]]) == 1
        parts = [choice["delta"] for choice in choices]
    calls = [call["function"].get("name") for part in parts for call in part.get("tool_calls") or []]
    return "".join(part.get("content") or "" for part in parts), [name for name in calls if name]


def responses(answer: Exchange, stream: bool) -> tuple[str, list[str]]:
    """Text and names of calls of OpenAI's Responses API."""
    whole = answer.events()[-1][1]["response"] if stream else answer.json()
    if stream:
        assert answer.events()[0][0] == "response.created"
    assert (whole["object"], whole["status"]) == ("response", "completed")
    parts = [part for item in whole["output"] for part in item.get("content", ())]
    calls = [item["name"] for item in whole["output"] if item["type"] == "function_call"]
    return "".join(part["text"] for part in parts), calls


def ollama(answer: Exchange, stream: bool) -> tuple[str, list[str]]:
    """Text and names of calls of Ollama's API."""
    assert not stream
    whole = answer.json()
    assert whole["done"] is True
    message = whole.get("message", {"content": whole.get("response")})
    return message["content"], [call["function"]["name"] for call in message.get("tool_calls", ())]


def native(answer: Exchange, stream: bool) -> tuple[str, list[str]]:
    """Text of llama.cpp's endpoints."""
    if not stream:
        return answer.json().get("content", ""), []
    events = [data for _, data in answer.events()]
    assert [event["stop"] for event in events] == [*[False] * (len(events) - 1), True]
    return "".join(event["content"] for event in events), []


def texts(answer: Exchange, stream: bool) -> tuple[str, list[str]]:
    """Text of OpenAI's older completions."""
    assert not stream
    whole = answer.json()
    assert whole["object"] == "text_completion"
    return whole["choices"][0]["text"], []


READERS = {
    "/v1/messages": messages,
    "/v1/chat/completions": chat,
    "/chat/completions": chat,
    "/v1/responses": responses,
    "/api/chat": ollama,
    "/api/generate": ollama,
    "/infill": native,
    "/completion": native,
    "/v1/completions": texts,
}


def read(case: dict[str, Any], answer: Exchange) -> tuple[str, list[str]]:
    assert answer.status == 200, answer.body
    return READERS[case["path"].partition("?")[0]](answer, bool(case["body"].get("stream")))


ANSWERED = [
    pytest.param(case, id=case["case"])
    for case in CASES
    if case["status"] == 200 and case["path"].partition("?")[0] in READERS
]
WITH_TOOLS = [one for one in ANSWERED if one.values[0]["body"].get("tools")]


@pytest.mark.parametrize("case", ANSWERED)
async def test_the_answer_is_a_text(case: dict[str, Any]) -> None:
    body, schema = case["body"], schema_of(case["body"])
    text = SAID if schema is None else json.dumps(instance(schema))
    answer, scheduler = await exchanged(case, text)
    found, calls = read(case, answer)
    silent = body.get("n_predict") == 0
    assert found == ("" if silent else f"{body['prompt'] if body.get('echo') else ''}{text}")
    assert calls == []
    if schema is not None:
        (request,) = scheduler.requests
        assert request.constraint is not None
        vocab, state = scheduler.engine.model.vocab, request.constraint()
        tokens = [*vocab.tokenize(text), vocab.eos]
        assert state.admits(tokens) == len(tokens)
        assert state.admits(vocab.tokenize("Well")) == 0


@pytest.mark.parametrize("case", WITH_TOOLS)
async def test_the_answer_is_a_call(case: dict[str, Any]) -> None:
    _, scheduler = await exchanged(case, SAID)
    offered = scheduler.engine.asked[0][1]
    if not offered:
        assert all(tool.get("type") not in (None, "function", "custom") for tool in case["body"]["tools"])
        return
    function = offered[0]["function"]
    call = json.dumps({"name": function["name"], "arguments": instance(function["parameters"])})
    answer, scheduler = await exchanged(case, f"<tool_call>\n{call}\n</tool_call>")
    text, calls = read(case, answer)
    assert (text, calls) == ("", [function["name"]])


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["status"] != 200], ids=lambda case: case["case"]
)
async def test_what_cannot_be_given_is_a_clear_error(case: dict[str, Any]) -> None:
    answer, _ = await exchanged(case, SAID)
    assert answer.status == case["status"]
    error = answer.json()["error"]
    message = error if case["path"].startswith("/api/") else error["message"]
    assert MODEL in message


async def test_the_rest() -> None:
    (show,) = [case for case in CASES if case["path"] == "/api/show"]
    (count,) = [case for case in CASES if case["path"].endswith("count_tokens")]
    assert (await exchanged(show, SAID))[0].json()["details"]["family"] == "fake"
    assert (await exchanged(count, SAID))[0].json()["input_tokens"] > 0
    read_here = {*READERS, show["path"], count["path"], "/v1/embeddings", "/api/embed"}
    assert {case["path"].partition("?")[0] for case in CASES} == read_here

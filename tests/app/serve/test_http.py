"""Chat completions over HTTP, without a model: a scripted scheduler behind the real service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from asgi import Exchange, fetch, opened
from fake_service import MODEL, TOKEN, FakeScheduler, fake_app

from edgespec.core import EdgespecError

CHAT = "/v1/chat/completions"
CALL = ["see\n<tool_call>\n", '{"name": "f", "arguments": {"a', '": 1}}\n</tool_call>']
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def question(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}


async def ask(scheduler: FakeScheduler, **more: Any) -> Exchange:
    with fake_app(scheduler) as app:
        return await fetch(app, CHAT, question(**more))


def deltas(answer: Exchange, index: int = 0) -> list[dict[str, Any]]:
    chunks = [data for _, data in answer.events() if data != "[DONE]"]
    return [one["delta"] for chunk in chunks for one in chunk.get("choices", ()) if one["index"] == index]


async def test_whole() -> None:
    scheduler = FakeScheduler(["hello", " world"])
    answer = await ask(scheduler)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    message = {"role": "assistant", "content": "hello world", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [choice]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == len(scheduler.engine.model.vocab.tokenize("hello world"))
    assert body["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 3
    assert body["usage"]["speculation"]["rounds"] == 2


async def test_streamed() -> None:
    answer = await ask(FakeScheduler(["hello", " world"]), stream=True)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    first = answer.events()[0][1]
    head = json.dumps({key: first[key] for key in ("id", "object", "created", "model")})[:-1]
    parts = [
        '{"role":"assistant","content":"","refusal":null}',
        '{"content":"hello"}',
        '{"content":" world"}',
    ]
    tail = [f'"delta":{part},"logprobs":null,"finish_reason":null' for part in parts]
    tail.append('"delta":{},"logprobs":null,"finish_reason":"stop"')
    head = head.replace(", ", ",").replace(": ", ":")
    expected = [f'data: {head},"choices":[{{"index":0,{one}}}]}}\n\n' for one in tail]
    assert answer.body.decode() == "".join([*expected, "data: [DONE]\n\n"])


async def test_usage_comes_last() -> None:
    answer = await ask(FakeScheduler(), stream=True, stream_options={"include_usage": True})
    *chunks, last, done = [data for _, data in answer.events()]
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 2)


@pytest.mark.parametrize(
    ("end", "reason"), [("end", "stop"), ("stop", "stop"), ("length", "length"), ("context", "length")]
)
async def test_finish_reasons(end: str, reason: str) -> None:
    scheduler = FakeScheduler(["a", end])
    with fake_app(scheduler) as app:
        whole = await fetch(app, CHAT, question())
        streamed = await fetch(app, CHAT, question(stream=True))
    assert whole.json()["choices"][0]["finish_reason"] == reason
    assert streamed.events()[-2][1]["choices"][0]["finish_reason"] == reason


async def test_several_choices() -> None:
    scheduler = FakeScheduler(["hello", " world"])
    with fake_app(scheduler) as app:
        whole = await fetch(app, CHAT, question(n=2, seed=5))
        streamed = await fetch(app, CHAT, question(n=2, stream=True))
    assert [one["message"]["content"] for one in whole.json()["choices"]] == ["hello world"] * 2
    assert [request.sampling.seed for request in scheduler.requests[:2]] == [5, 6]
    for index in range(2):
        assert "".join(one.get("content", "") for one in deltas(streamed, index)) == "hello world"
    assert streamed.body.count(b"[DONE]") == 1
    assert streamed.body.endswith(b"[DONE]\n\n")


async def test_text_completions_of_several_prompts() -> None:
    scheduler = FakeScheduler(["hello", " world"])
    prompts = {"model": MODEL, "prompt": ["a", "bc"], "n": 2, "logprobs": 1}
    with fake_app(scheduler) as app:
        whole = (await fetch(app, "/v1/completions", prompts)).json()
        streamed = await fetch(app, "/v1/completions", prompts | {"stream": True})
    assert [(one["index"], one["text"]) for one in whole["choices"]] == [
        (index, "hello world") for index in range(4)
    ]
    assert whole["usage"]["prompt_tokens"] == 1 + 2
    sent = [data["choices"][0] for _, data in streamed.events()[:-1]]
    assert [one["index"] for one in sent] == [index for index in range(4) for _ in range(3)]
    offsets = [one["logprobs"]["text_offset"] for one in sent if one["logprobs"] is not None]
    assert offsets == [[0], [5, 9]] * 4
    assert whole["choices"][3]["logprobs"]["text_offset"] == [0, 5, 9]


async def test_a_tool_call() -> None:
    scheduler = FakeScheduler(CALL)
    with fake_app(scheduler) as app:
        whole = await fetch(app, CHAT, question(tools=[TOOL]))
        streamed = await fetch(app, CHAT, question(tools=[TOOL], stream=True))
    (choice,) = whole.json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("see", "tool_calls")
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    calls = [one["tool_calls"][0] for one in deltas(streamed) if "tool_calls" in one]
    assert calls[0]["function"] == {"name": "f", "arguments": ""}
    assert "".join(one["function"]["arguments"] for one in calls) == '{"a": 1}'
    assert all(request.constraint is not None for request in scheduler.requests)


async def test_logprobs_of_a_character_of_several_tokens() -> None:
    start, end = list("é".encode()[:1]), list("é".encode()[1:])
    scheduler = FakeScheduler([start, end, ("", [], 1)])
    with fake_app(scheduler) as app:
        whole = await fetch(app, CHAT, question(logprobs=True, top_logprobs=1))
        streamed = await fetch(app, CHAT, question(logprobs=True, stream=True))
    content = whole.json()["choices"][0]["logprobs"]["content"]
    assert [one["bytes"] for one in content] == [start, end]  # without the token that ended it
    chunks = [data["choices"][0] for _, data in streamed.events()[1:-2]]
    assert [(one["delta"]["content"], len(one["logprobs"]["content"])) for one in chunks] == [
        ("", 1),
        ("é", 1),
        ("", 0),
    ]


async def test_what_the_engine_is_asked() -> None:
    scheduler = FakeScheduler()
    more = {"max_tokens": 9, "stop": "x", "temperature": 0, "speculation": {"max_draft": 0}, "user": "me"}
    await ask(scheduler, **more)
    (request,) = scheduler.requests
    assert request.prompt == scheduler.engine.model.vocab.tokenize("hi")
    assert (request.max_tokens, request.stops, request.sampling.temperature) == (9, ["x"], 0)
    assert (request.speculate, request.max_draft, request.constraint) == (False, 0, None)
    assert scheduler.clients == ["unix:1/me"]


FAULTS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt"}, 404, "does not exist here"),
    ({"temperature": 3}, 400, "temperature"),
    ({"top_logprobs": 1}, 400, "needs logprobs"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"logit_bias": {"99999": 1}}, 400, "not a token"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "maximum context length"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "status", "text"), FAULTS)
async def test_wrong_requests(change: dict[str, Any], status: int, text: str, stream: bool) -> None:
    scheduler = FakeScheduler()
    answer = await ask(scheduler, **change, stream=stream)
    assert answer.status == status
    assert text in answer.json()["error"]["message"]
    assert scheduler.requests == []


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(EdgespecError("It broke."), 400, "It broke."), (MemoryError(), 503, "memory"),
     (RuntimeError("/secret"), 500, "RuntimeError")],
)  # fmt: skip
async def test_a_generation_that_fails(
    error: Exception, status: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = FakeScheduler(["hello", error])
    with fake_app(scheduler) as app:
        whole = await fetch(app, CHAT, question())
        streamed = await fetch(app, CHAT, question(stream=True))
        metrics = await fetch(app, "/metrics")
    assert whole.status == status
    assert text in whole.json()["error"]["message"]
    assert streamed.status == 200  # its head was sent before
    assert deltas(streamed)[1:] == [{"content": "hello"}]
    assert text in streamed.events()[-1][1]["error"]["message"]
    assert b"[DONE]" not in streamed.body
    assert b"secret" not in whole.body + streamed.body
    assert ("/secret" in caplog.text) == (status == 500)
    assert b'edgespec_answers_total{reason="error"} 2.0' in metrics.body


@pytest.mark.parametrize(
    ("path", "more"),
    [(CHAT, {"n": 2}), ("/v1/completions", {"prompt": ["a", "b"]})],
    ids=["choices", "prompts"],
)
async def test_a_full_queue(path: str, more: dict[str, Any]) -> None:
    scheduler = FakeScheduler(room=3)
    body = question(**more) if path == CHAT else {"model": MODEL, **more}
    with fake_app(scheduler) as app:
        assert (await fetch(app, path, body)).status == 200
        answer = await fetch(app, path, body | {"stream": True})
        assert scheduler.requests[2].cancelled  # both are let in, or none
    assert (answer.status, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 2])
async def test_a_client_that_leaves(stream: bool, count: int) -> None:
    scheduler = FakeScheduler(endless=True)
    with fake_app(scheduler) as app:
        async with opened(app, CHAT, question(stream=stream, n=count)) as exchange:
            if stream:
                await exchange.received(b"world")
            else:
                await until(lambda: len(scheduler.requests) == count)
            exchange.leave()
            await exchange.ended()
        await until(scheduler.idle.is_set)
        metrics = await fetch(app, "/metrics")
    assert scheduler.ended == ["cancelled"] * count
    assert f'edgespec_answers_total{{reason="cancelled"}} {count}.0'.encode() in metrics.body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_stops(stream: bool) -> None:
    scheduler = FakeScheduler(endless=True)
    with fake_app(scheduler) as app:
        async with opened(app, CHAT, question(stream=stream)) as exchange:
            await until(lambda: bool(scheduler.requests))
            for request in scheduler.requests:
                request.cancel()
            await exchange.ended()
    error = exchange.events()[-1][1]["error"] if stream else exchange.json()["error"]
    assert error["message"] == "The server is stopping."
    assert exchange.status == (200 if stream else 503)


async def test_tcp_needs_the_token() -> None:
    scheduler = FakeScheduler()
    with fake_app(scheduler) as app:
        without = await fetch(app, CHAT, question(), client=("127.0.0.1", 5))
        key = {"authorization": f"Bearer {TOKEN}"}
        answer = await fetch(app, CHAT, question(), client=("127.0.0.1", 5), headers=key)
    assert (without.status, answer.status) == (401, 200)
    assert scheduler.clients == ["127.0.0.1/"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)

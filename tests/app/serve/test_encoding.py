"""From HTTP bodies to generation requests, and from deltas to responses: without a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_service import FakeVocab
from hypothesis import given
from hypothesis import strategies as st
from imports import importers
from pydantic import ValidationError

from edgespec.app.engine.completions import Delta, Finished, GenerationRequest
from edgespec.app.engine.engine import ContextFullError
from edgespec.app.engine.request import GenerationStats
from edgespec.app.engine.scheduler import BusyError
from edgespec.app.serve.apis import encoding
from edgespec.app.serve.apis.chat_completions import ChatEncoder
from edgespec.app.serve.apis.errors import ApiError, as_api_error, dumps, error_body, first_fault
from edgespec.app.serve.apis.messages import MessagesEncoder
from edgespec.app.serve.apis.messages_body import MessagesRequest
from edgespec.app.serve.apis.ollama import OllamaEncoder
from edgespec.app.serve.apis.responses import ResponsesEncoder
from edgespec.app.serve.apis.responses_body import ResponsesRequest
from edgespec.app.serve.apis.schemas import ChatRequest, CompletionRequest
from edgespec.core import EdgespecError, TokenLogprob
from edgespec.models.prompting.output_events import Arguments, Called, ReasoningPiece, TextPiece

HI: Any = {"role": "user", "content": "hi"}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat_body(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [HI], **fields})


def chat(**fields: Any) -> GenerationRequest:
    (request,) = chat_body(**fields).requests()
    return request


def messages(**fields: Any) -> GenerationRequest:
    body = MessagesRequest.model_validate({"model": "m", "max_tokens": 5, "messages": [HI], **fields})
    (request,) = body.requests()
    return request


def responses(**fields: Any) -> GenerationRequest:
    (request,) = ResponsesRequest.model_validate({"model": "m", "input": "hi", **fields}).requests()
    return request


def test_the_defaults_are_openais() -> None:
    request = chat()
    assert request.messages == [{"role": "user", "content": "hi"}]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (1.0, 1.0, None)
    assert (request.max_tokens, request.count, request.max_draft, request.stops) == (0, 1, None, [])
    assert request.choice.mode == "none"
    assert request == chat(
        temperature=None, top_p=None, n=None, stop=None, seed=None, max_tokens=None, tools=None
    )


def test_every_setting_arrives() -> None:
    request = chat(
        temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=5, frequency_penalty=1, presence_penalty=-1,
        repetition_penalty=1.1, logit_bias={"7": -100}, logprobs=True, top_logprobs=4, n=2, stop="x",
        max_tokens=9, speculation={"max_draft": 0}, user="me",
    )  # fmt: skip
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed, s.logprobs) == (0.5, 0.9, 3, 0.1, 5, 4)
    assert (s.frequency_penalty, s.presence_penalty, s.repetition_penalty) == (1, -1, 1.1)
    assert s.logit_bias == {7: -100}
    assert (request.count, request.stops, request.max_tokens, request.max_draft, request.user) == (
        2,
        ["x"],
        9,
        0,
        "me",
    )
    assert chat(max_tokens=9, max_completion_tokens=4).max_tokens == 4
    assert chat(seed=-3).sampling.seed == 2**63 - 3


@pytest.mark.parametrize(
    ("given", "mode", "named", "parallel"),
    [
        (None, "auto", None, True),
        ("auto", "auto", None, True),
        ("none", "none", None, True),
        ("required", "required", None, True),
        ({"type": "function", "function": {"name": "f"}}, "required", "f", False),
    ],
)
def test_the_choice_of_tools(given: Any, mode: str, named: str | None, parallel: bool) -> None:
    choice = chat(tools=[TOOL], tool_choice=given).choice
    assert (choice.mode, choice.named, choice.parallel) == (mode, named, parallel)
    flat = {"type": "function", "name": "f"} if named else given
    tool = {"type": "function", "name": "f"}
    assert responses(tools=[tool], tool_choice=flat).choice == choice


@pytest.mark.parametrize(
    ("given", "mode", "named"),
    [("auto", "auto", None), ("any", "required", None), ("none", "none", None), ("tool", "required", "f")],
)
def test_anthropics_choice_of_tools(given: str, mode: str, named: str | None) -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    choice = messages(tools=[tool], tool_choice={"type": given, **({"name": named} if named else {})}).choice
    assert (choice.mode, choice.named) == (mode, named)
    assert not messages(
        tools=[tool], tool_choice={"type": "any", "disable_parallel_tool_use": True}
    ).choice.parallel


def test_formats() -> None:
    schema = {"type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert chat(response_format=form).format == ("json_schema", schema)
    assert chat(response_format={"type": "json_object"}).format == ("json_object", None)
    assert chat(response_format={"type": "text"}).format is None
    assert chat(grammar="root ::= x").format == ("gbnf", "root ::= x")
    assert chat(grammar={"type": "regex", "value": "a+"}).format == ("regex", "a+")
    flat = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert responses(text=flat).format == ("json_schema", schema)
    output = {"format": {"type": "json_schema", "schema": schema}}
    assert messages(output_config=output).format == ("json_schema", schema)


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "R", "tool_call_id": "c", "name": "f"},
    {"role": "user", "content": "so"},
]


def test_one_conversation_in_three_apis() -> None:
    """Chat templates get the same: parts joined, developers as the system, arguments as objects."""
    function = {"name": "f", "arguments": '{"a": 1}'}
    request = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "S"}]},
            HI,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "R"}]},
            {"role": "user", "content": [{"type": "text", "text": "s"}, {"type": "text", "text": "o"}]},
        ]
    )
    assert request.messages == CONVERSATION
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "R"}]}
    request = messages(
        system=[{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        messages=[
            HI,
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}],
            },
            {"role": "user", "content": [result, {"type": "text", "text": "so"}]},
        ],
    )
    assert request.messages == CONVERSATION
    request = responses(
        instructions="S",
        input=[
            HI,
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}', "id": "fc"},
            {"type": "function_call_output", "call_id": "c", "output": "R"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "so"}]},
        ],
    )
    assert request.messages == CONVERSATION


def called(arguments: str) -> dict[str, str]:
    return {"name": "f", "arguments": arguments}


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 1},
        {"grammar": "x", "response_format": {"type": "json_object"}},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": called("1")}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": called("{")}]}]},
    ],
)
def test_contradictions(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        chat(**fields)


def test_prompts_of_completions() -> None:
    def prompts(prompt: Any) -> list[Any]:
        body = CompletionRequest.model_validate({"model": "m", "prompt": prompt})
        return [request.prompt for request in body.requests()]

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1], [2, 3]]) == [[1], [2, 3]]
    for wrong in ("", [], [""], [[]], ["a"] * 17):
        with pytest.raises(ValueError, match="prompt"):
            prompts(wrong)


def test_prefilled_answers_go_on_where_that_is_meant() -> None:
    begun = [HI, {"role": "assistant", "content": "I"}]
    assert messages(messages=begun).continues
    assert chat(messages=begun, continue_final_message=True, add_generation_prompt=False).continues
    assert not chat().continues
    for wrong in ({"messages": begun}, {"continue_final_message": True}):
        with pytest.raises(ValueError, match="continue_final_message"):
            chat(**wrong)
    with pytest.raises(ValueError, match="must be the opposite"):
        chat(add_generation_prompt=False)
    with pytest.raises(ValueError, match="must end with"):
        responses(input=begun)


PARTS = [
    Delta(0, [TextPiece("Let me "), TextPiece("see.")], [1, 2], []),
    Delta(0, [Called(0, "f"), Arguments(0, '{"a":')], [3], []),
    Delta(0, [Arguments(0, " 1}"), Called(1, "g"), Arguments(1, "{}")], [4], []),
]


def encoded(encoder: encoding.Encoder, *items: Delta | Finished) -> list[Any]:
    return [event for item in items for event in encoding.encode(item, encoder)]


def test_a_chat_completion_is_put_together_from_its_deltas() -> None:
    encoder = ChatEncoder(FakeVocab(), chat_body())
    events = encoded(encoder, *PARTS, Finished(0, GenerationStats(stop_reason="end")))
    (choice,) = encoder.body["choices"]
    message = choice["message"]
    assert message["content"] == "Let me see."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert choice["finish_reason"] == "tool_calls"
    sent = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in sent) == message["content"]
    calls = [call for delta in sent for call in delta.get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls if call["index"] == 0) == '{"a": 1}'
    assert [call["id"] for call in calls if "id" in call] == [call["id"] for call in message["tool_calls"]]
    assert events[-1] == "[DONE]"


def test_an_anthropic_message_grows_as_its_events_say() -> None:
    message = MessagesEncoder("m", 9)
    stats = GenerationStats(stop_reason="end", prompt_tokens=9, cached_tokens=4, tokens=[1, 2, 3, 4])
    events = encoded(message, *PARTS, Finished(0, stats))
    kinds = [(event["type"], event.get("index")) for event in events]
    assert kinds == [
        ("content_block_start", 0), ("content_block_delta", 0), ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", 1), ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", 2), ("content_block_stop", 2),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    blocks = message.body["content"]
    assert [block["type"] for block in blocks] == ["text", "tool_use", "tool_use"]
    assert blocks[1]["input"] == {"a": 1}
    assert message.body["stop_reason"] == "tool_use"
    assert message.body["usage"]["input_tokens"] == 5
    assert message.body["usage"]["cache_read_input_tokens"] == 4


def test_a_call_that_is_cut_short() -> None:
    message = MessagesEncoder("m", 9)
    cut = Delta(0, [Called(0, "f"), Arguments(0, '{"a": "xy')], [], [])
    encoded(message, cut, Finished(0, GenerationStats(stop_reason="length")))
    assert message.body["content"][0]["input"] == {"a": "xy"}
    assert message.body["stop_reason"] == "max_tokens"


def test_a_response_grows_as_its_events_say() -> None:
    body = ResponsesRequest.model_validate({"model": "m", "input": "x"})
    response = ResponsesEncoder(FakeVocab(), body)
    events = encoded(response, *PARTS, Finished(0, GenerationStats(stop_reason="end")))
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places)
    assert [item["type"] for item in response.body["output"]] == ["message", "function_call", "function_call"]
    assert all(item["status"] == "completed" for item in response.body["output"])
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert len(added) == len(done) == 3
    assert events[-1]["type"] == "response.completed"
    empty = ResponsesEncoder(FakeVocab(), body)
    encoded(empty, Finished(0, GenerationStats(stop_reason="length")))
    assert empty.body["output"][0]["content"][0]["text"] == ""
    assert empty.body["status"] == "incomplete"


THOUGHT = [
    Delta(0, [ReasoningPiece("2 and "), ReasoningPiece("2.")], [1, 2, 3], []),
    Delta(0, [TextPiece("4"), Called(0, "f"), Arguments(0, "{}")], [4], []),
]
THOUGHT_STATS = GenerationStats(stop_reason="end", tokens=[1, 2, 3, 4], reasoning_tokens=3)


def test_reasoning_in_a_chat_completion() -> None:
    encoder = ChatEncoder(FakeVocab(), chat_body())
    events = encoded(encoder, *THOUGHT, Finished(0, THOUGHT_STATS))
    message = encoder.body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("2 and 2.", "4")
    sent = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in sent) == "2 and 2."
    assert encoder.body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    plain = ChatEncoder(FakeVocab(), chat_body())
    encoded(plain, *PARTS, Finished(0, GenerationStats()))
    assert "reasoning_content" not in plain.body["choices"][0]["message"]


def test_reasoning_in_an_anthropic_message() -> None:
    message = MessagesEncoder("m", 9)
    events = encoded(message, *THOUGHT, Finished(0, THOUGHT_STATS))
    blocks = message.body["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert blocks[0] == {"type": "thinking", "thinking": "2 and 2.", "signature": ""}
    kinds = [event.get("delta", {}).get("type", event["type"]) for event in events]
    assert kinds[:5] == [
        "content_block_start", "thinking_delta", "thinking_delta", "signature_delta", "content_block_stop",
    ]  # fmt: skip


def test_reasoning_in_a_response() -> None:
    body = ResponsesRequest.model_validate({"model": "m", "input": "x"})
    response = ResponsesEncoder(FakeVocab(), body)
    events = encoded(response, *THOUGHT, Finished(0, THOUGHT_STATS))
    assert [item["type"] for item in response.body["output"]] == ["reasoning", "message", "function_call"]
    assert response.body["output"][0]["content"] == [{"type": "reasoning_text", "text": "2 and 2."}]
    assert response.body["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == "2 and 2."
    cut = ResponsesEncoder(FakeVocab(), body)
    encoded(cut, THOUGHT[0], Finished(0, GenerationStats(stop_reason="length")))
    assert [item["type"] for item in cut.body["output"]] == ["reasoning", "message"]


@pytest.mark.parametrize("chat", [True, False])
def test_reasoning_in_ollamas_lines(chat: bool) -> None:
    encoder = OllamaEncoder("m", chat=chat)
    events = encoded(encoder, *THOUGHT, Finished(0, THOUGHT_STATS))
    parts = [event["message"] if chat else event for event in events]
    assert "".join(part.get("thinking", "") for part in parts) == "2 and 2."
    whole = encoder.body["message"] if chat else encoder.body
    assert (whole["thinking"], whole["content" if chat else "response"]) == ("2 and 2.", "4")


@pytest.mark.parametrize(
    ("reason", "calls", "expected"),
    [("end", False, "stop"), ("stop", False, "stop"), ("end", True, "tool_calls"),
     ("length", True, "length"), ("context", False, "length")],
)  # fmt: skip
def test_finish_reasons(reason: Any, calls: bool, expected: str) -> None:
    assert encoding.finish_reason(GenerationStats(stop_reason=reason), calls) == expected


def test_usage_of_several_answers() -> None:
    results = [
        GenerationStats(tokens=[1, 2], prompt_tokens=7, drafted=5, accepted=3),
        GenerationStats(tokens=[1], prompt_tokens=7, drafted=1),
    ]
    found = encoding.usage(results)
    assert (found["prompt_tokens"], found["completion_tokens"], found["total_tokens"]) == (7, 3, 10)
    details = found["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (3, 3)


class Bytes:
    def piece(self, token: int) -> bytes:
        return {1: b"a", 2: "é".encode()[:1]}.get(token, b"")


def test_logprobs_leave_out_the_end_and_are_finite() -> None:
    found = [TokenLogprob(1, -0.5, ((1, -0.5), (2, float("-inf")))), TokenLogprob(9, -1.0)]
    encoder = ChatEncoder(Bytes(), chat_body(logprobs=True))
    (event,) = encoded(encoder, Delta(0, [TextPiece("a")], [1], found))
    shown = event["choices"][0]["logprobs"]
    (one,) = shown["content"]
    assert (one["token"], one["bytes"]) == ("a", [97])
    assert one["top_logprobs"][1] == {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3]}
    dumps(shown)


LEAVES = st.text() | st.integers() | st.none()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_is_ascii_and_comes_back(value: Any) -> None:
    text = dumps(value)
    assert text.isascii()
    assert json.loads(text) == value


@given(st.text("a\ud800\udc00\udfff😀", min_size=1))
def test_no_lone_surrogate_leaves(text: str) -> None:
    json.loads(dumps({text: [text]}) or "").popitem()[0].encode()


def test_nan_never_leaves() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps(float("nan"))


def test_errors_as_answers() -> None:
    busy = as_api_error(BusyError(9, 2.4))
    assert (busy.status, busy.headers) == (429, {"retry-after": "2"})
    full = as_api_error(ContextFullError("full"))
    assert (full.status, full.code) == (400, "context_length_exceeded")
    assert as_api_error(EdgespecError("x")).status == 400
    inside = as_api_error(RuntimeError("/home/me/secret"))
    assert inside.status == 500
    assert "secret" not in inside.message
    assert error_body(busy, "/v1/chat/completions")["error"]["code"] == "rate_limit_exceeded"
    body = error_body(busy, "/v1/messages/count_tokens")
    assert (body["type"], body["error"]["type"]) == ("error", "rate_limit_error")
    assert error_body(ApiError(500, "x"), "/v1/messages")["error"]["type"] == "api_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}},
         "response_format.json_schema.schema"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 1}, "stop"),
        ({"speculation": {}}, "speculation.max_draft"),
    ],
)  # fmt: skip
def test_faults_are_found_in_the_request(change: dict[str, Any], param: str) -> None:
    body = {"model": "m", "messages": [HI], **change}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    errors: Any = [{**one, "loc": ("body", *one["loc"])} for one in caught.value.errors()]
    fault = first_fault(errors, body)
    assert (fault.param, fault.status) == (param, 400)
    assert param in fault.message


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("fastapi", "app/serve/application.py"),
        ("uvicorn", "app/serve/connections.py"),
        ("sse_starlette", "app/serve/apis/streaming.py"),
        ("prometheus_client", "app/serve/metrics.py"),
        ("mcp", "app/serve/mcp_server.py"),
    ],
)
def test_each_library_is_known_in_one_file(package: str, file: str) -> None:
    assert importers(package, ("app", "edgespec", "models", "quant")) == {file}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "Input should be a valid string or a valid list"),
        ({"stop": {}}, "Input should be a valid string or a valid list"),
        ({"messages": [{"role": "tool", "content": [{"text": "x"}]}]}, "its role or type is missing"),
        ({"temperature": "1"}, "Input should be a valid number"),
    ],
)
def test_faults_name_the_field_and_all_that_it_may_be(change: dict[str, Any], reason: str) -> None:
    body = {"model": "m", "messages": [HI], **change}
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    errors: Any = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    fault = first_fault(errors, body)
    assert fault.message == f"Invalid {fault.param}: {reason}"

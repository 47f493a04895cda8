"""Clients that people have, unchanged: OpenAI's and Anthropic's SDKs and curl, on the socket and over TCP."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.completion import Completion
from openai.types.responses import Response
from pydantic import BaseModel
from serving import MODEL, Running, question, running

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "degrees": {"type": "integer", "maximum": 50},
    },
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "get_weather", "description": "The weather in a city.", "parameters": CITY}
TOOLS: Any = [{"type": "function", "function": WEATHER}]
PARIS: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
COLOUR: Any = [{"role": "user", "content": "Name a colour."}]
GREEDY: Any = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("clients"), "--parallel", "2", "--alias", "gpt-test") as one:
        yield one


@pytest.fixture(params=["unix", "tcp"])
def gpt(request: pytest.FixtureRequest, server: Running) -> Iterator[openai.OpenAI]:
    if request.param == "tcp":
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key=server.token, max_retries=0
        ) as client:
            yield client
        return
    with (
        httpx2.Client(transport=httpx2.HTTPTransport(uds=str(server.path))) as http,
        openai.OpenAI(
            base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0
        ) as client,
    ):
        yield client


@pytest.fixture(params=["unix", "tcp"])
def claude(request: pytest.FixtureRequest, server: Running) -> Iterator[anthropic.Anthropic]:
    if request.param == "tcp":
        with anthropic.Anthropic(
            base_url=f"http://127.0.0.1:{server.port}", api_key=server.token, max_retries=0
        ) as client:
            yield client
        return
    with (
        httpx2.Client(transport=httpx2.HTTPTransport(uds=str(server.path))) as http,
        anthropic.Anthropic(
            base_url="http://localhost", api_key="none", http_client=http, max_retries=0
        ) as client,
    ):
        yield client


def strict(model: type[BaseModel], value: BaseModel) -> None:
    """`value` is what its class says: the SDKs themselves do not look."""
    model.model_validate_json(value.model_dump_json(warnings=False), strict=True)


def test_chat(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(messages=COLOUR, max_tokens=8, **GREEDY)
    strict(ChatCompletion, answer)
    (choice,) = answer.choices
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    details = answer.usage.completion_tokens_details
    told = answer.usage.model_extra
    assert details is not None
    assert told is not None
    assert details.accepted_prediction_tokens == told["speculation"]["accepted"]


def test_a_streamed_chat_says_the_same(gpt: openai.OpenAI) -> None:
    whole = gpt.chat.completions.create(messages=COLOUR, max_tokens=20, **GREEDY)
    chunks = list(
        gpt.chat.completions.create(
            messages=COLOUR, max_tokens=20, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    for chunk in chunks:
        strict(ChatCompletionChunk, chunk)
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [one.usage is not None for one in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({one.id for one in chunks}) == 1


def test_several_answers(gpt: openai.OpenAI) -> None:
    wanted: Any = {**GREEDY, "temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 12}
    answers = gpt.chat.completions.create(messages=COLOUR, **wanted)
    again = gpt.chat.completions.create(messages=COLOUR, **wanted)
    texts = [choice.message.content for choice in answers.choices]
    assert [choice.index for choice in answers.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    parts = {0: "", 1: "", 2: ""}
    for chunk in gpt.chat.completions.create(messages=COLOUR, stream=True, **wanted):
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(parts.values()) == texts


def test_stop_strings(gpt: openai.OpenAI) -> None:
    text = gpt.chat.completions.create(messages=COLOUR, max_tokens=12, **GREEDY).choices[0].message.content
    assert text is not None
    stop = text[5:8]
    answer = gpt.chat.completions.create(messages=COLOUR, max_tokens=12, stop=["@@", stop], **GREEDY)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs(gpt: openai.OpenAI) -> None:
    wanted: Any = {**GREEDY, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    answer = gpt.chat.completions.create(messages=COLOUR, **wanted)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 6
    assert "".join(one.token for one in found.content) == answer.choices[0].message.content
    for one in found.content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token  # greedy
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert bytes(one.bytes or []).decode() == one.token
    streamed = [
        one.token
        for chunk in gpt.chat.completions.create(messages=COLOUR, stream=True, **wanted)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == [one.token for one in found.content]


def test_logit_bias_and_penalties(gpt: openai.OpenAI) -> None:
    free = gpt.chat.completions.create(messages=COLOUR, max_tokens=30, **GREEDY).choices[0].message.content
    first = httpx_json(gpt, "/tokenize", {"content": (free or "").split()[0]})["tokens"][0]
    other = gpt.chat.completions.create(
        messages=COLOUR, max_tokens=5, logit_bias={str(first): -100}, **GREEDY
    )
    assert (other.choices[0].message.content or "").split()[0] != (free or "").split()[0]
    pressed = gpt.chat.completions.create(
        messages=COLOUR, max_tokens=30, frequency_penalty=2, presence_penalty=2, **GREEDY
    )
    assert pressed.choices[0].message.content != free


def httpx_json(gpt: openai.OpenAI, path: str, body: Any) -> dict[str, Any]:
    found: dict[str, Any] = gpt.post("/.." + path, body=body, cast_to=dict[str, Any])
    return found


def test_a_schema_is_kept(gpt: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": CITY, "strict": True}}
    for stream in (False, True):
        wanted: Any = {**GREEDY, "response_format": form, "max_tokens": 80}
        if stream:
            chunks = list(gpt.chat.completions.create(messages=PARIS, stream=True, **wanted))
            text = "".join(one.choices[0].delta.content or "" for one in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            choice = gpt.chat.completions.create(messages=PARIS, **wanted).choices[0]
            text, finish = choice.message.content or "", choice.finish_reason
        data = json.loads(text)
        assert set(data) == {"city", "degrees"}
        assert isinstance(data["degrees"], int)
        assert finish == "stop"


def test_a_pydantic_model_as_schema(gpt: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: str
        cold: bool

    answer = gpt.chat.completions.parse(
        messages=PARIS, response_format=Weather, max_tokens=200, seed=1, frequency_penalty=1, **GREEDY
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_a_grammar(gpt: openai.OpenAI) -> None:
    for grammar in (
        'root ::= "red" | "green"',
        {"type": "regex", "value": "red|green"},
        {"type": "choice", "value": ["red", "green"]},
    ):
        answer = gpt.chat.completions.create(messages=COLOUR, extra_body={"grammar": grammar}, **GREEDY)
        assert answer.choices[0].message.content in ("red", "green")
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_is_called(choice: Any, gpt: openai.OpenAI) -> None:
    wanted: Any = {**GREEDY, "tools": TOOLS, "tool_choice": choice, "max_tokens": 120}
    answer = gpt.chat.completions.create(messages=PARIS, parallel_tool_calls=False, **wanted)
    strict(ChatCompletion, answer)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city", "degrees"}
    # and its result is told in the words of every SDK's example
    told = [*PARIS, answer.choices[0].message]
    told.append({"role": "tool", "tool_call_id": call.id, "content": "20 degrees and rain"})
    end = gpt.chat.completions.create(messages=told, tools=TOOLS, max_tokens=10, **GREEDY)
    assert end.choices[0].message.content or end.choices[0].message.tool_calls


def test_a_streamed_tool_call_says_the_same(gpt: openai.OpenAI) -> None:
    wanted: Any = {
        **GREEDY, "tools": TOOLS, "tool_choice": "required", "max_tokens": 120, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = gpt.chat.completions.create(messages=PARIS, **wanted).choices[0].message
    with gpt.chat.completions.stream(messages=PARIS, **wanted) as stream:
        names = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in names
    assert streamed.finish_reason == "tool_calls"
    assert arguments(streamed.message) == arguments(whole)


def arguments(message: ChatCompletionMessage) -> list[str]:
    return [call.function.arguments for call in message.tool_calls or [] if call.type == "function"]


def test_no_tool_is_called(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(
        messages=PARIS, tools=TOOLS, tool_choice="none", max_tokens=10, **GREEDY
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_text_completions(gpt: openai.OpenAI) -> None:
    prompts = ["Red, green, ", "One, two, "]
    answer = gpt.completions.create(prompt=prompts, max_tokens=6, n=2, logprobs=2, echo=False, **GREEDY)
    strict(Completion, answer)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text
    found = answer.choices[2].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == answer.choices[2].text
    tokens = httpx_json(gpt, "/tokenize", {"content": prompts[1]})["tokens"]
    same = gpt.completions.create(prompt=tokens, max_tokens=6, **GREEDY)
    assert same.choices[0].text == answer.choices[2].text
    parts = ["", "", "", ""]
    for chunk in gpt.completions.create(prompt=prompts, max_tokens=6, n=2, stream=True, **GREEDY):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == [choice.text for choice in answer.choices]


@pytest.mark.parametrize("most", [0, 1, 31])
def test_how_far_to_guess_is_the_requests_choice(most: int, gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(
        messages=COLOUR, max_tokens=20, extra_body={"speculation": {"max_draft": most}}, **GREEDY
    )
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    told, details = answer.usage.model_extra["speculation"], answer.usage.completion_tokens_details
    assert details is not None
    assert told["drafted"] <= most * told["rounds"]
    assert told["accepted"] == details.accepted_prediction_tokens
    assert told["drafted"] - told["accepted"] == details.rejected_prediction_tokens


def test_responses(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.create(
        input="Name a colour.", max_output_tokens=8, top_logprobs=1,
        include=["message.output_text.logprobs"], metadata={"a": "b"}, **GREEDY,
    )  # fmt: skip
    strict(Response, answer)
    assert answer.status == "incomplete"
    assert answer.output_text
    assert answer.metadata == {"a": "b"}
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8
    message = answer.output[0]
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    assert len(message.content[0].logprobs or []) == 8
    chat = gpt.chat.completions.create(messages=COLOUR, max_tokens=8, **GREEDY)
    assert answer.output_text == chat.choices[0].message.content


def test_streamed_responses(gpt: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "weather", "schema": CITY, "strict": True}}
    with gpt.responses.stream(input="Weather in Paris?", text=form, max_output_tokens=80, **GREEDY) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert events[-1].type == "response.completed"
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.output_text
    assert set(json.loads(final.output_text)) == {"city", "degrees"}


def test_tools_in_responses(gpt: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **WEATHER, "strict": True}]
    wanted: Any = {**GREEDY, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    answer = gpt.responses.create(input=PARIS, max_output_tokens=120, **wanted)
    strict(Response, answer)
    (call,) = answer.output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"city", "degrees"}
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "20 degrees"}
    again: Any = [*PARIS, call.model_dump(exclude_none=True), output]
    end = gpt.responses.create(input=again, tools=tools, max_output_tokens=10, **GREEDY)
    assert end.output
    with gpt.responses.stream(input=PARIS, max_output_tokens=120, **wanted) as stream:
        names = [event.type for event in stream]
    assert "response.function_call_arguments.delta" in names
    assert "response.function_call_arguments.done" in names


def test_messages(claude: anthropic.Anthropic) -> None:
    wanted: Any = {"model": MODEL, "max_tokens": 12, "extra_body": {"temperature": 0}}
    answer = claude.messages.create(messages=COLOUR, system="Answer in a word.", **wanted)
    strict(anthropic.types.Message, answer)
    (block,) = answer.content
    assert block.type == "text"
    assert answer.stop_reason in ("end_turn", "max_tokens")
    tokens = claude.messages.count_tokens(messages=COLOUR, system="Answer in a word.", model=MODEL)
    cached = answer.usage.cache_read_input_tokens or 0
    assert tokens.input_tokens == answer.usage.input_tokens + cached
    with claude.messages.stream(messages=COLOUR, system="Answer in a word.", **wanted) as stream:
        assert "".join(stream.text_stream) == block.text
    stop = block.text[2:5]
    cut = claude.messages.create(messages=COLOUR, system="Answer in a word.", stop_sequences=[stop], **wanted)
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)


def test_tools_in_messages(claude: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "get_weather", "description": "The weather.", "input_schema": CITY}]
    wanted: Any = {
        "model": MODEL, "max_tokens": 120, "tools": tools, "extra_body": {"temperature": 0},
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    answer = claude.messages.create(messages=PARIS, **wanted)
    strict(anthropic.types.Message, answer)
    assert answer.stop_reason == "tool_use"
    (block,) = answer.content
    assert block.type == "tool_use"
    assert set(block.input) == {"city", "degrees"}
    with claude.messages.stream(messages=PARIS, **wanted) as stream:
        final = stream.get_final_message()
    assert final.content[0].type == "tool_use"
    assert final.content[0].input == block.input
    result: Any = {
        "type": "tool_result",
        "tool_use_id": block.id,
        "content": [{"type": "text", "text": "20"}],
    }
    told: Any = [
        *PARIS,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    end = claude.messages.create(messages=told, model=MODEL, max_tokens=10, tools=tools)
    assert end.content


def test_a_schema_in_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        messages=PARIS, model=MODEL, max_tokens=100,
        extra_body={"temperature": 0, "output_config": {"format": {"type": "json_schema", "schema": CITY}}},
    )  # fmt: skip
    assert answer.content[0].type == "text"
    assert set(json.loads(answer.content[0].text)) == {"city", "degrees"}


def test_models(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert [one.id for one in gpt.models.list()] == [MODEL, "gpt-test"]
    assert gpt.models.retrieve(MODEL).id == MODEL
    assert [one.id for one in claude.models.list()] == [MODEL, "gpt-test"]
    answer = gpt.chat.completions.create(messages=COLOUR, model="gpt-test", max_tokens=1)
    assert answer.model == "gpt-test"


FAULTS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
    ({"functions": []}, "functions", "unknown_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unknown_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", None),
    ({"stop": [""]}, "stop", None),
    ({"stop": ["x"] * 17}, "stop", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"speculation": {"max_draft": 32}}, "speculation.max_draft", "invalid_value"),
    ({"grammar": 'root ::= "a'}, "", None),
    ({"grammar": {"type": "regex", "value": "("}}, "", None),
    ({"tool_choice": "required"}, "tool_choice", None),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "name", None),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named", "code"), FAULTS, ids=lambda value: str(value)[:40])
def test_faults_are_named(change: dict[str, Any], named: str, code: str | None, server: Running) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=question() | change)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]
    if code is not None:
        assert (error["param"], error["code"]) == (named, code)


IGNORED: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "x", "modalities": ["text"], "prediction": {"type": "content", "content": "blue"},
    "parallel_tool_calls": True, "response_format": {"type": "text"}, "top_p": None, "stop": None,
}  # fmt: skip


def test_what_does_nothing_is_accepted(server: Running) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=question(2) | IGNORED)
    assert answer.status_code == 200, answer.text


def test_the_context_is_never_cut_silently(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    long: Any = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError) as caught:
        gpt.chat.completions.create(messages=long, model=MODEL)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        claude.messages.create(messages=long, model=MODEL, max_tokens=10)


def test_errors_of_the_framework_have_the_same_shape(server: Running) -> None:
    with server.client() as client:
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/v1/chat/completions", 400),
            ("DELETE", "/v1/models", 405),
            ("GET", "/v1/models/other", 404),
        ):
            answer = client.request(method, path)
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
        answer = client.get("/v1/messages")
        assert (answer.status_code, answer.json()["type"]) == (405, "error")
        answer = client.post(
            "/v1/messages", json={"model": MODEL, "max_tokens": 1, "messages": COLOUR, "x": 1}
        )
        assert answer.json()["error"] == {
            "type": "invalid_request_error",
            "message": "Unrecognized request argument supplied: x",
        }
        answer = client.post("/v1/messages", json={"model": "claude", "max_tokens": 1, "messages": COLOUR})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_tokens_and_back(server: Running) -> None:
    text = "Grüße, 世界 <|im_end|>"
    with server.client() as client:
        tokens = client.post("/tokenize", json={"content": text}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json()["content"] == text
        special = client.post("/tokenize", json={"content": text, "parse_special": True}).json()["tokens"]
        assert len(special) < len(tokens)
        pieces = client.post("/tokenize", json={"content": "a b", "with_pieces": True}).json()["tokens"]
        assert "".join(one["piece"] for one in pieces) == "a b"
        assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
        assert client.post("/detokenize", json={"tokens": [-1]}).status_code == 400


def test_metrics(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with server.client() as client:
        client.post("/v1/chat/completions", json=question(4))
        client.get("/nowhere/17")
        text = client.get("/metrics").text
    found = {one.name: one for family in text_string_to_metric_families(text) for one in family.samples}
    for name in (
        "requests_total", "generated_tokens_total", "prompt_tokens_total", "drafted_tokens_total",
        "accepted_tokens_total", "time_to_first_token_seconds_count", "tokens_per_second_count",
        "draft_length_count", "mode", "temperature_celsius", "battery_percent", "energy_joules_total",
        "cpu_seconds_total", "running", "waiting",
    ):  # fmt: skip
        assert f"edgespec_{name}" in found, name
    assert found["edgespec_generated_tokens_total"].value >= 4
    assert 'path="other",status="404"' in text
    assert "/nowhere" not in text


def test_curl(server: Running) -> None:
    def curl(*arguments: str) -> str:
        done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    path = str(server.path)
    assert json.loads(curl("--unix-socket", path, "http://localhost/health"))["status"] == "ok"
    here = f"http://127.0.0.1:{server.port}"
    told = ["-H", f"Authorization: Bearer {server.token}", "-H", "Content-Type: application/json"]
    stream = curl("-N", *told, "-d", json.dumps(question(4, stream=True)), f"{here}/v1/chat/completions")
    lines = [line for line in stream.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["object"] == "chat.completion.chunk"
    assert json.loads(curl(f"{here}/health"))["error"]["code"] == "invalid_api_key"

"""OpenAI's client, unchanged, over the socket and over TCP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.completion import Completion
from openai.types.responses import Response
from pydantic import BaseModel
from serving import CITY, COLOUR, MODEL, PARIS, Running, openai_client, running, strict

WEATHER: Any = {"name": "get_weather", "description": "The weather in a city.", "parameters": CITY}
TOOLS: Any = [{"type": "function", "function": WEATHER}]
GREEDY: Any = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("openai"), "--parallel", "2") as one:
        yield one


@pytest.fixture(params=["unix", "tcp"])
def gpt(request: pytest.FixtureRequest, server: Running) -> Iterator[openai.OpenAI]:
    with openai_client(server, request.param == "tcp") as client:
        yield client


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
    extra = answer.usage.model_extra
    assert details is not None
    assert extra is not None
    assert details.accepted_prediction_tokens == extra["speculation"]["accepted"]


def test_a_streamed_chat_has_the_same_text(gpt: openai.OpenAI) -> None:
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


ENDLESS: Any = {"max_tokens": 3000, "logit_bias": {"2": -100, "0": -100}}  # seconds of work


def test_a_generation_ends_when_its_client_disconnects(gpt: openai.OpenAI, server: Running) -> None:
    stream = gpt.chat.completions.create(messages=COLOUR, stream=True, **ENDLESS, **GREEDY)
    next(iter(stream))
    stream.close()
    server.wait_until_free()
    with pytest.raises(openai.APITimeoutError):
        gpt.with_options(timeout=0.7).chat.completions.create(messages=COLOUR, **ENDLESS, **GREEDY)
    server.wait_until_free()
    assert gpt.chat.completions.create(messages=COLOUR, max_tokens=2, **GREEDY).choices[0].message.content


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
    # and its result is sent as in the examples of the SDK
    continued = [*PARIS, answer.choices[0].message]
    continued.append({"role": "tool", "tool_call_id": call.id, "content": "20 degrees and rain"})
    end = gpt.chat.completions.create(messages=continued, tools=TOOLS, max_tokens=10, **GREEDY)
    assert end.choices[0].message.content or end.choices[0].message.tool_calls


def test_a_streamed_tool_call_is_the_same(gpt: openai.OpenAI) -> None:
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
def test_the_request_bounds_the_draft_tokens(most: int, gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(
        messages=COLOUR, max_tokens=20, extra_body={"speculation": {"max_draft": most}}, **GREEDY
    )
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    speculation, details = answer.usage.model_extra["speculation"], answer.usage.completion_tokens_details
    assert details is not None
    assert speculation["drafted"] <= most * speculation["rounds"]
    assert speculation["accepted"] == details.accepted_prediction_tokens
    assert speculation["drafted"] - speculation["accepted"] == details.rejected_prediction_tokens


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

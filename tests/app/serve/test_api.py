"""Anthropic's client and curl, unchanged; models, tokens, metrics; errors of invalid requests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from serving import (
    CITY,
    COLOUR,
    MODEL,
    PARIS,
    Running,
    anthropic_client,
    openai_client,
    question,
    running,
    strict,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # A curve measured while other programs run may mean that no draft pays, whatever the text is.
    cheap = "from edgespec.app.engine import calibration; from edgespec.costs import CostCurve; "
    cheap += "calibration.known_curve = lambda *_: CostCurve({1: 0.03, 8: 0.0303})"
    options = ("--parallel", "2", "--alias", "gpt-test")
    with running(tmp_path_factory.mktemp("api"), *options, patch=cheap) as one:
        yield one


@pytest.fixture(params=["unix", "tcp"])
def gpt(request: pytest.FixtureRequest, server: Running) -> Iterator[openai.OpenAI]:
    with openai_client(server, request.param == "tcp") as client:
        yield client


@pytest.fixture(params=["unix", "tcp"])
def claude(request: pytest.FixtureRequest, server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic_client(server, request.param == "tcp") as client:
        yield client


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
    continued: Any = [
        *PARIS,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    end = claude.messages.create(messages=continued, model=MODEL, max_tokens=10, tools=tools)
    assert end.content


def test_a_schema_in_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        messages=PARIS, model=MODEL, max_tokens=100,
        extra_body={"temperature": 0, "output_config": {"format": {"type": "json_schema", "schema": CITY}}},
    )  # fmt: skip
    assert answer.content[0].type == "text"
    assert set(json.loads(answer.content[0].text)) == {"city", "degrees"}


def test_a_generation_ends_when_its_client_disconnects(claude: anthropic.Anthropic, server: Running) -> None:
    wanted: Any = {"model": MODEL, "messages": COLOUR, "max_tokens": 3000}
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 900}  # seconds of work
    wanted["extra_body"] = {"output_config": {"format": {"type": "json_schema", "schema": numbers}}}
    with claude.messages.stream(**wanted) as stream:
        next(iter(stream.text_stream))
    server.wait_until_free()
    with pytest.raises(anthropic.APITimeoutError):
        claude.with_options(timeout=0.7).messages.create(**wanted)
    server.wait_until_free()


def test_models(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert [one.id for one in gpt.models.list()] == [MODEL, "gpt-test"]
    assert gpt.models.retrieve(MODEL).id == MODEL
    assert [one.id for one in claude.models.list()] == [MODEL, "gpt-test"]
    answer = gpt.chat.completions.create(messages=COLOUR, model="gpt-test", max_tokens=1)
    assert answer.model == "gpt-test"


FAULTS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"functions": [{"name": "f"}]}, "functions", None),
    ({"n": 17}, "n", "invalid_value"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "missing_required_parameter"),
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
def test_invalid_parameters_are_named(
    change: dict[str, Any], named: str, code: str | None, server: Running
) -> None:
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


def test_parameters_without_effect_are_accepted(server: Running) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=question(2) | IGNORED)
    assert answer.status_code == 200, answer.text


def test_the_context_is_never_truncated_silently(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
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
        answer = client.post("/v1/messages", json={"model": "other", "max_tokens": 1, "messages": COLOUR})
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

    constant = {"const": "a text so long that drafting it, which the grammar makes certain, pays anywhere"}
    schema = {"type": "object", "properties": {"text": constant}, "required": ["text"]}
    forced = {"type": "json_schema", "json_schema": {"name": "forced", "schema": schema}}
    with server.client() as client:
        client.post("/v1/chat/completions", json=question(4))
        client.post("/v1/chat/completions", json={**question(60), "response_format": forced})
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
    headers = ["-H", f"Authorization: Bearer {server.token}", "-H", "Content-Type: application/json"]
    stream = curl("-N", *headers, "-d", json.dumps(question(4, stream=True)), f"{here}/v1/chat/completions")
    lines = [line for line in stream.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["object"] == "chat.completion.chunk"
    assert json.loads(curl(f"{here}/health"))["error"]["code"] == "invalid_api_key"

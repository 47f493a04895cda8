"""Conversations and tools as clients send them: odd messages, results, reasoning, names, other tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi import fetch
from fake_service import FakeScheduler, fake_app

from edgespec.app.serve.apis.response_store import ResponseStore

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HI: Any = {"role": "user", "content": "hi"}
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLED: Any = {"role": "assistant", "content": None, "tool_calls": [CALL]}
USED: Any = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}],
}
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:,"}}


async def seen(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that reach the chat template."""
    scheduler = FakeScheduler()
    with fake_app(scheduler, strict=True) as app:
        answer = await fetch(app, path, body)
    assert answer.status == 200, answer.body
    messages: list[dict[str, Any]] = scheduler.engine.asked[0][0]
    return messages


async def chat(*messages: Any, **fields: Any) -> list[dict[str, Any]]:
    return await seen(CHAT, {"messages": list(messages), **fields})


async def anthropic(*messages: Any, **fields: Any) -> list[dict[str, Any]]:
    return await seen(MESSAGES, {"messages": list(messages), "max_tokens": 5, **fields})


async def responses(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    return await seen(RESPONSES, {"input": list(items), **fields})


async def refused(path: str, body: dict[str, Any]) -> str:
    with fake_app(FakeScheduler()) as app:
        answer = await fetch(app, path, body)
    assert answer.status == 400
    message: str = answer.json()["error"]["message"]
    return message


async def test_system_messages_keep_their_places() -> None:
    late: Any = {"role": "system", "content": "late", "name": "x"}
    found = await chat({"role": "developer", "content": "D"}, {"role": "system", "content": "S"}, HI, late)
    assert [one["role"] for one in found] == ["system", "system", "user", "system"]
    found = await anthropic(HI, {"role": "system", "content": [{"type": "text", "text": "late"}]}, system="S")
    assert [(one["role"], one["content"]) for one in found] == [
        ("system", "S"), ("user", "hi"), ("system", "late"),
    ]  # fmt: skip


async def test_a_header_that_changes_with_each_request_is_no_part_of_the_prompt() -> None:
    header = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"}
    blocks = [header, {"type": "text", "text": "S"}, {"type": "text", "text": "T"}]
    assert (await anthropic(HI, system=blocks))[0] == {"role": "system", "content": "S\nT"}


RESULTS: list[tuple[Any, str]] = [
    (None, ""),
    ("text", "text"),
    ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ([IMAGE], "[an image was left out: this model reads text only]"),
    ([{"type": "tool_reference", "tool_name": "g"}], "g"),
    ([{"type": "audio"}], "[a part of type audio was left out: this model reads text only]"),
    ({"answer": 1}, '{"answer": 1}'),
]


@pytest.mark.parametrize(("content", "text"), RESULTS, ids=str)
async def test_results_of_tools(content: Any, text: str) -> None:
    result = {"role": "tool", "content": content, "tool_call_id": "c1", "name": "f"}
    found = {"role": "tool", "content": text, "tool_call_id": "c1", "name": "f"}
    assert (await chat(HI, CALLED, result))[-1] == found
    if not isinstance(content, dict):
        block = {"type": "tool_result", "tool_use_id": "c1", "content": content}
        joined = text if text != "ab" else "a\nb"
        assert (await anthropic(HI, USED, {"role": "user", "content": [block]}))[-1] == {
            **found,
            "content": joined,
        }
        call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c1", "output": content}
        assert (await responses(HI, call, output))[-1] == found


async def test_documents_and_results_of_searches_are_read() -> None:
    document = {"type": "document", "title": "D", "source": {"type": "text", "data": "words"}}
    search = {
        "type": "search_result",
        "source": "u",
        "title": "T",
        "content": [{"type": "text", "text": "found"}],
    }
    found = await anthropic({"role": "user", "content": [document, search]})
    assert found == [{"role": "user", "content": "D\nwords\nT\nu\nfound"}]


async def test_a_result_without_an_id_belongs_to_the_open_call() -> None:
    result: Any = {"role": "tool", "content": "R"}
    assert (await chat(HI, CALLED, result))[-1]["tool_call_id"] == "c1"
    other = {**CALL, "id": "c2", "function": {**CALL["function"], "name": "g"}}
    both: Any = {"role": "assistant", "tool_calls": [CALL, other]}
    assert (await chat(HI, both, {**result, "name": "g"}))[-1]["tool_call_id"] == "c2"
    assert (await chat(HI, both, {**result, "tool_call_id": "c1"}, result))[-1]["tool_call_id"] == "c2"
    assert "tool_call_id" in await refused(CHAT, {"messages": [HI, both, result]})
    assert "tool_call_id" in await refused(CHAT, {"messages": [HI, result]})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
async def test_reasoning_in_the_history(field: str) -> None:
    details: Any = {"reasoning_details": [{"type": "reasoning.text", "text": "x"}], field: "because"}
    (_, answer, _) = await chat(HI, {"role": "assistant", "content": "A", **details}, HI)
    assert answer == {"role": "assistant", "content": "A", "reasoning_content": "because"}


async def test_reasoning_in_the_history_of_the_other_apis() -> None:
    blocks = [
        {"type": "thinking", "thinking": "because", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "text", "text": "A"},
    ]
    answer = {"role": "assistant", "content": "A", "reasoning_content": "because"}
    assert (await anthropic(HI, {"role": "assistant", "content": blocks}, HI))[1] == answer
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "because"}]}
    hidden = {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]}
    assert (await responses(HI, hidden, thought, said, HI))[1:] == [answer, HI]
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    (_, answer, _) = await responses(HI, thought, call, {"type": "function_call_output", "call_id": "c1"})
    assert answer["reasoning_content"] == "because"
    assert len(answer["tool_calls"]) == 1


@pytest.mark.parametrize("arguments", ['{"path": "a.t', "[1]", "nonsense", '{"a": NaN}'])
async def test_calls_that_were_cut_pass_as_text(arguments: str) -> None:
    cut = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    found = await chat(HI, {"role": "assistant", "content": "So:", "tool_calls": [cut]}, {"role": "tool"})
    assert found[1] == {"role": "assistant", "content": f'So:\n{{"name": "f", "arguments": {arguments}'}
    assert found[2]["tool_call_id"] == "c1"


async def test_items_of_other_kinds() -> None:
    shell = {"type": "local_shell_call", "call_id": "s", "id": "i", "action": {"command": ["ls"]}}
    output = {"type": "local_shell_call_output", "call_id": "s", "output": "files"}
    search = {"type": "web_search_call", "id": "w", "status": "completed"}
    found = await responses(HI, search, shell, output, {"type": "item_reference", "id": "x"})
    assert [one["role"] for one in found] == ["user", "assistant", "tool"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "local_shell", "arguments": {"command": ["ls"]}}
    assert found[2]["content"] == "files"


@pytest.mark.parametrize("empty", ["", []])
async def test_empty_input(empty: Any) -> None:
    assert await seen(RESPONSES, {"input": empty}) == [{"role": "user", "content": ""}]


async def test_what_the_model_cannot_see_is_refused() -> None:
    assert "content[0].type" in await refused(CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]})
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
    body = {"messages": [{"role": "user", "content": [picture]}], "max_tokens": 5}
    assert "content[0] is of type 'image'" in await refused(MESSAGES, body)
    body = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}
    assert "content[0].type" in await refused(RESPONSES, body)
    assert "conversation" in await refused(RESPONSES, {"input": "hi", "conversation": {"id": "x"}})


VARIABLES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False, "x": 1}}, {"enable_thinking": False, "x": 1}),
    (CHAT, {"enable_thinking": True}, {"enable_thinking": True, "thinking": True}),
    (CHAT, {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    (CHAT, {"reasoning_effort": "none"}, {"enable_thinking": False, "thinking": False}),
    (CHAT, {"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
    (MESSAGES, {"thinking": {"type": "adaptive"}}, {"enable_thinking": True, "thinking": True}),
    (MESSAGES, {"output_config": {"effort": "high"}}, {"reasoning_effort": "high"}),
    (RESPONSES, {"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
    (RESPONSES, {"text": {"verbosity": "low"}}, {}),
]


@pytest.mark.parametrize(("path", "fields", "variables"), VARIABLES, ids=str)
async def test_what_reaches_the_template(path: str, fields: Any, variables: Any) -> None:
    scheduler = FakeScheduler()
    base = {"input": "hi"} if path == RESPONSES else {"messages": [HI], "max_tokens": 5}
    with fake_app(scheduler, strict=True) as app:
        assert (await fetch(app, path, base | fields)).status == 200
    assert scheduler.engine.asked[0][2] == variables


OTHERS = ("web_search", "web_search_20250305", "namespace", "local_shell", "mcp", "bash_20250124")


@pytest.mark.parametrize("kind", OTHERS)
async def test_tools_that_are_no_functions_are_left_out(kind: str) -> None:
    other = {"type": kind, "name": "x", "tools": [], "max_uses": 1}
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    plain = {"name": "f", "input_schema": {"type": "object"}}
    for path, body, tool in (
        (CHAT, {"messages": [HI]}, TOOL),
        (RESPONSES, {"input": "hi"}, flat),
        (MESSAGES, {"messages": [HI], "max_tokens": 5}, plain),
    ):
        scheduler = FakeScheduler()
        with fake_app(scheduler, strict=True) as app:
            assert (
                await fetch(app, path, body | {"tools": [other, tool], "tool_choice": None})
            ).status == 200
            assert (await fetch(app, path, body | {"tools": [other]})).status == 200
        (_, offered, *_), (_, nothing, *_) = scheduler.engine.asked
        assert [one["function"]["name"] for one in offered] == ["f"]
        assert nothing is None


PATCH: Any = {"name": "apply_patch", "description": "Patches.", "format": {"type": "text"}}
CUSTOM_CALL = '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "a\\nb"}}\n</tool_call>'


async def test_custom_tools_take_a_text() -> None:
    scheduler = FakeScheduler([CUSTOM_CALL])
    chat_tool, flat = {"type": "custom", "custom": PATCH}, {"type": "custom", **PATCH}
    with fake_app(scheduler, strict=True) as app:
        whole = (await fetch(app, CHAT, {"messages": [HI], "tools": [chat_tool]})).json()
        events = (await fetch(app, CHAT, {"messages": [HI], "tools": [chat_tool], "stream": True})).events()
        item = (await fetch(app, RESPONSES, {"input": "hi", "tools": [flat]})).json()["output"][0]
        stream = (await fetch(app, RESPONSES, {"input": "hi", "tools": [flat], "stream": True})).events()
    function = scheduler.engine.asked[0][1][0]["function"]
    assert function["parameters"]["properties"] == {"input": {"type": "string"}}
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert (call["type"], call["custom"]) == ("custom", {"name": "apply_patch", "input": "a\nb"})
    deltas = [one["choices"][0]["delta"].get("tool_calls") for _, one in events[:-1]]
    assert [one[0]["custom"]["input"] for one in deltas if one] == ["", "a\nb"]
    assert (item["type"], item["input"]) == ("custom_tool_call", "a\nb")
    assert [data["delta"] for name, data in stream if name.endswith("input.delta")] == ["a\nb"]
    assert [name for name, _ in stream][-1] == "response.completed"


async def test_names_of_tools_are_mapped_and_back() -> None:
    long = "server::" + "very/long." * 20
    call = '<tool_call>\n{"name": "a_b_2", "arguments": {}}\n</tool_call>'
    scheduler = FakeScheduler([call])
    tools = [{"type": "function", "function": {"name": name}} for name in (long, "a_b", "a/b")]
    past = {"id": "c", "type": "function", "function": {"name": "a/b", "arguments": "{}"}}
    messages = [HI, {"role": "assistant", "tool_calls": [past]}, {"role": "tool", "content": "R"}]
    with fake_app(scheduler) as app:
        named = {"type": "function", "function": {"name": "a/b"}}
        answer = await fetch(app, CHAT, {"messages": messages, "tools": tools, "tool_choice": named})
    assert answer.status == 200, answer.body
    asked, offered, *_ = scheduler.engine.asked[0]
    names = [one["function"]["name"] for one in offered]
    assert names[1:] == ["a_b", "a_b_2"]
    assert names[0].startswith("server__very_long.")
    assert len(names[0]) == 64
    assert asked[1]["tool_calls"][0]["function"]["name"] == asked[2]["name"] == "a_b_2"
    assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "a/b"
    wrong: Any
    for wrong in ("", "no spaces", "x" * 257):
        tool = {"type": "function", "function": {"name": wrong}}
        assert "the name of tools[0]" in await refused(CHAT, {"messages": [HI], "tools": [tool]})


async def test_only_allowed_tools_are_offered() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "abc"]
    listed = [{"type": "function", "function": {"name": "b"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": listed}}
    scheduler = FakeScheduler()
    with fake_app(scheduler) as app:
        await fetch(app, CHAT, {"messages": [HI], "tools": tools, "tool_choice": choice})
    assert [one["function"]["name"] for one in scheduler.engine.asked[0][1]] == ["b"]
    message = await refused(CHAT, {"messages": [HI], "tools": tools, "tool_choice": {"type": "web_search"}})
    assert "tool_choice 'web_search'" in message


@pytest.mark.parametrize("stop", ["\n", "}", "tool_call", "name"])
async def test_stop_strings_end_text_and_no_call(stop: str) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    scheduler = FakeScheduler([call])
    with fake_app(scheduler) as app:
        choice = (await fetch(app, CHAT, {"messages": [HI], "tools": [TOOL], "stop": stop})).json()[
            "choices"
        ][0]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}


async def test_stop_strings_end_text_where_tools_are_offered() -> None:
    scheduler = FakeScheduler(["one t", "wo three"], endless=True)
    with fake_app(scheduler) as app:
        answer = await fetch(app, CHAT, {"messages": [HI], "tools": [TOOL], "stop": ["two"]})
        metrics = (await fetch(app, "/metrics")).body.decode()
    (choice,) = answer.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "stop")
    assert 'edgespec_answers_total{reason="stop"} 1.0' in metrics


async def test_a_response_is_continued_by_its_id() -> None:
    scheduler = FakeScheduler(["hello"])
    with fake_app(scheduler) as app:
        first = (await fetch(app, RESPONSES, {"input": "hi", "instructions": "I"})).json()
        events = (
            await fetch(app, RESPONSES, {"input": "on", "previous_response_id": first["id"], "stream": True})
        ).events()
        last = events[-1][1]["response"]["id"]
        await fetch(app, RESPONSES, {"input": "end", "previous_response_id": last, "store": False})
        dropped = (await fetch(app, RESPONSES, {"input": "hi", "store": False})).json()["id"]
        unknown = await fetch(app, RESPONSES, {"input": "x", "previous_response_id": dropped})
    answer = {"role": "assistant", "content": "hello"}
    assert scheduler.engine.asked[2][0] == [
        HI, answer, {"role": "user", "content": "on"}, answer, {"role": "user", "content": "end"},
    ]  # fmt: skip
    assert (unknown.status, unknown.json()["error"]["code"]) == (400, "previous_response_not_found")


def test_the_store_is_bounded() -> None:
    store = ResponseStore(most=3, most_characters=1000)
    for i in range(4):
        store.put(str(i), [HI])
    assert [store.get(str(i)) is not None for i in range(4)] == [False, True, True, True]
    store.get("1")
    store.put("4", [HI])
    assert store.get("1") is not None
    assert store.get("2") is None
    store.put("5", [{"role": "user", "content": "x" * 850}])
    assert [store.get(str(i)) is not None for i in range(6)] == [False, True, False, False, True, True]
    store.put("6", [{"role": "user", "content": "x" * 2000}])
    assert all(store.get(str(i)) is None for i in range(7))


LOOKAHEAD: Any = {
    "type": "object",
    "properties": {"at": {"type": "object", "properties": {"mail": {"type": "string", "pattern": "^(?!x)"}}}},
}


@pytest.mark.parametrize("notes", [[], ["d" * 10_000] * 6], ids=["small", "too large to be remembered"])
async def test_a_schema_is_kept_as_far_as_it_goes_or_its_fault_is_named(notes: list[str]) -> None:
    parameters = LOOKAHEAD | {"examples": notes}
    tool = {"name": "send", "parameters": parameters}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": parameters}}
    for _ in range(2):
        with fake_app(FakeScheduler()) as app:
            for fields in ({"tools": [{"type": "function", "function": tool}]}, {"response_format": form}):
                assert (await fetch(app, CHAT, {"messages": [HI], **fields})).status == 200
    strict = {"type": "function", "function": {**tool, "strict": True}}
    message = await refused(CHAT, {"messages": [HI], "tools": [TOOL, strict]})
    assert message == "tool send, property at.mail: its pattern '^(?!x)' is more than grammars can follow"
    form["json_schema"]["strict"] = True
    message = await refused(CHAT, {"messages": [HI], "response_format": form})
    assert message.startswith("the schema, property at.mail: its pattern")

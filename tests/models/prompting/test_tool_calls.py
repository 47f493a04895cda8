"""Tools: how they are read, and how a model without a place for them is notes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgespec.core import EdgespecError
from edgespec.models.prompting.answer_parser import AnswerParser
from edgespec.models.prompting.call_syntax import DEEPSEEK, GENERIC, HERMES
from edgespec.models.prompting.output_events import Arguments, Called
from edgespec.models.prompting.tool_calls import Tool, folded, instructions, read_tools

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    Tool("get_weather", "of a city", WEATHER),
    Tool("get", "a number", {"properties": {"n": {"const": 1}}}),
]


def function(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def test_tools_are_read_from_openais_form() -> None:
    read = read_tools([function("f", description="d", parameters=WEATHER, strict=True), function("g")])
    assert read[0] == Tool("f", "d", WEATHER, True)
    assert read[1].name == "g"
    assert read[1].parameters == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["f"], r"tools\[0\] must be"),
        ([{"type": "function"}], r"tools\[0\] must be"),
        ([function(), {"type": "web_search", "function": {"name": "x"}}], r"tools\[1\] must be"),
        ([function(None)], r"tools\[0\] needs a name"),
        ([function('a"b')], r"tools\[0\] needs a name"),
        ([function("x" * 65)], r"tools\[0\] needs a name"),
        ([function(), function()], "duplicate tool f"),
        ([function(parameters=[1])], "parameters of f"),
    ],
)
def test_what_is_no_tool_is_refused(tools: Any, message: str) -> None:
    with pytest.raises(EdgespecError, match=message):
        read_tools(tools)


def test_a_model_that_knows_no_tools_is_taught() -> None:
    notes = instructions(TOOLS)
    for tool in TOOLS:
        assert json.dumps(tool.parameters) in notes
    assert HERMES.trigger in notes
    calls = [function("get", arguments={"n": 1}), function("get", arguments='{"n": 2}')]
    messages = folded(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
        ],
        TOOLS,
    )
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == f"Be brief.\n\n{notes}"
    parser = AnswerParser(GENERIC)
    assert [*parser.feed(messages[2]["content"]), *parser.finish()] == [
        Called(0, "get"),
        Arguments(0, '{"n": 1}'),
        Called(1, "get"),
        Arguments(1, '{"n": 2}'),
    ]
    assert messages[3]["content"] == "<tool_response>\n7\n</tool_response>"
    assert folded([{"role": "user", "content": "Hi"}], TOOLS)[0] == {"role": "system", "content": notes}
    assert folded([{"role": "user", "content": "Hi"}], []) == [{"role": "user", "content": "Hi"}]


def test_a_template_that_has_calls_but_no_tools_keeps_its_calls() -> None:
    messages = [{"role": "assistant", "content": "", "tool_calls": [function("get", arguments={})]}]
    notes, *rest = folded(messages, TOOLS, DEEPSEEK)
    assert rest == messages
    assert DEEPSEEK.trigger in notes["content"]
    assert HERMES.trigger not in notes["content"]

"""Tool calls: what the grammar lets through, and what the parser makes of it however it is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from toy import ToyVocab

from edgespec.core import EdgespecError
from edgespec.models.prompting.grammar import GrammarCompiler, GrammarState
from edgespec.models.prompting.tool_calls import (
    GENERIC,
    HERMES,
    LLAMA,
    MISTRAL,
    Arguments,
    Called,
    CallParser,
    OutputEvent,
    Syntax,
    TextPiece,
    Tool,
    ToolChoice,
    call_text,
    folded,
    grammar,
    instructions,
    read_tools,
    syntax_of,
)

VOCAB = ToyVocab()
COMPILER = GrammarCompiler(VOCAB)
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    Tool("get_weather", "of a city", WEATHER),
    Tool("get", "a number", {"properties": {"n": {"const": 1}}}),
]
TOKENS = {"[TOOL_CALLS]": VOCAB.control}
FAMILIES = [HERMES, LLAMA, MISTRAL, GENERIC]
PARIS, ONE = '{"city": "Paris"}', '{"n": 1}'

every_family = pytest.mark.parametrize("syntax", FAMILIES, ids=[s.family for s in FAMILIES])


def written(syntax: Syntax, *calls: tuple[str, str]) -> str:
    """An answer of nothing but calls."""
    texts = [call_text(syntax, name, arguments) for name, arguments in calls]
    return syntax.begin + syntax.between.join(texts) + syntax.close


def start(syntax: Syntax, choice: ToolChoice, tools: Sequence[Tool] = TOOLS) -> GrammarState:
    source = grammar(syntax, tools, choice, TOKENS)
    assert source is not None
    return COMPILER.build(source).start()


def admitted(state: GrammarState, text: str) -> bool:
    """Whether `text` may be the whole answer."""
    before, special, after = text.partition("[TOOL_CALLS]")
    tokens = VOCAB.tokenize(before) + ([VOCAB.control] if special else []) + VOCAB.tokenize(after)
    return state.admits([*tokens, VOCAB.eos]) == len(tokens) + 1


@every_family
def test_a_call_may_be_made_or_not(syntax: Syntax) -> None:
    call = written(syntax, ("get_weather", PARIS))
    state = start(syntax, ToolChoice())
    for good in ("hello world", "a < b\nc", call):
        assert admitted(state, good)
    assert admitted(state, f"I look.\n{call}")
    for bad in (syntax.trigger, call[:-1], call.replace("city", "town"), call + " and so on"):
        assert not admitted(state, bad)
    assert admitted(state, call.replace("get_weather", "no_tool")) is False
    assert state.forced(9) == ()


@every_family
def test_a_call_may_be_required(syntax: Syntax) -> None:
    call = written(syntax, ("get_weather", PARIS))
    state = start(syntax, ToolChoice("required"))
    assert admitted(state, call)
    assert admitted(state, written(syntax, ("get", ONE)))
    assert not admitted(state, "hello world")
    assert not admitted(state, f"I look.\n{call}")
    assert state.forced(99)


@every_family
def test_a_call_may_be_named(syntax: Syntax) -> None:
    state = start(syntax, ToolChoice(named="get"))
    assert admitted(state, written(syntax, ("get", ONE)))
    assert not admitted(state, written(syntax, ("get_weather", PARIS)))
    assert not admitted(state, written(syntax, ("get", ONE), ("get", ONE)))
    forced = state.forced(99)
    for token in forced:
        state.accept(token)
    assert len(forced) > 10


@every_family
def test_calls_may_be_parallel(syntax: Syntax) -> None:
    two = written(syntax, ("get", ONE), ("get_weather", PARIS))
    for mode in ("auto", "required"):
        assert admitted(start(syntax, ToolChoice(mode)), two) is syntax.many
        assert not admitted(start(syntax, ToolChoice(mode, parallel=False)), two)
        assert admitted(start(syntax, ToolChoice(mode, parallel=False)), written(syntax, ("get", ONE)))


def test_none_is_no_grammar() -> None:
    assert grammar(HERMES, TOOLS, ToolChoice("none")) is None
    assert grammar(HERMES, [], ToolChoice("auto")) is None
    with pytest.raises(EdgespecError, match="no tools"):
        grammar(HERMES, [], ToolChoice("required"))
    with pytest.raises(EdgespecError, match="names other"):
        grammar(HERMES, TOOLS, ToolChoice(named="other"))
    with pytest.raises(EdgespecError, match=r"no token \[TOOL_CALLS\]"):
        grammar(MISTRAL, TOOLS, ToolChoice())


def test_only_strict_tools_are_refused_for_what_cannot_be_enforced() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "not": {"const": 1}}
    assert admitted(start(HERMES, ToolChoice(), [Tool("f", "", odd)]), written(HERMES, ("f", '{"a": "x"}')))
    with pytest.raises(EdgespecError, match="not"):
        start(HERMES, ToolChoice(), [Tool("f", "", odd, strict=True)])
    with pytest.raises(EdgespecError, match="the schema of f has multipleOf"):
        start(HERMES, ToolChoice(), [Tool("f", "", {"multipleOf": 999_983})])


def test_arguments_are_an_object_whatever_the_schema_says() -> None:
    for schema in ({}, True, {"type": ["object", "null"]}):
        state = start(HERMES, ToolChoice("required"), [Tool("f", "", schema)])
        assert admitted(state, written(HERMES, ("f", "{}")))
        assert not admitted(state, written(HERMES, ("f", "null")))


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (None, GENERIC),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", GENERIC),
        ("{% if tools %}<tools></tools><tool_call></tool_call>{% endif %}", HERMES),
        ("{% if tools %}<tool_call><function=name></function></tool_call>{% endif %}", GENERIC),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS] [", MISTRAL),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]name[ARGS]", GENERIC),
        ('{% if tools %}{"name": n, "parameters": p}{% endif %}<|python_tag|>', LLAMA),
    ],
)
def test_the_template_tells_the_syntax(template: str | None, syntax: Syntax) -> None:
    assert syntax_of(template) is syntax


def function(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def test_tools_are_read_from_openais_form() -> None:
    read = read_tools([function("f", description="d", parameters=WEATHER, strict=True), function("g")])
    assert read[0] == Tool("f", "d", WEATHER, True)
    assert read[1].name == "g"
    assert admitted(start(HERMES, ToolChoice(named="g"), read), written(HERMES, ("g", "{}")))
    assert not admitted(start(HERMES, ToolChoice(named="g"), read), written(HERMES, ("g", '{"a": 1}')))


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


def merged(events: Sequence[OutputEvent]) -> list[OutputEvent]:
    """Events with the parts of one text, and of one call's arguments, put together."""
    result: list[OutputEvent] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            result[-1] = TextPiece(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            result[-1] = Arguments(event.index, last.text + event.text)
        else:
            result.append(event)
    return result


def parsed(syntax: Syntax, *parts: str) -> list[OutputEvent]:
    parser = CallParser(syntax)
    events = [event for part in parts for event in parser.feed(part)]
    assert all(not isinstance(event, TextPiece | Arguments) or event.text for event in events)
    return merged(events + parser.finish())


ODD = r'{"city": "a \"}{ b\\", "n": [{}, {"m": "]"}]}'
CALLS = [Called(0, "get_weather"), Arguments(0, PARIS), Called(1, "get"), Arguments(1, ODD)]
ANSWERS: list[tuple[Syntax, str, list[OutputEvent]]] = [
    (HERMES, "plain <text> with {braces}\n", [TextPiece("plain <text> with {braces}\n")]),
    (HERMES, written(HERMES, ("get_weather", PARIS), ("get", ODD)), CALLS),
    (
        HERMES,
        "I look.\n\n" + written(HERMES, ("get_weather", PARIS)) + "\n",
        [TextPiece("I look."), *CALLS[:2]],
    ),
    (
        HERMES,
        '<tool_call>{ "name" : "get_weather",\n "arguments":\n' + PARIS + " }</tool_call>\n\n"
        '<tool_call>\n{"name": "get", "arguments": ' + ODD + "}\n</tool_call>",
        CALLS,
    ),
    (HERMES, "a <tool_call> is a tag", [TextPiece("a <tool_call> is a tag")]),
    (HERMES, "cut <tool_ca", [TextPiece("cut <tool_ca")]),
    (HERMES, '<tool_call>\n{"name": "get_w', [TextPiece('<tool_call>\n{"name": "get_w')]),
    (HERMES, written(HERMES, ("get_weather", PARIS))[:-5], CALLS[:2]),
    (HERMES, HERMES.name + "get" + HERMES.middle + '{"n', [Called(0, "get"), Arguments(0, '{"n')]),
    (LLAMA, written(LLAMA, ("get_weather", PARIS)), CALLS[:2]),
    (LLAMA, "\n" + written(LLAMA, ("get_weather", PARIS)), CALLS[:2]),
    (
        LLAMA,
        'As {"name": "get", "parameters": {}} is',
        [TextPiece('As {"name": "get", "parameters": {}} is')],
    ),
    (LLAMA, '{"other": 1}', [TextPiece('{"other": 1}')]),
    (MISTRAL, written(MISTRAL, ("get_weather", PARIS), ("get", ODD)), CALLS),
    (MISTRAL, '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + PARIS + "}]", CALLS[:2]),
    (MISTRAL, "a [list] of [TOOL things", [TextPiece("a [list] of [TOOL things")]),
    (GENERIC, "Yes.\n" + written(GENERIC, ("get_weather", PARIS)), [TextPiece("Yes."), *CALLS[:2]]),
    (HERMES, "", []),
]  # fmt: skip


@pytest.mark.parametrize(("syntax", "text", "events"), ANSWERS)
def test_an_answer_is_parsed_the_same_however_it_comes(
    syntax: Syntax, text: str, events: list[OutputEvent]
) -> None:
    assert parsed(syntax, text) == events
    assert parsed(syntax, *text) == events
    for i in range(len(text)):
        assert parsed(syntax, text[:i], text[i:]) == events
        assert parsed(syntax, text[:i], text[i : i + 3], text[i + 3 :]) == events


@every_family
def test_a_name_is_told_as_soon_as_its_arguments_begin(syntax: Syntax) -> None:
    parser = CallParser(syntax)
    call = syntax.begin + syntax.name + "get" + syntax.middle
    assert parser.feed(call) == []
    assert parser.feed("{") == [Called(0, "get"), Arguments(0, "{")]
    assert parser.feed('"a": ') == [Arguments(0, '"a": ')]
    assert parser.feed('"}"}' + syntax.end) == [Arguments(0, '"}"}')]
    assert parser.finish() == []


def test_text_is_told_at_once() -> None:
    parser = CallParser(HERMES)
    assert parser.feed("one ") == [TextPiece("one")]
    assert parser.feed("two<") == [TextPiece(" two")]
    assert parser.feed("b>") == [TextPiece("<b>")]


def test_a_model_that_knows_no_tools_is_taught() -> None:
    told = instructions(TOOLS)
    for tool in TOOLS:
        assert json.dumps(tool.parameters) in told
    assert HERMES.trigger in told
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
    assert messages[0]["content"] == f"Be brief.\n\n{told}"
    assert parsed(GENERIC, messages[2]["content"]) == [
        Called(0, "get"),
        Arguments(0, '{"n": 1}'),
        Called(1, "get"),
        Arguments(1, '{"n": 2}'),
    ]
    assert messages[3]["content"] == "<tool_response>\n7\n</tool_response>"
    assert folded([{"role": "user", "content": "Hi"}], TOOLS)[0] == {"role": "system", "content": told}
    assert folded([{"role": "user", "content": "Hi"}], []) == [{"role": "user", "content": "Hi"}]

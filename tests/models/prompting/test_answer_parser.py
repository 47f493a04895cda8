"""What an answer consists of: text, reasoning and calls of every family, however it is cut."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgespec.models.prompting.answer_parser import AnswerParser
from edgespec.models.prompting.call_forms import JsonCall, ListedCall, Syntax, TaggedCall, written
from edgespec.models.prompting.call_syntax import (
    GENERIC,
    GLM,
    HARMONY,
    HERMES,
    LFM,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    QWEN_CODER,
    SYNTAXES,
)
from edgespec.models.prompting.output_events import (
    Arguments,
    Called,
    OutputEvent,
    ReasoningPiece,
    TextPiece,
)
from edgespec.models.prompting.reasoning import ALL_THOUGHTS, THINK, Thoughts
from edgespec.models.prompting.reasoning import HARMONY as CHANNELS
from edgespec.models.prompting.tool_calls import Tool

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [Tool("get_weather", "of a city", WEATHER), Tool("get", "a number", {})]
PARIS = {"city": "Paris"}
ODD = {"city": 'a "}{ b\\', "n": [{}, {"m": "]"}]}

every_family = pytest.mark.parametrize("syntax", SYNTAXES, ids=[s.family for s in SYNTAXES])


def merged(events: Sequence[OutputEvent]) -> list[OutputEvent]:
    """Events with the parts of one text, and of one call's arguments, put together."""
    result: list[OutputEvent] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            result[-1] = Arguments(event.index, last.text + event.text)
        elif isinstance(event, TextPiece | ReasoningPiece) and type(last) is type(event):
            assert isinstance(last, TextPiece | ReasoningPiece)
            result[-1] = type(event)(last.text + event.text)
        else:
            result.append(event)
    return result


def parsed(parser: AnswerParser, *parts: str, cut: bool = False) -> list[OutputEvent]:
    events = [event for part in parts for event in parser.feed(part)] + parser.finish(cut=cut)
    assert all(isinstance(event, Called) or event.text for event in events)
    return merged(events)


def always(text: str, *args: Any, cut: bool = False) -> list[OutputEvent]:
    """The events in `text`, the same however it comes."""
    events = parsed(AnswerParser(*args), text, cut=cut)
    assert parsed(AnswerParser(*args), *text, cut=cut) == events
    for i in range(len(text)):
        assert parsed(AnswerParser(*args), text[:i], text[i:], cut=cut) == events
        assert parsed(AnswerParser(*args), text[:i], text[i : i + 3], text[i + 3 :], cut=cut) == events
    return events


def calls_in(events: Sequence[OutputEvent]) -> list[tuple[str, Any]]:
    found = [[event.name, ""] for event in events if isinstance(event, Called)]
    for event in events:
        if isinstance(event, Arguments):
            found[event.index][1] += event.text
    return [(name, json.loads(text)) for name, text in found]


def texts(events: Sequence[OutputEvent], kind: type[TextPiece | ReasoningPiece] = TextPiece) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def channels(syntax: Syntax) -> Thoughts | None:
    return CHANNELS if syntax.headers else None


CALLS = [
    Called(0, "get_weather"),
    Arguments(0, json.dumps(PARIS)),
    Called(1, "get"),
    Arguments(1, json.dumps(ODD)),
]
ANSWERS: list[tuple[Syntax, str, list[OutputEvent]]] = [
    (HERMES, "plain <text> with {braces}\n", [TextPiece("plain <text> with {braces}\n")]),
    (HERMES, written(HERMES, [("get_weather", PARIS), ("get", ODD)]), CALLS),
    (
        HERMES,
        "I look.\n\n" + written(HERMES, [("get_weather", PARIS)]) + "\n",
        [TextPiece("I look."), *CALLS[:2]],
    ),
    (
        HERMES,
        '<tool_call>{ "name" : "get_weather",\n "arguments":\n' + json.dumps(PARIS) + " }</tool_call>\n\n"
        '<tool_call>\n{"name": "get", "arguments": ' + json.dumps(ODD) + "}\n</tool_call>",
        CALLS,
    ),
    (HERMES, "a <tool_call> is a tag", [TextPiece("a <tool_call> is a tag")]),
    (HERMES, "cut <tool_ca", [TextPiece("cut <tool_ca")]),
    (HERMES, '<tool_call>\n{"name": "get_w', [TextPiece('<tool_call>\n{"name": "get_w')]),
    (HERMES, written(HERMES, [("get_weather", PARIS)])[:-5], CALLS[:2]),
    (HERMES, written(HERMES, [("get_weather", PARIS)]) + "\nDone.", [*CALLS[:2], TextPiece("Done.")]),
    (HERMES, '<tool_call>{"arguments": {}, "name": "get"}', [Called(0, "get"), Arguments(0, "{}")]),
    (HERMES, '<tool_call>{"name": "get"}</tool_call>', [Called(0, "get"), Arguments(0, "{}")]),
    (
        HERMES,
        '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}',
        [Called(0, "get"), Arguments(0, '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "x", "id": ', [TextPiece('<tool_call>{"name": "x", "id": ')]),
    (LLAMA, written(LLAMA, [("get_weather", PARIS)]), CALLS[:2]),
    (LLAMA, "\n" + written(LLAMA, [("get_weather", PARIS)]), CALLS[:2]),
    (LLAMA, "<|python_tag|>" + written(LLAMA, [("get_weather", PARIS)]), CALLS[:2]),
    (
        LLAMA,
        'As {"name": "get", "parameters": {}} is',
        [TextPiece('As {"name": "get", "parameters": {}} is')],
    ),
    (LLAMA, '{"other": 1}', [TextPiece('{"other": 1}')]),
    (MISTRAL, written(MISTRAL, [("get_weather", PARIS), ("get", ODD)]), CALLS),
    (MISTRAL, '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + json.dumps(PARIS) + "}]", CALLS[:2]),
    (MISTRAL, "a [list] of [TOOL things", [TextPiece("a [list] of [TOOL things")]),
    (MISTRAL_ARGS, '[TOOL_CALLS]get[CALL_ID]x1[ARGS]{"a": 1}', [Called(0, "get"), Arguments(0, '{"a": 1}')]),
    (GENERIC, "Yes.\n" + written(GENERIC, [("get_weather", PARIS)]), [TextPiece("Yes."), *CALLS[:2]]),
    (QWEN_CODER, "<function=get>\n</function>", [Called(0, "get"), Arguments(0, "{}")]),
    (QWEN_CODER, written(HERMES, [("get_weather", PARIS)]), CALLS[:2]),
    (
        GLM,
        "<tool_call>get<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
        [Called(0, "get"), Arguments(0, '{"a": 1}')],
    ),
    (
        LFM,
        "<|tool_call_start|>[get(a='it\\'s', b=[True, None, -2.5], c={'d': (1,)})]<|tool_call_end|>",
        [
            Called(0, "get"),
            Arguments(0, '{"a": "it\'s", "b": [true, null, -2.5], "c": {"d": [1]}}'),
        ],
    ),
    (HERMES, "", []),
]  # fmt: skip


@pytest.mark.parametrize(("syntax", "text", "events"), ANSWERS)
def test_an_answer_is_parsed_the_same_however_it_comes(
    syntax: Syntax, text: str, events: list[OutputEvent]
) -> None:
    assert always(text, syntax, None, TOOLS) == events


@every_family
def test_a_name_is_reported_as_soon_as_its_arguments_begin(syntax: Syntax) -> None:
    parser = AnswerParser(syntax, channels(syntax))
    if isinstance(syntax.form, TaggedCall):
        start, rest = syntax.start + syntax.open + syntax.form.head("get"), syntax.form.key + "a"
    elif isinstance(syntax.form, ListedCall):
        start, rest = syntax.start + syntax.open + syntax.form.head("get") + "a", syntax.form.assign
    else:
        start, rest = syntax.start + syntax.open + syntax.form.head("get"), "{"
    assert parser.feed(start) == []
    assert parser.feed(rest)[:1] == [Called(0, "get")]


def test_arguments_are_reported_at_once() -> None:
    parser = AnswerParser(HERMES)
    parser.feed('<tool_call>{"name": "get", "arguments": {')
    assert parser.feed('"a": ') == [Arguments(0, '"a": ')]
    assert parser.feed('"}"}}') == [Arguments(0, '"}"}')]
    parser = AnswerParser(QWEN_CODER, None, [Tool("get_weather", "", WEATHER)])
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\n")
    assert parser.feed('"New') == [Arguments(0, '\\"New')]
    assert parser.feed(" York\n") == [Arguments(0, " York")]
    assert parser.feed("</parameter>\n</function>") == [Arguments(0, '"}')]


def test_text_is_reported_at_once() -> None:
    parser = AnswerParser(HERMES, None, TOOLS)
    assert parser.feed("one ") == [TextPiece("one")]
    assert parser.feed("two<") == [TextPiece(" two")]
    assert parser.feed("b>") == [TextPiece("<b>")]


# Calls as models write them


CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
LOOSE = [
    CALL,
    f"\n{CALL}\n",
    f"```json\n{CALL}\n```",
    f"```\n{CALL}\n```\n",
    f"<tools>\n{CALL}\n</tools>",
    f"```xml\n<tools>\n{CALL}\n</tools>\n```",
    f"[{CALL}]",
    '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    '{"arguments": {"city": "Paris"}, "name": "get_weather"}',
    '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}',
    '{"function": "get_weather", "arguments": {"city": "Paris"}}',
    '{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}',
    '{\n  "name": "get_weather",\n  "arguments": {\n    "city": "Paris"\n  }\n}',
]


@pytest.mark.parametrize("text", LOOSE)
@pytest.mark.parametrize("syntax", [HERMES, QWEN_CODER, MISTRAL_ARGS, LLAMA], ids=lambda one: one.family)
def test_an_answer_that_is_nothing_but_a_call_is_one_in_any_spelling(syntax: Syntax, text: str) -> None:
    events = always(text, syntax, None, TOOLS)
    assert calls_in(events) == [("get_weather", PARIS)]
    assert texts(events) == ""


def test_several_calls_in_any_spelling() -> None:
    for text in (f"{CALL}\n{CALL}", f"[{CALL}, {CALL}]", f"```json\n{CALL}\n```\n\n```json\n{CALL}\n```"):
        assert calls_in(always(text, HERMES, None, TOOLS)) == [("get_weather", PARIS)] * 2


@pytest.mark.parametrize(
    "text",
    [
        f"For example:\n```json\n{CALL}\n```",
        f"```json\n{CALL}\n```\nThis asks for the weather.",
        f"{CALL} and so on",
        CALL.replace("get_weather", "get_time"),
        CALL.replace('"Paris"', "7"),
        CALL.replace("city", "town"),
        CALL[:-2],
        CALL.replace('"name"', '"title": 1, "name"'),
        '{"name": "Ada", "age": 36}',
        '```python\nprint("x")\n```',
        "<tools>none</tools>",
        "[1, 2]",
        "{}",
        "```",
    ],
)
def test_what_is_not_only_calls_that_fit_is_text(text: str) -> None:
    assert always(text, HERMES, None, TOOLS) == [TextPiece(text)]


def test_text_is_held_back_only_while_it_may_be_a_call() -> None:
    for text, last in [
        ('{"name": "A', "da"), ('{"', "age"), ("```python\np", "r"), ("[", "1"), ("<t", "d"), ("`", "x"),
    ]:  # fmt: skip
        parser = AnswerParser(HERMES, None, TOOLS)
        notes = texts([event for c in text for event in parser.feed(c)])
        more = texts(parser.feed(last + '"'))
        assert (notes + more).startswith((text + last)[: len(text) + 1])
    parser = AnswerParser(HERMES, None, TOOLS)
    assert parser.feed(CALL) == []
    assert parser.feed(" is") == [TextPiece(CALL + " is")]


def test_a_call_without_tools_is_text() -> None:
    assert always(CALL, None, None, ()) == [TextPiece(CALL)]


def test_what_a_limit_cuts() -> None:
    head = '<tool_call>\n{"name": "get_w'
    assert always("I look.\n" + head, HERMES, None, TOOLS, cut=True)[0] == TextPiece("I look.")
    assert "tool_call" not in texts(always(head, HERMES, None, TOOLS, cut=True))
    for text in (f"<tool_call>{CALL[:-6]}", CALL[:-6], f"```json\n{CALL[:-6]}"):
        events = always(text, HERMES, None, TOOLS, cut=True)
        assert events == [Called(0, "get_weather"), Arguments(0, '{"city": "Pa')]
    tagged = written(QWEN_CODER, [("get_weather", PARIS)])
    cut = always(tagged[: tagged.index("ris")], QWEN_CODER, None, TOOLS, cut=True)
    assert cut == [Called(0, "get_weather"), Arguments(0, '{"city": "Pa')]
    assert always('{"a": 1', HERMES, None, TOOLS, cut=True) == [TextPiece('{"a": 1')]


# Reasoning


@pytest.mark.parametrize("thoughts", ALL_THOUGHTS, ids=lambda one: one.open.strip())
def test_reasoning_is_reported_apart(thoughts: Thoughts) -> None:
    if thoughts.headers:
        start, body = thoughts.headers[0], thoughts.body
        opened, first = start, f" {thoughts.open}{body}"
        answer = f"{thoughts.close}{start} final{body}It is 4.{thoughts.dropped[0]}"
    else:
        opened, first, answer = thoughts.open, "", f"{thoughts.close}\n\nIt is 4."
    expected = [ReasoningPiece("2 and 2,\n<b>"), TextPiece("It is 4.")]
    assert always(f"{opened}{first}\n2 and 2,\n<b>\n{answer}", None, thoughts) == expected
    assert always(f"{first}\n2 and 2,\n<b>\n{answer}", None, thoughts, (), opened) == expected
    assert always(f"{first}2 and", None, thoughts, (), opened) == [ReasoningPiece("2 and")]


def test_marks_in_the_middle_of_text_are_text() -> None:
    text = "It writes <think>\nand </think> around it."
    assert always(text, HERMES, THINK, TOOLS) == [TextPiece(text)]


def test_calls_follow_reasoning() -> None:
    call = written(HERMES, [("get_weather", PARIS)])
    for spelled in (call, CALL, f"```json\n{CALL}\n```"):
        events = always(f"<think>\nNo <tool_call> yet.\n</think>\n\n{spelled}", HERMES, THINK, TOOLS)
        assert events == [ReasoningPiece("No <tool_call> yet."), *CALLS[:2]]


def test_channels() -> None:
    call = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}'
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for text in (thought + call, thought + written(HARMONY, [("get_weather", PARIS)])):
        events = always(text, HARMONY, CHANNELS, TOOLS, "<|start|>assistant")
        assert events == [ReasoningPiece("Hm."), *CALLS[:2]]
    final = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    assert texts(always(thought + final, HARMONY, CHANNELS, TOOLS, "<|start|>assistant")) == "I look.Yes."
    unknown = ' to=functions.other<|channel|>commentary json<|message|>{"a": 1}'
    assert always(unknown, HARMONY, CHANNELS, TOOLS, "<|start|>assistant") == [TextPiece('{"a": 1}')]


def test_whether_it_is_thinking() -> None:
    parser = AnswerParser(None, THINK, (), "<think>")
    assert parser.thinking
    parser.feed("hm</thi")
    assert parser.thinking
    parser.feed("nk>")
    assert not parser.thinking


# Whatever comes

MARKS = sorted(
    {text for s in SYNTAXES for text in s.texts() if text} | {"\n", " ", "{", '"', "```json\n", "é😀"}
)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=5,
)
STRINGS = st.lists(st.text(max_size=5) | st.sampled_from(MARKS), max_size=4).map("".join)


def cut_up(text: str, lengths: Sequence[int]) -> list[str]:
    parts, at = [], 0
    for length in lengths:
        parts.append(text[at : at + length])
        at += length
    return [*parts, text[at:]]


def writable(syntax: Syntax, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments without what the syntax cannot write: its own marks within strings that are not escaped."""
    form = syntax.form
    if isinstance(form, TaggedCall):
        marks = [form.close.format(key=key).strip() for key in arguments]
        return {
            key: value
            for key, value in arguments.items()
            if not isinstance(value, str)
            or not any(mark in value or mark.startswith(value[-1:] or " ") for mark in marks)
        }
    if isinstance(form, ListedCall) and form.quote:
        return {k: v for k, v in arguments.items() if form.quote not in json.dumps(v).replace('\\"', '"')}
    return arguments


@every_family
@given(
    st.lists(st.dictionaries(KEYS, STRINGS | VALUES, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), max_size=30),
    st.booleans(),
)
def test_calls_with_any_arguments_are_read_as_they_were_written(
    syntax: Syntax, many: list[dict[str, Any]], lengths: list[int], prose: bool
) -> None:
    calls = [("get", writable(syntax, arguments)) for arguments in many[: None if syntax.many else 1]]
    properties = {
        key: {"type": "string"} if isinstance(value, str) else {}
        for _, arguments in calls
        for key, value in arguments.items()
    }
    # A schema distinguishes strings from JSON; a name with both kinds would leave that open.
    calls = [
        (name, {k: v for k, v in arguments.items() if isinstance(v, str) == ("type" in properties[k])})
        for name, arguments in calls
    ]
    text = ("Let me see.\n" if prose and not syntax.alone else "") + written(syntax, calls)
    parser = AnswerParser(syntax, channels(syntax), [Tool("get", "", {"properties": properties})])
    events = parsed(parser, *cut_up(text, lengths))
    assert calls_in(events) == calls
    assert texts(events) == ("Let me see." if prose and not syntax.alone else "")


TEXT = st.lists(st.text(max_size=6) | st.sampled_from(MARKS), max_size=12).map("".join)


@every_family
@given(TEXT, st.lists(st.integers(1, 9), max_size=30))
@example('<tool_call><tool_call>{"name": ""}', [])
@example("```json\n[{", [1, 1])
def test_text_loses_no_character(syntax: Syntax, text: str, lengths: list[int]) -> None:
    parser = AnswerParser(syntax, None, [Tool("a-tool-that-is-never-named", "", {})])
    kept = text.replace(syntax.text, "") if syntax.text else text
    found = texts(parsed(parser, *cut_up(text, lengths)))
    assert found == kept or syntax.text


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", '<tool_call>{"name": "', "<tool_call>{", "<", " \n", "```", "[", '{"name": "get", ',
        '<tool_call>{"name": "get", "arguments": {"a": "', "x", "<think>", '{"function":', "</tool_call>",
        "<tool_call><function=get><parameter=a>", '<tool_call>{"arguments": [',
    ],
)  # fmt: skip
@pytest.mark.parametrize("syntax", [HERMES, QWEN_CODER, LFM, LLAMA], ids=lambda one: one.family)
@pytest.mark.parametrize("whole", [True, False])
def test_parsing_takes_time_in_proportion(syntax: Syntax, text: str, whole: bool) -> None:
    def seconds(size: int) -> float:
        parser, start = AnswerParser(syntax, THINK, TOOLS), time.process_time()
        answer = (text * (size // len(text) + 1))[:size]
        for part in [answer] if whole else cut_up(answer, [4] * (size // 4)):
            parser.feed(part)
        parser.finish()
        return time.process_time() - start

    small, large = min(seconds(4_000) for _ in range(3)), seconds(64_000)
    assert large < 16 * small * 4 + 0.02


def test_json_that_is_nested_without_end_is_no_error() -> None:
    for text in ('{"function":' * 3000, "[" * 3000, '{"name": "get", "arguments": ' + "[" * 3000):
        for syntax in (HERMES, LFM, LLAMA):
            parsed(AnswerParser(syntax, None, TOOLS), text)
    parser = AnswerParser(LFM)
    parsed(parser, "<|tool_call_start|>[get(a=" + "[" * 3000)
    assert isinstance(HERMES.form, JsonCall)

"""Grammars of tool calls: what they let through, in the syntax of every family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from toy import ToyVocab

from edgespec.core import EdgespecError
from edgespec.models.prompting.answer_parser import AnswerParser
from edgespec.models.prompting.call_forms import Syntax, written
from edgespec.models.prompting.call_grammar import after_reasoning, grammar
from edgespec.models.prompting.call_syntax import (
    GLM,
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    SYNTAXES,
)
from edgespec.models.prompting.grammar import GrammarCompiler, GrammarState
from edgespec.models.prompting.output_events import Arguments, Called
from edgespec.models.prompting.schema_exact import json_rule
from edgespec.models.prompting.tool_calls import Tool, ToolChoice

VOCAB = ToyVocab()
COMPILER = GrammarCompiler(VOCAB)
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    Tool("get_weather", "of a city", WEATHER),
    Tool("get", "a number", {"properties": {"n": {"const": 1}}}),
]
TOKENS = {"[TOOL_CALLS]": VOCAB.control}
PARIS, ONE = ("get_weather", {"city": "Paris"}), ("get", {"n": 1})

every_family = pytest.mark.parametrize("syntax", SYNTAXES, ids=[s.family for s in SYNTAXES])


def start(
    syntax: Syntax, choice: ToolChoice, tools: Sequence[Tool] = TOOLS, before: str = ""
) -> GrammarState:
    source = grammar(syntax, tools, choice, TOKENS, before)
    assert source is not None
    return COMPILER.build(source).start()


def admitted(state: GrammarState, text: str) -> bool:
    """Whether `text` may be the whole answer."""
    tokens: list[int] = []
    for i, part in enumerate(text.split("[TOOL_CALLS]")):
        tokens += ([VOCAB.control] if i else []) + VOCAB.tokenize(part)
    return state.admits([*tokens, VOCAB.eos]) == len(tokens) + 1


@every_family
def test_a_call_may_be_made_or_not(syntax: Syntax) -> None:
    if syntax.headers:
        assert grammar(syntax, TOOLS, ToolChoice()) is None
        return
    call = written(syntax, [PARIS])
    state = start(syntax, ToolChoice())
    for good in ("hello world", "a < b\nc", call):
        assert admitted(state, good), good
    assert admitted(state, f"I look.\n{call}")
    for bad in (syntax.trigger, call.replace("city", "town"), call + " and so on"):
        assert not admitted(state, bad), bad
    assert not admitted(state, call.replace("get_weather", "no_tool"))
    assert state.forced(9) == ()


@every_family
def test_a_call_may_be_required(syntax: Syntax) -> None:
    state = start(syntax, ToolChoice("required"))
    assert admitted(state, written(syntax, [PARIS]))
    assert admitted(state, written(syntax, [ONE]))
    assert not admitted(state, "hello world")
    assert not admitted(state, f"I look.\n{written(syntax, [PARIS])}")
    assert state.forced(99) or syntax.headers


@every_family
def test_a_call_may_be_named(syntax: Syntax) -> None:
    state = start(syntax, ToolChoice(named="get"))
    assert admitted(state, written(syntax, [ONE]))
    assert not admitted(state, written(syntax, [PARIS]))
    assert not admitted(state, written(syntax, [ONE, ONE]))


@every_family
def test_calls_may_be_parallel(syntax: Syntax) -> None:
    two = written(syntax, [ONE, PARIS])
    assert admitted(start(syntax, ToolChoice("required")), two) is syntax.many
    assert not admitted(start(syntax, ToolChoice("required", parallel=False)), two)
    assert admitted(start(syntax, ToolChoice("required", parallel=False)), written(syntax, [ONE]))


SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "most": {"type": "integer"},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
    },
    "required": ["unit"],
    "$defs": {"tag": {"enum": ["a", "b"]}},
}


@every_family
@pytest.mark.parametrize(
    "arguments",
    [
        {"unit": "C"},
        {"text": 'a "<b>"\n{c', "unit": "F"},
        {"unit": "F", "most": -3},
        {"text": "", "unit": "C", "most": 7, "tags": ["b", "a"]},
    ],
)
def test_what_the_grammar_admits_is_parsed_as_the_arguments(syntax: Syntax, arguments: Any) -> None:
    tools = [Tool("f", "", SCHEMA)]
    text = written(syntax, [("f", arguments)])
    # Within a value, the grammar has JSON where Gemma has signs of its own; the parser reads both.
    text = text.replace('[<|"|>b<|"|>,<|"|>a<|"|>]', '["b", "a"]')
    assert admitted(start(syntax, ToolChoice("required"), tools), text), text
    assert not admitted(start(syntax, ToolChoice("required"), tools), text.replace("unit", "other"))
    parser = AnswerParser(syntax, None, tools)
    events = [*parser.feed(text), *parser.finish()] if not syntax.headers else []
    found = "".join(event.text for event in events if isinstance(event, Arguments))
    assert syntax.headers or (events[0] == Called(0, "f") and json.loads(found) == arguments)


@pytest.mark.parametrize("syntax", [HERMES, LLAMA, GLM, MISTRAL], ids=lambda one: one.family)
def test_calls_follow_reasoning_that_the_prompt_has_opened(syntax: Syntax) -> None:
    call = written(syntax, [PARIS])
    for choice in (ToolChoice(), ToolChoice("required")):
        state = start(syntax, choice, before="</think>")
        assert admitted(state, f"I might call <tool_call>, or not.</think>\n\n{call}")
        assert not admitted(state, call)
        assert admitted(state, "Hm.</think> Hello") is (choice.mode == "auto")


def test_json_follows_reasoning_that_the_prompt_has_opened() -> None:
    state = COMPILER.build(after_reasoning(json_rule("start", {"const": 1}), "</think>", {})).start()
    assert admitted(state, "Is it 2? No.</think>\n1")
    assert not admitted(state, "1")
    assert not admitted(state, "Yes.</think>2")
    free = COMPILER.build(
        after_reasoning(json_rule("start", {"type": "object"}), "[TOOL_CALLS]", TOKENS)
    ).start()
    assert admitted(free, 'Hm. [TOOL_CALLS]{"a": 1}')


def test_reasoning_may_precede_a_required_call_with_headers() -> None:
    call = written(HARMONY, [PARIS])
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    tokens = {"<|end|>": VOCAB.control}
    source = grammar(HARMONY, TOOLS, ToolChoice("required"), tokens)
    assert source is not None
    state = COMPILER.build(source).start()
    assert admitted(state, call)
    assert admitted(state, (thought + call).replace("<|end|>", "[TOOL_CALLS]"))


def test_none_is_no_grammar() -> None:
    assert grammar(HERMES, TOOLS, ToolChoice("none")) is None
    assert grammar(HERMES, [], ToolChoice("auto")) is None
    with pytest.raises(EdgespecError, match="no tools"):
        grammar(HERMES, [], ToolChoice("required"))
    with pytest.raises(EdgespecError, match="names other"):
        grammar(HERMES, TOOLS, ToolChoice(named="other"))


def test_only_strict_tools_are_refused_for_what_cannot_be_enforced() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "not": {"const": 1}}
    assert admitted(start(HERMES, ToolChoice(), [Tool("f", "", odd)]), written(HERMES, [("f", {"a": "x"})]))
    with pytest.raises(EdgespecError, match="not"):
        start(HERMES, ToolChoice(), [Tool("f", "", odd, strict=True)])
    with pytest.raises(EdgespecError, match="the schema of f has multipleOf"):
        start(HERMES, ToolChoice(), [Tool("f", "", {"multipleOf": 999_983})])


def test_arguments_are_an_object_whatever_the_schema_says() -> None:
    for schema in ({}, True, {"type": ["object", "null"]}):
        state = start(HERMES, ToolChoice("required"), [Tool("f", "", schema)])
        assert admitted(state, written(HERMES, [("f", {})]))
        assert not admitted(state, written(HERMES, [("f", {})]).replace("{}", "null"))

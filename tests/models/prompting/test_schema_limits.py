"""Schemas that a grammar cannot keep: what is left of them, which part is named, and numbers above 2^53."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from toy import ToyVocab

from edgespec.core import EdgespecError
from edgespec.models.prompting.grammar import Grammar, GrammarCompiler
from edgespec.models.prompting.schema_exact import _range, either, json_rule
from edgespec.models.prompting.schema_limits import fault, loosened

VOCAB = ToyVocab()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCAB)  # type: ignore[arg-type]


def properties(**given: Any) -> dict[str, Any]:
    return {"type": "object", "properties": given, "required": list(given)}


def admits(grammar: Grammar, text: str) -> bool:
    state, tokens = grammar.start(), VOCAB.tokenize(text)
    return state.admits([*tokens, VOCAB.eos]) == len(tokens) + 1


GOOD = {"type": "string", "maxLength": 3}
LOOKAHEAD = {"type": "string", "pattern": "^(?!x).*$", "maxLength": 3}
PARTS: list[tuple[dict[str, Any], Any]] = [
    (properties(a=GOOD), properties(a=GOOD)),
    (properties(a=LOOKAHEAD, b=GOOD), properties(a=GOOD, b=GOOD)),
    (properties(a={"type": "string", "pattern": "^[a-z]{1,4096}$"}), properties(a={"type": "string"})),
    (properties(a={"$ref": "https://example.org/x"}, b=GOOD), properties(a={}, b=GOOD)),
    (properties(a={"type": "array", "items": LOOKAHEAD}), properties(a={"type": "array", "items": GOOD})),
    (properties(a=properties(b=LOOKAHEAD, c=GOOD)), properties(a=properties(b=GOOD, c=GOOD))),
    (
        properties(a={"anyOf": [LOOKAHEAD, {"type": "null"}]}),
        properties(a={"anyOf": [GOOD, {"type": "null"}]}),
    ),
    (properties(a={"type": "strin"}, b=GOOD), properties(a={}, b=GOOD)),
    (properties(a={"type": "string", "minLength": 5, "maxLength": 3}), None),
    (properties(a={"type": "number", "minimum": 1e300}), properties(a={"type": "number"})),
    (
        {"$defs": {"n": LOOKAHEAD}, **properties(a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"})},
        {"$defs": {"n": GOOD}, **properties(a={"$ref": "#/$defs/n"}, b={"$ref": "#/$defs/n"})},
    ),
]


@pytest.mark.parametrize(("schema", "left"), PARTS, ids=lambda value: str(value)[:60])
def test_what_can_be_kept_is_kept(schema: dict[str, Any], left: Any, compiler: GrammarCompiler) -> None:
    refusal = partial(compiler.refusal, strict=False)
    found = loosened(schema, refusal)
    assert refusal(found) is None
    if left is not None:
        assert found == left


def test_the_time_for_a_schema_is_bounded() -> None:
    tried: list[Any] = []

    def refusal(schema: Any) -> str:
        tried.append(schema)
        return "no"

    wide = properties(**{f"p{i}": LOOKAHEAD for i in range(900)})
    assert loosened(wide, refusal) == {"type": "object"}
    assert len(tried) < 500


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    (properties(b=GOOD, a=LOOKAHEAD), "a", "its pattern '^(?!x).*$' is more than grammars can follow"),
    (properties(a=properties(b={"type": "array", "items": LOOKAHEAD})), "a.b[]", "pattern"),
    (properties(a={"type": "array", "uniqueItems": True}), "a", "uniqueItems"),
    (properties(a={"not": {"type": "string"}}), "a", "not"),
    (properties(a={"$ref": "https://example.org/x"}), "a", "https://example.org/x"),
    (
        properties(a={"const": 9007199254740993, "minLength": 1}),
        "a",
        "const with whole numbers above 2^53",
    ),
    ({**properties(a=GOOD), "propertyNames": {"maxLength": 3}}, "", "propertyNames"),
]


@pytest.mark.parametrize(("schema", "path", "cause"), FAULTS, ids=lambda value: str(value)[:60])
def test_a_fault_is_named(schema: dict[str, Any], path: str, cause: str, compiler: GrammarCompiler) -> None:
    found, reason = fault(schema, partial(compiler.refusal, strict=True))
    assert found == path
    assert cause in reason


MOST = 9223372036854774784
INTEGERS: list[tuple[dict[str, Any], list[int], list[int]]] = [
    ({}, [0, -5, MOST, -MOST], [10**19, 10**120, -(10**19)]),
    ({"minimum": -(2**63), "maximum": 2**63 - 1}, [0, 2**63 - 1, -(2**63)], [2**63, -(2**63) - 1]),
    ({"minimum": 0, "maximum": 2**64 - 1}, [0, MOST, 2**64 - 1], [-1, 2**64]),
    ({"minimum": 2**53 + 1}, [2**53 + 1, 2**53 + 2, 2**60], [2**53, 2**53 - 5, 0]),
    ({"maximum": 2**53 + 1}, [2**53, 2**53 + 1, -3, 0], [2**53 + 2, 2**54]),
    ({"exclusiveMinimum": 2**60}, [2**60 + 256], [2**60, 2**60 - 1]),
    ({"exclusiveMinimum": 2**60 + 1}, [2**60 + 2], [2**60 + 1, 2**60]),
    ({"exclusiveMaximum": 2**60 + 1}, [2**60, -7], [2**60 + 1, 2**60 + 2]),
    ({"minimum": 9007199254740993, "maximum": 9007199254740993}, [9007199254740993], [9007199254740992]),
    ({"minimum": -9007199254740995, "maximum": -17}, [-17, -9007199254740995], [-16, -9007199254740996, 5]),
]


@pytest.mark.parametrize(("bounds", "inside", "outside"), INTEGERS, ids=str)
def test_bounds_of_64_bits(
    bounds: dict[str, Any], inside: list[int], outside: list[int], compiler: GrammarCompiler
) -> None:
    for part in ({}, {"description": "d"}):
        grammar = compiler.compile("json_schema", properties(a={"type": "integer", **bounds, **part}))
        for value in inside:
            assert admits(grammar, json.dumps({"a": value})), value
        for value in outside:
            assert not admits(grammar, json.dumps({"a": value})), value


@given(st.integers(-(10**19), 10**19), st.integers(-(10**19), 10**19), st.integers(-(10**19), 10**19))
@example(-10, 105, 7)
@example(99, 1000, 999)
def test_a_range_of_whole_numbers(one: int, other: int, value: int) -> None:
    low, high = sorted((one, other))
    expression = re.compile(_range(low, high))
    for number in (value, low, high, low - 1, high + 1, (low + high) // 2):
        assert bool(expression.fullmatch(str(number))) == (low <= number <= high)
    assert not expression.fullmatch(f"0{abs(value)}")


ID = {"const": 9007199254740993}
EXACT: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"enum": [1234567890123456789, "x"]}, [1234567890123456789, "x"], [1234567890123456768, 5, "y"]),
    (ID, [9007199254740993], [9007199254740992, 9007199254740994]),
    ({"enum": [{"id": 9007199254740993}, None]}, [{"id": 9007199254740993}, None], [{"id": 1}]),
    ({"type": "array", "items": ID}, [[], [9007199254740993] * 2], [[1], [9007199254740992]]),
    ({"type": "array", "items": ID, "minItems": 1}, [[9007199254740993]], [[]]),
    ({"anyOf": [ID, {"type": "boolean"}]}, [9007199254740993, True], [9007199254740992]),
    (
        {"type": "object", "properties": {"m": {"type": "boolean"}, "n": ID, "o": {}}, "required": ["n"]},
        [
            {"n": 9007199254740993},
            {"m": True, "n": 9007199254740993, "o": "z"},
            {"n": 9007199254740993, "o": 1},
        ],
        [{}, {"m": True}, {"n": 9007199254740993, "m": True}, {"n": 9007199254740993, "p": 1}],
    ),
]


@pytest.mark.parametrize(("part", "inside", "outside"), EXACT, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("form", ["tool", "schema", "reference"])
def test_values_above_2_to_53_are_exact(
    part: dict[str, Any], inside: list[Any], outside: list[Any], form: str, compiler: GrammarCompiler
) -> None:
    schema = properties(a=part, b={"type": "boolean"})
    if form == "reference":
        schema = {
            "$defs": {"p": part, "q": {"type": "boolean"}},
            **properties(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/q"}),
        }
    if form == "tool":
        grammar = compiler.build(json_rule("start", schema, strict=False))
    else:
        grammar = compiler.compile("json_schema", schema)
    for value in inside:
        assert admits(grammar, json.dumps({"a": value, "b": True})), value
    for value in outside:
        assert not admits(grammar, json.dumps({"a": value, "b": True})), value


def test_what_cannot_be_exact_is_refused_or_left_to_the_client(compiler: GrammarCompiler) -> None:
    odd = properties(a={"type": "array", "items": ID, "contains": {"type": "integer"}})
    with pytest.raises(EdgespecError, match=r"above 2\^53"):
        compiler.compile("json_schema", odd)
    grammar = compiler.build(json_rule("start", odd, strict=False))
    assert admits(grammar, '{"a": [9007199254740993]}')


def test_either_a_format_or_calls(compiler: GrammarCompiler) -> None:
    calls = 'start: "<tool_call>" call\ncall: "f" | "g"'
    grammar = compiler.build(either(("json_schema", properties(a={"type": "boolean"})), calls))
    assert admits(grammar, '{"a": true}')
    assert admits(grammar, "<tool_call>g")
    assert not admits(grammar, "text")
    assert admits(compiler.build(either(("choice", ["ab", "name"]), calls)), "name")
    assert admits(compiler.build(either(("json_object", None), calls)), '{"x": 10}')
    with pytest.raises(EdgespecError, match="kind regex together with tools"):
        either(("regex", "a"), calls)


def test_hostile_schemas_take_no_time(compiler: GrammarCompiler) -> None:
    doubling = {
        f"d{i}": properties(a={"$ref": f"#/$defs/d{i + 1}"}, b={"$ref": f"#/$defs/d{i + 1}"})
        for i in range(60)
    }
    doubling["d60"] = ID
    cases: list[dict[str, Any]] = [
        {"$defs": doubling, "$ref": "#/$defs/d0"},
        {"$defs": {"p": {"anyOf": [{"$ref": "#/$defs/p"}, ID]}}, "$ref": "#/$defs/p"},
        properties(a={"type": "integer", "minimum": 9007199254740993, "exclusiveMinimum": True}),
        properties(a={"type": "integer", "minimum": 9007199254740993, "exclusiveMaximum": "x"}),
        properties(a={"$ref": "#/$defs/missing"}, b=ID),
        properties(a={"anyOf": [{}] * 20_000}, b=ID),
    ]
    for schema in cases:
        assert loosened(schema, partial(compiler.refusal, strict=False)) is not None

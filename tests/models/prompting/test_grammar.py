"""Grammars: what the masks let through is what was asked for; hostile ones are refused by name."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyVocab

from edgespec.core import EdgespecError
from edgespec.models.gguf.model import LlamaModel
from edgespec.models.prompting import grammar as module
from edgespec.models.prompting.grammar import Grammar, GrammarCompiler, GrammarState

VOCAB = ToyVocab()
TOY = GrammarCompiler(VOCAB)

CLOSED = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}

names = st.sampled_from(["a", "name", "é", 'q"', "ab c", "\\"])
leaves: st.SearchStrategy[Any] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "string", "maxLength": 3}),
    st.just({"type": "string", "pattern": "^[a-c]+x$"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-20, 20),
        st.integers(0, 9),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(names | st.integers(-5, 5), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, names),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda properties, chosen: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name in chosen],
        },
        st.dictionaries(names, inner, max_size=4),
        st.sets(names),
    )
    return st.one_of(arrays, objects, st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner))


schemas = st.recursive(leaves, larger, max_leaves=6)


def allowed(state: GrammarState) -> list[int]:
    mask = state.mask()
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return bits.nonzero()[0].tolist()


def walk(grammar: Grammar, choose: random.Random, vocab: Any = VOCAB, most: int = 400) -> list[int]:
    """Random tokens through the masks to an end token, in a hurry after a while. Checks what it passes."""
    state, tokens = grammar.start(), []
    while len(tokens) < most:
        ids = allowed(state)
        forced = state.forced(50)
        assert allowed(state) == ids  # asking changes nothing
        assert forced == () if len(ids) > 1 else forced[:1] == tuple(ids)
        if state.finished:
            assert all(map(vocab.is_end, ids))
        hurry = [t for t in ids if vocab.is_end(t) or vocab.pieces()[t][:1] in (b"}", b"]", b'"')]
        token = choose.choice(hurry if hurry and (len(tokens) > 30 or choose.random() < 0.3) else ids)
        if vocab.is_end(token):
            return tokens
        probe = [token, *forced[1:], *choose.choices(range(vocab.size), k=2)]
        assert state.admits(probe) == stepped(state, probe)
        state.accept(token)
        tokens.append(token)
    raise AssertionError("the text does not end")


def stepped(state: GrammarState, tokens: Sequence[int]) -> int:
    """`admits`, by the masks themselves."""
    state = state.copy()
    for n, token in enumerate(tokens):
        if token not in allowed(state):
            return n
        if VOCAB.is_end(token):
            return n + 1
        state.accept(token)
    return len(tokens)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(schemas, st.integers(0, 10_000))
def test_texts_are_valid(schema: dict[str, Any], seed: int) -> None:
    try:
        grammar = TOY.compile("json_schema", schema)
    except EdgespecError as error:
        assert "no text satisfies" in str(error)  # noqa: PT017 - not every schema can be satisfied
        return
    text = VOCAB.detokenize(walk(grammar, random.Random(seed)))
    value = json.loads(text)
    jsonschema.validate(value, schema)
    text = re.sub(r"-0(?![.0-9])", "0", text)  # another way of writing it
    assert text == json.dumps(value, ensure_ascii=False) or "\\" in text or "\x7f" in text


def test_what_is_forced_is_forced_as_the_tokenizer_writes_it() -> None:
    state = TOY.compile("json_schema", {**CLOSED, "properties": {"a": {"const": "hello"}}}).start()
    tokens = VOCAB.tokenize('{"a": "hello"}')
    assert state.admits(tokens) == len(tokens)
    for i, token in enumerate(tokens):
        others = [t for t in allowed(state) if t != token]
        spelled_out = list(VOCAB.pieces()[token][:1])
        assert others == []
        assert state.admits(spelled_out) == (spelled_out == [token]), i
        state.accept(token)


class Spaced(ToyVocab):
    """Puts a space before every text, as SentencePiece does."""

    def tokenize(self, text: str) -> list[int]:
        return super().tokenize(" " + text)


def test_a_tokenizer_that_adds_a_space_adds_none_inside_a_text() -> None:
    state = GrammarCompiler(Spaced()).compile("regex", 'x: "hello" [ab]').start()
    assert state.forced(99) == tuple(VOCAB.tokenize('x: "hello" '))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schemas, st.integers(0, 10_000))
def test_what_is_forced_is_what_the_masks_leave(schema: dict[str, Any], seed: int) -> None:
    try:
        state = TOY.compile("json_schema", schema).start()
    except EdgespecError:
        return
    choose = random.Random(seed)
    for _ in range(20):
        if state.finished:
            return
        draft = choose.choice(allowed(state))
        after = state.forced(50, (draft,))
        assert state.forced(2, (draft,)) == after[:2]
        if VOCAB.is_end(draft):
            assert after == ()
            return
        state.accept(draft)
        for token in after:
            assert allowed(state) == [token]
            state.accept(token)
        assert len(allowed(state)) > 1 or state.finished


def test_nothing_is_forced_after_what_is_refused() -> None:
    state = TOY.compile("json_schema", {"type": "object", "properties": {"name": {"const": "abc"}}}).start()
    wrong = VOCAB.tokenize("[")
    assert state.forced(9, wrong) == ()
    assert state.forced(0) == ()
    assert state.admits(wrong) == state.admits([]) == 0
    with pytest.raises(EdgespecError, match="cannot follow the grammar any further"):
        state.accept(wrong[0])


def spelled(state: GrammarState, text: str) -> bool:
    tokens = VOCAB.tokenize(text)
    return state.admits([*tokens, VOCAB.eos]) == len(tokens) + 1


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("regex", "[0-9]{3}-[ab]*", ["123-", "123-abab"], ["12-", "123-c"]),
        ("choice", ["yes", "no", 'q"\\\n', "é"], ["yes", "no", 'q"\\\n', "é"], ["ye", "maybe"]),
        ("json_object", None, ["{}", '{"a": [1, {"b": null}]}'], ["[]", '{"a":1}', "{"]),
        ("json_schema", '{"type": "boolean"}', ["true", "false"], ["null", " true"]),
        ("json_schema", True, ["[]", "1", '{"a": 1}'], ["", "nul"]),
        ("lark", 'start: "(" start ")" | "x"', ["x", "((x))"], ["(x", ")"]),
        ("gbnf", 'root ::= "a" b? # note\nb ::= [x-z]+ | "(" b ")"', ["a", "axyz", "a((z))"], ["ab", "a(z"]),
        ("gbnf", 'root ::= "\\x41\\u00e9" [\\u00e0-\\u00ff\\x2d] "\\n"', ["Aéï\n", "Aé-\n"], ["Aé\n"]),
    ],
)
def test_every_kind(kind: Any, source: Any, good: list[str], bad: list[str]) -> None:
    grammar = TOY.compile(kind, source)
    assert [text for text in good if not spelled(grammar.start(), text)] == []
    assert [text for text in bad if spelled(grammar.start(), text)] == []


def test_a_known_grammar_is_compiled_once() -> None:
    assert TOY.compile("regex", "a{3}") is TOY.compile("regex", "a{3}")
    for n in range(40):
        TOY.compile("regex", f"b{{{n + 1}}}")
    assert len(TOY._known) <= 32


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chained(rules: int, count: int) -> str:
    lines = [f"r{i}: r{i + 1}{{{count}}}" for i in range(rules)]
    return "\n".join(["start: r0", *lines, f'r{rules}: "x"'])


ENDLESS = {"type": "object", "properties": {"c": {"$ref": "#/$defs/e"}}, "required": ["c"]}
REFUSED: list[tuple[str, Any, str]] = [
    ("json_schema", "[1]", "must be a JSON object"),
    ("json_schema", '{"type": "string"', "not valid JSON"),
    ("json_schema", '{"const": NaN}', "NaN is not JSON"),
    ("json_schema", "[" * 100_000, "nested too deeply"),
    ("json_schema", nested(10_000), "nested more than 100 deep"),
    ("json_schema", {"const": float("nan")}, "cannot use the grammar"),
    ("json_schema", {"const": "\ud800"}, "half a character"),
    ("json_schema", {"type": "strin"}, "Invalid type: strin"),
    ("json_schema", {"not": {"type": "string"}}, "not"),
    ("json_schema", False, "not"),
    ("json_schema", {"$ref": "https://example.com/x"}, "example.com"),
    ("json_schema", {"$ref": "#"}, "no text satisfies it"),
    ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no text satisfies it"),
    ("json_schema", {**ENDLESS, "$defs": {"e": ENDLESS}}, "[Tt]oo many items"),
    ("json_schema", {"enum": [f"value {i}" for i in range(100_000)]}, "larger than 512 KiB"),
    ("json_schema", {"const": "x" * 20_000}, "text of 20000 characters"),
    ("json_schema", {"properties": {f"p{i}": True for i in range(2000)}}, "more than 1000 properties"),
    ("json_schema", {"type": "integer", "multipleOf": 999_983}, "multipleOf 999983"),
    ("json_schema", {"type": "number", "multipleOf": 123.4567}, "multipleOf 123.4567"),
    ("json_schema", {"type": "string", "pattern": "(a?){5000}a{5000}"}, "repeats more than"),
    ("json_schema", {"patternProperties": {"^a{9999}": True}}, "repeats more than"),
    ("regex", "(a?){5000}a{5000}", "repeats more than"),
    ("regex", "((a{100}){100}){100}", "repeats more than"),
    ("regex", "a{99999999999}", "repeats more than"),
    ("regex", "a{100}{100}{100}", "repeats more than"),
    ("regex", "(a", "cannot use the grammar"),
    ("regex", "(?=a)b", "cannot use the grammar"),
    ("regex", "(" * 8000 + "a" + ")" * 8000, "cannot use the grammar"),
    ("regex", 3, "cannot be compiled from int"),
    ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "too deeply nested"),
    ("lark", chained(3, 1000), "repeats more than"),
    ("lark", chained(30, 2), "repeats more than"),
    ("lark", "start: T\nT: U{100}\nU: /((ab){10}){10}/", "repeats more than"),
    ("lark", 'start: a\na[stop="x"]: /.*/', "uses stop="),
    ("lark", "start: a\na[max_tokens=3]: /.*/", "uses max_tokens="),
    ("lark", "start: start", "no text satisfies it"),
    ("lark", "nothing", "cannot use the grammar"),
    ("gbnf", 'other ::= "a"', "no rule named root"),
    ("gbnf", "root ::= missing", "missing"),
    ("gbnf", 'root ::= ("a"', "not valid GBNF"),
    ("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested too deeply"),
    ("gbnf", 'root ::= <think> "a"', "contains the token <think>"),
    ("gbnf", "root ::= a{1000}\na ::= b{1000}\nb ::= [x]\n", "repeats more than"),
    ("choice", [], "none of them empty"),
    ("choice", ["a", ""], "none of them empty"),
    ("choice", ["a", 3], "none of them empty"),
    ("choice", "yes", "cannot be compiled from str"),
    ("json_object", "{}", "cannot be compiled from str"),
]


@pytest.mark.parametrize(("kind", "source", "message"), REFUSED, ids=[f"{k}-{m}" for k, _, m in REFUSED])
def test_a_refusal_says_why(kind: Any, source: Any, message: str) -> None:
    with pytest.raises(EdgespecError, match=message) as caught:
        TOY.compile(kind, source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", {"enum": [f"value {i}" for i in range(10_000)]}),
        ("json_schema", nested(40)),
        ("json_schema", {"type": "array", "items": {"$ref": "#"}}),
        ("json_schema", {"type": "string", "minLength": 100_000, "maxLength": 1_000_000}),
        ("json_schema", {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
        ("regex", "(a+)+$"),
        ("regex", "(a|a)*b"),
        ("regex", "(a|b)*a(a|b){24}c"),
        ("regex", "(" * 100 + "a" + ")" * 100),
        ("lark", 'start: s\ns: s s | "a" | '),
    ],
    ids=[
        "enum",
        "nested",
        "recursive",
        "long",
        "wide",
        "nested +",
        "ambiguous",
        "large DFA",
        "groups",
        "s s",
    ],
)
def test_what_looks_hostile_is_followed(kind: Any, source: Any) -> None:
    state = TOY.compile(kind, source).start()
    choose = random.Random(0)
    for _ in range(40):
        token = choose.choice(allowed(state))
        if VOCAB.is_end(token):
            break
        state.accept(token)


def test_what_gets_too_complex_is_an_error_and_not_an_end() -> None:
    schema = {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/e"}], "$defs": {"e": ENDLESS}}
    state = TOY.compile("json_schema", schema).start()
    state.accept(VOCAB.tokenize('{"')[0])
    (forced,) = allowed(state)
    with pytest.raises(EdgespecError, match=r"cannot follow the grammar any further: .*[Tt]oo many items"):
        state.accept(forced)


def test_a_compilation_without_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(module, "LLMatcher", lambda *_, **__: release.wait(60))
    monkeypatch.setattr(module, "_SECONDS", 0.01)
    try:
        with pytest.raises(EdgespecError, match="too long to compile"):
            TOY.build('start: "never compiled before"')
    finally:
        release.set()


@pytest.mark.parametrize(
    ("schema", "text", "good"),
    [
        (CLOSED, '{"a": 1, "b": 2}', False),
        ({**CLOSED, "additionalProperties": True}, '{"a": 1, "b": 2}', True),
        ({**CLOSED, "required": ["a", "b"]}, '{"a": 1, "b": 2}', True),
        ({"allOf": [CLOSED, {"properties": {"b": {"const": 2}}}]}, '{"a": 1, "b": 2}', True),
        ({"type": "array", "items": CLOSED}, '[{"a": 1, "b": 2}]', False),
        ({"const": {"properties": {"a": 1}}}, '{"properties": {"a": 1}}', True),
        ({"type": "string", "format": "no-such-format"}, '"x"', True),
        ({"type": "string", "format": "date"}, '"x"', False),
        ({"type": "boolean", "x-guidance": {"whitespace_flexible": True}}, "true", True),
    ],
)
def test_objects_that_name_their_properties_have_no_others(schema: Any, text: str, good: bool) -> None:
    jsonschema.validate(json.loads(text), schema)
    assert spelled(TOY.compile("json_schema", schema).start(), text) is good


@pytest.fixture(scope="module")
def real(starter: LlamaModel) -> GrammarCompiler:
    return GrammarCompiler(starter.vocab)


def test_forced_tokens_are_the_models_own(real: GrammarCompiler, starter: LlamaModel) -> None:
    vocab = starter.vocab
    schema = {
        "type": "object",
        "properties": {
            "city name": {"const": "Zürich"},
            "population_count": {"type": "integer"},
            "notes": {"enum": ["none at all"]},
        },
        "required": ["city name", "population_count", "notes"],
    }
    text = '{"city name": "Zürich", "population_count": 421878, "notes": "none at all"}'
    tokens = vocab.tokenize(text)
    state, written = real.compile("json_schema", schema).start(), 0
    certain = 0
    while written < len(tokens):
        forced = state.forced(99)
        assert tuple(tokens[written : written + len(forced)]) == forced
        certain += len(forced)
        for token in forced or tokens[written : written + 1]:
            state.accept(token)
            written += 1
    assert state.finished
    assert certain > 0.6 * len(tokens)
    assert [vocab.text(t) for t in allowed(state)] == ["<|endoftext|>", "<|im_end|>", "<reponame>"]
    state.accept(vocab.eos or 0)
    assert state.finished


def test_tokens_that_are_no_text_are_never_allowed(real: GrammarCompiler, starter: LlamaModel) -> None:
    vocab = starter.vocab
    state = real.compile("lark", "start: /(.|\\n)*/").start()
    ids = allowed(state)
    assert len(ids) > 0.9 * vocab.size
    assert {t for t in ids if vocab.is_control(t)} == {t for t in range(vocab.size) if vocab.is_end(t)}
    assert state.admits(vocab.tokenize("<|im_start|>", special=True)) == 0
    assert state.admits(vocab.tokenize("<|im_start|>")) > 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(schema=schemas, seed=st.integers(0, 10_000))
def test_texts_of_a_real_vocabulary_are_valid(
    real: GrammarCompiler, starter: LlamaModel, schema: dict[str, Any], seed: int
) -> None:
    try:
        state = real.compile("json_schema", schema).start()
    except EdgespecError:
        return
    choose, tokens = random.Random(seed), []
    while not state.finished and len(tokens) < 200:
        ids = allowed(state)
        closing = [t for t in ids[:2000] if starter.vocab.piece(t)[:1] in (b"}", b"]", b'"')]
        token = choose.choice(closing or ids)
        if starter.vocab.is_end(token):
            break
        state.accept(token)
        tokens.append(token)
    jsonschema.validate(json.loads(starter.vocab.detokenize(tokens)), schema)

"""From tokens to the parts of an answer: marks that are control tokens, stop strings, counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from toy import ToyVocab

from edgespec.app.engine.constraints import ConstraintCompiler
from edgespec.app.engine.output import PLAIN, OutputForm, StopCriteria, marks_of, opened_by
from edgespec.models.prompting.call_syntax import HERMES, MISTRAL
from edgespec.models.prompting.output_events import (
    Arguments,
    Called,
    OutputEvent,
    ReasoningPiece,
    TextPiece,
)
from edgespec.models.prompting.reasoning import THINK, Thoughts
from edgespec.models.prompting.tool_calls import Tool, ToolChoice

TOOLS = (Tool("get", "a number", {}),)
CALL = '<tool_call>\n{"name": "get", "arguments": {"a": "x\\ny"}}\n</tool_call>'
READ: list[OutputEvent] = [Called(0, "get"), Arguments(0, '{"a": "x\\ny"}')]


class MarkedVocab(ToyVocab):
    """A toy vocabulary whose control token is [TOOL_CALLS]."""

    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> list[int]:
        tokens: list[int] = []
        for i, part in enumerate(text.split("[TOOL_CALLS]") if special else [text]):
            tokens += ([self.control] if i else []) + super().tokenize(part)
        return tokens

    def text(self, token: int) -> str:
        return "[TOOL_CALLS]" if token == self.control else super().text(token)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]


VOCAB = MarkedVocab()


def answered(
    form: OutputForm, tokens: Sequence[int], stops: Sequence[str] = (), cut: bool = False
) -> tuple[list[OutputEvent], StopCriteria, int]:
    criteria = StopCriteria(VOCAB.is_end, VOCAB.piece, stops, form)
    events, used, reasoning = list[OutputEvent](), 0, 0
    for token in tokens:
        over = criteria(token)
        more, _, count = criteria.take()
        events, used, reasoning = events + more, used + 1, reasoning + count
        if over:
            break
    more, _, count = criteria.finish(cut=cut)
    merged: list[OutputEvent] = []
    for event in [*events, *more]:
        last = merged[-1] if merged else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            merged[-1] = TextPiece(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            merged[-1] = Arguments(event.index, last.text + event.text)
        elif isinstance(event, ReasoningPiece) and isinstance(last, ReasoningPiece):
            merged[-1] = ReasoningPiece(last.text + event.text)
        else:
            merged.append(event)
    return merged, criteria, reasoning + count


def test_a_mark_that_is_a_control_token_begins_a_call() -> None:
    marks = marks_of(VOCAB, MISTRAL, None)
    assert marks == {VOCAB.control: "[TOOL_CALLS]"}
    tokens = VOCAB.tokenize(
        'I look. [TOOL_CALLS][{"name": "get", "arguments": {"a": "x\\ny"}}]', special=True
    )
    form = OutputForm(MISTRAL, TOOLS, marks=marks)
    assert answered(form, tokens)[0] == [TextPiece("I look."), *READ]
    assert isinstance(answered(PLAIN, tokens)[0][0], TextPiece)


@pytest.mark.parametrize("stop", ["\n", "}", "x", "<", "get", "tool_call"])
def test_stop_strings_do_not_end_calls(stop: str) -> None:
    form = OutputForm(HERMES, TOOLS)
    events, criteria, _ = answered(form, VOCAB.tokenize(CALL), [stop])
    assert events == READ
    assert criteria.reason is None
    events, criteria, _ = answered(form, VOCAB.tokenize("Well" + stop + "no " + CALL), [stop])
    assert events == [TextPiece("Well")]
    assert (criteria.reason, criteria.stopped_by) == ("stop", stop)


def test_stop_strings_do_not_end_reasoning() -> None:
    form = OutputForm(thoughts=THINK)
    tokens = VOCAB.tokenize("<think>\nA. B.\n</think>\n\nC. D. E")
    events, criteria, reasoning = answered(form, tokens, [". "])
    assert events == [ReasoningPiece("A. B."), TextPiece("C")]
    assert criteria.reason == "stop"
    # From the token that completes the mark; in the vocabularies of models the whole mark is one.
    assert reasoning == len(VOCAB.tokenize(">\nA. B.\n</think>"))


def test_a_stop_string_counts_in_text_that_was_held_back() -> None:
    events, criteria, _ = answered(OutputForm(HERMES, TOOLS), VOCAB.tokenize('{"name": "get", END'), ["END"])
    assert events == [TextPiece('{"name": "get", ')]
    assert criteria.stopped_by == "END"
    text = '```json\n{"name": "get"'
    events, criteria, _ = answered(OutputForm(HERMES, TOOLS), VOCAB.tokenize(text), ["name"])
    assert events == [TextPiece('```json\n{"')]
    assert (criteria.reason, criteria.stopped_by) == ("stop", "name")


def test_what_a_limit_cuts_in_its_head_is_no_text() -> None:
    form = OutputForm(HERMES, TOOLS)
    tokens = VOCAB.tokenize('Well <tool_call>\n{"name')
    assert answered(form, tokens, cut=True)[0] == [TextPiece("Well")]
    assert answered(form, tokens)[0] == [TextPiece('Well <tool_call>\n{"name')]


def test_the_end_of_a_prompt_may_have_opened_reasoning() -> None:
    for end in ("<think>", "<think>\n"):
        assert opened_by(VOCAB, VOCAB.tokenize("Hi" + end), None, THINK) == "<think>"
    for end in ("<think></think>", "<think>\n\n</think>\n\n", ""):
        assert opened_by(VOCAB, VOCAB.tokenize("Hi" + end), None, THINK) == ""
    control = Thoughts("[TOOL_CALLS]", "")
    assert opened_by(VOCAB, VOCAB.tokenize("[TOOL_CALLS]", special=True), None, control) == "[TOOL_CALLS]"


def test_a_format_may_follow_reasoning_that_the_prompt_has_opened() -> None:
    compiler = ConstraintCompiler(VOCAB, "{# <think> #}")
    none = ToolChoice("none")
    for prompt, text in (("<think>", "Hm.</think> {}"), ("", "{}")):
        shape = compiler.shape((), none, ("json_object", None), VOCAB.tokenize(prompt))
        assert shape.grammar is not None
        tokens = VOCAB.tokenize(text)
        assert shape.grammar.start().admits([*tokens, VOCAB.eos]) == len(tokens) + 1
        assert answered(shape.form, tokens)[0][-1] == TextPiece("{}")
    assert compiler.shape((), none, None, VOCAB.tokenize("<think>")).form.opened == "<think>"

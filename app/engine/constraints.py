"""Constraints on an answer, a format or tool calls: the grammar, and the parser of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgespec.core import Constraint, EdgespecError
from edgespec.models.prompting.grammar import Grammar, GrammarCompiler, GrammarKind
from edgespec.models.prompting.tool_calls import (
    CallParser,
    OutputEvent,
    Syntax,
    TextPiece,
    Tool,
    ToolChoice,
    grammar,
    syntax_of,
)
from edgespec.models.vocab import Vocabulary

Format = tuple[GrammarKind, Any]
"""The arguments of `GrammarCompiler.compile`."""


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """A grammar, or none; `syntax` is that of tool calls, None if there can be none.

    `trigger` is the control token that begins calls, if there is one; it has no text.
    """

    grammar: Grammar | None = None
    syntax: Syntax | None = None
    trigger: int | None = None

    @property
    def start(self) -> Callable[[], Constraint] | None:
        """Return a function that makes the constraint of a new generation, None without a grammar."""
        return self.grammar.start if self.grammar is not None else None


FREE = OutputConstraint()


class ConstraintCompiler:
    """Compiles the constraints of one model's answers. Belongs to one thread at a time.

    The first one takes 0.2 to 1 s, in which the vocabulary is read.
    """

    def __init__(self, vocab: Vocabulary, template: str | None) -> None:
        """`template`: the source of the model's chat template."""
        self._vocab, self._syntax = vocab, syntax_of(template)
        self._compiler: GrammarCompiler | None = None

    def shape(self, tools: Sequence[Tool], choice: ToolChoice, format_: Format | None) -> OutputConstraint:
        """Compile a constraint: calls of `tools` as `choice` requires, or an answer in a format.

        Raises EdgespecError for unsupported tools or formats, and for both at once.
        """
        if not tools and (choice.mode == "required" or choice.named is not None):
            raise EdgespecError("tool_choice requires a call, but there are no tools: pass tools")
        if not tools and format_ is None:
            return FREE
        if tools and format_ is not None:
            raise EdgespecError("response_format together with tools is not supported: use one of them")
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._vocab)
        if format_ is not None:
            return OutputConstraint(self._compiler.compile(*format_))
        syntax = self._syntax
        found = self._vocab.tokenize(syntax.trigger, special=True) if syntax.special else []
        trigger = found[0] if len(found) == 1 else None
        text = grammar(syntax, tools, choice, None if trigger is None else {syntax.trigger: trigger})
        return OutputConstraint(self._compiler.build(text) if text else None, syntax, trigger)


class OutputParser:
    """Separates text from tool calls in an answer, as it is generated."""

    def __init__(self, shape: OutputConstraint, text_of: Callable[[Sequence[int]], str]) -> None:
        """`text_of` returns the text of token ids."""
        self._shape, self._text_of = shape, text_of
        self._parser = CallParser(shape.syntax) if shape.syntax is not None else None

    def feed(self, text: str, tokens: Sequence[int]) -> list[OutputEvent]:
        """Return the events in `text`, the next part of an answer; `tokens` became final with it."""
        if self._parser is None:
            return [TextPiece(text)] if text else []
        return self._parser.feed(self._marked(text, tokens))

    def finish(self) -> list[OutputEvent]:
        """Return the remaining events at the end of the answer."""
        return self._parser.finish() if self._parser is not None else []

    def _marked(self, text: str, tokens: Sequence[int]) -> str:
        """Return `text` with the trigger of calls inserted, which as a control token has no text."""
        trigger, syntax = self._shape.trigger, self._shape.syntax
        if trigger is None or syntax is None or trigger not in tokens:
            return text
        after = self._text_of(tokens[list(tokens).index(trigger) + 1 :])
        at = len(text) - len(after) if text.endswith(after) else 0
        return text[:at] + syntax.trigger + text[at:]

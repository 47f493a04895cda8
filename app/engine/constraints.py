"""Constraints on an answer, a format or tool calls: the grammar, and the form of the output."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edgespec.app.engine.output import PLAIN, OutputForm, marks_of, opened_by
from edgespec.core import Constraint, EdgespecError
from edgespec.models.prompting.call_grammar import after_reasoning, grammar
from edgespec.models.prompting.call_syntax import syntax_of
from edgespec.models.prompting.grammar import Grammar, GrammarCompiler, GrammarKind
from edgespec.models.prompting.grammar_sources import Schema, read_schema
from edgespec.models.prompting.reasoning import thoughts_of
from edgespec.models.prompting.schema_exact import either, json_rule
from edgespec.models.prompting.schema_limits import fault, loosened
from edgespec.models.prompting.tool_calls import Tool, ToolChoice
from edgespec.models.vocab import Vocabulary
from edgespec.text import printable

_MOST_KEPT = 50_000  # characters of a schema
_MOST_SCHEMAS = 256  # with what is left of them: agents send the same tools with each request

Format = tuple[GrammarKind, Any]
"""The arguments of `GrammarCompiler.compile`."""


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """A grammar, or none, and what the answer may contain besides text."""

    grammar: Grammar | None = None
    form: OutputForm = PLAIN

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
        self._vocab, self._syntax, self._thoughts = vocab, syntax_of(template), thoughts_of(template)
        self._marks = marks_of(vocab, self._syntax, self._thoughts)
        self._thought_marks = marks_of(vocab, None, self._thoughts)
        self._known: OrderedDict[tuple[str, bool], Schema] = OrderedDict()
        self._compiler: GrammarCompiler | None = None

    def form(self, prompt: Sequence[int], tools: Sequence[Tool] = ()) -> OutputForm:
        """Return what the answer to `prompt` (token ids) may contain besides text."""
        syntax = self._syntax if tools else None
        opened = opened_by(self._vocab, prompt, syntax, self._thoughts)
        marks = self._marks if tools else self._thought_marks
        return OutputForm(syntax, tuple(tools), self._thoughts, opened, marks)

    def shape(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        format_: Format | None,
        prompt: Sequence[int] = (),
        *,
        lenient: bool = False,
    ) -> OutputConstraint:
        """Compile a constraint: calls of `tools` as `choice` requires, or an answer in a format.

        With both, the answer is either. What a grammar cannot keep of a schema is left out, if it is that of
        a tool that is not strict, or `lenient`. `prompt` (token ids) may have begun the answer with
        reasoning. Raises EdgespecError for other tools and formats.
        """
        if not tools and (choice.mode == "required" or choice.named is not None):
            raise EdgespecError("tool_choice requires a call, but there are no tools: pass tools")
        if not tools and format_ is None:
            return OutputConstraint(form=self.form(prompt))
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._vocab)
        if format_ is not None and format_[0] == "json_schema":
            schema = read_schema(format_[1])
            format_ = "json_schema", self._kept("the schema", schema, strict=not lenient)
        form = self.form(prompt, tools)
        thoughts, tokens = self._thoughts, {text: token for token, text in self._marks.items()}
        before = thoughts.close if thoughts is not None and form.opened == thoughts.open else ""
        if not tools and format_ is not None:
            if before and format_[0] in ("json_schema", "json_object"):
                schema = {"type": "object"} if format_[0] == "json_object" else format_[1]
                text: str | None = after_reasoning(json_rule("start", schema), before, tokens)
                return OutputConstraint(self._compiler.build(text or ""), form)
            return OutputConstraint(self._compiler.compile(*format_))
        tools = [self._kept_tool(tool) for tool in tools]
        if format_ is not None and choice.mode == "auto":
            calls = grammar(self._syntax, tools, replace(choice, mode="required"), tokens)
            text = either(format_, calls or "")
            text = after_reasoning(text, before, tokens) if before else text
        else:
            text = grammar(self._syntax, tools, choice, tokens, before)
        return OutputConstraint(self._compiler.build(text) if text else None, form)

    def _kept_tool(self, tool: Tool) -> Tool:
        return replace(tool, parameters=self._kept(f"tool {tool.name}", tool.parameters, strict=tool.strict))

    def _kept(self, name: str, schema: Schema, *, strict: bool) -> Schema:
        """Return what a grammar can keep of `schema`; if `strict`, raise EdgespecError unless it is all."""
        key = (json.dumps(schema), strict)
        if len(key[0]) > _MOST_KEPT:
            return self._checked(name, schema, strict)
        if key not in self._known:
            self._known[key] = self._checked(name, schema, strict)
            if len(self._known) > _MOST_SCHEMAS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _checked(self, name: str, schema: Schema, strict: bool) -> Schema:
        assert self._compiler is not None
        refusal = partial(self._compiler.refusal, strict=strict)
        if not strict:
            return loosened(schema, refusal)
        if refusal(schema) is not None:
            path, cause = fault(schema, refusal)
            where = f"{name}, property {printable(path, 100)}" if path else name
            raise EdgespecError(f"{where}: {printable(cause)}")
        return schema

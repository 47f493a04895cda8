"""Grammars of answers with tool calls, in the syntax of a model family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgespec.core import EdgespecError
from edgespec.models.prompting import grammar_sources
from edgespec.models.prompting.call_forms import ListedCall, Syntax, TaggedCall
from edgespec.models.prompting.call_syntax import GENERIC
from edgespec.models.prompting.call_values import is_string
from edgespec.models.prompting.schema_exact import json_rule
from edgespec.models.prompting.tool_calls import Tool, ToolChoice


def grammar(
    syntax: Syntax,
    tools: Sequence[Tool],
    choice: ToolChoice,
    tokens: Mapping[str, int] | None = None,
    before: str = "",
) -> str | None:
    """Return a grammar, for `GrammarCompiler.build`, of answers that follow `choice`; None for any answer.

    With "auto", text is free up to the trigger, after which only calls follow. `tokens`: ids of control
    tokens by their text. The grammar begins after `before`, the mark that ends reasoning which the prompt has
    opened. Raises EdgespecError if `choice` cannot be satisfied.
    """
    if choice.named is not None:
        tools = [tool for tool in tools if tool.name == choice.named]
        if not tools:
            raise EdgespecError(f"tool_choice names {choice.named}: it must be one of the tools")
    elif choice.mode == "none" or (choice.mode == "auto" and not tools):
        return None
    if not tools:
        raise EdgespecError("tool_choice requires a call, but there are no tools: add one")
    found = _Grammar(syntax, tokens or {}).text(tools, choice)
    return after_reasoning(found, before, tokens or {}) if found and before else found


def after_reasoning(grammar: str, before: str, tokens: Mapping[str, int]) -> str:
    """Return a Lark grammar of reasoning up to the mark `before`, and of what `grammar`, in Lark, allows."""
    rules = _Grammar(GENERIC, tokens, "THOUGHT")
    head, left = rules.up_to("thought", before)
    start = f"start: {head} {rules.literal(left)} SPACE? after"
    return "\n".join([start, r"SPACE: /\s+/", *rules.rules, grammar.replace("start:", "after:", 1)])


class _Grammar:
    """Builds the rules. Literal text is split at control tokens, which a grammar names by their ids."""

    def __init__(self, syntax: Syntax, tokens: Mapping[str, int], any_text: str = "TEXT") -> None:
        """`any_text` is the name of the terminal that any text matches."""
        self._syntax, self._tokens, self._any = syntax, tokens, any_text
        self._control = re.compile("|".join(sorted(map(re.escape, tokens), key=len, reverse=True)) or r"(?!)")
        self.rules = [any_text + r": /(.|\n)*/"]

    def text(self, tools: Sequence[Tool], choice: ToolChoice) -> str | None:
        syntax, free = self._syntax, choice.mode == "auto" and choice.named is None
        if free and syntax.headers:
            return None  # the trigger begins text as well
        opening = syntax.start + syntax.open
        self._add("call", " | ".join(self._tool(f"tool{i}", tool) for i, tool in enumerate(tools)))
        again = f" ({self.literal(syntax.between + syntax.open)} call)*"
        more = again if syntax.many and choice.parallel and choice.named is None else ""
        rest = f"call{more} {self.literal(syntax.end)}"
        if not free:
            start = f"{self.literal(opening)} {rest}"
        elif syntax.alone:
            self.rules[0] = f"TEXT: /[^{re.escape(syntax.trigger)}](.|\\n)*/"
            start = f"TEXT | {self.literal(opening)} {rest}"
        else:
            head, left = self.up_to("head", syntax.trigger)
            start = f"TEXT | {head} {self.literal(left + opening.removeprefix(syntax.trigger))} {rest}"
        if syntax.headers:
            thought = self.literal("<|channel|>analysis<|message|>")
            start = f"({thought} TEXT {self.literal('<|end|><|start|>assistant')})? {start}"
        return "\n".join([f"start: {start}", *self.rules])

    def _add(self, rule: str, body: str) -> str:
        self.rules.append(f"{rule}: {body}")
        return rule

    def literal(self, text: str) -> str:
        parts, at = list[str](), 0
        for found in self._control.finditer(text):
            parts += [text[at : found.start()], found[0]]
            at = found.end()
        parts.append(text[at:])
        return " ".join(
            f"<[{self._tokens[one]}]>" if one in self._tokens else grammar_sources.literal(one)
            for one in parts
            if one
        )

    def up_to(self, rule: str, mark: str) -> tuple[str, str]:
        """Return a rule of text up to `mark`, and what is left of the mark after it."""
        found = self._control.search(mark)
        if found is not None:  # text has no control tokens, so it may contain what precedes the first
            return f"{self._any}? {self.literal(found[0])}", mark[found.end() :]
        return self._add(f"{rule}[lazy]", f"{self._any} {grammar_sources.literal(mark)}").split("[")[0], ""

    def _tool(self, rule: str, tool: Tool) -> str:
        syntax, form = self._syntax, self._syntax.form
        given = tool.parameters if isinstance(tool.parameters, Mapping) else {}
        schema = {**given, "type": "object"}
        if isinstance(form, TaggedCall | ListedCall):
            grammar_sources.json_schema(schema, f"the schema of {tool.name}", strict=tool.strict)
            arguments = self._members(rule, schema, tool)
        else:
            arguments = self._json(f"{rule}a", schema, tool)
        head, tail = self.literal(form.head(tool.name)), self.literal(form.tail() + syntax.shut)
        return self._add(rule, f"{head} {arguments} {tail}")

    def _json(self, rule: str, schema: Any, tool: Tool) -> str:
        self.rules.append(json_rule(rule, schema, f"the schema of {tool.name}", strict=tool.strict))
        return rule

    def _members(self, rule: str, schema: Mapping[str, Any], tool: Tool) -> str:
        """Return a rule of the properties of `schema`, in order, those that are not required optional."""
        form = self._syntax.form
        between = self.literal(form.between) if isinstance(form, ListedCall) else ""
        required = schema.get("required", ())
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        first, later = self._add(f"{rule}f", '""'), self._add(f"{rule}l", '""')
        for i, (key, part) in reversed(list(enumerate(schema.get("properties", {}).items()))):
            if isinstance(part, Mapping):
                part = {**shared, **part}
            member = self._member(f"{rule}m{i}", key, part, tool)
            optional = key not in required
            begun = f"{between} {member} {later}" + (f" | {later}" if optional else "")
            begins = f"{member} {later}" + (f" | {first}" if optional else "")
            later, first = self._add(f"{rule}l{i}", begun), self._add(f"{rule}f{i}", begins)
        return first

    def _member(self, rule: str, key: str, schema: Any, tool: Tool) -> str:
        form, string = self._syntax.form, is_string(schema) is True
        if isinstance(form, TaggedCall):
            before, after = form.before_value(key, string), form.after_value(key)
        else:
            assert isinstance(form, ListedCall)
            quote = form.quote if string else ""
            before, after, string = key + form.assign + quote, quote, bool(quote)
        if string and "enum" in schema:
            value = "(" + " | ".join(self.literal(one) for one in schema["enum"] if one) + ")"
        elif string:
            value, left = self.up_to(f"{rule}t", after.strip())
            after = left + after[len(after.rstrip()) :]
        else:
            value = self._json(f"{rule}v", schema, tool)
        return self._add(rule, f"{self.literal(before)} {value} {self.literal(after)}")

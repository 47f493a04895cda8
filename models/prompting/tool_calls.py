"""Tool calls in the syntax of model families: grammars for them, and a parser.

A `Syntax` is the literal text around the names and arguments of calls; the chat template shows which one a
model was trained on. The grammar and the parser are derived from it. This module is independent of models and
servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgespec.core import EdgespecError
from edgespec.models.prompting import grammar_sources

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call. `parameters`: JSON schema of its arguments, an object.

    If not `strict`, parts of the schema that the grammar cannot enforce are ignored.
    """

    name: str
    description: str = ""
    parameters: grammar_sources.Schema = True
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called: optionally, never, at least once, or the one that is `named`."""

    mode: Literal["auto", "none", "required"] = "auto"
    named: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Syntax:
    """The syntax of calls: `begin`; per call `name`, its name, `middle`, its arguments, `end`; `close`.

    `between` separates calls. `trigger`, the start of `begin` or `name`, distinguishes a call from text. If
    `special`, it is a control token, which has no text. Calls follow text, or replace it if `alone`. Without
    `many` there is at most one call. `taught`: the templates do not support tools, so the prompt must
    describe them (`instructions`).
    """

    family: str
    trigger: str
    name: str
    middle: str
    end: str
    begin: str = ""
    between: str = ""
    close: str = ""
    special: bool = False
    alone: bool = False
    many: bool = True
    taught: bool = False


HERMES = Syntax(
    "hermes", "<tool_call>", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n"
)
LLAMA = Syntax("llama", "{", '{"name": "', '", "parameters": ', "}", alone=True, many=False)
MISTRAL = Syntax(
    "mistral",
    "[TOOL_CALLS]",
    '{"name": "',
    '", "arguments": ',
    "}",
    begin="[TOOL_CALLS][",
    between=", ",
    close="]",
    special=True,
)
GENERIC = Syntax(
    "generic",
    HERMES.trigger,
    HERMES.name,
    HERMES.middle,
    HERMES.end,
    between=HERMES.between,
    taught=True,
)


def syntax_of(template: str | None) -> Syntax:
    """Return the syntax of a chat template, GENERIC if it has none or an unknown one."""
    template = template or ""
    if "tools" not in template:
        return GENERIC
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return MISTRAL
    if '"parameters"' in template and ("<|python_tag|>" in template or "<|eom_id|>" in template):
        return LLAMA
    return GENERIC


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Parse tools in OpenAI's format: {"type": "function", "function": {"name": ..., "parameters": ...}}.

    Raises EdgespecError for other formats, and for invalid or duplicate names.
    """
    read: list[Tool] = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise EdgespecError(f'tools[{i}] must be {{"type": "function", "function": {{...}}}}')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise EdgespecError(f"tools[{i}] needs a name of 1 to 64 letters, digits, '_', '-' and '.'")
        if any(name == other.name for other in read):
            raise EdgespecError(f"duplicate tool {name}: use each name once")
        if not isinstance(parameters, Mapping | None):
            raise EdgespecError(f"the parameters of {name} must be a JSON schema")
        description = str(function.get("description") or "")
        schema = parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        read.append(Tool(name, description, schema, function.get("strict") is True))
    return read


def grammar(
    syntax: Syntax, tools: Sequence[Tool], choice: ToolChoice, tokens: Mapping[str, int] | None = None
) -> str | None:
    """Return a grammar, for `GrammarCompiler.build`, of answers that follow `choice`; None for any answer.

    With "auto", text is free up to the trigger, after which only calls follow. `tokens`: ids of control
    tokens by their text. Raises EdgespecError if `choice` cannot be satisfied.
    """
    if choice.named is not None:
        tools = [tool for tool in tools if tool.name == choice.named]
        if not tools:
            raise EdgespecError(f"tool_choice names {choice.named}: it must be one of the tools")
    elif choice.mode == "none" or (choice.mode == "auto" and not tools):
        return None
    if not tools:
        raise EdgespecError("tool_choice requires a call, but there are no tools: add one")
    opening, name = syntax.begin, syntax.name
    lead = ""
    if syntax.special:
        if (token := (tokens or {}).get(syntax.trigger)) is None:
            raise EdgespecError(
                f"the model has no token {syntax.trigger}, which its calls need: choose another model"
            )
        opening, lead = opening.removeprefix(syntax.trigger), f"<[{token}]> "
    free = choice.mode == "auto" and choice.named is None
    rules: list[str] = []
    first: list[str] = []
    for i, tool in enumerate(tools):
        schema = grammar_sources.json_schema(
            tool.parameters, f"the schema of {tool.name}", strict=tool.strict
        )
        schema["type"] = "object"
        call = tool.name + syntax.middle
        rules.append(
            f"tool{i}: {grammar_sources.literal(call)} arguments{i} {grammar_sources.literal(syntax.end)}"
        )
        rules.append(f"arguments{i}: %json {json.dumps(schema, ensure_ascii=False)}")
        first.append(f"tool{i}")
    rules.append("call: " + " | ".join(first))
    again = f" ({grammar_sources.literal(syntax.between + name)} call)*"
    more = again if syntax.many and choice.parallel and choice.named is None else ""
    close = f" {grammar_sources.literal(syntax.close)}" if syntax.close else ""
    start = opening + name
    if not free:
        rules.insert(0, f"start: {lead}{grammar_sources.literal(start)} call{more}{close}")
        return "\n".join(rules)
    rest = start if syntax.special else start.removeprefix(syntax.trigger)
    rules.insert(0, f"start: TEXT | head {grammar_sources.literal(rest)} call{more}{close}")
    if syntax.alone:
        rules.append(f"head: {grammar_sources.literal(syntax.trigger)}")
        rules.append(f"TEXT: /[^{re.escape(syntax.trigger)}](.|\\n)*/")
    elif syntax.special:
        rules.append(f"head: TEXT? {lead}")
        rules.append("TEXT: /(.|\\n)*/")
    else:
        rules.append(f"head[lazy]: TEXT {grammar_sources.literal(syntax.trigger)}")
        rules.append("TEXT: /(.|\\n)*/")
    return "\n".join(rules)


def instructions(tools: Sequence[Tool]) -> str:
    """Return the part of the system prompt that describes `tools`, for templates without tools."""
    listed = "\n".join(
        json.dumps(
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            ensure_ascii=False,
        )
        for tool in tools
    )
    example = call_text(GENERIC, "NAME", "{...}")
    return (
        f"You can call these functions, described as JSON, one a line:\n{listed}\n\n"
        f"To call one, write nothing but\n{example}\n"
        "with its name and its arguments. Its result is told to you in <tool_response> tags."
    )


def call_text(syntax: Syntax, name: str, arguments: str) -> str:
    """Return the text of one call; `arguments` is JSON."""
    return syntax.name + name + syntax.middle + arguments + syntax.end


def folded(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """Return `messages` for a template without tools: `tools`, calls and results become text."""
    result: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if message.get("role") == "tool":
            result.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        elif calls := message.get("tool_calls"):
            texts = [content] if content else []
            for call in calls:
                function = call.get("function", call)
                arguments = function["arguments"]
                written = (
                    arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                )
                texts.append(call_text(GENERIC, function["name"], written))
            result.append({"role": message["role"], "content": "\n".join(texts)})
        else:
            result.append(message)
    if tools:
        system = {"role": "system", "content": instructions(tools)}
        if result and result[0].get("role") == "system":
            system["content"] = f"{result.pop(0).get('content') or ''}\n\n{system['content']}".strip()
        result.insert(0, system)
    return result


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """The start of call number `index`."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call number `index`, as JSON."""

    index: int
    text: str


OutputEvent = TextPiece | Called | Arguments


class CallParser:
    """A streaming parser: text and arguments become events at once, a call's name when it is complete.

    Any space is allowed between the parts of a call, and space between text and a call is dropped. Text that
    only begins like a call is text.
    """

    def __init__(self, syntax: Syntax) -> None:
        self._trigger = syntax.trigger
        self._alone = syntax.alone
        start, again = syntax.begin + syntax.name, syntax.between + syntax.name
        name = r'((?:[^"\\]|\\.)*)'
        self._first = re.compile(rf"\s*{_loose(start)}{name}{_loose(syntax.middle)}\s*(?=\{{)", re.DOTALL)
        self._again = re.compile(rf"\s*{_loose(again)}{name}{_loose(syntax.middle)}\s*(?=\{{)", re.DOTALL)
        self._end = re.compile(rf"\s*{_loose(syntax.end)}")
        self._left = ""  # input without an event yet
        self._calls = 0
        self._arguments: _Braces | None = None  # of the current call
        self._ending = False  # after the arguments, before the end of the call
        self._text = False  # the answer is not a call

    def feed(self, text: str) -> list[OutputEvent]:
        """Return the events for `text`, the next part of the answer."""
        self._left += text
        events: list[OutputEvent] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[OutputEvent]:
        """Return the last events: input that only began like a call is text. An incomplete call stays so."""
        left, self._left = self._left, ""
        if self._arguments is not None or self._ending or (self._calls and not left.strip(" \n,]")):
            return []
        return [TextPiece(left)] if left else []

    def _step(self, events: list[OutputEvent]) -> bool:
        """Append the next event; False if it needs more input."""
        if self._arguments is not None:
            n = self._arguments.read(self._left)
            if text := self._left[:n]:
                events.append(Arguments(self._calls - 1, text))
            self._left = self._left[n:]
            if not self._arguments.closed:
                return False
            self._arguments, self._ending = None, True
        if self._ending:
            found = self._end.match(self._left)
            if found is None:
                return False
            self._left, self._ending = self._left[found.end() :], False
            return True
        found = None
        if not self._text:
            found = self._again.match(self._left) if self._calls else None
            found = found or self._first.match(self._left)
        if found is not None:
            events.append(Called(self._calls, _unquoted(found[1])))
            self._calls += 1
            self._left, self._arguments = self._left[found.end() :], _Braces()
            return True
        n = self._plain()
        if n:
            events.append(TextPiece(self._left[:n]))
            self._left = self._left[n:]
        return bool(n)

    def _plain(self) -> int:
        """Return the number of characters left that are certainly text."""
        if self._text:
            return len(self._left)
        if self._alone:
            self._text = bool(self._left.strip()) and not self._left.lstrip().startswith(self._trigger)
            return len(self._left) if self._text else 0
        if self._calls:
            return 0
        at = self._left.find(self._trigger)
        if at < 0:
            at = len(self._left) - next(
                n for n in range(len(self._trigger) - 1, -1, -1) if self._left.endswith(self._trigger[:n])
            )
        return len(self._left[:at].rstrip())


class _Braces:
    """Finds the end of a JSON object that arrives in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def closed(self) -> bool:
        return self._depth < 0

    def read(self, text: str) -> int:
        """Return how many characters of `text` belong to the object."""
        for i, c in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = c == "\\", c != '"'
            elif c == '"':
                self._quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._depth = -1
                    return i + 1
        return len(text)


def _loose(text: str) -> str:
    """Return a regular expression of `text` that allows any space between words and signs."""
    return r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", text)))


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text

"""Tool calls as model families write them: what to allow, and what was called.

A `Syntax` is the literal text around the names and arguments of calls; the chat template tells which one a
model was trained on. From it come the grammar that keeps a model to it and the parser of what was written.
Nothing here knows a model or a server.
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
    """A function that a model may call. `parameters` is the JSON schema of its arguments, an object.

    If not `strict`, what the grammar cannot enforce of the schema is left to the caller to check.
    """

    name: str
    description: str = ""
    parameters: grammar_sources.Schema = True
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are to be called: at will, not at all, at least once, or the one that is `named`."""

    mode: Literal["auto", "none", "required"] = "auto"
    named: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Syntax:
    """How a family writes calls: begin, then name, middle, arguments, end for each, `between` them, close.

    `trigger`, what `begin` and `name` start with, tells a call from text. It is a control token if `special`,
    which a vocabulary shows as no text. Calls come after text, or instead of it if `alone`. A family that
    `many` is not said of writes one call at most. `taught`: its templates say nothing of tools, so that a
    prompt must (`instructions`).
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
    """The syntax that a chat template speaks; GENERIC where it has none of its own, or one not known here."""
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
    """Tools in OpenAI's form: {"type": "function", "function": {"name": ..., "parameters": ...}}.

    Raises EdgespecError for other forms, and for names that are invalid or given twice.
    """
    read: list[Tool] = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise EdgespecError(f'tools[{i}] must be {{"type": "function", "function": {{...}}}}.')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise EdgespecError(f"tools[{i}] needs a name of 1 to 64 letters, digits, '_', '-' and '.'.")
        if any(name == other.name for other in read):
            raise EdgespecError(f"The tool {name} is given twice.")
        if not isinstance(parameters, Mapping | None):
            raise EdgespecError(f"The parameters of {name} must be a JSON schema.")
        description = str(function.get("description") or "")
        schema = parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        read.append(Tool(name, description, schema, function.get("strict") is True))
    return read


def grammar(
    syntax: Syntax, tools: Sequence[Tool], choice: ToolChoice, tokens: Mapping[str, int] | None = None
) -> str | None:
    """A grammar, for `GrammarCompiler.build`, of answers that call `tools` as `choice` says; None for any.

    With "auto", text is free up to the trigger, after which nothing but calls follow. `tokens` are the ids of
    control tokens by their text. Raises EdgespecError for a choice that cannot be met.
    """
    if choice.named is not None:
        tools = [tool for tool in tools if tool.name == choice.named]
        if not tools:
            raise EdgespecError(f"tool_choice names {choice.named}, which is not among the tools.")
    elif choice.mode == "none" or (choice.mode == "auto" and not tools):
        return None
    if not tools:
        raise EdgespecError("tool_choice requires a call, but there are no tools.")
    opening, name = syntax.begin, syntax.name
    lead = ""
    if syntax.special:
        if (token := (tokens or {}).get(syntax.trigger)) is None:
            raise EdgespecError(f"The model has no token {syntax.trigger}, which its calls begin with.")
        opening, lead = opening.removeprefix(syntax.trigger), f"<[{token}]> "
    free = choice.mode == "auto" and choice.named is None
    rules: list[str] = []
    first: list[str] = []
    for i, tool in enumerate(tools):
        schema = grammar_sources.json_schema(
            tool.parameters, f"The schema of {tool.name}", strict=tool.strict
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
    """What to tell a model whose template says nothing of tools, as part of its system prompt."""
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
    """One call as the model writes it, `arguments` being JSON."""
    return syntax.name + name + syntax.middle + arguments + syntax.end


def folded(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """`messages` for a template that says nothing of tools: `tools`, calls and results written as text."""
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
        told = {"role": "system", "content": instructions(tools)}
        if result and result[0].get("role") == "system":
            told["content"] = f"{result.pop(0).get('content') or ''}\n\n{told['content']}".strip()
        result.insert(0, told)
    return result


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """Call number `index` began."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call number `index`, as JSON."""

    index: int
    text: str


OutputEvent = TextPiece | Called | Arguments


class CallParser:
    """Text in, events out: text at once, a call's name when it is complete, its arguments as they come.

    Space is taken as it comes between the parts of a call, and is no text between a text and a call. What
    begins like a call and is none is text.
    """

    def __init__(self, syntax: Syntax) -> None:
        self._trigger = syntax.trigger
        self._alone = syntax.alone
        start, again = syntax.begin + syntax.name, syntax.between + syntax.name
        name = r'((?:[^"\\]|\\.)*)'
        self._first = re.compile(rf"\s*{_loose(start)}{name}{_loose(syntax.middle)}\s*(?=\{{)", re.DOTALL)
        self._again = re.compile(rf"\s*{_loose(again)}{name}{_loose(syntax.middle)}\s*(?=\{{)", re.DOTALL)
        self._end = re.compile(rf"\s*{_loose(syntax.end)}")
        self._left = ""  # read and not told yet
        self._calls = 0
        self._arguments: _Braces | None = None  # of the call under way
        self._ending = False  # its arguments are told, what ends it is not read yet
        self._text = False  # an answer that is no call

    def feed(self, text: str) -> list[OutputEvent]:
        """What `text`, the next part of the answer, adds."""
        self._left += text
        events: list[OutputEvent] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[OutputEvent]:
        """What is left when the answer has ended: text that looked like a call. A call cut short stays so."""
        left, self._left = self._left, ""
        if self._arguments is not None or self._ending or (self._calls and not left.strip(" \n,]")):
            return []
        return [TextPiece(left)] if left else []

    def _step(self, events: list[OutputEvent]) -> bool:
        """Tell of the next thing in what is left; False if more must be read first."""
        if self._arguments is not None:
            n = self._arguments.read(self._left)
            if told := self._left[:n]:
                events.append(Arguments(self._calls - 1, told))
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
        """How many of the characters left are text for certain."""
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
    """Finds where a JSON object ends that comes in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def closed(self) -> bool:
        return self._depth < 0

    def read(self, text: str) -> int:
        """How many characters of `text` still belong to it."""
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
    """A regular expression of `text` with any space between its words and signs."""
    return r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", text)))


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text

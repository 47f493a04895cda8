"""Tools that a model may call, and prompts that describe them where the chat template cannot.

How calls are written is in `call_syntax`, their grammar in `call_grammar`, their parser in `answer_parser`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgespec.core import EdgespecError
from edgespec.models.prompting import grammar_sources
from edgespec.models.prompting.call_forms import Syntax, call_text, written
from edgespec.models.prompting.call_syntax import GENERIC, syntax_of

_WRITES_CALLS = re.compile(r"(?<![</\w])tool_calls\b")  # a field of messages, not the mark <tool_calls>
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


def instructions(tools: Sequence[Tool], syntax: Syntax = GENERIC) -> str:
    """Return the part of the system prompt that describes `tools`, for templates without tools."""
    listed = "\n".join(
        json.dumps(
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            ensure_ascii=False,
        )
        for tool in tools
    )
    example = written(syntax, [("NAME", {})]).replace("{}", "{...}")
    return (
        f"You can call these functions, described as JSON, one a line:\n{listed}\n\n"
        f"To call one, write nothing but\n{example}\n"
        "with its name and its arguments. Its result is told to you in <tool_response> tags."
    )


def folded(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], syntax: Syntax = GENERIC
) -> list[Mapping[str, Any]]:
    """Return `messages` for a template without tools: `tools` become text, and so do calls and results.

    A template with a `syntax` of its own has places for calls and results.
    """
    result: list[Mapping[str, Any]] = []
    previous = None
    for message in messages:
        content = message.get("content") or ""
        answered = bool(result) and previous == "tool"
        previous = message.get("role")
        if syntax is not GENERIC:
            result.append(message)
        elif message.get("role") == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            if answered:  # many templates want roles to alternate
                text = f"{result.pop()['content']}\n{text}"
            result.append({"role": "user", "content": text})
        elif calls := message.get("tool_calls"):
            texts = [content] if content else []
            texts += [call_text(GENERIC, *_plain_call(call)) for call in calls]
            result.append({"role": message["role"], "content": "\n".join(texts)})
        else:
            result.append(message)
    if tools:
        system = {"role": "system", "content": instructions(tools, syntax)}
        if result and result[0].get("role") == "system":
            system["content"] = f"{result.pop(0).get('content') or ''}\n\n{system['content']}".strip()
        result.insert(0, system)
    return result


def with_calls_as_text(messages: Sequence[Mapping[str, Any]], template: str) -> Sequence[Mapping[str, Any]]:
    """Return `messages` with calls as a part of the content, for a template that does not write them."""
    if _WRITES_CALLS.search(template):
        return messages
    syntax, result = syntax_of(template), list[Mapping[str, Any]]()
    for message in messages:
        if calls := message.get("tool_calls"):
            text = written(syntax, [_plain_call(call) for call in calls])
            content = f"{message.get('content') or ''}\n{text}".strip()
            message = {**message, "content": content}
        result.append(message)
    return result


def _plain_call(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the arguments of a call in OpenAI's form."""
    function = call.get("function", call)
    arguments = function["arguments"]
    return function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments

"""Names of tools that a model can write, in place of those that clients give them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgespec.core import EdgespecError
from edgespec.text import printable

_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LONGEST, _MODELS_LONGEST = 256, 64


class ToolNames:
    """The tools of one request under names of 1 to 64 letters, digits, `_`, `-` and `.`.

    Clients use up to 256 characters, with `/` and `:` in them. Raises EdgespecError for a name that is
    longer, empty, or has spaces.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._short: dict[str, str] = {}
        names = [str(tool["function"]["name"]) for tool in tools]
        taken = {name for name in names if _PLAIN.fullmatch(name)}
        for i, name in enumerate(names):
            if not 0 < len(name) <= _LONGEST or not name.isprintable() or any(c.isspace() for c in name):
                raise EdgespecError(
                    f"the name of tools[{i}], {printable(name, 60)!r}, must be "
                    f"1 to {_LONGEST} characters without spaces"
                )
            if name not in taken and name not in self._short:
                self._short[name] = _shortened(name, taken | set(self._short.values()))
        self._long = {short: name for name, short in self._short.items()}
        self.tools = [self._tool(tool) for tool in tools]

    def of_model(self, name: str) -> str:
        """Return the name that the model knows a tool by."""
        return self._short.get(name, name)

    def of_client(self, name: str) -> str:
        """Return the client's name of a tool that the model calls."""
        return self._long.get(name, name)

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return `messages` with the model's names in calls and results."""
        return [self._message(message) for message in messages] if self._short else list(messages)

    def _tool(self, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        function = tool["function"]
        if function["name"] not in self._short:
            return tool
        return {**tool, "function": {**function, "name": self.of_model(function["name"])}}

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if message["role"] == "tool" and "name" in message:
            return {**message, "name": self.of_model(message["name"])}
        calls = message.get("tool_calls")
        return {**message, "tool_calls": [self._tool(call) for call in calls]} if calls else message


def _shortened(name: str, taken: set[str]) -> str:
    """Return `name` in the characters that models know, and different from all that are `taken`."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:_MODELS_LONGEST]
    found, number = plain, 2
    while found in taken:
        found = f"{plain[: _MODELS_LONGEST - 5]}_{number}"
        number += 1
    return found

"""Calls as models write them in spite of their template: JSON, bare, in a fence or in tags.

Small models know several spellings of calls and mix them. An answer that is nothing but such calls of offered
tools, with arguments that fit their schemas, is taken for calls; anything else, such as a fenced example in
prose, stays text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgespec.models.prompting.answer_text import AnswerText, Steps
from edgespec.models.prompting.call_forms import Syntax
from edgespec.models.prompting.call_reader import CallReader, NotACall
from edgespec.models.prompting.call_values import parsed
from edgespec.models.prompting.output_events import Arguments, Called, OutputEvent
from edgespec.models.prompting.schema_fit import fits

_SYNTAX = Syntax("loose", "", "", "")
_NAMES = (
    "tools", "tool", "tool_call", "tool_calls", "function_call", "function_calls", "functions", "function",
)  # fmt: skip
_TAGS = [f"<{slash}{name}>" for name in _NAMES for slash in ("", "/")]
_FENCE = "```"
STARTS = frozenset("{[<`")
"""The characters with which such an answer may begin."""


class LooseCalls:
    """Reads an answer that may be nothing but calls of `tools`, which are known only at its end."""

    def __init__(self, source: AnswerText, tools: Mapping[str, Any]) -> None:
        self._source, self._tools = source, tools
        self.reader = CallReader(source, _SYNTAX, tools, strict=True)

    def calls(self) -> Steps[Sequence[OutputEvent]]:
        """Read the rest of the answer. Raises NotACall as soon as it cannot be calls only."""
        source, reader = self._source, self.reader
        while True:
            yield from source.spaces()
            c = yield from source.peek()
            if not c:
                break
            if c == "{":
                yield from reader.object()
            elif c in "[],;":
                source.skip()
            elif (yield from source.one_of([_FENCE])):
                while (yield from source.peek()).isalnum():
                    source.skip()
            elif not (yield from source.one_of(_TAGS)):
                raise NotACall
        if not reader.count or not all(self._fits(index) for index in range(reader.count)):
            raise NotACall
        return reader.events

    def _fits(self, index: int) -> bool:
        events = self.reader.events
        name = next(one.name for one in events if isinstance(one, Called) and one.index == index)
        text = "".join(one.text for one in events if isinstance(one, Arguments) and one.index == index)
        try:
            return fits(parsed(text), self._tools[name])
        except ValueError:
            return self._source.cut and index == self.reader.count - 1

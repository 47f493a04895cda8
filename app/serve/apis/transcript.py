"""A conversation of any API in the form of chat templates, and parts of messages that are no text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag

from edgespec.app.serve.apis.body import Body


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class OtherPart(Body):
    """Anything but text: an image, a document, a reference, reasoning, another program's call."""

    counts_unknown: ClassVar[bool] = False

    type: str


def _kind(part: Any) -> str | None:
    given = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    if not isinstance(given, str):
        return None
    return "text" if given in ("text", "input_text", "output_text") else "other"


AnyPart = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[OtherPart, Tag("other")], Discriminator(_kind)
]
Content = str | list[TextPart]
OpenContent = str | list[AnyPart]
"""Content in which parts other than text become notes, or are dropped."""


@dataclass(frozen=True, slots=True)
class PastCall:
    """A tool call of an earlier response. `arguments` is JSON, or was to become it."""

    id: str
    name: str
    arguments: str | Mapping[str, Any]


class Transcript:
    """Collects a conversation. `messages` are in the form of chat templates."""

    def __init__(self, messages: Iterable[Mapping[str, Any]] = ()) -> None:
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self._open: dict[str, str] = {}  # names of the calls without a result, by id
        for message in self.messages:
            for call in message.get("tool_calls", ()):
                self._open[call["id"]] = call["function"]["name"]
            self._open.pop(message.get("tool_call_id", ""), None)

    @property
    def ends_with_answer(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def ends_with_reasoning(self) -> bool:
        """Whether the last message is the reasoning of a response that has no text and no calls yet."""
        last = self.messages[-1] if self.messages else {}
        return "reasoning_content" in last and not last["content"] and "tool_calls" not in last

    def add(self, role: str, text: str) -> None:
        """Add a message of the user or the system; that of a developer is the system's."""
        self.messages.append({"role": "system" if role == "developer" else role, "content": text})

    def answer(self, text: str, calls: Sequence[PastCall] = (), reasoning: str = "") -> None:
        """Add an earlier response. Templates that know `reasoning` may show it; others have no use for it."""
        if not self.ends_with_reasoning:
            self.messages.append({"role": "assistant", "content": ""})
        message = self.messages[-1]
        message["content"] = text
        if reasoning:
            message["reasoning_content"] = reasoning
        for call in calls:
            self.call(call)

    def call(self, call: PastCall) -> None:
        """Add a call to the last response. One whose arguments are no JSON object, cut short, is text."""
        if not self.ends_with_answer:
            self.answer("")
        message = self.messages[-1]
        id_ = call.id or f"call_{len(self.messages)}_{len(message.get('tool_calls', ()))}"
        if (arguments := _object(call.arguments)) is None:
            shown = f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}'
            message["content"] = f"{message['content']}\n{shown}".strip()
        else:
            function = {"name": call.name, "arguments": arguments}
            made = {"id": id_, "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(made)
        self._open[id_] = call.name

    def result(self, text: str, id_: str | None, name: str | None = None, *, in_order: bool = False) -> None:
        """Add the result of a call.

        Without an id it is that of the open call, or of the first one if results come `in_order`. Raises
        ValueError if no call is open, or several.
        """
        if not id_:
            matching = [one for one, called in self._open.items() if name in (None, called)]
            matching = matching[:1] if in_order else matching
            if len(matching) != 1:
                place, count = len(self.messages), len(matching)
                raise ValueError(f"messages[{place}] needs a tool_call_id: {count} calls have no result")
            (id_,) = matching
        message = {"role": "tool", "content": text, "tool_call_id": id_}
        if called := self._open.pop(id_, None) or name:
            message["name"] = called
        self.messages.append(message)


def text_of(content: str | Sequence[Body] | None, *, notes: bool = False, joined: str = "") -> str:
    """Return the text of `content`; parts without text become notes if `notes`, else they are dropped."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [
        part.text if isinstance(part, TextPart) else note_of(part.model_dump()) if notes else ""
        for part in content
    ]
    return joined.join(text for text in texts if text)


def note_of(part: Mapping[str, Any]) -> str:
    """Return the text in a part of a tool's result, or a note in its place."""
    found = text_in(part)
    if found is not None:
        return found
    kind = str(part.get("type"))[:40]
    what = "an image" if "image" in kind else f"a part of type {kind}"
    return f"[{what} was left out: this model reads text only]"


def text_in(part: Mapping[str, Any]) -> str | None:
    """Return the text of a document, a search result or a reference, None if it has none."""
    kind = part.get("type")
    if kind in ("refusal", "tool_reference"):
        return str(part.get("refusal") or part.get("tool_name") or "")
    inner = part.get("content", part.get("source"))
    if isinstance(inner, Mapping):
        inner = inner.get("data") if inner.get("type") == "text" else inner.get("content")
    if isinstance(inner, list):
        inner = "\n".join(str(one.get("text") or "") for one in inner if isinstance(one, Mapping))
    if not isinstance(inner, str) or not inner:
        return None
    heads = [str(part[name]) for name in ("title", "source") if isinstance(part.get(name), str)]
    return "\n".join([*heads, inner])


def _object(arguments: str | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the arguments of a call, None if they are no JSON object."""
    from pydantic_core import from_json

    if isinstance(arguments, Mapping):
        return arguments
    try:
        given = from_json(arguments.strip() or "{}", allow_inf_nan=False)
    except ValueError:
        return None
    return given if isinstance(given, dict) else None

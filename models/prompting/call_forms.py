"""The forms in which models write tool calls, and the text of a call in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class JsonCall:
    """{"name": NAME, "arguments": {...}}; `lead` are earlier members. Without `name` it is {NAME: {...}}."""

    name: str = "name"
    arguments: str = "arguments"
    lead: str = ""

    def head(self, name: str) -> str:
        if not self.name:
            return f'{{"{name}": '
        return f'{{{self.lead}"{self.name}": "{name}", "{self.arguments}": '

    def tail(self) -> str:
        return "}"


@dataclass(frozen=True, slots=True)
class NamedCall:
    """NAME `middle` {...}. The model may write something short, an id or a type, before `middle`.

    With `identity` there is an id before that mark, and the name follows it.
    """

    middle: str
    suffix: str = ""  # of the name, in the text of calls
    identity: str = ""

    def head(self, name: str) -> str:
        return ("0" + self.identity if self.identity else "") + name + self.suffix + self.middle

    def tail(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class TaggedCall:
    """NAME `after`, and `key` KEY `quote` ... `value` VALUE `close` for each argument.

    Strings are written as they are, other values as JSON. `close` may contain {key}. `typed` is what is
    between `quote` and `value` for strings and for other values.
    """

    after: str
    key: str
    quote: str
    value: str
    close: str
    typed: tuple[str, str] = ("", "")
    padded: bool = False  # values stand on lines of their own

    def head(self, name: str) -> str:
        return name + self.after

    def tail(self) -> str:
        return ""

    def before_value(self, key: str, string: bool) -> str:
        return self.key + key + self.quote + self.typed[not string] + self.value + "\n" * self.padded

    def after_value(self, key: str) -> str:
        return "\n" * self.padded + self.close.format(key=key)


@dataclass(frozen=True, slots=True)
class ListedCall:
    """NAME(KEY=VALUE, ...), with the signs of Python or others. `quote`, if any, encloses strings."""

    left: str = "("
    assign: str = "="
    right: str = ")"
    quote: str = ""
    between: str = ", "

    def head(self, name: str) -> str:
        return name + self.left

    def tail(self) -> str:
        return self.right


CallForm = JsonCall | NamedCall | TaggedCall | ListedCall


@dataclass(frozen=True, slots=True)
class Syntax:
    """The syntax of calls: `begin`; for each call `open`, the call in its `form`, `shut`; `close`.

    `between` separates calls, which are `listed` in brackets or not. `trigger`, the start of `begin` or
    `open`, distinguishes a call from text. If `alone`, calls replace text instead of following it. Without
    `many` there is at most one. `taught`: the templates do not support tools, so the prompt must describe
    them (`tool_calls.instructions`). With `headers`, calls are messages whose header names the function
    (`reasoning.Thoughts`). `extra` is a mark that may come before calls, `text` one that comes before text.
    """

    family: str
    trigger: str
    open: str
    shut: str
    form: CallForm = field(default_factory=JsonCall)
    begin: str = ""
    between: str = ""
    close: str = ""
    alone: bool = False
    many: bool = True
    taught: bool = False
    headers: bool = False
    listed: bool = False
    extra: str = ""
    text: str = ""

    @property
    def start(self) -> str:
        """The text before the first call."""
        return self.begin + "[" * self.listed

    @property
    def end(self) -> str:
        """The text after the last call."""
        return "]" * self.listed + self.close

    def texts(self) -> Iterator[str]:
        """Yield the literal texts around names and values."""
        form = self.form
        yield from (
            self.trigger,
            self.begin,
            self.open,
            self.shut,
            self.between,
            self.close,
            self.extra,
            self.text,
        )
        if isinstance(form, NamedCall):
            yield from (form.middle, form.identity)
        elif isinstance(form, TaggedCall):
            yield from (form.after, form.key, form.quote, *form.typed, form.value, form.close)
        elif isinstance(form, ListedCall):
            yield form.quote


def call_text(syntax: Syntax, name: str, arguments: Mapping[str, Any]) -> str:
    """Return the text of one call."""
    form = syntax.form
    if isinstance(form, TaggedCall):
        written = "".join(_tagged(form, key, value) for key, value in arguments.items())
    elif isinstance(form, ListedCall):
        written = form.between.join(
            f"{key}{form.assign}{_value(form, value)}" for key, value in arguments.items()
        )
    else:
        written = json.dumps(arguments, ensure_ascii=False)
    return syntax.open + form.head(name) + written + form.tail() + syntax.shut


def written(syntax: Syntax, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the text of an answer that is nothing but `calls`."""
    return syntax.start + syntax.between.join(call_text(syntax, *call) for call in calls) + syntax.end


def _tagged(form: TaggedCall, key: str, value: Any) -> str:
    string = isinstance(value, str)
    text = value if string else json.dumps(value, ensure_ascii=False)
    return form.before_value(key, string) + text + form.after_value(key)


def _value(form: ListedCall, value: Any) -> str:
    if not form.quote or not isinstance(value, str | list | dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return form.quote + value + form.quote
    if isinstance(value, list):
        return "[" + ",".join(_value(form, one) for one in value) + "]"
    return "{" + ",".join(f"{key}:{_value(form, one)}" for key, one in value.items()) + "}"

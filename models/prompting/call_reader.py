"""Reads tool calls in the syntax of a model family, as they arrive.

The start of a call may turn out to be text: NotACall is raised, and the source has recorded what was read.
Once the name and the start of the arguments are there, it is a call, and what follows is read tolerantly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from edgespec.models.prompting.answer_text import AnswerText, Steps
from edgespec.models.prompting.call_forms import JsonCall, ListedCall, NamedCall, Syntax, TaggedCall
from edgespec.models.prompting.call_values import (
    as_json,
    is_string,
    json_text,
    listed_value,
    quoted,
    raw_json,
)
from edgespec.models.prompting.output_events import Arguments, Called, OutputEvent

_NAME_ENDS = frozenset("<>[]{}()\"':,|=")
_NAMES = frozenset({"name", "function", "tool", "tool_name"})
_ARGUMENTS = frozenset({"arguments", "parameters", "args", "input"})
_OTHERS = frozenset({"id", "type", "tool_call_id", "index"})
_MOST_IN_NAME = 256
_MOST_BETWEEN = 200  # characters between a name and its arguments
_MOST_IN_KEY = 300


class NotACall(Exception):  # noqa: N818 - no error: text may begin like a call
    """What was read is text."""


class CallReader:
    """Reads calls of `tools`, the schemas of the arguments by name, from `source`; empty for calls of any.

    `events` are what was read. If `strict`, a call has no members but the known ones. In an answer that was
    cut, what is missing is not completed.
    """

    def __init__(
        self, source: AnswerText, syntax: Syntax, tools: Mapping[str, Any], *, strict: bool = False
    ) -> None:
        self._source, self._form, self._tools, self._strict = source, syntax.form, tools, strict
        self.events: list[OutputEvent] = []
        self.count = 0
        opens, self._ends = _lines(syntax.open), {*_lines(syntax.shut), *_lines(syntax.close)}
        self._lead = opens[-1] if opens and not isinstance(self._form, JsonCall) else ""
        self._inside = self._alone = syntax.alone  # between the marks of calls
        begins = dict.fromkeys([syntax.trigger, syntax.extra, *_lines(syntax.begin), *opens])
        self._marks = {*begins, *self._ends} - {"{"}
        self.triggers = () if syntax.headers else tuple(mark for mark in begins if mark not in ("", "{"))

    def calls(self, mark: str) -> Steps[str]:
        """Read the calls that `mark`, which was read, begins; return the text that was read after them.

        Raises NotACall if there is none.
        """
        self._inside = True
        yield from self._call(mark)
        while True:
            self._source.hold()
            try:
                yield from self._call("")
            except NotACall:
                left = self._source.unread
                if self._source.ended and any(mark.startswith(left) for mark in self._ends):
                    self._source.skip(len(left))
                return self._without_marks(self._source.release())

    def _without_marks(self, text: str) -> str:
        text, ended = text.lstrip(), False
        while text:
            mark = next((one for one in self._marks if one and text.startswith(one)), "")
            if not mark and (ended or text[0] not in "[],;"):
                break
            ended = ended or mark in self._ends
            text = text[len(mark) or 1 :].lstrip()
        return "" if any(mark.startswith(text) for mark in self._ends) else text

    def _call(self, mark: str) -> Steps[None]:
        """Read the call that follows `mark`. Raises NotACall."""
        named = yield from self._marks_before(mark)
        form = self._form
        begins = yield from self._source.peek()
        if begins == "{" and self._inside and not isinstance(form, ListedCall):
            yield from self.object()
        elif not named:
            raise NotACall
        elif isinstance(form, NamedCall):
            if form.identity:
                yield from self._skip_to(form.identity)
            yield from self.named((yield from self._name()), form.middle)
        elif isinstance(form, TaggedCall):
            yield from self._tagged((yield from self._name()), form)
        elif isinstance(form, ListedCall):
            yield from self._listed((yield from self._name()), form)
        else:
            raise NotACall

    def _marks_before(self, mark: str) -> Steps[bool]:
        """Read marks around calls; return whether a name follows them."""
        source = self._source
        while not (self._lead and mark == self._lead):
            yield from source.spaces()
            if mark := (yield from source.one_of(self._marks)):
                self._inside = self._alone or mark not in self._ends
            elif self._inside and (sign := (yield from source.peek())) and sign in "[],;":
                source.skip()
                self._inside = self._alone or sign != "]"
            else:
                return self._inside and not self._lead
        return True

    def _name(self) -> Steps[str]:
        name: list[str] = []
        while (c := (yield from self._source.peek())) and not c.isspace() and c not in _NAME_ENDS:
            name.append(self._source.skip())
            if len(name) > _MOST_IN_NAME:
                raise NotACall
        return "".join(name)

    def _begin(self, name: str) -> None:
        """Report a call, which is certain now. Raises NotACall unless `name` is a tool's."""
        if not name or (self._tools and name not in self._tools):
            raise NotACall
        if not self._strict:
            self._source.release()
        self.events.append(Called(self.count, name))
        self.count += 1

    def _emit(self, text: str) -> None:
        if text:
            self.events.append(Arguments(self.count - 1, text))

    def _skip_to(self, mark: str) -> Steps[None]:
        if (yield from self._source.until(mark, _MOST_BETWEEN)) is None:
            raise NotACall

    # Arguments in JSON

    def named(self, name: str, middle: str) -> Steps[None]:
        """Read what follows the name of a call whose arguments are JSON."""
        if mark := middle.strip():
            yield from self._skip_to(mark)
        yield from self._source.spaces()
        if (yield from self._source.peek()) != "{":
            raise NotACall
        self._begin(name)
        yield from self._object_text()

    def object(self, nested: bool = False) -> Steps[None]:
        """Read an object with the name and the arguments of a call, in any order."""
        source, name, early, before = self._source, "", "", self.count
        by_name = isinstance(self._form, JsonCall) and not self._form.name
        source.skip()
        while True:
            yield from source.spaces()
            if (yield from source.one_of([","])):
                continue
            key = yield from self._key()
            if key is None:
                break
            yield from source.spaces()
            if not (yield from source.one_of([":"])):
                break
            yield from source.spaces()
            begins = yield from source.peek()
            begun = self.count > before
            if begins == "{" and not begun and (by_name or (key in _ARGUMENTS and name)):
                self._begin(key if by_name else name)
                yield from self._object_text()
            elif begins == "{" and not begun and key == "function" and not nested:
                yield from self.object(nested=True)
            elif begins == '"' and not begun and key in _NAMES:
                name = (yield from self._one_quoted(self._tools)) or ""
            elif key in _ARGUMENTS and not begun:
                early = yield from raw_json(source)
            else:
                self._check(key in _OTHERS or not self._strict)
                yield from raw_json(source)
        closed = yield from source.one_of(["}"])
        if self.count == before:
            arguments = json_text(early or "{}")
            self._check(bool(closed) and arguments is not None)
            self._begin(name)
            self._emit(arguments or "{}")

    def _key(self) -> Steps[str | None]:
        if (yield from self._source.peek()) != '"':
            return None
        return (yield from self._one_quoted(_NAMES | _ARGUMENTS | _OTHERS if self._strict else ()))

    def _one_quoted(self, texts: Collection[str]) -> Steps[str | None]:
        """Read a JSON string, one of `texts` if there are some. Raises NotACall as soon as it is another."""
        if not texts:
            return (yield from quoted(self._source))
        found = yield from self._source.one_of([json.dumps(text, ensure_ascii=False) for text in texts])
        self._check(bool(found))
        return str(json.loads(found))

    def _check(self, good: bool) -> None:
        if not good:
            raise NotACall

    def _object_text(self) -> Steps[None]:
        """Read a JSON object and report it as it is."""
        source, piece = self._source, list[str]()
        depth, inside, escaped = 0, False, False
        while True:
            if source.empty:
                self._emit("".join(piece))
                piece.clear()
            if not (c := (yield from source.peek())):
                return
            piece.append(source.skip())
            if escaped:
                escaped = False
            elif inside:
                escaped, inside = c == "\\", c != '"'
            elif c == '"':
                inside = True
            else:
                depth += (c in "{[") - (c in "}]")
                if depth == 0:
                    break
        self._emit("".join(piece))

    # Arguments between tags

    def _tagged(self, name: str, form: TaggedCall) -> Steps[None]:
        source = self._source
        if mark := form.after.strip():
            yield from self._skip_to(_last_sign(mark))
        marks = {form.key, *self._ends}
        yield from source.spaces()
        mark = yield from source.one_of(marks)
        self._check(bool(mark))
        self._begin(name)
        schema, lead = self._tools.get(name), "{"
        while mark == form.key:
            key = yield from source.until(form.quote, _MOST_IN_KEY)
            typed = (yield from source.until(form.value.strip(), _MOST_BETWEEN)) if form.value else ""
            if key is None or typed is None:
                break
            self._emit(f"{lead}{json.dumps(key, ensure_ascii=False)}: ")
            lead = ", "
            yield from self._tag_value(form, key, self._is_string(form, typed, _property(schema, key)))
            yield from source.spaces()
            mark = yield from source.one_of(marks)
        if mark or not self._was_cut:
            self._emit("{}" if lead == "{" else "}")

    def _is_string(self, form: TaggedCall, typed: str, schema: Any) -> bool | None:
        string, other = form.typed
        if string and string.strip() in typed:
            return True
        if other and other.split("=")[0].strip() in typed:
            return False
        return is_string(schema)

    def _tag_value(self, form: TaggedCall, key: str, string: bool | None) -> Steps[None]:
        """Read a value and report it as JSON; of a string, what has arrived."""
        source, close = self._source, form.close.format(key=key).strip()
        pattern, last, held = re.compile(re.escape(close)), "", list[str]()
        if form.padded:
            yield from source.one_of(["\n"])
        if string:
            self._emit('"')
        while piece := (yield from source.before(pattern, [close])):
            piece = last + piece
            last = "\n" if form.padded and piece.endswith("\n") else ""
            piece = piece.removesuffix(last) if last else piece
            if string:
                self._emit(json.dumps(piece, ensure_ascii=False)[1:-1])
            else:
                held.append(piece)
        closed = yield from source.one_of([close])
        if self._source.cut and not closed:
            return
        self._emit('"' if string else _other_json("".join(held), string))

    # Arguments in a list

    def _listed(self, name: str, form: ListedCall) -> Steps[None]:
        source, lead = self._source, "{"
        self._check(bool((yield from source.one_of([form.left]))))
        begun = False
        while True:
            yield from source.spaces()
            if (yield from source.one_of([form.right])):
                break
            if (yield from source.one_of([","])):
                continue
            key = yield from listed_value(source, form.quote)
            yield from source.spaces()
            assigned = bool(key) and (yield from source.one_of([form.assign]))
            if not begun:
                self._check(bool(assigned))
                self._begin(name)
                begun = True
            value = (yield from listed_value(source, form.quote)) if assigned else None
            if key is None or value is None or self._was_cut:
                break
            key = key if key.startswith('"') else json.dumps(key)
            self._emit(f"{lead}{key}: {value}")
            lead = ", "
        if not begun:
            self._begin(name)
        if not self._was_cut:
            self._emit("{}" if lead == "{" else "}")

    @property
    def _was_cut(self) -> bool:
        return self._source.cut and self._source.ended and self._source.empty


def _property(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def _other_json(text: str, string: bool | None) -> str:
    text = text if string is None else text.strip()
    return as_json(text)


def _lines(text: str) -> list[str]:
    """Return the marks in `text`, a literal part of a syntax."""
    return [mark for line in text.split("\n") if (mark := line.strip())]


def _last_sign(mark: str) -> str:
    """Return the end of a mark that follows a name and what the model may add."""
    return "<|sep|>" if mark.endswith("<|sep|>") else mark[-1]

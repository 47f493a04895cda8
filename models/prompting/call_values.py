"""Values of arguments as models write them, read as JSON: JSON itself, Python's literals, Gemma's."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from edgespec.models.prompting.answer_text import AnswerText, Steps

_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "a": "\a", "v": "\v", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}
_MOST_NESTED = 60
_MOST_IN_KEY = 1000


def parsed(text: str) -> Any:
    """Return the value of a JSON text, in which control characters may be unescaped. Raises ValueError."""
    try:
        return json.loads(text, strict=False, parse_constant=_refused)
    except RecursionError:
        raise ValueError("too deeply nested") from None


def json_text(value: str) -> str | None:
    """Return the JSON object that `value`, JSON, is or contains as a string; None if it is neither."""
    try:
        found = parsed(value)
        if isinstance(found, str):
            value, found = found, parsed(found)
    except ValueError:
        return None
    if found is None:
        return "{}"
    return value if isinstance(found, dict) else None


def as_json(text: str) -> str:
    """Return `text`, a value that is JSON or else a string, as JSON."""
    try:
        return json.dumps(parsed(text), ensure_ascii=False)
    except ValueError:
        return _WORDS.get(text) or json.dumps(text, ensure_ascii=False)


def is_string(schema: Any) -> bool | None:
    """Return whether a value of `schema` is a string, None if it may be something else, too."""
    if not isinstance(schema, dict):
        return None
    if "enum" in schema and isinstance(schema["enum"], list):
        return all(isinstance(one, str) for one in schema["enum"]) or None
    kind = schema.get("type")
    if kind is None:
        return None
    return kind in ("string", ["string"])


def quoted(source: AnswerText) -> Steps[str | None]:
    """Read a JSON string and return its value, None if it is none or too long for a key or a name."""
    text: list[str] = [source.skip()]
    while (c := (yield from source.peek())) and len(text) <= _MOST_IN_KEY:
        text.append(source.skip())
        if c == "\\" and (yield from source.peek()):
            text.append(source.skip())
        elif c == '"':
            try:
                return str(parsed("".join(text)))
            except ValueError:
                return None
    return None


def raw_json(source: AnswerText) -> Steps[str]:
    """Read a JSON value and return its text, up to the end of a value that is cut."""
    text: list[str] = []
    depth, inside = 0, False
    while c := (yield from source.peek()):
        if not inside and depth == 0 and (c in ",}]" or c.isspace()):
            break
        text.append(source.skip())
        if inside and c == "\\" and (yield from source.peek()):
            text.append(source.skip())
        elif c == '"':
            inside = not inside
        elif not inside:
            depth += (c in "{[") - (c in "}]")
    return "".join(text)


def listed_value(source: AnswerText, quote: str, depth: int = 0) -> Steps[str | None]:
    """Read a value in the style of Python or Gemma and return it as JSON, None if it is malformed."""
    if depth > _MOST_NESTED:
        return None
    yield from source.spaces()
    if quote and (yield from source.one_of([quote])):
        return json.dumps((yield from source.until(quote, 1 << 24)), ensure_ascii=False)
    c = yield from source.peek()
    if c and c in "\"'":
        return json.dumps((yield from _literal(source)), ensure_ascii=False)
    if c and c in "[({":
        return (yield from _members(source, quote, depth))
    word: list[str] = []
    while (c := (yield from source.peek())) and c not in ",)]}=:" and not c.isspace():
        word.append(source.skip())
    text = "".join(word)
    if not text:
        return None
    if _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return text
    return _WORDS.get(text) or json.dumps(text, ensure_ascii=False)


def _members(source: AnswerText, quote: str, depth: int) -> Steps[str | None]:
    """Read a list, a tuple or a dictionary."""
    opened = source.skip()
    closing = {"[": "]", "(": ")", "{": "}"}[opened]
    members: list[str] = []
    while True:
        yield from source.spaces()
        c = yield from source.peek()
        if c == closing:
            source.skip()
            break
        if c == ",":
            source.skip()
            continue
        value = yield from listed_value(source, quote, depth + 1)
        if value is None:
            return None
        if opened == "{":
            yield from source.spaces()
            if not (yield from source.one_of([":"])):
                return None
            key = value if value.startswith('"') else json.dumps(value)
            value = yield from listed_value(source, quote, depth + 1)
            if value is None:
                return None
            value = f"{key}: {value}"
        members.append(value)
    text = ", ".join(members)
    return f"{{{text}}}" if opened == "{" else f"[{text}]"


def _literal(source: AnswerText) -> Steps[str]:
    """Read a string of Python or JSON and return its value."""
    end, text = source.skip(), []
    while (c := (yield from source.peek())) and c != end:
        source.skip()
        if c == "\\":
            c = yield from _escaped(source)
        text.append(c)
    if c:
        source.skip()
    # JSON writes characters beyond U+FFFF as two escapes.
    return "".join(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _escaped(source: AnswerText) -> Steps[str]:
    """Read what follows a backslash."""
    c = yield from source.peek()
    source.skip(len(c))
    if c not in _CODES:
        return _ESCAPES.get(c, c if c in "\\'\"/" else "\\" + c)
    digits = ""
    while len(digits) < _CODES[c] and (d := (yield from source.peek())) and d in "0123456789abcdefABCDEF":
        digits += source.skip()
    code = int(digits, 16) if digits else 0x110000
    return chr(code) if code < 0x110000 else "\\" + c + digits


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")

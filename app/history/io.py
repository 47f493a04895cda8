"""Export of conversations to Markdown and JSON, and import of that JSON, which is not trusted.

Exports contain no control characters: Markdown is cleaned, JSON escapes them.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, get_args

from edgespec.app.history.rows import Conversation, MessageRole, Sources, StoredMessage
from edgespec.app.history.store import History
from edgespec.app.terminal import clean, one_line
from edgespec.core import EdgespecError
from edgespec.files import write_whole

_FORMAT, _VERSION = "edgespec-history", 1
_MOST_BYTES = 64_000_000
_MOST_VALUES = 10_000_000  # 64 bytes of memory for a value of one byte
_MOST_SETTINGS = 20_000  # characters of a JSON object
_MOST_LINE, _DEEPEST = 1000, 4
_YEAR_10000 = 253_402_300_800


def to_markdown(history: History, conversation: int) -> str:
    """Export the branch that is shown, under the title."""
    with history.snapshot():
        about, messages = history.conversation(conversation), history.branch(conversation)
    day = datetime.fromtimestamp(about.created, UTC).date().isoformat()
    parts = [
        f"# {one_line(about.title) or 'Conversation'}",
        " · ".join(filter(None, (day, one_line(about.model)))),
    ]
    if about.system.strip():
        parts += ["## System", clean(about.system).strip()]
    for message in messages:
        stopped = "" if message.state == "complete" else " (stopped)"
        parts += [f"## {message.role.capitalize()}{stopped}", clean(message.text).strip()]
    return "\n\n".join(parts) + "\n"


def to_json(history: History, conversations: Sequence[int] | None = None) -> str:
    """Export conversations with all their branches; without a list, all that are not deleted."""
    with history.snapshot():
        if conversations is None:
            chosen = history.conversations(limit=-1)
        else:
            chosen = [history.conversation(number) for number in conversations]
        tables = [_conversation(about, history.messages(about.id)) for about in chosen]
    data = {"format": _FORMAT, "version": _VERSION, "conversations": tables}
    text = json.dumps(data, ensure_ascii=False, indent=1)
    for character in set(text):
        if clean(character) != character:  # only strings contain such characters
            text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"


def _conversation(about: Conversation, messages: Sequence[StoredMessage]) -> dict[str, Any]:
    return {
        "title": about.title, "created": about.created, "updated": about.updated, "pinned": about.pinned,
        "system": about.system, "persona": about.persona, "model": about.model, "sampling": about.sampling,
        "head": about.head,
        "messages": [
            {
                "id": message.id, "parent": message.parent, "role": message.role, "text": message.text,
                "created": message.created, "state": message.state, "stats": message.stats,
                "sources": message.sources,
            }
            for message in messages
        ],
    }  # fmt: skip


def from_json(history: History, text: str) -> list[int]:
    """Add the conversations of an export by `to_json`. Returns their numbers.

    Raises EdgespecError, and adds nothing, if `text` is not such an export.
    """
    if len(text) > _MOST_BYTES or sum(map(text.count, "[{,")) > _MOST_VALUES:
        raise _fault("it is too large")
    try:
        data = json.loads(text, parse_constant=_not_finite, parse_float=_finite)
    except RecursionError:
        raise _fault("it is nested too deeply") from None
    except ValueError as error:
        raise _fault(f"it is not JSON: {one_line(str(error))}") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise _fault("it is not an export of Edgespec")
    if type(version := data.get("version")) is not int or version != _VERSION:
        raise _fault("its version is unknown, update Edgespec")
    conversations = _Table(data, "the file").take("conversations", _list)
    return history.add([_parsed(value, f"conversation {n}") for n, value in enumerate(conversations, 1)])


def read(path: Path) -> str:
    """Read a file to import. Raises EdgespecError if it is too large, not a file, or not UTF-8."""
    name = one_line(str(path))
    try:
        # O_NONBLOCK: opening a named pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_BYTES:
                raise EdgespecError(f"cannot import {name}: not a file, or larger than {_MOST_BYTES:,} bytes")
            return file.read(_MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise EdgespecError(f"cannot read {name}: {error.strerror}") from None
    except ValueError:
        raise EdgespecError(f"cannot import {name}: not UTF-8 text") from None


def write(path: Path, text: str) -> None:
    """Write an export atomically, readable by the user alone. Raises EdgespecError if that fails."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise EdgespecError(f"cannot write {one_line(str(path))}: {error.strerror}") from None


# --- parsing an import ---


def _parsed(value: object, where: str) -> tuple[Conversation, list[StoredMessage]]:
    table = _Table(value, where)
    messages: list[StoredMessage] = []
    known: set[int] = set()
    for n, each in enumerate(table.take("messages", _list), 1):
        message = _parsed_message(each, f"{where}, message {n}")
        if message.id in known or not (message.parent is None or message.parent in known):
            raise _fault(f"{where}, message {n}: ids must differ, and a parent precedes its children")
        known.add(message.id)
        messages.append(message)
    head = table.take("head", _optional_int)
    if head not in known and (messages or head is not None):
        raise _fault(f"{where}: head must be one of its messages")
    conversation = Conversation(
        head=head, pinned=table.take("pinned", _bool), created=table.take("created", _time),
        updated=table.take("updated", _time), title=table.take("title", _short),
        model=table.take("model", _short), persona=table.take("persona", _short),
        sampling=table.take("sampling", _settings), system=table.take("system", _str),
    )  # fmt: skip
    table.end()
    return conversation, messages


def _parsed_message(value: object, where: str) -> StoredMessage:
    table = _Table(value, where)
    state = table.take("state", _one_of("complete", "stopped", "partial"))
    message = StoredMessage(
        id=table.take("id", _int), conversation=0, parent=table.take("parent", _optional_int),
        role=table.take("role", _one_of(*get_args(MessageRole))),
        state="stopped" if state == "partial" else state,
        created=table.take("created", _time), stats=table.take("stats", _settings),
        text=table.take("text", _str), sources=table.take("sources", _sources),
    )  # fmt: skip
    table.end()
    return message


class _Table:
    """A JSON object whose entries are taken one by one, each checked, until none is left."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise _fault(f"{where} is not an object")
        self._left, self._where = dict(value), where

    def take(self, name: str, kind: Callable[[Any], Any]) -> Any:
        try:
            return kind(self._left.pop(name))
        except KeyError:
            raise _fault(f"{self._where} has no {name}") from None
        except (ValueError, TypeError, RecursionError):
            raise _fault(f"{self._where}: {name} has an invalid value") from None

    def end(self) -> None:
        if self._left:
            raise _fault(f"{self._where} has an unknown entry {one_line(str(next(iter(self._left))))[:40]!r}")


def _exactly(kind: type) -> Callable[[object], Any]:
    def check(value: object) -> object:
        if type(value) is not kind:  # so that True is not a number
            raise TypeError
        return value

    return check


_bool, _int, _str, _list, _dict = map(_exactly, (bool, int, str, list, dict))


def _optional_int(value: object) -> int | None:
    return None if value is None else int(_int(value))


def _short(value: object) -> str:
    if len(text := str(_str(value))) > _MOST_LINE:
        raise ValueError
    return text


def _one_of(*words: str) -> Callable[[object], Any]:
    def check(value: object) -> object:
        if value not in words:
            raise ValueError
        return value

    return check


def _time(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < _YEAR_10000:
        raise ValueError
    return float(value)


def _settings(value: object) -> Mapping[str, Any]:
    """Accept an object of limited depth and size."""

    def depth(part: object) -> int:
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return 1 + max(map(depth, parts), default=0)

    if depth(_dict(value)) > _DEEPEST or len(json.dumps(value)) > _MOST_SETTINGS:
        raise ValueError
    settings: Mapping[str, Any] = _dict(value)
    return settings


def _sources(value: object) -> Sources:
    runs = []
    for run in _list(value):
        source, lengths = _list(run)
        if not all(type(n) is int and 0 <= n <= _MOST_BYTES for n in _list(lengths)):
            raise ValueError
        runs.append((_short(source), lengths))
    return runs


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("a number is too large")
    return number


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _fault(what: str) -> EdgespecError:
    return EdgespecError(f"cannot import this file: {what}")

"""Conversations and messages of the history, and their rows in SQLite."""

# ruff: noqa: S608 - every name that is put into a statement is defined in this file

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from edgespec.app.history.db import sound

MessageRole = Literal["system", "user", "assistant", "tool"]
MessageState = Literal["complete", "stopped", "partial"]
"""`partial` is being generated; after a crash it becomes `stopped` when the history is opened again."""
Sources = Sequence[tuple[str, Sequence[int]]]
"""The sources of an answer's tokens: runs of one source, with the number of characters of each token."""

_TITLE = 80  # characters


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation without its messages; `head` is the last message of the branch that is shown.

    Times are in seconds since 1970; `deleted_at` is None unless the conversation is deleted. `system` is the
    system prompt, `persona` its name, `sampling` the settings as JSON values.
    """

    id: int = 0
    head: int | None = None
    pinned: bool = False
    created: float = 0.0
    updated: float = 0.0
    deleted_at: float | None = None
    title: str = ""
    model: str = ""
    persona: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message, the `place`-th (from 1) of the `places` children of `parent`."""

    id: int
    conversation: int
    parent: int | None
    role: MessageRole
    state: MessageState
    created: float
    stats: Mapping[str, Any]
    text: str
    sources: Sources
    place: int = 1
    places: int = 1


_CONVERSATION = "id, head, pinned, created, updated, deleted_at, title, model, persona, sampling, system"
CONVERSATIONS = f"SELECT {_CONVERSATION} FROM conversations"
_SIBLINGS = "SELECT count(*) FROM messages s WHERE s.conversation = m.conversation AND s.parent IS m.parent"
MESSAGES = f"""SELECT m.id, m.conversation, m.parent, m.role, m.state, m.created, m.stats,
    m.text || coalesce((SELECT group_concat(text, '')
        FROM (SELECT text FROM pieces WHERE message = m.id ORDER BY id)), ''),
    m.sources, ({_SIBLINGS} AND s.id <= m.id), ({_SIBLINGS}) FROM messages m"""
# The id of a parent is smaller, so that this ends even in a damaged file.
PATH = """path (id, parent) AS (SELECT id, parent FROM messages WHERE id = ? UNION ALL
    SELECT m.id, m.parent FROM path JOIN messages m ON m.id = path.parent AND m.id < path.id)"""


def conversation_of(row: Sequence[Any]) -> Conversation:
    number, head, pinned, created, updated, deleted_at, title, model, persona, sampling, system = row
    return Conversation(
        number,
        head,
        bool(pinned),
        created,
        updated,
        deleted_at,
        title,
        model,
        persona,
        _loaded(sampling, {}),
        system,
    )


def message_of(row: Sequence[Any]) -> StoredMessage:
    number, conversation, parent, role, state, created, stats, text, sources, place, places = row
    runs: Sources = ()
    with suppress(ValueError, TypeError):
        runs = tuple((source, tuple(lengths)) for source, lengths in _loaded(sources, []))
    return StoredMessage(
        number, conversation, parent, role, state, created, _loaded(stats, {}), text, runs, place, places
    )


def insert_conversation(db: sqlite3.Connection, c: Conversation) -> int:
    """Insert a conversation without its messages. Returns its number."""
    values = (
        None, None, int(c.pinned), c.created, c.updated, c.deleted_at, sound(c.title), sound(c.model),
        sound(c.persona), dumped(c.sampling), sound(c.system),
    )  # fmt: skip
    cursor = db.execute(f"INSERT INTO conversations ({_CONVERSATION}) VALUES ({', '.join('?' * 11)})", values)
    return cursor.lastrowid or 0


def insert_message(db: sqlite3.Connection, m: StoredMessage) -> int:
    cursor = db.execute(
        """INSERT INTO messages (conversation, parent, role, state, created, stats, text, sources)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
        (
            m.conversation, m.parent, m.role, m.state, m.created, dumped(m.stats), sound(m.text),
            dumped(m.sources),
        ),
    )  # fmt: skip
    return cursor.lastrowid or 0


def show(db: sqlite3.Connection, leaf: int) -> None:
    """Make `leaf` the head, and choose the messages on the path to it."""
    db.execute(
        f"""WITH RECURSIVE {PATH} UPDATE messages SET chosen = path.id FROM path
        WHERE messages.id = path.parent AND messages.chosen IS NOT path.id""",
        (leaf,),
    )
    db.execute(
        "UPDATE conversations SET head = ?1 WHERE id = (SELECT conversation FROM messages WHERE id = ?1)",
        (leaf,),
    )


def leaf_below(db: sqlite3.Connection, message: int) -> int:
    """The last message of the branch last shown below `message`."""
    (leaf,) = db.execute(
        """WITH RECURSIVE way (id, chosen) AS (SELECT id, chosen FROM messages WHERE id = ? UNION ALL
        SELECT m.id, m.chosen FROM way JOIN messages m ON m.id = way.chosen AND m.id > way.id)
        SELECT max(id) FROM way""",
        (message,),
    ).fetchone()
    return int(leaf)


def dumped(value: object) -> str:
    """Encode as JSON, with null for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:  # perhaps only in a string
        value = json.loads(text, parse_constant=lambda _: None)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return sound(text)


def _loaded(text: str, default: Any) -> Any:
    """Decode a column. Returns `default` if it is not JSON of the type of `default`."""
    with suppress(ValueError):
        value = json.loads(text)
        if type(value) is type(default):
            return value
    return default


def title_of(text: str) -> str:
    """The first line that is not empty, truncated."""
    line = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")
    return sound(line if len(line) <= _TITLE else line[: _TITLE - 1] + "…")

"""Full-text search of the history: the query for FTS5, and snippets of the hits."""

# ruff: noqa: S608 - every name that is put into a statement is defined in this file

from __future__ import annotations

import re
import secrets
import sqlite3
from dataclasses import dataclass

from edgespec.app.history.db import sound

_MOST_TYPED, _MOST_WORDS = 1000, 20
_LENGTH, _LEAD = 240, 60  # characters of a snippet, and before its first match
_TOKENS = 24
# Thai to Khmer, kana, Han: written without spaces, so that the index contains runs of words only.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, slots=True)
class Hit:
    """A match in a message, or in the title of a conversation if `message` is None.

    `matches` are the ranges [start, end) of `snippet` that matched. To show a snippet, clean the parts
    between these limits one by one: cleaning changes the offsets of what follows.
    """

    conversation: int
    title: str
    message: int | None
    snippet: str
    matches: tuple[tuple[int, int], ...]


def search(db: sqlite3.Connection, query: str, limit: int) -> list[Hit]:
    """Find titles, then messages, that contain every word of `query`, newest first, at most `limit`.

    Words match as prefixes, regardless of case and accents; symbols, and words of scripts without spaces,
    match literally anywhere. Every query is valid. Deleted conversations are not searched.
    """
    words = sound(query[:_MOST_TYPED]).replace("\0", " ").split()[:_MOST_WORDS]
    literal = [word for word in words if _UNSPACED.search(word) or not any(map(str.isalnum, word))]
    match = " ".join('"' + word.replace('"', '""') + '"*' for word in words if word not in literal)
    hits: list[Hit] = []
    for table, column in (("conversations", "title"), ("messages", "text")) if words else ():
        hits += _search(db, table, column, match, literal, limit - len(hits))
    return hits


def _search(
    db: sqlite3.Connection, table: str, column: str, match: str, literal: list[str], limit: int
) -> list[Hit]:
    index, mark = f"{table}_words", secrets.token_hex(8)  # random, so that no message contains it
    start, end = f"<{mark}", f"{mark}>"
    where = [f"t.{column} LIKE ? ESCAPE '\\'" for _ in literal]
    values: list[object] = ["%" + re.sub(r"([%_\\])", r"\\\1", word) + "%" for word in literal]
    if match:
        found, origin, order = (
            f"snippet({index}, 0, ?, ?, '…', {_TOKENS})",
            f"{index} JOIN {table} t ON t.id = {index}.rowid",
            f"{index}.rowid",
        )
        where, values = [f"{index} MATCH ?", *where], [start, end, match, *values]
    else:
        found, origin, order = f"t.{column}", f"{table} t", "t.id"
    of = "t.conversation" if table == "messages" else "t.id"
    rows = db.execute(
        f"""SELECT c.id, c.title, t.id, {found} FROM {origin} JOIN conversations c ON c.id = {of}
        WHERE {" AND ".join(where)} AND c.deleted_at IS NULL ORDER BY {order} DESC LIMIT ?""",
        (*values, limit),
    )
    hits = []
    for conversation, title, number, text in rows:
        snippet, matches = _marked(text, start, end) if match else _around(text, literal)
        message = number if table == "messages" else None
        hits.append(Hit(conversation, title, message, snippet, matches))
    return hits


def _marked(text: str, start: str, end: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Remove the marks from a text. Returns it with the ranges that they enclosed."""
    before, *rest = text.split(start)
    plain, matches = before, []
    for part in rest:
        inside, _, after = part.partition(end)
        matches.append((len(plain), len(plain) + len(inside)))
        plain += inside + after
    return _cut(plain, matches)


def _around(text: str, words: list[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text around the first of `words`, and the ranges of these words in it."""
    pattern = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
    first = pattern.search(text)
    at = max(0, first.start() - _LEAD) if first else 0
    part = text[at : at + _LENGTH]
    return part, tuple(match.span() for match in pattern.finditer(part))


def _cut(text: str, matches: list[tuple[int, int]]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """At most `_LENGTH` characters from shortly before the first match: a word may have any length."""
    at = max(0, matches[0][0] - _LEAD) if matches and len(text) > _LENGTH else 0
    inside = [(max(a - at, 0), min(b - at, _LENGTH)) for a, b in matches if a - at < _LENGTH]
    return text[at : at + _LENGTH], tuple(inside)

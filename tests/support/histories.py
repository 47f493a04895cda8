"""Conversations for the tests of the history."""

from __future__ import annotations

from hypothesis import strategies as st

from edgespec.app.history.rows import StoredMessage
from edgespec.app.history.store import History

written = st.text(st.characters(codec=None))
"""Any text, including lone surrogates and control characters."""


def texts(messages: list[StoredMessage]) -> list[str]:
    return [message.text for message in messages]


def talk(history: History, *lines: str) -> list[StoredMessage]:
    """Store a conversation of these lines, alternately of the user and of the model."""
    about = history.new()
    return [history.append(about.id, ("user", "assistant")[n % 2], line) for n, line in enumerate(lines)]


def storable(text: str) -> str:
    """`text` as the history stores it."""
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)

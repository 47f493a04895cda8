"""Conversations of earlier responses, which a client continues by `previous_response_id`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

_MOST, _MOST_CHARACTERS = 512, 32_000_000

StoredMessages = Sequence[Mapping[str, Any]]


class ResponseStore:
    """Keeps the latest conversations in memory, in the form of chat templates, without instructions.

    Those that were used least recently are dropped. Identifiers cannot be guessed.
    """

    def __init__(self, most: int = _MOST, most_characters: int = _MOST_CHARACTERS) -> None:
        self._most, self._most_characters = most, most_characters
        self._kept: OrderedDict[str, tuple[StoredMessages, int]] = OrderedDict()
        self._characters = 0

    def put(self, id_: str, messages: StoredMessages) -> None:
        size = len(repr(messages))
        self._kept[id_] = messages, size
        self._characters += size
        while len(self._kept) > self._most or self._characters > self._most_characters:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._characters -= dropped

    def get(self, id_: str) -> StoredMessages | None:
        """Return the conversation up to and with the response `id_`, None if it is not kept."""
        if id_ not in self._kept:
            return None
        self._kept.move_to_end(id_)
        return self._kept[id_][0]

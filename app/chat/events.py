"""The events of a chat, from the threads of the model and of the history, and their queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from edgespec.app.chat.messages import BranchMessage

if TYPE_CHECKING:  # imports numpy
    from edgespec.app.chat.chat_model import TokenTrace


@dataclass(frozen=True, slots=True)
class Loading:
    share: float


@dataclass(frozen=True, slots=True)
class Loaded:
    context: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    error: str


@dataclass(frozen=True, slots=True)
class TextAppended:
    item: BranchMessage
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer: with a result, with an error, or neither if it was withdrawn before."""

    item: BranchMessage
    result: TokenTrace | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """Another branch or conversation is shown: all messages except the first `keep` must be drawn again.

    `at` is the message to scroll to, None for the end.
    """

    keep: int
    at: int | None = None


@dataclass(frozen=True, slots=True)
class TrimOption:
    """Leave out the messages before `since`, `dropped` questions with their answers; `tokens` remain."""

    since: int
    dropped: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ContextOverflow:
    """A conversation of `tokens` does not fit into the context, or the user asked what to leave out."""

    item: BranchMessage
    tokens: int
    options: tuple[TrimOption, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """A note for the user. `text` is a message that was typed and could not be stored."""

    note: str
    error: bool = False
    text: str = ""


ChatEvent = Loading | Loaded | LoadFailed | TextAppended | Ended | Changed | ContextOverflow | Notice


class EventQueue:
    """Events from any thread, for the one thread that calls `poll`.

    A function that is put is called by `poll`, in its thread, and returns the events.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[ChatEvent | Callable[[], list[ChatEvent]]] = SimpleQueue()

    def put(self, event: ChatEvent | Callable[[], list[ChatEvent]]) -> None:
        self._queue.put(event)

    def empty(self) -> bool:
        return self._queue.empty()

    def poll(self, wait: float = 0.0) -> list[ChatEvent]:
        """The events since the last call, the text of a burst merged. Waits up to `wait` seconds for one."""
        events: list[ChatEvent] = []
        try:
            first = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
        except Empty:
            return []
        events += first() if callable(first) else [first]
        while not self._queue.empty():
            event = self._queue.get_nowait()
            events += event() if callable(event) else [event]
        return merge_text(events)


def merge_text(events: Sequence[ChatEvent]) -> list[ChatEvent]:
    """The events, with consecutive text of one message in one event."""
    merged: list[ChatEvent] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, TextAppended) and isinstance(last, TextAppended) and last.item is event.item:
            merged[-1] = TextAppended(event.item, last.text + event.text)
        else:
            merged.append(event)
    return merged

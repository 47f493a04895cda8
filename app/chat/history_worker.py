"""The history in a thread of its own: the screen never waits for a disk, or for another chat's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TypeVar

from edgespec.app.chat.messages import ChatEvent, Notice
from edgespec.app.chat.model_worker import explain

if TYPE_CHECKING:  # imports numpy
    from edgespec.app.history.rows import Conversation, StoredMessage
    from edgespec.app.history.store import History

T = TypeVar("T")
Kept = tuple["Conversation", "list[StoredMessage]", "int | None"]
"""What a change left in the history: the conversation, its branch, and the answer that is to be written."""


class HistoryWorker:
    """Runs jobs on one History, in order. It is opened by the first of them.

    A history that cannot be opened is replaced by a temporary one, so that there is always a chat; `note`
    then says so. It also says what else the user must know, and is complete once a job has run.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.note = ""
        self._path = path
        self._history: History | None = None
        self._temporary: TemporaryDirectory[str] | None = None
        self._thread = ThreadPoolExecutor(1, "edgespec-history")

    def do(self, job: Callable[[History], T]) -> Future[T]:
        """What `job` returns or raises, later."""
        return self._thread.submit(lambda: job(self._open()))

    def close(self) -> None:
        """Wait for what was submitted, and close the file."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    def _open(self) -> History:
        if self._history is None:
            from edgespec.app.history.store import History
            from edgespec.core import EdgespecError

            try:
                self._history = History(self._path)
                self.note = self._history.note
            except EdgespecError as error:
                self._temporary = TemporaryDirectory(prefix="edgespec-")
                self._history = History(Path(self._temporary.name) / "history.db")
                self.note = f"{error} Until then nothing of this chat is kept."
        return self._history

    def _close(self) -> None:
        if self._history is not None:
            self._history.close()
        if self._temporary is not None:
            self._temporary.cleanup()


class Jobs:
    """Jobs of the history whose outcome is heard in the thread of the screen, through its queue of events."""

    def __init__(self, store: HistoryWorker, put: Callable[[Callable[[], list[ChatEvent]]], object]) -> None:
        self.pending = 0  # whose outcome was not heard yet
        self._store, self._put = store, put

    def do(self, job: Callable[[History], T], then: Callable[[T], list[ChatEvent]], text: str = "") -> None:
        """Run `job`, then hear `then`. `text` is given back to the user if that fails."""
        self.pending += 1

        def outcome(future: Future[T]) -> list[ChatEvent]:
            self.pending -= 1
            error = future.exception()
            if error is not None:
                return [Notice(explain(error), bad=True, text=text)]
            return then(future.result())

        self._store.do(job).add_done_callback(lambda future: self._put(lambda: outcome(future)))


def as_kept(history: History, conversation: int, answer: int | None = None) -> Kept:
    return history.conversation(conversation), history.branch(conversation), answer


def ask(history: History, conversation: int, text: str, parent: int | Literal["head"] | None) -> int:
    """Keep a question, and make room for its answer, whose number is returned."""
    history.append(conversation, "user", text, parent=parent)
    return history.append(conversation, "assistant", state="partial").id


def delete_conversation(history: History, number: int) -> list[dict[str, str]]:
    """Delete a conversation; returns what the model was told of it, which is to be forgotten too."""
    system = history.conversation(number).system
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": one.role, "content": one.text} for one in history.branch(number)]
    history.delete(number)
    return messages

"""The history in its own thread: the screen waits neither for the disk nor for a lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Literal, TypeVar

from edgespec.app.chat.events import ChatEvent, Notice
from edgespec.app.chat.messages import BranchMessage, stored_stats
from edgespec.app.chat.model_worker import explain

if TYPE_CHECKING:  # these import numpy
    from edgespec.app.chat.chat_model import TokenTrace
    from edgespec.app.history.rows import Conversation, StoredMessage
    from edgespec.app.history.store import History

T = TypeVar("T")
_CHECKPOINT = 0.25  # seconds


@dataclass(frozen=True, slots=True)
class BranchSnapshot:
    """A conversation as the history has it after a change: its branch shown, and the answer to generate."""

    conversation: Conversation
    messages: list[StoredMessage]
    answer: int | None


class HistoryWorker:
    """Runs jobs on one History, in order. The first job opens it.

    A history that cannot be opened is replaced by a temporary one. `note` is a message for the user about
    that, or about a damaged file; it is complete once a job has run.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.note = ""
        self._path = path
        self._history: History | None = None
        self._temporary: TemporaryDirectory[str] | None = None
        self._thread = ThreadPoolExecutor(1, "edgespec-history")

    def do(self, job: Callable[[History], T]) -> Future[T]:
        """Run `job` in the thread of the history."""
        return self._thread.submit(lambda: job(self._open()))

    def close(self) -> None:
        """Wait for the submitted jobs, and close the file."""
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
                self.note = f"{error}; until then this chat is not saved"
        return self._history

    def _close(self) -> None:
        if self._history is not None:
            self._history.close()
        if self._temporary is not None:
            self._temporary.cleanup()


class HistoryJobs:
    """Jobs of the history whose results are handled in the thread of the screen, through its event queue."""

    def __init__(
        self, history: HistoryWorker, put: Callable[[Callable[[], list[ChatEvent]]], object]
    ) -> None:
        self.pending = 0  # jobs whose result is not handled yet
        self._history, self._put = history, put

    def do(self, job: Callable[[History], T], then: Callable[[T], list[ChatEvent]], text: str = "") -> None:
        """Run `job`, then `then` on its result. If the job fails, `text` is returned to the user."""
        self.pending += 1

        def outcome(future: Future[T]) -> list[ChatEvent]:
            self.pending -= 1
            error = future.exception()
            if error is not None:
                return [Notice(explain(error), error=True, text=text)]
            return then(future.result())

        self._history.do(job).add_done_callback(lambda future: self._put(lambda: outcome(future)))


class AnswerRecorder:
    """Stores answers while they are generated: a kill loses at most the text of `_CHECKPOINT` seconds."""

    def __init__(self, jobs: HistoryJobs) -> None:
        self._jobs = jobs
        self._saved_at = 0.0

    def start(self) -> None:
        """Count the time from now on."""
        self._saved_at = monotonic()

    def add(self, item: BranchMessage) -> None:
        """Store the new text of `item` if the last time is long enough ago."""
        if monotonic() - self._saved_at > _CHECKPOINT:
            self._save(item)

    def finish(self, item: BranchMessage, trace: TokenTrace | None, error: str) -> None:
        """Store the rest of `item` and how its generation ended."""
        complete = trace is not None and trace.stop_reason in ("end", "stop", "length")
        state: Literal["complete", "stopped"] = "complete" if complete else "stopped"
        item.error, item.state = error, state
        self._save(item)
        number, stats, sources = item.id, None, None
        if trace is not None:
            item.stats = stats = stored_stats(trace)
            item.sources = sources = [*item.sources, *trace.sources()]
        self._jobs.do(lambda db: db.finish(number, state, stats=stats, sources=sources), lambda _: [])

    def _save(self, item: BranchMessage) -> None:
        self.start()
        more, number = item.text[item.stored :], item.id
        if more:
            item.stored = len(item.text)
            self._jobs.do(lambda history: history.append_text(number, more), lambda _: [])


def snapshot(history: History, conversation: int, answer: int | None = None) -> BranchSnapshot:
    return BranchSnapshot(history.conversation(conversation), history.branch(conversation), answer)


def append_question(
    history: History, conversation: int, text: str, parent: int | Literal["head"] | None
) -> int:
    """Store a question and an empty answer to it. Returns the id of the answer."""
    history.append(conversation, "user", text, parent=parent)
    return history.append(conversation, "assistant", state="partial").id


def delete_conversation(history: History, number: int) -> list[dict[str, str]]:
    """Delete a conversation. Returns its messages as a model gets them, to delete its snapshots, too."""
    system = history.conversation(number).system
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": one.role, "content": one.text} for one in history.branch(number)]
    history.delete(number)
    return messages

"""Many requests on one engine: a bounded queue before the thread that owns the models.

Programs that serve others (`edgespec serve`, `edgespec mcp`) talk to an engine through this alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from edgespec.app.engine.engine import Engine
from edgespec.app.engine.prompt_cache import PromptCache
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.app.engine.running import RunningRequest
from edgespec.app.engine.worker import SerialWorker
from edgespec.core import EdgespecError, TokenLogprob


class StoppingError(EdgespecError):
    """No further requests are taken."""


class BusyError(EdgespecError):
    """The queue is full. Ask again after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class Listener(Protocol):
    """Hears of one request, in the engine's thread: nothing here may block or raise."""

    def wrote(self, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Text that can no longer change (maybe none yet), and the final tokens since the last call."""

    def ended(self, result: GenerationStats, error: Exception | None) -> None:
        """The last call: `error` is an EdgespecError for what the asker can mend."""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request that was let in. `cancel` may come from any thread and works within one round."""

    request: Request
    listener: Listener
    client: str
    asked: float = field(default_factory=monotonic)

    def cancel(self) -> None:
        self.request.cancel()


@dataclass(frozen=True, slots=True)
class QueueStats:
    """How busy a service is."""

    running: int
    waiting: int
    parallel: int


class Scheduler:
    """Answers requests in fair order: clients take turns, and each one's requests come in order.

    All methods may be called from any thread.
    """

    def __init__(self, engine: Engine, *, parallel: int = 0, queue: int = 64) -> None:
        """At most `parallel` run in one batch (0: as many as `engine` has slots), at most `queue` wait.

        More slots than that keep what earlier conversations have read, and so does the disk. The engine
        belongs to this service from now on.
        """
        self.engine = engine
        engine.prompt_cache = engine.prompt_cache or PromptCache()
        self.parallel, self._most = parallel or len(engine.slots), queue
        self._waiting: dict[str, deque[QueuedRequest]] = {}  # by client, in the order of their turns
        self._running: list[QueuedRequest] = []
        self._lock = threading.Lock()
        self._seconds = 5.0  # an answer takes, by running mean
        self._closing = False
        self._thread = SerialWorker()

    @property
    def load(self) -> QueueStats:
        with self._lock:
            return QueueStats(len(self._running), self._count(), self.parallel)

    def submit(self, request: Request, listener: Listener, client: str = "") -> QueuedRequest:
        """Queue `request`. Raises BusyError when too many wait."""
        ticket = QueuedRequest(request, listener, client)
        with self._lock:
            waiting = self._count()
            if self._closing:
                raise EdgespecError("The server is stopping.")
            if waiting >= self._most + self.parallel - len(self._running):  # those begin with the next pass
                raise BusyError(waiting, max(1.0, self._seconds * waiting / self.parallel))
            self._waiting.setdefault(client, deque()).append(ticket)
        self._thread.submit(self._work)
        return ticket

    def close(self, timeout: float = 5.0) -> None:
        """Cancel everything and free the models."""
        with self._lock:
            self._closing = True
            tickets = [*self._running, *(t for queue in self._waiting.values() for t in queue)]
        for ticket in tickets:
            ticket.cancel()
        self._thread.submit(self.engine.close)
        self._thread.close(timeout)

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _take(self) -> QueuedRequest | None:
        """The next in turn; its client goes to the end of the line."""
        with self._lock:
            for client in list(self._waiting):
                queue = self._waiting.pop(client)
                ticket = queue.popleft()
                if queue:
                    self._waiting[client] = queue
                self._running.append(ticket)
                return ticket
        return None

    def _work(self) -> None:
        """Answer until nothing waits: one pass after the other for all that run. In the engine's thread."""
        writings: dict[RunningRequest, _Told] = {}
        while True:
            while len(writings) < self.parallel and (ticket := self._take()) is not None:
                self._begin(ticket, writings)
            if not writings:
                return
            for writing in [one for one in writings if one.over]:
                self._end(writings.pop(writing), writing)
            if not writings:
                continue
            try:
                for writing, text in self.engine.advance(list(writings)):
                    writings[writing].tell(text)
            except Exception as error:  # noqa: BLE001 - every asker must hear of it, and the next be served
                for writing, told in writings.items():
                    self._end(told, writing, error)
                writings.clear()

    def _begin(self, ticket: QueuedRequest, writings: dict[RunningRequest, _Told]) -> None:
        told = _Told(ticket)
        busy = [writing.slot for writing in writings]
        try:
            free = [slot for slot in self.engine.slots if slot not in busy]
            writings[self.engine.begin(ticket.request, told.result, free)] = told
        except Exception as error:  # noqa: BLE001
            self._gone(told, error)

    def _end(self, told: _Told, writing: RunningRequest, error: Exception | None = None) -> None:
        try:
            rest = self.engine.finish(writing)
            if error is None:
                told.tell(rest)
        except Exception as failure:  # noqa: BLE001
            error = error or failure
        self._gone(told, error)

    def _gone(self, told: _Told, error: Exception | None) -> None:
        with self._lock:
            self._running.remove(told.ticket)
            self._seconds += 0.2 * (monotonic() - told.ticket.asked - self._seconds)
        told.ticket.listener.ended(told.result, error)


class _Told:
    """A request under way, and what its listener has heard."""

    def __init__(self, ticket: QueuedRequest) -> None:
        self.ticket, self.result = ticket, GenerationStats()
        self._tokens = self._logprobs = 0

    def tell(self, text: str) -> None:
        result = self.result
        tokens, logprobs = result.tokens[self._tokens :], result.logprobs[self._logprobs :]
        if text or tokens:
            self._tokens, self._logprobs = len(result.tokens), len(result.logprobs)
            self.ticket.listener.wrote(text, tokens, logprobs)

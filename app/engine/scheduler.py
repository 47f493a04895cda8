"""Many requests on one engine: a bounded queue for the thread that owns the models.

Programs that serve others (`edgespec serve`, `edgespec mcp`) use an engine only through this.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from edgespec.app.engine.engine import Engine
from edgespec.app.engine.prompt_cache import PromptCache
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.running import RunningRequest
from edgespec.app.engine.worker import SerialWorker
from edgespec.core import EdgespecError


class StoppingError(EdgespecError):
    """No further requests are accepted."""


class BusyError(EdgespecError):
    """The queue is full. Try again after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class Listener(Protocol):
    """Receives one request's steps, in the engine's thread: its methods must not block or raise."""

    def stepped(self, step: Step) -> None:
        """Called for a step that added text or tokens."""

    def ended(self, stats: GenerationStats, error: Exception | None) -> None:
        """Called last: `error` is an EdgespecError for what the client can fix."""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request that was admitted. `cancel` may come from any thread and works within one round."""

    request: Request
    listener: Listener
    client: str
    asked: float = field(default_factory=monotonic)

    def cancel(self) -> None:
        self.request.cancel()


@dataclass(frozen=True, slots=True)
class QueueStats:
    """How busy a scheduler is."""

    running: int
    waiting: int
    parallel: int


class Scheduler:
    """Answers requests in fair order: clients take turns, and each client's requests are in order.

    All methods may be called from any thread.
    """

    def __init__(self, engine: Engine, *, parallel: int = 0, queue: int = 64) -> None:
        """At most `parallel` run in one batch (0: as many as `engine` has slots), at most `queue` wait.

        More slots than that keep the KV cache of earlier conversations, and so do snapshots. The engine
        belongs to this scheduler from now on.
        """
        self.engine = engine
        engine.pool.snapshots = engine.pool.snapshots or PromptCache()
        self.parallel, self._most = parallel or len(engine.pool.slots), queue
        self._waiting: dict[str, deque[QueuedRequest]] = {}  # by client, in the order of their turns
        self._running: list[QueuedRequest] = []
        self._lock = threading.Lock()
        self._seconds = 5.0  # per answer, as a running mean
        self._closing = False
        self._thread = SerialWorker()

    @property
    def load(self) -> QueueStats:
        with self._lock:
            return QueueStats(len(self._running), self._count(), self.parallel)

    def submit(self, request: Request, listener: Listener, client: str = "") -> QueuedRequest:
        """Queue `request`. Raises BusyError when too many wait, StoppingError after `close`."""
        queued = QueuedRequest(request, listener, client)
        with self._lock:
            waiting = self._count()
            if self._closing:
                raise StoppingError("The server is stopping.")
            if waiting >= self._most + self.parallel - len(
                self._running
            ):  # free slots take some with the next pass
                raise BusyError(waiting, max(1.0, self._seconds * waiting / self.parallel))
            self._waiting.setdefault(client, deque()).append(queued)
        self._thread.submit(self._work)
        return queued

    def close(self, timeout: float = 5.0) -> None:
        """Cancel everything and free the models."""
        with self._lock:
            self._closing = True
            admitted = [*self._running, *(one for queue in self._waiting.values() for one in queue)]
        for one in admitted:
            one.cancel()
        self._thread.submit(self.engine.close)
        self._thread.close(timeout)

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _take(self) -> QueuedRequest | None:
        """Return the next request in turn; its client moves to the end of the queue."""
        with self._lock:
            for client in list(self._waiting):
                queue = self._waiting.pop(client)
                queued = queue.popleft()
                if queue:
                    self._waiting[client] = queue
                self._running.append(queued)
                return queued
        return None

    def _work(self) -> None:
        """Answer until the queue is empty, with one pass after the other. In the engine's thread."""
        running: dict[RunningRequest, QueuedRequest] = {}
        while True:
            while len(running) < self.parallel and (queued := self._take()) is not None:
                self._begin(queued, running)
            if not running:
                return
            for one in [one for one in running if one.over]:
                self._end(running.pop(one), one)
            if not running:
                continue
            try:
                for one, step in self.engine.step(list(running)):
                    _deliver(running[one].listener, step)
            except Exception as error:  # noqa: BLE001 - every client must get it, and the next be served
                for one, queued in running.items():
                    self._end(queued, one, error)
                running.clear()

    def _begin(self, queued: QueuedRequest, running: dict[RunningRequest, QueuedRequest]) -> None:
        busy = [one.slot for one in running]
        try:
            free = [slot for slot in self.engine.pool.slots if slot not in busy]
            running[self.engine.begin(queued.request, free)] = queued
        except Exception as error:  # noqa: BLE001
            self._gone(queued, GenerationStats(), error)

    def _end(self, queued: QueuedRequest, one: RunningRequest, error: Exception | None = None) -> None:
        try:
            step = self.engine.finish(one)
            if error is None:
                _deliver(queued.listener, step)
        except Exception as failure:  # noqa: BLE001
            error = error or failure
        self._gone(queued, one.stats, error)

    def _gone(self, queued: QueuedRequest, stats: GenerationStats, error: Exception | None) -> None:
        with self._lock:
            self._running.remove(queued)
            self._seconds += 0.2 * (monotonic() - queued.asked - self._seconds)
        queued.listener.ended(stats, error)


def _deliver(listener: Listener, step: Step) -> None:
    if step.events or step.tokens:
        listener.stepped(step)

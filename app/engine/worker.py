"""The one thread that owns the models. Other threads submit jobs and get results through callbacks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

WorkItem = Callable[[], None]


class SerialWorker:
    """Runs jobs in order in one thread. A job reports through callbacks and must not raise.

    A daemon: a program that ends does not wait for a forward pass.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[WorkItem | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="edgespec-engine", daemon=True)
        self._thread.start()

    def submit(self, job: WorkItem) -> None:
        self._jobs.put(job)

    def close(self, timeout: float = 5.0) -> None:
        """Finish the submitted jobs, then end; wait at most `timeout` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

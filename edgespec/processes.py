"""Child processes, for work that may abort the process or take memory that is not released."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from edgespec.core import Cancelled


def program_folder() -> Path | None:
    """The folder of a frozen program (one that runs without Python); None where Python runs this."""
    return Path(sys.executable).resolve().parent if getattr(sys, "frozen", False) else None


def command(frozen: str, *python: str) -> list[str]:
    """The command line of a child process: Python with the arguments `python`.

    In a frozen program there is no Python, so it starts itself; `app.cli.entry` runs the child for `frozen`.
    """
    return [sys.executable, *(python if program_folder() is None else [frozen])]


@contextmanager
def child(arguments: Sequence[str], patience: float = 0.0, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process, and end it when the block ends: at once, or after `patience` seconds to end by itself.

    `options` are those of `subprocess.Popen`. Raises OSError where the process cannot start.

    The process is started in a thread, since Python raises a signal's exception in the main thread: raised
    inside Popen, it would leave a process that nothing refers to.
    """
    started: list[subprocess.Popen[Any]] = []
    errors: list[Exception] = []
    lock, over = Lock(), False

    def start() -> None:
        with lock:
            if not over:
                try:
                    started.append(subprocess.Popen(arguments, **options))
                except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
                    errors.append(error)

    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("creationflags", getattr(subprocess, "CREATE_NO_WINDOW", 0))
    try:
        thread = Thread(target=start, name="edgespec-child")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        yield started[0]
    finally:
        with lock:  # a thread that has not come so far starts nothing
            over = True
        for process in started:
            _end(process, patience)


def _end(process: subprocess.Popen[Any], patience: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        if patience and process.poll() is None:
            process.terminate()
            process.wait(patience)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:  # not read to its end, which a process started by this one may hold open
            with suppress(OSError):
                pipe.close()


def run(
    arguments: Sequence[str], tick: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a command to its end and return its exit code and standard error.

    `tick` is called ten times per second and stops the command by returning False: then this raises
    Cancelled. On any exception, the process has ended before it is raised.
    """
    options: dict[str, Any] = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "encoding": "utf-8",
        "errors": "replace",
        "env": None if environment is None else dict(environment),
        "start_new_session": True,  # Ctrl-C in the terminal reaches it through this process
    }
    with child(arguments, **options) as process:
        while True:
            with suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=0.1)
                return process.returncode, errors
            if not tick():
                raise Cancelled

"""Child processes, for work that may abort the process or take memory that is not released."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from edgespec.core import Cancelled


def program_folder() -> Path | None:
    """The folder of a frozen program (one that runs without Python); None where Python runs this."""
    return Path(sys.executable).resolve().parent if getattr(sys, "frozen", False) else None


def command(frozen: str, *python: str) -> list[str]:
    """The command line of a child process: Python with the arguments `python`.

    In a frozen program there is no Python, so it starts itself; `app.cli.entry` runs the child for `frozen`.
    """
    return [sys.executable, *(python if program_folder() is None else [frozen])]


def run(
    arguments: Sequence[str], tick: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a command to its end and return its exit code and standard error.

    `tick` is called ten times per second and stops the command by returning False: then this raises
    Cancelled. On any exception, the process has ended before it is raised.
    """
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=None if environment is None else dict(environment),
        start_new_session=True,  # Ctrl-C in the terminal reaches it through this process
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=0.1)
                return process.returncode, errors
            if not tick():
                raise Cancelled
    except BaseException:
        process.kill()
        process.communicate()
        raise

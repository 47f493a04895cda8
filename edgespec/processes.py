"""Work done by a process of its own, since what does it may abort or take memory that is not given back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from edgespec.core import Cancelled


def command(module: str, frozen: str) -> list[str]:
    """What runs `module`'s main in another process; a frozen program must call it for the word `frozen`."""
    if getattr(sys, "frozen", False):
        return [sys.executable, frozen]
    return [sys.executable, "-I", "-m", module]


def run(
    arguments: Sequence[str], tick: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a command to its end; its exit code and what it said on standard error.

    `tick` is called ten times a second and stops it by returning False: then, and on any exception, the
    process is gone before this raises. Raises Cancelled.
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
                _, said = process.communicate(timeout=0.1)
                return process.returncode, said
            if not tick():
                raise Cancelled
    except BaseException:
        process.kill()
        process.communicate()
        raise

"""What commands show on a terminal while they work, and how Ctrl-C ends them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from edgespec.app.terminal import one_line


@contextmanager
def bar(name: str, *, lines: bool = False) -> Iterator[Callable[[str, float], bool]]:
    """Shows progress on a terminal; elsewhere, with `lines`, a line for each thing that is begun."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn())
    said = ""
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(name, total=1.0)

        def show(what: str, fraction: float) -> bool:
            nonlocal said
            bars.update(task, completed=fraction, description=f"{name}: {what}")
            if lines and what != said and not console.is_terminal:
                sys.stderr.write(f"{one_line(name)}: {what}\n")
            said = what
            return True

        yield show


@contextmanager
def stopped_by_ctrl_c(show: Callable[[str, float], bool]) -> Iterator[Callable[[str, float], bool]]:
    """Ctrl-C becomes an answer of `show`: raised within a native call it would be lost. A second raises."""
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():  # only that one hears signals
        yield show
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda what, fraction: show(what, fraction) and not stopped
    finally:
        signal.signal(signal.SIGINT, before)

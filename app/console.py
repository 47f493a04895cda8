"""Tables and progress bars of commands, and their end by Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from edgespec.app.terminal import one_line
from edgespec.core import Cancelled


def table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int], width: int = 120
) -> str:
    """A table in lines of the terminal's width, or of `width` where output is no terminal.

    The columns whose numbers are in `right` are aligned to the right; the last column may be wrapped.
    """
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        shown.add_column(title, justify="right" if i in right else "left", no_wrap=i + 1 < len(titles))
    for row in rows:
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False)
    with console.capture() as out:
        console.print(shown)
    return "\n".join(line.rstrip() for line in out.get().splitlines())


@contextmanager
def bar(name: str, *, lines: bool = False) -> Iterator[Callable[[str, float], bool]]:
    """Show progress on a terminal; elsewhere, with `lines`, print a line for each activity that begins.

    Yields a function of the current activity and the share that is done; it returns True.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn())
    latest = ""
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(name, total=1.0)

        def show(what: str, fraction: float) -> bool:
            nonlocal latest
            bars.update(task, completed=fraction, description=f"{name}: {what}")
            if lines and what != latest and not console.is_terminal:
                sys.stderr.write(f"{one_line(name)}: {what}\n")
            latest = what
            return True

        yield show


@contextmanager
def on_ctrl_c(call: Callable[[], None], *, once: bool = False) -> Iterator[None]:
    """Call `call` on Ctrl-C; with `once`, a second one raises. Does nothing outside the main thread."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if once:
            signal.signal(signal.SIGINT, before)
        call()

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # another thread, which receives no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stopped_by_ctrl_c(show: Callable[[str, float], bool]) -> Iterator[Callable[[str, float], bool]]:
    """Yield `show`, which returns False after Ctrl-C: an exception within a native call would be lost."""
    stopped: list[bool] = []
    with on_ctrl_c(lambda: stopped.append(True), once=True):
        yield lambda what, fraction: show(what, fraction) and not stopped


@contextmanager
def interruptible(note: str = "nothing was changed") -> Iterator[None]:
    """Exit with 130 and one line on Ctrl-C, with 143 on SIGTERM, so that unfinished files are removed."""
    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except (Cancelled, KeyboardInterrupt):
        sys.stderr.write(f"edgespec: stopped; {note}\n")
        sys.exit(130)

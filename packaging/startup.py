"""How long the program takes to start, beside the source install: packaging/startup.py PROGRAM [PROGRAM...]

Prints medians in seconds, of runs in turn: `--version`; the chat's first screen; the starter model's first
token from the launch. The machine should be idle, and the files in its cache: each is run once before.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import monotonic

ROUNDS = 5
SOURCE = [sys.executable, "-m", "edgespec.app.cli.main"]
ANSWER = ["run", "Name three colours.", "-m", "smollm2-135m", "--max-tokens", "4", "--draft", "none"]


def version(command: Sequence[str]) -> float:
    start = monotonic()
    subprocess.run([*command, "--version"], check=True, stdout=subprocess.DEVNULL)
    return monotonic() - start


def until(command: Sequence[str], seen: bytes) -> float:
    """Seconds until the program wrote `seen` (or anything, if it is empty) to its terminal."""
    start = monotonic()
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], list(command))
    said = b""
    while not said or seen not in said:
        if not select.select([fd], [], [], 120)[0]:
            sys.exit(f"edgespec: {' '.join(command)} says nothing of {seen!r}")
        said += os.read(fd, 65536)
    seconds = monotonic() - start
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(fd)
    return seconds


MEASURES: dict[str, Callable[[Sequence[str]], float]] = {
    "--version": version,
    "first screen": lambda command: until([*command, "chat", "-m", "smollm2-135m"], b"sends"),
    "first token": lambda command: until([*command, *ANSWER], b""),
}


def main() -> None:
    ways: dict[str, list[str]] = {"source": SOURCE} | {name: [name] for name in sys.argv[1:]}
    for name, measure in MEASURES.items():
        for command in ways.values():
            measure(command)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, command in ways.items():
                found[way].append(measure(command))
        for way, seconds in found.items():
            print(f"{name:<12}  {median(seconds):5.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})  {way}")


if __name__ == "__main__":
    main()
